"""Train everything: `python train.py --stage rl` runs the whole path of the paper.

    expert   -> walker.pt    the ant's expert (C.1.1); the grid's needs no training
    pretrain -> base.pt      stage 1 (C.1.2): predict experts' actions
    control  -> control.pt   C.3: controllers of the TRUE subgoals, for comparison
    discover -> meta.pt      stage 2 (C.4): the metacontroller finds codes and switches
    rl       -> policy.pt    stage 3 (C.5): internal RL on the codes; and raw.pt, on raw actions
    eval                     success of all of them on the post-training task, side by side

A stage whose input is missing trains it first, or takes it from assets/ if it is shipped (not with
--fresh); a finished one is reused; an interrupted one goes on where it was, bit for bit (runs.py).
`--rival forced`: beta = 1 from stage 2 on (C.4.1); `cotrain`: base and metacontroller together on
the loss of stage 2 (C.4.2); `compile`: CompILE in the metacontroller's place, and a base that is
trained on with it (C.4.3); `raw`: raw-action RL alone (C.5.3). Not in the paper: `--start PRESET`,
base and metacontroller begin with those of a board no larger; `--grow N`, RL learns the task's
beginnings first.

Bottom-up: 1. episodes and batches   2. views: what is steered   3. what every stage uses
4. the stages   5. the command line. What can be set, and the presets: config.py

Glossary: as in envs.py, model.py, metacontroller.py and internal_rl.py, and
  batch   a dict of tensors: obs (B, T+1, K), action, subgoal, mask, switches (B, T); of the ant
          obs (B, T+1, F), action (B, T, A)
  view    another view of a batch's episodes, which is steered, or learned, in their place: view_of
  body    a point or the ant; BODIES says what the stages need to know of one
"""
import contextlib
import copy
import dataclasses
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

import ant
import parallel
from analysis import (
    code_identity,
    code_outcomes,
    control_loss,
    control_success,
    gate_scores,
    kl_by_gate,
    opened_at_arrivals,
    opened_by_subgoals,
    success_by_subgoals,
)
from config import (
    DEPENDS,
    PRESETS,
    SIZES,
    Config,
    Parser,
    Refused,
    add_options,
    check,
    configured,
    world_of,
)
from grid import Grid, widened
from internal_rl import Policy, internal_episodes, internal_rl_step, play, raw_rl_step
from metacontroller import BETA_THRESHOLD, CompILE, Decoder, Metacontroller, discovery_terms
from model import SequenceModel, pretraining_loss
from runs import (
    EVAL_SEED,
    Graphs,
    Interrupted,
    Run,
    Training,
    adamw,
    autocast,
    choose_device,
    finished,
    load_checkpoint,
    read_checkpoint,
    seed_everything,
    suffix,
    use_shipped,
    write_atomically,
)

# -------------------------------------------------------------------------- 1. episodes and batches

BODIES = {"point": Grid, "ant": ant.Ant}
CHUNK = 32  # batches drawn at once: episodes of similar length share one, with little padding


def tensors(run, data, pad=False):
    """Trajectories -> a batch. CUDA graphs are recorded once for each shape: for them, pad, T is
    one of eight lengths, with steps that do not exist."""
    arrays = {"obs": data.obs(), "action": data.action, "subgoal": data.subgoal,
              "mask": data.mask(), "switches": data.switches()}
    if pad:
        T, unit = data.action.shape[1], math.ceil(run.cfg.T / 8)
        more = min(math.ceil(T / unit) * unit, run.cfg.T) - T
        arrays = {name: np.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)))
                  for name, x in arrays.items()}
    return {name: torch.from_numpy(value).to(run.device) for name, value in arrays.items()}


def deaf(worker):
    """What a Ctrl-C means is decided in the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def thin_steps(cfg, steps):
    """How many of a stage's `steps`, at its beginning, see thinned episodes."""
    return round(cfg.thin * steps)


def batches(run, purpose, size, clean, first, last, keep=.1, seed=None):
    """Yield (step, batch) for steps first .. last-1.

    seed: of the batches; None: the run's.
    clean: demonstrations of the clean expert (C.4.4). The first share `thin` of the steps gets
    episodes cut by ant.thinned, its share growing to `keep`: a goal is found out the sooner, the
    fewer steps it has to be remembered for.
    Any step can be the first: what it contains depends on (seed, purpose, step) alone, and, with
    `thin`, on last and keep. NOT in paper: with batches of similar length and losses averaged over
    a batch's steps, a step in a batch of short episodes weighs more than one in a batch of long
    ones. The logged NLLs are plain averages over the steps of unsorted test episodes.
    """
    cfg, body = run.cfg, BODIES[run.cfg.body]
    seed = cfg.seed if seed is None else seed
    draw = body.source(run, clean)
    thin = thin_steps(cfg, last)
    phases = ((cfg.thin_batch, first, thin), (size, max(first, thin), last))
    for n, begin, end in phases:
        if begin >= end:
            continue

        def drawn(chunk, n=n):  # in a worker, where there are any; n=n: this phase's
            rng = seed_everything(seed, purpose, chunk)
            data = draw(rng, CHUNK * n)
            # (CHUNK * n,) -> (CHUNK, n)
            by_length = data.length.argsort(kind="stable").reshape(CHUNK, n)
            return [data[rows] for rows in by_length[rng.permutation(CHUNK)]]
        chunks = range(begin // CHUNK, (end - 1) // CHUNK + 1)
        # Not a data set: for each number of a chunk, drawn(chunk), beforehand if by workers.
        source = torch.utils.data.DataLoader(
            chunks, batch_size=None, collate_fn=drawn, num_workers=run.workers,
            multiprocessing_context="fork" if run.workers else None, worker_init_fn=deaf)
        for chunk, parts in zip(chunks, source):
            for step, data in enumerate(parts, start=chunk * CHUNK):
                if begin <= step < end:
                    seed_everything(seed, purpose, step)
                    batch = tensors(run, data, pad=run.graphs)
                    if step < thin:  # the ant alone
                        batch = body.thin(batch, cfg.G, keep * (step / thin) ** 2)
                    yield step, batch


# ------------------------------------------------------------------------ 2. views: what is steered

def view_of(batch, world, symmetric, splice, join, hold=0.):
    """Another view of a batch's episodes, for the controllers to steer, or for the base to be
    trained on; None if no such help is asked for. NOT in paper; four helps (what each buys:
    docs/notes.md):

    symmetric: each view is turned or reflected its own way, and so is a past that comes from
        another episode. A code that says "up" or "into that corner" becomes worthless, one that
        says "to colour 2" is as good as before.
    splice, join: in a share `splice` of the views, and in a share `join` of the others, the past is
        another episode's, the neighbour in the batch (which is sorted by length, so that the two
        are alike), and steered by that episode's codes. What the base takes from it is wrong: the
        code has to say what is wanted, and to overrule the base. Any subgoal then follows any
        other, also where pretraining never shows it.
        splice: the end of the other, and then this episode from a random step on.
        join: the whole other, its arrival included, and then this episode from its beginning: no
        subgoal is cut, which would leave open how much of it is done. The arrival itself is steered
        by the code of what comes next, and not scored, as no action belongs to it.
    hold: a share `hold` of the steps give no code: they are steered by that of the last step before
        that does (the first always does). How many cells away the next colour lies is soon wrong;
        which colours are wanted remains true for longer.

    A view b of 8 steps, cut at 3 and spliced with the end of episode 5, which has 7 steps:
        row   5 5 5 b b b b b        step  4 5 6 3 4 5 6 7        mask  1 1 1 1 1 1 1 1
    and a view b of 3 steps, joined to episode 5 of 3 steps; the fourth observation is the arrival,
    o_4 of episode 5:
        row   5 5 5 b b b b          step  0 1 2 0 0 1 2          mask  1 1 1 0 1 1 1

    batch: obs (B, T+1, K), action and mask (B, T). Returns a dict of obs (B, T'+1, K); action, row,
    step (B, T'): step t of view b is steered by the code of step step[b, t] of episode
    row[b, t]; and mask (B, T'), the steps to be scored. T' = T without join.
    """
    # What changes from step to step is a tensor, whose value a CUDA graph can't ask for.
    constant = isinstance(splice, float) and isinstance(hold, float)
    if constant and not (symmetric or splice or join or hold):
        return None
    obs, mask, body = batch["obs"], batch["mask"], BODIES[world.body]
    length = mask.sum(1, keepdim=True)  # (B, 1)
    (B, T), device = mask.shape, mask.device
    draw = lambda: torch.rand(B, 1, device=device)
    rows = torch.arange(B, device=device)[:, None]
    spliced = draw() < splice  # (B, 1)
    joined = (draw() < join) & ~spliced
    # In pairs, so that the shares of several processes (parallel.py) hold both of each.
    other = (rows ^ 1).clamp(max=B - 1)  # (B, 1)
    their_length = length[other[:, 0]]  # (B, 1)
    # (B, 1) where this episode is entered
    entered = torch.minimum((draw() * length).long(), their_length) * spliced
    past = torch.where(joined, their_length + 1, entered)  # (B, 1) how many steps are the other's
    ends = past + length - entered  # (B, 1)
    if join:  # a CUDA graph can't ask how long the longest is
        recording = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        T = 2 * T + 1 if recording else max(T, int(ends.max()))
    t = torch.arange(T + 1, device=device)  # (T'+1,)
    foreign = t < past  # (B, T'+1)
    theirs = torch.where(joined, t, their_length - past + t)  # (B, T'+1)
    seen_row = torch.where(foreign, other, rows)  # (B, T'+1)
    seen_step = torch.where(foreign, theirs, entered + t - past).clamp(0, mask.shape[1])
    seen = obs[seen_row, seen_step]  # (B, T'+1, K)
    # Which of the square's eight turns and reflections; 0: as it is.
    turns = torch.randint(8 if symmetric else 1, (B, 1), device=device)
    g = turns[seen_row, 0]  # (B, T'+1)
    # An arrival is seen in the other episode, and steered by the first code of this one.
    arrival = joined & (t == past - 1)
    row = torch.where(arrival, rows, seen_row)
    step = torch.where(arrival, 0, seen_step).clamp(max=mask.shape[1] - 1)
    seen, action = body.turned(world, g, seen, batch["action"][row, step])
    gives = torch.rand(mask.shape, device=device) >= hold  # (B, T)
    step = torch.where(gives, t[:mask.shape[1]], 0).cummax(1).values[row, step]  # (B, T'+1)
    steps = {"action": action, "row": row, "step": step, "mask": (t < ends) & ~arrival}
    # Nothing is done at the last observation.
    return {"obs": seen} | {name: x[:, :-1] for name, x in steps.items()}


# ------------------------------------------------------------------------- 3. what every stage uses

# Every stage is the same loop, runs.Training.go:
#     for step, item in source:                 batches, or a random generator for each RL update
#         learned = learn(step, item)           one optimiser step
#         if due: log(report(step, learned))    measure on fixed test episodes
#         if due: save()

def schedule(cfg, step, steps):
    """Factor on the learning rate. NOT in paper (constant rate): linear warm-up, then linear decay
    at the end, for short trainings."""
    left = (steps - step) / (cfg.decay * steps) if cfg.decay else 1.
    return min(1., (step + 1) / max(cfg.warmup, 1), left)


def optimise(loss, model, optimizer, lr):
    """One step on the sum of all processes' losses, which is returned. NOT in paper: the gradient's
    norm is cut at 1, which keeps rare batches from undoing many good ones."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = parallel.backward(loss, model.parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    optimizer.step()
    return loss


def supervise(run, training, source, lr, loss_of, report):
    """The loop of every supervised stage: loss_of(batch) -> loss, one's own part of it."""
    rate = torch.zeros((), device=run.device)  # a tensor: a CUDA graph reads it anew

    def optimised(batch):
        with autocast(run):
            loss = loss_of(batch)
        return optimise(loss, training.model, training.optimizer, rate)

    if run.graphs:
        optimised = Graphs(optimised, training.optimizer)

    def learn(step, batch):
        rate.fill_(lr * schedule(run.cfg, step, training.steps))
        return optimised(batch)
    training.go(source, learn, report)
    parallel.wait()  # for the checkpoint


def frozen(model):
    """The model itself, in evaluation mode, none of its weights to be trained."""
    return model.requires_grad_(False).eval()


def new_base(run):
    """An untrained base of the run's sizes, on its device."""
    cfg = run.cfg
    parts = BODIES[cfg.body].parts(world_of(cfg), cfg.relative)
    model = SequenceModel(parts, width=cfg.width, layers=cfg.layers, heads=cfg.heads,
                          hidden=cfg.hidden, buckets=cfg.buckets, layer=cfg.layer, lam=cfg.lam,
                          mixer=cfg.mixer)
    return model.to(run.device)


def new_metacontroller(run, base):
    """base: which CompILE copies."""
    cfg = run.cfg
    if cfg.gate == "compile":
        meta = CompILE(copy.deepcopy(base).requires_grad_(True), cfg.n_z, cfg.segments,
                       cfg.segment_rate, alpha_b=cfg.alpha_b, rank=cfg.meta_rank,
                       decoder_hidden=cfg.decoder_hidden)
        return meta.to(run.device)
    meta = Metacontroller(cfg.width, n_z=cfg.n_z, n_h=cfg.n_h, n_s=cfg.n_s, rank=cfg.meta_rank,
                          gate=cfg.gate, encoder_hidden=cfg.encoder_hidden,
                          decoder_hidden=cfg.decoder_hidden, switch_hidden=cfg.switch_hidden,
                          forget=cfg.forget)
    return meta.to(run.device)


def inheritance(run, name):
    """Checkpoint `name` of the preset that --start names, in the same --out and of the same seed,
    for weights to begin with: (its weights, its side of the board). Refused unless it has ended, is
    one of this network, and its board is no larger."""
    cfg, path = run.cfg, run.folder.parent.parent / run.cfg.start / run.folder.name / f"{name}.pt"
    if not path.exists():
        raise Refused(f"--start {cfg.start}: there is no {path}; train it first")
    saved = load_checkpoint(path)
    theirs = saved["fingerprint"]
    other = [f"{key}={theirs[key]}" for key in SIZES
             if key in theirs and theirs[key] != getattr(cfg, key)]
    other += [f"{key}={theirs[key]}" for key in ("G", "W") if theirs[key] > getattr(cfg, key)]
    if other or not saved["done"]:
        raise Refused(f"--start {cfg.start}: {path} " + (f"has {other[0]}, which does not fit here"
                                                         if other else "is not finished"))
    return saved["model"], theirs["G"]


def inherit(run, training):
    """Let a training that has not begun do so with the weights of a board no larger. NOT in paper:
    the co-trained codes of A.1 name its pairs if they did on one (docs/results.md). What a smaller
    board has not is new: more walls, greater displacements, the observation head."""
    if not run.cfg.start or training.first:
        return
    weights, side = inheritance(run, training.name)
    mine = training.model.state_dict()
    for key, value in weights.items():
        if key.endswith("bag.weight"):
            mine[key] = widened(mine[key], value.to(run.device), run.cfg.G, side)
        elif "obs_head" not in key:
            mine[key] = value
    training.model.load_state_dict(mine)


# ------------------------------------------------------------------------------------ 4. the stages

def pretrain(run):
    """Stage 1 (C.1.2): the base model, frozen afterwards.

    Log: nll (nats per action, as are bayes and known, the exact bounds), gap_closed (share of
    ln 4 - bayes), or right_turns* (ant.right_turns), episodes, episodes_per_s, train_loss.
    """
    cfg, body, world = run.cfg, BODIES[run.cfg.body], world_of(run.cfg)
    parent = body.expert(run)
    seed_everything(cfg.seed, "init", 0)
    base = new_base(run)
    training = Training(run, "base", base, adamw(base.parameters(), cfg.base_lr, cfg.base_wd),
                        parent)
    if not training.done:
        inherit(run, training)
        data, bounds = body.examination(run, clean=False)
        test = tensors(run, data)
        thin = thin_steps(cfg, cfg.base_steps)

        def loss_of(batch):
            # NOT in paper. Turned: the ant's demonstrations are expensive, and this makes eight of
            # one. Joined: such a base is steered better (docs/notes.md, section 5).
            view = view_of(batch, world, cfg.turn, 0., cfg.base_join) or batch
            mine = parallel.own({name: view[name] for name in ("obs", "action", "mask")})
            return parallel.part(view["mask"]) * pretraining_loss(base, **mine)[0]

        def report(step, loss):
            with torch.no_grad(), autocast(run):
                nll = pretraining_loss(base, test["obs"], test["action"], test["mask"])[1].item()
            seen = test["obs"][:, :-1]
            knows = body.knows(run, base, data, seen, nll, bounds)
            episodes = min(step + 1, thin) * cfg.thin_batch
            episodes += max(step + 1 - thin, 0) * cfg.base_batch
            with torch.no_grad():
                text = body.decoded(data, base.action_logits(base.lower(seen[:1])))
            metrics = {"episodes": episodes, "nll": nll, **knows, "train_loss": loss.item(),
                       "episodes_per_s": episodes / training.seconds()}
            return ("nll", *knows, "episodes_per_s"), metrics, text

        source = batches(run, "base", cfg.base_batch, False, training.first, cfg.base_steps)
        supervise(run, training, source, cfg.base_lr, loss_of, report)
    return frozen(base)


def control(run):
    """C.3: one controller per true subgoal, its decoder with the paper's 32 hidden units whatever
    --decoder_hidden. Internal RL, which is told nothing, is compared with its success.

    Log: nll under the true controllers (nats per action; its bounds bayes, known), success on the
    post-training task, success_by_leg (a share for each of its colours), layer.
    """
    cfg, body, world = run.cfg, BODIES[run.cfg.body], world_of(run.cfg)
    base = pretrain(run)
    seed_everything(cfg.seed, "init", 1)
    decoder = Decoder(len(world.subgoals), cfg.width, cfg.rank).to(run.device)
    codes = torch.eye(len(world.subgoals), device=run.device)  # (S, S)
    optimizer = adamw(decoder.parameters(), cfg.control_lr, cfg.control_wd)
    training = Training(run, "control", decoder, optimizer, base)
    if not training.done:
        data, bounds = body.examination(run, clean=True)
        test = tensors(run, data)

        def loss_of(batch):
            view = view_of(batch, world, cfg.symmetric, 0., cfg.join)
            if view is None:
                view = batch
            else:
                view["subgoal"] = batch["subgoal"][view["row"], view["step"]]  # (B, T')
            mine = parallel.own(view)
            return parallel.part(view["mask"]) * control_loss(
                base, decoder, mine["obs"][:, :-1], mine["action"], mine["subgoal"], mine["mask"])

        def report(step, loss):
            seen = test["obs"][:, :-1]
            with torch.no_grad(), autocast(run):
                nll = control_loss(base, decoder, seen, test["action"], test["subgoal"],
                                   test["mask"]).item()
            rng = seed_everything(EVAL_SEED, "eval", 0)
            success, legs = control_success(base, decoder, codes, world, rng, cfg.eval_episodes)
            with torch.no_grad():
                e = decoder(base.lower(seen[:1]), codes[test["subgoal"][:1]])  # (1, T, D)
                text = body.decoded(data, base.action_logits(e))
            metrics = {"nll": nll, "bayes": bounds.get("bayes"), "known": bounds.get("known"),
                       "success": success, "success_by_leg": legs, "layer": cfg.layer}
            return ("nll", "known", "success"), metrics, text

        source = batches(run, "control", cfg.control_batch, True, training.first,
                         cfg.control_steps)
        supervise(run, training, source, cfg.control_lr, loss_of, report)
    return frozen(decoder)


def gate_line(beta):
    """beta (T,) as text: ^ open, - shut but above .1, . shut."""
    return "".join("^" if b > BETA_THRESHOLD else "-" if b > .1 else "." for b in beta.tolist())


def discovered(run, base, meta, data, test, bounds, alpha):
    """What stage 2 logs: (names to show, metrics, text). data: Trajectories of test episodes; test,
    bounds: the same as a batch, and their exact bounds."""
    cfg, world = run.cfg, world_of(run.cfg)
    rng = seed_everything(EVAL_SEED, "eval", 1)
    noise = torch.randn(*test["mask"].shape, cfg.n_z, device=run.device)
    with torch.no_grad(), autocast(run):
        out = discovery_terms(base, meta, test["obs"], test["action"], test["mask"], noise)
    codes = min(256, max(8, cfg.eval_episodes // 4))  # fewer where episodes are dear
    _, outcome = code_outcomes(base, meta.decoder, world, rng, codes, codes // 4)
    _, success, _ = internal_episodes(base, meta, world, rng, cfg.eval_episodes)
    per_episode = test["mask"].sum(1).float().mean().item()
    metrics = {"alpha": alpha, "nll": out["nll"].item(), "bayes": bounds.get("bayes"),
               "known": bounds.get("known"), "kl_per_episode": out["kl"].item() * per_episode,
               **kl_by_gate(out["kl_steps"], out["beta"], test["mask"]),
               **gate_scores(out["beta"], test["switches"], test["mask"]),
               **opened_by_subgoals(data, out["beta"]),
               **code_identity(outcome, len(world.subgoals)),
               "code_success": success.mean().item()}
    T = int(data.length[0])
    text = ("subgoal " + "".join(map(str, data.subgoal[0, :T])),
            "gate    " + gate_line(out["beta"][0, :T]))
    shown = ("nll", "known", "kl_per_episode", "kl_open", "kl_shut", "switches", "true_switches",
             "f1", "opens_subgoal_end", "opens_inside", "undecided", "code_identity", "code_none",
             "code_success")
    return shown, metrics, text


def discover(run):
    """Stage 2 (C.4): the metacontroller on the frozen base, on clean demonstrations (C.4.4).
    Returns base and metacontroller.

    Log: alpha (as grown so far), nll, bayes, known; kl_per_episode (nats), kl_open and kl_shut
    (nats per step where the gate is open and shut); switches, true_switches (per episode),
    precision, recall, f1, f1_1, f1_5, undecided (analysis.gate_scores); opens_subgoal_end,
    opens_inside (analysis.opened_by_subgoals); code_* (code_identity);
    code_success: of codes from the prior, near 0 for good codes, too, where a task is long.
    """
    cfg, body, world = run.cfg, BODIES[run.cfg.body], world_of(run.cfg)
    parent = None if cfg.joint and body.expert(run) is None else pretrain(run)
    seed = cfg.seed + 1000 * cfg.meta_seed
    seed_everything(seed, "init", 2)
    meta = new_metacontroller(run, parent)
    learner, base = meta, parent  # learner: what stage 2 trains
    # C.4.2: from scratch on the grid, from the pretrained base for the ant. C.4.3: from it.
    if cfg.joint or cfg.gate == "compile":
        base = new_base(run) if parent is None else copy.deepcopy(parent).requires_grad_(True)
        learner = torch.nn.ModuleDict({"base": base, "meta": meta})
    optimizer = adamw(learner.parameters(), cfg.meta_lr, cfg.meta_wd)
    training = Training(run, "meta" + suffix(run), learner, optimizer, parent)
    if not training.done:
        inherit(run, training)
        data, bounds = body.examination(run, clean=True)
        test = tensors(run, data)

        def grown(step):
            # NOT in paper: alpha grows from 0. With alpha in full from the start the code is given
            # up before it carries anything. Meanwhile spliced views give way to whole and joined
            # ones: spliced, a code must be obeyed whatever the past; whole, no subgoal is cut.
            return min(1., max(0, step + 1 - cfg.alpha_start) / max(cfg.alpha_ramp, 1))

        growth = torch.zeros((), device=run.device)  # a tensor, like the rate in `supervise`
        held = torch.zeros((), device=run.device)

        def growing(source):
            for step, batch in source:
                growth.fill_(grown(step))
                # NOT in paper: codes are held at first. Released, before they have a price, they
                # come to act: one that steers across the end of its subgoal is hardly obeyed.
                held.fill_(cfg.hold * (step < cfg.alpha_start - cfg.release))
                yield step, batch

        def loss_of(batch):
            # `batches` has just seeded torch for this step. Drawn for all of the horizon, so that
            # it does not depend on how far the batch is padded.
            B, T = batch["mask"].shape
            noise = torch.randn(cfg.T, B, cfg.n_z, device=run.device)[:T].transpose(0, 1)
            splice = cfg.splice * (1 - growth) if cfg.splice else 0.
            view = view_of(batch, world, cfg.symmetric, splice, cfg.join, held if cfg.hold else 0.)
            mine, mine_of_view = parallel.own(batch | {"noise": noise}), view and parallel.own(view)
            parallel.own_luck()
            terms = discovery_terms(base, meta.train(), mine["obs"], mine["action"], mine["mask"],
                                    mine["noise"], mine_of_view)
            # This process's parts of two means: over the view's steps, and over the episodes'.
            nll = parallel.part((view or batch)["mask"]) * terms["nll"]
            kl = parallel.part(batch["mask"]) * terms["kl"]
            return nll + cfg.alpha * growth * kl  # Eq. 9

        def report(step, loss):
            return discovered(run, base, meta.eval(), data, test, bounds, cfg.alpha * grown(step))

        source = batches(run, "meta", cfg.meta_batch, True, training.first, cfg.meta_steps,
                         cfg.keep, seed)
        supervise(run, training, growing(source), cfg.meta_lr, loss_of, report)
    frozen(learner)
    return base, meta


def lesson(cfg, world, step):
    """The world of RL's update `step`. NOT in paper, where the whole task alone is rewarded: with
    --grow, at first its first subgoal is all of the task, `grow` updates later its first two."""
    if not cfg.grow:
        return world
    task = world.post_task
    colours = sum(before <= step // cfg.grow for _, before in world.subgoal_of(task))
    return dataclasses.replace(world, post="-".join(map(str, task[:colours])))


def reinforce(run, name, model, optimizer, update, trial, parent):
    """The loop of both kinds of RL. update(world, rng) plays a batch of its post-training task and
    learns from it; trial(rng) plays the whole task without learning, on layouts that are the same
    for both kinds: (Trajectories, success, gates or None).

    Log: episodes so far; of the last update success (with --grow, of the beginning), loss,
    raw_steps, steps_per_s (environment steps a second), abstract_actions (per episode), std (of the
    policy); eval_success, success of the trial.
    """
    cfg, world = run.cfg, world_of(run.cfg)
    training = Training(run, name, model, optimizer, parent)
    if not training.done:
        def learn(step, rng):
            begin = time.perf_counter()
            happened = update(lesson(cfg, world, step), rng)
            seconds = time.perf_counter() - begin
            return happened | {"steps_per_s": happened["raw_steps"] / seconds}

        def report(step, happened):
            data, success, gates = trial(seed_everything(EVAL_SEED, "eval", 2))
            task = "-".join(map(str, world.post_task))
            text = f"task {task}  visited {data.visited(0, world.O)}"
            if gates is not None:
                text += "  gate " + gate_line(gates[0, :data.length[0]])
            shown = ("episodes", "success", "abstract_actions", "std", "eval_success",
                     "steps_per_s")
            metrics = {"episodes": (step + 1) * cfg.rl_batch, **happened,
                       "eval_success": success.mean().item()}
            return shown, metrics, (text,)

        purpose, steps = name.split("-")[0], range(training.first, cfg.rl_updates)
        source = ((k, seed_everything(cfg.seed, purpose, k)) for k in steps)
        # A curve begins at episode 0.
        training.go(source, learn, report, lambda: report(-1, {}))
        parallel.wait()  # for the checkpoint
    return frozen(model)


def rl(run):
    """Stage 3 (C.5): internal RL on the post-training task, which no demonstration ever showed.
    Returns base, metacontroller and policy."""
    cfg, world = run.cfg, world_of(run.cfg)
    base, meta = discover(run)
    seed_everything(cfg.seed, "init", 3)
    policy = Policy(cfg.width, cfg.n_z, cfg.policy_width).to(run.device)
    # Table A13: weight decay 0. NOT in paper: a rate of its own for the standard deviation, so
    # that the policy narrows within a short training, once it has found the way.
    rest = [p for p in policy.parameters() if p is not policy.log_std]
    groups = [{"params": rest}, {"params": [policy.log_std], "lr": cfg.std_lr}]
    optimizer = adamw(groups, cfg.rl_lr, 0.)

    def update(world, rng):
        return internal_rl_step(base, meta, policy, optimizer, world, rng, cfg.rl_batch,
                                cfg.rl_epochs)

    def trial(rng):
        data, success, env = internal_episodes(base, meta, world, rng, cfg.eval_episodes, policy)
        return data, success, env.gates

    name = "policy" + suffix(run)
    return base, meta, reinforce(run, name, policy, optimizer, update, trial, meta)


def raw(run):
    """The rival (C.5.3): the same update and as many episodes, on raw actions, all weights of the
    base model trained."""
    cfg, world = run.cfg, world_of(run.cfg)
    parent = pretrain(run)
    base = copy.deepcopy(parent).requires_grad_(True)
    optimizer = adamw(base.parameters(), cfg.raw_lr, 0.)

    def update(world, rng):
        return raw_rl_step(base, optimizer, world, rng, cfg.rl_batch, cfg.rl_epochs)

    def trial(rng):
        return *play(base, world, [world.post_task] * cfg.eval_episodes, rng)[:2], None

    return reinforce(run, "raw", base, optimizer, update, trial, parent)


def evaluate(run):
    """Success of everything whose training has ended, on the same fresh episodes of the
    post-training task (the ant's expert: on other ones), and what else is measured by playing.
    Printed, and written to eval.json (a rival's: eval-forced.json and so on)."""
    run = dataclasses.replace(run, extend=False)
    cfg, world, kind = run.cfg, world_of(run.cfg), suffix(run)
    n, body = cfg.eval_episodes, BODIES[run.cfg.body]
    rows, curve = {}, None  # key -> (text, rate); internal RL by the number of subgoals

    def fresh():
        return seed_everything(EVAL_SEED, "eval", 3)

    def alone(model, rng):
        return play(model, world, [world.post_task] * n, rng)[1]

    inputs = [name for name in run.names if name in (*body.checkpoints, "base")]

    def ended(*names):  # what rests on unfinished inputs would train these
        return all(finished(run, name) for name in (*inputs, *names))

    if not kind and ended("base"):
        base, rng = pretrain(run), fresh()
        # Blind success is rare: 20 times as many episodes.
        rate = np.concatenate([alone(base, rng) for _ in range(20)]).mean()
        rows["blind_success"] = "blind sampling from the base model", rate
        if finished(run, "control"):
            codes = torch.eye(len(world.subgoals), device=run.device)
            rate = control_success(base, control(run), codes, world, fresh(), n)[0]
            rows["control_success"] = "true-subgoal controllers (C.3)", rate
        rows |= body.evaluated(run, n)
    if ended("meta" + kind):
        base, meta = discover(run)
        rate = internal_episodes(base, meta, world, fresh(), n)[1].mean()
        rows["code_success"] = "codes from the prior, before RL", rate
    if ended("meta" + kind, "policy" + kind):
        title = {"": "internal RL", "-forced": "internal RL, forced switching",
                 "-cotrain": "internal RL, co-trained base",
                 "-compile": "internal RL on CompILE"}[kind]
        base, meta, policy = rl(run)
        data, success, env = internal_episodes(base, meta, world, fresh(), n, policy)
        rows["rl_success"] = title, success.mean()
        curve = success_by_subgoals(world, data, success)
        wheres = {"gate_next_door": "from another colour", "gate_elsewhere": "from an empty cell"}
        for (key, where), opened in zip(wheres.items(), opened_at_arrivals(world, data, env.gates)):
            if len(opened):
                rows[key] = f"under it the gate opens at an arrival {where}", opened.mean()
    if not kind and ended("base", "raw"):
        rows["raw_success"] = "raw-action RL", alone(raw(run), fresh()).mean()
    if not rows:
        raise Refused(f"nothing in {run.folder} has been trained to its end: there is nothing to "
                      f"evaluate")
    blind = f" ({20 * n} blind)" if "blind_success" in rows else ""
    print(f"\nsuccess on the post-training task {'-'.join(map(str, world.post_task))}, {n} "
          f"episodes{blind}, sampled actions")
    width = max(len(text) for text, _ in rows.values())
    successes = [key for key in rows if key.endswith("_success")]
    others = [key for key in rows if key not in successes]
    for key in successes + others:
        if others and key == others[0]:
            print("also measured")
        print(f"  {rows[key][0]:{width}}  {rows[key][1]:.4f}")
    if curve:
        print("internal RL finishes the first 1, 2, .. subgoals in "
              + " ".join(f"{share:.3f}" for share in curve))
    rates = {"eval_episodes": n} | {key: float(rate) for key, (_, rate) in rows.items()}
    rates |= {"success_by_subgoals": curve} if curve else {}
    write_atomically(run.folder / f"eval{kind}.json", json.dumps(rates).encode())


# ------------------------------------------------------------------------------ 5. the command line

STAGES = {"expert": lambda run: BODIES[run.cfg.body].expert(run), "pretrain": pretrain,
          "control": control, "discover": discover, "rl": rl, "eval": evaluate}
RIVALS = ("none", "raw", "forced", "cotrain", "compile")
# Which checkpoints a stage reads or writes, besides the expert's.
NEEDS = {"expert": (), "pretrain": ("base",), "control": ("base", "control"),
         "discover": ("base", "meta")}
NEEDS["rl"] = NEEDS["eval"] = ("base", "control", "meta", "policy", "raw")
# Which of these a rival writes, so that --fresh deletes them.
WRITES = {"none": NEEDS["rl"], "raw": ("raw",), "forced": ("meta", "policy"),
          "cotrain": ("meta", "policy"), "compile": ("meta", "policy")}


def open_run(folder, name):
    """A Run with the configuration that checkpoint `name` in this folder was made with, for those
    who only look."""
    saved = load_checkpoint(folder / f"{name}.pt")["fingerprint"]
    groups = DEPENDS[name.split("-")[0]]
    # A field that it does not know is younger: it was made with the default (runs.difference).
    known = {f.name: saved.get(f.name, f.default) for f in dataclasses.fields(Config)
             if f.name in saved or f.metadata["group"] in groups}
    cfg = dataclasses.replace(PRESETS[saved["preset"]], **known)
    return Run(cfg, saved["preset"], folder, extend=False)


def parse(argv, complaints=sys.stderr):
    """Command line -> (Run, stage, rival, names of the checkpoints to delete first). Refuses, in
    one sentence, anything that can't work.

    run.names: what this stage and rival read or write; own: what they may write.
    """
    parser = Parser("train.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stage", choices=STAGES, default="rl")
    parser.add_argument("--preset", choices=PRESETS, default="grid-small",
                        help="smoke: seconds; grid-small, grid-quad (subgoals of two colours), "
                        "ant-small: a laptop; grid-pairs: the paper's grid, a small network, not "
                        "finished; grid-paper, ant-paper: the paper's sizes, one GPU [grid-small]")
    parser.add_argument("--rival", choices=RIVALS, default="none",
                        help="raw: raw-action RL alone; forced: beta = 1 from stage 2 on; "
                        "cotrain: base and metacontroller trained together; compile: CompILE")
    parser.add_argument("--out", default="runs", help="folder for checkpoints and logs [runs]")
    parser.add_argument("--fresh", action="store_true", help="first delete the checkpoints of the "
                        "stage and of its inputs; with --rival, only the rival's own")
    add_options(parser)
    with contextlib.redirect_stderr(complaints):
        args = vars(parser.parse_args(argv))
    preset = PRESETS[args["preset"]]
    cfg, stage, rival = configured(args, preset), args["stage"], args["rival"]
    if cfg.gate in ("forced", "compile") or cfg.joint:
        raise Refused("--gate forced, --gate compile and --joint True are what --rival forced, "
                      "--rival compile and --rival cotrain do: use these")
    if rival in ("forced", "compile") and cfg.gate != preset.gate:
        raise Refused(f"--gate {cfg.gate} is not the gate of --rival {rival}")
    check(cfg, preset)
    body = BODIES[cfg.body]
    body.check(cfg)
    cfg.gate = rival if rival in ("forced", "compile") else cfg.gate
    cfg.joint = rival == "cotrain"
    if stage == "expert" and not body.checkpoints:
        raise Refused("--stage expert trains the ant's walker; the grid's experts need no training")
    alone = rival == "raw" and stage not in ("rl", "eval")
    if alone or rival != "none" and stage in ("expert", "pretrain", "control"):
        raise Refused(f"--rival {rival} has no --stage {stage} of its own")
    if stage == "eval" and parallel.count() > 1:
        raise Refused("--stage eval is for one process: it trains nothing that could be shared")
    if args["fresh"] and stage == "eval":
        raise Refused("--fresh does not go with --stage eval, which trains nothing")
    run = Run(cfg, args["preset"], Path(args["out"]) / args["preset"] / f"seed{cfg.seed}",
              fresh=args["fresh"] and rival == "none")
    own = [name + (suffix(run) if name in ("meta", "policy") else "")
           for name in NEEDS[stage] if name in WRITES[rival]]
    if rival == "none":
        own = [*body.checkpoints, *own]
        run.names = tuple(own)
    elif rival == "raw":  # `evaluate` ends with the comparison of all
        run.names = (*body.checkpoints, *NEEDS[stage])
    else:  # co-training starts from scratch where an expert needs no training (C.4.2)
        base = ["base"] * (rival != "cotrain" or bool(body.checkpoints))
        run.names = (*body.checkpoints, *base, *own)
    return run, stage, rival, tuple(own) if args["fresh"] else ()


def prepare(run, preset, stage, rival, stale):
    """Refuse bad files, delete stale ones, take what is shipped, and say what is there."""
    trained = () if stage == "eval" else ("base",) if rival == "raw" else ("base", "meta")
    for name in run.names:
        if name not in stale:
            read_checkpoint(run, name)  # before anything is deleted, not after an hour
        begins = name in stale or not (run.folder / f"{name}.pt").exists()
        if run.cfg.start and begins and name.split("-")[0] in trained:
            inheritance(run, name)
    for name in stale:
        for kind in ("pt", "jsonl"):
            (run.folder / f"{name}.{kind}").unlink(missing_ok=True)
    body = BODIES[run.cfg.body]
    if set(body.checkpoints) & set(stale):
        body.forget(run.folder)
    if stale:  # it speaks of weights that are gone
        (run.folder / f"eval{suffix(run)}.json").unlink(missing_ok=True)
    changed = [f"{key}={value}" for key, value in dataclasses.asdict(run.cfg).items()
               if value != getattr(preset, key)]
    print(f"{run.preset}, seed {run.cfg.seed}: " + (" ".join(changed) or "as the preset says"))
    earlier = [name for name in run.names if finished(run, name)]
    # Experts and bases, which take long; the rest of assets/ is for play.py.
    shipped = [name for name in run.names if name in (*body.checkpoints, "base")
               and stage != "eval" and use_shipped(run, name)]
    if earlier:
        print(f"finished earlier, reused: {', '.join(earlier)}")
    if shipped:
        print(f"taken from assets/, where it lies ready trained (--fresh trains it here): "
              f"{', '.join(shipped)}")


def main(argv=None):
    """Returns the exit code: 2 for what can't work; 1 a loss that is not finite, a full disk; 130,
    143 stopped."""
    parallel.join()
    complaints = sys.stderr
    if parallel.rank():  # process 0 speaks for all; what is not foreseen still has its traceback
        sys.stdout = complaints = open(os.devnull, "w")
    try:
        run, stage, rival, stale = parse(argv, complaints)
        if not parallel.rank():
            prepare(run, PRESETS[run.preset], stage, rival, stale)
        parallel.wait()
        choose_device(run)
        if stage == "rl":
            if rival == "none":
                control(run)
            if rival != "raw":
                rl(run)
            if rival in ("none", "raw"):
                raw(run)
            if not parallel.rank():
                evaluate(run)
        else:
            STAGES[stage](run)
    except Refused as refusal:
        print(f"train.py: {refusal}", file=complaints)
        return 2
    except parallel.Lost:
        print("train.py: another process has ended; the same command, without --fresh, goes on "
              "from the last checkpoint", file=complaints)
        return 1
    except (FloatingPointError, OSError) as error:  # a diverged loss; a full disk
        print(f"train.py: {error}", file=complaints)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
                "can't allocate memory" not in str(error)):
            raise
        print(f"train.py: out of memory: smaller batches (--base_batch, --control_batch, "
              f"--meta_batch {run.cfg.meta_batch}) or fewer episodes at once (--rl_batch "
              f"{run.cfg.rl_batch}, --eval_episodes {run.cfg.eval_episodes}) need less",
              file=complaints)
        return 1
    except (KeyboardInterrupt, Interrupted) as stop:
        number, saved = stop.args if stop.args else (signal.SIGINT, "interrupted")
        print(f"\ntrain.py: {saved}; the same command, without --fresh, goes on from the last "
              f"checkpoint", file=complaints)
        return 128 + number
    finally:
        parallel.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
