"""gridworld-pinpad, its expert, and the exact bounds that every loss is compared with.

Read this file first. It needs NumPy and gymnasium only. Bottom-up: 1. task sets (Tables A1, A2) and
World, the rules' numbers   2. the rules as small tables   3. GridWorlds, N worlds stepped at once
4. GridPinpad, one of them for gymnasium   5. the expert (C.1.1)   6. trajectories   7. exact bounds
The second world, a MuJoCo ant on the same board, is in ant.py, which adds itself to WORLDS.

Glossary (name -> meaning -> shape; N worlds, T steps, C = G*G cells, O colours, W walls,
K = O+W+1)
  things    cell of every colour, then of every wall             (N, O+W)   fixed in an episode
  agent     cell of the agent                                    (N,) or (N, T)
  obs       things and agent side by side: where each of the K is (..., K)   see `one_hot`
  contents  what lies in a cell: -1 nothing, 0..O-1 colour, O wall   (N, C)
  dist      steps from a cell to a colour, avoiding the rest     (N, O, C)
  target    the colour to visit next                             (N,) or (N, T)
  progress  how many colours of the task are visited             (N,) or (N, T)
  subgoal   index into World.subgoals, of the one in progress    (N,) or (N, T)
  segment   how many subgoals of the task are finished           (N,) or (N, T)
  body      what moves on the board: a point, or the ant of ant.py; its hooks
            (no_action, senses, rng, threads) can be skipped in reading
  S, J      number of subgoals; of colours asked about at once
Cells are numbered row by row: cell = row * G + column. Actions: 0 up, 1 right, 2 down, 3 left.
"""
import operator
from dataclasses import dataclass, fields

import gymnasium as gym
import numpy as np

ACTIONS = ("up", "right", "down", "left")
UNREACHABLE = 10_000  # larger than any path, small enough for int16 arithmetic
WORLDS = {}  # body -> the class that steps N worlds of it at once: a registry

# ------------------------------------------------------------------------------------- 1. task sets
# A task is a sequence of colours. A subgoal is a run of colours that always appears whole. Each
# entry: subgoals, pretraining tasks, post-training task. The last is never demonstrated.

TASK_SETS = {
    # Table A1 and A.1.2: eight colours in four pairs. None of the transitions that the
    # post-training task makes between pairs (01->23, 23->45, 45->67, 67->01) is in pretraining.
    "pairs": (
        "0-1 2-3 4-5 6-7",
        "0-1-4-5-0-1 0-1-4-5-2-3 0-1-6-7-2-3 2-3-0-1-4-5 2-3-6-7-2-3 2-3-6-7-4-5 "
        "4-5-0-1-4-5 4-5-0-1-6-7 4-5-2-3-6-7 6-7-2-3-0-1 6-7-2-3-6-7 6-7-4-5-0-1 "
        "0-1-6-7-4-5 2-3-0-1-6-7 4-5-2-3-0-1 6-7-4-5-2-3",
        "0-1-2-3-4-5-6-7-0-1-2-3",
    ),
    # Table A2 and A.2.2: every colour is a subgoal. 0->1, 1->2 and 2->3 are not in pretraining.
    "singles": (
        "0 1 2 3",
        "0-3-2 1-0-3 2-1-0 3-2-1 0-2-0 0-2-1 0-3-1 1-0-2 "
        "1-3-1 1-3-2 2-0-2 2-0-3 2-1-3 3-1-0 3-1-3 3-2-0",
        "0-1-2-3",
    ),
    # NOT in paper: a small counterpart of Table A1, four pairs in tasks of two, each followed by
    # two of the others; 01->23, 23->45 and 45->67 are not in pretraining.
    "quad": (
        "0-1 2-3 4-5 6-7",
        "0-1-4-5 0-1-6-7 2-3-6-7 2-3-0-1 4-5-0-1 4-5-2-3 6-7-2-3 6-7-4-5",
        "0-1-2-3-4-5-6-7",
    ),
    # NOT in paper: for the `smoke` preset and the tests, learned in seconds.
    "tiny": ("0 1 2", "0-1 1-2 2-0 0-1-2", "0-2-1"),
}


def parse_tasks(text):
    """'0-1-4 2-3' -> ((0, 1, 4), (2, 3))."""
    return tuple(tuple(int(colour) for colour in task.split("-")) for task in text.split())


@dataclass(frozen=True)
class World:
    """The rules of one pinpad (A.1, A.2). ValueError, in one sentence, if there is no such world.

    G: side of the grid; O: colours; W: walls; T: horizon in steps; task_set: a key of TASK_SETS;
    post: another post-training task than the task set's own, such as "0-1-2"; body: a key of
    WORLDS, "point" (A.1) or "ant" (A.2).
    """
    G: int = 7
    O: int = 8
    W: int = 4
    T: int = 100
    task_set: str = "pairs"
    post: str = ""
    body: str = "point"

    def __post_init__(self):
        for field in fields(self):
            if type(getattr(self, field.name)) is not field.type:
                raise ValueError(f"{field.name}={getattr(self, field.name)!r} is not of type "
                                 f"{field.type.__name__}")
        for name, table in (("task_set", TASK_SETS), ("body", WORLDS)):
            if getattr(self, name) not in table:
                raise ValueError(f"unknown {name.replace('_', ' ')} '{getattr(self, name)}': "
                                 f"choose one of {', '.join(table)} (`import ant` adds the ant)")
        if min(self.G, self.O, self.T) < 1 or self.W < 0:
            raise ValueError(f"impossible world: G={self.G}, O={self.O} and T={self.T} must be "
                             f"positive, W={self.W} not negative")
        if self.K > self.cells:
            raise ValueError(f"impossible world: {self.O} colours, {self.W} walls and the agent do "
                             f"not fit on the {self.cells} cells of a {self.G} x {self.G} grid")
        needed = 1 + max(colour for task in self.tasks for colour in task)
        if self.O < needed:
            raise ValueError(f"impossible world: task set '{self.task_set}' needs {needed} "
                             f"colours, O={self.O}")
        self.read_task(self.post or TASK_SETS[self.task_set][2])

    # The number of cells C, and K of colours, walls and agent together. Then, as tuples of colours,
    # the subgoals, the pretraining tasks and the post-training task.
    cells = property(lambda self: self.G * self.G)
    K = property(lambda self: self.O + self.W + 1)
    subgoals = property(lambda self: parse_tasks(TASK_SETS[self.task_set][0]))
    tasks = property(lambda self: parse_tasks(TASK_SETS[self.task_set][1]))
    post_task = property(lambda self: parse_tasks(self.post or TASK_SETS[self.task_set][2])[0])

    def read_task(self, task):
        """A task as a tuple of colours, from "0-1-4" or from any sequence of whole numbers.
        ValueError, in one sentence, if this world has no such task."""
        colours = task.split("-") if isinstance(task, str) else task
        try:
            colours = tuple(int(c) if isinstance(c, str) else operator.index(c) for c in colours)
        except (TypeError, ValueError):
            colours = ()
        if not colours:
            raise ValueError(f"a task is one or more colours in order, such as 0-1-2, not {task!r}")
        for colour in colours:
            if not 0 <= colour < self.O:
                raise ValueError(f"colour {colour} does not exist: this world has the colours "
                                 f"0 to {self.O - 1}")
        if any(a == b for a, b in zip(colours, colours[1:])):
            raise ValueError(f"task {'-'.join(map(str, colours))} visits a colour twice in a row, "
                             f"which needs two entries into its cell")
        if self.T < len(colours):
            raise ValueError(f"impossible world: the task visits {len(colours)} colours, the "
                             f"horizon is T={self.T} steps")
        self.subgoal_of(colours)
        return colours

    def subgoal_of(self, task):
        """Cut a task into subgoals: for each of its colours, (index of its subgoal, number of
        subgoals before it). The last may be cut short. ValueError if it is made of others."""
        labels, segment = [], 0
        while len(labels) < len(task):
            rest = task[len(labels):]
            match = next((i for i, subgoal in enumerate(self.subgoals)
                          if rest[:len(subgoal)] == subgoal[:len(rest)]), None)
            if match is None:
                raise ValueError(f"task {'-'.join(map(str, task))} is not a sequence of the "
                                 f"subgoals of '{self.task_set}'")
            labels += [(match, segment)] * len(self.subgoals[match])
            segment += 1
        return labels[:len(task)]


# -------------------------------------------------------------------------- 2. the rules, as tables

def sample_layouts(world, rng, n):
    """n initial states: colours, walls and agent on distinct random cells (A.1.1). Returns things
    (n, O+W) and agent (n,), int64. `rng` is a numpy Generator."""
    order = rng.random((n, world.cells)).argsort(axis=1)  # (n, C): a random permutation each
    return order[:, :world.K - 1], order[:, world.K - 1]


def neighbour_table(G):
    """(C, 4): the cell that each action leads to on an empty grid; off the grid is a no-op."""
    row, column = np.divmod(np.arange(G * G), G)
    row_after = np.stack([row - 1, row, row + 1, row], axis=1).clip(0, G - 1)  # (C, 4)
    column_after = np.stack([column, column + 1, column, column - 1], axis=1).clip(0, G - 1)
    return row_after * G + column_after


def symmetries(G):
    """The 8 rotations and reflections of the square: cells (8, C), where each cell goes, and
    actions (8, 4), what each action becomes. Colours are left alone; the first is the identity.
    next(cells[g][c], actions[g][a]) = cells[g][next(c, a)] on an empty grid."""
    steps = np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])  # the actions, as (row, column)
    places = np.stack(np.divmod(np.arange(G * G), G), axis=1) - (G - 1) / 2  # from the centre
    cells, actions = [], []
    for order in ((0, 1), (1, 0)):  # rows and columns as they are, or exchanged;
        for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)):  # each with both signs of both
            row, column = (places[:, order] * signs + (G - 1) / 2).T
            cells.append(row * G + column)
            turned = steps[:, order] * signs  # (4, 2)
            actions.append((turned[:, None] == steps).all(-1).argmax(1))  # (4, 4) -> (4,)
    return np.array(cells).astype(np.int64), np.array(actions)


def contents_table(world, things):
    """(N, C) int64: -1 for an empty cell, the colour 0..O-1, or O for any wall."""
    contents = np.full((len(things), world.cells), -1)
    what = np.minimum(np.arange(world.O + world.W), world.O)  # (O+W,): every wall becomes O
    np.put_along_axis(contents, things, np.broadcast_to(what, things.shape), axis=1)
    return contents


def next_cell(world, contents, agent):
    """(N, T, 4): where each action leads from agent (N, T): moving into a wall or off the grid
    is a no-op (A.1.1)."""
    cell = neighbour_table(world.G)[agent]  # (N, T, 4)
    n = np.arange(len(agent))[:, None, None]
    return np.where(contents[n, cell] == world.O, agent[..., None], cell)


def one_hot(world, obs):
    """The observation vector of A.1.1 from its index form: (..., K) cells -> (..., C * (O+W+1))
    int8: for each cell, O colour channels and W wall channels; then the agent's C channels."""
    channels = world.O + world.W
    index = obs[..., :-1] * channels + np.arange(channels)  # (..., O+W)
    agent = obs[..., -1:] + world.cells * channels  # (..., 1)
    vector = np.zeros((*obs.shape[:-1], world.cells * world.K), np.int8)
    np.put_along_axis(vector, np.concatenate([index, agent], axis=-1), 1, axis=-1)
    return vector


# ------------------------------------------------------------------------------ 3. N worlds at once

class GridWorlds:
    """N gridworld-pinpads stepped together (A.1.1). A finished world stays as it is and pays
    nothing more.

    tasks: N tuples of colours; things, agent as from `sample_layouts`; rng and threads are the
    ant's. Arrays, each (N,): agent, progress, steps, done, success; colours, of each task.
    """
    no_action = np.zeros((), np.int64)  # one action: its shape and dtype
    senses = False  # True: obs() is more than `things` and `agent` and must be recorded

    def __init__(self, world, tasks, things, agent, rng=None, threads=None):
        n = len(agent)
        self.world, self.things, self.agent = world, things, agent.copy()
        self.colours = np.array([len(task) for task in tasks])
        columns = self.colours.max() + 1  # one spare column: the target after the last is "none"
        self.task = np.full((n, columns), -2)
        self.label = np.full((n, columns, 2), -1)  # (subgoal, segment) of each colour of the task
        for task in set(tasks):  # few different tasks, many worlds
            rows = np.array([other == task for other in tasks])
            self.task[rows, :len(task)] = task
            self.label[rows, :len(task)] = world.subgoal_of(task)
        self.contents = contents_table(world, things)
        self.progress, self.steps = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self.done, self.success = np.zeros(n, bool), np.zeros(n, bool)
        self.rows = np.arange(n)

    def target(self):  # (N,); -2 once the task is completed
        return self.task[self.rows, self.progress]

    def subgoal(self):  # (N,); -1 once the task is completed
        return self.label[self.rows, self.progress, 0]

    def segment(self):  # (N,); -1 once the task is completed
        return self.label[self.rows, self.progress, 1]

    def obs(self):
        """(N, K) int64, index form: things and agent, and nothing of task, goal or visits."""
        return np.concatenate([self.things, self.agent[:, None]], axis=1)

    def step(self, action):
        """action (N,) in 0..3. Returns reward (N,) float32, terminated and truncated (N,) bool,
        of this step alone: of a world that was finished before it, 0 and False."""
        ahead = next_cell(self.world, self.contents, self.agent[:, None])  # (N, 1, 4)
        cell = ahead[self.rows, 0, action]
        return self._enter(np.where(self.done, self.agent, cell))

    def _enter(self, cell, failed=False):
        """What follows from where the agent is after its step: cell (N,), unchanged in finished
        worlds; failed (N,): the episode ends without success, whatever lies there."""
        content = self.contents[self.rows, cell]
        # A colour is visited when it is entered from a different cell: bumping while standing on
        # it is not a visit.
        visited = (cell != self.agent) & (content >= 0)
        right = visited & (content == self.target()) & ~np.asarray(failed)
        self.agent = cell
        self.progress += right
        self.steps += ~self.done
        success = right & (self.progress == self.colours)
        terminated = success | (visited & ~right) | failed
        truncated = ~terminated & ~self.done & (self.steps >= self.world.T)
        self.success |= success
        self.done |= terminated | truncated
        return success.astype(np.float32), terminated, truncated


WORLDS["point"] = GridWorlds


# ------------------------------------------------------------------------------ 4. for gymnasium

PALETTE = np.array([[230, 60, 60], [60, 120, 230], [60, 180, 90], [245, 190, 50], [150, 80, 200],
                    [70, 200, 210], [240, 130, 40], [235, 120, 180], [120, 90, 60],
                    [130, 160, 40]], np.uint8)


def draw_grid(world, obs, cell_px=32):
    """An RGB picture of one observation obs (K,): (G * cell_px, G * cell_px, 3) uint8; walls
    dark, the agent a black disc."""
    colour = np.full((world.cells, 3), 245, np.uint8)
    colour[obs[:world.O]] = PALETTE[np.arange(world.O) % len(PALETTE)]
    colour[obs[world.O:-1]] = 70
    picture = colour.reshape(world.G, world.G, 3)  # (C, 3) -> (G, G, 3)
    picture = picture.repeat(cell_px, axis=0).repeat(cell_px, axis=1)
    picture[::cell_px] = picture[:, ::cell_px] = 210  # grid lines
    row, column = np.divmod(obs[-1], world.G)
    y, x = np.mgrid[:picture.shape[0], :picture.shape[1]]
    away = (y - (row + .5) * cell_px) ** 2 + (x - (column + .5) * cell_px) ** 2
    picture[away < (.3 * cell_px) ** 2] = 0
    return picture


def ascii_grid(world, obs):
    """One observation (K,) as text: digits are colours, # walls, @ the agent (it hides a colour
    it stands on)."""
    text = np.full(world.cells, ".", object)
    text[obs] = [*map(str, range(world.O)), *"#" * world.W, "@"]
    return "\n".join(" ".join(row) for row in text.reshape(world.G, world.G)) + "\n"


class Pinpad(gym.Env):
    """Both gymnasium environments, but for spaces, read_action, observation and draw: a batch of
    one world. Any World field is a keyword.

    Reward: 1 when the task is completed, else 0. Terminated: task completed, a colour visited
    that is not the next one, or what the body adds. Truncated: T steps, which are World's, not a
    TimeLimit's. After the end, step() goes on to report it, with reward 0.
    reset(options={"task": "0-1-4-5"}) sets the task, which `info` alone tells; without it the
    post-training task is played. ResetNeeded before the first reset, ValueError on wrong input.
    """
    metadata = {"render_modes": ["ansi", "rgb_array"], "render_fps": 5}
    body = "point"

    def __init__(self, render_mode=None, **rules):
        modes = self.metadata["render_modes"]
        if render_mode not in (None, *modes):
            raise ValueError(f"unknown render_mode {render_mode!r}, choose of {', '.join(modes)}")
        self.world = World(**{"body": self.body, **rules})
        if self.world.body != self.body:
            raise ValueError(f"{type(self).__name__} is the world with body='{self.body}'")
        self.render_mode, self.worlds = render_mode, None

    def _observe(self):
        task = tuple(self.worlds.task[0, :-1].tolist())
        return self.observation(), {"task": task, "progress": int(self.worlds.progress[0])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        options = {} if options is None else options
        if not isinstance(options, dict) or set(options) - {"task"}:
            raise ValueError(f"options are None or {{'task': ...}}, not {options!r}")
        task = self.world.read_task(options.get("task", self.world.post_task))
        layout = sample_layouts(self.world, self.np_random, 1)
        self.worlds = WORLDS[self.body](self.world, [task], *layout, self.np_random, threads=1)
        self.ended = (False, False)
        return self._observe()

    def step(self, action):
        if self.worlds is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        reward, terminated, truncated = self.worlds.step(self.read_action(action)[None])
        if not any(self.ended):
            self.ended = (bool(terminated[0]), bool(truncated[0]))
        obs, info = self._observe()
        return obs, float(reward[0]), *self.ended, info

    def render(self):
        if self.worlds is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        return self.draw() if self.render_mode else None


class GridPinpad(Pinpad):
    """gridworld-pinpad (A.1) for gymnasium: `gym.make("envs:GridPinpad-v0")`.

    Observation: MultiBinary(C * (O+W+1)), exactly O+W+1 ones (paper: 637 numbers, 13 ones).
      | index                          | meaning                                        |
      |--------------------------------|------------------------------------------------|
      | cell * (O+W) + k, k < O        | colour k lies in this cell                     |
      | cell * (O+W) + O + w           | wall w stands in this cell                     |
      | C * (O+W) + cell               | the agent is in this cell                      |
    Action: Discrete(4): up, right, down, left.
    """

    def __init__(self, render_mode=None, **rules):
        super().__init__(render_mode, **rules)
        self.observation_space = gym.spaces.MultiBinary(self.world.cells * self.world.K)
        self.action_space = gym.spaces.Discrete(4)

    def read_action(self, action):
        """One of 0 to 3, as any kind of whole number, -> () int64. ValueError on all else."""
        try:
            index = operator.index(action)
        except TypeError:
            index = -1
        kind = str(getattr(action, "dtype", type(action).__name__))
        if not 0 <= index < 4 or kind.endswith("bool"):
            raise ValueError(f"action {action!r} is not one of 0 to 3 ({', '.join(ACTIONS)})")
        return np.array(index)

    def observation(self):
        return one_hot(self.world, self.worlds.obs())[0]

    def draw(self):
        obs = self.worlds.obs()[0]
        drawers = {"rgb_array": draw_grid, "ansi": ascii_grid}
        return drawers[self.render_mode](self.world, obs)


gym.register("GridPinpad-v0", entry_point="envs:GridPinpad")


# ---------------------------------------------------------------------------- 5. the expert (C.1.1)

def distances(world, things):
    """Shortest paths by dynamic programming: dist (N, O, C) int16, steps from every cell to every
    colour.

    A path may enter neither a wall nor any colour but the one it leads to (C.1.1). UNREACHABLE
    where there is none, and on every forbidden cell, the colour that the agent stands on among
    them: to bump and stay there is no step of a path.
    """
    G, N = world.G, len(things)
    contents = contents_table(world, things)[:, None]  # (N, 1, C)
    goal = contents == np.arange(world.O)[None, :, None]  # (N, O, C)
    forbidden = (contents != -1) & ~goal  # (N, O, C)

    def by_cell(x):  # (N, O, C) -> (G, G, N*O): a line of cells is one sweep over memory
        return np.ascontiguousarray(x.reshape(N * world.O, -1).T).reshape(G, G, N * world.O)

    dist = by_cell(np.where(goal, 0, UNREACHABLE).astype(np.int16))
    least = by_cell(np.where(forbidden, UNREACHABLE, 0).astype(np.int16))
    forth = list(zip(range(1, G), range(G)))  # (a line, the line before it)
    back = list(zip(range(G - 2, -1, -1), range(G - 1, 0, -1)))
    turn = (1, 0, 2)
    while True:  # rows and columns, forth and back; few rounds, as paths have few bends
        before = dist.copy()
        for here, there in (*forth, *back):
            for d, low in ((dist, least), (dist.transpose(turn), least.transpose(turn))):
                np.minimum(d[here], d[there] + 1, out=d[here])
                np.maximum(d[here], low[here], out=d[here])
        if (dist == before).all():
            return dist.reshape(world.cells, N, world.O).transpose(1, 2, 0).copy()  # (N, O, C)


def expert_probs(world, contents, dist, agent, target, eps=0.0):
    """The stochastic expert: probability of each action when heading for `target` (C.1.1).

    contents (N, C), dist (N, O, C), agent (N, T) cells, target (N, T, J) colours -> (N, T, J, 4)
    float64. All actions on a shortest path are equally likely; with probability eps a random one
    that visits no wrong colour is taken instead. Rows are zero where the target can't be reached.
    """
    n = np.arange(len(agent))[:, None, None, None]
    cell = next_cell(world, contents, agent)  # (N, T, 4)
    ahead = dist[n, target[..., None], cell[:, :, None, :]]  # (N, T, J, 4): steps left after each
    nearest = ahead.min(axis=-1, keepdims=True)
    best = (ahead == nearest) & (nearest < UNREACHABLE)
    probs = (1 - eps) * best / best.sum(axis=-1, keepdims=True).clip(1)
    if eps > 0:
        content = contents[n[..., 0], cell]  # (N, T, 4): colour or nothing, never a wall
        stays = cell == agent[..., None]  # bumping is no visit, whatever lies under the agent
        harmless = (stays | (content == -1))[:, :, None, :]
        harmless = harmless | (content[:, :, None, :] == target[..., None])  # (N, T, J, 4)
        share = harmless / harmless.sum(axis=-1, keepdims=True).clip(1)
        probs = probs + eps * best.any(-1, keepdims=True) * share
    return probs


def grid_expert(world, dist, rng, stuck, eps=0.):
    """`act` for `simulate`: the stochastic shortest-path expert. stuck (N,) bool is set where it
    finds no path: it then acts at random."""
    def act(worlds, alive):
        probs = expert_probs(world, worlds.contents[alive], dist[alive], worlds.agent[alive, None],
                             worlds.target()[alive, None, None], eps)[:, 0, 0]  # (alive, 4)
        pathless = probs.sum(1) == 0
        stuck[alive] |= pathless
        probs[pathless] = .25
        return (rng.random((len(alive), 1)) > probs.cumsum(1)[:, :-1]).sum(1)
    return act


# ---------------------------------------------------------------------------------- 6. trajectories

PER_STEP = ("action", "target", "progress", "subgoal", "segment")


@dataclass
class Trajectories:
    """N episodes, padded to the longest. Steps at and beyond length[n] are padding.

    things (N, O+W) | agent (N, T+1), the last valid entry is where the episode ended |
    action (N, T) | target (N, T) colour headed for | progress (N, T) colours visited before t |
    subgoal (N, T) | segment (N, T) subgoals finished before step t | length (N,). All int64.
    Of the ant: action (N, T, A) and sensed (N, T+1, F), what it saw, are float32.
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
        per_step = {name: getattr(self, name)[rows, :T] for name in PER_STEP}
        sensed = None if self.sensed is None else self.sensed[rows, :T + 1]
        return Trajectories(things=self.things[rows], agent=self.agent[rows, :T + 1],
                            length=self.length[rows], sensed=sensed, **per_step)

    def mask(self):
        """(N, T) bool: which steps exist."""
        return np.arange(self.action.shape[1]) < self.length[:, None]

    def obs(self):
        """(N, T+1, K) int64, or (N, T+1, F) of the ant; obs[:, t] is seen before action t."""
        if self.sensed is not None:
            return self.sensed
        N, T1 = self.agent.shape
        things = np.broadcast_to(self.things[:, None], (N, T1, self.things.shape[1]))
        return np.concatenate([things, self.agent[..., None]], axis=-1)

    def visited(self, row, O):
        """Which of the O colours episode `row` visited, in order, as text: '0-4-1'."""
        cells = self.agent[row, :self.length[row] + 1]
        thing = {cell: k for k, cell in enumerate(self.things[row, :O])}
        entered = [b for a, b in zip(cells[:-1], cells[1:]) if a != b and b in thing]
        return "-".join(str(thing[cell]) for cell in entered) or "none"

    def switches(self):
        """(N, T) bool: the "true switches", first steps of a new subgoal; never at t=0."""
        new = np.zeros(self.segment.shape, bool)
        new[:, 1:] = self.segment[:, 1:] > self.segment[:, :-1]
        return new & self.mask()


def concatenate(parts):
    """Join Trajectories of different lengths, padding with zeros."""
    def joined(name):  # (n, T, ...) of each part -> (N, the longest T, ...)
        arrays = [getattr(part, name) for part in parts]
        if arrays[0] is None or arrays[0].ndim == 1:
            return None if arrays[0] is None else np.concatenate(arrays)
        T = max(x.shape[1] for x in arrays)
        return np.concatenate([np.pad(x, ((0, 0), (0, T - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
                               for x in arrays])
    return Trajectories(**{f.name: joined(f.name) for f in fields(Trajectories)})


def simulate(world, tasks, things, agent, act, rng=None):
    """Play N episodes to their end with `act(worlds, alive) -> actions (len(alive), ...)`,
    alive = indices of unfinished worlds. Returns all as Trajectories, and success (N,)."""
    worlds = WORLDS[world.body](world, tasks, things, agent, rng)
    steps, cells, sensed = [], [worlds.agent], [worlds.obs()]
    while not worlds.done.all():
        alive = np.flatnonzero(~worlds.done)
        action = np.stack([worlds.no_action] * len(agent))  # (N, ...)
        action[alive] = act(worlds, alive)
        steps.append((action, worlds.target().clip(0), worlds.progress.copy(),
                      worlds.subgoal().clip(0), worlds.segment().clip(0)))
        worlds.step(action)
        cells.append(worlds.agent)
        if worlds.senses:
            sensed.append(worlds.obs())
    stack = lambda values: np.stack(values, axis=1)  # (N, ...) a step -> (N, T, ...)
    played = Trajectories(things=things, agent=stack(cells), length=worlds.steps,
                          sensed=stack(sensed) if worlds.senses else None,
                          **{name: stack(values) for name, values in zip(PER_STEP, zip(*steps))})
    return played, worlds.success


class NoExperts(ValueError):
    """In this world experts hardly ever finish a task."""


def generate(world, rng, n, eps=0., expert=None, portion=8192):
    """n successful expert episodes on uniformly drawn pretraining tasks (C.1.1: failed ones are
    dropped).

    eps: share of random actions of the grid's expert; expert: another one, `expert(world, dist,
    rng, stuck) -> act`; portion: how many are played at once at most, which bounds the memory.
    NoExperts if fewer than one in a thousand succeeds.
    """
    parts = []
    have = tried = 0
    tasks = world.tasks
    while have < n:
        m = min(max(256, int((n - have) * 1.1)), portion)
        things, agent = sample_layouts(world, rng, m)
        dist = distances(world, things)
        stuck = np.zeros(m, bool)
        act = (grid_expert(world, dist, rng, stuck, eps) if expert is None
               else expert(world, dist, rng, stuck))
        chosen = [tasks[i] for i in rng.integers(len(tasks), size=m)]
        played, success = simulate(world, chosen, things, agent, act, rng)
        keep = np.flatnonzero(success & ~stuck)  # a success by luck has no expert
        tried += m
        if tried >= 10_000 and have + len(keep) < tried / 1000:
            raise NoExperts(f"impossible world: the expert finished a task within T={world.T} "
                            f"steps in only {have + len(keep)} of {tried} layouts")
        if len(keep):
            parts.append(played[keep])
            have += len(keep)
    return concatenate(parts)[np.arange(n)]


# ---------------------------------------------------------------------------------- 7. exact bounds

def exact_bounds(world, data, eps=0.0):
    """What is knowable about the next action, in nats: two arrays (N, T), and the posterior over
    subgoals (N, T, S).

    bayes: -ln of the Bayes-optimal p(a_t | o_1:t), which knows the expert and the pretraining
           tasks but not the task being played: on average the least loss of any sequence model.
    known: -ln p(a_t | o_t, target): the loss of someone who is told the goal.
    The posterior at t uses actions before t only. (The horizon's slight preference for short
    tasks is neglected: with T far above the longest expert episode it is nil.)
    """
    contents = contents_table(world, data.things)
    dist = distances(world, data.things)
    N, T = data.action.shape
    agent, mask = data.agent[:, :-1], data.mask()
    colours = np.broadcast_to(np.arange(world.O), (N, T, world.O))
    probs = expert_probs(world, contents, dist, agent, colours, eps)  # (N, T, O, 4)
    # (N, T, O): p(a_t | heading for each colour)
    taken = np.take_along_axis(probs, data.action[:, :, None, None], axis=-1)[..., 0]

    # The prior over tasks is uniform over those the expert can finish on this layout, since
    # failures are not demonstrated. A leg is feasible if some neighbour of its start has a path;
    # the first starts at the agent, the others at the previous colour.
    def feasible(start, colour):  # (N,) cells, colour -> (N,) bool
        ahead = next_cell(world, contents, start[:, None])[:, 0]  # (N, 4)
        return dist[np.arange(N)[:, None], colour, ahead].min(axis=1) < UNREACHABLE

    tasks = world.tasks
    posterior = np.ones((N, len(tasks)))
    targets = np.full((len(tasks), max(map(len, tasks)) + 1), -1)  # (tasks, legs + 1)
    labels = np.full_like(targets, -1)
    for i, task in enumerate(tasks):
        targets[i, :len(task)] = task
        labels[i, :len(task)] = [label for label, _ in world.subgoal_of(task)]
        for leg, colour in enumerate(task):
            start = data.things[:, task[leg - 1]] if leg else agent[:, 0]
            posterior[:, i] *= feasible(start, colour)
    bayes = np.zeros((N, T))
    beliefs = np.zeros((N, T, len(world.subgoals)))
    for t in range(T):
        # Where each task would be heading now. One that is finished would have ended the episode.
        legs = np.minimum(data.progress[:, t], targets.shape[1] - 1)  # (N,)
        target, label = targets[:, legs].T, labels[:, legs].T  # (N, tasks)
        posterior = np.where(mask[:, t, None], posterior * (target >= 0), posterior)
        posterior = posterior / posterior.sum(1, keepdims=True)
        for s in range(len(world.subgoals)):
            beliefs[:, t, s] = (posterior * (label == s)).sum(1)
        likelihood = np.take_along_axis(taken[:, t], target.clip(0), axis=1)  # (N, tasks)
        posterior = np.where(mask[:, t, None], posterior * likelihood, posterior)
        # A wrong colour entered has likelihood 0: `progress` is right for every task still alive.
        bayes[:, t] = -np.log(np.where(mask[:, t], posterior.sum(1), 1.))
    told = np.take_along_axis(taken, data.target[..., None], axis=-1)[..., 0]  # (N, T)
    known = -np.log(np.where(mask, told, 1.))
    return bayes, known, beliefs
