"""The paper's analyses, redrawn with numbers: `python analysis.py WHAT --preset P`.

  probe    C.2, Fig. 3: is the current subgoal linearly readable from e_t,l? For every layer and
           four lengths of base training, beside what could be known (the exact Bayes posterior)
  layers   C.3, Fig. 4: controllers of true subgoals at every layer, for three lengths; --layers 6
           or 8 for another depth, with an --out of its own
  ablate   B.2, Fig. A2: the base's length, weight decay, lambda and the experts' noise, by C.3
  rate     C.6, Fig. 7: KL against NLL over alpha, base frozen or trained along
  rivals   C.4.2, Fig. 8: internal RL, base frozen or trained along, with our views and without
  gates    Fig. 6, A3: the gate against true subgoals, on demonstrations and under the policy
  codes    what a code means: where codes lead, and one of them on six boards
  transplant  B.3.2: do codes that led to a colour lead to it elsewhere, and where demonstrations
           never go
  exchange what codes act as: what each may be exchanged for

Each is a table of cells; a cell is a line of runs/<preset>/seed<k>/<WHAT>.jsonl. What is there is
not measured again, so an interrupted experiment goes on at the cell that it was in, and within it
from the last checkpoint (the bases and controllers of a cell are trained in a folder of their own,
below the run's).

Glossary: as in train.py.
"""
import dataclasses
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import runs
import train
from analysis import (
    code_identity,
    code_outcomes,
    control_success,
    exchanged_nll,
    gate_scores,
    opened_by_subgoals,
    outcome_counts,
    steer_by_code,
    transplant,
    way_to_target,
)
from envs import exact_bounds, sample_layouts
from internal_rl import internal_episodes, play
from metacontroller import BETA_THRESHOLD
from model import pretraining_loss

# ---------------------------------------------------------------------------------------- 1. cells

def variant(run, **changes):
    """The same run with other fields, in a folder of its own below it."""
    cfg = dataclasses.replace(run.cfg, **changes)
    name = ",".join(f"{key}={value}" for key, value in changes.items())
    return dataclasses.replace(run, cfg=cfg, folder=run.folder / name, names=(), kept={})


def but_for(run, field, value):
    """The run with this value of one field: this one, or a variant."""
    return run if value == getattr(run.cfg, field) else variant(run, **{field: value})


def on_its_base(run, **changes):
    """A variant that has the run's own base, trained first if need be."""
    one = variant(run, **changes)
    train.pretrain(run)
    if changes:
        runs.copy_checkpoint("base", run.folder, one.folder)
    return one


def lengths(run, parts):
    """Lengths of base training: 1 / parts[0], ... of the preset's."""
    return [run.cfg.base_steps // part for part in parts]


def measured(run, what, cells, measure):
    """Measure each cell, a dict, that <what>.jsonl does not have yet: measure(**cell) -> dict."""
    done = runs.read_log(run.folder, what)
    run.folder.mkdir(parents=True, exist_ok=True)
    for k, cell in enumerate(cells):
        if any(cell.items() <= row.items() for row in done):
            continue
        print(f"{what}, cell {k + 1} of {len(cells)}: {cell}")
        done.append({**cell, **measure(**cell)})
        runs.write_log(run.folder, what, done)
        print(f"  {done[-1]}")


# ---------------------------------------------------------------------------------- 2. probes (C.2)

class Probes(nn.Module):
    """A linear softmax probe from every layer's stream to each of several labels."""

    def __init__(self, layers, width, classes):
        super().__init__()
        # NOT in paper, which is silent: the stream is normalised first, as layers differ in scale.
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.heads = nn.ModuleDict({
            name: nn.ModuleList(nn.Linear(width, n) for _ in range(layers + 1))
            for name, n in classes.items()})

    def forward(self, streams):
        """e_t,l of every layer, each (B, T, D) -> label -> logits of every layer (B, T, n)."""
        return {name: [head(self.norm(e)) for head, e in zip(heads, streams)]
                for name, heads in self.heads.items()}


@torch.no_grad()
def all_streams(base, obs):
    """e_t,0 .. e_t,L: obs (B, T, K) -> a list of (B, T, D)."""
    streams = [base.embed(obs)]
    for layer in range(len(base.blocks)):
        streams.append(base.through(layer, layer + 1, streams[-1]))
    return streams


def probe(run, steps=2000, batch=128, lr=3e-3):
    """C.2: accuracy of linear probes of the subgoal and, for contrast, of the next action.

    Rows: base_steps; subgoal and action (a list over layers 0 .. L); bayes_subgoal, the accuracy of
    the exact posterior, which no probe can beat, and chance_subgoal. NOT in paper: 2,000 steps x
    128 at 3e-3 (Table A6: 8,000 x 512 at 1e-3).
    """
    world = config.world_of(run.cfg)

    def measure(base_steps):
        one = but_for(run, "base_steps", base_steps)
        base = train.pretrain(one)
        data, _ = train.BODIES[one.cfg.body].examination(one, clean=True)
        test = train.tensors(one, data)
        mask = test["mask"]
        classes = {"subgoal": len(world.subgoals), "action": 4}
        runs.seed_everything(one.cfg.seed, "init", 5)
        probes = Probes(len(base.blocks), one.cfg.width, classes).to(one.device)
        optimizer = runs.adamw(probes.parameters(), lr, 0.)  # Table A6: weight decay 0
        for step, item in train.batches(one, "control", batch, True, 0, steps):
            logits = probes(all_streams(base, item["obs"][:, :-1]))
            loss = sum(F.cross_entropy(each[item["mask"]], item[name][item["mask"]])
                       for name in classes for each in logits[name])
            rate = lr * train.schedule(dataclasses.replace(one.cfg, decay=.5), step, steps)
            train.optimise(loss, probes, optimizer, rate)
        with torch.no_grad():
            logits = probes(all_streams(base, test["obs"][:, :-1]))
        rows = {name: [(each.argmax(-1) == test[name])[mask].float().mean().item()
                       for each in logits[name]] for name in classes}
        _, _, posterior = exact_bounds(world, data)
        likeliest = torch.from_numpy(posterior.argmax(-1)).to(mask.device)
        best = (likeliest == test["subgoal"])[mask].float().mean().item()
        return {**rows, "bayes_subgoal": best, "chance_subgoal": 1 / len(world.subgoals)}

    cells = [{"base_steps": steps} for steps in lengths(run, (8, 4, 2, 1))]
    measured(run, "probe", cells, measure)


# ---------------------------------------------------------------------------------- 3. layers (C.3)

def unseen_legs(world):
    """For each colour of the post-training task: does reaching it need a transition between
    subgoals that no pretraining task has?"""
    def transitions(task):  # from colour to colour: (subgoal, subgoal), or None inside one
        steps = itertools.pairwise(world.subgoal_of(task))
        return [(a, b) if after > before else None for (a, before), (b, after) in steps]
    seen = {pair for task in world.tasks for pair in transitions(task)} | {None}
    return [False] + [pair not in seen for pair in transitions(world.post_task)]


def layers(run):
    """C.3 at every layer. Rows: base_steps, layers, layer; success, nll,
    success_by_leg, unseen (which legs no demonstration shows)."""
    def measure(base_steps, layers, layer):
        parent = but_for(run, "base_steps", base_steps)
        one = on_its_base(parent, layer=layer)  # the base does not depend on the layer
        train.control(one)
        last = runs.read_log(one.folder, "control")[-1]
        kept = {key: last[key] for key in ("success", "nll", "success_by_leg")}
        return {**kept, "unseen": unseen_legs(config.world_of(run.cfg))}

    cells = [{"base_steps": steps, "layers": run.cfg.layers, "layer": layer}
             for steps in lengths(run, (4, 2, 1)) for layer in range(run.cfg.layers + 1)]
    measured(run, "layers", cells, measure)


# --------------------------------------------------------------------------------- 4. ablate (B.2)

def ablate(run):
    """Fig. A2: C.3 on bases that were trained otherwise. Rows: field, value; gap_closed of the
    base; success, success_by_leg of the controllers."""
    values = {"base_steps": lengths(run, (4, 2, 1)), "base_wd": (0., .03, .1, .3),
              "lam": (0., .001, .01, .1), "eps": (0., .1, .2, .4)}

    def measure(field, value):
        one = but_for(run, field, value)
        train.control(one)
        gap = runs.read_log(one.folder, "base")[-1]["gap_closed"]
        last = runs.read_log(one.folder, "control")[-1]
        return {"gap_closed": gap, **{key: last[key] for key in ("success", "success_by_leg")}}

    cells = [{"field": field, "value": value} for field in values for value in values[field]]
    measured(run, "ablate", cells, measure)


# ----------------------------------------------------------------------------------- 5. rate (C.6)

ALPHAS = (.01, .03, .1, .3, 1., 3.)


def arms(cfg):
    """Base frozen or trained along (C.4.2): name -> fields. A base that is trained along sees as
    many episodes as base and metacontroller of the other arm together."""
    more = round(cfg.base_steps * cfg.base_batch / cfg.meta_batch)
    return {"frozen": {}, "cotrained": {"joint": True, "meta_steps": cfg.meta_steps + more}}


def arm_of(run, arm, **changes):
    """The run of an arm with these changes."""
    new = on_its_base if arm == "frozen" else variant
    return new(run, **changes, **arms(run.cfg)[arm])


def rate(run, seeds=3):
    """Fig. 7: what the code costs against what it buys, with the Gumbel gate, on a frozen base and
    with the base trained together with the metacontroller (C.4.2, see `arms`). Rows: arm, alpha,
    meta_seed; nll and kl (nats per step, on plain episodes), switches and true_switches (per
    episode), f1, aligned (F1 above .9: a rule, not a look), opens_subgoal_end, opens_inside,
    code_identity.

    NOT in paper: alpha grows from 0, and the base of the first arm is this run's.
    """
    def measure(arm, alpha, meta_seed):
        one = arm_of(run, arm, gate="gumbel", alpha=alpha, meta_seed=meta_seed)
        train.discover(one)
        last = runs.read_log(one.folder, "meta" + runs.suffix(one))[-1]
        data, _ = train.BODIES[run.cfg.body].examination(run, clean=True)
        kept = ("nll", "switches", "true_switches", "f1", "opens_subgoal_end", "opens_inside",
                "code_identity")
        return {**{key: last[key] for key in kept}, "aligned": last["f1"] > .9,
                "kl": last["kl_per_episode"] / float(data.length.mean())}

    cells = [{"arm": arm, "alpha": alpha, "meta_seed": k}
             for k in range(seeds) for arm in arms(run.cfg) for alpha in ALPHAS]
    measured(run, "rate", cells, measure)


def rivals(run):
    """What makes codes useful, a frozen base or our views? Rows: arm, views (without them the
    frozen base is another one, of single demonstrations; base_join does not reach the co-trained
    one); rl_curve, a list of [episodes, success]; success, its end; of stage 2 nll, f1,
    code_identity (share of ln S)."""
    plain = {"base_join": 0., "symmetric": False, "splice": 0., "hold": 0., "join": 0.}

    def measure(arm, views):
        one = arm_of(run, arm) if views else variant(run, **plain, **arms(run.cfg)[arm])
        train.rl(one)
        last = runs.read_log(one.folder, "meta" + runs.suffix(one))[-1]
        curve = [[line["episodes"], line["eval_success"]]
                 for line in runs.read_log(one.folder, "policy" + runs.suffix(one))]
        return {"success": curve[-1][1], "rl_curve": curve, "nll": last["nll"], "f1": last["f1"],
                "code_identity": last["code_identity"] / last["code_identity_max"]}

    cells = [{"arm": arm, "views": views} for arm in arms(run.cfg) for views in (True, False)]
    measured(run, "rivals", cells, measure)


# ------------------------------------------------------------- 6. gates, codes, transplant (B.3)

@torch.no_grad()
def encoded(run, base, meta, noise):
    """The test demonstrations, and what the metacontroller makes of them: Trajectories, z
    (N, T, n_z), beta (N, T). noise: torch.randn for sampled proposals, torch.zeros for their
    means."""
    data, _ = train.BODIES[run.cfg.body].examination(run, clean=True)
    obs, length = (torch.from_numpy(x).to(run.device) for x in (data.obs(), data.length))
    drawn = noise(*data.action.shape[:2], meta.n_z, device=run.device)
    z, beta, _, _ = meta(base.lower(obs), length + 1, drawn)
    return data, z, beta


def gates(run, n=1000, shown=3):
    """Fig. 6, A3: the gate against true subgoals, on demonstrations, and on the post-training task
    under the policy of internal RL. Rows: where; analysis.gate_scores; analysis.opened_by_subgoals;
    episodes, a list of {subgoal and beta of every step, arrivals: [step, colour], ...}."""
    world = config.world_of(run.cfg)
    base, meta, policy = train.rl(run)

    def measure(where):
        rng = runs.seed_everything(runs.EVAL_SEED, "eval", 9)
        if where == "demonstrations":
            data, _, beta = encoded(run, base, meta, torch.randn)
        else:
            data, _, env = internal_episodes(base, meta, world, rng, n, policy)
            beta = env.gates[:, :data.action.shape[1]]
        episodes = []
        for k in range(shown):
            T, progress = data.length[k], data.progress[k]
            arrivals = [[t, int(data.target[k, t - 1])] for t in range(1, T)
                        if progress[t] > progress[t - 1]]
            episodes.append({"subgoal": data.subgoal[k, :T].tolist(), "arrivals": arrivals,
                             "beta": [round(x, 3) for x in beta[k, :T].tolist()]})
        true, mask = (torch.from_numpy(x).to(run.device) for x in (data.switches(), data.mask()))
        return {**gate_scores(beta, true, mask), **opened_by_subgoals(data, beta),
                "episodes": episodes}

    measured(run, "gates", [{"where": "demonstrations"}, {"where": "policy"}], measure)


def codes(run, shown=300, boards=6):
    """What a code means. NOT in paper. One row:

    plane: codes at openings of the gate on demonstrations, projected on their first two principal
        components, and their true subgoal: a list of [x, y, subgoal]; explained: the two shares of
        the variance.
    confusion: codes from the prior are grouped by where they lead most often ("none" is the last
        group); rows are groups, columns where their codes led in other worlds, shares; sizes: how
        many codes a group has.
    code_identity and so on, as analysis.code_identity.
    mean_code_success: of the post-training task, if the mean code of each true subgoal on
        demonstrations, times 1, 1.5 and 2, is given at the true moments: what the decoder can do,
        without gate and policy.
    boards: the code that leads most surely somewhere, held fixed in six worlds of side x side
        cells: things, of which the first `colours` are no walls, and path (the agent's cells);
        leads_to: its subgoal.
    """
    world = config.world_of(run.cfg)
    base, meta = train.discover(run)

    def measure():
        rng = runs.seed_everything(runs.EVAL_SEED, "eval", 11)
        data, z, beta = encoded(run, base, meta, torch.zeros)
        opens = (beta > BETA_THRESHOLD).cpu().numpy() & data.mask()  # (N, T)
        at_openings = z.cpu().numpy()[opens]  # (openings, n_z)
        centred = at_openings - at_openings.mean(0)
        _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
        plane = np.column_stack([centred @ axes[:2].T, data.subgoal[opens]])[:shown]

        prior, outcome = code_outcomes(base, meta.decoder, world, rng)
        S, half = len(world.subgoals), outcome.shape[1] // 2
        counts = outcome_counts(outcome[:, :half], S)
        group = counts.argmax(1)  # (codes,) by one half of the worlds; looked at in the other
        confusion = [[float((outcome[group == g, half:] == h).mean()) if (group == g).any() else 0.
                      for h in range(S + 1)] for g in range(S + 1)]

        best = counts[:, :S].max(1).argmax()
        layouts = sample_layouts(world, rng, boards)
        held = {"z": prior[best].expand(boards, -1)}
        played, _, _ = play(base, world, [world.subgoals[0][:1]] * boards, rng,
                            steer_by_code(meta.decoder), held, layouts)
        paths = [{"things": played.things[n].tolist(),
                  "path": played.agent[n, :played.length[n] + 1].tolist()} for n in range(boards)]

        mask, subgoal = (torch.from_numpy(x).to(z.device) for x in (data.mask(), data.subgoal))
        means = torch.stack([z[mask & (subgoal == k)].mean(0) for k in range(S)])  # (S, n_z)
        given = [control_success(base, meta.decoder, scale * means, world, rng, 1000)[0]
                 for scale in (1, 1.5, 2)]
        return {"plane": plane.round(3).tolist(),
                "explained": (sizes[:2] ** 2 / (sizes ** 2).sum()).tolist(),
                "confusion": confusion, "sizes": [int((group == g).sum()) for g in range(S + 1)],
                **code_identity(outcome, S), "mean_code_success": given,
                "leads_to": int(group[best]), "boards": paths, "side": world.G, "colours": world.O}

    measured(run, "codes", [{}], measure)


def transplanted(run, n=2000):
    """B.3.2: one row, see analysis.transplant."""
    world = config.world_of(run.cfg)
    base, meta = train.discover(run)

    def measure():
        rng = runs.seed_everything(runs.EVAL_SEED, "eval", 12)
        return transplant(base, meta, world, rng, n)

    measured(run, "transplant", [{}], measure)


def exchange(run):
    """What do codes act as, names of subgoals or directions? NOT in paper. One row of NLLs, in nats
    per step, on test demonstrations (analysis.exchanged_nll): own, with mean proposals; alone, with
    no code; and with the code of another step: any; same_part, one at which as many colours of the
    subgoal are done; same_subgoal and same_way, of these one of the same subgoal, or as far away
    from the next colour; same_all, both."""
    world = config.world_of(run.cfg)
    base, meta = train.discover(run)

    def measure():
        rng = runs.seed_everything(runs.EVAL_SEED, "eval", 13)
        data, z, _ = encoded(run, base, meta, torch.zeros)
        batch = train.tensors(run, data)
        place = np.zeros((len(world.subgoals), world.O), int)  # of a colour in a subgoal
        for k, subgoal in enumerate(world.subgoals):
            place[k, list(subgoal)] = range(len(subgoal))
        part = place[data.subgoal, data.target]  # (N, T)
        way, n = way_to_target(world, data), world.cells
        labels = {"any": 0 * part, "same_part": part, "same_subgoal": part * n + data.subgoal,
                  "same_way": part * n + way, "same_all": (part * n + way) * n + data.subgoal,
                  "own": np.arange(part.size).reshape(part.shape)}
        row = {name: exchanged_nll(base, meta.decoder, batch, z, like, rng)
               for name, like in labels.items()}
        with torch.no_grad():
            alone = pretraining_loss(base, batch["obs"], batch["action"], batch["mask"])[1]
        return {**row, "alone": alone.item()}

    measured(run, "exchange", [{}], measure)


# ---------------------------------------------------------------------------------- 7. command line

EXPERIMENTS = {"probe": probe, "layers": layers, "ablate": ablate, "rate": rate, "rivals": rivals,
               "gates": gates, "codes": codes, "transplant": transplanted, "exchange": exchange}
FOR_ANY_BODY = ("gates", "transplant")


def main(argv=None):
    parser = config.Parser("analysis.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=EXPERIMENTS)
    parser.add_argument("--preset", choices=config.PRESETS, default="grid-small")
    parser.add_argument("--out", default="runs", help="folder for checkpoints and logs [runs]")
    config.add_options(parser)
    args = vars(parser.parse_args(argv))
    preset = config.PRESETS[args["preset"]]
    try:
        cfg = config.configured(args, preset)
        config.check(cfg, preset)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise config.Refused("the analyses are for one process")
        if cfg.body != "point" and args["what"] not in FOR_ANY_BODY:
            raise config.Refused(f"{args['what']} is for the grid so far")
        folder = Path(args["out"]) / args["preset"] / f"seed{cfg.seed}"
        run = runs.Run(cfg, args["preset"], folder)
        for name in ("walker", "base"):
            runs.use_shipped(run, name)
        runs.choose_device(run)
        EXPERIMENTS[args["what"]](run)
    except config.Refused as refusal:
        print(f"analysis.py: {refusal}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, runs.Interrupted):
        print("\nanalysis.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0
