"""What is measured: gate scores, true subgoals, code identity, transplant, openings at arrivals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_internal_rl import WORLD, parts, rng
from test_metacontroller import batch, frozen_base

import analysis
from analysis import (
    code_identity,
    code_outcomes,
    control_loss,
    control_success,
    exchanged_nll,
    gate_scores,
    kl_by_gate,
    opened_at_arrivals,
    opened_by_subgoals,
    steer_by_subgoal,
    success_by_leg,
    success_by_subgoals,
    transplant,
    way_to_target,
)
from envs import (
    Trajectories,
    World,
    distances,
    generate,
    grid_expert,
    sample_layouts,
    simulate,
)
from internal_rl import InternalEnvironment
from metacontroller import Decoder
from model import action_nll


def test_control_loss_follows_the_label_and_its_gradient_reaches_the_decoder():
    base, data = frozen_base(), batch()
    torch.manual_seed(0)
    decoder = Decoder(4, 32, 4)
    loss = control_loss(
        base, decoder, data["obs"][:, :-1], *(data[k] for k in ("action", "subgoal", "mask"))
    )
    loss.backward()
    assert all(p.grad.abs().max() > 0 for p in decoder.parameters())
    # By hand: each step under the matrix of its own subgoal.
    U = decoder.matrix(torch.eye(4))[data["subgoal"]]  # (B, T, D, D)
    e = base.lower(data["obs"][:, :-1])
    nll = action_nll(base.action_logits(e + (U @ e[..., None])[..., 0]), data["action"])
    assert torch.allclose(loss, nll[data["mask"]].mean(), atol=1e-5)


def test_gate_scores_by_hand():
    beta = torch.tensor([[0.9, 0.1, 0.8, 0.05, 0.5, 0.95, 0.9]])
    true = torch.tensor([[0, 0, 1, 0, 1, 0, 0]], dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    scores = gate_scores(
        beta, true, mask
    )  # found at 2 and 5; t=0 never counts, the padding neither
    assert scores["switches"] == 2 and scores["true_switches"] == 2
    assert scores["precision"] == 0.5 and scores["recall"] == 0.5 and scores["f1"] == 0.5
    assert scores["f1_1"] == 1.0  # 5 is one step from 4
    assert np.isclose(scores["undecided"], 2 / 5)  # .8 and .5 of the five gates after t=0
    far, wide = torch.zeros(1, 20), torch.ones(1, 20, dtype=torch.bool)
    far[0, 3], far[0, 12], true = 1.0, 1.0, wide & (torch.arange(20) == 8)
    scores = gate_scores(far, true, wide)  # found at 3 and 12, true at 8: five and four steps away
    assert scores["f1"] == scores["f1_1"] == 0 and scores["f1_5"] == 1.0


def test_true_subgoal_controllers_are_switched_at_the_right_moments():
    """The controller in force at each step is the one of the subgoal that the world itself says
    is next."""
    base, _, _ = parts()
    decoder = Decoder(4, 32, 4)
    chosen = []

    class Spy(torch.nn.Module):
        n_z = decoder.n_z

        def forward(self, e, z):
            chosen.append(z.argmax(-1))
            return decoder(e, z)

    codes = torch.eye(Spy.n_z)
    steer = steer_by_subgoal(Spy(), codes)
    data = generate(WORLD, np.random.default_rng(0), 20)
    step = [0]

    def expert(worlds, alive):  # replay demonstrations, asking the rule as the player would
        steer(torch.zeros(20, 32), {}, worlds, np.arange(20))
        step[0] += 1
        return data.action[alive, step[0] - 1]

    colours = lambda n: [
        (c)
        for a, b in zip(data.agent[n, : data.length[n]], data.agent[n, 1 : data.length[n] + 1])
        if a != b
        for c in [{cell: k for k, cell in enumerate(data.things[n, :5])}.get(b)]
        if c is not None
    ]
    simulate(WORLD, [tuple(colours(n)) for n in range(20)], data.things, data.agent[:, 0], expert)
    chosen = torch.stack(chosen, 1).numpy()
    assert (chosen[:, : data.subgoal.shape[1]][data.mask()] == data.subgoal[data.mask()]).all()
    success, legs = control_success(base, decoder, codes, WORLD, rng(), 20)
    assert 0 <= success <= 1 and len(legs) == len(WORLD.post_task)


def test_code_identity_of_real_rollouts_of_an_untrained_decoder_is_nothing():
    base, meta, _ = parts()
    decoder = Decoder(3, 32, 4)  # too weak to steer
    codes, outcome = code_outcomes(base, decoder, WORLD, rng(), codes=64, layouts=32)
    assert codes.shape == (64, 3) and outcome.shape == (64, 32)
    measured = code_identity(outcome, 4)
    assert abs(measured["code_identity"]) < 0.03 and measured["code_identity_max"] == math.log(4)


def test_code_identity_knows_names_from_places(monkeypatch):
    """Planted codes: one that names a subgoal gives all the information, one that names a place
    or nothing gives none."""
    world = World(G=5, O=5, W=0, T=30, task_set="errands")
    base, meta, _ = parts()

    def outcome_by(rule):
        def fake_play(base, world, tasks, rng, steer, state, layouts):
            things, agent = layouts
            target = rule(state["z"].numpy(), things, np.random.default_rng(0))
            cells = things[np.arange(len(things)), target]
            data = SimpleNamespace(
                agent=np.stack([agent, cells], 1), length=np.ones(len(agent), int), things=things
            )
            return data, None, None

        monkeypatch.setattr(analysis, "play", fake_play)
        _, outcome = code_outcomes(base, meta.decoder, world, np.random.default_rng(1))
        return code_identity(outcome, len(world.subgoals))

    quadrant = lambda z: (z[:, 0] > 0) * 2 + (z[:, 1] > 0)
    by_name = outcome_by(lambda z, things, rng: quadrant(z))
    names, most = by_name["code_identity"], by_name["code_identity_max"]
    assert np.isclose(most, math.log(4)) and names > 0.97 * most and by_name["code_none"] == 0
    assert np.isclose(by_name["code_outcomes"], most, atol=0.05)  # four outcomes, equally frequent
    nothing = outcome_by(lambda z, things, rng: rng.integers(4, size=len(z)))["code_identity"]
    assert abs(nothing) < 0.01
    corner = np.array([0, 4, 20, 24])
    distance = lambda a, b: np.abs(a // 5 - b // 5) + np.abs(a % 5 - b % 5)
    places = outcome_by(
        lambda z, things, rng: distance(things[:, :4], corner[quadrant(z)][:, None]).argmin(1)
    )["code_identity"]
    assert places < 0.15 * most
    # "None" is an outcome, too: codes that name it for half of the codes tell one bit, and say so.
    # Thing 4 is a colour that begins no subgoal.
    half = outcome_by(lambda z, things, rng: np.where(z[:, 0] > 0, 4, 0))
    assert abs(half["code_none"] - 0.5) < 0.1 and abs(half["code_identity"] - math.log(2)) < 0.02
    assert half["code_outcomes"] < math.log(2) + 1e-6


def planted_play(calls):
    """A world in which the sign of z_1 alone decides which of the colours 0 and 2, which begin
    subgoals, is visited next, if the code is in use; else one is visited at random. Some end
    before any code is put in."""

    def play(base, world, tasks, rng, steer, state, layouts=None):
        things, agent = layouts or sample_layouts(world, rng, len(tasks))
        N = len(tasks)
        e, rows = torch.ones(N, 32), np.arange(N)
        done, acts = np.zeros(N, bool), []
        for steps, progress in ((0, 0), (1, 0), (2, 0), (9, 0), (1, 2)):
            now = np.full(N, steps)
            worlds = SimpleNamespace(steps=now, progress=np.full(N, progress), done=done)
            acts.append(not torch.equal(steer(e, state, worlds, rows), e))
        calls.append(acts)
        length = np.where(rows % 4 == 0, 1, 5)
        drawn = isinstance(steer, InternalEnvironment)
        z = steer.codes[rows, length - 1] if drawn else state["z"]  # that of the visit
        by_code = (z[:, 0].numpy() > 0) * 2
        colour = by_code if drawn or any(acts) else 2 * rng.integers(2, size=N)
        cells = np.stack([agent] * 6, axis=1)
        cells[rows, length] = things[rows, colour]
        progress = np.zeros((N, 5), int)
        progress[rows % 3 == 0, 1:] = 2  # a third have finished the first subgoal
        data = SimpleNamespace(agent=cells, length=length, things=things, progress=progress,
                               mask=lambda: np.arange(5) < length[:, None])
        return data, colour == np.array([task[-1] for task in tasks]), None

    return play


def test_transplanted_codes_act_when_they_should_and_are_compared_with_none(monkeypatch):
    world, calls = World(G=7, O=8, W=0, T=30, task_set="pairs"), []
    base, meta, _ = parts()
    monkeypatch.setattr(analysis, "play", planted_play(calls))
    rates = transplant(base, meta, world, rng(), 600)
    never = [False] * 5
    assert calls == [
        [True] * 5,  # donors: always
        [False, False, True, True, False],  # from step .06 * 30 = 2 on
        never,
        [False] * 4 + [True],  # once both colours of the first subgoal are visited
        never,
    ]
    assert rates["transplant_with"] == rates["unseen_with"] == 1.0
    assert abs(rates["transplant_without"] - 0.5) < 0.1 > abs(rates["unseen_without"] - 0.5)
    # Those which end at step 1 are not counted, nor those that never finish the first subgoal.
    for name in ("with", "without"):
        assert rates[f"transplant_{name}_n"] == 450 and rates[f"unseen_{name}_n"] == 150


def test_an_untrained_decoder_transplants_nothing():
    base, meta, _ = parts()
    meta.decoder = Decoder(3, 32, 4)  # too weak to steer
    rates = transplant(base, meta, WORLD, rng(), 600)
    assert 0 < rates["transplant_without"] < 0.5
    assert abs(rates["transplant_with"] - rates["transplant_without"]) < 0.1


def test_the_kl_is_told_apart_by_the_gate():
    kl = torch.tensor([[7.0, 4.0, 1.0, 2.0, 9.0]])  # the first is open by construction
    beta = torch.tensor([[1.0, 1.0, 0.2, 0.6, 0.1]])
    mask = torch.tensor([[True, True, True, True, False]])
    assert kl_by_gate(kl, beta, mask) == {"kl_open": 3.0, "kl_shut": 1.0}


def test_arrivals_straight_from_a_colour_are_told_from_others():
    """A row of four cells: 0 1 . 2; from 0 to its neighbour 1, over the empty cell to 2. A late
    gate counts as shut, padding does not count."""
    world = World(G=4, O=3, W=0, T=25, task_set="tiny")

    def episodes(lengths):
        column = lambda *values: np.array([values] * len(lengths))
        return Trajectories(
            things=column(0, 1, 3),
            agent=column(0, 0, 1, 2, 3, 3),
            action=column(1, 1, 1, 1, 1),
            target=column(1, 1, 2, 2, 0),
            progress=column(0, 0, 1, 1, 2),
            subgoal=column(1, 1, 2, 2, 0),
            segment=column(0, 0, 1, 1, 2),
            length=np.array(lengths),
        )

    gates = torch.tensor([[1.0, 0, 1, 0, 0], [1.0, 0, 0.4, 1, 0.6], [1.0, 0, 1, 0, 1]])
    near, far = opened_at_arrivals(world, episodes([5, 5, 4]), gates)
    assert near.tolist() == [True, False, True] and far.tolist() == [False, True]


def test_gates_on_pairs_are_told_from_gates_on_colours():
    """Both open at every end of a subgoal; only the second also inside one."""
    world = World()  # A.1: two colours a subgoal
    data = generate(world, rng(), 40)
    ends = torch.from_numpy(data.switches()).float()
    colours = torch.zeros_like(ends)
    colours[:, 1:] = torch.from_numpy(data.progress[:, 1:] > data.progress[:, :-1]).float()
    found = opened_by_subgoals(data, ends * 0.9)
    assert found == {"opens_subgoal_end": 1.0, "opens_inside": 0.0}
    found = opened_by_subgoals(data, colours * 0.9)
    assert found == {"opens_subgoal_end": 1.0, "opens_inside": 1.0}
    found = opened_by_subgoals(data, ends * 0)
    assert found == {"opens_subgoal_end": 0.0, "opens_inside": 0.0}


def test_success_by_leg_multiplies_to_success():
    world = World(G=5, O=4, W=0, T=18, task_set="singles", post="0-1-2-3-0")
    draw = rng()
    things, agent = sample_layouts(world, draw, 300)
    lost = np.zeros(300, bool)
    act = grid_expert(world, distances(world, things), draw, lost, eps=0.3)  # often too late
    data, success = simulate(world, [world.post_task] * 300, things, agent, act, draw)
    legs = success_by_leg(world, data, success)
    assert len(legs) == 5 and 0.01 < success.mean() < 0.99
    assert np.prod(legs) == pytest.approx(success.mean())
    # Every colour is a subgoal here; among the errands it is every second, and a rest of one.
    assert success_by_subgoals(world, data, success) == pytest.approx(np.cumprod(legs))
    errands = World(G=5, O=5, W=0, T=18, task_set="errands", post="0-4-1-4-2")
    found = success_by_subgoals(errands, data, success)
    assert found == pytest.approx(np.cumprod(legs)[[1, 3, 4]])


def test_the_way_is_the_same_on_every_turn_of_a_board():
    # A 3 x 3 board: the colour lies in a corner, in the next corner, and one step away.
    data = SimpleNamespace(things=np.array([[8, 2, 1]]), agent=np.array([[0, 0, 0, 0]]),
                           target=np.array([[0, 1, 2]]))
    ways = way_to_target(SimpleNamespace(G=3), data)
    assert ways.tolist() == [[2 * 3 + 2, 2 * 3 + 0, 1 * 3 + 0]]
    turned = SimpleNamespace(things=np.array([[0, 6, 7]]), agent=np.array([[8, 8, 8, 8]]),
                             target=data.target)
    assert way_to_target(SimpleNamespace(G=3), turned).tolist() == ways.tolist()


def test_codes_that_name_subgoals_may_be_exchanged_for_their_like_and_no_others():
    base, data = frozen_base(), batch()
    torch.manual_seed(0)
    decoder = Decoder(4, 32, 4)
    torch.nn.init.normal_(decoder.net[2].weight, std=.3)
    z = torch.eye(4)[data["subgoal"]]  # (B, T, 4)
    z[~data["mask"]] = 99.  # must never be given: steps that do not exist
    subgoal, nothing = data["subgoal"].numpy(), np.zeros(data["mask"].shape, int)
    e = decoder(base.lower(data["obs"][:, :-1]), z)
    nll = action_nll(base.action_logits(e), data["action"])
    own = nll[data["mask"]].mean().item()

    def exchanged(like):
        return exchanged_nll(base, decoder, data, z, like, rng())
    assert exchanged(subgoal) == pytest.approx(own, abs=1e-5)
    assert exchanged(nothing) > own + .01
    # A label of its own for each step: nobody else to take a code from.
    assert exchanged(np.arange(z[..., 0].numel()).reshape(nothing.shape)) == pytest.approx(own)
