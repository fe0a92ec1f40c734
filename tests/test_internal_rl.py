"""Acting and RL: what is remembered between steps, when the policy is asked, and who gets the credit."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import internal_rl
from envs import Trajectories, World, generate
from internal_rl import (InternalEnvironment, Policy, clipped_loss, code_identity, control_success, gaussian_logp, internal_episodes,
                         internal_rl_step, opened_at_arrivals, play, raw_rl_step, relative_advantage, sequence_logp, steer_by_subgoal,
                         transplant)
from metacontroller import Decoder, Metacontroller
from model import SequenceModel

WORLD = World(G=4, O=5, W=1, T=25, task_set="errands")


def parts(mixer="attention", gate="soft", seed=0):
    """A base, a metacontroller with strong controllers and a restless gate, and a policy whose mean depends on its input."""
    torch.manual_seed(seed)
    base = SequenceModel(WORLD.cells, WORLD.things, 32, 3, 4, 48, 8, 1, mixer=mixer, read=2).requires_grad_(False)  # read one layer above the written one
    meta = Metacontroller(32, n_z=3, n_h=8, n_s=8, rank=4, gate=gate, encoder_hidden=16, decoder_hidden=16).requires_grad_(False)
    for weight in (meta.decoder.net[0].weight, meta.decoder.net[2].weight, meta.switch_out.weight, meta.switch_z.weight):
        torch.nn.init.normal_(weight, std=.7)
    policy = Policy(32, 3, inner=16)
    for weight in (policy.mean.weight, policy.block.mixer.out.weight, policy.block.mixer.branch.weight, policy.block.mixer.gate.weight):
        torch.nn.init.normal_(weight, std=.5)  # so that what it remembers moves its mean
    return base, meta, policy


def rng(seed=0):
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def episodes(base, meta, policy, n=40):
    return internal_episodes(base, meta, WORLD, rng(1), n, policy)


@pytest.mark.parametrize("mixer", ["attention", "hawk"])
def test_acting_remembers_the_whole_episode_with_and_without_control(mixer):
    """ln p of the actions taken, step by step with caches while finished episodes are dropped = one full pass over each episode."""
    base, meta, policy = parts(mixer)
    for steered in (False, True):
        env = InternalEnvironment(meta, policy.sampler(), policy.init_memory(60), 60, WORLD.T, "cpu") if steered else None
        with torch.no_grad():
            data, _, player = play(base, WORLD, [WORLD.post_task] * 60, rng(1), env, env.state if env else None)
            e = base.lower(torch.from_numpy(data.obs()[:, :-1]))
            if steered:
                e = meta.decoder(e, env.codes[:, :e.shape[1]])
            log_p = base.action_logits(e).log_softmax(-1).gather(-1, torch.from_numpy(data.action)[..., None])[..., 0]
        mask = torch.from_numpy(data.mask())
        assert len(set(data.length.tolist())) > 3  # some finished early and were dropped
        assert torch.allclose(player.logp[:, :log_p.shape[1]][mask], log_p[mask], atol=1e-4)


def test_gate_when_acting_equals_the_gate_in_training():
    """Same prefix, same codes: the RL-time beta is the training-time beta (Eq. 16), from the first step to the last."""
    base, meta, policy = parts()
    data, _, env = episodes(base, meta, policy)
    e = base.reading(base.lower(torch.from_numpy(data.obs()[:, :-1])))
    _, _, switch_input = meta.encode(e, torch.from_numpy(data.length))
    T = e.shape[1]
    beta = torch.stack([torch.ones(len(e))] + [torch.sigmoid(meta.gate_logit(switch_input[:, t], env.codes[:, t - 1])) for t in range(1, T)], 1)
    mask = torch.from_numpy(data.mask())
    assert torch.allclose(env.gates[:, :T][mask], beta[mask], atol=1e-4)
    share = (beta[:, 1:] > .5)[mask[:, 1:]].float().mean()
    assert .05 < share < .95  # the gate both opens and stays shut in this test


def test_policy_is_asked_exactly_where_the_gate_opens_and_the_code_is_held_between():
    base, meta, policy = parts()
    data, _, env = episodes(base, meta, policy)
    for n in range(40):
        T = int(data.length[n])
        opened = [t for t in range(T) if t == 0 or env.gates[n, t] > .5]
        assert env.count[n] == len(opened)
        for t in range(1, T):
            assert torch.equal(env.codes[n, t], env.codes[n, t - 1]) == (t not in opened)
    e, z, _, mask = env.sequences()
    n = int(env.count.argmax())
    opened = [t for t in range(int(data.length[n])) if t == 0 or env.gates[n, t] > .5]
    assert torch.equal(z[n, :len(opened)], env.codes[n, opened]) and mask[n].sum() == len(opened)
    reading = base.reading(base.lower(torch.from_numpy(data.obs()[n:n + 1, :-1])))[0]
    assert torch.allclose(e[n, :len(opened)], reading[opened], atol=1e-4)


def test_forced_switching_asks_at_every_step():
    base, meta, policy = parts(gate="forced")
    data, _, env = episodes(base, meta, policy)
    assert (env.count.numpy() == data.length).all()


def test_first_ratio_is_one():
    """The recurrent policy, re-evaluated over each episode's sequence, gives the logp it had when it was stepped with its memory."""
    base, meta, policy = parts()
    _, _, env = episodes(base, meta, policy)
    e, z, old_logp, mask = env.sequences()
    ratio = (gaussian_logp(z, policy(e), policy.log_std) - old_logp).exp()
    assert env.count.max() > 3 and (ratio[mask] - 1).abs().max() < 1e-4
    forgetful = gaussian_logp(z, policy(e.flatten(0, 1)[:, None])[:, 0].view(*z.shape), policy.log_std)  # no memory: must differ
    assert ((forgetful - old_logp).exp()[mask] - 1).abs().max() > 1e-2


def test_likelihood_in_portions_equals_the_whole_gradients_included():
    base, meta, policy = parts()
    _, _, env = episodes(base, meta, policy)
    e, z, _, mask = env.sequences()
    whole, portions = gaussian_logp(z, policy(e), policy.log_std), sequence_logp(policy, e, z, env.count, portions=3)
    assert env.count.min() < env.count.max() / 2 and torch.allclose(whole[mask], portions[mask], atol=1e-4)
    weight = torch.randn_like(whole) * mask
    for mine, theirs in zip(*(torch.autograd.grad((x * weight).sum(), list(policy.parameters())) for x in (portions, whole))):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_raw_first_ratio_is_one(monkeypatch):
    base, _, _ = parts()
    base.requires_grad_(True)
    seen = []
    monkeypatch.setattr(internal_rl, "relative_advantage", lambda reward: torch.linspace(-1, 1, len(reward)))
    monkeypatch.setattr(internal_rl, "clipped_loss", lambda logp, old, A, mask, clip: seen.append((logp - old)[mask].exp()) or clipped_loss(logp, old, A, mask, clip))
    monkeypatch.setattr(internal_rl, "simulate", lambda *args: (lambda data, success: (data, np.arange(len(success)) % 2 == 0))(*simulate(*args)))
    from envs import simulate
    raw_rl_step(base, torch.optim.AdamW(base.parameters(), lr=1e-3), WORLD, rng(), 30, epochs=2, clip=.2)
    assert (seen[0] - 1).abs().max() < 1e-4 and (seen[1] - 1).abs().max() > 1e-4


def test_likelihood_sums_over_dimensions():
    torch.manual_seed(0)
    mu, log_std, z = torch.randn(4, 5, 3), torch.randn(3) * .3, torch.randn(4, 5, 3)
    exact = torch.distributions.Independent(torch.distributions.Normal(mu, log_std.exp()), 1).log_prob(z)
    assert torch.allclose(gaussian_logp(z, mu, log_std), exact, atol=1e-5) and exact.shape == (4, 5)


def test_first_policy_is_the_prior():
    policy = Policy(32, 3, inner=16)
    assert torch.equal(policy(torch.randn(2, 4, 32)), torch.zeros(2, 4, 3)) and torch.equal(policy.log_std.exp(), torch.ones(3))


def test_every_episode_gets_its_own_advantage():
    """At ratio 1 the gradient of Eq. 10 on each action of episode n is -A_n / N: its own, whole, and nothing on padding."""
    reward = torch.tensor([0., 1., 0., 0.])
    A = relative_advantage(reward)
    assert torch.allclose(A, (reward - .25) / (math.sqrt(3) / 4 + 1e-3))
    old = torch.randn(4, 3)
    logp = old.clone().requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    clipped_loss(logp, old, A, mask, .2).backward()
    assert torch.allclose(logp.grad, -A[:, None] / 4 * mask)


def test_clipping_stops_the_gradient_on_the_far_side_only():
    old = torch.zeros(4, 1)
    logp = torch.tensor([[.5], [-.5], [.5], [-.5]], requires_grad=True)  # ratios 1.65 and .61
    A = torch.tensor([1., 1., -1., -1.])
    clipped_loss(logp, old, A, torch.ones(4, 1, dtype=torch.bool), .2).backward()
    moved = logp.grad[:, 0] != 0
    assert moved.tolist() == [False, True, True, False]


def test_equal_rewards_teach_nothing():
    base, meta, policy = parts()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    impossible = World(G=4, O=5, W=1, T=8, task_set="errands")  # eight visits in eight steps, from anywhere: no success
    report = internal_rl_step(base, meta, policy, torch.optim.AdamW(policy.parameters(), weight_decay=.1), impossible, rng(), 16, 2, .2)
    assert report["success"] == 0 and all(torch.equal(before[k], v) for k, v in policy.state_dict().items())


def test_the_update_makes_rewarded_codes_likelier():
    """A world where the code decides the reward: internal RL must find it. Here any code above 0 in its first dimension wins."""
    base, meta, policy = parts()
    torch.nn.init.zeros_(policy.mean.weight)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.)
    for k in range(25):
        _, _, env = internal_episodes(base, meta, WORLD, rng(k), 128, policy)
        e, z, old_logp, mask = env.sequences()
        reward = (z[:, 0, 0] > 0).float()
        internal_rl.update(list(policy.parameters()), optimizer, lambda: gaussian_logp(z, policy(e), policy.log_std), old_logp, reward, mask)
    _, _, env = internal_episodes(base, meta, WORLD, rng(99), 256, policy)
    assert (env.sequences()[1][:, 0, 0] > 0).float().mean() > .75


def test_not_finite_stops():
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(FloatingPointError):
        internal_rl.update([parameter], torch.optim.SGD([parameter], 1.), lambda: parameter * float("nan") + torch.zeros(2, 1), torch.zeros(2, 1),
                           torch.tensor([0., 1.]), torch.ones(2, 1, dtype=torch.bool))


def test_true_subgoal_controllers_are_switched_at_the_right_moments():
    """The controller in force at each step is the one of the subgoal that the world itself says is next."""
    base, _, _ = parts()
    decoder = Decoder(4, 32, 4)
    chosen = []
    class Spy(torch.nn.Module):
        net = decoder.net
        def forward(self, e, z):
            chosen.append(z.argmax(-1))
            return decoder(e, z)
    steer = steer_by_subgoal(Spy())
    data = generate(WORLD, np.random.default_rng(0), 20)
    from envs import simulate
    step = [0]
    def expert(worlds, alive):  # replay demonstrations, asking the rule as the player would
        steer(torch.zeros(20, 32), None, {}, worlds, np.arange(20))
        step[0] += 1
        return data.action[alive, step[0] - 1]
    colours = lambda n: [(c) for a, b in zip(data.agent[n, :data.length[n]], data.agent[n, 1:data.length[n] + 1]) if a != b
                         for c in [{cell: k for k, cell in enumerate(data.things[n, :5])}.get(b)] if c is not None]
    simulate(WORLD, [tuple(colours(n)) for n in range(20)], data.things, data.agent[:, 0], expert)
    chosen = torch.stack(chosen, 1).numpy()
    assert (chosen[:, :data.subgoal.shape[1]][data.mask()] == data.subgoal[data.mask()]).all()
    assert 0 <= control_success(base, decoder, WORLD, rng(), 20) <= 1


def test_code_identity_of_real_rollouts_of_an_untrained_decoder_is_nothing():
    base, meta, _ = parts()
    decoder = Decoder(3, 32, 4)  # too weak to steer
    information, most = code_identity(base, decoder, WORLD, rng(), codes=64, layouts=32, n_z=3)
    assert abs(information) < .03 and most == math.log(4)


def test_code_identity_knows_names_from_places(monkeypatch):
    """Planted codes: one that names a subgoal gives all the information, one that names a place or nothing gives none."""
    world = World(G=5, O=5, W=0, T=30, task_set="errands")
    base, meta, _ = parts()
    def outcome_by(rule):
        def fake_play(base, world, tasks, rng, steer, state, layouts):
            things, agent = layouts
            target = rule(state["z"].numpy(), things, np.random.default_rng(0))
            cells = things[np.arange(len(things)), target]
            data = SimpleNamespace(agent=np.stack([agent, cells], 1), length=np.ones(len(agent), int), things=things)
            return data, None, None
        monkeypatch.setattr(internal_rl, "play", fake_play)
        return code_identity(base, meta.decoder, world, np.random.default_rng(1), n_z=3)
    quadrant = lambda z: (z[:, 0] > 0) * 2 + (z[:, 1] > 0)
    names, most = outcome_by(lambda z, things, rng: quadrant(z))
    assert np.isclose(most, math.log(4)) and names > .97 * most
    nothing, _ = outcome_by(lambda z, things, rng: rng.integers(4, size=len(z)))
    assert abs(nothing) < .01
    corner = np.array([0, 4, 20, 24])
    distance = lambda a, b: np.abs(a // 5 - b // 5) + np.abs(a % 5 - b % 5)
    places, _ = outcome_by(lambda z, things, rng: distance(things[:, :4], corner[quadrant(z)][:, None]).argmin(1))
    assert places < .15 * most


def test_transplanted_codes_act_from_their_step_on_and_are_compared_with_none(monkeypatch):
    """A world in which the sign of z_1 alone decides which of two colours is visited, if the code is in use; else one is visited at random."""
    base, meta, _ = parts()
    calls = []

    def fake_play(base, world, tasks, rng, steer, state, layouts=None):
        things, agent = layouts or internal_rl.sample_layouts(world, rng, len(tasks))
        e, rows = torch.ones(len(tasks), 32), np.arange(len(tasks))
        acts_at = [not torch.equal(steer(e, e, state, SimpleNamespace(steps=np.full(len(rows), t)), rows), e) for t in (0, 4, 5, 9)]
        calls.append(acts_at)
        colour = (state["z"][:, 0].numpy() > 0).astype(int) if acts_at[-1] else rng.integers(2, size=len(tasks))
        length = np.where(rows % 4 == 0, 3, 8)  # some end before the code is put in
        cells = np.stack([agent] * 8 + [agent], axis=1)
        cells[rows, length] = things[rows, colour]
        return SimpleNamespace(agent=cells, length=length, things=things), colour == np.array([task[0] for task in tasks]), None

    monkeypatch.setattr(internal_rl, "play", fake_play)
    with_code, without = transplant(base, meta, WORLD, rng(), 400, at=5)
    assert calls == [[True] * 4, [False, False, True, True], [False] * 4]  # donors; recipients from step 5 on; none
    assert with_code == 1. and abs(without - .5) < .1


def test_an_untrained_decoder_transplants_nothing():
    base, meta, _ = parts()
    meta.decoder = Decoder(3, 32, 4)  # too weak to steer
    with_code, without = transplant(base, meta, WORLD, rng(), 600, at=2)
    assert 0 < without < .5 and abs(with_code - without) < .1


def test_arrivals_straight_from_a_colour_are_told_from_others():
    """A row of four cells: 0 1 . 2; from 0 to its neighbour 1, over the empty cell to 2. A late gate counts as shut, padding does not count."""
    world = World(G=4, O=3, W=0, T=25, task_set="tiny")
    def episodes(lengths):
        column = lambda *values: np.array([values] * len(lengths))
        return Trajectories(things=column(0, 1, 3), agent=column(0, 0, 1, 2, 3, 3), action=column(1, 1, 1, 1, 1), target=column(1, 1, 2, 2, 0),
                            progress=column(0, 0, 1, 1, 2), subgoal=column(1, 1, 2, 2, 0), segment=column(0, 0, 1, 1, 2), length=np.array(lengths))
    gates = torch.tensor([[1., 0, 1, 0, 0], [1., 0, .4, 1, .6], [1., 0, 1, 0, 1]])
    near, far = opened_at_arrivals(world, episodes([5, 5, 4]), gates)
    assert near.tolist() == [True, False, True] and far.tolist() == [False, True]
