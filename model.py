"""The base sequence model: p(a_t | o_1:t) and p(o_t+1 | o_1:t), cut in two at the controlled layer.

Bottom-up:

  1. small parts     variance-scaled linear layers, likelihoods, the Gaussian head
  2. attention       causal, with a learned relative position bias (D.1.2)
  3. Hawk            the RG-LRU recurrence and its block (D.1.1): mixer of the internal RL policy,
                     of f_emb and, with mixer="hawk", of a base
  4. Block           pre-norm mixer + MLP, each added to the residual stream
  5. SequenceModel   embed -> blocks -> heads; `lower(obs)` ends and `upper(e)` begins at layer l
  6. the loss        Eq. 5; and sampling an action

Every sequence part runs in two ways that tests hold equal: a whole sequence at once (training), or
one step at a time with a cache (acting). A cache is a plain dict of tensors whose first dimension
is the batch, so that a batch of caches can be indexed.

Paper sections: C.1.2 (loss), D.1 (architecture), Tables A4, A15, A16.

Glossary (name -> symbol -> shape; B batch, T time, D width n_e, H heads, K = O+W+1, C cells;
for the ant read F numbers for K cells, and (B, T, A) for its actions; W is the width of an RG-LRU)
  obs     o_t, index form: the cell of each of the K  (B, T, K) int64
  e       e_t,l, residual stream at layer l           (B, T, D)
  logits  of p(a_t | o_1:t)                           (B, T, A)
  lam     lambda, weight of the observation loss      scalar
  a, h    decay and state of the RG-LRU               (B, T, W)
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

# ----------------------------------------------------------------------------------- 1. small parts

def linear(inputs, outputs, scale=0.1):
    """nn.Linear with weights from N(0, scale / inputs), cut at 2 sigma, and zero bias (Tables
    A15, A16: variance scaling 0.1). NOT in paper, which is silent: the cut, which leaves .77 of the
    variance, is not made up for."""
    layer = nn.Linear(inputs, outputs)
    std = math.sqrt(scale / inputs)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(width, hidden, outputs=None, scale=0.1):
    """One hidden ReLU layer: the MLP of Tables A15, A16, and of D.2."""
    first = linear(width, hidden, scale)
    return nn.Sequential(first, nn.ReLU(), linear(hidden, outputs or width, scale))


def masked_mean(x, mask):
    """The mean of x (B, T) over the steps where mask (B, T) is true."""
    return (x * mask).sum() / mask.sum()


def gaussian_logp(x, mean, log_std):
    """ln N(x; mean, diag std^2), summed over dimensions: each (..., n) -> (...)."""
    scaled = (x - mean) / log_std.exp()
    return (-.5 * scaled ** 2 - log_std - .5 * math.log(2 * math.pi)).sum(-1)


class GaussianHead(nn.Module):
    """A Gaussian with learned diagonal covariance (C.1.2), for the ant's actions and senses.

    x (..., D) -> (..., 2 n): mean, then log std, one learned vector, the same at every step.
    NOT in paper, which is silent: it starts at -1.5; from 0 it takes hundreds of steps to come
    down.
    """

    def __init__(self, width, n):
        super().__init__()
        self.mean = linear(width, n)
        self.log_std = nn.Parameter(torch.full((n,), -1.5))

    def forward(self, x):
        mean = self.mean(x)
        return torch.cat([mean, self.log_std.to(mean.dtype).expand_as(mean)], dim=-1)


# ----------------------------------------------------------------------------- 2. attention (D.1.2)

def relative_buckets(distance, buckets):
    """The bucket of each distance i - j >= 0, int64 of any shape: the first half exactly, then
    logarithmic up to 128 (the T5 scheme; the paper names 32 buckets and no formula)."""
    exact = buckets // 2
    octaves = torch.log(distance.clamp(min=1) / exact) / math.log(128 / exact)
    far = exact + (octaves * (buckets - exact)).long()
    return torch.where(distance < exact, distance, far.clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """Learned attention bias per head and distance bucket, one for all layers (D.1.2)."""

    def __init__(self, buckets, heads):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(buckets, heads))

    def forward(self, T, device, first=0):
        """(H, T - first, T) additive bias of steps first .. T-1, -inf on the future: position and
        causality in one. An acting step needs its own row only (first = T - 1)."""
        t = torch.arange(T, device=device)
        distance = t[first:, None] - t  # (T - first, T)
        bias = self.table[relative_buckets(distance.clamp(min=0), len(self.table))]
        return bias.permute(2, 0, 1).masked_fill(distance < 0, -math.inf)  # (H, T - first, T)


class Attention(nn.Module):
    """Causal multi-head attention; position and causality come with the bias (D.1.2)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)

    def forward(self, x, bias, cache=None):
        """x (B, T, D), bias (H, T, S) -> (B, T, D). With a cache: T = 1, and S steps seen so far,
        this one included."""
        B, T, D = x.shape
        each = D // self.heads
        qkv = self.qkv(x).view(B, T, 3, self.heads, each)  # (B, T, 3 D) -> (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if cache is not None:
            # Written in place into a buffer of the horizon's length: concatenating would copy
            # the whole past at every step.
            t = bias.shape[-1] - 1
            cache["k"][:, :, t], cache["v"][:, :, t] = k[:, :, 0], v[:, :, 0]
            k, v = cache["k"][:, :, :t + 1], cache["v"][:, :, :t + 1]
        # Written out rather than F.scaled_dot_product_attention: with a learned bias that takes
        # the same unfused path on CPU. Costs T^2 per head.
        scores = q @ k.transpose(-1, -2) / math.sqrt(each) + bias.to(q.dtype)  # (B, H, T, S)
        y = scores.softmax(dim=-1) @ v  # (B, H, T, D/H)
        return self.out(y.transpose(1, 2).reshape(B, T, D))  # (B, T, H, D/H) -> (B, T, D)

    def init_cache(self, B, T, like):
        """Room for the keys and values of B sequences of at most T steps, as `like` is typed."""
        shape = (B, self.heads, T, self.out.in_features // self.heads)
        return {"k": like.new_empty(shape), "v": like.new_empty(shape)}


# ---------------------------------------------------------------------------------- 3. Hawk (D.1.1)

def scan(a, b, h0):
    """h_t = a_t * h_t-1 + b_t: a, b (B, T, W), h0 (B, W) -> h (B, T, W), by doubling: log2(T)
    rounds of shift, multiply, add. Exact, no overflow, plain autograd.

    After round k, (a, b)[t] composes the 2^k steps that end at t: h_t = a * h_(t-2^k) + b.
    """
    b = torch.cat([a[:, :1] * h0[:, None] + b[:, :1], b[:, 1:]], dim=1)  # h0 into the first step
    shift = 1
    while shift < a.shape[1]:
        # Steps before the first compose to the identity (1, 0).
        before_a = F.pad(a[:, :-shift], (0, 0, shift, 0), value=1.)
        before_b = F.pad(b[:, :-shift], (0, 0, shift, 0))
        a, b = a * before_a, a * before_b + b
        shift *= 2
    return b


class Recurrence(torch.autograd.Function):
    """The same, one step after the other (T small operations, whatever the batch), with the
    backward pass written out: on CPU 4 to 14 times as fast as `scan` (T = 32 to 250), which is for
    GPUs.

    Backwards it is the same recurrence in reversed time: what h_t is worth,
    g_t = dL/dh_t + a_t+1 g_t+1, gives dL/da_t = g_t h_t-1 and dL/db_t = g_t.
    """

    @staticmethod
    def forward(ctx, a, b, h0):
        a, b = a.transpose(0, 1).contiguous(), b.transpose(0, 1).contiguous()  # (T, B, W)
        h = torch.cat([h0[None], torch.empty_like(b)])  # (T + 1, B, W)
        for t in range(len(a)):
            torch.addcmul(b[t], a[t], h[t], out=h[t + 1])
        ctx.save_for_backward(a, h)
        return h[1:].transpose(0, 1)  # (B, T, W)

    @staticmethod
    def backward(ctx, grad):
        a, h = ctx.saved_tensors
        g = grad.transpose(0, 1).clone(memory_format=torch.contiguous_format)
        for t in reversed(range(len(a) - 1)):
            g[t].addcmul_(a[t + 1], g[t + 1])
        return (g * h[:-1]).transpose(0, 1), g.transpose(0, 1), a[0] * g[0]


class BoundedSqrt(torch.autograd.Function):
    """sqrt whose gradient 1 / (2 sqrt(x)) is cut at 1000: sqrt(1 - a^2) has an infinite slope
    where the decay a reaches 1."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sqrt()

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return grad / torch.sqrt((4 * x).clamp(min=1e-6))  # 1 / sqrt(1e-6) = 1000


class RGLRU(nn.Module):
    """Real-gated linear recurrent unit of Hawk (De et al. 2024, the reference [22] of D.1.1).
    State in float32.

    r_t = sigmoid(W_r x_t), i_t = sigmoid(W_i x_t)   (block-diagonal, one block per head)
    log a_t = -8 softplus(Lambda) r_t,   h_t = a_t h_t-1 + sqrt(1 - a_t^2) i_t x_t
    NOT in paper: variance scale 1 for both gates, where Table A15 has .1. (log_lambda is Lambda.)
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        block = width // heads
        self.w = nn.Parameter(torch.randn(2, heads, block, block) * math.sqrt(1 / block))
        self.b = nn.Parameter(torch.zeros(2, heads, 1, block))
        decay = torch.empty(width).uniform_(.9, .999)  # a at r = 1: each channel's fastest
        self.log_lambda = nn.Parameter(torch.log(torch.expm1(-decay.log() / 8)))  # softplus^-1

    def forward(self, x, h0):
        """x (B, T, W), h0 (B, W) float32 -> h (B, T, W) float32."""
        B, T, W = x.shape
        x = x.float()
        blocks = x.view(B, T, self.heads, -1)  # (B, T, W) -> (B, T, H, W/H)
        r, i = (torch.einsum("bthi,hij->bthj", blocks, w) + bias.squeeze(1)  # (B, T, H, W/H)
                for w, bias in zip(self.w, self.b))
        # (B, T, H, W/H) -> (B, T, W), twice
        log_a = -8 * F.softplus(self.log_lambda) * torch.sigmoid(r).reshape(B, T, W)
        gain = BoundedSqrt.apply(-torch.expm1(2 * log_a))  # sqrt(1 - a^2), exact also near a = 1
        inputs = gain * torch.sigmoid(i).reshape(B, T, W) * x
        recurrence = scan if x.is_cuda else Recurrence.apply
        return recurrence(log_a.exp(), inputs, h0)


class Hawk(nn.Module):
    """Hawk's mixer: a gated branch times a branch of short causal convolution (4 taps) and RG-LRU.
    `bias` is not used."""

    def __init__(self, width, heads):
        super().__init__()
        self.branch = linear(width, width)
        self.gate = linear(width, width)
        self.out = linear(width, width)
        self.taps = nn.Parameter(torch.randn(4, width) * .1)  # NOT in paper: std .1
        self.tap_bias = nn.Parameter(torch.zeros(width))
        self.lru = RGLRU(width, heads)

    def forward(self, x, bias=None, cache=None):
        """x (B, T, D) -> (B, T, D). With a cache T may be anything; the state after the last step
        is left in it."""
        state = cache if cache is not None else self.init_cache(len(x), 0, x)
        u = torch.cat([state["tail"], self.branch(x)], dim=1)  # (B, 3 + T, D): 3 before, these
        T = x.shape[1]
        convolved = sum(u[:, k:k + T] * self.taps[k] for k in range(4)) + self.tap_bias
        h = self.lru(convolved, state["h"])
        if cache is not None:
            cache["tail"], cache["h"] = u[:, -3:], h[:, -1]
        return self.out(h.to(x.dtype) * F.gelu(self.gate(x)))

    def init_cache(self, B, T, like):
        """The convolution's last three inputs and the state of the RG-LRU, for B sequences."""
        D = self.out.in_features
        return {"tail": like.new_zeros(B, 3, D), "h": torch.zeros(B, D, device=like.device)}


# ----------------------------------------------------------------------------------------- 4. block

class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)): the pre-norm layer of D.1.1 and D.1.2."""

    def __init__(self, mixer, width, hidden):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(width)
        self.mlp = mlp(width, hidden)

    def forward(self, x, bias=None, cache=None):
        """x (B, T, D), bias as Attention's or None -> (B, T, D). With a cache: goes on from it."""
        x = x + self.mixer(self.norm1(x), bias, cache)
        return x + self.mlp(self.norm2(x))


MIXERS = {"attention": Attention, "hawk": Hawk}


# -------------------------------------------------------------------------------- 5. sequence model

class SequenceModel(nn.Module):
    """f_theta of the paper. `layer` is l: blocks 1..l are `lower`, l+1..L are `upper`.

    parts: see grid.grid_parts; the observation head exists only if lam > 0.
    """

    def __init__(self, parts, width, layers, heads, hidden, buckets, layer, lam=0.,
                 mixer="attention"):
        super().__init__()
        self.layer, self.lam = layer, lam
        embedding, action_head, obs_head = parts
        self.embed = embedding(width)
        self.bias = RelativeBias(buckets, heads) if mixer == "attention" else None
        self.blocks = nn.ModuleList(Block(MIXERS[mixer](width, heads), width, hidden)
                                    for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.action_head = action_head(width)
        self.obs_head = obs_head(width) if lam > 0 else None
        self.continuous = isinstance(self.action_head, GaussianHead)

    def through(self, first, last, x, caches=None, t=0):
        """Blocks first+1 .. last on x (B, T, D); with `caches`, one for each block of the model, on
        step t alone."""
        bias = None if self.bias is None else self.bias(t + x.shape[1], x.device, t)
        for i in range(first, last):
            x = self.blocks[i](x, bias, None if caches is None else caches[i])
        return x

    def lower(self, obs, caches=None, t=0):
        """o_1:T -> e_1:T,l. obs (B, T, K) int64, or (B, T, F) float of the ant -> (B, T, D). With
        caches (from `init_cache`): step t alone, T = 1."""
        return self.through(0, self.layer, self.embed(obs), caches, t)

    def upper(self, e, caches=None, t=0):
        """e_1:T,l, controlled or not -> final residual stream, normalised, (B, T, D), which is
        what `action_head` and `obs_head` take."""
        return self.norm(self.through(self.layer, len(self.blocks), e, caches, t))

    def action_logits(self, e, caches=None, t=0):
        """e (B, T, D) -> what describes p(a_t | o_1:t): logits (B, T, A), or mean and log std of
        a continuous action (B, T, 2 A)."""
        return self.action_head(self.upper(e, caches, t))

    def init_cache(self, B, T):
        """One dict per block, for B sequences of at most T steps."""
        return [block.mixer.init_cache(B, T, self.norm.weight) for block in self.blocks]


# -------------------------------------------------------------------------------------- 6. the loss

def obs_nll(logits, next_obs):
    """-ln p(o_t+1 | o_1:t), nats: logits (B, T, K * C), next_obs (B, T, K) -> (B, T); of the ant,
    a Gaussian, (B, T, 2 F), (B, T, F) -> (B, T).

    NOT in paper: its "categorical" is read as one categorical over cells per thing, summed.
    """
    if next_obs.is_floating_point():
        return -gaussian_logp(next_obs, *logits.float().chunk(2, dim=-1))
    log_p = logits.view(*next_obs.shape, -1).log_softmax(-1)  # (B, T, K*C) -> (B, T, K, C)
    # (B, T, K, C) at (B, T, K, 1) -> (B, T, K) -> (B, T)
    return -log_p.gather(-1, next_obs[..., None])[..., 0].sum(-1)


def action_nll(logits, action):
    """-ln p(a_t), nats: logits as from `SequenceModel.action_logits`, action (B, T) int64, or
    (B, T, A) float of the ant -> (B, T)."""
    if action.is_floating_point():
        return -gaussian_logp(action, *logits.float().chunk(2, dim=-1))
    return F.cross_entropy(logits.transpose(1, 2), action, reduction="none")  # wants (B, A, T)


def sample_action(logits, continuous, noise):
    """a ~ p(a_t | o_1:t): logits (n, A) and noise (n,), uniform -> (n,) int64; continuous: logits
    (n, 2 A) and noise (n, A), from N(0, I) -> (n, A) float."""
    if not continuous:  # the first action at which the distribution function exceeds the noise
        below = logits.softmax(-1).cumsum(-1)[:, :-1]  # (n, A - 1)
        return (noise[:, None] >= below).sum(-1)
    mean, log_std = logits.chunk(2, dim=-1)
    return mean + log_std.exp() * noise


def pretraining_loss(model, obs, action, mask):
    """Eq. 5, averaged over the steps that exist: -ln p(a_t) - lam ln p(o_t+1).

    obs (B, T+1, K or F), action (B, T) or (B, T, A), mask (B, T). Returns (loss, action NLL),
    scalars in nats per step.
    """
    x = model.upper(model.lower(obs[:, :-1]))
    nll = masked_mean(action_nll(model.action_head(x), action), mask)
    if model.lam == 0:
        return nll, nll
    seen = masked_mean(obs_nll(model.obs_head(x), obs[:, 1:]), mask)
    return nll + model.lam * seen, nll
