"""What is measured about a trained model. Nothing here trains a model; train.py prints and logs it.
As a program, `python analysis.py WHAT`, it runs the paper's analyses: experiments.py.

  1. the gate         scores against true switches, what the KL pays, openings at arrivals; and
                      success by leg and by subgoals
  2. true subgoals    controllers of the TRUE subgoals (C.3): their loss and their success
  3. codes            where a code leads: code identity, code transplant (B.3.2); what it may be
                      exchanged for

Paper sections: C.3, C.6 (switches counted at beta > .5), B.3.2; Fig. 6.
Glossary: as in envs.py (worlds), metacontroller.py (beta, z) and internal_rl.py (steer).
All but C.3, B.3.2 and the count of switches is ours.
"""
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from envs import sample_layouts
from internal_rl import InternalEnvironment, ask_prior, play
from metacontroller import BETA_THRESHOLD
from model import action_nll, masked_mean

# -------------------------------------------------------------------------------------- 1. the gate

def gate_scores(beta, true, mask):
    """How well the gate finds the subgoal changes. beta (B, T) in [0, 1]; true, mask (B, T) bool,
    `true` as Trajectories.switches. A dict of numbers.

    A switch is beta > 0.5 at t > 0. precision, recall, f1 ask for the same step; f1_1 and f1_5
    count a switch and a true switch as matching if they are at most one, or five, steps apart.
    undecided: share of gates in (.1, .9).
    """
    mask = mask.clone()
    mask[:, 0] = False
    found, true = (beta > BETA_THRESHOLD) & mask, true & mask

    def near(x, k):  # (B, T): at most k steps from a switch
        return F.max_pool1d(x[:, None].float(), 2 * k + 1, stride=1, padding=k)[:, 0] > 0

    def share(hits, of):
        return (hits.sum() / of.sum().clamp(min=1)).item()

    def f1(precision, recall):
        return 2 * precision * recall / max(precision + recall, 1e-9)

    precision, recall = share(found & true, found), share(found & true, true)
    scores = {"switches": found.sum().item() / len(mask),
              "true_switches": true.sum().item() / len(mask),
              "precision": precision, "recall": recall, "f1": f1(precision, recall)}
    for k in (1, 5):
        matched = share(found & near(true, k), found), share(true & near(found, k), true)
        scores[f"f1_{k}"] = f1(*matched)
    scores["undecided"] = share((beta > .1) & (beta < .9) & mask, mask)
    return scores


def kl_by_gate(kl_steps, beta, mask):
    """KL per step, nats, where the gate is open and where it is shut: kl_steps, beta, mask (B, T).
    NOT in paper. Like gate_scores without t = 0, where the gate is open by construction. How it
    bears on sparse gates: metacontroller.discovery_terms."""
    mask = mask.clone()
    mask[:, 0] = False
    opens = (beta > BETA_THRESHOLD) & mask
    shut = (beta <= BETA_THRESHOLD) & mask
    return {"kl_open": (kl_steps * opens).sum().item() / max(opens.sum().item(), 1),
            "kl_shut": (kl_steps * shut).sum().item() / max(shut.sum().item(), 1)}


def opened_by_subgoals(data, gates):
    """Does the gate open where a subgoal is finished, and where only a colour inside one is
    reached? On subgoals of several colours this tells a gate that knows them from one that opens
    on colours. NOT in paper: the number; Fig. 6 shows it.

    data: Trajectories of N episodes; gates (N, T), beta. Returns a dict of shares of arrivals, None
    without any: opens_subgoal_end, opens_inside.
    """
    arrivals = np.zeros(gates.shape, bool)  # (N, T): a colour of the task was reached just before
    arrivals[:, 1:] = data.progress[:, 1:] > data.progress[:, :-1]
    arrivals &= data.mask()
    opens, ends = gates.cpu().numpy() > BETA_THRESHOLD, data.switches()
    share = lambda where: float(opens[where].mean()) if where.any() else None
    return {"opens_subgoal_end": share(ends), "opens_inside": share(arrivals & ~ends)}


def success_by_leg(world, data, success):
    """For each colour of the post-training task, the share of the episodes that reach it among
    those that reached the one before: a list. None where nobody came so far. NOT in paper. A colour
    that is reached in the horizon's very last step counts only if it is the task's last.

    data: Trajectories of N episodes of that task; success (N,) bool.
    """
    n = np.arange(len(success))
    reached = data.progress[n, data.length - 1] + success  # (N,): how many colours, in order
    counts = [(reached >= k).sum() for k in range(len(world.post_task) + 1)]
    return [float(b / a) if a else None for a, b in itertools.pairwise(counts)]


def success_by_subgoals(world, data, success):
    """The share of the episodes that finish the first 1, 2, .. subgoals of the post-training task:
    a list. NOT in paper. Arguments as success_by_leg."""
    reached = np.cumprod([leg or 0. for leg in success_by_leg(world, data, success)])  # (colours,)
    segments = [segment for _, segment in world.subgoal_of(world.post_task)]
    last = [k for k, segment in enumerate(segments) if segment not in segments[k + 1:]]
    return reached[last].tolist()


def opened_at_arrivals(world, data, gates):
    """Did the gate open where a subgoal was reached? Two arrays of bool, an entry for each such
    arrival: straight from another colour's cell, and from an empty one. NOT in paper.

    The first are the hard ones: what stood on a colour a step ago stands on a colour now. F1 on
    demonstrations cannot show it if the transitions of the post-training task are in none.
    data: Trajectories of N episodes; gates (N, T), beta.
    """
    n, t = np.nonzero(data.switches())
    before = data.agent[n, t - 1, None]  # (arrivals, 1) the cell one step earlier
    on_colour = (data.things[n, :world.O] == before).any(1)
    opened = gates.cpu().numpy()[n, t] > BETA_THRESHOLD
    return opened[on_colour], opened[~on_colour]


# --------------------------------------------------------------------------- 2. true subgoals (C.3)

def control_loss(base, decoder, obs, action, subgoal, mask):
    """C.3: action NLL (nats per step) when z_t is the one-hot of the true subgoal and the gate is
    always open.

    obs (B, T, K), action, subgoal, mask (B, T). The base is frozen.
    """
    with torch.no_grad():
        e = base.lower(obs)
    z = F.one_hot(subgoal, decoder.n_z).to(e.dtype)  # (B, T, subgoals)
    return masked_mean(action_nll(base.action_logits(decoder(e, z)), action), mask)


def steer_by_subgoal(decoder, codes):
    """A `steer`: the code of the true subgoal, of codes (S, n_z), switched at the right moments. A
    finished episode gets code 0, unused."""
    def steer(e, state, worlds, rows):
        subgoal = torch.from_numpy(worlds.subgoal()[rows].clip(0)).to(e.device)
        return decoder(e, codes[subgoal])
    return steer


def control_success(base, decoder, codes, world, rng, n):
    """Share of n episodes of the post-training task solved with the true subgoals' codes (S, n_z),
    and success_by_leg. C.3: one-hot codes."""
    steer = steer_by_subgoal(decoder, codes)
    data, success, _ = play(base, world, [world.post_task] * n, rng, steer)
    return success.mean().item(), success_by_leg(world, data, success)


# ----------------------------------------------------------------------------------------- 3. codes

def steer_by_code(decoder):
    """A `steer`: hold the code in state["z"] (n, n_z) for the whole episode."""
    return lambda e, state, worlds, rows: decoder(e, state["z"])


def first_colour(world, data):
    """(N,): the colour that each episode of a one-colour task ended on, -1 for none."""
    end = data.agent[np.arange(len(data.length)), data.length]  # (N,)
    match = data.things[:, :world.O] == end[:, None]  # (N, O)
    return np.where(match.any(1), match.argmax(1), -1)


def code_outcomes(base, decoder, world, rng, codes=256, layouts=64):
    """Where do codes from the prior lead? Each is held fixed, gate shut, in the same `layouts`
    worlds, none of which it was made for.

    Returns the codes (codes, n_z) and outcome (codes, layouts), int: the subgoal that begins with
    the first colour visited, or S, their number, for "none": no colour, or one that begins no
    subgoal.
    """
    device = base.norm.weight.device
    starts = {subgoal[0]: i for i, subgoal in enumerate(world.subgoals)}
    layout = sample_layouts(world, rng, layouts)
    # Any wrong colour ends an episode, so a one-colour task is over at the first colour visited.
    task = world.subgoals[0][:1]
    drawn, outcome = torch.randn(codes, decoder.n_z, device=device), []
    for z in drawn.split(32):  # bounds the caches' memory
        things, agent = (np.tile(x, (len(z), *[1] * (x.ndim - 1))) for x in layout)
        state = {"z": z.repeat_interleave(layouts, dim=0)}  # (portion * layouts, n_z)
        data, _, _ = play(base, world, [task] * len(agent), rng, steer_by_code(decoder), state,
                          (things, agent))
        outcome += [starts.get(colour, len(starts)) for colour in first_colour(world, data)]
    return drawn, np.array(outcome).reshape(codes, layouts)  # (codes * layouts,) before


def outcome_counts(outcome, subgoals):
    """How often each code led where: outcome as from `code_outcomes`, subgoals: S -> (codes, S+1),
    the S subgoals, then "none"."""
    return np.stack([(outcome == g).sum(1) for g in range(subgoals + 1)], axis=1)


def code_identity(outcome, subgoals):
    """Does a code name a subgoal? Mutual information between a prior code and where it leads.

    outcome: as from `code_outcomes`; subgoals: S. If codes name subgoals, a code leads to one
    subgoal whatever the layout; if they name places, the outcome depends on the layout and the
    information is near 0. Returns a dict: code_identity (nats); code_identity_max = ln S, what S
    equally frequent subgoals would give if each code always led to the same one; code_none, the
    share of "none"; code_outcomes, the entropy of outcomes, "none" among them, which the
    information cannot exceed.

    Plug-in estimates from few samples are too high by about (filled cells - rows - columns + 1) /
    2N (Miller-Madow), which is subtracted.
    """
    table = outcome_counts(outcome, subgoals)
    none = table[:, -1].sum() / table.sum()
    table = table[:, table.sum(0) > 0]
    joint = table / table.sum()
    marginal = joint.sum(0, keepdims=True)  # (1, outcomes)
    expected = joint.sum(1, keepdims=True) * marginal
    information = (joint * np.log(np.where(joint > 0, joint / expected, 1))).sum()
    bias = ((table > 0).sum() - table.shape[0] - table.shape[1] + 1) / (2 * table.sum())
    return {"code_identity": float(information - bias), "code_identity_max": math.log(subgoals),
            "code_none": float(none), "code_outcomes": float(-(marginal * np.log(marginal)).sum())}


def donated_codes(base, meta, world, rng, n):
    """Codes that led to a colour (B.3.2): {colour that begins a subgoal: codes (m, n_z)}. In n
    episodes z is drawn from the prior at each opening of the gate; the code that is active at the
    visit of the first colour is one for it."""
    env = InternalEnvironment(meta, ask_prior, {}, n, world.T, rng, base.norm.weight.device)
    # Any wrong colour ends an episode, so a one-colour task is over at the first colour visited.
    task = world.subgoals[0][:1]
    data, _, _ = play(base, world, [task] * n, rng, env, env.state)
    colour = first_colour(world, data)  # (n,)
    codes = env.codes[np.arange(n), data.length - 1]  # (n, n_z)
    starts = [subgoal[0] for subgoal in world.subgoals]
    return {c: codes[colour == c] for c in starts if (colour == c).any()}


def transplant(base, meta, world, rng, n):
    """Code transplant (B.3.2): do codes that led to a colour lead to it elsewhere?

    In n other worlds the base model plays by itself and goes on under a donated code,
        transplant: for a random colour, from step .06 T on (30 of the ant's 500, as in the paper);
        unseen: for the second subgoal, when the first is finished, which no demonstration shows.
    Returns a dict: for both, *_with and *_without, the share that visits the code's colour next,
    with the code and in the same worlds without (other actions are sampled); *_with_n and
    *_without_n, among how many: those still playing then. Without donors a key is absent.
    """
    device = base.norm.weight.device
    given = donated_codes(base, meta, world, rng, n)
    at, first, second = round(.06 * world.T), len(world.subgoals[0]), world.subgoals[1][0]

    def compared(key, tasks, late, playing):
        """tasks (N,): their last colour is the code's; late(worlds), playing(data): (N,) bool, is
        the code steering now, and was it ever to."""
        drawn = [given[task[-1]] for task in tasks]  # each (m, n_z)
        codes = torch.stack([own[rng.integers(len(own))] for own in drawn])  # (N, n_z)
        layouts = sample_layouts(world, rng, n)

        def put_in(e, state, worlds, rows):
            now = torch.from_numpy(late(worlds)[rows]).to(device)[:, None]  # (rows, 1)
            return torch.where(now, meta.decoder(e, state["z"]), e)

        rates = {}
        for name, steer in (("with", put_in), ("without", lambda e, *rest: e)):
            data, success, _ = play(base, world, tasks, rng, steer, {"z": codes}, layouts)
            among = playing(data)
            rates[f"{key}_{name}"] = float(success[among].mean()) if among.any() else None
            rates[f"{key}_{name}_n"] = int(among.sum())
        return rates

    rates = {}
    if given:
        tasks = [(c,) for c in rng.choice(list(given), n).tolist()]
        rates |= compared("transplant", tasks, lambda worlds: worlds.steps >= at,
                          lambda data: data.length > at)
    if second in given:
        tasks = [(*world.subgoals[0], second)] * n
        rates |= compared("unseen", tasks, lambda worlds: worlds.progress >= first,
                          lambda data: (data.progress * data.mask()).max(1) >= first)
    return rates


def way_to_target(world, data):
    """(N, T): how many rows and columns lie between the agent and the colour that it heads for, in
    either order, as one number: what of the way is the same however the board is turned. data:
    Trajectories on the grid."""
    target = np.take_along_axis(data.things, data.target, 1)  # (N, T) cells
    here = data.agent[:, :-1]  # (N, T)
    rows, columns = (abs(x - y) for x, y in zip(divmod(target, world.G), divmod(here, world.G)))
    return np.maximum(rows, columns) * world.G + np.minimum(rows, columns)


@torch.no_grad()
def exchanged_nll(base, decoder, batch, z, like, rng):
    """What does a code act as? What it may be exchanged for. NOT in paper. Action NLL, nats per
    step, when each step is steered by the code of another one that is like it: drawn, with
    replacement, from the steps of all episodes with the same label.

    batch: obs (B, T+1, K), action, mask (B, T); z (B, T, n_z); like (B, T), whole numbers. Codes
    that name subgoals and nothing else may be exchanged for any of the same subgoal.
    """
    mask = batch["mask"].cpu().numpy()
    labels = like[mask]  # (steps,), as below
    drawn = np.empty(len(labels), int)
    for label in np.unique(labels):
        alike = np.flatnonzero(labels == label)
        drawn[alike] = rng.choice(alike, len(alike))
    given = z.clone()
    given[batch["mask"]] = z[batch["mask"]][torch.from_numpy(drawn).to(z.device)]
    e = decoder(base.lower(batch["obs"][:, :-1]), given)
    nll = action_nll(base.action_logits(e), batch["action"])
    return masked_mean(nll, batch["mask"]).item()


if __name__ == "__main__":  # the experiments need train.py, which needs this file
    import sys

    from experiments import main
    sys.exit(main())
