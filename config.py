"""What can be set: every field with its meaning, the presets, what can't work, the command line.

  1. Config         every field of it, and what each checkpoint depends on
  2. PRESETS        the configurations by name: a world of yours is a new one
  3. check          one sentence and exit code 2 for whatever can't work, before any work is done
  4. command line   every field as an option

Paper sections: Tables A4, A5, A7 to A10, A13, A14, A16: the defaults are the paper's grid.
Glossary: the fields' own help texts; DEPENDS says which of them make another checkpoint.
"""
import argparse
import dataclasses
import math
import os
from dataclasses import dataclass, field, fields

import numpy as np
import torch

import parallel
from envs import World, generate


class Refused(Exception):
    """The request can't be carried out as it stands: one sentence for the user, exit code 2."""


# ---------------------------------------------------------------------------------------- 1. Config

def option(default, group, text, body=""):
    """A field of Config. group: see GROUPS and DEPENDS; body: the only one it has a meaning for."""
    return field(default=default, metadata={"group": group, "help": text, "body": body})


@dataclass
class Config:
    """Everything that can be set. The defaults are the paper's grid (Tables A4, A7, A9, A13, A16)
    where the paper gives a value; alpha_ramp and what is the ant's are ours.
    """
    G: int = option(7, "world", "side of the grid")
    O: int = option(8, "world", "number of colours")
    W: int = option(4, "world", "number of walls")
    T: int = option(100, "world", "horizon, steps")
    task_set: str = option("pairs", "world", "pairs (Table A1), singles (A2), quad or tiny")
    body: str = option("point", "world", "point (A.1) or ant (A.2)")

    walker_updates: int = option(600, "walker", "PPO iterations of the ant's walker", "ant")
    walker_lr: float = option(1e-3, "walker", "learning rate of PPO", "ant")
    demonstrations: int = option(20_000, "demonstrations", "episodes in each of two sets", "ant")

    width: int = option(256, "base", "D, width of the residual stream")
    layers: int = option(6, "base", "L, number of blocks")
    heads: int = option(4, "base", "heads of attention or of Hawk")
    hidden: int = option(512, "base", "hidden units of a block's MLP")
    buckets: int = option(32, "base", "buckets of the relative position bias")
    mixer: str = option("attention", "base", "sequence mixer of the base: attention or hawk")
    relative: bool = option(False, "base", "embed displacements from the agent, not cells")
    lam: float = option(0.01, "base", "lambda, weight of the observation loss")
    eps: float = option(0., "base", "share of random actions in the base's data", "point")
    base_steps: int = option(256_000, "base", "optimiser steps")
    base_batch: int = option(1024, "base", "episodes per step")
    base_lr: float = option(3e-4, "base", "learning rate")
    base_wd: float = option(0.03, "base", "weight decay")
    thin: float = option(0., "base", "share of each stage's steps that see thinned episodes", "ant")
    thin_batch: int = option(128, "base", "episodes per step while they are thinned", "ant")
    turn: bool = option(False, "base", "turn or reflect the base's episodes", "ant")
    start: str = option("", "base", "preset of a board no larger: begin with its weights", "point")
    base_join: float = option(0., "base", "share of the base's episodes that follow another one")
    warmup: int = option(0, "base", "steps of linear warm-up, in every supervised stage")
    decay: float = option(0., "base", "last share of every supervised stage: rate falls to 0")

    layer: int = option(3, "split", "l, the controlled layer: 0 (embedding) to L")
    symmetric: bool = option(False, "split", "steer a turned or reflected view (train.view_of)")
    join: float = option(0., "split", "share of unspliced views that follow another episode")

    rank: int = option(16, "control", "rank of the true-subgoal controllers; 0 = full matrix")
    control_steps: int = option(3200, "control", "optimiser steps")
    control_batch: int = option(512, "control", "episodes per step")
    control_lr: float = option(1e-3, "control", "learning rate")
    control_wd: float = option(0.03, "control", "weight decay")

    n_z: int = option(8, "meta", "dimension of the code")
    n_h: int = option(32, "meta", "width of the GRU")
    switch_hidden: int = option(32, "meta", "hidden units of the switch")
    forget: float = option(0., "meta", "share of episodes in which the switch does not see h")
    keep: float = option(.1, "meta", "share of steps that thinned episodes keep in the end", "ant")
    n_s: int = option(32, "meta", "dimension of the sequence embedding")
    encoder_hidden: int = option(64, "meta", "hidden units of the encoder")
    meta_rank: int = option(16, "meta", "rank of the decoder's controllers; 0 = full matrix")
    decoder_hidden: int = option(32, "meta", "hidden units of the decoder")
    gate: str = option("soft", "meta", "soft or gumbel (E.1); what rivals set: forced, compile")
    joint: bool = option(False, "meta", "what --rival cotrain sets")
    segments: int = option(4, "meta", "M, most segments of an episode (--rival compile)")
    segment_rate: int = option(10, "meta", "a segment's length, prior (--rival compile)")
    alpha_b: float = option(1., "meta", "weight of the KL of ends, in alphas (--rival compile)")
    alpha: float = option(0.17, "meta", "weight of the KL")
    alpha_start: int = option(0, "meta", "steps before alpha begins to grow from 0")
    alpha_ramp: int = option(1500, "meta", "steps over which alpha then grows")
    splice: float = option(0., "meta", "share of views with another's end, fading as alpha grows")
    hold: float = option(0., "meta", "share of steps that give no code, before the release")
    release: int = option(0, "meta", "steps without holding before alpha begins to grow")
    meta_steps: int = option(64_000, "meta", "optimiser steps")
    meta_batch: int = option(512, "meta", "episodes per step")
    meta_lr: float = option(1e-3, "meta", "learning rate")
    meta_wd: float = option(0.03, "meta", "weight decay")
    meta_seed: int = option(0, "meta", "another metacontroller on the same base")

    # Not in "world": base, controllers and metacontroller serve every post-training task.
    post_task: str = option("", "rl", "task of RL, such as 0-1-2; empty: the task set's own")
    grow: int = option(0, "rl", "updates with each of the task's beginnings, before the whole")
    rl_batch: int = option(1024, "rl", "episodes per update")
    rl_epochs: int = option(1, "rl", "clipped steps per batch of episodes")
    policy_width: int = option(256, "policy", "width of the policy's Hawk layer")
    rl_lr: float = option(3e-5, "policy", "learning rate of internal RL")
    std_lr: float = option(3e-5, "policy", "learning rate of the policy's standard deviation")
    raw_lr: float = option(3e-5, "raw", "learning rate of raw-action RL")

    rl_updates: int = option(100_000, "run", "updates of RL; a finished run can be extended")
    eval_episodes: int = option(2000, "run", "episodes per reported success rate")
    evaluations: int = option(20, "run", "evaluations per stage")
    save_seconds: float = option(60., "run", "seconds between checkpoints")
    seed: int = option(0, "run", "seed of everything")
    threads: int = option(0, "run", "CPU threads; 0 = PyTorch's choice")
    device: str = option("auto", "run", "auto, cpu or cuda")
    dtype: str = option("auto", "run", "auto, float32 or bfloat16 (supervised stages only)")
    graphs: bool = option(True, "run", "on CUDA, replay the grid's supervised steps as CUDA graphs")


# What a group is for, and where its fields act. (The order of fields is by what depends on them.)
GROUPS = {"world": "the world (A.1.2, A.2.2): envs.World",
          "walker": "the ant's expert (C.1.1): ant.expert",
          "demonstrations": "the ant's demonstrations, simulated once: ant.Demonstrations",
          "base": "stage 1: the base model (Tables A4, A16): train.new_base, train.pretrain",
          "split": "where and on what the stream is steered (Tables A7, A9): train.view_of",
          "control": "controllers of true subgoals (Table A7): train.control",
          "meta": "stage 2: the metacontroller (Table A9): train.new_metacontroller, "
          "train.discover",
          "rl": "stage 3, both kinds of RL (Table A13): train.rl, train.raw",
          "policy": "stage 3, internal RL: train.rl", "raw": "stage 3, raw-action RL: train.raw",
          "run": "how to run (a checkpoint asks for its seed, and for none of the others)"}
# Which groups a checkpoint depends on: with other values of those it would be another checkpoint.
_BASE = ("world", "walker", "demonstrations", "base")
DEPENDS = {"walker": ("walker",), "base": _BASE, "control": (*_BASE, "split", "control"),
           "meta": (*_BASE, "split", "meta"), "policy": (*_BASE, "split", "meta", "rl", "policy"),
           "raw": (*_BASE, "rl", "raw")}
# Fields of earlier versions that changed what a checkpoint learns, and what is done today.
GONE = {"compass": False}
# What a checkpoint must share with one that begins with its weights (--start).
SIZES = ("body", "O", "relative", "width", "layers", "heads", "hidden", "buckets", "mixer", "layer",
         "gate", "n_z", "n_h", "n_s", "switch_hidden", "encoder_hidden", "meta_rank",
         "decoder_hidden")
STEPS = {"walker": "walker_updates", "base": "base_steps", "control": "control_steps",
         "meta": "meta_steps", "policy": "rl_updates", "raw": "rl_updates"}
CHOICES = {"gate": ("soft", "gumbel"), "mixer": ("attention", "hawk"),
           "dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda")}
MAY_BE_ZERO = ("W", "layer", "splice", "hold", "join", "base_join", "lam", "eps", "alpha",
               "alpha_start", "alpha_ramp", "alpha_b", "release", "grow", "rank", "meta_rank",
               "warmup", "decay", "save_seconds", "seed", "threads", "thin", "forget", "keep",
               "base_wd", "control_wd", "meta_wd", "meta_seed")
SHARES = ("decay", "splice", "hold", "join", "base_join", "thin", "forget", "keep")


# --------------------------------------------------------------------------------------- 2. presets

PRESETS = {
    # Seconds. Every stage runs; nothing is learned well. The tests use it.
    "smoke": Config(
        G=3, O=3, W=0, T=12, task_set="tiny", width=32, layers=2, heads=2, hidden=64,
        relative=True, lam=0.01, base_steps=150, base_batch=32, base_lr=3e-3,
        base_join=.5, layer=1, symmetric=True, splice=.5, join=.5,
        rank=4, control_steps=40, control_batch=32, control_lr=1e-2,
        n_h=16, n_s=8, encoder_hidden=16, decoder_hidden=16, meta_rank=4, meta_steps=60,
        meta_batch=32, meta_lr=3e-3, alpha_ramp=40, policy_width=32, rl_updates=10, rl_batch=64,
        rl_lr=1e-3, std_lr=1e-3, raw_lr=1e-3, eval_episodes=200, evaluations=3, save_seconds=1.),
    # A laptop. What differs from the paper, and why: docs/notes.md.
    "grid-small": Config(
        G=5, O=4, W=0, T=50, task_set="singles", post_task="0-1-2-3-0",
        width=128, layers=4, heads=4, hidden=256, relative=True, lam=.1, warmup=100, decay=.5,
        base_steps=12_000, base_batch=64, base_lr=3e-3, base_join=.5,
        layer=2, symmetric=True, splice=1.,
        control_steps=2000, control_batch=128, control_lr=3e-3,
        decoder_hidden=64, meta_steps=6000, meta_batch=128, meta_lr=1.5e-3, alpha=.03,
        alpha_start=3000, alpha_ramp=1500, segment_rate=3,
        rl_updates=200, rl_batch=512, rl_lr=1e-3, std_lr=1e-2, raw_lr=3e-4, rl_epochs=2,
        evaluations=10),
    # Subgoals of two colours: four pairs, as in the paper, on the board of grid-small. Left to
    # themselves codes would tell the way to the next colour; those that have to last while alpha is
    # 0 name pairs. alpha is large enough that a gate which opens inside a pair does not pay.
    "grid-quad": Config(
        G=5, O=8, W=0, T=50, task_set="quad",
        width=128, layers=4, heads=4, hidden=256, relative=True, lam=.1, warmup=100, decay=.5,
        base_steps=6000, base_batch=64, base_lr=3e-3, base_join=.5,
        layer=2, symmetric=True, join=.5, control_steps=2000, control_batch=128, control_lr=3e-3,
        decoder_hidden=64, splice=1., hold=.75, meta_steps=6000, meta_batch=128, meta_lr=1.5e-3,
        alpha=.3, alpha_start=3000, alpha_ramp=1500, segment_rate=7,
        rl_updates=600, rl_batch=512, rl_lr=1e-3, std_lr=1e-2, raw_lr=3e-4, rl_epochs=2,
        evaluations=10),
    # The paper's own world, A.1 exactly, with a small network and control at mid-depth. Stage 1 and
    # C.3 are measured, and the base shipped. Stage 2 was measured in pieces on a poorer base of
    # joined demonstrations, where codes come to name pairs and the gate to open at their ends, not
    # on this one (on one made from it they became addresses); stage 3 is a guess (docs/results.md).
    "grid-pairs": Config(
        width=256, layers=4, heads=4, hidden=512, relative=True, lam=0., warmup=100, decay=.5,
        base_steps=40_000, base_batch=64, base_lr=3e-3,
        layer=2, symmetric=True, join=.5, control_steps=11_000, control_batch=64,
        control_lr=3e-3, decoder_hidden=64, splice=1., hold=.75, release=6000,
        meta_steps=20_000, meta_batch=128, meta_lr=1.5e-3, alpha=.07, alpha_start=14_000,
        alpha_ramp=3000, rl_updates=1000, rl_batch=512, rl_lr=1e-3, std_lr=1e-2, raw_lr=3e-4,
        rl_epochs=2),
    # The paper's gridworld, sizes and rates: A.1, Tables A4, A7, A9, A13, A16. What remains
    # different (initialisers, ramp of alpha, clipping, sorting by length) is marked NOT in paper.
    "grid-paper": Config(),
    # The ant on a laptop: chosen on seeds 0 to 2. Splices last to the end of stage 2: where they
    # had ended before, codes no longer led where no demonstration goes, and RL solved nothing.
    "ant-small": Config(
        body="ant", G=4, O=4, W=1, T=500, task_set="singles",
        demonstrations=16_000, mixer="hawk", width=96, layers=4, heads=4, hidden=256,
        relative=True, lam=.2, warmup=100, decay=.5, thin=.92, turn=True,
        base_steps=14_000, base_batch=32, base_lr=1e-2,
        layer=0, symmetric=True, splice=1., join=.5,
        rank=0, control_steps=1500, control_batch=32, control_lr=3e-3,
        n_h=64, switch_hidden=128, forget=.5, keep=.2, decoder_hidden=64, meta_rank=0,
        meta_steps=4500, meta_batch=32, meta_lr=1.5e-3, alpha=5., alpha_start=700,
        alpha_ramp=3800, rl_updates=150, rl_batch=256, rl_lr=1e-3, std_lr=1e-2, raw_lr=3e-4,
        rl_epochs=2, evaluations=6, eval_episodes=256),
    # The paper's ant: A.2, Tables A5, A8, A10, A14. NOT in paper, which does not say how many
    # demonstrations there are: 200,000, each seen about 500 times. Not tried at full length.
    "ant-paper": Config(
        body="ant", G=4, O=4, W=1, T=500, task_set="singles", demonstrations=200_000,
        mixer="hawk", layers=8, heads=8, lam=10., base_steps=204_800, base_batch=512, layer=4,
        rank=0, control_batch=256, control_lr=3e-4, meta_rank=0, meta_steps=32_000,
        meta_batch=128, meta_lr=3e-4, rl_batch=256, rl_updates=51_200),
}


# ----------------------------------------------------------------------------------------- 3. check

def world_of(cfg):
    """The World that a Config describes."""
    return World(G=cfg.G, O=cfg.O, W=cfg.W, T=cfg.T, task_set=cfg.task_set, post=cfg.post_task,
                 body=cfg.body)


def memory_needed(cfg):
    """About how many bytes the largest stage takes at once: a lower bound, for `check`."""
    cells, K, D = cfg.G ** 2, cfg.O + cfg.W + 1, cfg.width
    block = 4 * D * D + 2 * D * cfg.hidden
    embedding = K * max(cells, (2 * cfg.G - 1) ** 2) * D * (2 if cfg.lam else 1)
    controllers = sum(hidden * (2 * D * rank if rank else D * D) for hidden, rank in
                      ((32, cfg.rank), (cfg.decoder_hidden, cfg.meta_rank)))
    small = cfg.encoder_hidden * (D + cfg.n_h + cfg.n_s) + 3 * cfg.n_h * (D + cfg.n_h)
    parameters = cfg.layers * block + embedding + controllers + small + 8 * cfg.policy_width ** 2
    episodes = max(cfg.eval_episodes, cfg.rl_batch)  # played at once, each with its cache
    cache = episodes * cfg.layers * 2 * D * (cfg.T if cfg.mixer == "attention" else 1)
    bias = cfg.heads * cfg.T ** 2 if cfg.mixer == "attention" else 0
    record = episodes * cfg.T * (cfg.n_z + 8)
    batch = max(cfg.base_batch, cfg.control_batch, cfg.meta_batch)
    layouts = min(8192, 35 * batch) * cells * (2 * cfg.O + 4)  # paths and contents, in 4 bytes
    shortest = min(cfg.T, 10)  # steps that an episode has at least, in the longest batch
    factors = 2 * D * max(cfg.rank, cfg.meta_rank)
    activations = batch * shortest * (cfg.layers * (8 * D + 2 * cfg.hidden) + factors)
    return 4 * (4 * parameters + cache + bias + record + layouts + activations)


def machine_memory():
    """Bytes of memory, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not a POSIX system
        return math.inf


def check(cfg, preset):
    """Raise Refused unless this configuration can work. Called before anything is written."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.type in (int, float):
            least = "be from 0" if f.name in MAY_BE_ZERO else "be positive, up"
            fits = value > 0 or value == 0 and f.name in MAY_BE_ZERO
            if not (fits and value < 1e18):  # NaN does not
                raise Refused(f"--{f.name} must {least} to 1e18, and is {value}")
        if f.metadata["body"] not in ("", cfg.body) and value != f.default:
            raise Refused(f"--{f.name} is for the {f.metadata['body'].replace('point', 'grid')}")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise Refused(f"--{name} must be one of {', '.join(choices)}, "
                          f"not '{getattr(cfg, name)}'")
    if cfg.rl_batch < 2:
        raise Refused("--rl_batch must be at least 2: an episode is compared with the others")
    for name in SHARES:
        if getattr(cfg, name) > 1:
            raise Refused(f"--{name} is a share, at most 1, and is {getattr(cfg, name)}")
    if cfg.eps >= 1:
        raise Refused(f"--eps must be below 1, and is {cfg.eps}")
    if cfg.hold and cfg.release >= cfg.alpha_start:
        raise Refused(f"--hold {cfg.hold} would hold nothing: codes are held until step "
                      f"--alpha_start {cfg.alpha_start} less --release {cfg.release}")
    if cfg.width % cfg.heads or cfg.policy_width % 8:
        raise Refused(f"--width {cfg.width} must be a multiple of --heads {cfg.heads}, and "
                      f"--policy_width {cfg.policy_width} of 8")
    if not 2 <= cfg.buckets <= 128:
        raise Refused(f"--buckets {cfg.buckets} must be between 2 and 128")
    pairs = 2 * parallel.count()  # a view's two episodes stay together
    for name in ("base_batch", "thin_batch", "control_batch", "meta_batch", "rl_batch"):
        used = name != "thin_batch" or cfg.thin
        if parallel.count() > 1 and used and getattr(cfg, name) % pairs:
            raise Refused(f"--{name} {getattr(cfg, name)} can't be shared by {parallel.count()} "
                          f"processes: it must be a multiple of {pairs}")
    if cfg.start and cfg.start not in PRESETS:
        raise Refused(f"--start must be one of {', '.join(PRESETS)}, not '{cfg.start}'")
    if PRESETS.get(cfg.start) is preset:
        raise Refused(f"--start {cfg.start}: nothing can begin with its own weights")
    if cfg.start and not cfg.relative:
        raise Refused("--start needs --relative True: cells of another board mean other places")
    if cfg.layer > cfg.layers:
        raise Refused(f"--layer {cfg.layer} does not exist: the model has layers 0 to "
                      f"{cfg.layers}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda was asked for, but PyTorch sees no CUDA device here")
    mine, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if cfg.device != "cpu" and 0 < gpus < mine:
        raise Refused(f"{mine} processes need as many GPUs, and there are {gpus}")
    memory = machine_memory()
    if memory_needed(cfg) > memory:
        changed = [f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(preset, f.name)]
        saved = {name: memory_needed(cfg) - memory_needed(dataclasses.replace(
            cfg, **{name: getattr(preset, name)})) for name in changed}
        worst = max(saved, key=saved.get) if saved else None
        blame = f"--{worst} {getattr(cfg, worst)}" if saved else "the preset"
        raise Refused(f"{blame} asks for more memory than there is: at least "
                      f"{memory_needed(cfg) / 2 ** 30:,.0f} GiB of {memory / 2 ** 30:.0f}")
    try:
        # On the grid, whatever the body: what can't be finished there can't be walked either.
        grid = dataclasses.replace(world_of(cfg), body="point")
        generate(grid, np.random.default_rng(0), 8, cfg.eps)
    except ValueError as error:
        raise Refused(str(error)) from None


# ---------------------------------------------------------------------------------- 4. command line

class Parser(argparse.ArgumentParser):
    """One sentence and exit code 2 on whatever it does not understand."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")  # without the page of usage

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if isinstance(value, list):  # what argparse makes of `--alpha=--`
                self.error(f"argument --{name}: expected one value")
        return args


def boolean(text):
    """"True" or "False" -> bool; else ArgumentTypeError."""
    if text not in ("True", "False"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return text == "True"


def add_options(parser):
    """Every field of Config as an option, in its groups."""
    for group, title in GROUPS.items():
        section = parser.add_argument_group(title)
        for f in fields(Config):
            if f.metadata["group"] == group:
                section.add_argument(f"--{f.name}", type=boolean if f.type is bool else f.type,
                                     metavar=f.type.__name__, help=f"{f.metadata['help']} "
                                     f"[grid-paper: {f.default if f.default != '' else 'none'}]")


def configured(args, preset):
    """The preset's Config, with what the command line says otherwise."""
    given = {f.name: args[f.name] for f in fields(Config) if args[f.name] is not None}
    return dataclasses.replace(preset, **given)
