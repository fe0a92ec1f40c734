"""Train everything: `python train.py --stage rl` runs the whole path of the paper, from nothing.

    expert   -> walker.pt    the ant's expert (C.1.1); the grid's needs no training
    pretrain -> base.pt      stage 1 (C.1.2): predict experts' actions; reported against the exact Bayes bound
    control  -> control.pt   C.3: controllers of the TRUE subgoals, what all that follows is compared with
    discover -> meta.pt      stage 2 (C.4): the metacontroller finds codes and switches in the frozen base
    rl       -> policy.pt    stage 3 (C.5): internal RL on the codes; and raw.pt, the rival on raw actions (C.5.3)
    eval                     success of all of them on the post-training task, side by side

`--rival forced` trains the metacontroller with beta = 1 (C.4.1) and internal RL on it; `--rival cotrain` trains base and metacontroller
together on the loss of stage 2 (C.4.2: from scratch on the grid, from the pretrained base for the ant), and internal RL on them; `--rival raw` trains raw-action RL only.
A stage whose input is missing trains it first, or takes it from assets/ if it comes with the repository (not with --fresh); a finished one is
reused; an interrupted one goes on where it was, bit for bit.
Files: runs/<preset>/seed<k>/*.pt, one .jsonl of metrics for each, and eval.json.

Bottom-up: 1. configuration and presets   2. checkpoints and logs   3. device   4. what every stage uses   5. data   6. the stages
7. the command line

How a resumed run can equal an uninterrupted one: nothing random depends on the past. Before step k of a stage, torch's random
generator is seeded with (seed, stage, k), and NumPy's, which draws episodes, likewise before every chunk of steps, so a checkpoint
needs model, optimiser and step, and no generator states. Bit for bit holds on the same CPU with the same number of threads; CUDA's own kernels are not all deterministic.
"""
import argparse
import copy
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from envs import Ants, Trajectories, World, ant_expert, concatenate, distances, exact_bounds, generate, sample_layouts, simulate
from internal_rl import (Policy, Walker, code_identity, control_success, internal_episodes, internal_rl_step, opened_at_arrivals, play, raw_rl_step,
                         right_turns, transplant, walker_step)
from metacontroller import SYMMETRIES, Decoder, Metacontroller, control_loss, discovery_loss, gate_scores, image_of, turned
from model import SequenceModel, pretraining_loss

# ------------------------------------------------------------------------------------------------ 1. configuration

def option(default, group, text):
    """A configuration field. Which groups of them a checkpoint remembers: see DEPENDS."""
    return dataclasses.field(default=default, metadata={"group": group, "help": text})


@dataclasses.dataclass
class Config:
    """Everything that can be set; the defaults are the paper's gridworld (A.1, Tables A4, A7, A9, A13, A16)."""
    # A.1.2
    G: int = option(7, "world", "side of the grid")
    O: int = option(8, "world", "number of colours")
    W: int = option(4, "world", "number of walls")
    T: int = option(100, "world", "horizon, steps")
    task_set: str = option("pairs", "world", "task set: pairs (Table A1), singles (Table A2), errands, tiny")
    body: str = option("point", "world", "point (A.1) or ant (A.2)")
    compass: bool = option(False, "world", "name the ant's legs by where they point (see envs.AntWorlds)")

    # The ant's expert (C.1.1) and its demonstrations, which are simulated once
    walker_updates: int = option(600, "walker", "PPO iterations of the ant's walker")
    walker_lr: float = option(1e-3, "walker", "learning rate of PPO")
    demonstrations: int = option(20_000, "demonstrations", "episodes of the ant in each of its two sets, noisy and clean")

    # Stage 1: Tables A16 (sizes) and A4 (training)
    width: int = option(256, "base", "D, width of the residual stream")
    layers: int = option(6, "base", "L, number of blocks")
    heads: int = option(4, "base", "attention heads")
    hidden: int = option(512, "base", "hidden units of a block's MLP")
    buckets: int = option(32, "base", "buckets of the relative position bias")
    mixer: str = option("attention", "base", "sequence mixer of the base: attention or hawk")
    relative: bool = option(False, "base", "embed displacements from the agent instead of cells (see model.ObsEmbedding, BodyEmbedding)")
    lam: float = option(0.01, "base", "lambda, weight of the observation loss")
    eps: float = option(0., "base", "share of random actions in the base's training data")
    base_steps: int = option(256_000, "base", "optimiser steps")
    base_batch: int = option(1024, "base", "episodes per step")
    base_lr: float = option(3e-4, "base", "learning rate")
    base_wd: float = option(0.03, "base", "weight decay")
    thin: float = option(0., "base", "share of the steps of every supervised stage, at its beginning, that see thinned episodes (ant; see thinned)")
    thin_batch: int = option(128, "base", "episodes per step while they are thinned")
    turn: bool = option(False, "base", "train the base on episodes each turned or reflected its own way (ant; see metacontroller.turned)")
    warmup: int = option(0, "base", "steps of linear warm-up of the learning rate, in every supervised stage")
    decay: float = option(0., "base", "share of a supervised stage, at its end, over which the learning rate falls to 0")

    # Where and on what the stream is steered: Tables A7 and A9
    layer: int = option(3, "split", "l, the controlled layer: 0 (embedding) to L")
    symmetric: bool = option(False, "split", "controllers steer a turned or reflected image of the episode (see metacontroller.image_of)")
    splice: float = option(0., "split", "share of these images, those not shuffled, that begin with the end of another episode")
    shuffle: float = option(0., "split", "share of these images whose past has its colours exchanged; in stage 2 it grows as alpha does")
    rank: int = option(16, "control", "rank of the controllers of true subgoals; 0 = full matrix")

    # Controllers of true subgoals: Table A7
    control_steps: int = option(3200, "control", "optimiser steps")
    control_batch: int = option(512, "control", "episodes per step")
    control_lr: float = option(1e-3, "control", "learning rate")
    control_wd: float = option(0.03, "control", "weight decay")

    # Stage 2: Table A9
    n_z: int = option(8, "meta", "dimension of the code")
    n_h: int = option(32, "meta", "width of the GRU")
    switch_hidden: int = option(32, "meta", "hidden units of the switch")
    forget: float = option(0., "meta", "share of the training episodes in which the switch does not see h (see Metacontroller.encode)")
    keep: float = option(.1, "meta", "share of the further steps that thinned episodes keep in the end, in stage 2 (in the others: .1)")
    n_s: int = option(32, "meta", "dimension of the sequence embedding")
    encoder_hidden: int = option(64, "meta", "hidden units of the encoder")
    meta_rank: int = option(16, "meta", "rank of the metacontroller's controllers; 0 = full matrix")
    decoder_hidden: int = option(32, "meta", "hidden units of the decoder")
    read: int = option(0, "meta", "layer that metacontroller and policy read, if above the controlled one")
    gate: str = option("soft", "meta", "gate: soft, gumbel (E.1) or forced (C.4.1)")
    joint: bool = option(False, "meta", "train the base, too, on the loss of stage 2, together with the metacontroller (co-training)")
    alpha: float = option(0.17, "meta", "weight of the KL")
    alpha_start: int = option(0, "meta", "steps before alpha begins to grow from 0")
    alpha_ramp: int = option(1500, "meta", "steps over which alpha then grows")
    meta_steps: int = option(64_000, "meta", "optimiser steps")
    meta_batch: int = option(512, "meta", "episodes per step")
    meta_lr: float = option(1e-3, "meta", "learning rate")
    meta_wd: float = option(0.03, "meta", "weight decay")

    # Stage 3: Table A13. The paper scans the learning rate over 3e-6 .. 3e-4 (C.5.5). post_task stands here, not in "world", because
    # base, controllers and metacontroller do not depend on it: their checkpoints serve every task.
    post_task: str = option("", "rl", "task of RL, such as 0-1-2-3; empty: the task set's own")
    policy_width: int = option(256, "policy", "width of the policy's Hawk layer")
    std_lr: float = option(3e-5, "policy", "learning rate of the policy's standard deviation")
    rl_batch: int = option(1024, "rl", "episodes per update")
    rl_lr: float = option(3e-5, "policy", "learning rate of internal RL")
    raw_lr: float = option(3e-5, "raw", "learning rate of raw-action RL")
    rl_epochs: int = option(1, "rl", "clipped steps per batch of episodes")
    rl_clip: float = option(0.2, "rl", "clip range of the ratio")

    # How to run; no checkpoint depends on these, except that each seed has its own folder
    rl_updates: int = option(100_000, "run", "updates, for internal and for raw RL; a finished run can be extended")
    eval_episodes: int = option(2000, "run", "episodes per reported success rate")
    evaluations: int = option(20, "run", "evaluations per stage")
    save_seconds: float = option(60., "run", "seconds between checkpoints")
    seed: int = option(0, "run", "seed of everything")
    threads: int = option(0, "run", "CPU threads; 0 = PyTorch's choice")
    device: str = option("auto", "run", "auto, cpu, cuda")
    dtype: str = option("auto", "run", "auto, float32, bfloat16 (autocast, supervised stages only)")
    compile: str = option("auto", "run", "auto, off, inductor, cudagraphs")


PRESETS = {
    # Seconds. Every stage runs; nothing is learned well. The tests use it.
    "smoke": Config(G=3, O=3, W=0, T=12, task_set="tiny", width=32, layers=2, heads=2, hidden=64, relative=True, lam=0.01, layer=0, read=1,
                    symmetric=True, splice=.5, shuffle=.5, rank=4, meta_rank=4,
                    base_steps=150, base_batch=32, base_lr=3e-3, control_steps=40, control_batch=32, control_lr=1e-2,
                    meta_steps=60, meta_batch=32, meta_lr=3e-3, alpha_ramp=40, n_h=16, n_s=8, encoder_hidden=16, decoder_hidden=16,
                    policy_width=32, rl_updates=10, rl_batch=64, rl_lr=1e-3, std_lr=1e-3, raw_lr=1e-3, eval_episodes=200, evaluations=3,
                    save_seconds=1.),
    # A laptop. The world and every value that differs from the paper are discussed in the README.
    "grid-small": Config(G=5, O=4, W=0, T=50, task_set="singles", width=128, layers=4, heads=4, hidden=256, relative=True, lam=0.,
                         layer=0, read=2, warmup=100, decay=.5, base_steps=12_000, base_batch=64, base_lr=3e-3,
                         control_steps=2000, control_batch=128, control_lr=3e-3,
                         symmetric=True, splice=1., shuffle=1., decoder_hidden=64, meta_steps=3000, meta_batch=128, meta_lr=1.5e-3, alpha=.1,
                         alpha_start=700, alpha_ramp=1000,
                         post_task="0-1-2-3-0", rl_updates=200, rl_batch=512, rl_lr=1e-3, std_lr=1e-2, raw_lr=3e-4, rl_epochs=2, evaluations=10),
    # The paper's gridworld, sizes and rates: A.1, Tables A4, A7, A9, A13, A16. What remains different is marked NOT in paper.
    "grid-paper": Config(),
    # The ant on a laptop: chosen on seed 0, its gate on seeds 0 to 2; see the README's section on it.
    "ant-small": Config(body="ant", compass=True, G=4, O=4, W=1, T=500, task_set="singles", demonstrations=16_000, mixer="hawk", width=96, layers=4, heads=4,
                        hidden=256, relative=True, lam=.2, layer=0, warmup=100, decay=.5, thin=.92, turn=True,
                        base_steps=14_000, base_batch=32, base_lr=1e-2, rank=0, control_steps=1500, control_batch=32, control_lr=3e-3,
                        symmetric=True, splice=1., shuffle=1., n_h=64, switch_hidden=128, forget=.5, keep=.2, decoder_hidden=64, meta_rank=0,
                        meta_steps=4500, meta_batch=32, meta_lr=1.5e-3, alpha=.5, alpha_start=700, alpha_ramp=1000,
                        rl_updates=150, rl_batch=256, rl_lr=1e-3, std_lr=1e-2, raw_lr=3e-4, rl_epochs=2, evaluations=6, eval_episodes=256),
    # The paper's ant, sizes and rates: A.2, Tables A5, A8, A10, A14. NOT in paper, which does not say how many demonstrations there are: 200,000,
    # each seen about 500 times. Not tried at full length.
    "ant-paper": Config(body="ant", G=4, O=4, W=1, T=500, task_set="singles", mixer="hawk", layers=8, heads=8, lam=10., base_steps=204_800, base_batch=512,
                        layer=4, rank=0, control_batch=256, control_lr=3e-4, meta_rank=0, meta_steps=32_000, meta_batch=128, meta_lr=3e-4,
                        rl_batch=256, rl_updates=51_200, demonstrations=200_000),
}

STAGES = ("expert", "pretrain", "control", "discover", "rl", "eval")
RIVALS = ("none", "raw", "forced", "cotrain")
# Which groups of fields a checkpoint depends on: with any other value of those it would be another checkpoint.
DEPENDS = {"walker": ("walker",), "base": ("world", "walker", "demonstrations", "base")}
DEPENDS |= {"control": (*DEPENDS["base"], "split", "control"), "meta": (*DEPENDS["base"], "split", "meta"),
            "policy": (*DEPENDS["base"], "split", "meta", "rl", "policy"), "raw": (*DEPENDS["base"], "rl", "raw")}
# Which checkpoints a stage reads or writes.
NEEDS = {"expert": ("walker",), "pretrain": ("base",), "control": ("base", "control"), "discover": ("base", "meta"),
         "rl": ("base", "control", "meta", "policy", "raw"), "eval": ("base", "control", "meta", "policy", "raw")}

CHOICES = {"gate": ("soft", "gumbel", "forced"), "mixer": ("attention", "hawk"), "dtype": ("auto", "float32", "bfloat16"),
           "device": ("auto", "cpu", "cuda"), "compile": ("auto", "off", "inductor", "cudagraphs")}


HELD_OUT = 512  # of the ant's demonstrations, the first so many episodes are for evaluation only
ASSETS = Path(__file__).parent / "assets"  # <preset>/seed<k>/ holds the checkpoints that come with the repository


class Refused(Exception):
    """The request can't be carried out as it stands: one sentence for the user, exit code 2."""


def check(cfg):
    """Raise Refused unless this configuration can work. Called before anything is written."""
    try:
        # (An ant's tasks can be finished if a point's can.)
        generate(world_of(cfg).on_grid, np.random.default_rng(0), 8, cfg.eps if cfg.eps < 1 else 0.)
    except ValueError as error:
        raise Refused(str(error)) from None
    may_be_zero = ("W", "layer", "splice", "shuffle", "lam", "eps", "alpha", "alpha_start", "alpha_ramp", "read", "rank", "meta_rank", "warmup", "decay",
                   "save_seconds", "seed", "threads", "thin", "forget", "keep", "base_wd", "control_wd", "meta_wd")
    for name, value in dataclasses.asdict(cfg).items():
        if type(value) in (int, float) and not (value > 0 or value == 0 and name in may_be_zero):  # NaN fails both
            raise Refused(f"--{name} must {'not be negative' if name in may_be_zero else 'be positive'}, and is {value}")
    if cfg.width % cfg.heads or cfg.policy_width % 8:
        raise Refused(f"--width {cfg.width} must be a multiple of --heads {cfg.heads}, and --policy_width {cfg.policy_width} of 8")
    if cfg.body == "ant" and (cfg.demonstrations <= HELD_OUT or cfg.eps):
        raise Refused(f"--demonstrations {cfg.demonstrations} must be more than the {HELD_OUT} held out, and --eps {cfg.eps} is for the grid: "
                      f"the ant's demonstrations have the walker's own noise")
    if not 2 <= cfg.buckets <= 128:
        raise Refused(f"--buckets {cfg.buckets} must be between 2 and 128")
    if not 0 <= cfg.layer <= cfg.layers:
        raise Refused(f"--layer {cfg.layer} does not exist: the model has layers 0 to {cfg.layers}")
    if cfg.read > cfg.layers:
        raise Refused(f"--read {cfg.read} does not exist: the model has layers 0 to {cfg.layers}")
    if cfg.eps >= 1 or max(cfg.decay, cfg.splice, cfg.shuffle, cfg.thin, cfg.forget, cfg.keep) > 1:
        raise Refused(f"--eps {cfg.eps} must be below 1, and --decay {cfg.decay}, --splice {cfg.splice}, --shuffle {cfg.shuffle}, --thin {cfg.thin}, "
                      f"--forget {cfg.forget} and --keep {cfg.keep} at most 1")
    if cfg.body != "ant" and (cfg.thin or cfg.turn):
        raise Refused("--thin and --turn are for the ant")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise Refused(f"--{name} must be one of {', '.join(choices)}, not '{getattr(cfg, name)}'")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda was asked for, but PyTorch sees no CUDA device here")


# ------------------------------------------------------------------------------------------------ 2. checkpoints and logs

@dataclasses.dataclass
class Run:
    """One seed of one preset: its configuration, its folder, and the resolved device and precision."""
    cfg: Config
    preset: str
    folder: Path
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    compiler: str = "off"
    names: tuple = ()  # the checkpoints that this invocation reads or writes
    extend: bool = True  # may a finished RL go on, if more updates are asked for?
    fresh: bool = False  # train also what comes with the repository
    walker: Walker | None = None  # the ant's, once it has been loaded


def suffix(run):
    """The rivals keep their own files beside the metacontroller's."""
    return "-cotrain" if run.cfg.joint else "-forced" if run.cfg.gate == "forced" else ""


def fingerprint(run, name):
    """The configuration fields that checkpoint `name` depends on."""
    groups = DEPENDS[name.split("-")[0]]
    if run.cfg.body == "point":
        groups = [group for group in groups if group not in ("walker", "demonstrations")]
    values = {f.name: getattr(run.cfg, f.name) for f in dataclasses.fields(Config) if f.metadata["group"] in groups}
    return {"preset": run.preset, **({} if name == "walker" else {"seed": run.cfg.seed}), **values}  # one expert may serve every seed


def read_checkpoint(run, name):
    """The checkpoint `name`, or None if there is none. Refuses a damaged file and one of another configuration."""
    path = run.folder / f"{name}.pt"
    if not path.exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["fingerprint"]
    except (RuntimeError, EOFError, KeyError, TypeError, OSError, pickle.UnpicklingError) as error:
        raise Refused(f"{path} is damaged ({type(error).__name__}): delete it, or start again with --fresh") from None
    if (other := difference(run, name, theirs)) is not None:
        raise Refused(f"{path} was made with {other[0]}={other[1]}, this run asks for {other[0]}={other[2]}: "
                      f"delete it, start again with --fresh, or use another --out")
    return saved


def difference(run, name, theirs):
    """The first field in which a checkpoint's fingerprint differs from what this run asks for: (field, theirs, ours), or None.

    A field that the checkpoint does not know is younger than it: it was made with that field's default."""
    defaults = dataclasses.asdict(Config())
    return next(((field, theirs.get(field, defaults.get(field)), ours) for field, ours in fingerprint(run, name).items()
                 if theirs.get(field, defaults.get(field)) != ours), None)


def use_shipped(run, name):
    """Copy checkpoint `name` and its log out of assets/, if the run has none yet, asks for the same configuration and, for an ant's base, has the
    walker that it was trained on. Called for the walker first."""
    shipped = dataclasses.replace(run, folder=ASSETS / run.preset / ("seed0" if name == "walker" else run.folder.name))
    if run.fresh or (run.folder / f"{name}.pt").exists() or not (shipped.folder / f"{name}.pt").exists():
        return
    saved = torch.load(shipped.folder / f"{name}.pt", map_location="cpu", weights_only=True)
    walker = read_checkpoint(run, "walker")  # None on the grid, and before the walker itself is copied; nothing but walkers and bases is shipped
    if difference(run, name, saved["fingerprint"]) is not None or saved["parent"] != (walker and digest(walker["model"])):
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    for kind in ("jsonl", "pt"):  # the log first: a checkpoint without its log would never get one
        write_atomically(run.folder / f"{name}.{kind}", (shipped.folder / f"{name}.{kind}").read_bytes())
    print(f"{name}: taken from assets/, where it lies ready trained; --fresh trains it here")


def finished(run, name):
    """Is there a checkpoint `name` whose training has ended? (An interrupted one must not be mistaken for a result.)"""
    saved = read_checkpoint(run, name)
    return saved is not None and saved["done"]


def digest(weights):
    """A hash of a state_dict: a checkpoint remembers on which walker, base or metacontroller it was trained, its parent."""
    return hashlib.sha256(b"".join(value.detach().cpu().numpy().tobytes() for value in weights.values())).hexdigest()


def resume(run, name, model, optimizer, parent=None):
    """Load checkpoint `name`, if there is one, into model and optimizer. Returns (step, seconds spent, done).

    parent: the frozen model that this one is trained on; a checkpoint trained on another one is refused.
    """
    saved = read_checkpoint(run, name)
    if saved is None:
        (run.folder / f"{name}.jsonl").unlink(missing_ok=True)
        return 0, 0., False
    path = run.folder / f"{name}.pt"
    if saved["parent"] != (parent and digest(parent.state_dict())):
        kind = {"base": "walker", "policy": "metacontroller"}.get(name.split("-")[0], "base model")
        raise Refused(f"{path} was trained on another {kind} than the one beside it: delete it, or start again with --fresh")
    try:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise Refused(f"{path} does not fit the model of this version of the code ({type(error).__name__}): delete it, or start again "
                      f"with --fresh") from None
    if saved["done"] and not (run.extend and name.startswith(("policy", "raw")) and saved["step"] < run.cfg.rl_updates):
        print(f"{name}: finished earlier ({saved['seconds'] / 60:.1f} min), reused")
    else:  # interrupted; or RL, whose updates do not depend on how many there will be, asked for more of them
        saved["done"] = False
        print(f"{name}: continues at step {saved['step']}")
        keep = [line for line in read_log(run, name) if line["step"] <= saved["step"]]  # steps after the checkpoint come again
        write_atomically(run.folder / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in keep).encode())
    return saved["step"], saved["seconds"], saved["done"]


def write_atomically(path, content):
    """A reader sees the old file or the new one, never half of one, whenever the process is killed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content) if isinstance(content, bytes) else torch.save(content, partial)
    os.replace(partial, path)


class Saver:
    """Writes checkpoint `name` when it is due: after the first step, every save_seconds, and at the end."""

    def __init__(self, run, name, model, optimizer, seconds, parent=None):
        self.run, self.name, self.model, self.optimizer = run, name, model, optimizer
        self.parent = parent and digest(parent.state_dict())
        self.begun = time.time() - seconds
        self.last = 0.  # so that after --fresh one step suffices to say that this one is being trained here
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / f"eval{suffix(run)}.json").unlink(missing_ok=True)  # it speaks of weights that are about to change

    def seconds(self):
        return time.time() - self.begun

    def step(self, step, done):
        """Call after each optimiser step; `step` steps are finished now."""
        if done or time.time() - self.last > self.run.cfg.save_seconds:
            write_atomically(self.run.folder / f"{self.name}.pt", {
                "fingerprint": fingerprint(self.run, self.name), "dtype": str(self.run.dtype), "parent": self.parent,
                "step": step, "seconds": self.seconds(), "done": done,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})
            self.last = time.time()


def log(run, name, bar, shown, **metrics):
    """Append a line of metrics to <name>.jsonl and print the chosen ones above the progress bar."""
    with open(run.folder / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
    bar.write(f"  {name} {metrics['step']:>6}  " + "  ".join(
        f"{key} {metrics[key]:.4g}" if isinstance(metrics[key], float) else f"{key} {metrics[key]}" for key in shown))


def read_log(run, name):
    """All lines of <name>.jsonl; a last line cut off by a kill is dropped."""
    path = run.folder / f"{name}.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


# ------------------------------------------------------------------------------------------------ 3. device and precision

def choose_device(run):
    """Resolve device, dtype and compile, and print each choice with its reason."""
    cfg = run.cfg
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
        Ants.threads = cfg.threads
    cuda = torch.cuda.is_available()
    run.device = torch.device(("cuda" if cuda else "cpu") if cfg.device == "auto" else cfg.device)
    print(f"device {run.device} ({'asked for' if cfg.device != 'auto' else 'CUDA found' if cuda else 'no CUDA found'}), "
          f"{torch.get_num_threads()} CPU threads")
    unfinished = [saved["dtype"] for name in run.names if (saved := read_checkpoint(run, name)) and not saved["done"]]
    earlier = unfinished if cfg.dtype == "auto" else []
    if earlier:  # a timing must not change the precision in the middle of a training
        run.dtype = {"torch.float32": torch.float32, "torch.bfloat16": torch.bfloat16}[earlier[0]]
        print(f"dtype {run.dtype} (as in the unfinished checkpoint)")
    elif cfg.dtype == "auto":
        seconds = {}
        for dtype in (torch.float32, torch.bfloat16):  # check, do not guess: without hardware support bfloat16 is 100 times slower
            side = 256 if run.device.type == "cpu" else 4096  # on a GPU anything small measures the launch alone
            x, times = torch.randn(side, side, device=run.device, dtype=dtype), []
            for _ in range(4):  # the first is a warm-up
                begin = time.perf_counter()
                (x @ x).sum().item()  # waits for the device
                times.append(time.perf_counter() - begin)
            seconds[dtype] = min(times[1:])
        ratio = seconds[torch.float32] / seconds[torch.bfloat16]
        run.dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
        print(f"dtype {run.dtype} (bfloat16 matrix products measured at {ratio:.2g}x the speed of float32)")
    else:
        run.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
        print(f"dtype {run.dtype} (asked for)")
    if cfg.compile == "auto":
        # Triton is what inductor needs on CUDA. On CPU inductor gained nothing for models of this size.
        from torch.utils._triton import has_triton
        run.compiler, reason = (("off", "inductor gains nothing on CPU at these sizes") if run.device.type == "cpu"
                                else ("inductor", "Triton found") if has_triton() else ("cudagraphs", "no Triton"))
    else:
        run.compiler, reason = cfg.compile, "asked for"
    print(f"compile {run.compiler} ({reason})")


def autocast(run):
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16)


# ------------------------------------------------------------------------------------------------ 4. what every stage uses

PURPOSES = ("init", "base", "control", "meta", "policy", "raw", "eval", "walker", "demonstrations")
EVAL_SEED = 10 ** 6  # evaluation layouts are the same for every seed


def seed_everything(seed, purpose, k):
    """Seed torch for step k of a purpose and return a numpy Generator for the same step (see the top of this file)."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose), k])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def adamw(parameters, lr, wd):
    """parameters: an iterable of tensors, or a list of groups with learning rates of their own."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=wd, betas=(.9, .999), fused=True)


def show_actions(bar, test, logits):
    """The first test episode, decoded: true subgoals, the expert's actions, the likeliest action under logits (1, T, A). Not for torques."""
    if test["action"].is_floating_point():
        return
    T, arrows = int(test["mask"][0].sum()), "^>v<"
    bar.write("      subgoal " + "".join(map(str, test["subgoal"][0, :T].tolist())))
    bar.write("      expert  " + "".join(arrows[a] for a in test["action"][0, :T].tolist()))
    bar.write("      model   " + "".join(arrows[a] for a in logits[0, :T].argmax(-1).tolist()))


def due(cfg, step, steps):
    """Is there an evaluation after step `step`? About `evaluations` of them, evenly spread. The callers add the last step."""
    return (step + 1) % max(steps // cfg.evaluations, 1) == 0


def schedule(cfg, step, steps):
    """Factor on the learning rate. NOT in paper (constant rate): linear warm-up, then linear decay at the end, for short trainings."""
    left = (steps - step) / (cfg.decay * steps) if cfg.decay else 1.
    return min(1., (step + 1) / max(cfg.warmup, 1), left)


def optimise(name, step, loss, model, optimizer, lr):
    """One step of stage `name`. NOT in paper: the gradient's norm is cut at 1, which keeps rare batches from undoing many good ones."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss of {name} is not finite at step {step}; the last checkpoint keeps the last good state")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
    optimizer.step()


def world_of(cfg):
    return World(cfg.G, cfg.O, cfg.W, cfg.T, cfg.task_set, cfg.post_task, cfg.body, cfg.compass)


CHUNK = 32  # batches drawn at once, so that episodes of similar length share a batch and little padding is left


# ------------------------------------------------------------------------------------------------ 5. data, and the ant's expert, who makes it

def expert(run):
    """The ant's walker (C.1.1), by PPO; its success at the pinpad's own tasks is reported on the way. Returns it frozen."""
    if run.walker is not None:
        return run.walker
    cfg, world = run.cfg, world_of(run.cfg)
    seed_everything(cfg.seed, "init", 4)
    walker = Walker()  # on the CPU, as the physics
    optimizer = adamw(walker.parameters(), cfg.walker_lr, 0.)
    first, seconds, done = resume(run, "walker", walker, optimizer)
    if not done:
        saver = Saver(run, "walker", walker, optimizer, seconds)
        bar = tqdm(total=cfg.walker_updates, initial=first, desc="expert", unit="update", mininterval=1)
        for step in range(first, cfg.walker_updates):
            for group in optimizer.param_groups:
                group["lr"] = cfg.walker_lr * (1 - step / cfg.walker_updates)
            report = walker_step(walker, optimizer, seed_everything(cfg.seed, "walker", step))
            bar.update()
            done = step + 1 == cfg.walker_updates
            if done or due(cfg, step, cfg.walker_updates):
                rates = {key: expert_success(run, walker, tasks) for key, tasks in (("pretraining_success", world.tasks), ("success", [world.post_task]))}
                log(run, "walker", bar, ("speed", "std", *rates), step=step + 1, seconds=saver.seconds(), **report, **rates)
            saver.step(step + 1, done)
        bar.close()
    run.walker = walker.requires_grad_(False).eval()
    return run.walker


def expert_success(run, walker, tasks, n=256, noise=1.):
    """Share of n episodes of the given tasks, in turn, that the ant's expert completes. noise: 1 with its own, 0 with its mean action, which is what
    internal RL's success is divided by."""
    world, rng = world_of(run.cfg), seed_everything(EVAL_SEED, "eval", 4)
    things, agent = sample_layouts(world, rng, n)
    act = ant_expert(world, distances(world, things), rng, walker.walk(noise), np.zeros(n, bool))
    return simulate(world, [tasks[i % len(tasks)] for i in range(n)], things, agent, act, rng)[1].mean()


class Demonstrations:
    """The ant's demonstrations of one kind, "noisy" (the walker's own noise) or "clean" (C.4.4: its mean action).

    Simulated once into a folder, as simulation is the expensive part; refused if they were made by another walker, world or version of MuJoCo. Indexed by
    rows, they give Trajectories. sensed.f32 and action.f32 are raw float32 memory maps, the episodes one after the other.
    """

    def __init__(self, run, kind, walker):
        world, folder = world_of(run.cfg), run.folder / f"demonstrations-{kind}"
        wanted = {"mujoco": version("mujoco"), "walker": digest(walker.state_dict()), "episodes": run.cfg.demonstrations, "seed": run.cfg.seed,
                  **{name: value for name, value in dataclasses.asdict(world).items() if name != "post"}}
        if not (folder / "made.json").exists():
            self.make(run, kind, walker, world, folder, wanted)
        made = json.loads((folder / "made.json").read_text())
        for field, ours in wanted.items():
            if made.get(field) != ours:
                raise Refused(f"{folder} was made with {field}={made.get(field)}, this run asks for {field}={ours}: delete it, or use another --out")
        self.rest = dict(np.load(folder / "rest.npz"))
        self.begin = np.concatenate([[0], np.cumsum(self.rest["length"] + 1, dtype=np.int64)])  # an episode of T steps holds T+1 observations
        self.sensed, self.action = (np.memmap(folder / f"{name}.f32", np.float32, "r").reshape(self.begin[-1], -1) for name in ("sensed", "action"))

    @staticmethod
    def make(run, kind, walker, world, folder, wanted):
        folder.mkdir(parents=True, exist_ok=True)
        portions = [min(1024, wanted["episodes"] - done) for done in range(0, wanted["episodes"], 1024)]
        rest, begun = [], time.time()
        with open(folder / "sensed.f32", "wb") as sensed, open(folder / "action.f32", "wb") as action:
            for k, n in enumerate(tqdm(portions, desc=f"{kind} demonstrations", unit="portion")):
                rng = seed_everything(run.cfg.seed, "demonstrations", 2 * k + (kind == "clean"))
                try:
                    data = generate(world, rng, n, walk=walker.walk(kind == "noisy"))
                except ValueError as error:  # it hardly ever arrives
                    raise Refused(f"{error}; the walker needs more --walker_updates") from None
                seen = np.arange(data.sensed.shape[1]) <= data.length[:, None]  # (n, T+1)
                data.sensed[seen].tofile(sensed)
                np.pad(data.action, ((0, 0), (0, 1), (0, 0)))[seen].tofile(action)  # no action follows the last observation
                rest.append(dataclasses.replace(data, action=data.action[..., 0], sensed=None))
        rest = concatenate(rest)
        np.savez(folder / "rest.npz", **{f.name: getattr(rest, f.name).astype(np.int16) for f in dataclasses.fields(rest)
                                         if f.name not in ("action", "sensed")})
        write_atomically(folder / "made.json", json.dumps(wanted | {"seconds": time.time() - begun}).encode())  # last: a folder without it is made again

    def __getitem__(self, rows):
        length = self.rest["length"][rows].astype(np.int64)
        steps = self.begin[rows][:, None] + np.minimum(np.arange(length.max() + 1), length[:, None])  # (n, T+1); padding repeats the last
        parts = {name: value[rows].astype(np.int64) for name, value in self.rest.items()}
        data = Trajectories(**parts, action=self.action[steps[:, :-1]], sensed=self.sensed[steps])
        T = length.max()
        return dataclasses.replace(data, agent=data.agent[:, :T + 1], **{name: getattr(data, name)[:, :T] for name in ("target", "progress", "subgoal", "segment")})


def experts(run, eps):
    """`draw(rng, n) -> Trajectories`, n episodes to train on: fresh ones on the grid, recorded ones of the ant (clean if eps is None)."""
    if run.cfg.body == "point":
        return lambda rng, n: generate(world_of(run.cfg), rng, n, eps or 0.)
    recorded = Demonstrations(run, "clean" if eps is None else "noisy", expert(run))
    return lambda rng, n: recorded[rng.integers(HELD_OUT, run.cfg.demonstrations, n)]


def thinned(batch, G, share):
    """Of each of the ant's episodes the first step, the first step in every further cell, and a random share of the others: a batch like `batch`.

    NOT in paper. Where an ant is heading shows in the first steps after it has entered a cell; then it just walks, for 20 steps more. So a base has long learned
    to walk before it learns whereto (see internal_rl.right_turns), and a controller can only steer to where the base would know how to go. Of episodes cut down to
    these steps about five times as many are seen in the same time. With lam > 0 the observation loss is about the next observation that is kept.
    """
    obs, mask = batch["obs"], batch["mask"]  # (B, T+1, F), (B, T)
    B, T = mask.shape
    centre = obs[:, :-1, 27:29] * G - obs[:, :-1, -2:]  # (B, T, 2) of the ant's cell, in half cells
    keep = torch.rand(B, T, device=mask.device) < share
    keep[:, 0] = True
    keep[:, 1:] |= (centre[:, 1:] - centre[:, :-1]).abs().sum(-1) > .5
    keep &= mask
    count = keep.sum(1, keepdim=True)  # (B, 1)
    steps = (~keep).long().argsort(dim=1, stable=True)[:, :count.max()]  # (B, T') those kept, in their order, then others
    rows = torch.arange(B, device=mask.device)[:, None]
    # T'+1 observations: behind the last step that is kept stands the episode's last observation, as ever.
    seen = torch.where(torch.arange(steps.shape[1] + 1, device=mask.device) < count, torch.cat([steps, steps[:, -1:]], dim=1), mask.sum(1, keepdim=True))
    return {name: value[rows, steps] for name, value in batch.items()} | {"obs": obs[rows, seen], "mask": keep[rows, steps]}


def thin_steps(cfg, steps):
    """How many of a stage's `steps`, at its beginning, see thinned episodes."""
    return round(cfg.thin * steps)


def batches(run, purpose, size, eps, first, last, keep=.1):
    """Yield (step, batch) for steps first .. last-1; batch: dict of tensors obs (B, T+1, K), action, subgoal, mask, switches (B, T).

    eps: share of random actions; None for clean demonstrations (C.4.4). The first share `thin` of the steps gets thinned episodes,
    which keep a share of their further steps that grows to `keep`.
    Any step can be the first: what it contains depends on (seed, purpose, step) alone, and, with `thin`, on last and keep.
    NOT in paper: with batches of similar length and losses averaged over a batch's steps, a step in a batch of short episodes
    weighs more than one in a batch of long ones. The logged NLLs are plain averages over the steps of unsorted test episodes.
    """
    draw, cfg = experts(run, eps), run.cfg
    thin = thin_steps(cfg, last)
    for n, begin, end in ((cfg.thin_batch, first, thin), (size, max(first, thin), last)):  # no steps where begin >= end
        for chunk in range(begin // CHUNK, (end - 1) // CHUNK + 1):
            rng = seed_everything(cfg.seed, purpose, chunk)
            data = draw(rng, CHUNK * n)
            by_length = data.length.argsort(kind="stable").reshape(CHUNK, n)  # CHUNK batches of equal-length episodes
            for step, rows in enumerate(by_length[rng.permutation(CHUNK)], start=chunk * CHUNK):
                if begin <= step < end:
                    seed_everything(cfg.seed, purpose, step)
                    batch = tensors(run, data[rows])
                    # The share of further steps grows: a goal is found out the sooner, the fewer steps it has to be remembered for.
                    yield step, thinned(batch, cfg.G, keep * (step / thin) ** 2) if step < thin else batch


def tensors(run, data):
    return {name: torch.from_numpy(value).to(run.device) for name, value in
            {"obs": data.obs(), "action": data.action, "subgoal": data.subgoal, "mask": data.mask(), "switches": data.switches()}.items()}


def evaluation_data(run, eps, n=1024):
    """A fixed set of expert episodes as tensors, and its exact bounds in nats per step (see envs.exact_bounds; None for the ant)."""
    if run.cfg.body == "ant":
        return tensors(run, Demonstrations(run, "clean" if eps is None else "noisy", expert(run))[np.arange(HELD_OUT)]), None, None
    data = generate(world_of(run.cfg), np.random.default_rng(EVAL_SEED), n, eps or 0.)
    bayes, known, _ = exact_bounds(world_of(run.cfg), data, eps or 0.)
    return tensors(run, data), bayes[data.mask()].mean(), known[data.mask()].mean()


# ------------------------------------------------------------------------------------------------ 6. stages

def new_base(run):
    cfg, world = run.cfg, world_of(run.cfg)
    ant = {"sensors": world.ant_obs, "actions": 8} if cfg.body == "ant" else {}
    model = SequenceModel(world.cells, world.things, cfg.width, cfg.layers, cfg.heads, cfg.hidden, cfg.buckets, cfg.layer, cfg.lam, cfg.mixer,
                          relative=cfg.relative, read=max(cfg.layer, cfg.read), **ant)
    if run.compiler != "off":
        for block in model.blocks:
            block.compile(backend=run.compiler, dynamic=run.compiler == "inductor" or None)  # in place: names in checkpoints stay
    return model.to(run.device)


def new_metacontroller(run):
    cfg = run.cfg
    return Metacontroller(cfg.width, cfg.n_z, cfg.n_h, cfg.n_s, cfg.meta_rank, cfg.gate, cfg.encoder_hidden, cfg.decoder_hidden,
                          cfg.switch_hidden, cfg.forget).to(run.device)


def pretrain(run):
    """Stage 1 (C.1.2): the base model, frozen afterwards."""
    cfg = run.cfg
    parent = expert(run) if cfg.body == "ant" else None
    seed_everything(cfg.seed, "init", 0)
    base = new_base(run)
    optimizer = adamw(base.parameters(), cfg.base_lr, cfg.base_wd)
    first, seconds, done = resume(run, "base", base, optimizer, parent)
    if not done:
        test, bayes, known = evaluation_data(run, cfg.eps)
        recorded = None if parent is None else Demonstrations(run, "noisy", parent)[np.arange(HELD_OUT)]  # the episodes of `test`
        saver = Saver(run, "base", base, optimizer, seconds, parent)
        bar = tqdm(total=cfg.base_steps, initial=first, desc="pretrain", unit="step", mininterval=1)
        thin = thin_steps(cfg, cfg.base_steps)
        for step, batch in batches(run, "base", cfg.base_batch, cfg.eps, first, cfg.base_steps):
            if cfg.turn:  # NOT in paper: eight worlds for one, as demonstrations of the ant are expensive
                g = torch.randint(SYMMETRIES, (len(batch["mask"]), 1), device=run.device).expand(batch["obs"].shape[:2])
                # No action follows the last observation.
                batch["obs"], action = turned(world_of(cfg), g, batch["obs"], torch.nn.functional.pad(batch["action"], (0, 0, 0, 1)))
                batch["action"] = action[:, :-1]
            with autocast(run):
                loss, _ = pretraining_loss(base, batch["obs"], batch["action"], batch["mask"])
            optimise("base", step, loss, base, optimizer, cfg.base_lr * schedule(cfg, step, cfg.base_steps))
            bar.update()
            done = step + 1 == cfg.base_steps
            if done or due(cfg, step, cfg.base_steps):
                with torch.no_grad(), autocast(run):
                    nll = pretraining_loss(base, test["obs"], test["action"], test["mask"])[1].item()
                episodes = min(step + 1, thin) * cfg.thin_batch + max(step + 1 - thin, 0) * cfg.base_batch
                if recorded is not None:
                    with torch.no_grad():
                        mean = base.action_logits(base.lower(test["obs"][:, :-1]))[..., :8].cpu().numpy()  # (N, T, 8)
                    try:
                        bounds = right_turns(parent, world_of(cfg), recorded, mean)
                    except ValueError as error:
                        raise Refused(f"{error}; the walker needs more --walker_updates") from None
                else:
                    bounds = {"bayes": bayes, "known": known, "gap_closed": (np.log(4) - nll) / (np.log(4) - bayes)}
                log(run, "base", bar, ("nll", *bounds, "episodes_per_s"), step=step + 1, seconds=saver.seconds(), episodes=episodes, nll=nll, **bounds,
                    train_loss=loss.item(), episodes_per_s=episodes / saver.seconds())
                with torch.no_grad():
                    show_actions(bar, test, base.action_logits(base.lower(test["obs"][:1, :-1])))
            saver.step(step + 1, done)
        bar.close()
    return base.requires_grad_(False).eval()


def control(run):
    """C.3: one controller per true subgoal. Internal RL, which is told nothing, is compared with its success."""
    cfg, world = run.cfg, world_of(run.cfg)
    base = pretrain(run)
    seed_everything(cfg.seed, "init", 1)
    decoder = Decoder(len(world.subgoals), cfg.width, cfg.rank).to(run.device)
    optimizer = adamw(decoder.parameters(), cfg.control_lr, cfg.control_wd)
    first, seconds, done = resume(run, "control", decoder, optimizer, base)
    if not done:
        test, bayes, known = evaluation_data(run, None)
        saver = Saver(run, "control", decoder, optimizer, seconds, base)
        bar = tqdm(total=cfg.control_steps, initial=first, desc="control", unit="step", mininterval=1)
        for step, batch in batches(run, "control", cfg.control_batch, None, first, cfg.control_steps):
            obs, action, subgoal, mask = batch["obs"][:, :-1], batch["action"], batch["subgoal"], batch["mask"]
            if (image := image_of(batch, world, cfg.symmetric, cfg.splice, cfg.shuffle)) is not None:
                obs, action, subgoal, mask = image["obs"], image["action"], subgoal[image["row"], image["step"]], image["mask"]
            with autocast(run):
                loss = control_loss(base, decoder, obs, action, subgoal, mask)
            optimise("control", step, loss, decoder, optimizer, cfg.control_lr * schedule(cfg, step, cfg.control_steps))
            bar.update()
            done = step + 1 == cfg.control_steps
            if done or due(cfg, step, cfg.control_steps):
                with torch.no_grad(), autocast(run):
                    nll = control_loss(base, decoder, test["obs"][:, :-1], test["action"], test["subgoal"], test["mask"]).item()
                rng = seed_everything(EVAL_SEED, "eval", 0)
                success = control_success(base, decoder, world, rng, cfg.eval_episodes)
                log(run, "control", bar, ("nll", "known", "success"), step=step + 1, seconds=saver.seconds(), nll=nll, bayes=bayes,
                    known=known, success=success, layer=cfg.layer)
                with torch.no_grad():
                    z = torch.nn.functional.one_hot(test["subgoal"][:1], len(world.subgoals)).float()  # (1, T, subgoals)
                    show_actions(bar, test, base.action_logits(decoder(base.lower(test["obs"][:1, :-1]), z)))
            saver.step(step + 1, done)
        bar.close()
    return decoder.requires_grad_(False).eval()


def discover(run):
    """Stage 2 (C.4): the metacontroller on the frozen base, on clean demonstrations (C.4.4)."""
    cfg, world, name = run.cfg, world_of(run.cfg), "meta" + suffix(run)
    parent = None if cfg.joint and cfg.body == "point" else pretrain(run)
    seed_everything(cfg.seed, "init", 2)
    meta = new_metacontroller(run)
    # C.4.2: co-training starts from scratch on the grid, and from the pretrained base for the ant.
    base = parent if not cfg.joint else new_base(run) if parent is None else copy.deepcopy(parent).requires_grad_(True)
    learner = torch.nn.ModuleDict({"base": base, "meta": meta}) if cfg.joint else meta  # what stage 2 trains
    optimizer = adamw(learner.parameters(), cfg.meta_lr, cfg.meta_wd)
    first, seconds, done = resume(run, name, learner, optimizer, parent)
    if not done:
        test, bayes, known = evaluation_data(run, None)
        saver = Saver(run, name, learner, optimizer, seconds, parent)
        bar = tqdm(total=cfg.meta_steps, initial=first, desc="discover", unit="step", mininterval=1)
        for step, batch in batches(run, "meta", cfg.meta_batch, None, first, cfg.meta_steps, cfg.keep):
            # NOT in paper: alpha grows from 0. With alpha in full from the start the code is given up before it carries anything. The share of
            # shuffled images grows with it: codes form on spliced ones, and are then made strict (README).
            grown = min(1., max(0, step + 1 - cfg.alpha_start) / max(cfg.alpha_ramp, 1))
            alpha = cfg.alpha * grown
            noise = torch.randn(*batch["mask"].shape, cfg.n_z, device=run.device)
            image = image_of(batch, world, cfg.symmetric, cfg.splice, cfg.shuffle * grown)
            with autocast(run):
                loss, _ = discovery_loss(base, meta.train(), batch["obs"], batch["action"], batch["mask"], noise, alpha, image)
            optimise(name, step, loss, learner, optimizer, cfg.meta_lr * schedule(cfg, step, cfg.meta_steps))
            bar.update()
            done = step + 1 == cfg.meta_steps
            if done or due(cfg, step, cfg.meta_steps):
                rng = seed_everything(EVAL_SEED, "eval", 1)
                noise = torch.randn(*test["mask"].shape, cfg.n_z, device=run.device)
                with torch.no_grad(), autocast(run):
                    _, out = discovery_loss(base, meta.eval(), test["obs"], test["action"], test["mask"], noise, alpha)
                scores = gate_scores(out["beta"], test["switches"], test["mask"])
                few = {"codes": 64, "layouts": 16} if cfg.body == "ant" else {}  # of the ant's long episodes
                identity, most = code_identity(base, meta.decoder, world, rng, n_z=cfg.n_z, **few)
                _, success, _ = internal_episodes(base, meta, world, rng, cfg.eval_episodes)
                log(run, name, bar, ("nll", "known", "kl_per_episode", "switches", "true_switches", "precision", "recall", "f1", "undecided",
                                     "code_identity", "code_success"),
                    step=step + 1, seconds=saver.seconds(), alpha=alpha, nll=out["nll"].item(), bayes=bayes, known=known,
                    kl_per_episode=out["kl"].item() * test["mask"].sum(1).float().mean().item(), **scores,
                    code_identity=identity, code_identity_max=most, code_success=success.mean().item())
                T = int(test["mask"][0].sum())
                bar.write("      subgoal " + "".join(str(g) for g in test["subgoal"][0, :T].tolist()))
                bar.write("      gate    " + "".join("^" if b > .5 else "-" if b > .1 else "." for b in out["beta"][0, :T].tolist()))
            saver.step(step + 1, done)
        bar.close()
    learner.requires_grad_(False).eval()
    return base, meta


def reinforce(run, name, model, optimizer, update, trial, parent):
    """The loop of both kinds of RL. `update(rng)` plays a batch and learns from it; `trial(rng)` plays without learning.

    Both kinds see the same number of episodes; the layouts of their evaluations are the same.
    """
    cfg, world = run.cfg, world_of(run.cfg)
    first, seconds, done = resume(run, name, model, optimizer, parent)
    if not done:
        saver = Saver(run, name, model, optimizer, seconds, parent)
        bar = tqdm(total=cfg.rl_updates, initial=first, desc=name, unit="update", mininterval=1)
        for step in range(first, cfg.rl_updates):
            report = update(seed_everything(cfg.seed, name.split("-")[0], step))
            bar.update()
            done = step + 1 == cfg.rl_updates
            if done or due(cfg, step, cfg.rl_updates):
                data, success, gates = trial(seed_everything(EVAL_SEED, "eval", 2))
                log(run, name, bar, ("episodes", "success", *(key for key in ("abstract_actions", "std") if key in report), "eval_success"),
                    step=step + 1, seconds=saver.seconds(), episodes=(step + 1) * cfg.rl_batch, **report, eval_success=success.mean().item())
                bar.write(f"      task {'-'.join(map(str, world.post_task))}  visited {data.visited(0)}  gate "
                          + "".join("^" if b > .5 else "." for b in gates[0, :data.length[0]].tolist()))
            saver.step(step + 1, done)
        bar.close()
    return model.requires_grad_(False).eval()


def rl(run):
    """Stage 3 (C.5): internal RL on the post-training task, which no demonstration ever showed."""
    cfg, world = run.cfg, world_of(run.cfg)
    base, meta = discover(run)
    seed_everything(cfg.seed, "init", 3)
    policy = Policy(cfg.width, cfg.n_z, cfg.policy_width).to(run.device)

    def trial(rng):
        data, success, env = internal_episodes(base, meta, world, rng, cfg.eval_episodes, policy)
        return data, success, env.gates

    # Table A13: weight decay 0. NOT in paper: a rate of its own for the standard deviation, so that the policy narrows within the short
    # training of `grid-small`, once it has found the way.
    rest = [p for p in policy.parameters() if p is not policy.log_std]
    optimizer = adamw([{"params": rest}, {"params": [policy.log_std], "lr": cfg.std_lr}], cfg.rl_lr, 0.)
    update = lambda rng: internal_rl_step(base, meta, policy, optimizer, world, rng, cfg.rl_batch, cfg.rl_epochs, cfg.rl_clip)
    return base, meta, reinforce(run, "policy" + suffix(run), policy, optimizer, update, trial, meta)


def raw(run):
    """The rival (C.5.3): the same update and as many episodes, on raw actions, all weights of the base model trained."""
    cfg, world = run.cfg, world_of(run.cfg)
    parent = pretrain(run)
    base = copy.deepcopy(parent).requires_grad_(True)

    def trial(rng):
        data, success, _ = play(base, world, [world.post_task] * cfg.eval_episodes, rng)
        return data, success, np.ones(data.subgoal.shape)  # every step is a decision

    optimizer = adamw(base.parameters(), cfg.raw_lr, 0.)
    update = lambda rng: raw_rl_step(base, optimizer, world, rng, cfg.rl_batch, cfg.rl_epochs, cfg.rl_clip)
    return reinforce(run, "raw", base, optimizer, update, trial, parent)


def evaluate(run):
    """Success of everything whose training has ended, on the same fresh episodes of the post-training task (the ant's expert: on others of it), and what else
    is measured by playing. Printed, and written to eval.json (a rival's: eval-forced.json, eval-cotrain.json)."""
    run = dataclasses.replace(run, extend=False)
    world, n, kind = world_of(run.cfg), run.cfg.eval_episodes, suffix(run)
    rows = {}  # key -> (text, success)
    fresh_rng = lambda: seed_everything(EVAL_SEED, "eval", 3)
    alone = lambda model, rng: play(model, world, [world.post_task] * n, rng)[1]
    if not kind and world.body == "ant" and finished(run, "walker"):
        rows["expert_success"] = "the ant's expert, mean action, told the task", expert_success(run, expert(run), [world.post_task], n, noise=0)
    if not kind and finished(run, "base"):
        base, rng = pretrain(run), fresh_rng()
        # Blind success is rare: 20 times as many episodes.
        rows["blind_success"] = "blind sampling from the base model", [alone(base, rng) for _ in range(20)]
        if finished(run, "control"):
            rows["control_success"] = "true-subgoal controllers (C.3)", control_success(base, control(run), world, fresh_rng(), n)
    if finished(run, "meta" + kind):
        rows["code_success"] = "codes from the prior, before RL", internal_episodes(*discover(run), world, fresh_rng(), n)[1]
    if not kind and world.body == "ant" and finished(run, "meta"):
        with_code, without = transplant(*discover(run), world, fresh_rng(), n, at=30)  # B.3.2
        rows["transplant_with"] = "a colour's code put in at step 30 leads to it", with_code
        rows["transplant_without"] = "the same without the code", without
    if finished(run, "policy" + kind):
        title = {"": "internal RL", "-forced": "internal RL, forced switching", "-cotrain": "internal RL, co-trained base"}[kind]
        base, meta, policy = rl(run)
        data, success, env = internal_episodes(base, meta, world, fresh_rng(), n, policy)
        rows["rl_success"] = title, success
        for key, where, opened in zip(("gate_next_door", "gate_elsewhere"), ("straight from another colour", "from an empty cell"),
                                      opened_at_arrivals(world, data, env.gates)):
            if len(opened):
                rows[key] = f"under it the gate opens at an arrival {where}", opened
    if not kind and finished(run, "raw"):
        rows["raw_success"] = "raw-action RL", alone(raw(run), fresh_rng())
    if not rows:
        raise Refused(f"nothing in {run.folder} has been trained to its end: there is nothing to evaluate")
    rates = {key: float(np.mean(success)) for key, (_, success) in rows.items()}
    of_task = f"success on the post-training task {'-'.join(map(str, world.post_task))}, {n} episodes ({20 * n} blind), sampled actions"
    successes = [key for key in rows if key.endswith("_success")]
    for heading, keys in ((of_task, successes), ("also measured", [key for key in rows if key not in successes])):
        if keys:
            print(f"\n{heading}")
        for key in keys:
            print(f"  {rows[key][0]:62} {rates[key]:.4f}")
    write_atomically(run.folder / f"eval{kind}.json", json.dumps(rates).encode())


# ------------------------------------------------------------------------------------------------ 7. command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"train.py: {message}\n")  # one sentence, without the page of usage


def boolean(text):
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text == "True"


def parse(argv):
    """Command line -> (Run, stage, rival, names of the checkpoints to delete first). Exits with code 2 on anything unknown."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--stage", choices=STAGES, default="rl")
    parser.add_argument("--preset", choices=PRESETS, default="grid-small")
    parser.add_argument("--rival", choices=RIVALS, default="none", help="raw: raw-action RL alone; forced: beta = 1 from stage 2 on; "
                        "cotrain: base and metacontroller trained together")
    parser.add_argument("--out", default="runs", help="folder for checkpoints and logs")
    parser.add_argument("--fresh", action="store_true", help="first delete the checkpoints of the stage and of its inputs; "
                        "with --rival, only the rival's own")
    for field in dataclasses.fields(Config):
        parser.add_argument(f"--{field.name}", type=boolean if field.type is bool else field.type, metavar=field.type.__name__,
                            help=field.metadata["help"])
    args = vars(parser.parse_args(argv))
    chosen = {field.name: args[field.name] for field in dataclasses.fields(Config) if args[field.name] is not None}
    cfg, stage, rival = dataclasses.replace(PRESETS[args["preset"]], **chosen), args["stage"], args["rival"]
    if cfg.gate == "forced" or cfg.joint:
        raise Refused("--gate forced and --joint True are what --rival forced and --rival cotrain do: use these")
    cfg.gate, cfg.joint = "forced" if rival == "forced" else cfg.gate, rival == "cotrain"
    check(cfg)
    if stage == "expert" and cfg.body != "ant":
        raise Refused("--stage expert trains the ant's walker; the grid's experts need no training")
    if rival == "raw" and stage not in ("rl", "eval") or rival != "none" and stage in ("expert", "pretrain", "control"):
        raise Refused(f"--rival {rival} has no --stage {stage} of its own")
    if args["fresh"] and stage == "eval":
        raise Refused("--fresh does not go with --stage eval, which trains nothing")
    run = Run(cfg, args["preset"], Path(args["out"]) / args["preset"] / f"seed{cfg.seed}", fresh=args["fresh"] and rival == "none")
    # A rival has files of its own. Only these are deleted by --fresh: the base, which it may share, is the whole path's.
    needed = (*["walker"] * (cfg.body == "ant" and stage != "expert"), *NEEDS[stage])
    own = {"none": ("walker", *NEEDS["rl"]), "raw": ("raw",), "forced": ("meta", "policy"), "cotrain": ("meta", "policy")}[rival]
    reads = {"forced": ("walker", "base", *own), "cotrain": ("walker", *["base"] * (cfg.body == "ant"), *own)}.get(rival, ("walker", *NEEDS["rl"]))
    named = lambda kept: tuple(name + (suffix(run) if name in ("meta", "policy") else "") for name in needed if name in kept)
    run.names = named(reads)
    return run, stage, rival, named(own) if args["fresh"] else ()


def main(argv=None):
    try:
        run, stage, rival, stale = parse(argv)
        for name in run.names:
            if name not in stale:
                read_checkpoint(run, name)  # refuse bad files now, before anything is deleted, and not after an hour of training
        for name in stale:
            for kind in ("pt", "jsonl"):
                (run.folder / f"{name}.{kind}").unlink(missing_ok=True)
            if name == "walker":
                for kind in ("noisy", "clean"):
                    shutil.rmtree(run.folder / f"demonstrations-{kind}", ignore_errors=True)
        if stale:
            (run.folder / f"eval{suffix(run)}.json").unlink(missing_ok=True)  # it speaks of weights that are gone
        print(f"{run.preset}, seed {run.cfg.seed}: " + " ".join(f"{k}={v}" for k, v in dataclasses.asdict(run.cfg).items()))
        for name in run.names if stage != "eval" else ():
            use_shipped(run, name)
        choose_device(run)
        if stage == "rl" and rival == "raw":
            raw(run)
        elif stage == "rl":
            if rival == "none":
                control(run)
            rl(run)
            if rival == "none":
                raw(run)
        elif stage != "eval":
            {"expert": expert, "pretrain": pretrain, "control": control, "discover": discover}[stage](run)
        if stage in ("rl", "eval"):
            evaluate(run)
    except Refused as refusal:
        print(f"train.py: {refusal}", file=sys.stderr)
        return 2
    except (FloatingPointError, OSError) as error:  # a diverged loss; a folder that can't be written, a full disk
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; the same command, without --fresh, goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
