"""Two processes learn what one does; what is lost, stopped or uneven ends in one sentence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import config
import parallel
import runs
import train
from envs import World, sample_layouts

# Short, so that rounding has no time to grow; codes succeed often enough for RL to have a gradient.
SHORT = (
    "--preset smoke --threads 1 --dtype float32 --base_steps 12 --control_steps 8 --meta_steps 12 "
    "--alpha_ramp 4 --rl_updates 3 --evaluations 3 --eval_episodes 40 --rl_lr 1e-2"
).split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def trained(out, *options, prefix=(sys.executable,)):
    line = [*prefix, "train.py", *SHORT, *options, "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out / "smoke" / "seed0"


def numbers(folder, name):
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    return [
        {k: x for k, x in line.items() if "second" not in k and "_per_s" not in k} for line in lines
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rival", ["none", "cotrain"])
def test_two_processes_learn_what_one_does(tmp_path, rival):
    """Every stage: weights and logs, losses included (Adam would hide a gradient of twice the
    size)."""
    one = trained(tmp_path / "one", "--rival", rival)
    two = trained(tmp_path / "two", "--rival", rival, prefix=TORCHRUN)
    names = sorted(path.stem for path in one.glob("*.pt"))
    assert names == sorted(path.stem for path in two.glob("*.pt")) and len(names) > 1
    for name in names:
        ours, theirs = (runs.load_checkpoint(f / f"{name}.pt")["model"] for f in (one, two))
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], atol=2e-4, rtol=1e-3, msg=name + key)
        for line, other in zip(numbers(one, name), numbers(two, name), strict=True):
            assert line.keys() == other.keys()
            for key in line:
                same = line[key] == other[key]  # also where a list has a None
                assert same or line[key] == pytest.approx(other[key], abs=2e-3, rel=1e-2), (
                    name,
                    key,
                )
    if rival == "none":
        assert any(line.get("loss") for line in numbers(one, "policy"))  # it did learn something


@pytest.mark.slow
def test_a_lost_process_ends_all_and_one_process_goes_on(tmp_path):
    long = ["--base_steps", "100000", "--save_seconds", ".2", "--stage", "pretrain"]
    line = [*TORCHRUN, "train.py", *SHORT, *long, "--out", str(tmp_path)]
    path = tmp_path / "smoke" / "seed0" / "base.pt"

    def started():
        agent = subprocess.Popen(
            line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        seen = path.stat().st_mtime if path.exists() else 0
        until = time.time() + 60
        while not (path.exists() and path.stat().st_mtime > seen + 0.3) and time.time() < until:
            time.sleep(0.1)
        return agent

    agent = started()
    workers = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True)
    os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
    text = agent.communicate(timeout=60)[0]
    assert text.count("train.py: another process has ended; the same command") == 1
    step = runs.load_checkpoint(path)["step"]

    agent = started()
    agent.send_signal(signal.SIGINT)
    text = agent.communicate(timeout=60)[0]
    assert text.count("is saved at step") == 1
    saved = runs.load_checkpoint(path)["step"]
    assert saved > step

    line[: len(TORCHRUN)] = [sys.executable]
    steps = line.index("100000")  # other options may have the same number as the next line's
    line[steps] = str(saved + 1)
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "base_steps=100000" in done.stderr  # another length: refused
    line[steps] = "100000"
    alone = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for text in alone.stdout:
        if text.startswith("base: continues at step"):
            break
    alone.kill()
    alone.wait()
    assert text == f"base: continues at step {saved}\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_nothing_of_gloo_outlives_the_group(tmp_path):
    """A thread that does may abort the process at its exit."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, torch\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import parallel\n"
        "parallel.join()\n"
        "torch.optim.AdamW([torch.zeros(1)]).step()\n"
        "parallel.wait()\n"
        "parallel.leave()\n"
        "tasks = '/proc/self/task'\n"
        "tasks = [open(f'{tasks}/{t}/comm').read() for t in os.listdir(tasks)]\n"
        "assert not any('gloo' in task for task in tasks), tasks\n"
    )
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_batch_that_can_t_be_shared_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "count", lambda: 2)
    with pytest.raises(config.Refused, match="rl_batch 66 .* multiple of 4"):
        train.parse(["--preset", "smoke", "--rl_batch", "66", "--out", str(tmp_path)])


def test_shares_are_a_batch(monkeypatch):
    """Every process draws what the whole batch would get, and the parts of a mean make one."""
    world, n = World(), 12
    whole = sample_layouts(world, np.random.default_rng(3), n)
    mask = torch.rand(n, 7) < 0.4
    x = torch.rand(n, 7)
    view = {"row": torch.arange(n)[:, None] ^ 1, "x": x}
    monkeypatch.setattr(parallel, "count", lambda: 3)
    mean, layouts = 0, []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        layouts.append(sample_layouts(world, parallel.Rows(np.random.default_rng(3), n), n // 3))
        own = parallel.own({"x": x, "mask": mask})
        mean += parallel.part(mask) * own["x"][own["mask"]].mean()
        mine = parallel.own(view)
        assert (mine["row"] == torch.arange(n // 3)[:, None] ^ 1).all()
    assert mean == pytest.approx(x[mask].mean())
    for ours, parts in zip(whole, zip(*layouts, strict=True), strict=True):
        assert (ours == np.concatenate(parts)).all()
