"""How a run is kept: what can be set, the command line, checkpoints, logs, resuming, the device.

A reader of the course needs `Config` only, the list of what can be set. The rest is plumbing.

  1. configuration   every field of it, and what each checkpoint depends on
  2. checkpoints     whole or refused, written atomically, with a fingerprint of what made them
  3. Training        the one loop of every stage: resume, bar, evaluations, log, save, stop
  4. device          device, precision and compiler, chosen by looking
  5. command line    one sentence and exit code 2 for whatever can't work, before any work is done

How a resumed run can equal an uninterrupted one, bit for bit: nothing random depends on the past.
Before step k of a stage, torch's generator is seeded with (seed, stage, k), and NumPy's, which
draws episodes, likewise before every chunk of steps; so a checkpoint needs model, optimiser and
step, and no generator states. It holds on the same CPU with the same number of threads; CUDA's own
kernels are not all deterministic.

Files: runs/<preset>/seed<k>/*.pt and, for each, a .jsonl of metrics. Keys of every line: step,
seconds (spent so far); the others are named in train.py, where they are reported.
"""
import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
import signal
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import parallel
from envs import World, generate

ASSETS = Path(__file__).parent / "assets"  # <preset>/seed<k>/: checkpoints that are shipped


class Refused(Exception):
    """The request can't be carried out as it stands: one sentence for the user, exit code 2."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, its number given; the step that was under way is saved."""


# --------------------------------------------------------------------------------- 1. configuration

def option(default, group, text, body=""):
    """A field of Config. group: see GROUPS and DEPENDS; body: the only one it has a meaning for."""
    return field(default=default, metadata={"group": group, "help": text, "body": body})


@dataclass
class Config:
    """Everything that can be set. The defaults are the paper's grid (Tables A4, A7, A9, A13, A16)
    where the paper gives a value; alpha_ramp, rl_clip, buckets and what is the ant's are ours.
    """
    G: int = option(7, "world", "side of the grid")
    O: int = option(8, "world", "number of colours")
    W: int = option(4, "world", "number of walls")
    T: int = option(100, "world", "horizon, steps")
    task_set: str = option("pairs", "world", "pairs (Table A1), singles (Table A2) or tiny")
    body: str = option("point", "world", "point (A.1) or ant (A.2)")
    compass: bool = option(False, "world", "name the ant's limbs by where they point", "ant")

    walker_updates: int = option(600, "walker", "PPO iterations of the ant's walker", "ant")
    walker_lr: float = option(1e-3, "walker", "learning rate of PPO", "ant")
    demonstrations: int = option(20_000, "demonstrations", "episodes in each of two sets", "ant")

    width: int = option(256, "base", "D, width of the residual stream")
    layers: int = option(6, "base", "L, number of blocks")
    heads: int = option(4, "base", "attention heads")
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
    warmup: int = option(0, "base", "steps of linear warm-up, in every supervised stage")
    decay: float = option(0., "base", "last share of every supervised stage: rate falls to 0")

    layer: int = option(3, "split", "l, the controlled layer: 0 (embedding) to L")
    symmetric: bool = option(False, "split", "steer a turned or reflected view (train.view_of)")
    splice: float = option(0., "split", "share, of views not shuffled, with another's past")
    shuffle: float = option(0., "split", "share of views whose past has its colours exchanged")
    join: float = option(0., "split", "share, of the others, after another whole demonstration")

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
    read: int = option(0, "meta", "layer that is read, if above the controlled one")
    gate: str = option("soft", "meta", "soft or gumbel (E.1); forced is what --rival forced sets")
    joint: bool = option(False, "meta", "what --rival cotrain sets")
    alpha: float = option(0.17, "meta", "weight of the KL")
    alpha_start: int = option(0, "meta", "steps before alpha begins to grow from 0")
    alpha_ramp: int = option(1500, "meta", "steps over which alpha, and shuffle, then grow")
    meta_steps: int = option(64_000, "meta", "optimiser steps")
    meta_batch: int = option(512, "meta", "episodes per step")
    meta_lr: float = option(1e-3, "meta", "learning rate")
    meta_wd: float = option(0.03, "meta", "weight decay")

    # Not in "world": base, controllers and metacontroller serve every post-training task.
    post_task: str = option("", "rl", "task of RL, such as 0-1-2; empty: the task set's own")
    rl_batch: int = option(1024, "rl", "episodes per update")
    rl_epochs: int = option(1, "rl", "clipped steps per batch of episodes")
    rl_clip: float = option(0.2, "rl", "clip range of the ratio")
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
    compile: str = option("auto", "run", "auto, off, inductor or cudagraphs")


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
          "run": "how to run (no checkpoint depends on these; each seed has its own folder)"}
# Which groups a checkpoint depends on: with other values of those it would be another checkpoint.
_BASE = ("world", "walker", "demonstrations", "base")
DEPENDS = {"walker": ("walker",), "base": _BASE, "control": (*_BASE, "split", "control"),
           "meta": (*_BASE, "split", "meta"), "policy": (*_BASE, "split", "meta", "rl", "policy"),
           "raw": (*_BASE, "rl", "raw")}
STEPS = {"walker": "walker_updates", "base": "base_steps", "control": "control_steps",
         "meta": "meta_steps", "policy": "rl_updates", "raw": "rl_updates"}
CHOICES = {"gate": ("soft", "gumbel", "forced"), "mixer": ("attention", "hawk"),
           "dtype": ("auto", "float32", "bfloat16"), "device": ("auto", "cpu", "cuda"),
           "compile": ("auto", "off", "inductor", "cudagraphs")}
MAY_BE_ZERO = ("W", "layer", "splice", "shuffle", "join", "lam", "eps", "alpha", "alpha_start",
               "alpha_ramp", "read", "rank", "meta_rank", "warmup", "decay", "save_seconds", "seed",
               "threads", "thin", "forget", "keep", "base_wd", "control_wd", "meta_wd")
SHARES = ("decay", "splice", "shuffle", "join", "thin", "forget", "keep")


def world_of(cfg):
    return World(G=cfg.G, O=cfg.O, W=cfg.W, T=cfg.T, task_set=cfg.task_set, post=cfg.post_task,
                 body=cfg.body, compass=cfg.compass)


def memory_needed(cfg):
    """About how many bytes the largest stage takes at once: a lower bound, for `check`."""
    cells, things, D = cfg.G ** 2, cfg.O + cfg.W + 1, cfg.width
    block = 4 * D * D + 2 * D * cfg.hidden
    embedding = things * max(cells, (2 * cfg.G - 1) ** 2) * D * (2 if cfg.lam else 1)
    controllers = sum(hidden * (2 * D * rank if rank else D * D) for hidden, rank in
                      ((32, cfg.rank), (cfg.decoder_hidden, cfg.meta_rank)))
    small = cfg.encoder_hidden * (D + cfg.n_h + cfg.n_s) + 3 * cfg.n_h * (D + cfg.n_h)
    parameters = cfg.layers * block + embedding + controllers + small + 8 * cfg.policy_width ** 2
    episodes = max(cfg.eval_episodes, cfg.rl_batch)  # played at once, each with its cache
    cache = episodes * cfg.layers * 2 * D * (cfg.T if cfg.mixer == "attention" else 1)
    bias = cfg.heads * min(cfg.T, 10 ** 9) ** 2 if cfg.mixer == "attention" else 0
    record = episodes * cfg.T * (cfg.n_z + 8)
    batch = max(cfg.base_batch, cfg.control_batch, cfg.meta_batch)
    layouts = min(8192, 35 * batch) * cells * (2 * cfg.O + 4)  # paths and contents, in 4 bytes
    shortest = min(cfg.T, 10)  # steps that an episode has at least, in the longest batch
    factors = 2 * D * max(cfg.rank, cfg.meta_rank)
    activations = batch * shortest * (cfg.layers * (8 * D + 2 * cfg.hidden) + factors)
    return 4 * (4 * parameters + cache + bias + record + layouts + activations)


def check(cfg, preset):
    """Raise Refused unless this configuration can work. Called before anything is written."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if f.type in (int, float):
            least = "not be negative" if f.name in MAY_BE_ZERO else "be positive"
            fits = value > 0 or value == 0 and f.name in MAY_BE_ZERO  # NaN does not
            if not (fits and math.isfinite(value)):
                raise Refused(f"--{f.name} must {least}, and is {value}")
        if f.metadata["body"] not in ("", cfg.body) and value != f.default:
            raise Refused(f"--{f.name} is for the {f.metadata['body'].replace('point', 'grid')}")
    for name, choices in CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise Refused(f"--{name} must be one of {', '.join(choices)}, "
                          f"not '{getattr(cfg, name)}'")
    for name in SHARES:
        if getattr(cfg, name) > 1:
            raise Refused(f"--{name} is a share, at most 1, and is {getattr(cfg, name)}")
    if cfg.eps >= 1:
        raise Refused(f"--eps must be below 1, and is {cfg.eps}")
    if cfg.width % cfg.heads or cfg.policy_width % 8:
        raise Refused(f"--width {cfg.width} must be a multiple of --heads {cfg.heads}, and "
                      f"--policy_width {cfg.policy_width} of 8")
    if not 2 <= cfg.buckets <= 128:
        raise Refused(f"--buckets {cfg.buckets} must be between 2 and 128")
    pairs = 2 * parallel.count()  # a view's two episodes stay together
    for name in ("base_batch", "thin_batch", "control_batch", "meta_batch", "rl_batch"):
        if parallel.count() > 1 and getattr(cfg, name) % pairs:
            raise Refused(f"--{name} {getattr(cfg, name)} can't be shared by {parallel.count()} "
                          f"processes: it must be a multiple of {pairs}")
    for name in ("layer", "read"):
        if getattr(cfg, name) > cfg.layers:
            raise Refused(f"--{name} {getattr(cfg, name)} does not exist: the model has layers 0 "
                          f"to {cfg.layers}")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda was asked for, but PyTorch sees no CUDA device here")
    cpu = cfg.device == "cpu" or not torch.cuda.is_available()
    if cfg.compile == "cudagraphs" and cpu:
        raise Refused("--compile cudagraphs needs a CUDA device")
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++", "c++", "cl"]
    if cfg.compile == "inductor" and cpu and not any(map(shutil.which, compilers)):
        raise Refused(f"--compile inductor needs a C++ compiler, and {' or '.join(compilers)} is "
                      f"not to be found")
    memory = machine_memory()
    if memory_needed(cfg) > memory:
        changed = [f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(preset, f.name)]
        saved = {name: memory_needed(cfg) - memory_needed(dataclasses.replace(
            cfg, **{name: getattr(preset, name)})) for name in changed}
        blame = max(saved, key=saved.get) if saved else "preset"
        raise Refused(f"--{blame} {getattr(cfg, blame, '')} asks for more memory than there is: "
                      f"at least {memory_needed(cfg) / 2 ** 30:,.0f} GiB of {memory / 2 ** 30:.0f}")
    try:
        # On the grid, whatever the body: what can't be finished there can't be walked either.
        grid = dataclasses.replace(world_of(cfg), body="point")
        generate(grid, np.random.default_rng(0), 8, cfg.eps)
    except ValueError as error:
        raise Refused(str(error)) from None


def machine_memory():
    """Bytes of memory, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not a POSIX system
        return math.inf


@dataclass
class Run:
    """One seed of one preset: its configuration, its folder, the resolved device and precision."""
    cfg: Config
    preset: str
    folder: Path
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    compiler: str = "off"
    names: tuple = ()  # the checkpoints that this invocation reads or writes
    extend: bool = True  # may a finished RL go on, if more updates are asked for?
    fresh: bool = False  # train also what is shipped
    kept: dict = field(default_factory=dict)  # what a body has loaded once (ant.py: its walker)


# ----------------------------------------------------------------------------------- 2. checkpoints

CONTENT = {"fingerprint": dict, "dtype": str, "parent": (str, type(None)), "step": int,
           "seconds": float, "done": bool, "model": dict, "optimizer": dict, "sha256": str}


def digest(content):
    """A hash of nested dicts, lists, tensors and plain values, names and types included."""
    total = hashlib.sha256()

    def feed(x):
        if isinstance(x, torch.Tensor):
            total.update(f"{x.dtype}{tuple(x.shape)}".encode())
            total.update(x.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(x, dict):
            for name, value in x.items():
                total.update(f"{{{name!r}:".encode())
                feed(value)
        elif isinstance(x, (list, tuple)):
            total.update(f"[{len(x)}".encode())
            for value in x:
                feed(value)
        else:
            total.update(repr(x).encode())
    feed(content)
    return total.hexdigest()


def load_checkpoint(path):
    """What a checkpoint holds, whole and well-formed, or Refused: the only place that reads one."""
    try:
        content = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # what torch.save writes
            bad = archive.testzip()
            foreign = any(name.endswith("constants.pkl") for name in archive.namelist())
        if bad or foreign:  # TorchScript archives would make PyTorch talk
            raise ValueError(bad or "a TorchScript archive")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(saved, dict):
            raise TypeError("not a dict")
        for name, kind in CONTENT.items():
            if not isinstance(saved[name], kind) or isinstance(saved[name], bool) != (kind is bool):
                raise TypeError(name)
        if saved["sha256"] != digest({k: v for k, v in saved.items() if k != "sha256"}):
            raise ValueError("sha256")
        sound = all(x.dtype == torch.float32 and x.isfinite().all()
                    for x in saved["model"].values())
        known = saved["dtype"] in ("torch.float32", "torch.bfloat16")
        if not (sound and known and saved["step"] >= 0 and 0 <= saved["seconds"] < math.inf):
            raise ValueError("weights, dtype, step or seconds")
    except Exception as error:  # whatever a damaged file does to zip and pickle, it is not loaded
        raise Refused(f"{path} is damaged, or no checkpoint of this program "
                      f"({type(error).__name__}): delete it, or start again with --fresh") from None
    return saved


def save_checkpoint(path, content):
    """`content` must have the keys of CONTENT but its sha256, which is added."""
    buffer = io.BytesIO()  # in memory first: a full disk is then an OSError like any other
    torch.save(content | {"sha256": digest(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path, content):
    """A reader sees the old file or the new one, never half of one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def suffix(run):
    """The rivals keep their own files beside the metacontroller's."""
    return "-cotrain" if run.cfg.joint else "-forced" if run.cfg.gate == "forced" else ""


def fingerprint(run, name):
    """The configuration fields that checkpoint `name` depends on."""
    groups = DEPENDS[name.split("-")[0]]
    values = {f.name: getattr(run.cfg, f.name) for f in fields(Config)
              if f.metadata["group"] in groups and f.metadata["body"] in ("", run.cfg.body)}
    seed = {} if name == "walker" else {"seed": run.cfg.seed}  # one expert may serve every seed
    return {"preset": run.preset, **seed, **values}


def difference(run, name, theirs):
    """The first field in which a checkpoint's fingerprint differs from what this run asks for:
    (field, theirs, ours), or None. A field that the checkpoint does not know is younger than it:
    it was made with that field's default."""
    defaults = asdict(Config())
    for key, ours in fingerprint(run, name).items():
        if theirs.get(key, defaults.get(key)) != ours:
            return key, theirs.get(key, defaults.get(key)), ours
    return None


def read_checkpoint(run, name):
    """The checkpoint `name`, or None if there is none. Refused if it is damaged, or one of another
    configuration, or further than this run shall go."""
    path = run.folder / f"{name}.pt"
    if not os.path.lexists(path):
        return None
    saved = load_checkpoint(path)
    if (other := difference(run, name, saved["fingerprint"])) is not None:
        raise Refused(f"{path} was made with {other[0]}={other[1]}, this run asks for "
                      f"{other[0]}={other[2]}: delete it, start again with --fresh, or use "
                      f"another --out")
    steps = getattr(run.cfg, STEPS[name.split("-")[0]])
    # RL that was finished with more updates is a result; one that is under way can't be cut short.
    result = name.startswith(("policy", "raw")) and (saved["done"] or not run.extend)
    if saved["step"] > steps and not result:
        raise Refused(f"{path} is at step {saved['step']}, more than the {steps} asked for: ask "
                      f"for more, or start again with --fresh")
    return saved


def finished(run, name):
    """Is there a checkpoint `name` whose training has ended? (One that was interrupted must not be
    mistaken for a result.)"""
    saved = read_checkpoint(run, name)
    return saved is not None and saved["done"]


def use_shipped(run, name):
    """Copy walker or base and its log out of assets/, if the run has none yet, asks for the same
    configuration and has the walker it was trained on. Walkers first. Returns whether it did."""
    folder = ASSETS / run.preset / ("seed0" if name == "walker" else run.folder.name)
    if run.fresh or (run.folder / f"{name}.pt").exists() or not (folder / f"{name}.pt").exists():
        return False
    saved = load_checkpoint(folder / f"{name}.pt")
    walker = read_checkpoint(run, "walker")  # None on the grid, and before it is copied itself
    parent = walker and digest(walker["model"])
    if difference(run, name, saved["fingerprint"]) is not None or saved["parent"] != parent:
        return False
    run.folder.mkdir(parents=True, exist_ok=True)
    for kind in ("jsonl", "pt"):  # the log first: a checkpoint without it would never get one
        content = (folder / f"{name}.{kind}").read_bytes()
        write_atomically(run.folder / f"{name}.{kind}", content)
    return True


def read_log(folder, name):
    """All lines of <name>.jsonl; a last line cut off by a kill is dropped."""
    path = Path(folder) / f"{name}.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]
    except ValueError:
        raise Refused(f"{path} is damaged: delete it and the checkpoint beside it") from None


# -------------------------------------------------------------------------------------- 3. Training

PURPOSES = ("init", "base", "control", "meta", "policy", "raw", "eval", "walker", "demonstrations")
EVAL_SEED = 10 ** 6  # evaluation layouts are the same for every seed


def seed_everything(seed, purpose, k):
    """Seed torch for step k of a purpose and return a numpy Generator for the same step."""
    sequence = np.random.SeedSequence([seed, PURPOSES.index(purpose), k])
    torch.manual_seed(int(sequence.generate_state(1)[0]))
    return np.random.default_rng(sequence)


def adamw(parameters, lr, wd):
    """parameters: an iterable of tensors, or a list of groups with learning rates of their own."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=wd, betas=(.9, .999), fused=True)


class Training:
    """One stage's training, from its checkpoint, if there is one, to its end.

        training = Training(run, "base", model, optimizer, parent)
        if not training.done:
            training.go(source, learn, report)

    parent: the frozen model that this one is trained on; a checkpoint trained on another one is
    refused. `first` is the next step, `steps` where it ends.
    """

    def __init__(self, run, name, model, optimizer, parent=None):
        self.run, self.name, self.model, self.optimizer = run, name, model, optimizer
        self.steps = getattr(run.cfg, STEPS[name.split("-")[0]])
        self.parent = parent and digest(parent.state_dict())
        self.first, seconds, self.done = 0, 0., False
        self.path = run.folder / f"{name}.pt"
        saved = read_checkpoint(run, name)
        if saved is not None:
            self.first, seconds, self.done = saved["step"], saved["seconds"], saved["done"]
            self.load(saved)
        self.begun = time.time() - seconds

    def load(self, saved):
        """Put a checkpoint into model and optimiser, or refuse it."""
        again = "delete it, or start again with --fresh"
        if saved["parent"] != self.parent:
            kinds = {"base": "walker", "policy": "metacontroller"}
            kind = kinds.get(self.name.split("-")[0], "base model")
            raise Refused(f"{self.path} was trained on another {kind} than the one beside it: "
                          f"{again}")
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            for parameter, state in self.optimizer.state.items():
                if any(x.ndim and x.shape != parameter.shape for x in state.values()):
                    raise ValueError("the shape of a moment")
        except Exception as error:  # whatever another version of the code has written
            raise Refused(f"{self.path} does not fit the model of this version of the code "
                          f"({type(error).__name__}): {again}") from None
        # RL's updates do not depend on how many there will be: it may go on.
        if self.done and self.run.extend and self.first < self.steps:
            self.done = False
        if self.done and self.first > self.steps:
            print(f"{self.name}: finished earlier with {self.first} updates, more than the "
                  f"{self.steps} asked for; it stays as it is")
        if not self.done:
            print(f"{self.name}: continues at step {self.first}")

    def seconds(self):
        return time.time() - self.begun

    def save(self, step):
        save_checkpoint(self.path, {
            "fingerprint": fingerprint(self.run, self.name), "dtype": str(self.run.dtype),
            "parent": self.parent, "step": step, "seconds": self.seconds(),
            "done": step == self.steps, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()})

    def log(self, shown, metrics):
        """Append a line to <name>.jsonl and print the metrics named in `shown`."""
        with open(self.path.with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(metrics) + "\n")
        values = ((key, metrics[key]) for key in shown if metrics.get(key) is not None)
        text = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in values)
        tqdm.write(f"  {self.name} {metrics['step']:>6}  " + "  ".join(text))

    def due(self, step):
        """Is there an evaluation after step `step`? About cfg.evaluations, and at the end."""
        every = max(self.steps // self.run.cfg.evaluations, 1)
        return (step + 1) % every == 0 or step + 1 == self.steps

    def go(self, source, learn, report):
        """source yields (step, item) from `first` on; learn(step, item) takes an optimiser step and
        returns what report(step, learned) wants, which returns (names to show, dict of metrics,
        lines of text) for the log.

        Saves after the first step, so that after --fresh one step suffices to say that this one is
        trained here; every save_seconds; at the end; and when Ctrl-C or SIGTERM asks to stop.
        """
        if parallel.rank():  # process 0 does all the rest
            for step, item in source:
                learn(step, item)
            return
        folder = self.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        # It speaks of weights that are about to change.
        (folder / f"eval{suffix(self.run)}.json").unlink(missing_ok=True)
        # Steps after the checkpoint come again.
        lines = [line for line in read_log(folder, self.name) if line["step"] <= self.first]
        content = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(folder / f"{self.name}.jsonl", content.encode())
        last = 0.
        with Stop() as stop, tqdm(total=self.steps, initial=self.first, desc=self.name,
                                  unit="step", mininterval=1, disable=None) as bar:
            for step, item in source:
                learned = learn(step, item)
                bar.update()
                if self.due(step):
                    shown, metrics, text = report(step, learned)
                    self.log(shown, {"step": step + 1, "seconds": self.seconds(), **metrics})
                    for line in text:
                        tqdm.write(f"      {line}")
                done = step + 1 == self.steps
                if done or stop.asked or time.time() - last > self.run.cfg.save_seconds:
                    self.save(step + 1)
                    last = time.time()
                if stop.asked:  # also at the end of a stage: the next one would begin
                    raise Interrupted(stop.asked, f"{self.name} is saved at step {step + 1}")


class Stop:
    """While it is entered, the first Ctrl-C or SIGTERM only sets `asked` to its number; the second
    one leaves at once (not under torchrun, which passes a Ctrl-C on that we have already got)."""

    def __enter__(self):
        self.asked = 0
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # only it may have handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = number
        again = ""
        if parallel.count() == 1:
            self.__exit__()
            again = "; once more leaves at once"
        tqdm.write(f"stopping after this step{again}")

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------- 4. device

def choose_device(run):
    """Resolve device, dtype and compile, and print each choice with its reason."""
    cfg = run.cfg
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    cuda = torch.cuda.is_available()
    run.device = torch.device(("cuda" if cuda else "cpu") if cfg.device == "auto" else cfg.device)
    if run.device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    reason = ("asked for" if cfg.device != "auto" else "CUDA found" if cuda else "no CUDA found")
    print(f"device {run.device} ({reason}), {parallel.count()} x {torch.get_num_threads()} CPU "
          f"threads")
    dtypes = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    saved = [read_checkpoint(run, name) for name in run.names]
    unfinished = [one["dtype"] for one in saved if one and not one["done"]]
    if cfg.dtype != "auto":
        run.dtype, reason = dtypes[f"torch.{cfg.dtype}"], "asked for"
    elif unfinished:  # a timing must not change the precision in the middle of a training
        run.dtype, reason = dtypes[unfinished[0]], "as in the unfinished checkpoint"
    else:
        ratio = seconds_of_product(run.device, torch.float32) / seconds_of_product(
            run.device, torch.bfloat16)
        run.dtype = torch.bfloat16 if ratio > 1.3 else torch.float32
        reason = f"bfloat16 matrix products measured at {ratio:.2g}x the speed of float32"
    run.dtype = parallel.agreed(run.dtype)
    print(f"dtype {run.dtype} ({reason})")
    if cfg.compile != "auto":
        run.compiler, reason = cfg.compile, "asked for"
    elif run.device.type == "cpu":
        run.compiler, reason = "off", "inductor gains nothing on CPU at these sizes"
    else:
        from torch.utils._triton import has_triton  # what inductor needs on CUDA
        run.compiler, reason = (("inductor", "Triton found") if has_triton()
                                else ("cudagraphs", "no Triton"))
    print(f"compile {run.compiler} ({reason})")


def seconds_of_product(device, dtype):
    """Measured, not guessed: without hardware support bfloat16 is 100 times slower."""
    side = 256 if device.type == "cpu" else 4096  # on a GPU anything small measures the launch
    x = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(4):  # the first is a warm-up
        begin = time.perf_counter()
        (x @ x).sum().item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def autocast(run):
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16)


# ---------------------------------------------------------------------------------- 5. command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")  # one sentence, without the page of usage

    def parse_args(self, argv=None):
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            if isinstance(value, list):  # what argparse makes of `--alpha=--`
                self.error(f"argument --{name}: expected one value")
        return args


def boolean(text):
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
                                     f"[paper's grid: {f.default if f.default != '' else 'none'}]")


def configured(args, preset):
    """The preset's Config, with what the command line says otherwise."""
    given = {f.name: args[f.name] for f in fields(Config) if args[f.name] is not None}
    return dataclasses.replace(preset, **given)
