import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

import ant  # before any test imports mujoco: it sets MUJOCO_GL
from envs import TASK_SETS, World

# "Fetch colour c, come home to 4": four subgoals of two colours each, from five colours. Fetch c is
# followed by fetch c+2 or c+3 (mod 4), so that the last task consists of unseen transitions only.
TASK_SETS["errands"] = (
    "0-4 1-4 2-4 3-4",
    " ".join(
        f"{a}-4-{(a + i) % 4}-4-{(a + i + j) % 4}-4"
        for a in range(4)
        for i in (2, 3)
        for j in (2, 3)
    ),
    "0-4-1-4-2-4-3-4",
)


@pytest.fixture(scope="session")
def opengl():
    """Skip, with the reason, where no picture of the ant can be drawn."""

    try:
        ant.draw_ant(
            World(G=4, O=4, W=1, T=9, task_set="singles", body="ant"),
            ant.np.arange(5),
            ant.ant_model().qpos0,
        )
    except RuntimeError as error:
        pytest.skip(str(error))


# Even smaller than smoke, where only the machinery is tested.
TINY = [
    "--preset",
    "smoke",
    "--threads",
    "1",
    "--dtype",
    "float32",  # auto measures, and what it finds may differ between two runs
    "--base_steps",
    "70",
    "--control_steps",
    "40",
    "--meta_steps",
    "45",
    "--rl_updates",
    "12",
    "--eval_episodes",
    "40",
    "--evaluations",
    "2",
]


def command(out, *more):
    return [sys.executable, str(ROOT / "train.py"), *TINY, "--out", str(out), *more]


# Processes that can be killed, without importing PyTorch in each.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "torch._dynamo"])


@pytest.fixture(scope="session", autouse=True)
def training(request, tmp_path_factory):
    """What `finished` waits for, begun at once on the second core; None if nothing needs it."""
    if not any("finished" in item.fixturenames for item in request.session.items):
        yield None
        return
    multiprocessing.forkserver.ensure_running()  # it imports while the first tests run
    out = tmp_path_factory.mktemp("finished")
    with subprocess.Popen(command(out), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield out, process
        process.kill()


@pytest.fixture(scope="session")
def finished(training):
    """A folder in which every stage has run once, uninterrupted, its output and its errors."""
    out, process = training
    printed = [stream.decode() for stream in process.communicate(timeout=200)]
    assert process.returncode == 0, printed[1]
    return out, *printed
