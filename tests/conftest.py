import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
