"""How a run is kept: checkpoints, logs, resuming, the device. Plumbing, not for the course.

  1. checkpoints   whole or refused, written atomically, with a fingerprint of what made them
  2. Training      the one loop of every stage: resume, bar, evaluations, log, save, stop
  3. device        device and precision, chosen by looking; CUDA graphs

How a resumed run can equal an uninterrupted one, bit for bit: nothing random depends on the past.
Before step k of a stage, torch's generator is seeded with (seed, stage, k), and NumPy's, which
draws episodes and, in RL, actions and codes, before every chunk of steps or update of RL; so a
checkpoint needs model, optimiser and step, and no generator states. It holds on the same CPU with
the same number of threads and processes; CUDA's own kernels are not all deterministic.

Files: runs/<preset>/seed<k>/*.pt and, for each, a .jsonl of metrics. Keys of every line: step,
seconds (spent so far); the others are named where they are reported (train.py, ant.py).
"""
import hashlib
import io
import json
import math
import os
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
from config import DEPENDS, GONE, STEPS, Config, Refused

ASSETS = Path(__file__).parent / "assets"  # <preset>/seed<k>/: checkpoints that are shipped


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, its number given; the step that was under way is saved."""


@dataclass
class Run:
    """One seed of one preset: its configuration, its folder, the resolved device and precision."""
    cfg: Config
    preset: str
    folder: Path
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32
    graphs: bool = False  # replay supervised steps as CUDA graphs, see Graphs
    workers: int = 0  # processes that draw episodes
    names: tuple = ()  # the checkpoints that this invocation reads or writes
    extend: bool = True  # may a finished RL go on, if more updates are asked for?
    fresh: bool = False  # train also what is shipped
    kept: dict = field(default_factory=dict)  # what a body has loaded once (ant.py: its walker)


# ----------------------------------------------------------------------------------- 1. checkpoints

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


def write_atomically(path, content):
    """A reader sees the old file or the new one, never half of one, whenever the process dies."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def save_checkpoint(path, content):
    """`content` must have the keys of CONTENT but its sha256, which is added."""
    buffer = io.BytesIO()  # in memory first: a full disk is then an OSError like any other
    torch.save(content | {"sha256": digest(content)}, buffer)
    write_atomically(path, buffer.getvalue())


def suffix(run):
    """The rivals keep their own files beside the metacontroller's."""
    if run.cfg.joint:
        return "-cotrain"
    return f"-{run.cfg.gate}" if run.cfg.gate in ("forced", "compile") else ""


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
    defaults = asdict(Config()) | GONE
    for key, ours in (fingerprint(run, name) | GONE).items():
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


def copy_checkpoint(name, source, to):
    """Copy a checkpoint and its log from one folder to another."""
    to.mkdir(parents=True, exist_ok=True)
    for kind in ("jsonl", "pt"):  # the log first: a checkpoint without it would never get one
        write_atomically(to / f"{name}.{kind}", (source / f"{name}.{kind}").read_bytes())


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
    copy_checkpoint(name, folder, run.folder)
    return True


def write_log(folder, name, lines):
    """Replace <name>.jsonl by these lines, dicts."""
    content = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(folder / f"{name}.jsonl", content.encode())


def read_log(folder, name):
    """All lines of <name>.jsonl; a last line cut off by a kill is dropped."""
    path = Path(folder) / f"{name}.jsonl"
    try:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]
    except ValueError:
        raise Refused(f"{path} is damaged: delete it and the checkpoint beside it") from None


# -------------------------------------------------------------------------------------- 2. Training

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
        if error and isinstance(error[1], parallel.Lost):
            return  # torchrun's SIGTERM comes next, and first the line that says why
        for number, handler in self.before.items():
            signal.signal(number, handler)


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
        """Spent on this stage so far, in all sessions."""
        return time.time() - self.begun

    def save(self, step):
        """Put the checkpoint of this step in the place of the last one."""
        save_checkpoint(self.path, {
            "fingerprint": fingerprint(self.run, self.name), "dtype": str(self.run.dtype),
            "parent": self.parent, "step": step, "seconds": self.seconds(),
            "done": step == self.steps, "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()})

    def log(self, step, shown, metrics, text):
        """Append a line to <name>.jsonl, print the metrics named in `shown` and the text."""
        metrics = {"step": step, "seconds": self.seconds(), **metrics}
        with open(self.path.with_suffix(".jsonl"), "a") as file:
            file.write(json.dumps(metrics) + "\n")
        values = ((key, metrics[key]) for key in shown if metrics.get(key) is not None)
        words = (f"{key} {x:.4g}" if isinstance(x, float) else f"{key} {x}" for key, x in values)
        tqdm.write(f"  {self.name} {step:>6}  " + "  ".join(words))
        for line in text:
            tqdm.write(f"      {line}")

    def require_finite(self, step, loss):
        """FloatingPointError on a loss that is not, before the state that it has spoiled is kept.
        (RL's updates return a dict, and look for themselves.)"""
        if isinstance(loss, torch.Tensor) and not loss.isfinite():
            raise FloatingPointError(f"the loss of {self.name} is not finite at step {step}; the "
                                     f"last checkpoint keeps the last good state")

    def due(self, step):
        """Is there an evaluation after step `step`? About cfg.evaluations, and at the end."""
        every = max(self.steps // self.run.cfg.evaluations, 1)
        return (step + 1) % every == 0 or step + 1 == self.steps

    def go(self, source, learn, report, start=None):
        """source yields (step, item) from `first` on; learn(step, item) takes an optimiser step and
        returns what report(step, learned) wants, which returns (names to show, dict of metrics,
        lines of text) for the log. start(): the same, before the first step, for step 0.

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
        before = read_log(folder, self.name) if self.first else []
        lines = [line for line in before if line["step"] <= self.first]
        write_log(folder, self.name, lines)
        last = 0.
        with Stop() as stop, tqdm(total=self.steps, initial=self.first, desc=self.name,
                                  unit="step", mininterval=1, disable=None) as bar:
            if start is not None and self.first == 0:
                self.log(0, *start())
            for step, item in source:
                learned = learn(step, item)
                bar.update()
                # On a GPU only before something is kept: to look at the loss is to wait for it.
                if self.run.device.type == "cpu" or self.due(step):
                    self.require_finite(step, learned)
                if self.due(step):
                    self.log(step + 1, *report(step, learned))
                done = step + 1 == self.steps
                if done or stop.asked or time.time() - last > self.run.cfg.save_seconds:
                    self.require_finite(step, learned)
                    self.save(step + 1)
                    last = time.time()
                if stop.asked:  # also at the end of a stage: the next one would begin
                    raise Interrupted(stop.asked, f"{self.name} is saved at step {step + 1}")


# ---------------------------------------------------------------------------------------- 3. device

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


def choose_device(run):
    """Resolve device and dtype, and print each choice with its reason."""
    cfg = run.cfg
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    cuda = torch.cuda.is_available()
    run.device = torch.device(("cuda" if cuda else "cpu") if cfg.device == "auto" else cfg.device)
    if run.device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        run.workers = torch.get_num_threads()  # a GPU learns faster than one process draws
        run.graphs = cfg.graphs and cfg.body == "point" and parallel.count() == 1
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
    if run.device.type == "cuda":
        print(f"{run.workers} processes draw episodes, CUDA graphs {'on' if run.graphs else 'off'}")


class Graphs:
    """A step of `optimizer` on a batch (a dict of tensors), replayed as a CUDA graph: one for every
    shape of batch["mask"], recorded when that shape comes for the second time. At these sizes a GPU
    waits for Python to launch some hundred small kernels a step."""

    def __init__(self, function, optimizer):
        self.function, self.met, self.recorded = function, set(), {}
        for group in optimizer.param_groups:
            group["capturable"] = True

    def __call__(self, batch):
        shape = batch["mask"].shape
        if shape not in self.met:  # on a stream of its own, as PyTorch wants it before a recording
            self.met.add(shape)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result = self.function(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return result
        if shape not in self.recorded:
            inputs = {name: x.clone() for name, x in batch.items()}
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.function(inputs)
            self.recorded[shape] = graph, inputs, result
        graph, inputs, result = self.recorded[shape]
        for name, x in batch.items():
            inputs[name].copy_(x)
        graph.replay()
        return result


def autocast(run):
    """bfloat16 products where the run asks for them."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.dtype == torch.bfloat16)
