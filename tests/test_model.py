"""The base model: embedding, causality, cached steps, the Hawk recurrence, the loss."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from envs import World, exact_bounds, generate, one_hot
from grid import grid_parts
from model import (
    RGLRU,
    BoundedSqrt,
    Recurrence,
    RelativeBias,
    SequenceModel,
    action_nll,
    obs_nll,
    pretraining_loss,
    relative_buckets,
    scan,
)

WORLD = World(G=4, O=5, W=1, T=30, task_set="errands")


def new_model(mixer="attention", layer=1, lam=0.1, relative=False):
    torch.manual_seed(0)
    model = SequenceModel(grid_parts(WORLD, relative), 32, 3, 4, 48, 8, layer, lam, mixer)
    if (
        model.bias is not None
    ):  # away from its zero start, so that a forgotten or misplaced bias shows
        torch.nn.init.normal_(model.bias.table)
    for name, parameter in model.named_parameters():
        if "bias" in name and parameter.ndim == 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(n=6, seed=0):
    data = generate(WORLD, np.random.default_rng(seed), n)
    return (
        torch.from_numpy(data.obs()),
        torch.from_numpy(data.action),
        torch.from_numpy(data.mask()),
    )


MIXERS = pytest.mark.parametrize("mixer", ["attention", "hawk"])


def test_embedding_by_look_up_equals_the_one_hot_product():
    model, (obs, _, _) = new_model(), batch()
    vector = torch.from_numpy(one_hot(WORLD, obs.numpy())).float()
    looked_up = model.embed(obs)
    # The table's rows in the order of `one_hot`: cell-major for things, then the agent's cells.
    table = model.embed.bag.weight.view(WORLD.K, WORLD.cells, 32)  # (K, C, D)
    matrix = torch.cat([table[:-1].transpose(0, 1).reshape(-1, 32), table[-1]])  # (C * K, D)
    product = vector @ matrix + model.embed.bias
    assert torch.allclose(looked_up, product, atol=1e-5)
    # ... and so do the gradients.
    weight = torch.randn_like(looked_up)
    grads = [
        torch.autograd.grad((y * weight).sum(), model.embed.bag.weight)[0]
        for y in (looked_up, product)
    ]
    assert torch.allclose(*grads, atol=1e-4)


def test_relative_embedding_by_hand_and_blind_to_where_the_grid_ends():
    model, (obs, _, _) = new_model(relative=True), batch()
    table = model.embed.bag.weight.view(
        WORLD.K - 1, 7, 7, 32
    )  # thing, row and column of its displacement, -3 .. 3 each
    for b, t in ((0, 0), (3, 4), (5, 2)):
        here = divmod(int(obs[b, t, -1]), 4)
        there = [divmod(int(cell), 4) for cell in obs[b, t, :-1]]
        expected = (
            sum(table[k, y - here[0] + 3, x - here[1] + 3] for k, (y, x) in enumerate(there))
            + model.embed.bias
        )
        assert torch.allclose(model.embed(obs)[b, t], expected, atol=1e-5)
    left = (
        torch.arange(WORLD.K)[None, None] % 3 + 4 * (torch.arange(WORLD.K) // 3)[None, None]
    )  # columns 0 to 2 only
    assert torch.allclose(
        model.embed(left), model.embed(left + 1), atol=1e-5
    )  # all of it one cell to the right


@MIXERS
def test_nothing_depends_on_the_future(mixer):
    model, (obs, _, _) = new_model(mixer), batch()
    changed = obs.clone()
    changed[:, 7:] = (changed[:, 7:] + 3) % WORLD.cells
    before, after = model.action_logits(model.lower(obs)), model.action_logits(model.lower(changed))
    assert torch.equal(before[:, :7], after[:, :7]) or torch.allclose(
        before[:, :7], after[:, :7], atol=1e-6
    )
    assert (before[:, 7:] - after[:, 7:]).abs().max() > 1e-3
    # The past does matter: the last output moves when the first observation does.
    changed = obs.clone()
    changed[:, 0] = (changed[:, 0] + 3) % WORLD.cells
    assert (model.action_logits(model.lower(changed))[:, 5] - before[:, 5]).abs().max() > 1e-4


@MIXERS
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("controlled", [False, True])
def test_cached_steps_equal_the_full_pass(mixer, layer, controlled):
    model, (obs, _, _) = new_model(mixer, layer), batch()
    B, T, _ = obs.shape
    U = torch.randn(B, T, 32, 32) * 0.3 if controlled else torch.zeros(B, T, 32, 32)
    control = lambda e, t: e + (U[:, t] @ e[..., None])[..., 0]
    e = model.lower(obs)
    full = model.action_logits(control(e, slice(None)))
    caches = model.init_cache(B, T)
    with torch.no_grad():
        for t in range(T):
            e_t = model.lower(obs[:, t : t + 1], caches, t)
            assert torch.allclose(e_t[:, 0], e[:, t], atol=1e-5)
            stepped = model.action_logits(control(e_t, slice(t, t + 1)), caches, t)
            assert torch.allclose(stepped[:, 0], full[:, t], atol=1e-5)
    if controlled:
        assert (full - model.action_logits(e)).abs().max() > 1e-2


@MIXERS
def test_where_the_model_is_cut_changes_nothing(mixer):
    obs, _, _ = batch()
    reference = None
    for layer in range(4):
        model = new_model(mixer, layer)
        logits = model.action_logits(model.lower(obs))
        reference = logits if reference is None else reference
        assert torch.equal(logits, reference)


def test_padding_has_no_influence_on_the_loss():
    model, (obs, action, mask) = new_model(), batch()
    longer = lambda x: torch.cat([x, torch.zeros_like(x[:, :5])], dim=1)
    loss = pretraining_loss(model, obs, action, mask)[0]
    assert torch.allclose(
        loss, pretraining_loss(model, longer(obs), longer(action), longer(mask))[0], atol=1e-6
    )


def test_loss_is_the_mean_over_steps_of_both_parts():
    """Eq. 5 with plain loops."""
    model, (obs, action, mask) = new_model(lam=0.3), batch(3)
    x = model.upper(model.lower(obs[:, :-1]))
    action_p, obs_logits = model.action_head(x).softmax(-1), model.obs_head(x)
    total, steps, actions = 0.0, 0, 0.0
    for b in range(3):
        for t in range(int(mask[b].sum())):
            p_next = obs_logits[b, t].view(WORLD.K, WORLD.cells).softmax(-1)
            seen = -sum(p_next[k, obs[b, t + 1, k]].log() for k in range(WORLD.K))
            actions += -action_p[b, t, action[b, t]].log()
            total += -action_p[b, t, action[b, t]].log() + 0.3 * seen
            steps += 1
    loss, nll = pretraining_loss(model, obs, action, mask)
    assert torch.allclose(loss, total / steps, atol=1e-5) and torch.allclose(
        nll, actions / steps, atol=1e-5
    )


def test_observation_likelihood_is_normalised():
    torch.manual_seed(0)
    logits = torch.randn(1, 1, 2 * 3)  # two things, three cells: nine possible observations
    every = torch.tensor([[i, j] for i in range(3) for j in range(3)])[:, None]
    assert torch.allclose(
        (-obs_nll(logits.expand(9, 1, 6), every)).exp().sum(), torch.tensor(1.0), atol=1e-6
    )
    assert torch.allclose(
        action_nll(torch.zeros(1, 2, 4), torch.tensor([[0, 3]])), torch.tensor(np.log(4.0)).float()
    )


def test_relative_buckets_are_exact_when_near_and_coarse_when_far():
    row = relative_buckets(torch.arange(100), 32)
    assert row[:17].tolist() == list(range(17))
    assert (row[1:] >= row[:-1]).all() and row[-1] < 32 and len(row.unique()) > 24
    assert relative_buckets(torch.tensor([127, 128, 10**6]), 32).tolist() == [31, 31, 31]


def test_the_bias_of_one_step_is_its_row_of_the_whole_and_hides_the_future():
    bias = RelativeBias(8, 2)
    torch.nn.init.normal_(bias.table)
    whole = bias(20, "cpu")
    assert torch.isinf(whole.triu(1)[:, :-1].amin(-1)).all() and torch.isfinite(whole.tril()).all()
    for t in range(20):
        assert torch.equal(bias(t + 1, "cpu", t), whole[:, t : t + 1, : t + 1])


# -------------------------------------------------------------------------------- Hawk


def scan_loop(a, b, h0):
    """Reference: h_t = a_t * h_t-1 + b_t, one step after the other."""
    h, states = h0, []
    for a_t, b_t in zip(a.unbind(1), b.unbind(1)):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("fast", [scan, Recurrence.apply], ids=["doubling", "written out"])
def test_both_fast_scans_equal_the_loop_gradients_included(fast):
    torch.manual_seed(0)
    for T in (1, 2, 7, 64):
        inputs = [
            torch.rand(3, T, 5, dtype=torch.double),
            torch.randn(3, T, 5, dtype=torch.double),
            torch.randn(3, 5, dtype=torch.double),
        ]
        inputs = [x.requires_grad_() for x in inputs]
        results = [f(*inputs) for f in (fast, scan_loop)]
        assert torch.allclose(*results)
        weight = torch.randn_like(results[0])
        for mine, theirs in zip(
            *(torch.autograd.grad((y * weight).sum(), inputs) for y in results)
        ):
            assert torch.allclose(mine, theirs)
        grad, kept = weight.clone().transpose(0, 1).contiguous().transpose(0, 1), weight.clone()
        fast(*inputs).backward(grad)
        assert torch.equal(grad, kept)  # someone else may need the incoming gradient, too


def test_recurrence_is_the_published_one():
    """RG-LRU from its formula, one step and one head at a time."""
    torch.manual_seed(0)
    lru = RGLRU(8, 2)
    torch.nn.init.normal_(lru.b)
    x, h = torch.randn(1, 5, 8), torch.zeros(8)
    out = lru(x, torch.zeros(1, 8))
    for t in range(5):
        r, i = (
            torch.sigmoid(
                torch.cat(
                    [x[0, t, 4 * k : 4 * k + 4] @ lru.w[g, k] + lru.b[g, k, 0] for k in range(2)]
                )
            )
            for g in range(2)
        )
        a = torch.exp(-8 * torch.nn.functional.softplus(lru.log_lambda) * r)
        h = a * h + torch.sqrt(1 - a**2) * i * x[0, t]
        assert torch.allclose(out[0, t], h, atol=1e-5)
    slowest = torch.exp(-8 * torch.nn.functional.softplus(RGLRU(4096, 2).log_lambda))
    assert slowest.min() >= 0.899 and slowest.max() <= 0.9995


def test_square_root_gradient_is_exact_and_then_bounded():
    x = torch.tensor([0.25, 1e-12, 0.0], requires_grad=True)
    y = BoundedSqrt.apply(x)
    y.sum().backward()
    assert torch.allclose(y, torch.tensor([0.5, 1e-6, 0.0])) and torch.allclose(
        x.grad, torch.tensor([1.0, 1000.0, 1000.0])
    )


# --------------------------------------------------------------------- the paper's sizes, the bound


def test_grid_paper_has_exactly_the_papers_sizes_and_takes_a_step():
    cfg = train.PRESETS["grid-paper"]
    world = train.world_of(cfg)
    assert (world.G, world.O, world.W, world.T) == (
        7,
        8,
        4,
        100,
    ) and world.cells * world.K == 637
    assert (cfg.layers, cfg.width, cfg.heads, cfg.hidden, cfg.buckets, cfg.layer, cfg.rank) == (
        6,
        256,
        4,
        512,
        32,
        3,
        16,
    )  # A4, A16, A7
    assert (cfg.base_steps, cfg.base_batch, cfg.base_lr, cfg.base_wd) == (
        256_000,
        1024,
        3e-4,
        0.03,
    )  # A4
    assert cfg.warmup == 0 and cfg.decay == 0 and cfg.eps == 0 and cfg.lam in (0, 0.01)
    assert (cfg.control_steps, cfg.control_batch, cfg.control_lr, cfg.control_wd) == (
        3200,
        512,
        1e-3,
        0.03,
    )  # A7
    assert (cfg.n_z, cfg.n_h, cfg.n_s, cfg.encoder_hidden, cfg.decoder_hidden) == (
        8,
        32,
        32,
        64,
        32,
    )  # A9
    assert (cfg.meta_steps, cfg.meta_batch, cfg.meta_lr, cfg.meta_wd) == (
        64_000,
        512,
        1e-3,
        0.03,
    ) and cfg.alpha in (0, 0.05, 0.1, 0.17, 0.3, 0.5, 1)
    assert (cfg.policy_width, cfg.rl_updates, cfg.rl_batch, cfg.rl_lr) == (
        256,
        100_000,
        1024,
        3e-5,
    )  # A13
    assert (
        not cfg.relative
        and not cfg.symmetric
        and not cfg.joint
        and cfg.mixer == "attention"
    )
    run = train.Run(cfg, "grid-paper", Path("unused"))
    base, meta = train.new_base(run), train.new_metacontroller(run, None)
    attention, mlp_, norms = 4 * 256**2 + 4 * 256, 2 * 256 * 512 + 512 + 256, 4 * 256
    blocks = 6 * (attention + mlp_ + norms)
    assert (
        sum(p.numel() for p in base.parameters())
        == blocks + 637 * 256 + 256 + 32 * 4 + 2 * 256 + 257 * 4 + 257 * 637
    )
    assert meta.decoder.net[2].out_features == 2 * 256 * 16
    data = train.tensors(run, generate(world, np.random.default_rng(0), 4))
    optimizer = train.adamw(base.parameters(), cfg.base_lr, cfg.base_wd)
    losses = []
    for _ in range(3):
        losses.append(pretraining_loss(base, data["obs"], data["action"], data["mask"])[0])
        train.optimise(losses[-1], base, optimizer, cfg.base_lr)
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    "relative, steps", [(True, 200), pytest.param(False, 450, marks=pytest.mark.slow)]
)
def test_a_trained_model_stays_above_the_bayes_bound_and_comes_near_it(relative, steps):
    """A model below the bound has seen the future, the goal or its own target; a model far above
    it has not learned."""
    world = World(G=3, O=3, W=0, T=12, task_set="tiny")
    torch.manual_seed(0)
    model = SequenceModel(grid_parts(world, relative), 48, 2, 2, 96, 16, 1)
    optimizer, rng = torch.optim.AdamW(model.parameters(), lr=3e-3), np.random.default_rng(0)
    to = lambda data: (
        torch.from_numpy(data.obs()),
        torch.from_numpy(data.action),
        torch.from_numpy(data.mask()),
    )
    for _ in range(steps):
        loss, _ = pretraining_loss(model, *to(generate(world, rng, 96)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    test = generate(world, np.random.default_rng(1), 4000)
    bayes, _, _ = exact_bounds(world, test)
    with torch.no_grad():
        nll = pretraining_loss(model, *to(test))[1].item()
    bound = bayes[test.mask()].mean()
    assert bound - 0.005 < nll < bound + 0.25 * (np.log(4) - bound)
