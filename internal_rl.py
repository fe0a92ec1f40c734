"""Acting and reinforcement learning: on the codes z (internal RL) and, as its rival, on the raw
actions.

Bottom-up:

  1. Player                the base model acting step by step in N worlds, its stream steered
  2. InternalEnvironment   Algorithms 1 and 2: what lies between two openings of the gate
  3. Policy                pi(z | e_1:t), a one-layer Hawk stepped only when the gate opens (D.3)
  4. the update            critic-free and clipped (C.5.2), one for both kinds of action
  5. the two steps         Algorithm 3 for internal RL, and the same for raw actions (C.5.3)

Paper sections: C.5, D.3; Algorithms 1-3; Eq. 10; Table A13.

Glossary (name -> symbol -> shape; N episodes, M abstract actions, D width; n rows that are kept,
some of them finished)
  e         e_t,l, which switch and policy see and `steer` changes; in sequences: at the moments at
            which a code was asked for, not changed                    (n, D) or (N, M, D)
  z         the code: the abstract action                              (n, n_z) or (N, M, n_z)
  logp      ln pi(z | e_1:t), summed over dimensions                   (N, M)
  advantage A_tau = (R - mean R) / (std R + 1e-3)                      (N,)
  opens     rows whose gate opened at this step: beta > 0.5            (m,) int64
  rng       a numpy Generator, or parallel.Rows: layouts, actions and codes are drawn from it
  state     all that must persist from step to step, one row per episode: nested dicts and lists
Of the ant, read F numbers for K cells, and vectors of A torques for actions. In the update A is
the advantage, and `ratio` pi / pi_old.
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import parallel
from envs import sample_layouts, simulate
from metacontroller import BETA_THRESHOLD
from model import Block, Hawk, action_nll, gaussian_logp, linear, sample_action

# ---------------------------------------------------------------------------------------- 1. player

def select(state, rows):
    """Keep the given rows of every tensor in a nested dict / list."""
    if isinstance(state, dict):
        return {name: select(value, rows) for name, value in state.items()}
    if isinstance(state, list):
        return [select(value, rows) for value in state]
    return state[rows]


def assign(state, rows, new):
    """Write `new` into the given rows of every tensor of a dict, in place."""
    for name, value in state.items():
        value[rows] = new[name]


class Player:
    """The base model acting in N worlds: an `act` for `envs.simulate`.

    `steer(e, state, worlds, rows) -> e` changes the stream e (n, D) of the episodes `rows` (n,)
    before the upper blocks see it. `state` is its memory; like the caches it follows the episodes
    when finished ones are dropped. All recurrent memory lives through the whole
    episode: nothing is reset at a switch (Algorithm 1). Costs one pass of the base per raw step;
    with attention one over all steps before, T^2 an episode, and caches of 2 D numbers per step,
    block and episode.
    After the game, `logp` (N, T) holds ln p(a_t) of the actions taken.
    """

    def __init__(self, base, n, T, rng, steer=None, state=None):
        self.base, self.n, self.rng = base, n, rng
        self.steer, self.state = steer, state or {}
        self.device = base.norm.weight.device
        self.caches = base.init_cache(n, T)
        self.rows = np.arange(n)
        self.t = 0
        self.logp = torch.zeros(n, T, device=self.device)

    @torch.no_grad()
    def __call__(self, worlds, alive):
        # Finished episodes ride along until they are a third of the batch: copying the caches at
        # every step would cost more.
        if len(alive) < len(self.rows) * 2 / 3:
            keep = torch.from_numpy(np.searchsorted(self.rows, alive)).to(self.device)
            self.caches = select(self.caches, keep)
            self.state = select(self.state, keep)
            self.rows = alive
        obs = torch.from_numpy(worlds.obs()[self.rows]).to(self.device)  # (n, K)
        e = self.base.lower(obs[:, None], self.caches, self.t)  # (n, 1, D)
        if self.steer is not None:
            e = self.steer(e[:, 0], self.state, worlds, self.rows)[:, None]
        logits = self.base.action_logits(e, self.caches, self.t)  # (n, 1, A), or (n, 1, 2 A)
        action = sample_action(logits[:, 0], self.base.continuous, self.noise(logits))
        self.logp[self.rows, self.t] = -action_nll(logits, action[:, None])[:, 0]
        self.t += 1
        return action.cpu().numpy()[np.searchsorted(self.rows, alive)]

    def noise(self, logits):
        """For sample_action. Drawn for all N episodes at every step, so that an episode's luck does
        not depend on when others end."""
        if self.base.continuous:
            noise = self.rng.standard_normal((self.n, logits.shape[-1] // 2))  # (N, A)
        else:
            noise = self.rng.random(self.n)  # (N,)
        return torch.from_numpy(noise[self.rows]).to(logits)


def play(base, world, tasks, rng, steer=None, state=None, layouts=None):
    """Play one episode per entry of `tasks` with the base model. Returns Trajectories, success
    (N,) bool, the Player."""
    things, agent = layouts or sample_layouts(world, rng, len(tasks))
    player = Player(base, len(tasks), world.T, rng, steer, state)
    return *simulate(world, tasks, things, agent, player, rng), player


# -------------------------------------------------------------------------- 2. internal environment

class InternalEnvironment:
    """Algorithms 1 and 2 for a batch: a `steer` for Player. Between two openings of the gate, base
    model and decoder play by themselves. Algorithm 2's init and step(z) are turned inside out:
    where step(z) would return, `ask` is called.

    `ask(e, memory, noise) -> z, logp` is a policy's sampler, noise from N(0, I); it is asked
    only in the episodes whose gate is open, at the first step always. `asked` keeps what it was
    asked and said: (episode, position in that episode, e, z, logp). `gates` (N, T) keeps
    beta, `codes` (N, T, n_z) the code of every raw step. `state` is the first state; from then on
    the Player keeps it.

    In training z_t mixes the proposal and z_t-1 (Eq. 17); here a new code replaces the old one
    outright. It may: a trained gate is quasi-binary (Fig. 6), so that beta > 0.5 means beta near
    1, where the mixture is the proposal. How binary it is, the logs of stage 2 say ("undecided").
    """

    def __init__(self, meta, ask, memory, n, T, rng, device):
        self.meta, self.ask, self.rng = meta, ask, rng
        self.state = {"h": torch.zeros(n, meta.n_h, device=device),
                      "z": torch.zeros(n, meta.n_z, device=device), "memory": memory}
        self.count = torch.zeros(n, dtype=torch.long, device=device)  # abstract actions so far
        self.asked = []
        self.t = 0
        self.gates = torch.zeros(n, T, device=device)
        self.codes = torch.zeros(n, T, meta.n_z, device=device)

    def __call__(self, e, state, worlds, rows):
        beta, state["h"] = self.meta.switch_step(e, state["h"], state["z"])
        if self.t == 0:
            beta = torch.ones_like(beta)  # the policy always acts first
        self.gates[rows, self.t] = beta
        playing = torch.from_numpy(~worlds.done[rows]).to(e.device)
        opens = ((beta > BETA_THRESHOLD) & playing).nonzero()[:, 0]  # (m,)
        noise = self.rng.standard_normal((len(self.count), self.meta.n_z))[rows]  # (n, n_z)
        if len(opens):
            memory = select(state["memory"], opens)
            z, logp = self.ask(e[opens], memory, torch.from_numpy(noise).to(e)[opens])
            assign(state["memory"], opens, memory)
            state["z"] = state["z"].index_copy(0, opens, z)
            episode = torch.from_numpy(rows).to(e.device)[opens]
            self.asked.append((episode, self.count[episode], e[opens], z, logp))
            self.count[episode] += 1
        self.codes[rows, self.t] = state["z"]
        self.t += 1
        return self.meta.decoder(e, state["z"])

    def sequences(self):
        """What was asked, as padded sequences: e (N, M, D), z (N, M, n_z), logp (N, M),
        mask (N, M)."""
        episode, position, e, z, logp = (torch.cat(column) for column in zip(*self.asked))
        N, M = len(self.count), self.count.max()

        def padded(x):  # (all abstract actions, ...) -> (N, M, ...)
            out = x.new_zeros(N, M, *x.shape[1:])
            out[episode, position] = x
            return out
        mask = torch.arange(M, device=z.device) < self.count[:, None]
        return padded(e), padded(z), padded(logp), mask


# ---------------------------------------------------------------------------------- 3. policy (D.3)

class Policy(nn.Module):
    """pi(z | e_1:t): one Hawk layer of width 256 (Table A13) over the stream at the moments when
    the gate opened.

    NOT in paper: the mean starts at 0 and the standard deviation, one learned vector and not a
    function of e, at 1: the first policy is the prior N(0, I).
    """

    def __init__(self, width, n_z, inner=256, heads=8):
        super().__init__()
        self.norm_in = nn.LayerNorm(width, elementwise_affine=False)  # as in the metacontroller
        self.inp = linear(width, inner, 1.)  # NOT in paper: scale 1, where Table A15 has .1
        self.block = Block(Hawk(inner, heads), inner, 2 * inner)
        self.norm = nn.LayerNorm(inner)
        self.mean = linear(inner, n_z)
        nn.init.zeros_(self.mean.weight)
        self.log_std = nn.Parameter(torch.zeros(n_z))

    def forward(self, e, memory=None):
        """e (N, M, D) -> mean (N, M, n_z). With a memory (from `init_memory`): continues from it
        and updates it."""
        return self.mean(self.norm(self.block(self.inp(self.norm_in(e)), cache=memory)))

    def logp(self, e, z):
        """ln pi(z | e_1:t) of whole sequences: e (N, M, D), z (N, M, n_z) -> (N, M)."""
        return gaussian_logp(z, self(e), self.log_std)

    def init_memory(self, n):
        """What `forward` remembers of n episodes: nothing yet."""
        return self.block.mixer.init_cache(n, 0, self.mean.weight)

    def ask(self, e, memory, noise):
        """For InternalEnvironment: e (m, D), memory, noise (m, n_z) -> z (m, n_z), logp (m,).
        The memory is updated in place: the policy remembers the openings before this one."""
        mu = self(e[:, None], memory)[:, 0]
        z = mu + self.log_std.exp() * noise
        return z, gaussian_logp(z, mu, self.log_std)


def ask_prior(e, memory, noise):
    """`ask` with codes from N(0, I): the exploration that internal RL starts from."""
    return noise, gaussian_logp(noise, torch.zeros_like(noise), torch.zeros_like(noise))


# -------------------------------------------------------------------------------- 4. update (C.5.2)

def relative_advantage(reward):
    """A_tau over the whole batch, no critic, no groups: reward (N,) -> (N,)."""
    return (reward - reward.mean()) / (reward.std(unbiased=False) + 1e-3)


def clipped_loss(logp, old_logp, advantage, mask, clip):
    """Eq. 10, negated: logp, old_logp, mask (N, M), advantage (N,) -> scalar. One ratio per
    action, not per dimension of z.

    The sum over an episode's actions is kept; the mean is over episodes (C.5.2). NOT in paper,
    which prints min(r, clip(r)) A, probably a slip: min(r A, clip(r) A), different for A < 0.
    """
    ratio = ((logp - old_logp) * mask).exp()  # (N, M); at padding logp can be anything
    A = advantage[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    return -(gain * mask).sum(1).mean()


CLIP = .2  # range of the ratio. NOT in paper, which gives none


def clipped_update(parameters, optimizer, logp_of, old_logp, reward, mask, epochs=1):
    """`epochs` clipped steps on one batch. `logp_of()` recomputes logp (N, M) under the current
    parameters. Of several processes each has its own episodes' logp, old_logp and mask, and the
    reward of all, in the order of processes. Returns the last loss, 0 if it was skipped.

    NOT in paper: the gradient's norm is cut at 1; the clip range; more than one epoch; and
    if all rewards are equal, so that every advantage is 0, the step is skipped: Adam's momentum
    would move the policy on no evidence. Raises FloatingPointError on a non-finite loss.
    """
    advantage = relative_advantage(reward)[parallel.share(len(reward))]
    if reward.std(unbiased=False) == 0:
        return 0.
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = clipped_loss(logp_of(), old_logp, advantage, mask, CLIP)
        loss = parallel.backward(loss / parallel.count(), parameters)
        if not torch.isfinite(loss):
            raise FloatingPointError("the RL loss is not finite")
        nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
    return loss.item()


# --------------------------------------------------------------------------------- 5. the two steps

def internal_episodes(base, meta, world, rng, n, policy=None):
    """Algorithm 3's inner loop: n episodes of the post-training task with codes from `policy`
    (None: from the prior). Returns Trajectories, success (n,) bool, the InternalEnvironment."""
    ask = ask_prior if policy is None else policy.ask
    memory = {} if policy is None else policy.init_memory(n)
    env = InternalEnvironment(meta, ask, memory, n, world.T, rng, base.norm.weight.device)
    data, success, _ = play(base, world, [world.post_task] * n, rng, env, env.state)
    return data, success, env


def in_portions(logp_of, count, portions=8):
    """logp (N, M) of whole sequences of which count (N,) actions exist, 0 beyond the longest of its
    portion; M = max(count). logp_of(rows, m) -> (rows, m): of the first m actions of those rows.

    Equal to logp_of(all rows, M) where actions exist. In portions of similar length, since one
    restless gate, or one ant that lives, makes M ten times the average.
    """
    order, M = count.argsort(stable=True), int(count.max())
    logp = []
    for rows in order.split(math.ceil(len(order) / portions)):
        m = int(count[rows].max())
        logp.append(F.pad(logp_of(rows, m), (0, M - m)))
    return torch.cat(logp)[order.argsort()]  # back in the order of the episodes


def internal_rl_step(base, meta, policy, optimizer, world, rng, n, epochs):
    """One update of Algorithm 3 on n fresh episodes, shared by all processes. Returns a dict of
    what happened."""
    rng = parallel.Rows(rng, n)
    data, success, env = internal_episodes(base, meta, world, rng, n // parallel.count(), policy)
    e, z, old_logp, mask = env.sequences()
    ends = torch.stack([torch.from_numpy(success).to(z), torch.from_numpy(data.length).to(z),
                        env.count.to(z)], dim=1)  # (N, 3)
    reward, length, actions = parallel.gathered(ends).unbind(1)

    def logp_of(rows, m):
        return policy.logp(e[rows, :m], z[rows, :m])

    loss = clipped_update(list(policy.parameters()), optimizer,
                          lambda: in_portions(logp_of, env.count), old_logp, reward, mask, epochs)
    return {"success": reward.mean().item(), "loss": loss, "raw_steps": int(length.sum()),
            "abstract_actions": actions.mean().item(),
            "std": policy.log_std.exp().mean().item()}


def raw_rl_step(base, optimizer, world, rng, n, epochs):
    """The rival (C.5.3): the same update on the base model's own action probabilities, all of its
    weights trained. Returns a dict of what happened."""
    rng = parallel.Rows(rng, n)
    data, success, player = play(base, world, [world.post_task] * (n // parallel.count()), rng)
    to = lambda x: torch.from_numpy(x).to(player.device)
    ends = torch.stack([to(success).float(), to(data.length).float()], dim=1)  # (N, 2)
    reward, length = parallel.gathered(ends).unbind(1)
    obs, action, mask = to(data.obs()[:, :-1]), to(data.action), to(data.mask())

    def logp_of(rows, m):
        return -action_nll(base.action_logits(base.lower(obs[rows, :m])), action[rows, :m])

    loss = clipped_update(list(base.parameters()), optimizer,
                          lambda: in_portions(logp_of, mask.sum(1)),
                          player.logp[:, :mask.shape[1]], reward, mask, epochs)
    return {"success": reward.mean().item(), "loss": loss, "raw_steps": int(length.sum())}
