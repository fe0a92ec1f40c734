"""The paper's analyses, redrawn with numbers: `python analysis.py WHAT --preset P`.

  probe    C.2, Fig. 3: is the current subgoal linearly readable from e_t,l? For every layer and
           four lengths of base training, beside what could be known (the exact Bayes posterior)
  layers   C.3, Fig. 4: controllers of true subgoals at every layer, for three lengths; --layers 6
           or 8 for another depth, with an --out of its own

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

import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import runs
import train
from envs import exact_bounds

# ---------------------------------------------------------------------------------------- 1. cells

def variant(run, **changes):
    """The same run with other fields, in a folder of its own below it."""
    cfg = dataclasses.replace(run.cfg, **changes)
    name = ",".join(f"{key}={value}" for key, value in changes.items())
    return dataclasses.replace(run, cfg=cfg, folder=run.folder / name, names=(), kept={})


def with_length(run, steps):
    """The run whose base was trained for `steps` steps: this one, or a variant."""
    return run if steps == run.cfg.base_steps else variant(run, base_steps=steps)


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
        streams.append(base.through(layer, layer + 1, streams[-1], None, None))
    return streams


def probe(run, steps=2000, batch=128, lr=3e-3):
    """C.2: accuracy of linear probes of the subgoal and, for contrast, of the next action.

    Rows: base_steps; subgoal and action (a list over layers 0 .. L); bayes_subgoal, the accuracy of
    the exact posterior, which no probe can beat, and chance_subgoal. NOT in paper: 2,000 steps x
    128 at 3e-3 (Table A6: 8,000 x 512 at 1e-3).
    """
    world = config.world_of(run.cfg)

    def measure(base_steps):
        one = with_length(run, base_steps)
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
    """C.3 at every layer, read where it is written. Rows: base_steps, layers, layer; success, nll,
    success_by_leg, unseen (which legs no demonstration shows)."""
    def measure(base_steps, layers, layer):
        parent = with_length(run, base_steps)
        one = variant(parent, layer=layer, read=layer)
        train.pretrain(parent)
        runs.copy_checkpoint("base", parent.folder, one.folder)  # it does not depend on the layer
        train.control(one)
        last = runs.read_log(one.folder, "control")[-1]
        kept = {key: last[key] for key in ("success", "nll", "success_by_leg")}
        return {**kept, "unseen": unseen_legs(config.world_of(run.cfg))}

    cells = [{"base_steps": steps, "layers": run.cfg.layers, "layer": layer}
             for steps in lengths(run, (4, 2, 1)) for layer in range(run.cfg.layers + 1)]
    measured(run, "layers", cells, measure)


# ---------------------------------------------------------------------------------- 4. command line

EXPERIMENTS = {"probe": probe, "layers": layers}


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
        if cfg.body != "point":
            raise config.Refused(f"{args['what']} is for the grid so far")
        folder = Path(args["out"]) / args["preset"] / f"seed{cfg.seed}"
        run = runs.Run(cfg, args["preset"], folder)
        runs.use_shipped(run, "base")
        runs.choose_device(run)
        EXPERIMENTS[args["what"]](run)
    except config.Refused as refusal:
        print(f"analysis.py: {refusal}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, runs.Interrupted):
        print("\nanalysis.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
