"""Acting and RL: what is remembered between steps, when the policy is asked, and who gets the
credit."""

import math

import numpy as np
import pytest
import torch

import internal_rl
from envs import World, simulate
from grid import grid_parts
from internal_rl import (
    InternalEnvironment,
    Policy,
    clipped_loss,
    gaussian_logp,
    in_portions,
    internal_episodes,
    internal_rl_step,
    play,
    raw_rl_step,
    relative_advantage,
)
from metacontroller import Metacontroller
from model import SequenceModel

WORLD = World(G=4, O=5, W=1, T=25, task_set="errands")


def parts(mixer="attention", gate="soft", seed=0):
    """A base, a metacontroller with strong controllers and a restless gate, and a policy whose
    mean depends on its input."""
    torch.manual_seed(seed)
    base = SequenceModel(grid_parts(WORLD, False), 32, 3, 4, 48, 8, 1, mixer=mixer)
    base.requires_grad_(False)
    meta = Metacontroller(
        32, n_z=3, n_h=8, n_s=8, rank=4, gate=gate, encoder_hidden=16, decoder_hidden=16
    ).requires_grad_(False)
    for weight in (
        meta.decoder.net[0].weight,
        meta.decoder.net[2].weight,
        meta.switch_out.weight,
        meta.switch_z.weight,
    ):
        torch.nn.init.normal_(weight, std=0.7)
    policy = Policy(32, 3, inner=16)
    for weight in (
        policy.mean.weight,
        policy.block.mixer.out.weight,
        policy.block.mixer.branch.weight,
        policy.block.mixer.gate.weight,
    ):
        torch.nn.init.normal_(weight, std=0.5)  # so that what it remembers moves its mean
    return base, meta, policy


def rng(seed=0):
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def episodes(base, meta, policy, n=40):
    return internal_episodes(base, meta, WORLD, rng(1), n, policy)


@pytest.mark.parametrize("mixer", ["attention", "hawk"])
def test_acting_remembers_the_whole_episode_with_and_without_control(mixer):
    """ln p of the actions taken, step by step with caches while finished episodes are dropped =
    one full pass over each episode."""
    base, meta, policy = parts(mixer)
    for steered in (False, True):
        env = (
            InternalEnvironment(
                meta, policy.ask, policy.init_memory(60), 60, WORLD.T, rng(0), "cpu"
            )
            if steered
            else None
        )
        with torch.no_grad():
            data, _, player = play(
                base, WORLD, [WORLD.post_task] * 60, rng(1), env, env.state if env else None
            )
            e = base.lower(torch.from_numpy(data.obs()[:, :-1]))
            if steered:
                e = meta.decoder(e, env.codes[:, : e.shape[1]])
            log_p = (
                base.action_logits(e)
                .log_softmax(-1)
                .gather(-1, torch.from_numpy(data.action)[..., None])[..., 0]
            )
        mask = torch.from_numpy(data.mask())
        assert len(set(data.length.tolist())) > 3  # some finished early and were dropped
        assert torch.allclose(player.logp[:, : log_p.shape[1]][mask], log_p[mask], atol=1e-4)


def test_gate_when_acting_equals_the_gate_in_training():
    """Same prefix, same codes: the RL-time beta is the training-time beta (Eq. 16), from the
    first step to the last."""
    base, meta, policy = parts()
    data, _, env = episodes(base, meta, policy)
    e = base.lower(torch.from_numpy(data.obs()[:, :-1]))
    _, _, switch_input = meta.encode(e, torch.from_numpy(data.length))
    T = e.shape[1]
    beta = torch.stack(
        [torch.ones(len(e))]
        + [meta.gate_value(switch_input[:, t], env.codes[:, t - 1]) for t in range(1, T)],
        1,
    )
    mask = torch.from_numpy(data.mask())
    assert torch.allclose(env.gates[:, :T][mask], beta[mask], atol=1e-4)
    share = (beta[:, 1:] > 0.5)[mask[:, 1:]].float().mean()
    assert 0.05 < share < 0.95  # the gate both opens and stays shut in this test


def test_policy_is_asked_exactly_where_the_gate_opens_and_the_code_is_held_between():
    base, meta, policy = parts()
    data, _, env = episodes(base, meta, policy)
    for n in range(40):
        T = int(data.length[n])
        opened = [t for t in range(T) if t == 0 or env.gates[n, t] > 0.5]
        assert env.count[n] == len(opened)
        for t in range(1, T):
            assert torch.equal(env.codes[n, t], env.codes[n, t - 1]) == (t not in opened)
    e, z, _, mask = env.sequences()
    n = int(env.count.argmax())
    opened = [t for t in range(int(data.length[n])) if t == 0 or env.gates[n, t] > 0.5]
    assert torch.equal(z[n, : len(opened)], env.codes[n, opened]) and mask[n].sum() == len(opened)
    stream = base.lower(torch.from_numpy(data.obs()[n : n + 1, :-1]))[0]
    assert torch.allclose(e[n, : len(opened)], stream[opened], atol=1e-4)


def test_forced_switching_asks_at_every_step():
    base, meta, policy = parts(gate="forced")
    data, _, env = episodes(base, meta, policy)
    assert (env.count.numpy() == data.length).all()


def test_first_ratio_is_one():
    """The recurrent policy, re-evaluated over each episode's sequence, gives the logp it had
    when it was stepped with its memory."""
    base, meta, policy = parts()
    _, _, env = episodes(base, meta, policy)
    e, z, old_logp, mask = env.sequences()
    ratio = (gaussian_logp(z, policy(e), policy.log_std) - old_logp).exp()
    assert env.count.max() > 3 and (ratio[mask] - 1).abs().max() < 1e-4
    forgetful = gaussian_logp(
        z, policy(e.flatten(0, 1)[:, None])[:, 0].view(*z.shape), policy.log_std
    )  # no memory: must differ
    assert ((forgetful - old_logp).exp()[mask] - 1).abs().max() > 1e-2


def test_likelihood_in_portions_equals_the_whole_gradients_included():
    base, meta, policy = parts()
    _, _, env = episodes(base, meta, policy)
    e, z, _, mask = env.sequences()
    whole, portions = (
        gaussian_logp(z, policy(e), policy.log_std),
        in_portions(lambda rows, m: policy.logp(e[rows, :m], z[rows, :m]), env.count, portions=3),
    )
    assert env.count.min() < env.count.max() / 2 and torch.allclose(
        whole[mask], portions[mask], atol=1e-4
    )
    weight = torch.randn_like(whole) * mask
    for mine, theirs in zip(
        *(
            torch.autograd.grad((x * weight).sum(), list(policy.parameters()))
            for x in (portions, whole)
        )
    ):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-3)


def test_raw_first_ratio_is_one(monkeypatch):
    base, _, _ = parts()
    base.requires_grad_(True)
    seen = []
    monkeypatch.setattr(
        internal_rl, "relative_advantage", lambda reward: torch.linspace(-1, 1, len(reward))
    )
    monkeypatch.setattr(
        internal_rl,
        "clipped_loss",
        lambda logp, old, A, mask, clip: (
            seen.append((logp - old)[mask].exp()) or clipped_loss(logp, old, A, mask, clip)
        ),
    )
    monkeypatch.setattr(
        internal_rl,
        "simulate",
        lambda *args: (lambda data, success: (data, np.arange(len(success)) % 2 == 0))(
            *simulate(*args)
        ),
    )
    raw_rl_step(
        base, torch.optim.AdamW(base.parameters(), lr=1e-3), WORLD, rng(), 30, epochs=2
    )
    assert (seen[0] - 1).abs().max() < 1e-4 and (seen[1] - 1).abs().max() > 1e-4


def test_likelihood_sums_over_dimensions():
    torch.manual_seed(0)
    mu, log_std, z = torch.randn(4, 5, 3), torch.randn(3) * 0.3, torch.randn(4, 5, 3)
    exact = torch.distributions.Independent(
        torch.distributions.Normal(mu, log_std.exp()), 1
    ).log_prob(z)
    assert torch.allclose(gaussian_logp(z, mu, log_std), exact, atol=1e-5) and exact.shape == (4, 5)


def test_first_policy_is_the_prior():
    policy = Policy(32, 3, inner=16)
    assert torch.equal(policy(torch.randn(2, 4, 32)), torch.zeros(2, 4, 3)) and torch.equal(
        policy.log_std.exp(), torch.ones(3)
    )


def test_what_is_read_off_padding_is_without_effect():
    """There old_logp is 0, and logp whatever the policy says: its ratio may overflow."""
    logp = torch.tensor([[-1.0, 500.0], [-2.0, -1.0]], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    old_logp = torch.tensor([[-1.0, 0.0], [-2.0, -1.0]])
    loss = clipped_loss(logp, old_logp, torch.tensor([-1.0, 1.0]), mask, 0.2)
    (gradient,) = torch.autograd.grad(loss, logp)
    assert loss == -0.5 and torch.equal(gradient, torch.tensor([[0.5, 0.0], [-0.5, -0.5]]))


def test_every_episode_gets_its_own_advantage():
    """At ratio 1 the gradient of Eq. 10 on each action of episode n is -A_n / N: its own, whole,
    and nothing on padding."""
    reward = torch.tensor([0.0, 1.0, 0.0, 0.0])
    A = relative_advantage(reward)
    assert torch.allclose(A, (reward - 0.25) / (math.sqrt(3) / 4 + 1e-3))
    old = torch.randn(4, 3)
    logp = old.clone().requires_grad_()
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    clipped_loss(logp, old, A, mask, 0.2).backward()
    assert torch.allclose(logp.grad, -A[:, None] / 4 * mask)


def test_clipping_stops_the_gradient_on_the_far_side_only():
    old = torch.zeros(4, 1)
    logp = torch.tensor([[0.5], [-0.5], [0.5], [-0.5]], requires_grad=True)  # ratios 1.65 and .61
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    clipped_loss(logp, old, A, torch.ones(4, 1, dtype=torch.bool), 0.2).backward()
    moved = logp.grad[:, 0] != 0
    assert moved.tolist() == [False, True, True, False]


def test_equal_rewards_teach_nothing():
    base, meta, policy = parts()
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    impossible = World(
        G=4, O=5, W=1, T=8, task_set="errands"
    )  # eight visits in eight steps, from anywhere: no success
    report = internal_rl_step(
        base,
        meta,
        policy,
        torch.optim.AdamW(policy.parameters(), weight_decay=0.1),
        impossible,
        rng(),
        16,
        2,
    )
    assert report["success"] == 0 and all(
        torch.equal(before[k], v) for k, v in policy.state_dict().items()
    )


def test_a_batch_of_one_episode_teaches_nothing_whatever_the_momentum():
    """One reward has no spread; one that is NaN must not pass for a spread."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)

    def learn(*reward):
        ones, old = torch.ones(len(reward), 1), torch.zeros(len(reward), 1)
        signs = torch.tensor([[1.0], [-1.0]])[: len(reward)]
        internal_rl.clipped_update(
            [parameter], optimizer, lambda: parameter * signs, old, torch.tensor(reward), ones > 0
        )
        return parameter.item()

    moved = learn(1.0, 0.0)
    assert moved > 0 and learn(1.0) == moved and learn(1.0, 1.0) == moved


def test_the_update_makes_rewarded_codes_likelier():
    """A world where the code decides the reward: internal RL must find it. Here any code above 0
    in its first dimension wins."""
    base, meta, policy = parts()
    torch.nn.init.zeros_(policy.mean.weight)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    for k in range(12):
        _, _, env = internal_episodes(base, meta, WORLD, rng(k), 128, policy)
        e, z, old_logp, mask = env.sequences()
        reward = (z[:, 0, 0] > 0).float()
        internal_rl.clipped_update(
            list(policy.parameters()),
            optimizer,
            lambda: gaussian_logp(z, policy(e), policy.log_std),
            old_logp,
            reward,
            mask,
        )
    _, _, env = internal_episodes(base, meta, WORLD, rng(99), 256, policy)
    assert (env.sequences()[1][:, 0, 0] > 0).float().mean() > 0.75


def test_not_finite_stops():
    parameter = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(FloatingPointError):
        internal_rl.clipped_update(
            [parameter],
            torch.optim.SGD([parameter], 1.0),
            lambda: parameter * float("nan") + torch.zeros(2, 1),
            torch.zeros(2, 1),
            torch.tensor([0.0, 1.0]),
            torch.ones(2, 1, dtype=torch.bool),
        )
