"""Controllers and the metacontroller: what is written, what may be read, where gradients go."""

import copy
import math

import numpy as np
import pytest
import torch

from envs import World, generate
from grid import grid_parts
from metacontroller import CompILE, Decoder, Metacontroller, discovery_terms, kl_to_prior
from model import SequenceModel, action_nll
from train import view_of

WORLD = World(G=4, O=5, W=1, T=30, task_set="errands")


def frozen_base():
    torch.manual_seed(0)
    return SequenceModel(grid_parts(WORLD, False), 32, 2, 4, 48, 8, 1).requires_grad_(False)


def metacontroller(gate="soft", rank=4, seed=1):
    torch.manual_seed(seed)
    return Metacontroller(
        32, n_z=3, n_h=8, n_s=8, rank=rank, gate=gate, encoder_hidden=16, decoder_hidden=16
    )


def batch(n=5, seed=0):
    data = generate(WORLD, np.random.default_rng(seed), n)
    return {
        "obs": torch.from_numpy(data.obs()),
        "action": torch.from_numpy(data.action),
        "mask": torch.from_numpy(data.mask()),
        "subgoal": torch.from_numpy(data.subgoal),
    }


def loss_of(base, meta, data, alpha=0.1, noise=None):
    noise = torch.zeros(*data["action"].shape, meta.n_z) if noise is None else noise
    terms = discovery_terms(base, meta, data["obs"], data["action"], data["mask"], noise)
    return terms["nll"] + alpha * terms["kl"], terms


@pytest.mark.parametrize("rank", [4, 0])
def test_controller_is_e_plus_U_e(rank):
    """Eq. 11 with the matrix built: not a gain per channel, not a bias."""
    torch.manual_seed(0)
    decoder = Decoder(3, 32, rank).double()
    e, z = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 3).double()
    U = decoder.matrix(z)
    assert U.shape == (2, 5, 32, 32)
    assert torch.allclose(decoder(e, z), e + torch.einsum("btij,btj->bti", U, e))
    assert torch.linalg.matrix_rank(U).unique().tolist() == [rank or 32]
    assert torch.allclose(decoder(2 * e, z), 2 * decoder(e, z))  # linear in e
    assert not torch.allclose(U, torch.diag_embed(U.diagonal(dim1=-2, dim2=-1)))


@pytest.mark.parametrize("rank", [4, 0])
def test_the_fast_decoder_equals_the_obvious_one_gradients_included(rank):
    torch.manual_seed(0)
    decoder = Decoder(3, 16, rank, hidden=5).double()
    for parameter in decoder.parameters():  # the biases, too
        torch.nn.init.normal_(parameter)
    e, z = torch.randn(2, 5, 16).double(), torch.randn(2, 5, 3).double()
    inputs = [e.requires_grad_(), z.requires_grad_(), *decoder.parameters()]
    weight = torch.randn(2, 5, 16).double()
    obvious = e + (decoder.matrix(z) @ e[..., None])[..., 0]
    fast = decoder(e, z)
    assert torch.allclose(fast, obvious)
    mine, theirs = (torch.autograd.grad((y * weight).sum(), inputs) for y in (fast, obvious))
    assert all(torch.allclose(a, b) for a, b in zip(mine, theirs))


@pytest.mark.parametrize("gate", ["soft", "gumbel", "forced"])
def test_action_loss_alone_reaches_every_part(gate):
    """alpha = 0: encoder, embedder, GRU, switch and decoder must all be taught by the actions,
    through the frozen upper blocks."""
    base, meta = frozen_base(), metacontroller(gate)
    loss, _ = loss_of(
        base, meta, batch(), alpha=0.0, noise=torch.randn(5, batch()["action"].shape[1], 3)
    )
    loss.backward()
    silent = {
        name for name, p in meta.named_parameters() if p.grad is None or p.grad.abs().max() == 0
    }
    assert silent == (
        {
            "switch_in.weight",
            "switch_in.bias",
            "switch_z.weight",
            "switch_out.weight",
            "switch_out.bias",
        }
        if gate == "forced"
        else set()
    )
    assert all(p.grad is None for p in base.parameters())


def test_one_optimiser_step_moves_every_parameter_and_not_the_base():
    import train

    base, meta = frozen_base(), metacontroller()
    before, base_before = ({k: v.clone() for k, v in m.state_dict().items()} for m in (meta, base))
    optimizer = train.adamw(meta.parameters(), 1e-3, 0.0)
    train.optimise(loss_of(base, meta, batch())[0], meta, optimizer, 1e-3)
    assert all(not torch.equal(before[k], v) for k, v in meta.state_dict().items())
    assert all(torch.equal(base_before[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("bias, kept", [(1e4, False), (-1e4, True)])
def test_gate_limits(bias, kept):
    """Eq. 17: beta = 1 takes the new proposal, beta = 0 keeps the first code for ever."""
    meta = metacontroller()
    torch.nn.init.constant_(meta.switch_out.bias, bias)
    torch.manual_seed(2)
    e, noise = torch.randn(2, 9, 32), torch.randn(2, 9, 3)
    z, beta, mu, logvar = meta(e, torch.tensor([9, 9]), noise)
    proposal = mu + noise * torch.exp(logvar / 2)
    assert (beta[:, 1:] == (0 if kept else 1)).all() and (beta[:, 0] == 1).all()
    assert torch.allclose(z, proposal[:, :1].expand_as(z) if kept else proposal)


def test_integration_equals_the_equations_step_by_step_gradients_included():
    """Eq. 12-17 in a plain loop: h_t-1 not h_t, the integrated z_t-1 not the proposal, and
    nothing detached."""
    meta = metacontroller()
    torch.manual_seed(3)
    e, noise = torch.randn(2, 7, 32).requires_grad_(), torch.randn(2, 7, 3)
    length = torch.tensor([7, 7])

    def reference():
        x = torch.nn.functional.layer_norm(e, (32,))
        s = meta.embedder(x, length)
        h, z = torch.zeros(2, 8), None
        codes, betas = [], []
        for t in range(7):
            mu, logvar = meta.encoder(torch.cat([x[:, t], h, s], 1)).chunk(2, 1)
            proposal = mu + noise[:, t] * (logvar / 2).exp()
            if t == 0:
                beta, z = torch.ones(2), proposal
            else:
                hidden = torch.relu(meta.switch_in(torch.cat([x[:, t], h], 1)) + meta.switch_z(z))
                beta = torch.sigmoid(meta.switch_out(hidden)[:, 0])
                z = beta[:, None] * proposal + (1 - beta)[:, None] * z
            h = meta.gru(x[:, t : t + 1], h[None])[1][0]
            codes.append(z)
            betas.append(beta)
        return torch.stack(codes, 1), torch.stack(betas, 1)

    z, beta, _, _ = meta(e, length, noise)
    z_ref, beta_ref = reference()
    assert torch.allclose(z, z_ref, atol=1e-6) and torch.allclose(beta, beta_ref, atol=1e-6)
    weight = torch.randn_like(z)
    parameters = [e, *meta.parameters()]
    grads = [
        torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
        for out in (z, z_ref)
    ]
    for mine, theirs in zip(*grads):
        assert (mine is None and theirs is None) or torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("forget", [0.0, 0.5, 1.0])
def test_the_switch_forgets_whole_episodes_in_training_only_and_the_encoder_never(forget):
    torch.manual_seed(3)
    meta = metacontroller()
    meta.forget = forget
    e, length = torch.randn(200, 7, 32), torch.full((200,), 7)
    mu, _, seen = meta.train().encode(e, length)
    mu_eval, _, whole = meta.eval().encode(e, length)
    blank = meta.switch_in(
        torch.cat([meta.norm(e), torch.zeros(200, 7, meta.n_h)], -1)
    )  # what is left if h = 0
    forgot = torch.isclose(seen, blank, atol=1e-6).flatten(1).all(1)
    assert torch.allclose(seen[~forgot], whole[~forgot], atol=1e-6) and torch.equal(mu, mu_eval)
    assert abs(forgot.float().mean() - forget) < 0.1 and (forget in (0.0, 1.0)) == (
        forgot.float().mean().item() == forget
    )
    assert (
        not torch.isclose(whole[:, 1:], blank[:, 1:], atol=1e-6).flatten(1).all(1).any()
    )  # h is not 0 by itself


def test_the_gate_is_causal_and_the_code_is_not():
    meta = metacontroller()
    torch.manual_seed(4)
    e = torch.randn(1, 10, 32)
    proposal = torch.randn(1, 10, 3)
    changed = e.clone()
    changed[:, 6:] = torch.randn(1, 4, 32)
    length = torch.tensor([10])
    gates = [
        meta.integrate(proposal, meta.encode(x, length)[2])[1] for x in (e, changed)
    ]  # same codes, other future
    assert torch.allclose(gates[0][:, :6], gates[1][:, :6], atol=1e-6) and not torch.allclose(
        gates[0][:, 6:], gates[1][:, 6:], atol=1e-4
    )
    mu = [meta.encode(x, length)[0] for x in (e, changed)]
    assert (
        mu[0][:, :6] - mu[1][:, :6]
    ).abs().max() > 1e-4  # the encoder sees the whole sequence through s


def test_the_gate_reads_the_code_that_is_held_and_not_the_one_proposed():
    """A proposal, which knows the future, must not reach the gate that decides about it."""
    meta = metacontroller()
    torch.manual_seed(4)
    switch_input, proposal = torch.randn(1, 8, 32), torch.randn(1, 8, 3)
    other = proposal.clone()
    other[:, 4] += 3.0
    before, after = (meta.integrate(x, switch_input)[1][0] for x in (proposal, other))
    assert torch.equal(before[:5], after[:5])  # beta_4, too
    assert (before[5:] - after[5:]).abs().max() > 1e-4  # from then on it is held, and read


def test_sequence_embedding_is_one_vector_of_the_real_steps():
    meta = metacontroller()
    torch.manual_seed(5)
    e = torch.randn(2, 10, 32)
    s = meta.embedder(e, torch.tensor([10, 6]))
    assert s.shape == (2, 8)
    padded = e.clone()
    padded[1, 6:] = 99.0
    assert torch.allclose(meta.embedder(padded, torch.tensor([10, 6])), s)
    for t in range(6):  # every step counts
        other = e.clone()
        other[1, t] += 1.0
        assert (meta.embedder(other, torch.tensor([10, 6]))[1] - s[1]).abs().max() > 1e-5


def test_kl_is_the_sum_over_dimensions_counted_once_and_without_padding():
    torch.manual_seed(6)
    mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0.0, 1.0)).sum(
        -1
    )
    assert torch.allclose(kl_to_prior(mu, logvar), exact)

    base, meta, data = frozen_base(), metacontroller(), batch()
    loss, out = loss_of(base, meta, data, alpha=0.3)
    assert torch.allclose(loss, out["nll"] + 0.3 * out["kl"])
    mu, logvar, _ = (
        x[:, :-1] for x in meta.encode(base.lower(data["obs"]), data["mask"].sum(1) + 1)
    )
    assert torch.allclose(
        out["kl"], kl_to_prior(mu, logvar)[data["mask"]].mean()
    )  # soft gate: every step, not weighted by beta
    longer = {k: torch.cat([v, torch.zeros_like(v[:, :4])], dim=1) for k, v in data.items()}
    assert torch.allclose(loss, loss_of(base, meta, longer, alpha=0.3)[0], atol=1e-5)


def test_codes_are_read_from_the_episodes_and_steer_their_views():
    base, meta, data = frozen_base(), metacontroller(), batch()
    torch.manual_seed(0)
    view = view_of(data, WORLD, symmetric=True, splice=0.4, join=0.5)
    _, out = loss_of(base, meta, data)
    noise = torch.zeros(*data["action"].shape, 3)
    steered = discovery_terms(
        base, meta, data["obs"], data["action"], data["mask"], noise, view
    )
    assert (
        torch.equal(out["z"], steered["z"])
        and torch.equal(out["beta"], steered["beta"])
        and out["kl"] == steered["kl"]
    )  # read: the episodes
    nll = []
    for b in range(len(data["obs"])):  # steered: the views, one by one, without padding
        n = int(view["mask"][b].nonzero()[-1]) + 1
        z = torch.stack(
            [
                out["z"][int(row), int(step)]
                for row, step in zip(view["row"][b, :n], view["step"][b, :n])
            ]
        )
        each = action_nll(
            base.action_logits(meta.decoder(base.lower(view["obs"][b, None, :n]), z[None])),
            view["action"][b, None, :n],
        )[0]
        nll.append(each[view["mask"][b, :n]])
    assert (
        torch.allclose(steered["nll"], torch.cat(nll).mean(), atol=1e-5)
        and (steered["nll"] - out["nll"]).abs() > 1e-4
    )


def test_the_metacontroller_reads_the_controlled_layer_uncontrolled_and_writes_it():
    torch.manual_seed(0)
    base = SequenceModel(grid_parts(WORLD, False), 32, 3, 4, 48, 8, 2).requires_grad_(False)
    meta, data = metacontroller(), batch()
    _, out = loss_of(base, meta, data)
    e = base.through(0, 2, base.embed(data["obs"]))
    z, _, _, _ = meta(e, data["mask"].sum(1) + 1, torch.zeros(*data["action"].shape, 3))
    assert torch.equal(z, out["z"])
    above = base.through(2, 3, meta.decoder(e[:, :-1], z))
    nll = action_nll(base.action_head(base.norm(above)), data["action"])
    assert torch.allclose(out["nll"], nll[data["mask"]].mean())


def test_the_sequence_embedding_sees_where_the_last_action_led():
    base, meta, data = frozen_base(), metacontroller(), batch()
    n = torch.arange(5)
    other = data["obs"].clone()
    other[n, data["mask"].sum(1), -1] = 0  # the agent ends in another cell
    assert (
        loss_of(base, meta, data)[1]["z"] - loss_of(base, meta, {**data, "obs": other})[1]["z"]
    ).abs().max() > 1e-4


def test_gumbel_gate_is_binary_and_pays_only_where_it_opens():
    base, meta, data = frozen_base(), metacontroller("gumbel"), batch()
    torch.manual_seed(7)
    torch.nn.init.normal_(meta.switch_out.weight, std=3.0)
    _, out = loss_of(base, meta, data)
    assert set(out["beta"].detach().unique().tolist()) == {0.0, 1.0}
    mu, logvar, _ = (
        x[:, :-1] for x in meta.encode(base.lower(data["obs"]), data["mask"].sum(1) + 1)
    )
    assert torch.allclose(
        out["kl"], (kl_to_prior(mu, logvar) * out["beta"])[data["mask"]].sum() / data["mask"].sum()
    )
    meta.eval()  # no noise: the same gates twice
    assert torch.equal(loss_of(base, meta, data)[1]["beta"], loss_of(base, meta, data)[1]["beta"])


# CompILE, a rival (C.4.3)


def compile_module(segments=4, rate=3, seed=1):
    torch.manual_seed(seed)
    base = frozen_base()
    encoder = copy.deepcopy(base).requires_grad_(True)
    return base, CompILE(encoder, n_z=3, segments=segments, rate=rate, rank=4, decoder_hidden=16)


def test_compile_cuts_an_episode_into_segments_of_one_code_each():
    base, module = compile_module()
    data = batch(40)
    noise = torch.randn(*data["action"].shape, 3)
    z, beta, kl_steps = module.eval()(data["obs"], data["mask"], noise)
    begins = (z[:, 1:] != z[:, :-1]).any(-1) & data["mask"][:, 1:]  # (B, T-1)
    assert (beta[:, 0] == 1).all() and set(beta[data["mask"]].tolist()) == {0.0, 1.0}
    assert torch.equal(begins, (beta[:, 1:] == 1) & data["mask"][:, 1:])
    inside = beta * data["mask"]
    assert inside.sum(1).max() <= 4 and begins.any()
    # The KL is paid where a segment begins, and nowhere else.
    assert torch.equal(kl_steps[data["mask"]] > 0, beta[data["mask"]] == 1)
    # In training the ends are relaxed: shares of segments, which sum to one at every step.
    module.train()
    mixed = module(data["obs"], data["mask"], torch.zeros_like(noise))[0]
    assert (mixed[:, 1:] != mixed[:, :-1]).any(-1)[data["mask"][:, 1:]].all()


def test_compile_does_not_see_padding_or_what_lies_before_a_segment():
    base, module = compile_module()
    module.eval()
    data = batch(12)
    noise = torch.randn(*data["action"].shape, 3)
    z, beta, kl = module(data["obs"], data["mask"], noise)
    n = int(data["mask"].sum(1).argmin())
    T = int(data["mask"][n].sum())
    alone = module(data["obs"][n:n + 1, :T + 1], data["mask"][n:n + 1, :T], noise[n:n + 1, :T])
    for whole, own in zip((z, beta, kl), alone):
        assert torch.allclose(whole[n, :T], own[0], atol=1e-5)
    # The code of the last segment does not depend on where the agent was before it began.
    k = next(k for k in range(12) if beta[k, 3:][data["mask"][k, 3:]].any())
    begin = int((beta[k] * data["mask"][k]).nonzero()[-1])
    changed = data["obs"].clone()
    with torch.no_grad():
        module.end[-1].weight.mul_(0)  # the ends themselves must not move
        fixed = module(changed, data["mask"], noise)
        begin = int((fixed[1][k] * data["mask"][k]).nonzero()[-1])
        changed[k, :begin] = changed[k, begin]
        moved = module(changed, data["mask"], noise)
    assert begin > 0 and torch.equal(fixed[1], moved[1])
    assert torch.allclose(fixed[0][k, begin:], moved[0][k, begin:], atol=1e-5)
    assert not torch.allclose(fixed[0][k, :begin], moved[0][k, :begin], atol=1e-3)


def test_the_prior_of_a_segments_length_is_poisson_from_its_beginning():
    _, module = compile_module(rate=3)
    begin = torch.zeros(2, 12)
    begin[0, 0] = begin[1, 4] = 1.0
    p = module.prior(begin, torch.tensor([[11], [9]])).exp()
    assert torch.allclose(p.sum(1), torch.ones(2), atol=1e-4)
    poisson = [math.exp(-3) * 3**k / math.factorial(k) for k in range(12)]
    assert torch.allclose(p[0, 1:11], torch.tensor(poisson[1:11]), atol=1e-5)
    assert torch.allclose(p[1, 5:9], torch.tensor(poisson[1:5]), atol=1e-5)
    assert p[0, 0] < 1e-6 and p[1, :5].max() < 1e-6 and p[1, 10:].max() < 1e-6
    assert torch.isclose(p[1, 9], 1 - torch.tensor(poisson[1:5]).sum(), atol=1e-5)


def test_the_loss_of_compile_reaches_every_part_and_acting_opens_at_the_priors_rate():
    base, module = compile_module(rate=3)
    data = batch(20)
    noise = torch.randn(*data["action"].shape, 3)
    base.requires_grad_(True)
    loss, out = loss_of(base, module.train(), data, 0.1, noise)
    loss.backward()
    used = [*module.end.parameters(), *module.code.parameters(), *module.decoder.parameters()]
    used += [*module.encoder.blocks[0].parameters(), *base.blocks[1].parameters()]
    assert all(p.grad.abs().max() > 0 for p in used)
    e, h, z = torch.randn(2, 32), torch.zeros(2, 1), torch.randn(2, 3)
    opens = []
    for _ in range(7):
        beta, h = module.switch_step(e, h, z)
        opens.append(beta.tolist())
    assert opens == [[float(t % 3 == 0)] * 2 for t in range(7)]
