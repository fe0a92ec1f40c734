"""The worlds: gridworld-pinpad and ant-pinpad, their experts, and the exact bounds that every loss on the grid is compared with.

Read this file first. It needs NumPy, gymnasium and MuJoCo only. Bottom-up:

  1. task sets      Table A1, Table A2 and our smaller "errands", written as in the paper; `World` holds one world's rules
  2. the rules      sample_layouts, next_cell: A.1.1 as small tables; the symmetries of the square
  3. GridWorlds     N worlds stepped at once, the ONE implementation of the rules
  4. AntWorlds      the same rules under the feet of N MuJoCo ants
  5. GridPinpad, AntPinpad   both as gymnasium environments (batches of one), with rendering
  6. the expert     shortest paths by dynamic programming, the stochastic expert of C.1.1, labelled trajectories
  7. exact bounds   Bayes-optimal and goal-known action NLL: what no sequence model can beat, and what a controller can reach

Paper sections: A.1, A.2 (worlds), Tables A1-A2 (tasks), C.1.1 (experts), C.4.4 (clean experts for the metacontroller).

Glossary (name -> meaning -> shape; N worlds, T steps, C = G*G cells, O colours, W walls, K = O+W+1 things)
  things    cell of every colour, then of every wall          (N, O+W)   constant during an episode
  agent     cell of the agent                                 (N,) or (N, T)
  obs       things and agent side by side: "where is thing k" (..., K)   the observation in index form; see `one_hot`
  contents  what lies in a cell: -1 nothing, 0..O-1 colour, O wall   (N, C)
  dist      steps from a cell to a colour, avoiding the rest  (N, O, C)
  target    the colour to visit next                          (N,)
  progress  how many colours of the task are visited          (N,) or (N, T)
  subgoal   index into World.subgoals, the abstract action in progress   (N, T)
  segment   how many subgoals of the task are finished        (N, T)
Cells are numbered row by row: cell = row * G + column. Actions on the grid: 0 up, 1 right, 2 down, 3 left.
"""
import functools
import os
import sys
from dataclasses import dataclass, replace

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # draw without a display; MuJoCo reads this when it is imported
import gymnasium as gym
import mujoco
import mujoco.batch
import numpy as np

ACTIONS = ("up", "right", "down", "left")
UNREACHABLE = 10_000  # larger than any path, small enough for int16 arithmetic

# ------------------------------------------------------------------------------------------------ 1. task sets
# A task is a sequence of colours. A subgoal is a run of colours that always appears whole: the paper's "abstract action".
# Each entry: subgoals, pretraining tasks, post-training task. The post-training task is never demonstrated.

TASK_SETS = {
    # Table A1 and A.1.2: eight colours in four pairs. The transitions 01->23, 23->45 and 67->01 never occur in pretraining.
    "pairs": (
        "0-1 2-3 4-5 6-7",
        "0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 4-5-0-1-4-5 4-5-0-1-6-7 "
        "4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3",
        "0-1-2-3-4-5-6-7-0-1-2-3",
    ),
    # Table A2 and A.2.2: the ant's tasks. Every colour is a subgoal; 0->1, 1->2 and 2->3 never occur in pretraining.
    "singles": (
        "0 1 2 3",
        "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0",
        "0-1-2-3",
    ),
    # NOT in paper: "fetch colour c, come home to 4". Four subgoals from five colours instead of eight, so that a small network
    # learns it in minutes, yet a subgoal still spans two legs of which the second is determined by the first, as in Table A1.
    # Fetch c is followed by fetch c+2 or c+3 (mod 4), so the post-training task consists of unseen transitions only.
    "errands": (
        "0-4 1-4 2-4 3-4",
        " ".join(f"{a}-4-{(a + i) % 4}-4-{(a + i + j) % 4}-4" for a in range(4) for i in (2, 3) for j in (2, 3)),
        "0-4-1-4-2-4-3-4",
    ),
    # For the `smoke` preset and the tests: learned in seconds. 0->2 and 2->1 never occur in pretraining.
    "tiny": ("0 1 2", "0-1 1-2 2-0 0-1-2", "0-2-1"),
}


def parse_colours(text):
    """'0-1-4' -> (0, 1, 4)."""
    return tuple(int(colour) for colour in text.split("-"))


@dataclass(frozen=True)
class World:
    """The rules of one pinpad (A.1, A.2). Raises ValueError, in one sentence, if no such world can exist.

    G: side of the grid; O: colours; W: walls; T: horizon in steps; task_set: a key of TASK_SETS; post: another post-training task than
    the task set's own, written as there; body: "point" moves from cell to cell (A.1), "ant" is a MuJoCo body that walks over them (A.2).
    compass: the ant's legs are named by where they point (see AntWorlds).
    """
    G: int = 7
    O: int = 8
    W: int = 4
    T: int = 100
    task_set: str = "pairs"
    post: str = ""
    body: str = "point"
    compass: bool = False

    def __post_init__(self):
        if self.task_set not in TASK_SETS:
            raise ValueError(f"unknown task set '{self.task_set}': choose one of {', '.join(TASK_SETS)}")
        if self.post and not all(colour.isdecimal() for colour in self.post.split("-")):
            raise ValueError(f"the post-training task is written as colours in order, such as 0-1-2, not '{self.post}'")
        if self.body not in ("point", "ant"):
            raise ValueError(f"unknown body '{self.body}': choose point or ant")
        if self.compass and self.body != "ant":
            raise ValueError("compass names the legs of an ant: a point has none")
        if min(self.G, self.O, self.T) < 1 or self.W < 0:
            raise ValueError(f"impossible world: G={self.G}, O={self.O} and T={self.T} must be positive, W={self.W} not negative")
        if self.O + self.W + 1 > self.cells:
            raise ValueError(f"impossible world: {self.O} colours, {self.W} walls and the agent need {self.O + self.W + 1} cells, "
                             f"a {self.G} x {self.G} grid has {self.cells}")
        needed = 1 + max(colour for task in (*self.tasks, self.post_task) for colour in task)
        if self.O < needed:
            raise ValueError(f"impossible world: task set '{self.task_set}' needs {needed} colours, O={self.O}")
        if self.T < len(self.post_task):
            raise ValueError(f"impossible world: the post-training task visits {len(self.post_task)} colours, the horizon is T={self.T} steps")
        if any(a == b for a, b in zip(self.post_task, self.post_task[1:])):
            raise ValueError(f"the post-training task {self.post} visits a colour twice in a row, which needs two entries into its cell")
        self.subgoal_of(self.post_task)  # raises, if it is not made of subgoals

    @property
    def cells(self):
        return self.G * self.G

    @property
    def on_grid(self):
        """The same board and tasks for a point: what holds for the path from cell to cell holds for the ant's, too."""
        return replace(self, body="point", compass=False)

    @property
    def things(self):
        """Colours, walls and the agent: the number K of ones in an observation."""
        return self.O + self.W + 1

    @property
    def ant_obs(self):
        """Length of the ant's observation (see AntPinpad)."""
        return 31 + 2 * (self.O + self.W)

    @property
    def subgoals(self):
        return tuple(parse_colours(text) for text in TASK_SETS[self.task_set][0].split())

    @property
    def tasks(self):
        """The pretraining tasks, each a tuple of colours."""
        return tuple(parse_colours(text) for text in TASK_SETS[self.task_set][1].split())

    @property
    def post_task(self):
        return parse_colours(self.post or TASK_SETS[self.task_set][2])

    def subgoal_of(self, task):
        """Cut a task into subgoals: for each of its colours, (index of the subgoal, number of subgoals before it).

        The last subgoal may be cut short. Raises ValueError if the task is made of anything else."""
        labels, segment = [], 0
        while len(labels) < len(task):
            rest = task[len(labels):]
            match = next((i for i, subgoal in enumerate(self.subgoals) if rest[:len(subgoal)] == subgoal[:len(rest)]), None)
            if match is None:
                raise ValueError(f"task {'-'.join(map(str, task))} is not a sequence of the subgoals of '{self.task_set}'")
            labels += [(match, segment)] * len(self.subgoals[match])
            segment += 1
        return labels[:len(task)]


# ------------------------------------------------------------------------------------------------ 2. the rules, as tables

def sample_layouts(world, rng, n):
    """Draw n initial states: colours, walls and agent on distinct random cells (A.1.1).

    Returns things (n, O+W) int64 and agent (n,) int64. `rng` is a numpy Generator.
    """
    order = rng.random((n, world.cells)).argsort(axis=1)[:, :world.things]  # (n, K): the first K cells of a random permutation
    return order[:, :-1], order[:, -1]


def neighbour_table(G):
    """(C, 4): the cell that each action leads to on an empty grid; off the grid is a no-op."""
    row, column = np.divmod(np.arange(G * G), G)
    row_after = np.stack([row - 1, row, row + 1, row], axis=1).clip(0, G - 1)  # (C, 4)
    column_after = np.stack([column, column + 1, column, column - 1], axis=1).clip(0, G - 1)
    return row_after * G + column_after


def symmetries(G):
    """The 8 rotations and reflections of the square: cells (8, C), where each cell goes, and actions (8, 4), what each action becomes.

    next(cells[g][c], actions[g][a]) = cells[g][next(c, a)] on an empty grid; the first is the identity. Colours are left alone.
    """
    row, column = np.divmod(np.arange(G * G), G)
    row, column = row - (G - 1) / 2, column - (G - 1) / 2  # seen from the centre
    dy, dx = np.array([-1, 0, 1, 0]), np.array([0, 1, 0, -1])  # the actions as steps
    cells, actions = [], []
    for turn in ((1, 0, 0, 1), (0, 1, 1, 0)):  # (row, column) as it is, or transposed; each with both signs of both coordinates
        for sy in (1, -1):
            for sx in (1, -1):
                a, b, c, d = np.array(turn) * (sy, sy, sx, sx)
                cells.append((a * row + b * column + (G - 1) / 2) * G + c * row + d * column + (G - 1) / 2)
                to = np.stack([a * dy + b * dx, c * dy + d * dx])  # (2, 4)
                actions.append((to[:, :, None] == np.stack([dy, dx])[:, None]).all(0).argmax(1))  # (4,)
    return np.array(cells).astype(np.int64), np.array(actions)


def contents_table(world, things):
    """(N, C) int64: -1 for an empty cell, the colour 0..O-1, or O for any wall."""
    contents = np.full((len(things), world.cells), -1)
    what = np.minimum(np.arange(world.O + world.W), world.O)  # (O+W,): every wall becomes O
    np.put_along_axis(contents, things, np.broadcast_to(what, things.shape), axis=1)
    return contents


def next_cell(world, contents, agent):
    """(N, T, 4): where each action leads from agent (N, T): moving into a wall or off the grid is a no-op (A.1.1)."""
    cell = neighbour_table(world.G)[agent]  # (N, T, 4)
    n = np.arange(len(agent))[:, None, None]
    return np.where(contents[n, cell] == world.O, agent[..., None], cell)


def one_hot(world, obs):
    """The observation vector of A.1.1 from its index form: (..., K) cells -> (..., C * (O+W+1)) zeros and ones.

    Layout: for each cell, the O colour channels and the W wall channels; after all cells, the agent's C channels.
    """
    C, channels = world.cells, world.O + world.W
    index = obs[..., :-1] * channels + np.arange(channels)  # (..., O+W)
    index = np.concatenate([index, obs[..., -1:] + C * channels], axis=-1)  # (..., K)
    vector = np.zeros((*obs.shape[:-1], C * (channels + 1)), np.int8)
    np.put_along_axis(vector, index, 1, axis=-1)
    return vector


# ------------------------------------------------------------------------------------------------ 3. N worlds at once

class GridWorlds:
    """N gridworld-pinpads stepped together (A.1.1). A finished world stays as it is and pays nothing more.

    World(...) gives the rules; `tasks` is a list of N colour sequences; things, agent as from `sample_layouts`.
    Public arrays, each (N,): agent, progress (colours visited in order so far), steps, done, success.
    """

    def __init__(self, world, tasks, things, agent):
        self.world, self.things, self.agent = world, things, agent.copy()
        n = len(agent)
        self.length = np.array([len(task) for task in tasks])
        self.task = np.full((n, self.length.max() + 1), -2)  # one spare column: the target after the last is "none"
        self.label = np.full((n, self.length.max() + 1, 2), -1)  # (subgoal, segment) of each colour of the task
        for task in set(tasks):  # few different tasks, many worlds
            rows = np.array([other == task for other in tasks])
            self.task[rows, :len(task)] = task
            self.label[rows, :len(task)] = world.subgoal_of(task)
        self.contents = contents_table(world, things)
        self.progress = np.zeros(n, np.int64)
        self.steps = np.zeros(n, np.int64)
        self.done = np.zeros(n, bool)
        self.success = np.zeros(n, bool)
        self.rows = np.arange(n)

    def target(self):
        """(N,) the colour to visit next; -2 once the task is completed."""
        return self.task[self.rows, self.progress]

    def subgoal(self):
        """(N,) index of the subgoal in progress; -1 once the task is completed."""
        return self.label[self.rows, self.progress, 0]

    def segment(self):
        """(N,) number of subgoals finished; -1 once the task is completed."""
        return self.label[self.rows, self.progress, 1]

    def obs(self):
        """(N, K) int64, index form: the agent sees things and itself, and nothing of task, goal or visits."""
        return np.concatenate([self.things, self.agent[:, None]], axis=1)

    def step(self, action):
        """action (N,) in 0..3. Returns reward (N,) float32, terminated (N,) and truncated (N,) bool."""
        cell = next_cell(self.world, self.contents, self.agent[:, None])[self.rows, 0, action]
        return self._enter(np.where(self.done, self.agent, cell))

    def _enter(self, cell, lost=False):
        """What follows from where the agent is after its step: cell (N,), unchanged in finished worlds; lost (N,): the episode fails."""
        content = self.contents[self.rows, cell]
        # A colour is visited when it is entered from a different cell: bumping while standing on it is not a visit.
        visited = (cell != self.agent) & (content >= 0)
        right = visited & (content == self.target()) & ~np.asarray(lost)
        self.agent = cell
        self.progress += right
        self.steps += ~self.done
        success = right & (self.progress == self.length)
        terminated = success | (visited & ~right) | lost
        truncated = ~terminated & ~self.done & (self.steps >= self.world.T)
        self.success |= success
        self.done |= terminated | truncated
        return success.astype(np.float32), terminated, truncated


# ------------------------------------------------------------------------------------------------ 4. the ant (A.2)
# Physics: gymnasium's Ant-v5 body, its time step and its 5 physics steps per action. NOT in paper: MuJoCo's integrator implicitfast instead of RK4:
# one evaluation of the forces per physics step instead of four, 3.6 times the steps per second (measured in a prototype). The two bodies walk alike,
# and not bit for bit alike: an expert belongs to the integrator that it was trained with.

CELL = 2.  # metres. NOT in paper, which does not give the size: an ant is 1.1 m wide and must be able to turn inside a cell
FRAME_SKIP, PHYSICS_STEP = 5, .01  # one action lasts 0.05 s
HEIGHT = (.2, 1.)  # A.2, metres: with its torso outside this range an ant's episode fails. (Lying on its back, its torso is at 0.25.)


@functools.lru_cache(8)
def ant_model(tiles=()):
    """The classic MuJoCo ant on a plane, as a compiled model: joints in the order hip 1, ankle 1, .. hip 4, ankle 4.

    tiles: (x, y, half height, rgba) of each box that is drawn on the floor, almost as wide as a cell; they can be seen and not be touched.
    """
    spec = mujoco.MjSpec()
    # An unstable simulation would otherwise be put back to its initial pose, unasked, and its episode go on from there.
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    spec.option.timestep, spec.option.integrator = PHYSICS_STEP, mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.compiler.degree = True
    geom, joint = spec.default.geom, spec.default.joint
    geom.conaffinity, geom.condim, geom.density, geom.friction, geom.margin, geom.rgba = 0, 3, 5., [1, .5, .5], .01, [.55, .4, .3, 1]
    joint.armature, joint.damping = 1., [1, 0, 0]  # damping: the linear, quadratic and cubic terms
    spec.worldbody.add_light(pos=[0, 0, 10], dir=[0, 0, -1], type=mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
    # The floor answers to contacts (conaffinity 1), the ant's parts do not answer to each other.
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[40, 40, 40], conaffinity=1, rgba=[.85, .85, .85, 1])
    for x, y, half_height, rgba in tiles:
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, half_height], size=[.48 * CELL, .48 * CELL, half_height],
                                contype=0, rgba=rgba)
    torso = spec.worldbody.add_body(name="torso", pos=[0, 0, .75])
    torso.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[.25, 0, 0])
    torso.add_joint(type=mujoco.mjtJoint.mjJNT_FREE, armature=0, damping=[0, 0, 0], margin=.01)
    capsule = lambda body, x, y: body.add_geom(type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0, x, y, 0], size=[.08, 0, 0])
    # Four legs: front left, front right, back left, back right, as in the classic file, with its signs of axes and ranges.
    for k, (x, y, axis, ankle) in enumerate(((1, 1, (-1, 1, 0), (30, 70)), (-1, 1, (1, 1, 0), (-70, -30)),
                                             (-1, -1, (-1, 1, 0), (-70, -30)), (1, -1, (1, 1, 0), (30, 70))), start=1):
        shoulder = torso.add_body()
        capsule(shoulder, .2 * x, .2 * y)
        leg = shoulder.add_body(pos=[.2 * x, .2 * y, 0])
        leg.add_joint(name=f"hip_{k}", axis=[0, 0, 1], range=[-30, 30], limited=True)
        capsule(leg, .2 * x, .2 * y)
        foot = leg.add_body(pos=[.2 * x, .2 * y, 0])
        foot.add_joint(name=f"ankle_{k}", axis=axis, range=ankle, limited=True)
        capsule(foot, .4 * x, .4 * y)
    for k in (4, 1, 2, 3):  # the classic order of the motors
        for name in (f"hip_{k}", f"ankle_{k}"):
            spec.add_actuator(target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, gear=[150, 0, 0, 0, 0, 0], ctrlrange=[-1, 1], ctrllimited=True)
    return spec.compile()


def rotation(w, x, y, z):
    """The 9 entries, row by row, of the matrix of a unit quaternion: from the torso's frame to the world's. Arrays of any kind."""
    return (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), 2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))


def symlog(x):
    return np.sign(x) * np.log1p(np.abs(x))


def symexp(x):
    """Undoes symlog."""
    return np.sign(x) * np.expm1(np.abs(x))


def feel(qpos, qvel, heading):
    """What a walker needs to walk along `heading` (N, 2), a unit vector: (N, 29) float32, all seen from its own torso. qpos (N, 15), qvel (N, 14).

    Height (1), up (3), velocity (3), angular velocity (3), heading (3), joint angles (8) and their velocities (8): nothing here depends on
    where the ant is or which way it faces.
    """
    R = np.stack(rotation(*qpos[:, 3:7].T), axis=1).reshape(-1, 3, 3)
    own = lambda v: np.einsum("nij,ni->nj", R, v)  # R^T v: (N, 3) in the world -> (N, 3) in the torso's frame
    flat = np.concatenate([heading, np.zeros((len(heading), 1))], axis=1)
    return np.concatenate([qpos[:, 2:3], R[:, 2], symlog(own(qvel[:, :3])), symlog(qvel[:, 3:6]), own(flat),
                           qpos[:, 7:], symlog(qvel[:, 6:])], axis=1).astype(np.float32)


def leg_tables(order):
    """(8, 8) which of the 8 values of legs in this `order`, hip and ankle each, takes a place under symmetry g of the ant, and its sign.

    g % 4: the legs are renamed so many places on, 1 to 2, 2 to 3 and so on; before that, if g >= 4, right and left change places. Then hips turn the other way.
    """
    signs = (1, -1, -1, 1)  # of the ankles' ranges, see ant_model: those of legs 2 and 3 bend the other way
    source, sign = np.zeros((8, 8), np.int64), np.ones((8, 8), np.float32)
    for g in range(8):
        for place, leg in enumerate(order):
            old = (leg - g) % 4  # its name before
            old = 3 - old if g >= 4 else old
            source[g, 2 * place:2 * place + 2] = 2 * order.index(old) + np.arange(2)
            sign[g, 2 * place:2 * place + 2] = -1 if g >= 4 else 1, signs[leg] * signs[old]
    return source, sign


# An ant has four equal legs, and its right is as its left. With leg 1 called 2, 2 called 3 and so on, seen from a torso that faces a quarter turn less, it is the
# same ant; and in a mirror it is an ant, too.
JOINTS, MOTORS = leg_tables((0, 1, 2, 3)), leg_tables((3, 0, 1, 2))
QUARTER_COS, QUARTER_SIN = np.array([1, 0, -1, 0], np.float32), np.array([0, 1, 0, -1], np.float32)


def renamed(tables, k, values):
    """values (N, 8) of the joints or the motors (tables: JOINTS, MOTORS) after the legs were renamed k (N,) places on, k any integers."""
    source, sign = tables
    return np.take_along_axis(values, source[k % 4], axis=1) * sign[k % 4]


def ant_symmetries():
    """What the 8 symmetries of the ant do to what is felt, felt @ A[g], A (8, 29, 29), and to torques, action @ B[g], B (8, 8, 8). float32; entries 0, 1, -1."""
    A, B = np.tile(np.eye(29, dtype=np.float32), (8, 1, 1)), np.zeros((8, 8, 8), np.float32)
    legs = lambda tables, g: np.eye(8, dtype=np.float32)[:, tables[0][g]] * tables[1][g]
    for g in range(8):
        c, s = QUARTER_COS[g % 4], QUARTER_SIN[g % 4]
        for x, mirror in ((1, (1, -1, 1)), (4, (1, -1, 1)), (7, (-1, 1, -1)), (10, (1, -1, 1))):  # up, velocity, angular velocity, heading
            A[g, x:x + 2, x:x + 2] = (c, s), (-s, c)  # the torso faces g quarter turns less: seen from it, vectors turn forwards
            A[g, x:x + 3] *= np.array(mirror)[:, None] if g >= 4 else 1
        for x in (13, 21):  # the joints' angles and their velocities
            A[g, x:x + 8, x:x + 8] = legs(JOINTS, g)
        B[g] = legs(MOTORS, g)
    return A, B


class Ants:
    """The physics of N ants on an endless plane, stepped together on native threads: `threads`, or Ants.threads; 0 means all cores.

    qpos (N, 15): x, y, z, orientation as a quaternion, 8 joint angles; qvel (N, 14): velocity and angular velocity of the torso, 8 joint
    velocities. Both are live views: metres, radians, seconds.
    """

    threads = 0

    def __init__(self, n, threads=None):
        self.sim = mujoco.batch.Batch(ant_model(), n, Ants.threads if threads is None else threads)
        self.qpos, self.qvel, self.ctrl = (self.sim.bind(name) for name in ("qpos", "qvel", "ctrl"))

    def place(self, rng, rows, xy):
        """Put ants `rows` at xy (m, 2), any yaw; joint angles and all velocities within 0.1 of zero (A.2)."""
        self.sim.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        yaw = rng.uniform(-np.pi, np.pi, len(rows))
        self.qpos[rows, :2] = xy
        self.qpos[rows, 3], self.qpos[rows, 6] = np.cos(yaw / 2), np.sin(yaw / 2)
        self.qpos[rows, 7:] = rng.uniform(-.1, .1, (len(rows), 8))
        self.qvel[rows] = rng.uniform(-.1, .1, (len(rows), 14))

    def step(self, rows, action):
        """One action (m, 8), torques as shares of their largest, for ants `rows`. An ant whose physics diverges is left above its range of heights."""
        self.ctrl[rows] = np.clip(action, -1, 1)
        self.sim.step(rows, FRAME_SKIP)
        broken = rows[~np.isfinite(self.sim.state[rows]).all(axis=1)]
        if len(broken):
            self.sim.reset(broken, stage=mujoco.mjtStage.mjSTAGE_NONE.value)
            self.qpos[broken, 2] = 2 * HEIGHT[1]

    def felt(self, heading):
        """What they feel who want to walk along heading (N, 2): (N, 29), see `feel`."""
        return feel(self.qpos, self.qvel, heading)

    def fallen(self):
        """(N,) bool: the torso has left its range of heights (A.2)."""
        return (self.qpos[:, 2] < HEIGHT[0]) | (self.qpos[:, 2] > HEIGHT[1])


def cell_centres(G):
    """(C, 2) metres: x to the right, y up, the board's centre at 0."""
    row, column = np.divmod(np.arange(G * G), G)
    return np.stack([column - (G - 1) / 2, (G - 1) / 2 - row], axis=1) * CELL


class AntWorlds(GridWorlds):
    """N ant-pinpads (A.2): the same rules, with the cell under the ant's centre as its place on the grid.

    Four things differ. Walls have no substance: an episode in which the ant's centre enters one fails. It fails if the ant falls. NOT in
    paper, which is silent: it fails if the centre leaves the board, which has no rim. And obs() is a vector of floats (see AntPinpad).

    NOT in paper: with world.compass its four equal legs have no names of their own. Observations and actions speak of the leg that points north-east as
    leg 1, north-west as 2, south-west as 3, south-east as 4, so that the torso seems to face within 45 degrees of east, whichever way it has turned, and to walk north
    is always nearly the same thing to do. It is the same ant in other coordinates (see JOINTS).
    """

    def __init__(self, world, tasks, things, agent, rng, threads=None):
        super().__init__(world, tasks, things, agent)
        self.centres, self.half = cell_centres(world.G), world.G * CELL / 2
        self.ants = Ants(len(agent), threads)
        inside = rng.uniform(-.5, .5, (len(agent), 2)) * CELL
        self.ants.place(rng, self.rows, self.centres[agent] + inside)

    def position(self):
        """(N, 2) metres."""
        return self.ants.qpos[:, :2]

    def places(self):
        """(N,) how many places on its legs are called in observations and actions: the quarter turns nearest to its yaw; 0 without world.compass."""
        w, _, _, z = self.ants.qpos[:, 3:7].T
        # Yaw as the twist of the orientation, which turning about the board's axis or the torso's own changes by just so much, also in a torso that tilts.
        return np.round(2 * np.arctan2(z, w) / (np.pi / 2)).astype(np.int64) * self.world.compass

    def obs(self):
        """(N, 31 + 2 (O + W)) float32."""
        xy = self.position()
        relative = self.centres[self.things] - xy[:, None]  # (N, O+W, 2)
        body, motion = self.ants.qpos[:, 2:].copy(), self.ants.qvel.copy()
        if self.world.compass:
            k = self.places()
            c, s = np.cos(k * np.pi / 4), -np.sin(k * np.pi / 4)  # half the angle by which the torso turns back, about its own axis
            w, x, y, z = body[:, 1:5].T
            body[:, 1:5] = np.stack([c * w - s * z, c * x + s * y, c * y - s * x, c * z + s * w], axis=1)
            c, s = QUARTER_COS[k % 4], QUARTER_SIN[k % 4]
            x, y = self.ants.qvel[:, 3:5].T
            motion[:, 3], motion[:, 4] = c * x - s * y, s * x + c * y
            body[:, 5:], motion[:, 6:] = renamed(JOINTS, k, body[:, 5:]), renamed(JOINTS, k, motion[:, 6:])
        body[:, 1:5] *= np.where(body[:, 1:2] < 0, -1, 1)  # a quaternion and its negative are the same orientation
        return np.concatenate([symlog(body), symlog(motion), xy / self.half, relative.reshape(len(xy), -1) / self.half,
                               (xy - self.centres[self.agent]) / (CELL / 2)], axis=1).astype(np.float32)

    def step(self, action):
        """action (N, 8) in [-1, 1]; those of finished worlds are ignored. Returns as GridWorlds.step."""
        alive = np.flatnonzero(~self.done)
        self.ants.step(alive, renamed(MOTORS, -self.places()[alive], action[alive]))
        x, y = self.position().T
        off = ~((np.abs(x) < self.half) & (np.abs(y) < self.half))
        row, column = ((np.where(off, 0, v) + self.half) // CELL for v in (-y, x))
        cell = np.where(self.done | off, self.agent, (row * self.world.G + column).astype(np.int64))
        in_wall = self.contents[self.rows, cell] == self.world.O
        return self._enter(cell, ~self.done & (off | in_wall | self.ants.fallen()))


def start(world, tasks, things, agent, rng, threads=None):
    """N worlds at the start of an episode each: GridWorlds, or AntWorlds with poses drawn from rng. Layouts as from `sample_layouts`."""
    if world.body == "ant":
        return AntWorlds(world, tasks, things, agent, rng, threads)
    return GridWorlds(world, tasks, things, agent)


# ------------------------------------------------------------------------------------------------ 5. gymnasium views

PALETTE = np.array([[230, 60, 60], [60, 120, 230], [60, 180, 90], [245, 190, 50], [150, 80, 200],
                    [70, 200, 210], [240, 130, 40], [235, 120, 180], [120, 90, 60], [130, 160, 40]], np.uint8)


def draw_grid(world, obs, cell_px=32):
    """An RGB picture of one observation obs (K,): (G * cell_px, G * cell_px, 3) uint8; walls dark, the agent a black disc."""
    contents = contents_table(world, obs[None, :-1])[0]  # (C,)
    colour = np.full((world.cells, 3), 245, np.uint8)
    colour[contents == world.O] = 70
    on = (contents >= 0) & (contents < world.O)
    colour[on] = PALETTE[contents[on] % len(PALETTE)]
    picture = colour.reshape(world.G, world.G, 3).repeat(cell_px, axis=0).repeat(cell_px, axis=1)
    picture[::cell_px] = picture[:, ::cell_px] = 210  # grid lines
    row, column = np.divmod(obs[-1], world.G)
    y, x = np.mgrid[:picture.shape[0], :picture.shape[1]]
    disc = (y - (row + .5) * cell_px) ** 2 + (x - (column + .5) * cell_px) ** 2 < (.3 * cell_px) ** 2
    picture[disc] = 0
    return picture


class Pinpad(gym.Env):
    """What both gymnasium views share: a batch of one world. Any World field may be given as a keyword.

    Reward: 1 when the task is completed, else 0. Terminated: task completed, a colour visited that is not the next one, or (ant) fallen, in a
    wall, off the board. Truncated: T steps; the horizon is a parameter of this world, so the environment keeps it itself instead of leaving it to
    gymnasium's TimeLimit. reset(options={"task": (0, 1, 4, 5)}) sets the task, any sequence of the world's subgoals; without it
    the post-training task is played. The task is in `info` only: the observation holds nothing about it.
    """
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 5}

    def __init__(self, render_mode=None, **rules):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode '{render_mode}': choose one of {', '.join(self.metadata['render_modes'])}")
        self.world, self.render_mode = World(**rules), render_mode

    def _observe(self):
        return self.observation(), {"task": tuple(self.worlds.task[0, :-1].tolist()), "progress": int(self.worlds.progress[0])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        task = tuple((options or {}).get("task", self.world.post_task))
        self.worlds = start(self.world, [task], *sample_layouts(self.world, self.np_random, 1), self.np_random, threads=1)
        return self._observe()

    def step(self, action):
        if not self.action_space.contains(action):
            raise ValueError(f"action {action} is not {self.actions}")
        reward, terminated, truncated = self.worlds.step(np.array([action]))
        obs, info = self._observe()
        return obs, float(reward[0]), bool(terminated[0]), bool(truncated[0]), info


class GridPinpad(Pinpad):
    """gridworld-pinpad (A.1) for gymnasium: `gym.make("GridPinpad-v0")`.

    Observation: MultiBinary(C * (O+W+1)), exactly O+W+1 ones (paper: 637 numbers, 13 ones).
      | index                          | meaning                                        |
      |--------------------------------|------------------------------------------------|
      | cell * (O+W) + k, k < O        | colour k lies in this cell                     |
      | cell * (O+W) + O + w           | wall w stands in this cell                     |
      | C * (O+W) + cell               | the agent is in this cell                      |
    Action: Discrete(4): up, right, down, left.
    """
    actions = f"one of 0 to 3 ({', '.join(ACTIONS)})"

    def __init__(self, render_mode=None, **rules):
        super().__init__(render_mode, **rules)
        if self.world.body != "point":
            raise ValueError("GridPinpad is the world with body='point'; for body='ant' make AntPinpad")
        self.observation_space = gym.spaces.MultiBinary(self.world.cells * self.world.things)
        self.action_space = gym.spaces.Discrete(4)

    def observation(self):
        return one_hot(self.world, self.worlds.obs())[0]

    def render(self):
        obs = self.worlds.obs()[0]
        if self.render_mode == "rgb_array":
            return draw_grid(self.world, obs)
        if self.render_mode == "ansi":
            return ascii_grid(self.world, obs)


class AntPinpad(Pinpad):
    """ant-pinpad (A.2) for gymnasium: `gym.make("AntPinpad-v0")`; the paper's world by default (G=4, O=4, W=1, T=500).

    Observation: Box of 31 + 2 (O+W) float32 (paper: 41); positions in the plane of the floor, x to the right, y up.
      | index                   | meaning                                                        | unit                            |
      |-------------------------|----------------------------------------------------------------|---------------------------------|
      | 0                       | height of the torso                                            | symlog of metres                |
      | 1 to 4                  | orientation of the torso, quaternion w x y z with w >= 0       | symlog                          |
      | 5 to 12                 | angles of hip 1, ankle 1, .., hip 4, ankle 4                   | symlog of radians               |
      | 13 to 15                | velocity of the torso, x y z                                   | symlog of m/s                   |
      | 16 to 18                | angular velocity of the torso, about its own axes              | symlog of rad/s                 |
      | 19 to 26                | velocities of the joints, in the order of the angles           | symlog of rad/s                 |
      | 27, 28                  | x, y of the torso on the board                                 | half the board's width: -1 to 1 |
      | 29 + 2k, 30 + 2k        | x, y of the cell of colour (then wall) k, seen from the torso  | half the board's width          |
      | 29 + 2 (O+W), the last  | x, y of the torso in its cell                                  | half a cell: -1 to 1            |
    Action: Box(-1, 1, (8,)), the torque of each motor as a share of its largest (150 Nm), held for 0.05 s.
      | index | 0     | 1       | 2     | 3       | 4     | 5       | 6     | 7       |
      |-------|-------|---------|-------|---------|-------|---------|-------|---------|
      | joint | hip 4 | ankle 4 | hip 1 | ankle 1 | hip 2 | ankle 2 | hip 3 | ankle 3 |
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    actions = "8 numbers from -1 to 1, as float32"

    def __init__(self, render_mode=None, **rules):
        super().__init__(render_mode, **{"G": 4, "O": 4, "W": 1, "T": 500, "task_set": "singles", "body": "ant", **rules})
        if self.world.body != "ant":
            raise ValueError("AntPinpad is the world with body='ant'; for body='point' make GridPinpad")
        self.observation_space = gym.spaces.Box(-10, 10, (self.world.ant_obs,), np.float32)  # symlog(22,000) = 10
        self.action_space = gym.spaces.Box(-1, 1, (8,), np.float32)

    def observation(self):
        return self.worlds.obs()[0]

    def render(self):
        if self.render_mode == "rgb_array":
            return draw_ant(self.world, self.worlds.things[0], self.worlds.ants.qpos[0])


def pose_of(world, obs):
    """The pose qpos (..., 15) of an ant from what it saw, obs (..., F): the table of AntPinpad backwards."""
    return np.concatenate([obs[..., 27:29] * world.G * CELL / 2, symexp(obs[..., :13])], axis=-1)


def draw_ant(world, things, qpos, size=256):
    """An RGB picture (size, size, 3) uint8 of one ant qpos (15,) on its board: coloured floor, walls as boxes. Needs OpenGL (EGL), no display."""
    rgba = lambda k: (*(PALETTE[k % len(PALETTE)] / 255).tolist(), 1.) if k < world.O else (.25, .25, .25, 1.)
    tiles = [(*xy, .02, (.93, .93, .93, 1.)) for xy in np.delete(cell_centres(world.G), things, axis=0).tolist()]
    tiles += [(*xy, .02 if k < world.O else .3, rgba(k)) for k, xy in enumerate(cell_centres(world.G)[things].tolist())]
    model = ant_model(tuple(tiles))
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    camera = mujoco.MjvCamera()
    camera.distance, camera.elevation, camera.azimuth = 1.35 * world.G * CELL, -65, 90
    with mujoco.Renderer(model, size, size) as renderer:
        renderer.update_scene(data, camera)
        return renderer.render()


def ascii_grid(world, obs):
    """One observation (K,) as text: digits are colours, # walls, @ the agent (it hides a colour it stands on)."""
    symbols = np.array([*(str(colour) for colour in range(world.O)), "#", "."])
    text = symbols[contents_table(world, obs[None, :-1])[0]]  # content -1 takes the last symbol
    text[obs[-1]] = "@"
    return "\n".join(" ".join(row) for row in text.reshape(world.G, world.G)) + "\n"


gym.register("GridPinpad-v0", entry_point=GridPinpad)
gym.register("AntPinpad-v0", entry_point=AntPinpad)


# ------------------------------------------------------------------------------------------------ 6. the expert (C.1.1)

def distances(world, things):
    """Shortest paths by dynamic programming: dist (N, O, C) int16, steps from every cell to every colour.

    A path may enter neither a wall nor any colour but the one it leads to (C.1.1). UNREACHABLE where there is none; also on
    every forbidden cell itself, so that an agent standing on the last colour never "waits" there.
    """
    G, N = world.G, len(things)
    contents = contents_table(world, things)[:, None]  # (N, 1, C)
    goal = contents == np.arange(world.O)[None, :, None]  # (N, O, C)
    # Cells first, all (layout, colour) pairs side by side: each line of cells below is one contiguous sweep over memory.
    by_cell = lambda x: np.ascontiguousarray(x.reshape(N * world.O, -1).T).reshape(G, G, N * world.O)  # (N, O, C) -> (G, G, N*O)
    dist = by_cell(np.where(goal, 0, UNREACHABLE).astype(np.int16))
    least = by_cell(np.where((contents != -1) & ~goal, UNREACHABLE, 0).astype(np.int16))  # a forbidden cell is never reached
    while True:  # down, up, right, left, each line of cells from the one before it: a path with k bends needs about k/2 rounds
        before = dist.copy()
        for here, there in (*zip(range(1, G), range(G)), *zip(range(G - 2, -1, -1), range(G - 1, 0, -1))):
            for d, low in ((dist, least), (dist.transpose(1, 0, 2), least.transpose(1, 0, 2))):
                np.minimum(d[here], d[there] + 1, out=d[here])
                np.maximum(d[here], low[here], out=d[here])
        if (dist == before).all():
            return dist.reshape(world.cells, N, world.O).transpose(1, 2, 0).copy()  # (C, N, O) -> (N, O, C)


def expert_probs(world, contents, dist, agent, target, eps=0.0):
    """The stochastic expert: probability of each action when heading for `target` (C.1.1).

    contents (N, C), dist (N, O, C), agent (N, T) cells, target (N, T, J) colours -> (N, T, J, 4) float64.
    All actions on a shortest path are equally likely; with probability eps a random action that does not end the episode
    (visits no wrong colour) is taken instead. Rows are zero where the target cannot be reached (it is then never demonstrated).
    """
    n = np.arange(len(agent))[:, None, None, None]
    cell = next_cell(world, contents, agent)  # (N, T, 4)
    ahead = dist[n, target[..., None], cell[:, :, None, :]]  # (N, T, J, 4): distance that remains after each action
    nearest = ahead.min(axis=-1, keepdims=True)
    best = (ahead == nearest) & (nearest < UNREACHABLE)
    probs = (1 - eps) * best / best.sum(axis=-1, keepdims=True).clip(1)
    if eps > 0:
        content = contents[n[..., 0], cell]  # (N, T, 4): colour or nothing; next_cell never enters a wall
        stays = cell == agent[..., None]  # bumping is not a visit, whatever lies under the agent
        harmless = (stays | (content == -1))[:, :, None, :] | (content[:, :, None, :] == target[..., None])
        probs = probs + eps * best.any(-1, keepdims=True) * harmless / harmless.sum(axis=-1, keepdims=True).clip(1)
    return probs


@dataclass
class Trajectories:
    """N expert episodes, padded to the longest. Entries at and beyond length[n] are padding and must be masked.

    things (N, O+W) | agent (N, T+1), the last valid entry is where the episode ended | action (N, T) |
    target (N, T) colour headed for | progress (N, T) colours visited before step t | subgoal (N, T) |
    segment (N, T) subgoals finished before step t | length (N,). All int64. The ant's besides: action is (N, T, 8) float32, and
    sensed (N, T+1, F) float32 is what it saw.
    """
    things: np.ndarray
    agent: np.ndarray
    action: np.ndarray
    target: np.ndarray
    progress: np.ndarray
    subgoal: np.ndarray
    segment: np.ndarray
    length: np.ndarray
    sensed: np.ndarray | None = None

    def __getitem__(self, rows):
        """The chosen episodes, cut to the longest among them."""
        T = self.length[rows].max()
        return Trajectories(self.things[rows], self.agent[rows, :T + 1], self.action[rows, :T], self.target[rows, :T],
                            self.progress[rows, :T], self.subgoal[rows, :T], self.segment[rows, :T], self.length[rows],
                            None if self.sensed is None else self.sensed[rows, :T + 1])

    def mask(self):
        """(N, T) bool: which steps exist."""
        return np.arange(self.action.shape[1]) < self.length[:, None]

    def obs(self):
        """(N, T+1, K): the observations in index form, or (N, T+1, F), the ant's; obs[:, t] is seen before action t."""
        if self.sensed is not None:
            return self.sensed
        N, T1 = self.agent.shape
        things = np.broadcast_to(self.things[:, None], (N, T1, self.things.shape[1]))
        return np.concatenate([things, self.agent[..., None]], axis=-1)

    def visited(self, row):
        """The colours that episode `row` visited, in order, as text: '0-4-1'. (A wall that an ant has entered, its end, shows as O or more.)"""
        cells = self.agent[row, :self.length[row] + 1]
        thing = {cell: k for k, cell in enumerate(self.things[row])}
        return "-".join(str(thing[b]) for a, b in zip(cells[:-1], cells[1:]) if a != b and b in thing) or "none"

    def switches(self):
        """(N, T) bool: the "true switches", first steps of a new subgoal; never at t=0."""
        new = np.zeros(self.segment.shape, bool)
        new[:, 1:] = self.segment[:, 1:] > self.segment[:, :-1]
        return new & self.mask()


def simulate(world, tasks, things, agent, act, rng=None):
    """Play N episodes to their end with `act(worlds, alive) -> actions (len(alive), ...)`, alive = indices of unfinished worlds.

    rng: for the poses of ants. Returns all of them as Trajectories, and success (N,).
    """
    worlds = start(world, tasks, things, agent, rng)
    ant = world.body == "ant"
    record = {name: [] for name in ("agent", "action", "target", "progress", "subgoal", "segment", *["sensed"] * ant)}
    while not worlds.done.all():
        alive = np.flatnonzero(~worlds.done)
        action = np.zeros((len(agent), 8), np.float32) if ant else np.zeros(len(agent), np.int64)
        action[alive] = act(worlds, alive)
        for name, value in (("agent", worlds.agent), ("action", action), ("target", worlds.target().clip(0)),
                            ("progress", worlds.progress.copy()), ("subgoal", worlds.subgoal().clip(0)), ("segment", worlds.segment().clip(0)),
                            *[("sensed", worlds.obs())] * ant):
            record[name].append(value)
        worlds.step(action)
    record["agent"].append(worlds.agent)
    if ant:
        record["sensed"].append(worlds.obs())
    columns = {name: np.stack(values, axis=1) for name, values in record.items()}  # each (N, T) or (N, T+1)
    return Trajectories(things=things, length=worlds.steps, **columns), worlds.success


def grid_expert(world, dist, rng, eps, stuck):
    """`act` for `simulate`: the stochastic shortest-path expert. stuck (N,) is set where it found no path: it then acts at random."""
    def act(worlds, alive):
        probs = expert_probs(world, worlds.contents[alive], dist[alive], worlds.agent[alive, None],
                             worlds.target()[alive, None, None], eps)[:, 0, 0]  # (alive, 4)
        lost = probs.sum(1) == 0
        stuck[alive] |= lost
        probs[lost] = .25
        return (rng.random((len(alive), 1)) > probs.cumsum(1)[:, :-1]).sum(1)
    return act


def ant_expert(world, dist, rng, walk, stuck):
    """`act` for `simulate`: walk to the centre of the next cell on a shortest path; from anywhere in a cell that line stays within the two cells.

    walk(felt (n, 29)) -> torques (n, 8), see `feel`. Among equally short ways an episode prefers, in each cell, one drawn at its start:
    an ant that reconsidered at every step would stagger.
    """
    taste = rng.random((len(dist), world.cells, 4)) + .1

    def act(worlds, alive):
        cell = worlds.agent[alive]
        probs = expert_probs(world, worlds.contents[alive], dist[alive], cell[:, None], worlds.target()[alive, None, None])[:, 0, 0]  # (alive, 4)
        stuck[alive] |= probs.sum(1) == 0
        way = ((probs > 0) * taste[alive, cell]).argmax(1)
        ahead = worlds.centres[neighbour_table(world.G)[cell, way]] - worlds.position()[alive]  # (alive, 2)
        heading = np.zeros((len(worlds.done), 2))
        heading[alive] = ahead / np.linalg.norm(ahead, axis=1, keepdims=True).clip(1e-6)
        return renamed(MOTORS, worlds.places()[alive], walk(worlds.ants.felt(heading)[alive]))
    return act


def generate(world, rng, n, eps=0., walk=None):
    """n successful expert episodes on uniformly drawn pretraining tasks. Failed ones are dropped (C.1.1).

    eps: share of random actions, on the grid; walk: how the ant walks (see `ant_expert`).
    Raises ValueError if fewer than one in a thousand succeeds: such a world has no experts worth the name.
    """
    parts, have, tried, tasks = [], 0, 0, world.tasks
    while have < n:
        m = min(max(256, int((n - have) * 1.1)), 8192 if walk is None else 1024)  # in portions, to bound the memory
        things, agent = sample_layouts(world, rng, m)
        dist, stuck = distances(world, things), np.zeros(m, bool)
        expert = grid_expert(world, dist, rng, eps, stuck) if walk is None else ant_expert(world, dist, rng, walk, stuck)
        played, success = simulate(world, [tasks[i] for i in rng.integers(len(tasks), size=m)], things, agent, expert, rng)
        keep = np.flatnonzero(success & ~stuck)  # a success by luck is dropped, too: it has no expert
        tried += m
        if tried >= 10_000 and have + len(keep) < tried / 1000:
            raise ValueError(f"impossible world: the expert finished a task within T={world.T} steps in only {have + len(keep)} of {tried} layouts")
        if len(keep):
            parts.append(played[keep])
            have += len(keep)
    return concatenate(parts)[np.arange(n)]


def by_cells(world, data):
    """The ant's episodes, cell by cell, as the grid would have recorded them: Trajectories (N, M) whose steps are the moves from one cell to the next, and
    when (N, M) the ant entered the cell that it left by that move (padding: 0). For `exact_bounds`: an ant's demonstrations have their bounds, too."""
    N, T1 = data.agent.shape
    moved = np.zeros((N, T1), bool)  # the ant is in another cell than a step ago
    moved[:, 1:] = (data.agent[:, 1:] != data.agent[:, :-1]) & data.mask()
    length = moved.sum(1)
    place = (~moved).argsort(axis=1, kind="stable")[:, :length.max()]  # (N, M) the steps at which a new cell is entered, then others
    exists = np.arange(length.max()) < length[:, None]
    when = np.where(exists, np.pad(place, ((0, 0), (1, 0)))[:, :-1], 0)  # the first cell is entered at 0
    pick = lambda x: np.take_along_axis(x, when, axis=1)
    before, after = pick(data.agent), np.where(exists, np.take_along_axis(data.agent, place, axis=1), 0)
    way = neighbour_table(world.G)[before] == after[..., None]  # (N, M, 4)
    action = np.where(way.any(-1), way.argmax(-1), -1)  # -1: across a corner
    last = np.take_along_axis(data.agent, data.length[:, None], axis=1)  # (N, 1)
    agent = np.concatenate([before, last], axis=1)
    agent[np.arange(N), length] = last[:, 0]
    return Trajectories(data.things, agent, action, pick(data.target), pick(data.progress), pick(data.subgoal), pick(data.segment), length), when


def concatenate(parts):
    """Join Trajectories of different lengths, padding with zeros."""
    T = max(part.action.shape[1] for part in parts)
    pad = lambda x, width: np.pad(x, ((0, 0), (0, width - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return Trajectories(
        things=np.concatenate([part.things for part in parts]), length=np.concatenate([part.length for part in parts]),
        agent=np.concatenate([pad(part.agent, T + 1) for part in parts]),
        sensed=None if parts[0].sensed is None else np.concatenate([pad(part.sensed, T + 1) for part in parts]),
        **{name: np.concatenate([pad(getattr(part, name), T) for part in parts])
           for name in ("action", "target", "progress", "subgoal", "segment")})


# ------------------------------------------------------------------------------------------------ 7. exact bounds

def exact_bounds(world, data, eps=0.0):
    """What is knowable about the next action, in nats: two arrays (N, T), and the posterior over subgoals (N, T, S).

    bayes: -ln of the Bayes-optimal p(a_t | o_1:t), which knows the expert and the pretraining tasks but not the task being played;
           averaged over steps this is the lowest loss that any sequence model can reach.
    known: -ln p(a_t | o_t, target): the loss of someone who is told the goal; what a perfect controller reaches.
    The posterior at t uses actions before t only. (The horizon's slight preference for short tasks is neglected: with T
    far above the longest expert episode it is nil.)
    """
    contents, dist = contents_table(world, data.things), distances(world, data.things)
    N, T = data.action.shape
    agent, mask = data.agent[:, :-1], data.mask()
    colours = np.broadcast_to(np.arange(world.O), (N, T, world.O))
    probs = expert_probs(world, contents, dist, agent, colours, eps)  # (N, T, O, 4)
    taken = np.take_along_axis(probs, data.action[:, :, None, None], axis=-1)[..., 0]  # (N, T, O): p(a_t | heading for colour)

    # The prior over tasks is uniform over those the expert can finish on this layout, since failures are not demonstrated. A leg
    # is feasible if some neighbour of its start has a path; the first starts at the agent, the others at the previous colour.
    def feasible(start, colour):  # (N,) cells, colour -> (N,) bool
        ahead = next_cell(world, contents, start[:, None])[:, 0]  # (N, 4)
        return dist[np.arange(N)[:, None], colour, ahead].min(axis=1) < UNREACHABLE

    posterior = np.stack([np.all([feasible(agent[:, 0] if k == 0 else data.things[:, task[k - 1]], colour)
                                  for k, colour in enumerate(task)], axis=0) for task in world.tasks], axis=1).astype(float)  # (N, tasks)
    targets = np.full((len(world.tasks), max(map(len, world.tasks)) + 1), -1)  # (tasks, legs + 1)
    labels = np.full_like(targets, -1)
    for i, task in enumerate(world.tasks):
        targets[i, :len(task)], labels[i, :len(task)] = task, [label for label, _ in world.subgoal_of(task)]
    bayes, beliefs = np.zeros((N, T)), np.zeros((N, T, len(world.subgoals)))
    for t in range(T):
        # Where each task would be heading now. A task that is finished is ruled out: its episode would have ended.
        target = targets[:, np.minimum(data.progress[:, t], targets.shape[1] - 1)].T  # (N, tasks)
        label = labels[:, np.minimum(data.progress[:, t], targets.shape[1] - 1)].T
        posterior = np.where(mask[:, t, None], posterior * (target >= 0), posterior)
        posterior = posterior / posterior.sum(1, keepdims=True)
        for s in range(len(world.subgoals)):
            beliefs[:, t, s] = (posterior * (label == s)).sum(1)
        likelihood = np.take_along_axis(taken[:, t], target.clip(0), axis=1)  # (N, tasks)
        posterior = np.where(mask[:, t, None], posterior * likelihood, posterior)
        # A wrong colour entered has likelihood 0 under the task in question, so `progress` is right for every task still alive.
        bayes[:, t] = -np.log(np.where(mask[:, t], posterior.sum(1), 1.))
    known = -np.log(np.where(mask, np.take_along_axis(taken, data.target[..., None], axis=-1)[..., 0], 1.))
    return bayes, known, beliefs
