"""The worlds: rules, observation, experts, and the exact bounds."""

import copy
import pickle
import re
import subprocess
import sys
import warnings
from collections import deque
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from envs import (
    GridWorlds,
    World,
    contents_table,
    distances,
    exact_bounds,
    expert_probs,
    generate,
    neighbour_table,
    one_hot,
    sample_layouts,
    symmetries,
)

ROOT = Path(__file__).resolve().parents[1]
PAPER = World()  # A.1
ERRANDS = World(G=5, O=5, W=2, T=60, task_set="errands")


def rng(seed=0):
    return np.random.default_rng(seed)


class NaiveWorld:
    """A.1.1 once more, as a person would write it: dictionaries and ifs. The judge of
    GridWorlds."""

    def __init__(self, world, task, things, agent):
        at = lambda cell: divmod(int(cell), world.G)
        self.colours = {at(cell): k for k, cell in enumerate(things[: world.O])}
        self.walls = {at(cell) for cell in things[world.O :]}
        self.G, self.T, self.task, self.agent, self.visits, self.steps = (
            world.G,
            world.T,
            task,
            at(agent),
            0,
            0,
        )

    def step(self, action):
        self.steps += 1
        row, column = self.agent
        goal = {
            0: (row - 1, column),
            1: (row, column + 1),
            2: (row + 1, column),
            3: (row, column - 1),
        }[action]
        if not (0 <= goal[0] < self.G and 0 <= goal[1] < self.G) or goal in self.walls:
            goal = self.agent
        moved, self.agent = goal != self.agent, goal
        if moved and goal in self.colours:
            if self.colours[goal] != self.task[self.visits]:
                return 0.0, True, False
            self.visits += 1
            if self.visits == len(self.task):
                return 1.0, True, False
        return 0.0, False, self.steps >= self.T


def test_environment_checker_has_nothing_to_say():
    from gymnasium.utils.env_checker import check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mode in (None, "ansi", "rgb_array"):
            check_env(
                gym.make("GridPinpad-v0", render_mode=mode).unwrapped,
                skip_render_check=mode is None,
            )


def test_observation_has_the_papers_size_and_nothing_about_the_task():
    env = gym.make("GridPinpad-v0").unwrapped
    first, info = env.reset(seed=3, options={"task": (0, 1)})
    second, _ = env.reset(seed=3, options={"task": (6, 7, 2, 3)})
    assert first.shape == (637,) and first.sum() == 13
    assert (first == second).all() and info["task"] == (0, 1)


def test_observation_is_the_same_whatever_was_visited():
    # Two histories that end in the same cell: the colour was visited in one of them only.
    world = World(G=3, O=3, W=0, T=20, task_set="tiny")
    things = np.array([[1, 8, 6]])  # colour 0 in the top middle
    a, b = (GridWorlds(world, [(0, 1)], things, np.array([0])) for _ in range(2))
    for action in (1, 2, 3, 0):  # over colour 0, and back to the corner
        a.step(np.array([action]))
    assert a.progress[0] == 1 and b.progress[0] == 0
    assert (one_hot(world, a.obs()) == one_hot(world, b.obs())).all()


def test_one_hot_puts_each_thing_in_its_channel():
    things, agent = sample_layouts(PAPER, rng(), 50)
    vector = one_hot(PAPER, np.concatenate([things, agent[:, None]], axis=1))
    grid, where = vector[:, : 49 * 12].reshape(50, 49, 12), vector[:, 49 * 12 :]
    for k in range(12):  # every colour and every wall has a channel of its own
        assert (grid[:, :, k].argmax(1) == things[:, k]).all() and (grid[:, :, k].sum(1) == 1).all()
    assert (where.argmax(1) == agent).all() and (where.sum(1) == 1).all()


def test_layouts_do_not_overlap_and_cover_the_grid():
    things, agent = sample_layouts(ERRANDS, rng(), 4000)
    cells = np.sort(np.concatenate([things, agent[:, None]], axis=1), axis=1)
    assert (cells[:, 1:] > cells[:, :-1]).all()
    assert np.abs(np.bincount(agent, minlength=25) / 4000 - 1 / 25).max() < 0.015


@pytest.mark.parametrize("world", [PAPER, ERRANDS, World(G=3, O=3, W=1, T=9, task_set="tiny")])
def test_batched_worlds_equal_single_and_naive_ones(world):
    n = 60
    things, agent = sample_layouts(world, rng(1), n)
    choice = rng(2)
    tasks = [
        world.tasks[i] if i % 2 else world.post_task
        for i in choice.integers(len(world.tasks), size=n)
    ]
    batch = GridWorlds(world, tasks, things, agent)
    naive = [NaiveWorld(world, task, *place) for task, *place in zip(tasks, things, agent)]
    single = [
        gym.make(
            "GridPinpad-v0", G=world.G, O=world.O, W=world.W, T=world.T, task_set=world.task_set
        ).unwrapped
        for _ in range(n)
    ]
    for i, env in enumerate(single):
        env.reset(seed=i, options={"task": tasks[i]})
        env.worlds = GridWorlds(world, [tasks[i]], things[i : i + 1], agent[i : i + 1])
    # Half of the actions are the expert's, so that visits, successes and wrong colours all happen.
    dist, contents = distances(world, things), contents_table(world, things)
    ends = {"success": 0, "wrong": 0, "horizon": 0}
    while not batch.done.all():
        target = np.where(batch.done, 0, batch.target())
        expert = expert_probs(world, contents, dist, batch.agent[:, None], target[:, None, None])[
            :, 0, 0
        ].argmax(1)
        action = np.where(choice.random(n) < 0.7, expert, choice.integers(4, size=n))
        running = ~batch.done
        reward, terminated, truncated = batch.step(action)
        for i in np.flatnonzero(running):
            assert naive[i].step(int(action[i])) == (reward[i], terminated[i], truncated[i])
            assert (
                naive[i].agent == divmod(int(batch.agent[i]), world.G)
                and naive[i].visits == batch.progress[i]
            )
            obs, *rest = single[i].step(int(action[i]))
            assert tuple(rest[:3]) == (reward[i], terminated[i], truncated[i])
            assert (obs == one_hot(world, batch.obs()[i])).all()
        assert (reward[~running] == 0).all() and not (terminated | truncated)[~running].any()
        ends["success"] += int(reward.sum())
        ends["wrong"] += int((terminated & (reward == 0)).sum())
        ends["horizon"] += int(truncated.sum())
    assert ends["success"] and ends["wrong"]
    assert (batch.success.sum() == ends["success"]) and sum(ends.values()) == n


def test_bumping_on_a_colour_is_not_a_visit():
    world = World(G=3, O=3, W=0, T=20, task_set="tiny")
    batch = GridWorlds(world, [(0, 1)], np.array([[0, 8, 4]]), np.array([1]))
    batch.step(np.array([3]))  # left, onto colour 0 in the corner
    assert batch.progress[0] == 1
    for action in (0, 3, 0):  # against the border: still on colour 0, which is not the next colour
        _, terminated, _ = batch.step(np.array([action]))
        assert not terminated[0] and batch.progress[0] == 1
    batch.step(np.array([1]))
    _, terminated, _ = batch.step(np.array([3]))  # left it and came back: now it is a (wrong) visit
    assert terminated[0] and not batch.success[0]


def test_task_sets_are_the_papers():
    assert PAPER.subgoals == ((0, 1), (2, 3), (4, 5), (6, 7)) and len(PAPER.tasks) == 16
    assert PAPER.post_task == (0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3)
    assert (0, 1, 4, 5, 0, 1) in PAPER.tasks and (6, 7, 4, 5, 2, 3) in PAPER.tasks
    singles = World(O=4, task_set="singles")
    assert (
        len(singles.tasks) == 16
        and (3, 2, 0) in singles.tasks
        and singles.post_task == (0, 1, 2, 3)
    )
    assert len(set(World(O=5, task_set="errands").tasks)) == 16


@pytest.mark.parametrize(
    "name, unseen",
    [
        ("pairs", {(0, 1), (1, 2), (2, 3), (3, 0)}),
        ("singles", {(0, 1), (1, 2), (2, 3)}),
        ("errands", {(0, 1), (1, 2), (2, 3)}),
        ("tiny", {(0, 2), (2, 1)}),
    ],
)
def test_post_training_task_needs_transitions_that_pretraining_never_shows(name, unseen):
    world = World(task_set=name)

    def transitions(task):
        order = [
            subgoal
            for k, (subgoal, segment) in enumerate(world.subgoal_of(task))
            if k == 0 or segment > world.subgoal_of(task)[k - 1][1]
        ]
        return set(zip(order, order[1:]))

    shown = set().union(*(transitions(task) for task in world.tasks))
    assert unseen == transitions(world.post_task) - shown


@pytest.mark.parametrize(
    "rules, word",
    [
        (dict(G=3), "cells"),
        (dict(O=4), "colours"),
        (dict(T=5), "horizon"),
        (dict(G=0), "positive"),
        (dict(task_set="nonsense"), "unknown task set"),
    ],
)
def test_impossible_worlds_are_refused_in_one_sentence(rules, word):
    with pytest.raises(ValueError, match=word) as error:
        World(**rules)
    assert "\n" not in str(error.value)


def test_shortest_paths_equal_breadth_first_search():
    things, _ = sample_layouts(PAPER, rng(4), 20)
    dist = distances(PAPER, things)
    for n in range(20):
        for colour in range(PAPER.O):
            goal = int(things[n, colour])
            forbidden = set(things[n].tolist()) - {goal}
            found, queue = {goal: 0}, deque([goal])
            while queue:
                cell = queue.popleft()
                row, column = divmod(cell, 7)
                for r, c in (
                    (row - 1, column),
                    (row + 1, column),
                    (row, column - 1),
                    (row, column + 1),
                ):
                    if (
                        0 <= r < 7
                        and 0 <= c < 7
                        and r * 7 + c not in forbidden
                        and r * 7 + c not in found
                    ):
                        found[r * 7 + c] = found[cell] + 1
                        queue.append(r * 7 + c)
            reached = {cell: d for cell, d in enumerate(dist[n, colour].tolist()) if d < 1000}
            assert reached == found


def test_expert_takes_every_shortest_action_equally_often_and_no_other():
    # Agent in the corner, colour 0 diagonally opposite, nothing between: right and down are both
    # shortest.
    world = World(G=3, O=3, W=0, T=9, task_set="tiny")
    things, agent = np.array([[8, 2, 6]]), np.array([[0]])
    contents, dist = contents_table(world, things), distances(world, things)
    assert np.allclose(
        expert_probs(world, contents, dist, agent, np.array([[[0]]]))[0, 0, 0], [0, 0.5, 0.5, 0]
    )
    # With eps the rest is spread over all actions that visit no wrong colour; here all four are
    # harmless.
    assert np.allclose(
        expert_probs(world, contents, dist, agent, np.array([[[0]]]), 0.2)[0, 0, 0],
        [0.05, 0.45, 0.45, 0.05],
    )
    # From cell 1, "right" leads onto colour 1: never taken on the way to colour 0.
    noisy = expert_probs(world, contents, dist, np.array([[1]]), np.array([[[0]]]), 0.3)[0, 0, 0]
    assert noisy[1] == 0 and np.isclose(noisy.sum(), 1)


@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_demonstrations_are_successes_with_true_labels(eps):
    data = generate(ERRANDS, rng(5), 300, eps)
    tasks = set(ERRANDS.tasks)
    for n in range(300):
        T = data.length[n]
        cells = data.agent[n, : T + 1]
        colour_of = {cell: k for k, cell in enumerate(data.things[n, :5])}
        visits = [
            (t, colour_of[b])
            for t, (a, b) in enumerate(zip(cells[:-1], cells[1:]))
            if a != b and b in colour_of
        ]
        colours = tuple(c for _, c in visits)
        assert (
            colours in tasks and visits[-1][0] == T - 1
        )  # all of the task, nothing else, and it ends there
        # The label at t is the IDENTITY of the subgoal whose colours are visited next, not a
        # position or a counter.
        labels = [subgoal for subgoal, _ in ERRANDS.subgoal_of(colours)]
        expected, k = [], 0
        for t in range(T):
            expected.append((labels[k], colours[k]))
            k += k < len(visits) and visits[k][0] == t
        assert [*zip(data.subgoal[n, :T], data.target[n, :T])] == expected
        switches = np.flatnonzero(data.switches()[n])
        assert switches.tolist() == [visits[1][0] + 1, visits[3][0] + 1]  # after coming home, twice


def test_the_same_seed_gives_the_same_data():
    a, b = generate(ERRANDS, rng(6), 50), generate(ERRANDS, rng(6), 50)
    assert (a.agent == b.agent).all() and (a.action == b.action).all()


@pytest.mark.parametrize("eps", [0.0, 0.15])
def test_bayes_bound_equals_a_brute_force_posterior(eps):
    """Posterior over all tasks by replaying every one of them from scratch, in the naive world."""
    world = World(G=3, O=3, W=1, T=30, task_set="tiny")
    data = generate(world, rng(7), 40, eps)
    bayes, known, beliefs = exact_bounds(world, data, eps)
    contents, dist = contents_table(world, data.things), distances(world, data.things)

    def action_probs(n, cell, target):
        return expert_probs(
            world,
            contents[n : n + 1],
            dist[n : n + 1],
            np.array([[cell]]),
            np.array([[[target]]]),
            eps,
        )[0, 0, 0]

    for n in range(40):

        def feasible(
            task,
        ):  # the expert can go from the agent to the first colour, and from each colour to the next
            starts = [data.agent[n, 0], *data.things[n, list(task[:-1])]]
            return all(
                action_probs(n, cell, colour).sum() > 0 for cell, colour in zip(starts, task)
            )

        weight = {task: float(feasible(task)) for task in world.tasks}
        naive = {
            task: NaiveWorld(world, task, data.things[n], data.agent[n, 0]) for task in world.tasks
        }
        for t in range(data.length[n]):
            total = sum(weight.values())
            mixture, belief = 0.0, np.zeros(3)
            for task in [task for task in world.tasks if weight[task] > 0]:
                target = task[naive[task].visits]
                p = action_probs(n, data.agent[n, t], target)[data.action[n, t]]
                mixture += weight[task] / total * p
                belief[target] += weight[task] / total
                weight[task] *= p
                _, terminated, _ = naive[task].step(int(data.action[n, t]))
                if terminated:
                    if t + 1 < data.length[n]:
                        weight[task] = 0.0  # this task would have ended here, the episode went on
            assert np.isclose(-np.log(mixture), bayes[n, t]) and np.allclose(belief, beliefs[n, t])
            assert np.isclose(
                known[n, t],
                -np.log(action_probs(n, data.agent[n, t], data.target[n, t])[data.action[n, t]]),
            )
        assert (bayes[n, data.length[n] :] == 0).all() and (known[n, data.length[n] :] == 0).all()


def test_bounds_of_the_papers_world():
    """A prototype found 0.261 Bayes-optimal, 0.172 goal known, 31 steps, for A.1 with Table A1.
    Standard error here about 0.003."""
    data = generate(PAPER, rng(8), 3000)
    bayes, known, _ = exact_bounds(PAPER, data)
    mask = data.mask()
    assert abs(bayes[mask].mean() - 0.261) < 0.008 and abs(known[mask].mean() - 0.172) < 0.006
    assert abs(data.length.mean() - 31) < 1.5


def test_experts_under_the_bayes_predictor_lie_between_goal_known_and_chance():
    data = generate(ERRANDS, rng(9), 500)
    bayes, known, beliefs = exact_bounds(ERRANDS, data)
    mask = data.mask()
    assert known[mask].mean() < bayes[mask].mean() < np.log(4)
    assert np.allclose(beliefs[mask].sum(-1), 1)
    # A posterior is calibrated: the mean belief in the truth equals the mean of its own square.
    truth = np.take_along_axis(beliefs, data.subgoal[..., None], axis=-1)[..., 0]
    assert abs(truth[mask].mean() - (beliefs**2).sum(-1)[mask].mean()) < 0.02


def test_pictures_show_agent_walls_and_colours():
    env = gym.make("GridPinpad-v0", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (224, 224, 3) and picture.dtype == np.uint8
    assert (picture == 0).all(-1).any()  # the agent
    assert (
        len(np.unique(picture.reshape(-1, 3), axis=0)) == 8 + 4
    )  # colours; empty, wall, line, agent
    text = gym.make("GridPinpad-v0", render_mode="ansi").unwrapped
    text.reset(seed=0)
    assert text.render().count("#") == 4 and text.render().count("@") == 1


# ------------------------------------------------------------------- as people use gymnasium


def grid_env(**rules):
    return gym.make("envs:GridPinpad-v0", **rules).unwrapped


@pytest.mark.parametrize(
    "action",
    [
        -1,
        4,
        True,
        np.True_,
        1.0,
        "up",
        None,
        [1],
        np.array([1]),
        torch.tensor(True),
        torch.tensor(1.0),
    ],
)
def test_an_action_that_does_not_exist_is_refused(action):
    env = grid_env()
    env.reset(seed=0)
    with pytest.raises(ValueError, match="not one of 0 to 3"):
        env.step(action)


@pytest.mark.parametrize("action", [2, np.int64(2), np.uint8(2), np.array(2), torch.tensor(2)])
def test_an_action_may_be_any_whole_number(action):
    env, other = grid_env(), grid_env()
    env.reset(seed=0)
    other.reset(seed=0)
    assert (env.step(action)[0] == other.step(2)[0]).all()


@pytest.mark.parametrize(
    "options, word",
    [
        ({"task": (0, 0)}, "twice"),
        ({"task": (0, 1) * 60}, "horizon"),
        ({"task": ()}, "colours in"),
        ({"task": []}, "colours in"),
        ({"task": (0, 2)}, "subgoals"),
        ({"task": "0-9"}, "colour 9 does"),
        ({"task": "0-red"}, "colours in order"),
        ({"task": (0, 10**30)}, "does not exist"),
        ({"task": 3}, "colours in order"),
        ({"task": (0, 1.0)}, "colours in order"),
        ({"task": None}, "colours in order"),
        ({"tsak": (0, 1)}, "options"),
        ([("task", 1)], "options"),
        ("task", "options"),
    ],
)
def test_one_check_of_tasks_for_both_doors(options, word):
    env = grid_env()
    with pytest.raises(ValueError, match=word) as error:
        env.reset(seed=0, options=options)
    assert "\n" not in str(error.value)


def test_a_task_is_written_as_on_the_command_line_too():
    env = grid_env()
    for task in ("0-1-4-5", (0, 1, 4, 5), [0, 1, 4, 5], np.array([0, 1, 4, 5])):
        assert env.reset(seed=0, options={"task": task})[1]["task"] == (0, 1, 4, 5)
    assert env.reset(seed=0, options={})[1]["task"] == env.world.post_task


@pytest.mark.parametrize(
    "rules",
    [
        {"post": 3},
        {"post": [0, 1]},
        {"T": float("inf")},
        {"G": 7.0},
        {"W": True},
        {"task_set": None},
        {"post": "0-9"},
        {"post": "-"},
    ],
)
def test_impossible_constructions_are_one_sentence(rules):
    with pytest.raises(ValueError) as error:
        grid_env(**rules)
    assert "\n" not in str(error.value)


def test_before_the_first_reset_and_after_the_end():
    env = grid_env(render_mode="ansi")
    for call in (lambda: env.step(0), env.render):
        with pytest.raises(gym.error.ResetNeeded, match="reset"):
            call()
    env.reset(seed=0)
    while not any(end := env.step(env.action_space.sample())[2:4]):
        pass
    for _ in range(3):  # it goes on to say so
        _, reward, *flags, _ = env.step(0)
        assert reward == 0 and tuple(flags) == end
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)


def test_copies_go_on_equally():
    env = grid_env()
    env.reset(seed=0)
    env.step(1)
    copies = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    for action in (0, 1, 2, 3, 1):
        obs, *rest = env.step(action)
        for other in copies:
            theirs, *same = other.step(action)
            assert (obs == theirs).all() and rest == same


def test_a_fresh_interpreter_makes_both_worlds_by_name_alone():
    """As README says, and in worker processes."""
    code = """
import gymnasium as gym
if __name__ == "__main__":
    for name in ("envs:GridPinpad-v0", "ant:AntPinpad-v0"):
        gym.make(name).reset(seed=0)
        many = gym.make_vec(name, num_envs=2, vectorization_mode="async")
        many.reset(seed=0)
        many.step(many.action_space.sample())
        many.close()
    print("both")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "both\n", done.stderr


@pytest.mark.parametrize("other", [False, True])
def test_the_lines_of_python_in_the_readme_run(other):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    if other:  # the world that the comment names
        block = re.sub(r"^env = gym.make.*\n# or ", "env = ", block, flags=re.M)
        assert 'env = gym.make("ant:' in block
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_grid_needs_neither_mujoco_nor_torch():
    code = "import sys, envs; print({'mujoco', 'torch', 'ant', 'train'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("G", [3, 4])
def test_symmetries_are_the_eight_of_the_square_and_commute_with_moving(G):
    cells, actions = symmetries(G)
    move = neighbour_table(G)
    assert (
        len({tuple(table) for table in cells}) == 8
        and (cells[0] == np.arange(G * G)).all()
        and (actions[0] == np.arange(4)).all()
    )
    for to, act in zip(cells, actions):
        assert sorted(to) == list(range(G * G)) and sorted(act) == [0, 1, 2, 3]
        assert (
            to[move] == move[to][:, act]
        ).all()  # move, then turn the world = turn the world, then move as turned


def test_the_post_training_task_can_be_another_one():
    world = World(G=5, O=4, W=0, T=50, task_set="singles", post="0-1-2-3-0")
    assert (
        world.post_task == (0, 1, 2, 3, 0)
        and world.tasks == World(G=5, O=4, W=0, T=50, task_set="singles").tasks
    )
    env = gym.make("GridPinpad-v0", G=5, O=4, W=0, T=50, task_set="singles", post="0-1-2-3-0")
    assert env.reset(seed=0)[1]["task"] == (0, 1, 2, 3, 0)
    shown = {pair for task in world.tasks for pair in zip(task, task[1:])}
    assert not shown & set(
        zip(world.post_task, world.post_task[1:])
    )  # what `grid-small` asks for was never demonstrated: no leg of it
    for wrong in ("0-x", "0--1", "0-0-1", "0-9"):
        with pytest.raises(ValueError):
            World(G=5, O=4, W=0, T=50, task_set="singles", post=wrong)
    with pytest.raises(ValueError, match="subgoals"):
        World(G=5, O=5, W=0, T=50, task_set="errands", post="0-1")
