"""The ant: its body, its rules, its observation."""

import copy
import dataclasses
import functools
import os
import pickle
import subprocess
import sys
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import ant  # before mujoco: sets MUJOCO_GL
import config
import figures
import runs
import train
from ant import (
    CELL,
    HEIGHTS,
    Ant,
    Ants,
    AntWorlds,
    BodyEmbedding,
    Walker,
    ant_expert,
    ant_model,
    by_cells,
    cell_centres,
    gae,
    pose_of,
    right_turns,
    symexp,
    turned,
    walker_step,
)
from envs import PALETTE, World, distances, neighbour_table, sample_layouts, simulate

WORLD = World(G=4, O=4, W=1, T=500, task_set="singles", body="ant")
WORLD_24 = World(G=4, O=4, W=1, T=24, task_set="singles", body="ant")


def rng(seed=0):
    return np.random.default_rng(seed)


def worlds(n=1, task=(0, 1, 2, 3), seed=0):
    return AntWorlds(WORLD, [task] * n, *sample_layouts(WORLD, rng(seed), n), rng(seed), threads=1)


def restless():
    """A walker whose answers are large."""
    torch.manual_seed(0)
    walker = Walker().requires_grad_(False)
    for p in walker.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return walker


def carry(w, xy):
    """Put the ant upright at xy and let one action of no torque pass, which moves it by
    millimetres."""
    w.ants.place(rng(), w.rows, np.tile(xy, (len(w.rows), 1)))
    w.ants.qpos[:, 2] = 0.6
    return w.step(np.zeros((len(w.rows), 8)))


def test_gymnasium_finds_no_fault():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("AntPinpad-v0").unwrapped, skip_render_check=True)
    assert gym.make("AntPinpad-v0").observation_space.shape == (41,)
    for name, body in (("AntPinpad-v0", "point"), ("GridPinpad-v0", "ant")):
        with pytest.raises(ValueError, match="body"):
            gym.make(name, body=body)


def test_the_body_is_the_classic_one():
    """Every number of gymnasium's Ant-v5 file but the integrator. (Cameras, textures and lights
    are of no consequence.)"""
    ours, theirs = (
        ant_model(),
        mujoco.MjModel.from_xml_path(gym.__path__[0] + "/envs/mujoco/assets/ant.xml"),
    )
    for field in (
        "body_mass",
        "body_inertia",
        "body_pos",
        "body_parentid",
        "jnt_type",
        "jnt_range",
        "jnt_axis",
        "jnt_limited",
        "jnt_margin",
        "dof_armature",
        "dof_damping",
        "geom_type",
        "geom_size",
        "geom_pos",
        "geom_friction",
        "geom_margin",
        "geom_condim",
        "geom_contype",
        "geom_conaffinity",
        "actuator_gear",
        "actuator_trnid",
        "actuator_ctrlrange",
        "actuator_ctrllimited",
        "qpos0",
    ):
        assert np.array_equal(getattr(ours, field), getattr(theirs, field)), field
    assert ours.opt.timestep == theirs.opt.timestep


def test_n_ants_are_n_single_ants():
    """Bit for bit, with any number of threads, and while some of them have ended."""
    things, agent = sample_layouts(WORLD, rng(), 6)
    tasks = [WORLD.tasks[i] for i in range(6)]
    together = AntWorlds(WORLD, tasks, things, agent, rng(1), threads=2)
    alone = []
    for i in range(6):
        w = AntWorlds(
            WORLD, tasks[i : i + 1], things[i : i + 1], agent[i : i + 1], rng(2), threads=1
        )
        w.ants.sim.state[:] = together.ants.sim.state[i : i + 1]
        alone.append(w)
    actions = rng(3).uniform(-1, 1, (60, 6, 8))
    for action in actions:
        result = together.step(action)
        for i, w in enumerate(alone):
            assert [x[i] for x in result] == [x[0] for x in w.step(action[i : i + 1])]
            assert np.array_equal(together.obs()[i], w.obs()[0])
    assert len(set(together.steps.tolist())) > 1  # some went on after others had ended


def test_colours_count_when_they_are_entered_in_order():
    w = worlds()
    centre = cell_centres(4)[w.things[0]]
    empty = cell_centres(4)[np.setdiff1d(np.arange(16), w.things[0])]
    assert [x[0] for x in carry(w, empty[0])] == [0, False, False]
    for k in range(3):
        assert [x[0] for x in carry(w, centre[k])] == [0, False, False] and w.progress == k + 1
        assert [x[0] for x in carry(w, centre[k] + 0.3 * CELL)] == [
            0,
            False,
            False,
        ] and w.progress == k + 1  # still inside: no new visit
        assert [x[0] for x in carry(w, empty[0])] == [0, False, False]
    assert [x[0] for x in carry(w, centre[3])] == [1, True, False] and w.success
    before = w.obs()
    assert [x[0] for x in w.step(np.ones((1, 8)))] == [0, False, False] and np.array_equal(
        before, w.obs()
    )  # over is over


@pytest.mark.parametrize("where", ["wrong colour", "wall", "off the board", "jumped"])
def test_endings(where):
    w = worlds()
    centre = cell_centres(4)[w.things[0]]
    if where == "jumped":
        w.ants.qpos[:, 2] = 1.5
        result = w.step(np.zeros((1, 8)))
    else:
        result = carry(
            w,
            {"wrong colour": centre[1], "wall": centre[4], "off the board": [2 * CELL + 0.01, 0]}[
                where
            ],
        )
    assert [x[0] for x in result] == [0, True, False] and not w.success


def test_the_range_of_heights():
    ants = Ants(4, threads=1)
    ants.qpos[:, 2] = HEIGHTS[0] - 0.01, HEIGHTS[0], HEIGHTS[1], HEIGHTS[1] + 0.01
    assert ants.fallen().tolist() == [True, False, False, True]


def test_an_ant_whose_physics_diverges_fails_and_stays_finite():
    w = worlds(2)
    w.ants.qvel[0] = 1e12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, terminated, _ = w.step(np.zeros((2, 8)))
    assert terminated.tolist() == [True, False] and np.isfinite(w.obs()).all()


def test_orientation_has_one_sign():
    w = worlds(1)
    before = w.obs()
    w.ants.qpos[:, 3:7] *= -1  # the same orientation
    assert np.allclose(before, w.obs()) and before[0, 1] >= 0


def test_the_expert_walks_shortest_paths_around_walls_and_wrong_colours():
    """A walker that is carried: each step it moves .4 m along its heading. It must never fail
    where there is a path, and take the shortest."""
    n, r = 64, rng(3)
    things, agent = sample_layouts(WORLD, r, n)
    dist, stuck = distances(WORLD, things), np.zeros(n, bool)
    tasks = [WORLD.tasks[i % 16] for i in range(n)]
    w = AntWorlds(WORLD, tasks, things, agent, r, threads=1)
    act = ant_expert(WORLD, dist, r, lambda felt: np.zeros((2, len(felt), 8)), stuck)
    headings = []
    w.ants.felt = lambda heading: headings.append(heading) or heading
    entered = np.zeros(n, int)
    while not w.done.all():
        alive = np.flatnonzero(~w.done)
        act(w, alive)
        xy, cell = w.ants.qpos[:, :2].copy(), w.agent.copy()
        w.ants.place(r, alive, xy[alive] + 0.4 * headings[-1][alive])
        w.ants.qpos[alive, 2] = 0.6
        w.ants.step = lambda rows, action: None  # carried, not walking
        w.step(np.zeros((n, 8)))
        entered += w.agent != cell
    assert (w.success | stuck).all() and w.success.mean() > 0.7
    shortest = np.zeros(n, int)
    for k in range(n):
        here = agent[k]
        for colour in tasks[k]:
            ahead = neighbour_table(4)[here]
            shortest[k] += 1 + dist[k, colour, ahead[ahead != here]].min()
            here = things[k, colour]
    assert (entered == shortest)[w.success].all()


def test_generalised_advantage_is_the_sum_it_stands_for():
    torch.manual_seed(0)
    outcome, value, cut = torch.randn(7, 3), torch.randn(7, 3), torch.rand(7, 3) < 0.3
    advantage = gae(outcome, value, cut, 0.9, 0.8)
    for n in range(3):
        for t in range(7):
            total, weight = 0.0, 1.0
            for k in range(t, 7):
                total += weight * (outcome[k, n] - value[k, n])
                weight *= 0.9 * 0.8
                if cut[k, n]:
                    break
            assert torch.isclose(advantage[t, n], torch.as_tensor(total), atol=1e-5)


def test_the_horizon():
    w = AntWorlds(
        World(G=4, O=4, W=0, T=8, task_set="singles", body="ant"),
        [(0, 1)],
        np.array([[0, 1, 2, 3]]),
        np.array([10]),
        rng(),
    )
    ends = [w.step(np.zeros((1, 8)))[1:] for _ in range(8)]
    assert not any(a or b for a, b in ends[:7]) and not ends[7][0] and ends[7][1]


def test_the_observation_is_what_the_table_says():
    w = worlds(3)
    for _ in range(5):
        w.step(rng().uniform(-1, 1, (3, 8)))
    obs, unlog = w.obs(), lambda x: np.sign(x) * np.expm1(np.abs(x))
    xy = obs[:, 27:29] * 2 * CELL  # half of four cells
    assert np.allclose(xy, w.ants.qpos[:, :2], atol=1e-5)
    assert np.allclose(unlog(obs[:, 0]), w.ants.qpos[:, 2], atol=1e-5) and np.allclose(
        unlog(obs[:, 13:16]), w.ants.qvel[:, :3], atol=1e-4
    )
    for k in range(5):
        assert np.allclose(
            xy + obs[:, 29 + 2 * k : 31 + 2 * k] * 2 * CELL,
            cell_centres(4)[w.things[:, k]],
            atol=1e-5,
        )
    assert np.allclose(cell_centres(4)[w.agent] + obs[:, 39:41] * CELL / 2, xy, atol=1e-5)
    sign = np.where(w.ants.qpos[:, 3:4] < 0, -1, 1)  # of the quaternion
    poses = np.concatenate(
        [w.ants.qpos[:, :3], sign * w.ants.qpos[:, 3:7], w.ants.qpos[:, 7:]], axis=1
    )
    assert np.allclose([pose_of(WORLD, o) for o in obs], poses, atol=1e-4)
    other = AntWorlds(WORLD, [(3, 0)] * 3, w.things, w.agent, rng())  # another task
    other.ants.sim.state[:], other.agent = w.ants.sim.state, w.agent
    assert np.array_equal(other.obs(), obs)


def test_poses_at_the_start():
    w = worlds(400)
    inside = (w.ants.qpos[:, :2] - cell_centres(4)[w.agent]) / CELL
    assert np.abs(inside).max() <= 0.5 and inside.std() > 0.25
    yaw = 2 * np.arctan2(w.ants.qpos[:, 6], w.ants.qpos[:, 3])
    assert np.abs(np.exp(1j * yaw).mean()) < 0.15  # any direction
    assert (
        0.09 < np.abs(w.ants.qpos[:, 7:]).max() <= 0.1 and 0.09 < np.abs(w.ants.qvel).max() <= 0.1
    )


def test_what_a_walker_feels_does_not_depend_on_place_and_direction():
    ants = Ants(2, threads=1)
    ants.place(rng(), np.arange(2), np.zeros((2, 2)))
    for _ in range(10):
        ants.step(np.arange(2), rng().uniform(-1, 1, (2, 8)))
    turn, angle = np.array([[0.0, -1.0], [1.0, 0.0]]), np.pi / 2
    qpos, qvel = ants.qpos[0].copy(), ants.qvel[0].copy()
    w, x, y, z = qpos[3:7]
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    ants.qpos[1] = [
        *(turn @ qpos[:2] + 5),
        qpos[2],
        c * w - s * z,
        c * x - s * y,
        c * y + s * x,
        c * z + s * w,
        *qpos[7:],
    ]
    ants.qvel[1] = [*(turn @ qvel[:2]), *qvel[2:]]
    heading = np.array([0.6, 0.8])
    felt = ants.felt(np.stack([heading, turn @ heading]))
    assert np.allclose(felt[0], felt[1], atol=1e-5) and felt.shape == (2, 29)
    assert (
        np.abs(
            ants.felt(np.stack([heading, heading]))[0] - ants.felt(np.stack([heading, heading]))[1]
        ).max()
        > 0.1
    )


@pytest.mark.parametrize("g", range(8))
def test_a_turned_ant_is_an_ant_in_a_turned_world(g):
    """Put an ant into the pose that a turned observation tells, into the turned world: it sees
    that, the turned torques move it alike, and a walker turns likewise."""
    n, walker = 6, restless()
    w, other = (
        AntWorlds(WORLD, [(0, 1)] * n, *sample_layouts(WORLD, rng(), n), rng(1), threads=1)
        for _ in range(2)
    )
    act = rng().uniform(-1, 1, (14, n, 8)).astype(np.float32)
    for action in act[:10]:
        w.step(action)
    w.done[:] = False
    c, s = (1, 0, -1, 0)[g % 4], (0, 1, 0, -1)[g % 4]
    turn = np.array([[c, -s], [s, c]]) @ np.diag([1, -1 if g >= 4 else 1])  # of the board
    centres = cell_centres(4)
    there = np.array([np.abs(centres - turn @ xy).sum(1).argmin() for xy in centres])
    look = lambda action: [
        x[:, 0].numpy()
        for x in turned(
            w.world,
            torch.full((n, 1), g),
            torch.from_numpy(w.obs())[:, None],
            torch.from_numpy(action)[:, None],
        )
    ]
    seen, _ = look(act[0])
    other.ants.sim.state[:], other.things, other.agent = (
        w.ants.sim.state,
        there[w.things],
        there[w.agent],
    )
    other.ants.qpos[:], other.ants.qvel[:] = pose_of(WORLD, seen), symexp(seen[:, 13:27])
    heading = np.tile([0.6, 0.8], (n, 1))
    torques = lambda worlds, heading: walker.walk(0.0)(worlds.ants.felt(heading))[0]
    for action in act[10:]:
        seen, action_there = look(action)
        assert np.allclose(seen, other.obs(), atol=1e-4)
        assert np.allclose(
            look(torques(w, heading))[1], torques(other, heading @ turn.T), atol=1e-4
        )
        values = [
            walker.critic(torch.from_numpy(ants.felt(h)))
            for ants, h in ((w.ants, heading), (other.ants, heading @ turn.T))
        ]
        assert torch.allclose(*values, atol=1e-4) and values[0].std() > 0.01
        for worlds, a in ((w, action), (other, action_there)):
            worlds.ants.step(np.arange(n), a)


def test_what_the_embedding_adds_is_what_a_walker_feels_and_how_far_things_are():
    w = worlds(5)
    for _ in range(5):
        w.step(rng().uniform(-1, 1, (5, 8)))
    embed, obs = BodyEmbedding(41, 4, 6, 9), torch.from_numpy(w.obs())[:, None]
    with torch.no_grad():
        embed.bag.weight.zero_()
        embed.linear.weight.zero_()
        embed.linear.bias.zero_()
        embed.linear.weight[:9, 41 + 6 :] = torch.eye(
            9
        )  # the board's vertical, the velocity, the place in the cell
        x = embed(obs)[:, 0]
        felt = w.ants.felt(np.tile([1.0, 0.0], (5, 1)))
        assert np.allclose(x[:, :3], felt[:, 1:4], atol=1e-5) and np.allclose(
            x[:, 3:6], felt[:, 4:7], atol=1e-4
        )
        assert torch.allclose(x[:, 6:].norm(dim=1), obs[:, 0, 39:].norm(dim=1), atol=1e-5)
        embed.linear.weight.zero_()
        embed.bag.weight[:] = torch.rand(245, 9)
        row, column = np.divmod(w.things, 4)
        at, to = np.divmod(w.agent[:, None], 4)
        index = torch.from_numpy(
            np.arange(5) * 49 + (at - row + 3) * 7 + column - to + 3
        )  # y is up, rows count down
        assert torch.allclose(embed(obs)[:, 0], embed.bag.weight[index].sum(1))


def test_an_episode_of_ants_is_recorded():
    n = 4
    data, success = simulate(
        WORLD,
        [WORLD.post_task] * n,
        *sample_layouts(WORLD, rng(), n),
        lambda worlds, alive: rng(int(worlds.steps.max())).uniform(-1, 1, (len(alive), 8)),
        rng(),
    )
    T = data.length.max()
    assert (
        data.obs().shape == (n, T + 1, 41) and data.action.shape == (n, T, 8) and not success.any()
    )
    assert np.allclose(
        data.obs()[:, 0, 39:],
        (data.obs()[:, 0, 27:29] * 2 * CELL - cell_centres(4)[data.agent[:, 0]]) / (CELL / 2),
        atol=1e-5,
    )
    part = data[np.array([1])]
    assert part.obs().shape[1] == data.length[1] + 1


@pytest.fixture(scope="module")
def walks():
    """Successful clean episodes of the walker that comes with the repository, and the walker."""
    walker, n = Walker().requires_grad_(False), 40
    walker.load_state_dict(
        torch.load(runs.ASSETS / "ant-small/seed0/walker.pt", weights_only=True)["model"]
    )
    things, agent = sample_layouts(WORLD, rng(5), n)
    act = ant_expert(WORLD, distances(WORLD, things), rng(5), walker.walk(0.0), np.zeros(n, bool))
    data, success = simulate(
        WORLD, [WORLD.tasks[i % 16] for i in range(n)], things, agent, act, rng(5)
    )
    assert success.mean() > 0.6
    return data[np.flatnonzero(success)], walker


def test_what_is_meant_is_recorded_and_noise_moves_the_ant_besides(walks):
    walker, n = walks[1], 40
    things, agent = sample_layouts(WORLD, rng(5), n)
    for noise in (0.0, 2.0):
        w, felt = worlds(n), []
        walk = walker.walk(noise)
        heard = lambda x: felt.append(x) or walk(x)
        act = ant_expert(WORLD, distances(WORLD, things), rng(5), heard, np.zeros(n, bool))
        meant = act(w, np.arange(n))
        assert np.allclose(meant, walker.walk(0.0)(felt[0])[1])
        w.step(meant)
        tremor = w.ants.ctrl - meant
        free = np.abs(w.ants.ctrl) < 1  # not cut at what a motor can do
        # Twice the walker's .2, less what is cut.
        assert tremor.any() == (noise > 0) and (noise == 0 or 0.2 < tremor[free].std() < 0.45)


def test_an_episode_cell_by_cell(walks):
    data, _ = walks
    cells, when = by_cells(WORLD, data)
    for n in range(len(data.length)):
        path = data.agent[n, : data.length[n] + 1]
        entered = [0, *(t for t in range(1, len(path)) if path[t] != path[t - 1])]
        M = cells.length[n]
        assert (
            M == len(entered) - 1
            and list(when[n, :M]) == entered[:-1]
            and list(cells.agent[n, : M + 1]) == list(path[entered])
        )
        assert list(neighbour_table(4)[cells.agent[n, :M], cells.action[n, :M]]) == list(
            cells.agent[n, 1 : M + 1]
        )
        assert list(cells.target[n, :M]) == list(data.target[n, when[n, :M]])


def test_the_expert_turns_as_he_does_and_no_guess_of_his_goal_is_as_good(walks):
    data, walker = walks
    shares = right_turns(walker, WORLD, data, data.action)
    assert (
        shares["right_turns"] > 0.98
        and shares["right_turns_blind"] < shares["right_turns_bayes"] - 0.1
        and 0.6 < shares["right_turns_bayes"] < 0.9
    )
    assert right_turns(walker, WORLD, data, np.zeros_like(data.action))["right_turns"] < 0.5
    # Episodes that no expert of the grid would play do not count, though they are the longest.
    cells = by_cells(WORLD, data)[0].length
    longest = cells == cells.max()
    others = np.flatnonzero(~longest)
    spoilt = dataclasses.replace(data, target=data.target.copy())
    spoilt.target[longest] = (data.target[longest] + 1) % WORLD.O
    left = data[others]
    alone = right_turns(walker, WORLD, left, left.action)
    assert right_turns(walker, WORLD, spoilt, data.action) == alone != shares


def test_a_thinned_episode_keeps_where_cells_begin(walks):
    data, _ = walks
    batch = {
        "obs": torch.from_numpy(data.obs()),
        "action": torch.from_numpy(data.action),
        "mask": torch.from_numpy(data.mask()),
        "switches": torch.from_numpy(data.switches()),
    }
    torch.manual_seed(0)
    thin = ant.thinned(batch, 4, 0.12)
    assert 0.15 < thin["mask"].sum() / batch["mask"].sum() < 0.2  # one step in 8, and those
    cells, when = by_cells(WORLD, data)
    for n in range(len(data.length)):
        seen, done, M = (
            thin["obs"][n, :-1][thin["mask"][n]].numpy(),
            thin["action"][n][thin["mask"][n]].numpy(),
            cells.length[n],
        )
        t = [int((np.abs(data.sensed[n] - o).sum(1) == 0).argmax()) for o in seen]
        assert thin["switches"][n][thin["mask"][n]].nonzero()[:, 0].tolist() == [
            t.index(k) for k in data.switches()[n].nonzero()[0]
        ]
        assert np.array_equal(
            thin["obs"][n, len(t)], data.sensed[n, data.length[n]]
        )  # the last observation
        assert (
            t == sorted(set(t))
            and set(when[n, :M]) <= set(t)
            and np.array_equal(done, data.action[n, t])
        )


def test_the_picture_shows_the_ant_on_its_board(opengl):
    env = gym.make("AntPinpad-v0", render_mode="rgb_array").unwrapped
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8
    red = (picture[..., 0] > 200) & (picture[..., 1] < 90)
    blue = (picture[..., 2] > 200) & (picture[..., 0] < 90)
    assert (
        red.sum() > 500 and blue.sum() > 500 and (picture.max(-1) < 60).sum() > 200
    )  # two colours and the wall


@pytest.mark.parametrize(
    "action",
    [
        np.zeros(7),
        np.full(8, 1.1),
        np.full(8, np.nan),
        "walk",
        True,
        None,
        np.zeros((1, 8)),
        [True] * 8,
    ],
)
def test_torques_that_no_motor_has_are_refused(action):
    env = gym.make("ant:AntPinpad-v0").unwrapped
    env.reset(seed=0)
    with pytest.raises(ValueError, match="8 numbers from -1 to 1"):
        env.step(action)


def test_torques_may_be_numbers_of_any_kind():
    zeros = [np.zeros(8, np.int64), [0] * 8, np.zeros(8, np.float32), torch.zeros(8)]
    seen = []
    for action in zeros:
        env = gym.make("ant:AntPinpad-v0").unwrapped
        env.reset(seed=0)
        seen.append(env.step(action)[0])
    assert all(np.array_equal(seen[0], other) for other in seen)


def test_copies_of_an_ant_go_on_equally():
    env = gym.make("ant:AntPinpad-v0").unwrapped
    env.reset(seed=0)
    actions = rng().uniform(-1, 1, (30, 8))
    for action in actions[:10]:
        env.step(action)
    copies = copy.deepcopy(env), pickle.loads(pickle.dumps(env))
    for action in actions[10:]:
        obs, *rest = env.step(action)
        for other in copies:
            theirs, *same = other.step(action)
            assert np.array_equal(obs, theirs) and rest == same


def test_a_stale_display_does_not_matter(opengl):
    code = (
        "import gymnasium as gym; env = gym.make('ant:AntPinpad-v0', render_mode='rgb_array');"
        "env.reset(seed=0); print(env.render().shape)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "MUJOCO_GL"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=runs.ASSETS.parent,
            env=environment | {"DISPLAY": display},
        )
        for display in (":77", "")
    ]
    for process in both:
        out, err = process.communicate(timeout=100)
        assert out == "(256, 256, 3)\n", err


def test_without_a_driver_one_sentence_names_the_variable():
    code = (
        "import ant, numpy as np; from envs import World\n"
        "try: ant.draw_ant(World(G=4, O=4, W=1, T=9, task_set='singles', body='ant'),"
        " np.arange(5), ant.ant_model().qpos0)\n"
        "except RuntimeError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=runs.ASSETS.parent,
        env=os.environ | {"MUJOCO_GL": "off"},
    )
    assert "MUJOCO_GL=off" in done.stdout and len(done.stdout.splitlines()) == 1, done.stderr


def test_numbers_are_written_where_the_tiles_are(opengl):
    """on_picture against the picture: each colour's pixel is of its colour."""
    w = worlds()
    w.ants.qpos[:, :2] = 50.0  # the ant itself is out of sight
    w.ants.qpos[:, 2] = 0.6
    picture, places = Ant.picture(WORLD, w.things[0], w.obs()[0])
    assert picture.shape == (512, 512, 3)
    for k in range(4):
        x, y = places[k].round().astype(int)
        near = picture[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3).mean(0)
        assert np.abs(near / near.max() - PALETTE[k] / PALETTE[k].max()).max() < 0.3


# -------------------------------------------------------------------------------- its stages

SHORT = [
    "--preset",
    "ant-paper",
    "--threads",
    "1",
    "--T",
    "24",
    "--evaluations",
    "1",
    "--walker_updates",
    "3",
    "--demonstrations",
    "80",
    "--width",
    "32",
    "--layers",
    "2",
    "--layer",
    "1",
    "--heads",
    "2",
    "--hidden",
    "32",
    "--base_steps",
    "3",
    "--base_batch",
    "4",
    "--control_steps",
    "2",
    "--control_batch",
    "4",
    "--meta_steps",
    "2",
    "--meta_batch",
    "4",
    "--rl_updates",
    "2",
    "--rl_batch",
    "8",
    "--eval_episodes",
    "16",
    "--policy_width",
    "16",
    "--symmetric",
    "True",
    "--splice",
    ".5",
    "--join",
    ".5",
    "--alpha_ramp",
    "2",
    "--thin",
    ".5",
    "--thin_batch",
    "4",
    "--turn",
    "True",
    "--relative",
    "True",
]


def staggering(world, rng, n, expert, portion):
    """In the place of `generate`: episodes of ants that were never taught to walk, successful or
    not."""
    tasks = [world.tasks[i] for i in rng.integers(len(world.tasks), size=n)]
    return simulate(
        world,
        tasks,
        *sample_layouts(world, rng, n),
        lambda worlds, alive: rng.uniform(-1, 1, (len(alive), 8)),
        rng,
    )[0]


def test_an_interrupted_walker_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(ant, "HELD_OUT", 16)
    line = [*SHORT, "--stage", "expert", "--save_seconds", "0", "--out"]
    few, calls = functools.partial(walker_step, n=8, steps=16), []
    monkeypatch.setattr(ant, "walker_step", few)
    assert train.main([*line, str(tmp_path / "whole")]) == 0

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return few(*args)

    monkeypatch.setattr(ant, "walker_step", interrupted)
    assert (
        train.main([*line, str(tmp_path / "parts")]) == 130
        and train.main([*line, str(tmp_path / "parts")]) == 0
    )
    whole, parts = (
        torch.load(tmp_path / out / "ant-paper/seed0/walker.pt", weights_only=True)["model"]
        for out in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    start = Walker().state_dict()
    assert all(not torch.equal(whole[key], start[key]) for key in whole)  # every parameter learns


def test_an_interrupted_recording_goes_on_with_its_next_portion(tmp_path, monkeypatch):
    monkeypatch.setattr(ant, "PORTION", 30)
    monkeypatch.setattr(ant, "HELD_OUT", 16)
    walker, calls, stop_at = ant.Walker(), [], [2]

    def generate(*args, **more):
        if len(calls) == stop_at[0]:
            raise KeyboardInterrupt
        calls.append(args[2])
        return staggering(*args, **more)

    monkeypatch.setattr(ant, "generate", generate)
    run = train.parse([*SHORT, "--out", str(tmp_path / "a")])[0]
    with pytest.raises(KeyboardInterrupt):
        ant.Demonstrations(run, "noisy", walker)
    assert calls == [30, 30]
    # Of another run than the one that began it: refused before a portion is mixed in.
    other = dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, W=2))
    with pytest.raises(config.Refused, match="was made with W=1"):
        ant.Demonstrations(other, "noisy", walker)
    stop_at[0] = -1
    resumed = ant.Demonstrations(run, "noisy", walker)
    assert calls == [30, 30, 20]  # only what was missing
    whole = train.parse([*SHORT, "--out", str(tmp_path / "b")])[0]
    uninterrupted = ant.Demonstrations(whole, "noisy", walker)
    rows = np.arange(80)
    for f in dataclasses.fields(resumed[rows]):
        mine, theirs = (getattr(x[rows], f.name) for x in (resumed, uninterrupted))
        assert np.array_equal(mine, theirs), f.name
    folder = run.folder / "demonstrations-noisy"
    assert sorted(path.name for path in folder.iterdir()) == [
        "action.f32",
        "made.json",
        "rest.npz",
        "sensed.f32",
    ]


@pytest.mark.slow
def test_every_stage_runs_on_recorded_ants(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(ant, "HELD_OUT", 16)
    monkeypatch.setattr(ant, "walker_step", functools.partial(walker_step, n=8, steps=16))
    monkeypatch.setattr(
        ant, "generate", lambda *args, **more: calls.append("ant") or staggering(*args, **more)
    )
    blank = np.zeros((512, 512, 3), np.uint8)  # drawing has tests of its own
    monkeypatch.setattr(ant, "draw_ant", lambda *args: blank)
    for rival in ("none", "cotrain"):
        assert train.main([*SHORT, "--rival", rival, "--out", str(tmp_path)]) == 0, (
            capsys.readouterr().err
        )
    assert (
        "internal RL" in capsys.readouterr().out and calls.count("ant") == 2
    )  # one portion of each kind: simulated once
    folder = tmp_path / "ant-paper" / "seed0"
    run = train.parse([*SHORT, "--out", str(tmp_path)])[0]
    recorded = ant.Demonstrations(run, "noisy", ant.expert(run))
    source = staggering(WORLD_24, runs.seed_everything(0, "demonstrations", 0), 80, None, None)
    rows = np.array([5, 79, 17])
    mine, theirs = recorded[rows], source[rows]
    for t in range(3):
        n = theirs.length[t]
        assert mine.length[t] == n and np.array_equal(
            mine.sensed[t, : n + 1], theirs.sensed[t, : n + 1]
        )
        assert all(
            np.array_equal(getattr(mine, name)[t, :n], getattr(theirs, name)[t, :n])
            for name in ("action", "subgoal", "segment", "progress", "target")
        )
    assert (
        figures.main(
            ["--preset", "ant-paper", "--out", str(tmp_path), "--to", str(tmp_path / "pictures")]
        )
        == 0
    )
    assert sorted(path.name for path in (tmp_path / "pictures" / "ant-paper").iterdir()) == [
        "agent.gif",
        "curves.png",
        "success.png",
    ]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "ant-paper",
        "results.json",
    ]
    made = (folder / "demonstrations-clean" / "made.json").read_text()
    for old, new in (('"mujoco": "', '"mujoco": "1.'), ('"W": 1', '"W": 2')):
        (folder / "demonstrations-clean" / "made.json").write_text(made.replace(old, new))
        (folder / "meta.pt").unlink(missing_ok=True)
        assert train.main([*SHORT, "--stage", "discover", "--out", str(tmp_path)]) == 2
        assert "demonstrations-clean was made with" in capsys.readouterr().err
    (folder / "demonstrations-clean" / "made.json").write_text(made)
    line = [*SHORT, "--stage", "discover", "--meta_seed", "1", "--out", str(tmp_path)]
    assert train.main(line) == 0  # the same demonstrations serve every metacontroller


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--stage", "expert"], "expert"),
        (["--body", "bee"], "body"),
        (["--thin", ".5"], "--thin is for the ant"),
        (["--preset", "ant-small", "--demonstrations", "1000000000000"], "the disk has free"),
        (["--preset", "ant-small", "--demonstrations", "512"], "held out"),
        (["--preset", "ant-small", "--eps", ".1"], "--eps is for the grid"),
    ],
)
def test_wrong_requests_for_ants(tmp_path, capsys, flags, word):
    assert train.main(["--preset", "smoke", "--out", str(tmp_path / "x"), *flags]) == 2
    err = capsys.readouterr().err
    assert word in err and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
