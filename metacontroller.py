"""What writes into the residual stream of a frozen base model, and how it is found without labels.

    training (stage 2)                           acting (stage 3, internal_rl.py)

    e_1:T+1 ► f_emb ──► s   (the FUTURE too)     e_t, memory ──► policy pi(z | e_1:t)  (the past)
    e_t, h_t-1, s ──► encoder ──► z~_t                        │ sees e, and acts, only at openings
                                   │                          ▼
    e_t, h_t-1, z_t-1 ► switch ► beta_t          e_t, h_t-1, z_t-1 ► switch ► beta_t > 1/2 ?
                                   ▼                          ▼
    z_t = beta_t z~_t + (1 - beta_t) z_t-1       z_t = new code, or z_t-1 as it was
                                   ▼                          ▼
    decoder ► U_t ;  e_t + U_t e_t ──► upper blocks ──► p(a_t)            the same, frozen

The encoder alone sees the future; it says "what will be wanted" in few nats. Switch and decoder are
causal, so that they serve in acting, too, where a policy takes the encoder's place.

Bottom-up: 1. Decoder (Eq. 11, 18)   2. Metacontroller (D.2)   3. CompILE, a rival (C.4.3)
4. the two terms of the discovery loss (Eq. 9)
Paper sections: C.4, D.2, E.1; Tables A9, A11.

Glossary (name -> symbol -> shape; B batch, T time, D width n_e, r rank)
  e         e_t,l: the residual stream at the controlled layer   (B, T, D)
  h         h_t-1, GRU summary of e_1:t-1               (B, T, n_h)
  s         s(e_1:T+1), ONE vector for the whole sequence, the last observation included (B, n_s)
  mu, logvar  mu_t, ln diag Sigma_t of the proposal     (B, T, n_z)
  proposal  z~_t ~ N(mu_t, Sigma_t)                     (B, T, n_z)
  beta      beta_t, switching gate in [0, 1], causal    (B, T)
  z         z_t, the integrated code                    (B, T, n_z)
  alpha     weight of the KL                            scalar
  H_s, H_d  hidden units of switch and decoder
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Block, Hawk, action_nll, linear, masked_mean, mlp

BETA_THRESHOLD = 0.5  # Algorithm 1 and C.6: the gate is open where beta exceeds it

# -------------------------------------------------------------------------- 1. decoder (Eq. 11, 18)

class Decoder(nn.Module):
    """f_hyp: z -> U, of rank r (grid) or a full matrix (rank=0, ant). One hidden ReLU layer."""

    def __init__(self, n_z, width, rank, hidden=32):
        super().__init__()
        self.n_z, self.width, self.rank = n_z, width, rank
        self.net = mlp(n_z, hidden, 2 * width * rank if rank else width * width)

    def forward(self, e, z):
        """Eq. 11: e (..., D), z (..., n_z) -> e + U e. U itself is never built.

        U = left right, each linear in the hidden units: left = sum_h hidden_h L_h + bias, right
        likewise. So R_h e is computed for all h at once and summed, r H_d numbers a step,
        instead of the 2 D r entries of left and right.
        """
        hidden = self.net[1](self.net[0](z))  # (..., H_d)
        D, r, last = self.width, self.rank, self.net[2]
        if not r:  # a full matrix: U = sum_h hidden_h W_h + bias
            # (D out * D in, H_d) -> (D in, D out * H_d)
            W = last.weight.view(D, D, -1).transpose(0, 1).reshape(D, -1)
            each = (e @ W).view(*e.shape, -1)  # (..., D * H_d) -> (..., D, H_d)
            bias = last.bias.view(D, D).T  # (D out * D in,) -> (D in, D out)
            return e + (each @ hidden[..., None])[..., 0] + e @ bias
        left, right = last.weight.chunk(2)  # (D r, H_d) and (r D, H_d)
        left_bias, right_bias = last.bias.chunk(2)  # (D r,) and (r D,)
        R = right.view(r, D, -1).transpose(0, 1).reshape(D, -1)  # -> (D, r, H_d) -> (D, r * H_d)
        each = (e @ R).view(*e.shape[:-1], r, -1)  # (..., r * H_d) -> (..., r, H_d)
        inner = (each @ hidden[..., None])[..., 0] + e @ right_bias.view(r, D).T  # (..., r)
        outer = inner[..., None] * hidden[..., None, :]  # (..., r, 1) * (..., 1, H_d)
        L = left.view(D, -1).T  # (D r, H_d) -> (D, r * H_d) -> (r * H_d, D)
        return e + outer.flatten(-2) @ L + inner @ left_bias.view(D, r).T

    def matrix(self, z):
        """U itself, (..., D, D): what the tests compare with."""
        flat, D, r = self.net(z), self.width, self.rank  # (..., 2 D r) or (..., D * D)
        if not r:
            return flat.view(*z.shape[:-1], D, D)  # (..., D * D) -> (..., D, D)
        left, right = flat.chunk(2, dim=-1)  # (..., D * r) and (..., r * D)
        # (..., D * r) -> (..., D, r), times (..., r * D) -> (..., r, D)
        return left.view(*z.shape[:-1], D, r) @ right.view(*z.shape[:-1], r, D)


# -------------------------------------------------------------------------- 2. metacontroller (D.2)

class SequenceEmbedder(nn.Module):
    """f_emb, Eq. 13: the whole sequence e_1:T+1 in one vector s, by a Hawk layer (D.1.1) read at
    the last step.

    One vector, not one per step: with a summary of the future at every t the gate never closed
    (measured in a prototype and not understood, docs/notes.md). NOT in paper, which does not give
    it: the inner width of 64 and 4 heads; variance scale 1 of `inp` and `out` (Table A15: .1).
    """

    def __init__(self, width, n_s, inner=64, heads=4):
        super().__init__()
        self.inp = linear(width, inner, 1.)
        self.block = Block(Hawk(inner, heads), inner, 2 * inner)
        self.norm = nn.LayerNorm(inner)
        self.out = linear(inner, n_s, 1.)

    def forward(self, e, length):
        """e (B, T1, D), length (B,) -> s (B, n_s)."""
        x = self.block(self.inp(e))  # (B, T1, inner); causal: padding changes nothing before it
        last = x[torch.arange(len(x), device=x.device), length - 1]  # (B, inner)
        return self.out(self.norm(last))


class Metacontroller(nn.Module):
    """c_phi of D.2. gate: "soft" (E.1, the default), "gumbel" (E.1's exact form) or "forced"
    (C.4.1).

    NOT in paper: encoder and switch have variance scale 1, where Table A15 has .1; the GRU and
    the switch's part for z have PyTorch's initialisers.
    """

    def __init__(self, width, n_z=8, n_h=32, n_s=32, rank=16, gate="soft", encoder_hidden=64,
                 decoder_hidden=32, switch_hidden=32, forget=0.):
        super().__init__()
        self.n_z, self.n_h, self.gate, self.forget = n_z, n_h, gate, forget
        # NOT in paper: e is normalised before it is read (not where it is written). Its scale is
        # whatever the base learned.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.gru = nn.GRU(width, n_h, batch_first=True)
        self.embedder = SequenceEmbedder(width, n_s)
        self.encoder = mlp(width + n_h + n_s, encoder_hidden, 2 * n_z, scale=1.)
        # NOT in paper: the posterior starts narrow, Sigma = exp(-3), which makes the first codes
        # form sooner. What keeps the KL from extinguishing them is that alpha starts at 0
        # (docs/course.md, exercise 5).
        nn.init.constant_(self.encoder[-1].bias[n_z:], -3.)
        # f_switch, Eq. 16: one hidden layer. The part that reads e_t and h_t-1 is applied to all
        # steps at once.
        self.switch_in = linear(width + n_h, switch_hidden, 1.)
        self.switch_z = nn.Linear(n_z, switch_hidden, bias=False)
        self.switch_out = linear(switch_hidden, 1, 1.)
        self.decoder = Decoder(n_z, width, rank, decoder_hidden)

    def encode(self, e, length):
        """Eq. 12, 13, 15: e (B, T1, D) -> mu, logvar (B, T1, n_z) and the switch's input from
        e_t, h_t-1 (B, T1, H_s)."""
        e = self.norm(e)
        h, _ = self.gru(e)  # (B, T1, n_h): h_1 .. h_T1
        h = F.pad(h[:, :-1], (0, 0, 1, 0))  # h_0 .. h_T1-1: encoder and switch read h_t-1
        s = self.embedder(e, length)[:, None].expand(-1, e.shape[1], -1)  # (B, n_s) -> (B, T1, n_s)
        code = self.encoder(torch.cat([e, h, s], dim=-1))  # (B, T1, 2 n_z)
        # Out of autocast's bfloat16: the KL cancels near the prior, and products of 1 - beta must
        # keep small weights.
        mu, logvar = code.float().chunk(2, dim=-1)
        if self.training and self.forget:
            # NOT in paper: in a share of the training episodes the switch does not see h, so that
            # it has to learn both ways to know that a subgoal is reached: something has changed
            # (by e and h), and what e shows is what z asks for. See docs/notes.md.
            h = h * (torch.rand(len(h), 1, 1, device=h.device) >= self.forget)
        return mu, logvar, self.switch_in(torch.cat([e, h], dim=-1))

    def gate_value(self, switch_input, z):
        """Eq. 16: switch_input (B, H_s) from e_t, h_t-1; z (B, n_z) the INTEGRATED code z_t-1 ->
        beta_t (B,); noisy only for a Gumbel gate that is being trained."""
        if self.gate == "forced":
            return torch.ones_like(z[:, 0])  # C.4.1
        logit = self.switch_out(F.relu(switch_input + self.switch_z(z)))[:, 0].float()
        if self.gate == "gumbel" and self.training:
            uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
            logit = logit + torch.log(uniform) - torch.log1p(-uniform)  # logistic noise
        beta = torch.sigmoid(logit)
        if self.gate == "gumbel":
            # E.1: a sample of a binary gate; backwards, the gradient of its relaxation. NOT in
            # paper, which is silent: hard ("straight-through") and at temperature 1.
            beta = (beta > BETA_THRESHOLD).float() + (beta - beta.detach())
        return beta

    def integrate(self, proposal, switch_input):
        """Eq. 16, 17 over a sequence: proposal (B, T, n_z), switch_input (B, T, H_s) ->
        z (B, T, n_z), beta (B, T).

        beta_1 = 1: before the first step there is no code to keep. (NOT in paper, which leaves
        z_0 open.)
        """
        # Costs T small steps one after the other, forwards and backwards, whatever the batch.
        # unbind once, not x[:, t] in the loop: indexing makes a full-size zero gradient per step.
        proposals, inputs = proposal.unbind(1), switch_input.unbind(1)
        z = proposals[0]
        codes, betas = [z], [torch.ones_like(z[:, 0])]
        for proposal_t, input_t in zip(proposals[1:], inputs[1:]):
            beta = self.gate_value(input_t, z)
            z = beta[:, None] * proposal_t + (1 - beta[:, None]) * z  # Eq. 17
            codes.append(z)
            betas.append(beta)
        return torch.stack(codes, dim=1), torch.stack(betas, dim=1)

    def forward(self, e, length, noise):
        """e (B, T1, D), length (B,) <= T1, noise (B, T, n_z) from N(0, I), T <= T1 -> z, beta, mu,
        logvar, each for T steps. Causal except through s, which summarises e_1 .. e_length."""
        mu, logvar, switch_input = (x[:, :noise.shape[1]] for x in self.encode(e, length))
        proposal = mu + noise * (logvar / 2).exp()  # Eq. 14, reparameterised
        z, beta = self.integrate(proposal, switch_input)
        return z, beta, mu, logvar

    def switch_step(self, e, h, z):
        """One causal step for acting, Algorithm 1: e_t (B, D), h_t-1 (B, n_h), z_t-1 (B, n_z) ->
        beta_t (B,), h_t (B, n_h)."""
        e = self.norm(e)
        beta = self.gate_value(self.switch_in(torch.cat([e, h], dim=-1)), z)
        return beta, self.gru(e[:, None], h[None])[1][0]  # (B, 1, D) -> (1, B, n_h) -> (B, n_h)


def kl_to_prior(mu, logvar):
    """KL(N(mu, Sigma) || N(0, I)) in nats, summed over the code: (..., n_z) -> (...). Eq. 8."""
    return .5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(-1)


# ------------------------------------------------------------------- 3. CompILE, a rival (C.4.3)

class CompILE(nn.Module):
    """Kipf et al. 2019, as C.4.3 adapts it: the sequence is cut into at most M segments, each with
    a code. Replaces the Metacontroller's gate and encoder; the decoder is the same.

    For each segment i in turn the encoder reads what lies behind b_i-1, the end of the one before,
    and says where this one ends, b_i, by Gumbel-softmax over the observations, and what its code
    is, from what it reads there. b_0 is the first observation, b_M the last.

    encoder: a copy of the base, of which the blocks up to the controlled layer are kept: it reads
    the raw input.
    segments: M; rate: of the prior of a segment's length, Poisson; temperature: of the softmax;
    alpha_b: weight of the KL of the ends, as a multiple of alpha, that of the codes.

    NOT in paper, which is silent: what lies before the segment is hidden by a factor on the
    embedding (Kipf: on the LSTM's state); a segment's prior counts from the end of the one before;
    and in acting, where no future is seen, a segment is `rate` steps long.
    """
    gate, n_h = "compile", 1

    def __init__(self, encoder, n_z=8, segments=4, rate=10, temperature=.5, alpha_b=1., hidden=32,
                 rank=16, decoder_hidden=32):
        super().__init__()
        self.encoder, self.n_z, self.segments, self.rate = encoder, n_z, segments, rate
        self.temperature, self.alpha_b = temperature, alpha_b
        encoder.blocks = encoder.blocks[:encoder.layer]
        width = encoder.norm.weight.numel()
        self.end = mlp(width, hidden, 1, scale=1.)
        self.code = mlp(width, hidden, 2 * n_z, scale=1.)
        nn.init.constant_(self.code[-1].bias[n_z:], -3.)  # as in the Metacontroller
        self.decoder = Decoder(n_z, width, rank, decoder_hidden)

    def prior(self, begin, last):
        """ln p of where a segment ends: begin (B, T+1), where it begins, as probabilities; last
        (B, 1) the last observation, which gets what lies beyond it -> (B, T+1)."""
        T1 = begin.shape[1]
        t = torch.arange(T1, device=begin.device)
        steps = (t - t[:, None]).float()  # (T+1, T+1): from row to column
        poisson = steps * math.log(self.rate) - self.rate - torch.lgamma(steps.clamp(min=0) + 1)
        ends = begin @ torch.where(steps > 0, poisson.exp(), 0.)  # (B, T+1)
        ends = ends * (t < last)
        ends = ends + (t == last) * (1 - ends.sum(1, keepdim=True))
        return ends.clamp(min=1e-8).log()

    def forward(self, obs, mask, noise):
        """obs (B, T+1, K), mask (B, T), noise (B, T, n_z) -> z (B, T, n_z), beta (B, T): does a
        segment begin here, kl_steps (B, T): the KL of each segment, counted where it begins."""
        B, T = mask.shape
        t = torch.arange(T + 1, device=mask.device)
        last = mask.sum(1, keepdim=True)  # (B, 1)
        end = (t == last).float()  # (B, T+1)
        begin = (t == 0).float().expand(B, -1)  # (B, T+1)
        embedded, z, beta, kl_steps = self.encoder.embed(obs), 0., 0., 0.
        for i in range(self.segments):
            begun = begin.cumsum(1)  # (B, T+1): has the segment begun at t?
            e = self.encoder.through(0, self.encoder.layer, embedded * begun[..., None])
            # An end comes after the beginning, and is no later than the last observation.
            possible = F.pad(begun[:, :-1], (1, 0)) + end
            logits = self.end(e)[..., 0].float() + possible.clamp(1e-8, 1).log()  # (B, T+1)
            logits = logits.masked_fill(t > last, -1e4)
            kl_end = 0.
            if i == self.segments - 1:
                ends = end
            else:
                logp = logits.log_softmax(1)
                kl_end = (logp.exp() * (logp - self.prior(begin, last))).sum(1)  # (B,)
                if self.training:
                    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
                    gumbel = -(-uniform.log()).log()
                    ends = ((logits + gumbel) / self.temperature).softmax(1)  # (B, T+1)
                else:
                    ends = F.one_hot(logits.argmax(1), T + 1).float()
            read = (ends[..., None] * e).sum(1)  # (B, T+1, 1) * (B, T+1, D) -> (B, D)
            mu, logvar = self.code(read).float().chunk(2, dim=-1)  # (B, n_z) each
            code = mu + noise[:, i % T] * (logvar / 2).exp()
            inside = begun * (1 - ends.cumsum(1))  # (B, T+1)
            z = z + inside[:, :T, None] * code[:, None]
            beta = beta + begin[:, :T]
            kl = kl_to_prior(mu, logvar) + self.alpha_b * kl_end  # (B,)
            kl_steps = kl_steps + begin[:, :T] * kl[:, None]
            begin = ends
        return z, beta, kl_steps

    def switch_step(self, e, h, z):
        """As Metacontroller.switch_step; h (B, 1) counts the steps."""
        return (h[:, 0] % self.rate == 0).float(), h + 1


# ---------------------------------------------------------- 4. terms of the discovery loss (Eq. 9)

def discovery_terms(base, meta, obs, action, mask, noise, view=None):
    """Eq. 9 with lambda = 0 (Table A9) is nll + alpha * kl, both averaged over steps that exist.

    obs (B, T+1, K), action, mask (B, T), noise (B, T, n_z). view: None, or another view of the same
    episodes, which is steered in their place (train.view_of): a dict of obs (B, T'+1, K), action
    and mask (B, T') of its own, and row, step (B, T'): step t of view b is steered by the code that
    was read at step step[b, t] of episode row[b, t]. Returns a dict: nll, kl (nats per step,
    scalars), kl_steps, beta (B, T), z (B, T, n_z).

    Why does the gate become sparse, though nothing penalises switching? The soft gate's KL is not
    weighted by beta (E.1): it sends no gradient to the switch at all. It acts on the encoder. A
    proposal that is not needed is pulled to the prior, which is noise; were the gate open there,
    that noise would enter z and the NLL would rise. So it is the NLL that shuts the gate, once the
    KL has made useless proposals worthless. And to say what is wanted once, where it changes, is
    cheaper than to say it again and again. The logs print KL per step with the gate open and shut;
    they agree with this account and do not prove it: docs/notes.md. With the Gumbel gate the KL is
    multiplied by beta: there an opening costs by itself.
    """
    # s sees the last observation too, after the last action. NOT in paper, which is silent:
    # without it the colour of the last subgoal is never seen to be reached.
    e = base.lower(obs)  # (B, T+1, D); the base is frozen, except in the rivals of C.4.2, C.4.3
    if meta.gate == "compile":
        z, beta, kl_steps = meta(obs, mask, noise)
    else:
        z, beta, mu, logvar = meta(e, mask.sum(1) + 1, noise)
        kl_steps = kl_to_prior(mu, logvar)  # (B, T)
    if view is None:
        e, codes, scored = e[:, :-1], z, mask  # nothing is decided at the last observation
    else:
        e, action, scored = base.lower(view["obs"][:, :-1]), view["action"], view["mask"]
        codes = z[view["row"], view["step"]]  # (B, T', n_z): the code of each step of the view
    nll = masked_mean(action_nll(base.action_logits(meta.decoder(e, codes)), action), scored)
    # E.1: relaxed, the KL counts at every step; exact, where the gate is open. NOT in paper: the
    # NLL is averaged over the steps of the view that are scored, the KL over those of the episode.
    kl = masked_mean(kl_steps * beta if meta.gate == "gumbel" else kl_steps, mask)
    return {"nll": nll, "kl": kl, "kl_steps": kl_steps, "z": z, "beta": beta}
