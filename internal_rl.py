"""Acting and reinforcement learning: on the codes z (internal RL) and, as its rival, on the raw actions.

Bottom-up:

  1. Player            the base model acting step by step in N worlds, its residual stream steered by any rule
  2. rules             fixed code, true subgoal, and the internal environment of Algorithms 1 and 2
  3. Policy            pi(z | e_1:t), a one-layer Hawk stepped only when the gate opens (D.3)
  4. update            the critic-free clipped update of C.5.2, one for both kinds of action
  5. episodes          collect a batch for internal RL (Algorithm 3) and for raw-action RL (C.5.3)
  6. measurements      success with true subgoals (C.3), code identity, code transplant (B.3.2), the gate at arrivals
  7. walker            PPO for the ant's expert, with the same clipped objective (C.1.1); does the base turn as he does?

Paper sections: C.1.1, C.3, C.5, D.3, B.3.2 (the idea behind code identity); Algorithms 1-3; Eq. 10; Table A13.

Glossary (name -> symbol -> shape; N episodes, M abstract actions, D width)
  e         e_t,l, which the rules steer               (n, D)
  reading   uncontrolled stream at layer `read`, seen by gate and policy  (n, D)
  e of a policy: the reading, at the moments at which a code is asked for  (N, M, D)
  z         the abstract action                        (N, M, n_z)
  logp      ln pi(z | e_1:t), summed over dimensions   (N, M)
  advantage A_tau = (R - mean R) / (std R + 1e-3)      (N,)
  opens     rows whose gate opened at this step: beta > 0.5  (m,) int64
  rng       a numpy Generator for layouts; torch randomness is the global generator, which train.py seeds anew at every update
  state     everything that must persist from step to step, one row per episode: a nested dict / list of tensors
"""
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from envs import (CELL, FRAME_SKIP, PHYSICS_STEP, Ants, ant_symmetries, by_cells, cell_centres, contents_table, distances, exact_bounds, expert_probs, feel,
                  pose_of, sample_layouts, simulate, symexp)
from model import Block, Hawk, action_nll, gaussian_logp, linear, sample_action

BETA_THRESHOLD = 0.5  # Algorithm 1 and C.6

# ------------------------------------------------------------------------------------------------ 1. player

def select(state, rows):
    """Keep the given rows of every tensor in a nested dict / list."""
    if isinstance(state, dict):
        return {name: select(value, rows) for name, value in state.items()}
    if isinstance(state, list):
        return [select(value, rows) for value in state]
    return state[rows]


def assign(state, rows, new):
    """Write `new` into the given rows of every tensor of `state`, in place."""
    for name, value in state.items():
        value[rows] = new[name]


class Player:
    """The base model acting in N worlds: an `act` for `envs.simulate`.

    `steer(e, reading, state, worlds, rows) -> e` changes the residual stream e (n, D) of the episodes `rows` (n,) before the upper blocks
    read it; reading (n, D) is the uncontrolled stream that metacontroller and policy look at (e itself, if base.read = base.layer).
    `state` is the rule's own memory; like the caches it follows the episodes when finished ones are dropped.
    All recurrent memory lives through the whole episode: nothing is reset at a switch (Algorithm 1).
    After the game, `logp` (N, T) holds ln p(a_t) of the actions taken.
    """

    def __init__(self, base, n, T, steer=None, state=None):
        self.base, self.steer, self.state = base, steer, state or {}
        self.device = base.norm.weight.device
        self.caches = base.init_cache(n, T, self.device)
        self.reading_caches = base.init_cache(n, T, self.device)[:base.read] if steer is not None and base.read > base.layer else []
        self.rows, self.t = np.arange(n), 0
        self.logp = torch.zeros(n, T, device=self.device)

    @torch.no_grad()
    def __call__(self, worlds, alive):
        # Finished episodes ride along until they are a third of the batch: copying the caches at every step would cost more.
        if len(alive) < len(self.rows) * 2 / 3:
            keep = torch.from_numpy(np.searchsorted(self.rows, alive)).to(self.device)
            self.caches, self.reading_caches = select(self.caches, keep), select(self.reading_caches, keep)
            self.state, self.rows = select(self.state, keep), alive
        obs = torch.from_numpy(worlds.obs()[self.rows]).to(self.device)  # (n, K)
        e = self.base.lower(obs[:, None], self.caches, self.t)  # (n, 1, D)
        if self.steer is not None:
            reading = self.base.reading(e, self.reading_caches, self.t)
            e = self.steer(e[:, 0], reading[:, 0], self.state, worlds, self.rows)[:, None]
        logits = self.base.action_logits(e, self.caches, self.t)  # (n, 1, A), or (n, 1, 2 A)
        action = sample_action(logits[:, 0], self.base.continuous)  # (n,), or (n, A)
        self.logp[self.rows, self.t] = -action_nll(logits, action[:, None])[:, 0]
        self.t += 1
        return action.cpu().numpy()[np.searchsorted(self.rows, alive)]


# ------------------------------------------------------------------------------------------------ 2. rules for steering

def steer_by_code(decoder):
    """Hold the code in state["z"] (n, n_z) for the whole episode."""
    return lambda e, reading, state, worlds, rows: decoder(e, state["z"])


def steer_by_subgoal(decoder):
    """C.3: the controller of the true subgoal, switched at the right moments. A finished episode gets controller 0: unused."""
    def steer(e, reading, state, worlds, rows):
        subgoal = torch.from_numpy(worlds.subgoal()[rows].clip(0)).to(e.device)
        return decoder(e, F.one_hot(subgoal, decoder.net[0].in_features).to(e.dtype))
    return steer


class InternalEnvironment:
    """Algorithms 1 and 2 for a batch: between two openings of the gate, base model and decoder play by themselves.

    `policy(e, memory) -> z, logp`, e being the reading, is asked only in the episodes whose gate is open; at the first step always. Everything it was
    asked is kept in `asked`: (episode, position in that episode, e, z, logp). `gates` keeps beta of every raw step. `state` is the first state; from
    then on the Player keeps it.
    """

    def __init__(self, meta, policy, memory, n, T, device):
        self.meta, self.policy = meta, policy
        self.state = {"h": torch.zeros(n, meta.n_h, device=device), "z": torch.zeros(n, meta.n_z, device=device), "memory": memory}
        self.count = torch.zeros(n, dtype=torch.long, device=device)  # abstract actions so far
        self.asked, self.t = [], 0
        self.gates = torch.zeros(n, T, device=device)
        self.codes = torch.zeros(n, T, meta.n_z, device=device)

    def __call__(self, e, reading, state, worlds, rows):
        beta, state["h"] = self.meta.switch_step(reading, state["h"], state["z"])
        if self.t == 0:
            beta = torch.ones_like(beta)  # the policy always acts first
        self.gates[rows, self.t] = beta
        playing = torch.from_numpy(~worlds.done[rows]).to(e.device)
        opens = ((beta > BETA_THRESHOLD) & playing).nonzero()[:, 0]  # (m,) rows whose gate is open
        if len(opens):
            memory = select(state["memory"], opens)
            z, logp = self.policy(reading[opens], memory)
            assign(state["memory"], opens, memory)
            state["z"] = state["z"].index_copy(0, opens, z)
            episode = torch.from_numpy(rows).to(e.device)[opens]
            self.asked.append((episode, self.count[episode], reading[opens], z, logp))
            self.count[episode] += 1
        self.codes[rows, self.t] = state["z"]
        self.t += 1
        return self.meta.decoder(e, state["z"])

    def sequences(self):
        """What was asked, as padded sequences: e (N, M, D), z (N, M, n_z), logp (N, M), mask (N, M)."""
        episode, position, e, z, logp = (torch.cat(column) for column in zip(*self.asked))
        N, M = len(self.count), self.count.max()
        def padded(x):
            out = x.new_zeros(N, M, *x.shape[1:])
            out[episode, position] = x
            return out
        mask = torch.arange(M, device=e.device) < self.count[:, None]
        return padded(e), padded(z), padded(logp), mask


# ------------------------------------------------------------------------------------------------ 3. policy (D.3)

class Policy(nn.Module):
    """pi(z | e_1:t): one Hawk layer of width 256 (Table A13) over the residual streams at which the gate opened.

    NOT in paper: the mean starts at 0 and the standard deviation, one learned vector and not a function of e, at 1: the first policy is the
    prior N(0, I).
    """

    def __init__(self, width, n_z, inner=256, heads=8):
        super().__init__()
        self.norm_in = nn.LayerNorm(width, elementwise_affine=False)  # as in the metacontroller: e has no natural scale
        self.inp, self.block, self.norm = linear(width, inner, 1.), Block(Hawk(inner, heads), inner, 2 * inner), nn.LayerNorm(inner)
        self.mean = linear(inner, n_z)
        nn.init.zeros_(self.mean.weight)
        self.log_std = nn.Parameter(torch.zeros(n_z))

    def forward(self, e, memory=None):
        """e (N, M, D) -> mean (N, M, n_z). With a memory (from `init_memory`): continues from it and updates it."""
        return self.mean(self.norm(self.block(self.inp(self.norm_in(e)), cache=memory)))

    def init_memory(self, n):
        return self.block.mixer.init_cache(n, 0, self.mean.weight)

    def sampler(self):
        """`policy` for InternalEnvironment: e (m, D), memory -> z (m, n_z), logp (m,)."""
        def ask(e, memory):
            mu = self(e[:, None], memory)[:, 0]
            z = mu + self.log_std.exp() * torch.randn(mu.shape, device=mu.device)
            return z, gaussian_logp(z, mu, self.log_std)
        return ask


def prior_sampler(n_z):
    """Codes from N(0, I): the exploration that internal RL starts from."""
    def ask(e, memory):
        z = torch.randn(len(e), n_z, device=e.device)
        return z, gaussian_logp(z, torch.zeros_like(z), torch.zeros_like(z))
    return ask


# ------------------------------------------------------------------------------------------------ 4. update (C.5.2)

def relative_advantage(reward):
    """A_tau over the whole batch, no critic, no groups: reward (N,) -> (N,)."""
    return (reward - reward.mean()) / (reward.std(unbiased=False) + 1e-3)


def clipped_loss(logp, old_logp, advantage, mask, clip):
    """Eq. 10, negated: logp, old_logp, mask (N, M), advantage (N,). One ratio per action, not per dimension of z.

    The sum over an episode's actions is kept; the mean is over episodes.
    """
    ratio = (logp - old_logp).exp()  # (N, M)
    A = advantage[:, None]
    gain = torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A)
    return -(gain * mask).sum(1).mean()


def update(parameters, optimizer, logp_of, old_logp, reward, mask, clip=.2, epochs=1):
    """`epochs` clipped steps on one batch. `logp_of()` recomputes logp (N, M) under the current parameters.

    Returns the last loss. NOT in paper: the gradient's norm is cut at 1; and if all rewards are equal, so that every advantage is 0,
    the step is skipped: Adam's momentum would move the policy on no evidence. Raises FloatingPointError on a non-finite loss.
    """
    advantage = relative_advantage(reward)
    if reward.std() == 0:
        return 0.
    for _ in range(epochs):
        loss = clipped_loss(logp_of(), old_logp, advantage, mask, clip)
        if not torch.isfinite(loss):
            raise FloatingPointError("the RL loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.)
        optimizer.step()
    return loss.item()


# ------------------------------------------------------------------------------------------------ 5. episodes

def play(base, world, tasks, rng, steer=None, state=None, layouts=None):
    """Play one episode per entry of `tasks` with the base model. Returns Trajectories, success (N,) bool, the Player."""
    things, agent = layouts or sample_layouts(world, rng, len(tasks))
    player = Player(base, len(tasks), world.T, steer, state)
    return *simulate(world, tasks, things, agent, player, rng), player


def internal_episodes(base, meta, world, rng, n, policy=None):
    """Algorithm 3's inner loop: n episodes of the post-training task with codes from `policy` (None: from the prior).

    Returns Trajectories, success (n,) bool, the InternalEnvironment.
    """
    device = base.norm.weight.device
    ask = prior_sampler(meta.n_z) if policy is None else policy.sampler()
    env = InternalEnvironment(meta, ask, {} if policy is None else policy.init_memory(n), n, world.T, device)
    with torch.no_grad():
        data, success, _ = play(base, world, [world.post_task] * n, rng, env, env.state)
    return data, success, env


def sequence_logp(policy, e, z, count, portions=8):
    """ln pi(z | e_1:t) of whole sequences: e (N, M, D), z (N, M, n_z), count (N,) actions that exist -> (N, M), 0 beyond the longest of its portion.

    Equal to gaussian_logp(z, policy(e), policy.log_std) where actions exist. In portions of similar length, since one restless gate makes M
    ten times the average.
    """
    order = count.argsort(stable=True)
    logp = []
    for rows in order.split(math.ceil(len(order) / portions)):
        M = int(count[rows].max())
        part = gaussian_logp(z[rows, :M], policy(e[rows, :M]), policy.log_std)  # (rows, M)
        logp.append(F.pad(part, (0, e.shape[1] - M)))
    return torch.cat(logp)[order.argsort()]  # back in the order of the episodes


def internal_rl_step(base, meta, policy, optimizer, world, rng, n, epochs, clip):
    """One update of Algorithm 3 on n fresh episodes. Returns a dict of what happened."""
    data, success, env = internal_episodes(base, meta, world, rng, n, policy)
    e, z, old_logp, mask = env.sequences()
    reward = torch.from_numpy(success).to(e)
    loss = update(list(policy.parameters()), optimizer, lambda: sequence_logp(policy, e, z, env.count), old_logp, reward, mask, clip, epochs)
    return {"success": success.mean().item(), "loss": loss, "raw_steps": int(data.length.sum()),
            "abstract_actions": env.count.float().mean().item(), "std": policy.log_std.exp().mean().item()}


def raw_rl_step(base, optimizer, world, rng, n, epochs, clip):
    """The rival (C.5.3): the same update on the base model's own action probabilities, all of its weights trained."""
    data, success, player = play(base, world, [world.post_task] * n, rng)
    device = player.device
    obs, action = torch.from_numpy(data.obs()[:, :-1]).to(device), torch.from_numpy(data.action).to(device)
    mask, reward = torch.from_numpy(data.mask()).to(device), torch.from_numpy(success).float().to(device)

    logp_of = lambda: -action_nll(base.action_logits(base.lower(obs)), action)  # (N, T)
    loss = update(list(base.parameters()), optimizer, logp_of, player.logp[:, :action.shape[1]], reward, mask, clip, epochs)
    return {"success": success.mean().item(), "loss": loss, "raw_steps": int(data.length.sum())}


# ------------------------------------------------------------------------------------------------ 6. measurements

def control_success(base, decoder, world, rng, n):
    """Share of n episodes of the post-training task solved with true-subgoal controllers (C.3)."""
    _, success, _ = play(base, world, [world.post_task] * n, rng, steer_by_subgoal(decoder))
    return success.mean().item()


def first_colour(world, data):
    """(N,): the colour that each episode of a one-colour task ended on, -1 for none."""
    match = data.things[:, :world.O] == data.agent[np.arange(len(data.length)), data.length][:, None]  # (N, O)
    return np.where(match.any(1), match.argmax(1), -1)


def code_identity(base, decoder, world, rng, codes=256, layouts=64, n_z=8):
    """Mutual information, in nats, between a prior code and the subgoal that it leads to; and ln S, which S equally
    frequent subgoals would give if each code always led to the same one.

    Each code is held fixed, gate shut, in the same `layouts` worlds, none of which it was made for. Outcome: the subgoal
    that begins with the first colour visited, or "none". If codes name subgoals, a code leads to one subgoal whatever the layout; if they
    name places, the outcome depends on the layout and the information is near 0. Plug-in estimates from few samples are too high
    by about (filled cells - rows - columns + 1) / 2N (Miller-Madow), which is subtracted.
    """
    device = base.norm.weight.device
    starts = {subgoal[0]: i for i, subgoal in enumerate(world.subgoals)}
    places = sample_layouts(world, rng, layouts)
    # Any wrong colour ends an episode, so a one-colour task is over at the first colour visited, right or wrong.
    task, outcome = world.subgoals[0][:1], []
    for z in torch.randn(codes, n_z, device=device).split(32):  # in portions, to bound the caches' memory
        things, agent = (np.tile(x, (len(z), *[1] * (x.ndim - 1))) for x in places)
        n = len(agent)
        state = {"z": z.repeat_interleave(layouts, dim=0)}  # (portion * layouts, n_z)
        data, _, _ = play(base, world, [task] * n, rng, steer_by_code(decoder), state, (things, agent))
        outcome += [starts.get(c, len(starts)) for c in first_colour(world, data)]
    outcome, n = np.array(outcome).reshape(codes, layouts), codes * layouts
    table = np.stack([(outcome == g).sum(1) for g in range(len(starts) + 1)], axis=1)  # (codes, S + 1) counts
    table = table[:, table.sum(0) > 0]
    joint = table / n
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    information = (joint * np.log(np.where(joint > 0, joint / expected, 1))).sum()
    bias = ((table > 0).sum() - table.shape[0] - table.shape[1] + 1) / (2 * n)
    return float(information - bias), math.log(len(starts))


def transplant(base, meta, world, rng, n, at):
    """Code transplant (B.3.2): do codes that led to a colour lead to it elsewhere, when they are put in after `at` steps?

    Donors: n episodes under a code from the prior each, held from the start; those that reach a colour give their code to it. Recipients: n other worlds in which the
    base model plays by itself, and goes on under a donor's code of a random colour from step `at` on. Returns the share that visits this
    colour first, with the code and without, among the recipients still playing at step `at` (without: the same worlds, another sample of actions).
    """
    device = base.norm.weight.device
    z = torch.randn(n, meta.n_z, device=device)
    data, _, _ = play(base, world, [world.subgoals[0][:1]] * n, rng, steer_by_code(meta.decoder), {"z": z})
    colour = first_colour(world, data)
    giving = np.intersect1d(colour, [subgoal[0] for subgoal in world.subgoals])  # the colours that begin a subgoal and were reached
    if not len(giving):
        return 0., 0.  # no code leads anywhere
    wanted = rng.choice(giving, n)
    donor = torch.tensor([rng.choice(np.flatnonzero(colour == c)) for c in wanted], device=device)
    layouts, rates = sample_layouts(world, rng, n), []
    for with_code in (True, False):
        def steer(e, reading, state, worlds, rows):
            if not with_code:
                return e
            return torch.where(torch.from_numpy(worlds.steps[rows] >= at).to(device)[:, None], meta.decoder(e, state["z"]), e)
        data, success, _ = play(base, world, [(c,) for c in wanted.tolist()], rng, steer, {"z": z[donor]}, layouts)
        playing = data.length > at
        rates.append(float(success[playing].mean()) if playing.any() else 0.)
    return tuple(rates)


def opened_at_arrivals(world, data, gates):
    """Did the gate open where a subgoal was reached? Two arrays of bool, one entry for each such arrival: straight from another colour's cell, and from an empty one.

    NOT in paper. The first are the hard ones: what stood on a colour a step ago stands on a colour now, so that not even "now on a colour, before on none" betrays
    the change. F1 on demonstrations cannot show it if the transitions of the post-training task are in none. data: Trajectories of N episodes; gates (N, T), beta.
    """
    n, t = np.nonzero(data.switches())
    on_colour = (data.things[n, :world.O] == data.agent[n, t - 1, None]).any(1)  # one step before the arrival
    opened = gates.cpu().numpy()[n, t] > BETA_THRESHOLD
    return opened[on_colour], opened[~on_colour]


# ------------------------------------------------------------------------------------------------ 7. walker (C.1.1)
# NOT in paper, whose expert is one agent that sees the whole board, a hint on the shortest path in every cell included. What such an agent needs to know is
# the hint of the cell that it is in. So what is learned here is to walk along a heading, and `envs.ant_expert` reads it off the board.

SPEED = 1.5  # m/s along the heading; more earns nothing
STD = .2  # least standard deviation of a torque, as a share of the largest


class Walker(nn.Module):
    """Actor and critic: what an ant feels (n, 29), see `envs.feel` -> torques (n, 8), value (n,).

    NOT in paper: an ant has four equal legs, its right is as its left, and its walker treats them alike. A plain network is asked about the ant in all its 8 symmetries
    (envs.ant_symmetries), and the answers, put back, are averaged. PPO so learns from eight ants at once, and a demonstration that is turned or reflected is a
    demonstration, too, which metacontroller.image_of needs: otherwise codes name directions in the ant's own frame, or "left" and "right".
    """

    def __init__(self, hidden=64):
        super().__init__()
        net = lambda outputs: nn.Sequential(linear(29, hidden, 1.), nn.Tanh(), linear(hidden, hidden, 1.), nn.Tanh(), linear(hidden, outputs, .01))
        self.torques, self.value = net(8), net(1)
        self.log_stds = nn.Parameter(torch.full((2,), math.log(.5)))  # of every hip and every ankle
        for name, matrices in zip(("felt_seen", "torques_seen"), ant_symmetries()):
            self.register_buffer(name, torch.from_numpy(matrices), persistent=False)

    @property
    def log_std(self):
        """(8,). NOT in paper: at least STD, so that a demonstration says more about where the ant is heading than about how it moves its legs."""
        return self.log_stds.clamp(min=math.log(STD)).repeat(4)

    def actor(self, felt):
        """felt (n, 29) -> mean torques (n, 8)."""
        answers = self.torques(torch.einsum("ni,kij->knj", felt, self.felt_seen))  # (8, n, 29) -> (8, n, 8), one for each symmetry
        return torch.einsum("kni,kji->nj", answers, self.torques_seen) / 8  # the inverse of each is its transpose

    def critic(self, felt):
        """felt (n, 29) -> value (n,)."""
        return self.value(torch.einsum("ni,kij->knj", felt, self.felt_seen))[..., 0].mean(0)  # (8, n, 29) -> (8, n, 1) -> (n,)

    def walk(self, noise):
        """`walk` for `envs.ant_expert`, in NumPy: a ~ N(mean, (noise * std)^2); noise = 0 walks cleanly (C.4.4)."""
        @torch.no_grad()
        def walk(felt):
            mean = self.actor(torch.from_numpy(felt))
            return (mean + noise * self.log_std.exp() * torch.randn_like(mean)).clamp(-1, 1).numpy()  # what the motors can do
        return walk


def walk_reward(ants, felt, heading, before, action):
    """Reward of one step (N,), which ants (N,) cannot go on, and their speed along the heading (N,), m/s.

    felt (N, 29): what they feel after it; before (N, 2): where they were; action (N, 8).
    Speed along the heading up to SPEED, less half the speed across it, less the effort; an ant that falls, jumps or tips over pays 5.
    """
    velocity = (ants.qpos[:, :2] - before) / (FRAME_SKIP * PHYSICS_STEP)
    along = (velocity * heading).sum(1)
    across = np.abs(velocity[:, 0] * heading[:, 1] - velocity[:, 1] * heading[:, 0])
    over = ants.fallen() | (felt[:, 3] < .2)  # cosine of the torso's tilt
    return np.minimum(along, SPEED) - .5 * np.minimum(across, SPEED) - .02 * (action ** 2).sum(1) - 5. * over, over, along


def gae(outcome, value, cut, gamma, lam):
    """Generalised advantage estimation: each (steps, n) -> advantages (steps, n).

    outcome: reward + gamma * value of where the step led; value: of where it began; cut: what comes after it belongs to something else.
    """
    advantage, A = torch.zeros_like(value), torch.zeros_like(value[0])
    for t in reversed(range(len(value))):
        A = advantage[t] = outcome[t] - value[t] + gamma * lam * A * ~cut[t]
    return advantage


def walker_step(walker, optimizer, rng, n=64, steps=128, epochs=4, minibatches=8, gamma=.99, lam=.95):
    """One iteration of PPO: n ants, put down anew, walk `steps` steps along headings that turn at random. Returns a dict of what happened.

    Raises FloatingPointError on a non-finite loss.
    """
    ants, rows = Ants(n), np.arange(n)
    compass = lambda m: np.stack([np.cos(angle := rng.uniform(-np.pi, np.pi, m)), np.sin(angle)], axis=1)
    ants.place(rng, rows, np.zeros((n, 2)))
    heading, record, speed = compass(n), [], []
    with torch.no_grad():
        for _ in range(steps):
            felt, before = torch.from_numpy(ants.felt(heading)), ants.qpos[:, :2].copy()
            mean = walker.actor(felt)
            action = mean + walker.log_std.exp() * torch.randn_like(mean)
            ants.step(rows, action.numpy())
            then = ants.felt(heading)
            reward, over, along = walk_reward(ants, then, heading, before, action.numpy())
            speed.append(along.mean())
            after = walker.critic(torch.from_numpy(then))  # before the heading turns or anyone is put elsewhere
            over, reward = torch.from_numpy(over), torch.from_numpy(reward).float()
            turns = over.numpy() | (rng.random(n) < .02)  # a new heading, every 50 steps or so
            # One-step advantage; where the heading turns, what follows belongs to another walk, and the sum over the future stops.
            record.append((felt, action, gaussian_logp(action, mean, walker.log_std), walker.critic(felt),
                           reward + gamma * after * ~over, torch.from_numpy(turns)))
            if over.any():
                ants.place(rng, rows[over.numpy()], np.zeros((int(over.sum()), 2)))
            heading[turns] = compass(turns.sum())
        felt, action, logp, value, outcome, turns = (torch.stack(column) for column in zip(*record))  # each (steps, n, ...)
        advantage = gae(outcome, value, turns, gamma, lam)
        target = (value + advantage).flatten()
        felt, action, logp = (x.flatten(0, 1) for x in (felt, action, logp))
        advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).flatten()
    for _ in range(epochs):
        for part in torch.randperm(n * steps).chunk(minibatches):
            new = gaussian_logp(action[part], walker.actor(felt[part]), walker.log_std)
            # Every step counts by itself: sequences of one action.
            loss = clipped_loss(new[:, None], logp[part, None], advantage[part], torch.ones(len(part), 1), .2)
            loss = loss + .5 * F.mse_loss(walker.critic(felt[part]), target[part])
            if not torch.isfinite(loss):
                raise FloatingPointError("the PPO loss is not finite")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(walker.parameters(), .5)
            optimizer.step()
    return {"speed": float(np.mean(speed)), "std": walker.log_std.exp().mean().item()}


def right_turns(walker, world, data, action):
    """Where the ant of a demonstration enters a cell, does the base know which way it will leave? A dict of shares of the moves that are guessed right.

    NOT in paper. The ant's action NLL is mostly about moving legs; this is the part of it that is about goals, and it has a bound (see envs.exact_bounds).
    data: Trajectories of N ants; action (N, T, 8): the base's mean torques. Its guess, right_turns, is the way along which `walker` would use torques nearest
    to these. right_turns_bayes: the likeliest way for one who knows experts and tasks and remembers the episode, but is not told the goal (a perfect base comes
    about .02 short of it, as its mean mixes the ways); right_turns_blind: for one who only sees the board. Episodes with a move that no expert of the grid would
    make (mostly a drift into the next cell: 4 in 100) are left out. Raises ValueError if none is left.
    """
    cells, when = by_cells(world, data)
    grid = world.on_grid
    colours = np.broadcast_to(np.arange(world.O), (*cells.action.shape, world.O))
    probs = expert_probs(grid, contents_table(world, cells.things), distances(grid, cells.things), cells.agent[:, :-1], colours)  # (N, M, O, 4)
    target = np.take_along_axis(probs, cells.target[..., None, None], axis=2)[:, :, 0]  # (N, M, 4)
    kept = (np.take_along_axis(target, cells.action[..., None].clip(0), axis=2)[..., 0] > 0) & (cells.action >= 0) | ~cells.mask()
    rows = np.flatnonzero(kept.all(axis=1))
    if not len(rows):
        raise ValueError("no episode among the ant's demonstrations keeps to shortest paths")
    cells, when, probs = cells[rows], when[rows], probs[rows]
    _, _, belief = exact_bounds(grid, cells)  # (N', M, S)
    optimal = np.einsum("nms,nmsa->nma", belief, probs[:, :, [subgoal[0] for subgoal in world.subgoals]]).argmax(-1)
    n, m = np.nonzero(cells.mask())
    t = when[n, m]
    obs = data.sensed[rows[n], t]
    qpos, qvel, centre = pose_of(world, obs), symexp(obs[:, 13:27]), cell_centres(world.G)[cells.agent[n, m]]
    away = []
    for way in ((0, 1), (1, 0), (0, -1), (-1, 0)):  # up, right, down, left
        ahead = centre + CELL * np.array(way) - qpos[:, :2]
        torques = walker.walk(0.)(feel(qpos, qvel, ahead / np.linalg.norm(ahead, axis=1, keepdims=True)))
        away.append((((action[rows[n], t] - torques) / walker.log_std.exp().numpy()) ** 2).sum(-1))
    guesses = {"right_turns": np.argmin(away, axis=0), "right_turns_bayes": optimal[n, m], "right_turns_blind": probs.sum(2).argmax(-1)[n, m]}
    return {name: float((guess == cells.action[n, m]).mean()) for name, guess in guesses.items()}
