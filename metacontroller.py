"""Everything that writes into the residual stream of a frozen base model: controllers, and the metacontroller that finds them.

Bottom-up:

  1. Decoder           f_hyp: a code z becomes a linear controller U, applied as e + U e (Eq. 11, 18); U is never built
  2. image_of          what controllers are trained to steer: the episode, or another view of it
     control loss      controllers driven by the true subgoal (C.3), with which internal RL is compared
  3. Metacontroller    D.2: history h, sequence embedding s, encoder, switch beta, temporal integration
  4. discovery loss    Eq. 9 (Eq. 3 of the main text), and what is measured about the gate

Paper sections: C.3, C.4, D.2, E.1; Tables A7, A9.

Glossary (name -> symbol -> shape; B batch, T time, D width n_e, r rank)
  e         e_t,l: the residual stream. `Decoder` gets it at the controlled layer and writes there; `Metacontroller` gets it
            as it is, uncontrolled, at layer `read` (the same one, as in the paper, unless the preset says otherwise)  (B, T, D)
  h         h_t-1, GRU summary of e_1:t-1               (B, T, n_h)
  H_s, H_d  hidden units of the switch and of the decoder
  s         s(e_1:T), ONE vector for the whole sequence (B, n_s)
  mu, logvar  mu_t, ln diag Sigma_t of the proposal     (B, T, n_z)
  proposal  z~_t ~ N(mu_t, Sigma_t)                     (B, T, n_z)
  beta      beta_t, switching gate in [0, 1], causal    (B, T)
  z         z_t, the integrated code                    (B, T, n_z)
  alpha     weight of the KL                            scalar
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from envs import JOINTS, MOTORS, QUARTER_COS, QUARTER_SIN, symmetries
from model import Block, Hawk, action_nll, linear, mlp

# ------------------------------------------------------------------------------------------------ 1. decoder (Eq. 11, 18)

class Decoder(nn.Module):
    """f_hyp: z -> U, of rank r (grid) or a full matrix (rank=0, ant). One hidden ReLU layer (Table A9: 32)."""

    def __init__(self, n_z, width, rank, hidden=32):
        super().__init__()
        self.width, self.rank = width, rank
        self.net = mlp(n_z, hidden, 2 * width * rank if rank else width * width)

    def factors(self, z):
        """z (..., n_z) -> left (..., D, r) and right (..., r, D) with U = left @ right. Full matrix: left is None, right is U (..., D, D)."""
        flat = self.net(z)
        if not self.rank:
            return None, flat.view(*z.shape[:-1], self.width, self.width)
        left, right = flat.chunk(2, dim=-1)
        return left.view(*z.shape[:-1], self.width, self.rank), right.view(*z.shape[:-1], self.rank, self.width)

    def forward(self, e, z):
        """Eq. 11: e (..., D), z (..., n_z) -> e + U e. Applying a U of rank r costs 2 D r per step; building it first would cost D^2 r."""
        if self.rank:
            left, right = self.factors(z)
            return e + (left @ (right @ e[..., None]))[..., 0]  # (..., r, D) @ (..., D, 1) -> (..., r, 1) -> (..., D, 1)
        # U is linear in the hidden units, U = sum_h hidden_h W_h + bias: W_h e for all h at once, then their sum. D H_d numbers per step, not D^2.
        D, last = self.width, self.net[2]
        hidden = self.net[1](self.net[0](z))  # (..., H_d)
        W = last.weight.view(D, D, -1).transpose(0, 1).reshape(D, -1)  # (D out, D in, H_d) -> (D in, D out * H_d)
        each = (e @ W).view(*e.shape, -1)  # (..., D, H_d)
        return e + (each @ hidden[..., None])[..., 0] + e @ last.bias.view(D, D).T

    def matrix(self, z):
        """U itself, (..., D, D): for tests and for looking at it."""
        left, right = self.factors(z)
        return right if left is None else left @ right


# ------------------------------------------------------------------------------------------------ 2. what is steered; true subgoals (C.3)

SYMMETRIES = 8  # of the square: quarter turns and reflections


def turned(world, g, obs, action):
    """Steps seen and done in a turned world: g (B, T) which symmetry; obs (B, T, K or F), action (B, T) or (B, T, 8) -> the same shapes.

    The grid's are those of envs.symmetries. The ant's: g % 4 quarter turns of all but its torso, whose legs are renamed so that they follow (envs.JOINTS); before
    that, if g >= 4, everything is reflected, north for south.
    """
    if world.body == "point":
        cells, actions = (torch.from_numpy(table).to(obs.device) for table in symmetries(world.G))  # (8, C), (8, 4)
        return cells[g[..., None], obs], actions[g, action]
    # Indices: see the table of envs.AntPinpad. symlog acts on each number alone and is odd, so it commutes with all this.
    device, new = obs.device, obs.clone()
    places = range(27, obs.shape[-1], 2)  # on the board, of things, in the cell: each y follows its x
    mirrored = torch.tensor([2, 4, 14, 16, 18, *(x + 1 for x in places)], device=device)  # the quaternion's x and z, velocity y, angular velocity x and z
    new[..., mirrored] = obs[..., mirrored] * torch.where(g >= 4, -1., 1.)[..., None]
    x = torch.tensor([2, 13, 16, *places], device=device)  # of the quaternion, the velocity, the angular velocity
    cos, sin = (torch.from_numpy(table).to(device)[g % 4][..., None] for table in (QUARTER_COS, QUARTER_SIN))
    new[..., x], new[..., x + 1] = cos * new[..., x] - sin * new[..., x + 1], sin * new[..., x] + cos * new[..., x + 1]
    joints, motors = ([torch.from_numpy(table).to(device)[g] for table in tables] for tables in (JOINTS, MOTORS))  # each (B, T, 8) twice
    for x in (5, 19):  # angles, velocities
        new[..., x:x + 8] = obs[..., x:x + 8].gather(-1, joints[0]) * joints[1]  # (B, T, 8): which joint, and its sign
    return new, action.gather(-1, motors[0]) * motors[1]  # (B, T, 8)


def exchanged(world, colours, obs):
    """The observations with the colours exchanged: colours (B, O), for each colour whose place it takes; obs (B, T, K or F), as is the result."""
    order = torch.arange(obs.shape[-1], device=obs.device).repeat(len(obs), 1)  # (B, K or F); walls, the agent and its senses stay
    if world.body == "point":
        order[:, :world.O] = colours
    else:
        order[:, 29:29 + 2 * world.O] = (29 + 2 * colours[..., None] + torch.arange(2, device=obs.device)).flatten(1)  # (B, O, 2) -> (B, 2 O)
    return obs.gather(-1, order[:, None].expand(obs.shape))  # (B, K or F) -> (B, T, K or F)


def image_of(batch, world, symmetric, splice, shuffle):
    """Another view of a batch's episodes, for the controllers to steer; None if no such help is asked for. NOT in paper; three helps (README):

    symmetric: each image is turned or reflected its own way, a spliced past as the episode that it comes from (see `turned`). A code that says "up" or
        "into that corner" becomes worthless, one that says "to colour 2" is as good as before. Without it the codes name directions: code identity stays at 0.
    shuffle, splice: in a share `shuffle` of the images, and in a share `splice` of the others, the past, up to a random step, is made useless or wrong, so
        that the code has to overrule what the base knows from it. Without, a code need only say which of the transitions shown in pretraining is meant, and
        fails where RL needs one that was never shown.
        splice: the past is the end of another episode. Its steps are steered, too, by that episode's codes. Codes form fast.
        shuffle: the past is the episode's own, its colours exchanged at random. Nothing betrays the exchange but the colours themselves, so it is the
        stricter teacher; but its own steps are not scored, as no code tells of exchanged colours. Late steps of an episode are scored
        more often than early ones.
    In both any colour follows any other, also where pretraining never shows it.

    batch: a dict of tensors obs (B, T+1, K), action and mask (B, T), or the ant's. Returns a dict of obs (B, T, K), action, row, step (B, T): step t of image b
    is step step[b, t] of episode row[b, t]; and mask (B, T), the steps to be scored. An image is as long as its episode.
    """
    if not (symmetric or splice or shuffle):
        return None
    obs, action, length = batch["obs"], batch["action"], batch["mask"].sum(1, keepdim=True)  # length (B, 1)
    B, T, device = *action.shape[:2], obs.device
    t, rows, draw = torch.arange(T, device=device), torch.arange(B, device=device)[:, None], lambda: torch.rand(B, 1, device=device)
    shuffled = draw() < shuffle  # (B, 1)
    spliced = (draw() < splice) & ~shuffled
    other = torch.randperm(B, device=device)[:, None]
    cut = (draw() * length).long() * (shuffled | spliced)  # (B, 1) where the past ends
    cut = torch.where(spliced, torch.minimum(cut, length[other[:, 0]]), cut)  # the other has no more steps than that
    past = t < cut  # (B, T)
    row, step = torch.where(past & spliced, other, rows), torch.where(past & spliced, length[other[:, 0]] - cut + t, t)
    colours = torch.rand(B, world.O, device=device).argsort(1)  # (B, O) a permutation each
    seen = obs[row, step]  # (B, T, K)
    seen = torch.where((past & shuffled)[..., None], exchanged(world, colours, seen), seen)
    g = torch.randint(SYMMETRIES if symmetric else 1, (B, 1), device=device)[row, 0]  # (B, T); 0 is the identity
    seen, action = turned(world, g, seen, action[row, step])
    return {"obs": seen, "action": action, "row": row, "step": step, "mask": batch["mask"] & ~(past & shuffled)}


def control_loss(base, decoder, obs, action, subgoal, mask):
    """C.3: action NLL (nats per step) when z_t is the one-hot of the true subgoal and the gate is always open.

    obs (B, T, K), action, subgoal, mask (B, T). With a frozen base they train the decoder alone.
    """
    with torch.no_grad():
        e = base.lower(obs)
    z = F.one_hot(subgoal, decoder.net[0].in_features).to(e.dtype)  # (B, T, subgoals)
    return (action_nll(base.action_logits(decoder(e, z)), action) * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------------ 3. metacontroller (D.2)

class SequenceEmbedder(nn.Module):
    """f_emb, Eq. 13: the whole sequence e_1:T in one vector s, by a Hawk layer (D.1.1) read at the last step.

    One vector per sequence, not per step: given a summary of the future at every t, the encoder re-sends the code at every
    step and the gate never closes (measured in a prototype). NOT in paper, which does not give it: the inner width of 64.
    """

    def __init__(self, width, n_s, inner=64, heads=4):
        super().__init__()
        self.inp, self.block = linear(width, inner, 1.), Block(Hawk(inner, heads), inner, 2 * inner)
        self.norm, self.out = nn.LayerNorm(inner), linear(inner, n_s, 1.)

    def forward(self, e, length):
        """e (B, T, D), length (B,) -> s (B, n_s)."""
        x = self.block(self.inp(e))  # (B, T, inner); causal, so padding after the last step changes nothing before it
        last = x[torch.arange(len(x), device=x.device), length - 1]  # (B, inner)
        return self.out(self.norm(last))


class Metacontroller(nn.Module):
    """c_phi of D.2. gate: "soft" (E.1, the default), "gumbel" (exact form of E.1, straight-through), or "forced" (C.4.1)."""

    def __init__(self, width, n_z=8, n_h=32, n_s=32, rank=16, gate="soft", encoder_hidden=64, decoder_hidden=32, switch_hidden=32,
                 forget=0.):
        super().__init__()
        self.n_z, self.n_h, self.gate, self.forget = n_z, n_h, gate, forget
        # NOT in paper: e is normalised before it is read (not where it is written). Its scale is whatever the base learned.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.gru = nn.GRU(width, n_h, batch_first=True)
        self.embedder = SequenceEmbedder(width, n_s)
        self.encoder = mlp(width + n_h + n_s, encoder_hidden, 2 * n_z, scale=1.)
        # NOT in paper: the posterior starts narrow, Sigma = exp(-3). From Sigma = 1 the code carries nothing at first and the KL
        # extinguishes it within 200 steps for every alpha >= 0.1 (posterior collapse, measured in a prototype).
        nn.init.constant_(self.encoder[-1].bias[n_z:], -3.)
        # f_switch, Eq. 16: one hidden layer. The part that reads e_t and h_t-1 is applied to all steps at once.
        self.switch_in, self.switch_z = linear(width + n_h, switch_hidden, 1.), nn.Linear(n_z, switch_hidden, bias=False)
        self.switch_out = linear(switch_hidden, 1, 1.)
        self.decoder = Decoder(n_z, width, rank, decoder_hidden)

    def encode(self, e, length):
        """Eq. 12, 13, 15: e (B, T, D) -> mu, logvar (B, T, n_z) and the switch's input from e_t, h_t-1 (B, T, H_s)."""
        e = self.norm(e)
        h, _ = self.gru(e)  # (B, T, n_h): h_1 .. h_T
        h = F.pad(h[:, :-1], (0, 0, 1, 0))  # h_0 .. h_T-1: encoder and switch read the summary of the PAST
        s = self.embedder(e, length)[:, None].expand(-1, e.shape[1], -1)  # (B, n_s) -> (B, T, n_s)
        # Out of autocast's bfloat16: the KL cancels near the prior, and products of 1 - beta must keep small weights.
        mu, logvar = self.encoder(torch.cat([e, h, s], dim=-1)).float().chunk(2, dim=-1)
        if self.training and self.forget:
            # NOT in paper: in a share of the training episodes the switch does not see h. There are two ways to know that a subgoal is reached. Something has
            # changed, by e and h: this is found first, holds for any code, and fails for a change that no demonstration shows. Or what e shows is what
            # z asks for: this holds for every pair of subgoals, and fails for a code that says little. A switch that always saw h had learned the first (README).
            h = h * (torch.rand(len(h), 1, 1, device=h.device) >= self.forget)
        return mu, logvar, self.switch_in(torch.cat([e, h], dim=-1))

    def gate_logit(self, switch_input, z):
        """Eq. 16 before the sigmoid: switch_input (B, H_s) from e_t, h_t-1; z (B, n_z) the INTEGRATED code z_t-1 -> (B,)."""
        return self.switch_out(F.relu(switch_input + self.switch_z(z)))[:, 0].float()

    def integrate(self, proposal, switch_input):
        """Eq. 16, 17 over a sequence: proposal (B, T, n_z), switch_input (B, T, H_s) -> z (B, T, n_z), beta (B, T).

        beta_1 = 1: before the first step there is no code to keep. (NOT in paper, which leaves z_0 open.)
        """
        z = proposal[:, 0]
        codes, betas = [z], [torch.ones_like(z[:, 0])]
        # unbind once, not x[:, t] in the loop: indexing makes a full-size zero gradient per step.
        for proposal_t, input_t in list(zip(proposal.unbind(1), switch_input.unbind(1)))[1:]:
            if self.gate == "forced":
                beta = torch.ones_like(betas[0])  # C.4.1
            else:
                logit = self.gate_logit(input_t, z)
                if self.gate == "gumbel" and self.training:  # E.1: a sample of a binary gate, relaxed in the backward pass
                    uniform = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6)
                    logit = logit + torch.log(uniform) - torch.log1p(-uniform)  # logistic noise
                beta = torch.sigmoid(logit)
                if self.gate == "gumbel":
                    beta = (beta > .5).float() + (beta - beta.detach())  # forward hard, gradient of the sigmoid
            z = beta[:, None] * proposal_t + (1 - beta[:, None]) * z  # Eq. 17
            codes.append(z)
            betas.append(beta)
        return torch.stack(codes, dim=1), torch.stack(betas, dim=1)

    def forward(self, e, length, noise):
        """e (B, T', D), length (B,) <= T', noise (B, T, n_z) from N(0, I), T <= T' -> z, beta, mu, logvar, each for T steps.
        Causal except through s, which summarises e_1 .. e_length."""
        mu, logvar, switch_input = (x[:, :noise.shape[1]] for x in self.encode(e, length))
        proposal = mu + noise * (logvar / 2).exp()  # Eq. 14, reparameterised
        z, beta = self.integrate(proposal, switch_input)
        return z, beta, mu, logvar

    def switch_step(self, e, h, z):
        """One causal step for acting: e_t (B, D), h_t-1 (B, n_h), z_t-1 (B, n_z) -> beta_t (B,), h_t (B, n_h). Algorithm 1."""
        e = self.norm(e)
        beta = torch.sigmoid(self.gate_logit(self.switch_in(torch.cat([e, h], dim=-1)), z))
        if self.gate == "forced":
            beta = torch.ones_like(beta)
        return beta, self.gru(e[:, None], h[None])[1][0]


# ------------------------------------------------------------------------------------------------ 4. discovery (C.4)

def kl_to_prior(mu, logvar):
    """KL(N(mu, Sigma) || N(0, I)) in nats, summed over the code's dimensions: (..., n_z) -> (...). Eq. 8."""
    return .5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum(-1)


def discovery_loss(base, meta, obs, action, mask, noise, alpha, image=None):
    """Eq. 9 with lambda = 0 (Table A9), averaged over the steps that exist.

    obs (B, T+1, K), action, mask (B, T), noise (B, T, n_z), alpha >= 0. Soft gate: the KL counts at every step, not weighted by
    beta (E.1, continuous relaxation). Gumbel gate: it counts where the gate is open. Nothing penalises switching itself.
    image: None, or another view of the same episodes from `image_of`: the codes are read from the episode and have to steer its image. The KL
    counts at every step of the episode, the NLL at the steps of the image that its mask allows.
    Returns loss and a dict: nll and kl (nats per step), z, beta.
    """
    # s sees the last observation too, after the last action. NOT in paper, which is silent: without it the last subgoal is the
    # one whose colour is never seen to be reached, and it stays without a code.
    e = base.lower(obs)  # (B, T+1, D); no gradient is recorded here, as the base is frozen (it is not in the co-training rival)
    z, beta, mu, logvar = meta(base.reading(e), mask.sum(1) + 1, noise)
    if image is None:
        e, steering, scored = e[:, :-1], z, mask  # nothing is decided at the last observation: (B, T, D)
    else:
        e, action, scored = base.lower(image["obs"]), image["action"], image["mask"]
        steering = z[image["row"], image["step"]]  # (B, T, n_z)
    nll = (action_nll(base.action_logits(meta.decoder(e, steering)), action) * scored).sum() / scored.sum()
    kl = kl_to_prior(mu, logvar)  # (B, T)
    if meta.gate == "gumbel":
        kl = kl * beta
    kl = (kl * mask).sum() / mask.sum()
    return nll + alpha * kl, {"nll": nll, "kl": kl, "z": z, "beta": beta}


def gate_scores(beta, true, mask):
    """How well the gate finds the subgoal changes. beta (B, T) in [0, 1]; true, mask (B, T) bool, `true` as Trajectories.switches.

    A switch is beta > 0.5 at t > 0. Exact scores ask for the same step; f1_1 and f1_5 count a switch and a true switch as matching if they
    are at most one, or five, steps apart. "undecided" is the share of gates in (.1, .9).
    """
    mask = mask.clone()
    mask[:, 0] = False
    found, true = (beta > .5) & mask, true & mask
    near = lambda x, k: F.max_pool1d(x[:, None].float(), 2 * k + 1, stride=1, padding=k)[:, 0] > 0  # (B, T): at most k steps from a switch
    ratio = lambda hits, of: (hits.sum() / of.sum().clamp(min=1)).item()
    f1 = lambda p, r: 2 * p * r / max(p + r, 1e-9)
    precision, recall = ratio(found & true, found), ratio(found & true, true)
    return {"switches": found.sum().item() / len(mask), "true_switches": true.sum().item() / len(mask),
            "precision": precision, "recall": recall, "f1": f1(precision, recall),
            **{f"f1_{k}": f1(ratio(found & near(true, k), found), ratio(true & near(found, k), true)) for k in (1, 5)},
            "undecided": ratio((beta > .1) & (beta < .9) & mask, mask)}
