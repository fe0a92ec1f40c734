"""The second world, whole: ant-pinpad (A.2), a MuJoCo ant on the board of envs.py.

  1. the observation   its layout, as named slices: it stands here and nowhere else
  2. the body          gymnasium's Ant-v5 in code; N ants stepped at once; what a walker feels
  3. symmetries        an ant has eight: four equal limbs, and its right is as its left
  4. AntWorlds         the rules of envs.GridWorlds under the feet of N ants
  5. AntPinpad         the same for gymnasium, with its picture
  6. Walker            PPO for the expert (C.1.1), with the clipped objective of internal_rl.py
  7. demonstrations    recorded once, as simulation is expensive
  8. ant_parts         embedding and heads of a base model
  9. right turns       does the base know which way the expert will leave a cell?
 10. Ant               what train.py needs to know of this body: grid.Grid is the grid's

Paper sections: A.2, C.1.1, C.4.4; Tables A2, A3, A5, A8, A10, A14.
Glossary: as in envs.py, and N ants, F = 31 + 2 (O+W) numbers in an observation.
  limb      one of the ant's four legs (a leg is a stretch of a task: from colour to colour)
  qpos      (N, 15): x, y, z, orientation as a quaternion w x y z, 8 joint angles
  qvel      (N, 14): velocity of the torso, its angular velocity, 8 joint velocities
  felt      (N, 29): what a walker needs to walk along a heading, see `feel`
  heading   (N, 2): a unit vector on the board
"""
import ctypes.util
import dataclasses
import functools
import io
import json
import math
import os
import shutil
import sys
import time
from importlib.metadata import version

if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:
    # To draw without a display, or with a stale one. MuJoCo reads this when it is imported.
    found = [name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)]
    os.environ["MUJOCO_GL"] = found[0].lower() if found else "off"

import gymnasium as gym
import mujoco
import mujoco.batch
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import parallel
from config import GONE, Refused, world_of
from envs import (
    PALETTE,
    WORLDS,
    GridWorlds,
    NoExperts,
    Pinpad,
    Trajectories,
    concatenate,
    contents_table,
    distances,
    exact_bounds,
    expert_probs,
    generate,
    neighbour_table,
    sample_layouts,
    simulate,
)
from internal_rl import clipped_loss
from model import GaussianHead, gaussian_logp, linear
from runs import EVAL_SEED, Training, adamw, digest, seed_everything, write_atomically

# ------------------------------------------------------------------------------- 1. the observation

HEIGHT = 0                 # of the torso; symlog of metres
QUATERNION = slice(1, 5)   # of the torso, w x y z with w >= 0; symlog
ANGLES = slice(5, 13)      # of hip 1, ankle 1, .. hip 4, ankle 4; symlog of radians
VELOCITY = slice(13, 16)   # of the torso, x y z; symlog of m/s
SPIN = slice(16, 19)       # angular velocity of the torso, about its own axes; symlog of rad/s
RATES = slice(19, 27)      # of the joints, in the order of the angles; symlog of rad/s
PLACE = slice(27, 29)      # x, y on the board, in half boards: -1 to 1
THINGS = slice(29, -2)     # x, y of every colour's, then wall's cell from the torso, in half boards
IN_CELL = slice(-2, None)  # x, y in the ant's own cell, in half cells: -1 to 1
BODY, MOTION = slice(0, 13), slice(13, 27)  # of these: qpos from z on, and qvel


def observation_size(world):
    """F, the length of an observation."""
    return 29 + 2 * (world.O + world.W) + 2


def symlog(x):
    """sign(x) ln(1 + |x|), of NumPy arrays and of tensors."""
    lib = torch if torch.is_tensor(x) else np
    return lib.sign(x) * lib.log1p(abs(x))


def symexp(x):
    """Undoes symlog."""
    lib = torch if torch.is_tensor(x) else np
    return lib.sign(x) * lib.expm1(abs(x))


# -------------------------------------------------------------------------------------- 2. the body
# Physics: gymnasium's Ant-v5, its time step and its 5 physics steps per action. NOT in paper:
# MuJoCo's integrator implicitfast instead of RK4, which evaluates the forces four times a step.
# The two bodies walk alike, and not bit for bit alike: an expert belongs to its integrator.

CELL = 2.  # metres. NOT in paper, which gives no size: an ant is 1.1 m wide and must turn inside
FRAME_SKIP, PHYSICS_STEP = 5, .01  # one action lasts 0.05 s
HEIGHTS = (.2, 1.)  # A.2, metres: outside an episode fails. (On its back, a torso is at .25.)
# Front left, front right, back left, back right, as in the classic file: direction of the limb,
# axis and range of its ankle.
LIMBS = ((1, 1, (-1, 1, 0), (30, 70)), (-1, 1, (1, 1, 0), (-70, -30)),
         (-1, -1, (-1, 1, 0), (-70, -30)), (1, -1, (1, 1, 0), (30, 70)))
MOTOR_ORDER = (3, 0, 1, 2)  # the classic order of the motors


@functools.lru_cache(8)
def ant_model(tiles=()):
    """The classic MuJoCo ant on a plane, as a compiled model: hip 1, ankle 1, .. hip 4, ankle 4.

    tiles: (x, y, half height, rgba) of each box that is drawn on the floor, almost as wide as a
    cell; they can be seen and not be touched.
    """
    spec = mujoco.MjSpec()
    # An unstable simulation would otherwise be put back to its initial pose, unasked.
    spec.option.disableflags |= mujoco.mjtDisableBit.mjDSBL_AUTORESET
    spec.option.timestep = PHYSICS_STEP
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.compiler.degree = True
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 1024  # the largest picture
    geom, joint = spec.default.geom, spec.default.joint
    # The floor answers to contacts (conaffinity 1), the ant's parts do not answer to each other.
    geom.conaffinity, geom.condim, geom.density, geom.margin = 0, 3, 5., .01
    geom.friction, geom.rgba = [1, .5, .5], [.55, .4, .3, 1]
    joint.armature, joint.damping = 1., [1, 0, 0]  # linear, quadratic and cubic terms
    light = mujoco.mjtLightType.mjLIGHT_DIRECTIONAL
    spec.worldbody.add_light(pos=[0, 0, 10], dir=[0, 0, -1], type=light)
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=[40, 40, 40], conaffinity=1,
                            rgba=[.85, .85, .85, 1])
    for x, y, half_height, rgba in tiles:
        spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=[x, y, half_height],
                                size=[.48 * CELL, .48 * CELL, half_height], contype=0, rgba=rgba)
    torso = spec.worldbody.add_body(name="torso", pos=[0, 0, .75])
    torso.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=[.25, 0, 0])
    torso.add_joint(type=mujoco.mjtJoint.mjJNT_FREE, armature=0, damping=[0, 0, 0], margin=.01)

    def capsule(body, x, y):
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_CAPSULE, fromto=[0, 0, 0, x, y, 0],
                      size=[.08, 0, 0])

    for k, (x, y, axis, ankle) in enumerate(LIMBS, start=1):
        shoulder = torso.add_body()
        capsule(shoulder, .2 * x, .2 * y)
        upper = shoulder.add_body(pos=[.2 * x, .2 * y, 0])
        upper.add_joint(name=f"hip_{k}", axis=[0, 0, 1], range=[-30, 30], limited=True)
        capsule(upper, .2 * x, .2 * y)
        foot = upper.add_body(pos=[.2 * x, .2 * y, 0])
        foot.add_joint(name=f"ankle_{k}", axis=axis, range=ankle, limited=True)
        capsule(foot, .4 * x, .4 * y)
    for limb in MOTOR_ORDER:
        for name in (f"hip_{limb + 1}", f"ankle_{limb + 1}"):
            spec.add_actuator(target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT,
                              gear=[150, 0, 0, 0, 0, 0], ctrlrange=[-1, 1], ctrllimited=True)
    return spec.compile()


def rotation(w, x, y, z):
    """The 9 entries, row by row, of the matrix of a unit quaternion: from the torso's frame to the
    world's. Arrays of any kind."""
    return (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))


def feel(qpos, qvel, heading):
    """What a walker needs to walk along `heading` (N, 2): (N, 29) float32, all seen from its own
    torso, so that nothing depends on where it is or which way it faces. Height (1), up (3),
    velocity (3), angular velocity (3), heading (3), joint angles (8) and velocities (8)."""
    R = np.stack(rotation(*qpos[:, 3:7].T), axis=1).reshape(-1, 3, 3)  # (N, 9) -> (N, 3, 3)
    own = lambda v: np.einsum("nij,ni->nj", R, v)  # R^T v: (N, 3) board -> (N, 3) torso
    flat = np.concatenate([heading, np.zeros((len(heading), 1))], axis=1)
    parts = [qpos[:, 2:3], R[:, 2], symlog(own(qvel[:, :3])), symlog(qvel[:, 3:6]), own(flat),
             qpos[:, 7:], symlog(qvel[:, 6:])]
    return np.concatenate(parts, axis=1).astype(np.float32)


class Ants:
    """The physics of N ants on an endless plane, stepped together on native threads (PyTorch's
    number of them, unless told otherwise). qpos and qvel are live views: metres, radians, seconds.
    """

    def __init__(self, n, threads=None):
        self.n, self.threads = n, threads or torch.get_num_threads()
        self.sim = mujoco.batch.Batch(ant_model(), n, self.threads)
        self.qpos, self.qvel, self.ctrl = (self.sim.bind(x) for x in ("qpos", "qvel", "ctrl"))

    def __getstate__(self):  # copy and pickle: the simulation is built anew, then goes on equally
        return {"n": self.n, "threads": self.threads, "state": self.sim.state.copy(),
                "ctrl": self.ctrl.copy()}

    def __setstate__(self, kept):
        self.__init__(kept["n"], kept["threads"])
        self.sim.state[:] = kept["state"]
        self.ctrl[:] = kept["ctrl"]

    def put_back(self, rows):
        self.sim.reset(rows, stage=mujoco.mjtStage.mjSTAGE_NONE.value)

    def place(self, rng, rows, xy):
        """Put ants `rows` at xy (m, 2), any yaw; joint angles and all velocities within 0.1 of
        zero (A.2)."""
        self.put_back(rows)
        yaw = rng.uniform(-np.pi, np.pi, len(rows))
        self.qpos[rows, :2] = xy
        self.qpos[rows, 3], self.qpos[rows, 6] = np.cos(yaw / 2), np.sin(yaw / 2)
        self.qpos[rows, 7:] = rng.uniform(-.1, .1, (len(rows), 8))
        self.qvel[rows] = rng.uniform(-.1, .1, (len(rows), 14))

    def step(self, rows, action):
        """One action (m, 8), torques as shares of their largest, for ants `rows`. An ant whose
        physics diverges is left above its range of heights."""
        self.ctrl[rows] = np.clip(action, -1, 1)
        self.sim.step(rows, FRAME_SKIP)
        broken = rows[~np.isfinite(self.sim.state[rows]).all(axis=1)]
        if len(broken):
            self.put_back(broken)
            self.qpos[broken, 2] = 2 * HEIGHTS[1]

    def felt(self, heading):
        return feel(self.qpos, self.qvel, heading)

    def fallen(self):
        """(N,) bool: the torso has left its range of heights (A.2)."""
        return (self.qpos[:, 2] < HEIGHTS[0]) | (self.qpos[:, 2] > HEIGHTS[1])


# ------------------------------------------------------------------------------------ 3. symmetries
# With limb 1 called 2, 2 called 3 and so on, seen from a torso that faces a quarter turn less, it
# is the same ant; and in a mirror it is an ant, too. Symmetry g: if g >= 4 y changes its sign (seen
# by the ant, right and left change places; seen on the board, north and south); then g % 4 quarter
# turns.

QUARTER_COS = np.array([1, 0, -1, 0], np.float32)
QUARTER_SIN = np.array([0, 1, 0, -1], np.float32)


def limb_tables(order):
    """For values of limbs in this `order`, hip and ankle each: source (8, 8), which of the 8 takes
    a place under symmetry g, and its sign (8, 8)."""
    signs = (1, -1, -1, 1)  # of the ankles' ranges: those of limbs 2 and 3 bend the other way
    source, sign = np.zeros((8, 8), np.int64), np.ones((8, 8), np.float32)
    for g in range(8):
        for place, limb in enumerate(order):
            old = (limb - g) % 4  # its name before
            old = 3 - old if g >= 4 else old
            source[g, 2 * place:2 * place + 2] = 2 * order.index(old) + np.arange(2)
            sign[g, 2 * place] = -1 if g >= 4 else 1  # hips turn the other way in a mirror
            sign[g, 2 * place + 1] = signs[limb] * signs[old]
    return source, sign


JOINTS, MOTORS = limb_tables((0, 1, 2, 3)), limb_tables(MOTOR_ORDER)


def ant_symmetries():
    """What the 8 symmetries do to what is felt, felt @ A[g], A (8, 29, 29), and to torques,
    action @ B[g], B (8, 8, 8). float32; entries 0, 1, -1."""
    A, B = np.tile(np.eye(29, dtype=np.float32), (8, 1, 1)), np.zeros((8, 8, 8), np.float32)
    limbs = lambda tables, g: np.eye(8, dtype=np.float32)[:, tables[0][g]] * tables[1][g]
    polar, axial = (1, -1, 1), (-1, 1, -1)  # how vectors and turns look in a mirror
    for g in range(8):
        c, s = QUARTER_COS[g % 4], QUARTER_SIN[g % 4]
        for x, mirror in ((1, polar), (4, polar), (7, axial), (10, polar)):  # see `feel`
            # The torso faces g quarter turns less: seen from it, vectors turn forwards.
            A[g, x:x + 2, x:x + 2] = (c, s), (-s, c)
            A[g, x:x + 3] *= np.array(mirror)[:, None] if g >= 4 else 1
        for x in (13, 21):  # the joints' angles and their velocities
            A[g, x:x + 8, x:x + 8] = limbs(JOINTS, g)
        B[g] = limbs(MOTORS, g)
    return A, B


def turned(world, g, obs, action):
    """Steps seen and done in a turned world, for train.view_of: g (B, T), obs (B, T, F), action
    (B, T, 8) -> the same shapes. All but the torso turns; its limbs are renamed so that they
    follow."""
    device, new = obs.device, obs.clone()
    # symlog acts on each number alone and is odd, so it commutes with all this.
    pairs = range(PLACE.start, obs.shape[-1], 2)  # on the board, things, in the cell: x, then y
    q, v, w = QUATERNION.start, VELOCITY.start, SPIN.start
    mirrored = torch.tensor([q + 1, q + 3, v + 1, w, w + 2, *(x + 1 for x in pairs)], device=device)
    new[..., mirrored] = obs[..., mirrored] * torch.where(g >= 4, -1., 1.)[..., None]
    x = torch.tensor([q + 1, v, w, *pairs], device=device)  # each with the y that follows
    cos, sin = (torch.from_numpy(table).to(device)[g % 4][..., None]
                for table in (QUARTER_COS, QUARTER_SIN))
    new[..., x], new[..., x + 1] = (cos * new[..., x] - sin * new[..., x + 1],
                                    sin * new[..., x] + cos * new[..., x + 1])
    joints, motors = ([torch.from_numpy(table).to(device)[g] for table in tables]
                      for tables in (JOINTS, MOTORS))  # each (B, T, 8) twice: which, and its sign
    for part in (ANGLES, RATES):
        new[..., part] = obs[..., part].gather(-1, joints[0]) * joints[1]  # (B, T, 8)
    return new, action.gather(-1, motors[0]) * motors[1]  # (B, T, 8)


# ------------------------------------------------------------------------------------- 4. AntWorlds

def cell_centres(G):
    """(C, 2) metres: x to the right, y up, the board's centre at 0."""
    row, column = np.divmod(np.arange(G * G), G)
    return np.stack([column - (G - 1) / 2, (G - 1) / 2 - row], axis=1) * CELL


class AntWorlds(GridWorlds):
    """N ant-pinpads (A.2): the same rules, with the cell under the ant's centre as its place.

    Four things differ. Walls have no substance: an episode in which the centre enters one fails. It
    fails if the ant falls. NOT in paper, which is silent: it fails if the centre leaves the board,
    which has no rim. And obs() is a vector of floats.
    """
    no_action = np.zeros(8, np.float32)
    senses = True

    def __init__(self, world, tasks, things, agent, rng, threads=None):
        super().__init__(world, tasks, things, agent)
        self.centres, self.half = cell_centres(world.G), world.G * CELL / 2
        self.ants = Ants(len(agent), threads)
        inside = rng.uniform(-.5, .5, (len(agent), 2)) * CELL
        self.ants.place(rng, self.rows, self.centres[agent] + inside)
        self.tremor = np.zeros((len(agent), 8), np.float32)  # (N, 8), added to actions: ant_expert

    def position(self):
        """(N, 2) metres."""
        return self.ants.qpos[:, :2]

    def obs(self):
        """(N, F) float32: see the slices at the top."""
        xy = self.position()
        relative = self.centres[self.things] - xy[:, None]  # (N, O+W, 2)
        body = self.ants.qpos[:, 2:].copy()
        # A quaternion and its negative are the same orientation.
        body[:, 1:5] *= np.where(body[:, 1:2] < 0, -1, 1)
        parts = [symlog(body), symlog(self.ants.qvel), xy / self.half,
                 relative.reshape(len(xy), -1) / self.half,  # (N, O+W, 2) -> (N, 2 (O+W))
                 (xy - self.centres[self.agent]) / (CELL / 2)]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def step(self, action):
        """action (N, 8) in [-1, 1]; those of finished worlds are ignored. As GridWorlds.step."""
        alive = np.flatnonzero(~self.done)
        self.ants.step(alive, action[alive] + self.tremor[alive])
        x, y = self.position().T
        off = ~((np.abs(x) < self.half) & (np.abs(y) < self.half))
        row, column = ((np.where(off, 0, v) + self.half) // CELL for v in (-y, x))
        cell = (row * self.world.G + column).astype(np.int64)
        cell = np.where(self.done | off, self.agent, cell)
        in_wall = self.contents[self.rows, cell] == self.world.O
        return self._enter(cell, ~self.done & (off | in_wall | self.ants.fallen()))


WORLDS["ant"] = AntWorlds


# ------------------------------------------------------------------------------------- 5. AntPinpad

class AntPinpad(Pinpad):
    """ant-pinpad (A.2) for gymnasium: `gym.make("ant:AntPinpad-v0")`; the paper's world by default.

    Observation: Box of 31 + 2 (O+W) float32 (paper: 41), see the slices at the top of this file.
    Action: Box(-1, 1, (8,)), the torque of each motor as a share of its largest (150 Nm), for 0.05
    s, in the order hip 4, ankle 4, hip 1, ankle 1, hip 2, ankle 2, hip 3, ankle 3.
    """
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    body = "ant"

    def __init__(self, render_mode=None, **rules):
        paper = {"G": 4, "O": 4, "W": 1, "T": 500, "task_set": "singles"}
        super().__init__(render_mode, **{**paper, **rules})
        size = (observation_size(self.world),)
        self.observation_space = gym.spaces.Box(-10, 10, size, np.float32)  # symlog(22,000) = 10
        self.action_space = gym.spaces.Box(-1, 1, (8,), np.float32)

    def read_action(self, action):
        """8 numbers of any kind from -1 to 1 -> (8,) float32. ValueError on all else."""
        torques = np.asarray(action)
        numbers = torques.dtype.kind in "iuf"
        if torques.shape != (8,) or not numbers or not (np.abs(torques) <= 1).all():
            raise ValueError(f"action {action!r} is not 8 numbers from -1 to 1")
        return torques.astype(np.float32)

    def observation(self):
        return self.worlds.obs()[0]

    def draw(self):
        return draw_ant(self.world, self.worlds.things[0], self.worlds.ants.qpos[0])


gym.register("AntPinpad-v0", entry_point="ant:AntPinpad")


def pose_of(world, obs):
    """The pose qpos (..., 15) of an ant from what it saw, obs (..., F)."""
    return np.concatenate([obs[..., PLACE] * world.G * CELL / 2, symexp(obs[..., BODY])], axis=-1)


ELEVATION, AWAY = -65, 1.5  # of the camera, south of the board: degrees, widths of the board


def on_picture(G, size):
    """(C, 2): where, in pixels from the left and the top of draw_ant's picture, cells lie."""
    angle = math.radians(ELEVATION)
    forward = np.array([0, math.cos(angle), math.sin(angle)])
    up = np.array([0, -math.sin(angle), math.cos(angle)])
    centres = np.pad(cell_centres(G), ((0, 0), (0, 1)))  # (C, 3), on the floor
    seen = centres + AWAY * G * CELL * forward  # from the camera
    scale = seen @ forward * math.tan(math.radians(45 / 2))  # 45 degrees: MuJoCo's field of view
    return (np.stack([seen[:, 0] / scale, -(seen @ up) / scale], axis=1) + 1) * size / 2


def draw_ant(world, things, qpos, size=256):
    """An RGB picture (size, size, 3) uint8 of one ant qpos (15,) on its board: coloured floor,
    walls as boxes. Needs OpenGL, no display; RuntimeError where there is no driver."""
    centres = cell_centres(world.G)
    tiles = [(*xy, .02, (.93, .93, .93, 1.)) for xy in np.delete(centres, things, axis=0).tolist()]
    for k, xy in enumerate(centres[things].tolist()):
        colour = (*(PALETTE[k % len(PALETTE)] / 255).tolist(), 1.)
        tiles.append((*xy, .02, colour) if k < world.O else (*xy, .3, (.25, .25, .25, 1.)))
    model = ant_model(tuple(tiles))
    data = mujoco.MjData(model)
    data.qpos[:] = qpos
    mujoco.mj_forward(model, data)
    camera = mujoco.MjvCamera()
    camera.distance, camera.elevation, camera.azimuth = AWAY * world.G * CELL, ELEVATION, 90
    try:
        renderer = mujoco.Renderer(model, size, size)
    except (RuntimeError, ImportError, AttributeError, OSError, mujoco.FatalError) as error:
        raise RuntimeError(f"no OpenGL driver to draw with, MUJOCO_GL={os.environ['MUJOCO_GL']} "
                           f"({type(error).__name__}): install EGL or OSMesa, or set MUJOCO_GL to "
                           f"egl, osmesa or glfw") from None
    with renderer:
        renderer.update_scene(data, camera)
        return renderer.render()


# -------------------------------------------------------------------------------- 6. Walker (C.1.1)
# NOT in paper, whose expert is one agent that sees the whole board, a hint on the shortest path in
# every cell included. What such an agent needs to know is the hint of the cell that it is in. So
# what is learned here is to walk along a heading, which `ant_expert` reads off the board.

SPEED = 1.5  # m/s along the heading; more earns nothing
STD = .2  # least standard deviation of a torque, as a share of the largest


class Walker(nn.Module):
    """Actor and critic: felt (n, 29) -> torques (n, 8), value (n,).

    NOT in paper: its walker treats the ant's eight symmetries alike. A plain network is asked about
    the ant in all of them, and the answers, put back, are averaged. PPO so learns from eight ants
    at once, and a demonstration that is turned or reflected is a demonstration, too, which
    train.view_of needs: otherwise codes name directions in the ant's own frame.
    """

    def __init__(self, hidden=64):
        super().__init__()
        net = lambda outputs: nn.Sequential(linear(29, hidden, 1.), nn.Tanh(),
                                            linear(hidden, hidden, 1.), nn.Tanh(),
                                            linear(hidden, outputs, .01))
        self.torques, self.value = net(8), net(1)
        self.log_stds = nn.Parameter(torch.full((2,), math.log(.5)))  # of every hip and every ankle
        for name, matrices in zip(("felt_seen", "torques_seen"), ant_symmetries()):
            self.register_buffer(name, torch.from_numpy(matrices), persistent=False)

    @property
    def log_std(self):
        """(8,). NOT in paper: at least STD, so that a demonstration says more about where the ant
        is heading than about how it moves its limbs."""
        return self.log_stds.clamp(min=math.log(STD)).repeat(4)

    def actor(self, felt):
        """felt (n, 29) -> mean torques (n, 8)."""
        seen = torch.einsum("ni,kij->knj", felt, self.felt_seen)  # (8, n, 29), each symmetry's
        # The inverse of each is its transpose: (8, n, 8) -> (n, 8).
        return torch.einsum("kni,kji->nj", self.torques(seen), self.torques_seen) / 8

    def critic(self, felt):
        """felt (n, 29) -> value (n,)."""
        seen = torch.einsum("ni,kij->knj", felt, self.felt_seen)  # (8, n, 29)
        return self.value(seen)[..., 0].mean(0)  # (8, n, 1) -> (n,)

    def walk(self, noise):
        """`walk` for ant_expert, in NumPy: the mean, and a ~ N(mean, (noise * std)^2)."""
        @torch.no_grad()
        def walk(felt):
            mean = self.actor(torch.from_numpy(felt))
            action = mean + noise * self.log_std.exp() * torch.randn_like(mean)
            return [x.clamp(-1, 1).numpy() for x in (mean, action)]  # what the motors can do
        return walk


def ant_expert(world, dist, rng, walk, stuck):
    """`act` for `simulate`: walk to the centre of the next cell on a shortest path; from anywhere
    in a cell that line stays within the two cells. walk(felt (n, 29)) -> torques (n, 8), as they
    are meant and as they are done.

    NOT in paper: what a demonstration records is meant; noise moves the ant besides (DART, arXiv
    1703.09327). So the base sees where noise leads, and does not learn to walk with it, which costs
    a sixth of the success (docs/notes.md, section 6).

    Among equally short ways an episode prefers, in each cell, one drawn at its start: an ant that
    reconsidered at every step would stagger.
    """
    taste = rng.random((len(dist), world.cells, 4)) + .1

    def act(worlds, alive):
        cell = worlds.agent[alive]
        probs = expert_probs(world, worlds.contents[alive], dist[alive], cell[:, None],
                             worlds.target()[alive, None, None])[:, 0, 0]  # (alive, 4)
        stuck[alive] |= probs.sum(1) == 0
        way = ((probs > 0) * taste[alive, cell]).argmax(1)
        goal = worlds.centres[neighbour_table(world.G)[cell, way]]  # (alive, 2)
        ahead = goal - worlds.position()[alive]
        heading = np.zeros((len(worlds.done), 2))
        heading[alive] = ahead / np.linalg.norm(ahead, axis=1, keepdims=True).clip(1e-6)
        meant, done = walk(worlds.ants.felt(heading)[alive])
        worlds.tremor[alive] = done - meant
        return meant
    return act


def walk_reward(ants, felt, heading, before, action):
    """Reward of one step (N,), which ants (N,) cannot go on, and their speed along it (N,), m/s.

    felt (N, 29): what they feel after it; before (N, 2): where they were; action (N, 8). Speed
    along the heading up to SPEED, less half the speed across it, less the effort; an ant that
    falls, jumps or tips over pays 5.
    """
    velocity = (ants.qpos[:, :2] - before) / (FRAME_SKIP * PHYSICS_STEP)
    along = (velocity * heading).sum(1)
    across = np.abs(velocity[:, 0] * heading[:, 1] - velocity[:, 1] * heading[:, 0])
    over = ants.fallen() | (felt[:, 3] < .2)  # cosine of the torso's tilt
    reward = np.minimum(along, SPEED) - .5 * np.minimum(across, SPEED)
    return reward - .02 * (action ** 2).sum(1) - 5. * over, over, along


def gae(outcome, value, cut, gamma, lam):
    """Generalised advantage estimation: each (steps, n) -> advantages (steps, n).

    outcome: reward + gamma * value of where the step led; value: of where it began; cut: what
    comes after it belongs to something else.
    """
    advantage, A = torch.zeros_like(value), torch.zeros_like(value[0])
    for t in reversed(range(len(value))):
        A = advantage[t] = outcome[t] - value[t] + gamma * lam * A * ~cut[t]
    return advantage


def walker_step(walker, optimizer, rng, n=64, steps=128, epochs=4, minibatches=8, gamma=.99,
                lam=.95):
    """One iteration of PPO: n ants, put down anew, walk `steps` steps along headings that turn at
    random. Returns a dict of what happened. FloatingPointError on a non-finite loss."""
    ants, rows = Ants(n), np.arange(n)

    def headings(m):
        angle = rng.uniform(-np.pi, np.pi, m)
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)

    ants.place(rng, rows, np.zeros((n, 2)))
    heading, record, speed = headings(n), [], []
    with torch.no_grad():
        for _ in range(steps):
            felt, before = torch.from_numpy(ants.felt(heading)), ants.qpos[:, :2].copy()
            mean = walker.actor(felt)
            action = mean + walker.log_std.exp() * torch.randn_like(mean)
            ants.step(rows, action.numpy())
            then = ants.felt(heading)
            reward, over, along = walk_reward(ants, then, heading, before, action.numpy())
            speed.append(along.mean())
            # Before the heading turns or anyone is put elsewhere.
            after = walker.critic(torch.from_numpy(then))
            turns = over | (rng.random(n) < .02)  # a new heading, every 50 steps or so
            # Where the heading turns, what follows belongs to another walk: the sum stops.
            logp = gaussian_logp(action, mean, walker.log_std)
            outcome = torch.from_numpy(reward).float() + gamma * after * torch.from_numpy(~over)
            record.append((felt, action, logp, walker.critic(felt), outcome,
                           torch.from_numpy(turns)))
            if over.any():
                ants.place(rng, rows[over], np.zeros((over.sum(), 2)))
            heading[turns] = headings(turns.sum())
        # Each (steps, n, ...).
        felt, action, logp, value, outcome, turns = (torch.stack(x) for x in zip(*record))
        advantage = gae(outcome, value, turns, gamma, lam)
        target = (value + advantage).flatten()
        felt, action, logp = (x.flatten(0, 1) for x in (felt, action, logp))  # (steps * n, ...)
        advantage = ((advantage - advantage.mean()) / (advantage.std() + 1e-8)).flatten()
    for _ in range(epochs):
        for part in torch.randperm(n * steps).chunk(minibatches):
            new = gaussian_logp(action[part], walker.actor(felt[part]), walker.log_std)
            # Every step counts by itself: sequences of one action.
            loss = clipped_loss(new[:, None], logp[part, None], advantage[part],
                                torch.ones(len(part), 1), .2)
            loss = loss + .5 * F.mse_loss(walker.critic(felt[part]), target[part])
            if not torch.isfinite(loss):
                raise FloatingPointError("the PPO loss is not finite")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(walker.parameters(), .5)
            optimizer.step()
    return {"speed": float(np.mean(speed)), "std": walker.log_std.exp().mean().item()}


def expert(run):
    """Stage "expert": the ant's walker, by PPO; how it does at the pinpad's own tasks is reported
    on the way. Returns it frozen."""
    if "walker" in run.kept:
        return run.kept["walker"]
    cfg, world = run.cfg, world_of(run.cfg)
    seed_everything(cfg.seed, "init", 4)
    walker = Walker()  # on the CPU, as the physics
    optimizer = adamw(walker.parameters(), cfg.walker_lr, 0.)
    training = Training(run, "walker", walker, optimizer)
    if not training.done and not parallel.rank():  # by one process
        def learn(step, rng):
            optimizer.param_groups[0]["lr"] = cfg.walker_lr * (1 - step / cfg.walker_updates)
            return walker_step(walker, optimizer, rng)

        def report(step, happened):
            rates = {"pretraining_success": expert_success(run, walker, world.tasks),
                     "success": expert_success(run, walker, [world.post_task])}
            return ("speed", "std", *rates), {**happened, **rates}, ()

        steps = range(training.first, cfg.walker_updates)
        training.go(((k, seed_everything(cfg.seed, "walker", k)) for k in steps), learn, report)
    parallel.wait()
    if not training.done and parallel.rank():
        Training(run, "walker", walker, optimizer)  # reads what process 0 has trained
    run.kept["walker"] = walker.requires_grad_(False).eval()
    return walker


def expert_success(run, walker, tasks, n=256, noise=1.):
    """Share of n episodes of the given tasks, in turn, that the expert completes. noise: 1 with its
    own, 0 with its mean action, which is what internal RL's success is divided by."""
    world, rng = world_of(run.cfg), seed_everything(EVAL_SEED, "eval", 4)
    things, agent = sample_layouts(world, rng, n)
    act = ant_expert(world, distances(world, things), rng, walker.walk(noise), np.zeros(n, bool))
    tasks = [tasks[i % len(tasks)] for i in range(n)]
    return float(simulate(world, tasks, things, agent, act, rng)[1].mean())


# -------------------------------------------------------------------------------- 7. demonstrations

HELD_OUT = 512  # of each set, the first so many episodes are for evaluation only
PORTION = 1024  # demonstrations simulated at once


def join_portions(folder, paths, wanted):
    """Portions of demonstrations -> sensed.f32, action.f32, rest.npz, and last made.json: a folder
    without it is not finished."""
    rest, seconds = [], 0.
    with open(folder / "sensed.f32", "wb") as sensed, open(folder / "action.f32", "wb") as action:
        for path in paths:
            part = dict(np.load(path))
            part.pop("sensed_f32").tofile(sensed)
            part.pop("action_f32").tofile(action)
            seconds += float(part.pop("seconds"))
            rest.append(part)
    rest = concatenate([Trajectories(**part, action=part["target"]) for part in rest])
    names = [f.name for f in dataclasses.fields(rest) if f.name not in ("action", "sensed")]
    np.savez(folder / "rest.npz", **{name: getattr(rest, name) for name in names})
    made = wanted | {"seconds": seconds}
    write_atomically(folder / "made.json", json.dumps(made).encode())
    for path in [*paths, folder / "begun.json"]:
        path.unlink()


class Demonstrations:
    """Episodes of the expert of one kind, "noisy" (its own noise) or "clean" (C.4.4: none).

    Simulated once into a folder; refused if they were made by another walker, world or version of
    MuJoCo. Indexed by rows, they give Trajectories. sensed.f32 and action.f32 are raw float32
    memory maps, the episodes one after the other.
    """

    def __init__(self, run, kind, walker):
        world, folder = world_of(run.cfg), run.folder / f"demonstrations-{kind}"
        rules = {name: x for name, x in dataclasses.asdict(world).items() if name != "post"}
        wanted = {"mujoco": version("mujoco"), "walker": digest(walker.state_dict()),
                  "episodes": run.cfg.demonstrations, "seed": run.cfg.seed, "actions": "as meant",
                  **rules, **GONE}
        finished = (folder / "made.json").exists()
        parallel.wait()  # before anyone can finish them
        if not finished:
            self.check(folder / "begun.json", wanted)
            self.make(run, kind, walker, world, folder, wanted)
        self.check(folder / "made.json", wanted)
        self.rest = dict(np.load(folder / "rest.npz"))
        # An episode of T steps holds T+1 observations.
        self.begin = np.concatenate([[0], np.cumsum(self.rest["length"] + 1, dtype=np.int64)])
        self.sensed, self.action = (
            np.memmap(folder / f"{name}.f32", np.float32, "r").reshape(self.begin[-1], -1)
            for name in ("sensed", "action"))

    @staticmethod
    def check(path, wanted):
        made = json.loads(path.read_text()) if path.exists() else wanted
        for field, ours in wanted.items():
            if made.get(field) != ours:
                raise Refused(f"{path.parent} was made with {field}={made.get(field)}, this run "
                              f"asks for {field}={ours}: delete it, or use another --out")

    @staticmethod
    def make(run, kind, walker, world, folder, wanted):
        """In portions, each a file of its own: an interrupted recording goes on with the next one,
        and several processes share them."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "begun.json", json.dumps(wanted).encode())
        n = wanted["episodes"]
        sizes = [min(PORTION, n - done) for done in range(0, n, PORTION)]
        paths = [folder / f"portion-{k:04}.npz" for k in range(len(sizes))]
        walk = walker.walk(kind == "noisy")
        make_expert = lambda world, dist, rng, stuck: ant_expert(world, dist, rng, walk, stuck)
        mine = range(parallel.rank(), len(sizes), parallel.count())
        for k in tqdm([k for k in mine if not paths[k].exists()], f"{kind} demonstrations",
                      disable=None):
            begun = time.time()
            rng = seed_everything(run.cfg.seed, "demonstrations", 2 * k + (kind == "clean"))
            try:
                data = generate(world, rng, sizes[k], expert=make_expert, portion=PORTION)
            except NoExperts as error:
                raise Refused(f"{error}; the walker needs more --walker_updates") from None
            seen = np.arange(data.sensed.shape[1]) <= data.length[:, None]  # (n, T+1)
            # No action follows the last observation.
            action = np.pad(data.action, ((0, 0), (0, 1), (0, 0)))[seen]
            rest = {f.name: getattr(data, f.name).astype(np.int16) for f in dataclasses.fields(data)
                    if f.name not in ("action", "sensed")}
            content = io.BytesIO()
            np.savez(content, sensed_f32=data.sensed[seen], action_f32=action,
                     seconds=time.time() - begun, **rest)
            write_atomically(paths[k], content.getvalue())
        parallel.wait()
        if not parallel.rank():
            join_portions(folder, paths, wanted)
        parallel.wait()

    def __getitem__(self, rows):
        parts = {name: value[rows].astype(np.int64) for name, value in self.rest.items()}
        T = parts["length"].max()
        # (n, T+1); padding repeats the last.
        steps = np.minimum(np.arange(T + 1), parts["length"][:, None]) + self.begin[rows][:, None]
        parts = {name: x[:, :T + (name == "agent")] if name not in ("things", "length") else x
                 for name, x in parts.items()}
        return Trajectories(**parts, action=self.action[steps[:, :-1]], sensed=self.sensed[steps])


def thinned(batch, G, share):
    """Of each episode the first step, the first step in every further cell, and a random share of
    the others: a batch like `batch`, obs (B, T'+1, F) and the rest (B, T').

    NOT in paper. Where an ant is heading shows in the first steps after it has entered a cell; then
    it just walks, for 20 steps more. So a base has long learned to walk before it learns whereto,
    and a controller can only steer to where the base would know how to go. Of episodes cut down to
    these steps about five times as many are seen in the same time. With lam > 0 the observation
    loss is about the next observation that is kept.
    """
    obs, mask = batch["obs"], batch["mask"]  # (B, T+1, F), (B, T)
    B, T = mask.shape
    centre = obs[:, :-1, PLACE] * G - obs[:, :-1, IN_CELL]  # (B, T, 2) of its cell, in half cells
    keep = torch.rand(B, T, device=mask.device) < share
    keep[:, 0] = True
    keep[:, 1:] |= (centre[:, 1:] - centre[:, :-1]).abs().sum(-1) > .5
    keep &= mask
    count = keep.sum(1, keepdim=True)  # (B, 1)
    order = (~keep).long().argsort(dim=1, stable=True)  # those kept, in their order, then others
    steps = order[:, :count.max()]  # (B, T')
    rows = torch.arange(B, device=mask.device)[:, None]
    # Behind the last step that is kept stands the episode's last observation, as ever.
    places = torch.arange(steps.shape[1] + 1, device=mask.device)
    seen = torch.where(places < count, torch.cat([steps, steps[:, -1:]], dim=1),
                       mask.sum(1, keepdim=True))  # (B, T'+1)
    thin = {name: value[rows, steps] for name, value in batch.items()}
    return thin | {"obs": obs[rows, seen], "mask": keep[rows, steps]}


# ------------------------------------------------------------------------------------- 8. ant_parts

class BodyEmbedding(nn.Module):
    """An observation (B, T, F) -> e_0 (B, T, D): a matrix times it, and times what it implies.

    NOT in paper, where a linear layer is all. Added, computed from the observation: how many cells
    away every thing lies (a look-up, as in grid.ObsEmbedding with relative=True); and, seen from
    the torso as a walker feels it, the axes of the board, the velocity, the place in the cell.
    Nothing of it is new information. But torques depend on products of a direction on the board
    with the torso's orientation.
    """

    def __init__(self, size, G, K, width):
        super().__init__()
        self.G, self.kinds = G, K - 1
        self.linear = linear(size + 15, width, 1.)
        self.bag = nn.EmbeddingBag(self.kinds * (2 * G - 1) ** 2, width, mode="sum")
        nn.init.normal_(self.bag.weight, std=K ** -.5)

    def forward(self, obs):
        B, T, _ = obs.shape
        R = torch.stack(rotation(*symexp(obs[..., QUATERNION]).unbind(-1)), dim=-1)  # (B, T, 9)

        def own(v):  # R^T v: board (B, T, 2 or 3) -> torso (B, T, 3)
            return torch.einsum("btij,bti->btj", R.view(B, T, 3, 3)[:, :, :v.shape[-1]], v)
        felt = [R, symlog(own(symexp(obs[..., VELOCITY]))), own(obs[..., IN_CELL])]
        x = self.linear(torch.cat([obs, *felt], dim=-1))
        # In half cells: to k's cell, from the torso and then from its own cell. (B, T, K-1, 2)
        away = obs[..., THINGS].view(B, T, self.kinds, 2) * self.G + obs[..., None, IN_CELL]
        away = (away / 2).round().long().clamp(1 - self.G, self.G - 1) + self.G - 1  # whole cells
        side = 2 * self.G - 1
        kind = torch.arange(self.kinds, device=obs.device)
        rows = (kind * side + away[..., 1]) * side + away[..., 0]  # (B, T, K-1)
        return x + self.bag(rows.view(B * T, self.kinds)).view(B, T, -1)  # (B*T, D) -> (B, T, D)


def ant_parts(world, relative):
    """See grid.grid_parts. NOT in paper: scale 1 instead of 0.1, so that e_0 has about unit
    variance."""
    size = observation_size(world)
    return (lambda width: BodyEmbedding(size, world.G, world.K, width) if relative
            else linear(size, width, 1.),
            lambda width: GaussianHead(width, 8),
            lambda width: GaussianHead(width, size))


# ----------------------------------------------------------------------------------- 9. right turns

def by_cells(world, data):
    """Episodes cell by cell, as the grid would have recorded them: Trajectories (N, M) whose steps
    are the moves from one cell to the next, and when (N, M) the ant entered the cell that it left
    by that move (padding: 0). For `exact_bounds`."""
    N, T1 = data.agent.shape
    moved = np.zeros((N, T1), bool)  # the ant is in another cell than a step ago
    moved[:, 1:] = (data.agent[:, 1:] != data.agent[:, :-1]) & data.mask()
    length = moved.sum(1)
    # (N, M) the steps at which a new cell is entered, then others.
    entered = (~moved).argsort(axis=1, kind="stable")[:, :length.max()]
    exists = np.arange(length.max()) < length[:, None]
    # The first cell is entered at 0.
    when = np.where(exists, np.pad(entered, ((0, 0), (1, 0)))[:, :-1], 0)
    pick = lambda x: np.take_along_axis(x, when, axis=1)
    before = pick(data.agent)
    after = np.where(exists, np.take_along_axis(data.agent, entered, axis=1), 0)
    way = neighbour_table(world.G)[before] == after[..., None]  # (N, M, 4)
    action = np.where(way.any(-1), way.argmax(-1), -1)  # -1: across a corner
    last = np.take_along_axis(data.agent, data.length[:, None], axis=1)  # (N, 1)
    agent = np.concatenate([before, last], axis=1)
    agent[np.arange(N), length] = last[:, 0]
    labels = {x: pick(getattr(data, x)) for x in ("target", "progress", "subgoal", "segment")}
    return Trajectories(data.things, agent, action, length=length, **labels), when


def right_turns(walker, world, data, action):
    """Where the ant of a demonstration enters a cell, does the base know which way it will leave?
    A dict of shares of the moves that are guessed right. Refused if there is none.

    NOT in paper. The ant's action NLL is mostly about moving limbs; this is the part of it that is
    about goals, and it has a bound. data: Trajectories of N ants; action (N, T, 8): the base's mean
    torques. right_turns: its guess is the way along which `walker` would use torques nearest to
    these. right_turns_bayes: the likeliest way for one who knows experts and tasks and remembers
    the episode, but is not told the goal (a perfect base comes about .02 short of it, as its mean
    mixes the ways). right_turns_blind: for one who only sees the board. Episodes with a move that
    no expert of the grid would make (mostly a drift into the next cell) are left out.
    """
    cells, when = by_cells(world, data)
    grid = dataclasses.replace(world, body="point")
    colours = np.broadcast_to(np.arange(world.O), (*cells.action.shape, world.O))
    probs = expert_probs(grid, contents_table(world, cells.things), distances(grid, cells.things),
                         cells.agent[:, :-1], colours)  # (N, M, O, 4)
    told = np.take_along_axis(probs, cells.target[..., None, None], axis=2)[:, :, 0]  # (N, M, 4)
    taken = np.take_along_axis(told, cells.action[..., None].clip(0), axis=2)[..., 0]  # (N, M)
    kept = (taken > 0) & (cells.action >= 0) | ~cells.mask()
    rows = np.flatnonzero(kept.all(axis=1))
    if not len(rows):
        raise Refused("no episode among the ant's demonstrations keeps to shortest paths; the "
                      "walker needs more --walker_updates")
    cells, when = cells[rows], when[rows]
    probs = probs[rows, :cells.action.shape[1]]  # (N', M, O, 4): as cells, cut to the longest
    _, _, belief = exact_bounds(grid, cells)  # (N', M, S)
    first = [subgoal[0] for subgoal in world.subgoals]
    optimal = np.einsum("nms,nmsa->nma", belief, probs[:, :, first]).argmax(-1)
    n, m = np.nonzero(cells.mask())
    obs = data.sensed[rows[n], when[n, m]]  # (moves, F)
    meant = action[rows[n], when[n, m]]  # (moves, 8)
    centre = cell_centres(world.G)[cells.agent[n, m]]
    away = []
    for way in ((0, 1), (1, 0), (0, -1), (-1, 0)):  # up, right, down, left
        ahead = centre + CELL * np.array(way) - pose_of(world, obs)[:, :2]
        heading = ahead / np.linalg.norm(ahead, axis=1, keepdims=True)
        torques, _ = walker.walk(0.)(feel(pose_of(world, obs), symexp(obs[:, MOTION]), heading))
        away.append((((meant - torques) / walker.log_std.exp().numpy()) ** 2).sum(-1))
    guesses = {"right_turns": np.argmin(away, axis=0), "right_turns_bayes": optimal[n, m],
               "right_turns_blind": probs.sum(2).argmax(-1)[n, m]}
    return {name: float((x == cells.action[n, m]).mean()) for name, x in guesses.items()}


# ------------------------------------------------------------------------------------------ 10. Ant

class Ant:
    """What the stages of train.py need to know of this body; grid.Grid says what each is, but for
    thin and forget, the ant's alone."""
    parts = staticmethod(ant_parts)
    expert = staticmethod(expert)
    thin = staticmethod(thinned)
    turned = staticmethod(turned)
    checkpoints = ("walker",)

    @staticmethod
    def forget(folder):
        """Delete what else the expert has left in a run's folder."""
        for kind in ("noisy", "clean"):
            shutil.rmtree(folder / f"demonstrations-{kind}", ignore_errors=True)

    @staticmethod
    def check(cfg):
        if cfg.demonstrations <= HELD_OUT:
            raise Refused(f"--demonstrations {cfg.demonstrations} must be more than the {HELD_OUT} "
                          f"held out")
        # Two sets of episodes of 100 steps and more, in float32.
        floats = observation_size(world_of(cfg)) + 8  # of a step
        needed = 2 * cfg.demonstrations * 100 * 4 * floats
        if needed > shutil.disk_usage(".").free:
            raise Refused(f"--demonstrations {cfg.demonstrations} takes at least "
                          f"{needed / 2 ** 30:,.0f} GiB, more than the disk has free")

    @staticmethod
    def source(run, clean):
        recorded = Demonstrations(run, "clean" if clean else "noisy", expert(run))
        return lambda rng, n: recorded[rng.integers(HELD_OUT, run.cfg.demonstrations, n)]

    @staticmethod
    def examination(run, clean):
        kind = "clean" if clean else "noisy"
        return Demonstrations(run, kind, expert(run))[np.arange(HELD_OUT)], {}

    @staticmethod
    def knows(run, base, data, obs, nll, bounds):
        with torch.no_grad():
            mean = base.action_logits(base.lower(obs))[..., :8].cpu().numpy()  # (N, T, 8)
        return right_turns(expert(run), world_of(run.cfg), data, mean)

    @staticmethod
    def evaluated(run, n):
        task = world_of(run.cfg).post_task
        rate = expert_success(run, expert(run), [task], n, noise=0)
        return {"expert_success": ("the ant's expert, mean action, told the task", rate)}

    @staticmethod
    def decoded(data, logits):
        return ()  # torques say nothing to a reader

    @staticmethod
    def picture(world, things, obs):
        """things (O+W,), obs (F,) -> an RGB picture, and where on it, in pixels, the things lie."""
        return draw_ant(world, things, pose_of(world, obs), 512), on_picture(world.G, 512)[things]
