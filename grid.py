"""The grid's side of the stages, as ant.py is the ant's: the ends of the base model that belong to
this world, and what the stages ask of it.

  1. ObsEmbedding   the observation's look-up; widened: of a smaller board; grid_parts: embedding
                    and heads
  2. Grid           views, episodes, exact bounds, pictures: an entry of train.BODIES

Paper sections: A.1, C.1.1. Glossary: as in envs.py and model.py; run, a runs.Run: the
configuration, its folder, the device; clean: demonstrations without eps (C.4.4).
"""
import functools

import numpy as np
import torch
import torch.nn as nn

from config import world_of
from envs import draw_grid, exact_bounds, generate, symmetries
from model import linear
from runs import EVAL_SEED

# ------------------------------------------------------------------------------ 1. the model's ends

class ObsEmbedding(nn.Module):
    """One-hot observation (A.1.1) times a matrix, as a look-up and a sum: K rows, not C * K.

    relative=False: one row for every thing and cell, as in the paper.
    relative=True: one row for every thing and displacement from the agent, (K-1) x (2G-1)^2 of
    them. NOT in paper for the grid: the ant's observation (A.2.1) gives things relative to the
    ant. It tells nothing that the observation does not hold (and leaves out where the grid ends).
    But "colour k is two cells to my left" is an AND of two one-hots for each of the C cells,
    which a network trained for minutes does not learn.
    """

    def __init__(self, G, K, width, relative=False):
        super().__init__()
        self.G, self.relative = G, relative
        self.kinds = K - 1 if relative else K
        self.rows = (2 * G - 1) ** 2 if relative else G * G
        # NOT in paper: scale 1 instead of 0.1. The K ones of an observation are a fixed, tiny
        # share of its entries, so 0.1 / (C * K) would start the stream near zero. N(0, 1/K)
        # gives e_0 about unit variance.
        self.bag = nn.EmbeddingBag(self.kinds * self.rows, width, mode="sum")
        nn.init.normal_(self.bag.weight, std=K ** -.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("offset", torch.arange(self.kinds) * self.rows, persistent=False)

    def forward(self, obs):
        """obs (B, T, K) int64 -> e_0 (B, T, D)."""
        B, T, _ = obs.shape
        if self.relative:
            row, column = obs // self.G, obs % self.G
            dy = row[..., :-1] - row[..., -1:]  # (B, T, K-1), each in -(G-1) .. G-1
            dx = column[..., :-1] - column[..., -1:]
            obs = (dy + self.G - 1) * (2 * self.G - 1) + dx + self.G - 1
        # Thing k, place c -> row k * rows + c; (B, T, k) -> (B * T, k).
        rows = (obs + self.offset).reshape(B * T, self.kinds)
        return self.bag(rows).view(B, T, -1) + self.bias  # (B*T, D) -> (B, T, D)


def widened(rows, theirs, G, side):
    """The rows (kinds * (2G-1)^2, D) of a relative ObsEmbedding, with `theirs`, those of a smaller
    board of that side, where it has the thing and the displacement."""
    rows = rows.unflatten(0, (-1, 2 * G - 1, 2 * G - 1)).clone()  # (kinds, 2G-1, 2G-1, D)
    theirs = theirs.unflatten(0, (-1, 2 * side - 1, 2 * side - 1))
    near = slice(G - side, G + side - 1)
    rows[:len(theirs), near, near] = theirs
    return rows.flatten(0, 2)


def grid_parts(world, relative):
    """The ends of a SequenceModel that belong to its world, functions of the width: embedding,
    action head, observation head. ant.ant_parts are those of the ant."""
    return (lambda width: ObsEmbedding(world.G, world.K, width, relative),
            lambda width: linear(width, 4),
            lambda width: linear(width, world.K * world.cells))


# ------------------------------------------------------------------------------------------ 2. Grid

@functools.cache
def symmetry_tables(G, device):
    """envs.symmetries as tensors, made once: a CUDA graph can't fetch them from the CPU."""
    return tuple(torch.from_numpy(table).to(device) for table in symmetries(G))


class Grid:
    """What the stages need to know of a body; ant.Ant is the other one."""
    parts = staticmethod(grid_parts)  # embedding and heads of the base
    checkpoints = ()  # of its expert

    @staticmethod
    def expert(run):
        """The frozen model that demonstrates, on which a base depends; None: no training."""

    @staticmethod
    def check(cfg):
        """Raise Refused if the body can't have this configuration."""

    @staticmethod
    def turned(world, g, obs, action):
        """Steps seen and done in a turned world: g (B, T) which symmetry (0: as it is), obs
        (B, T, K), action (B, T) -> the same shapes."""
        cells, actions = symmetry_tables(world.G, obs.device)
        return cells[g[..., None], obs], actions[g, action]  # (8, C), (8, 4)

    @staticmethod
    def source(run, clean):
        """`draw(rng, n) -> Trajectories`: n expert episodes to train on."""
        eps = 0. if clean else run.cfg.eps
        return lambda rng, n: generate(world_of(run.cfg), rng, n, eps)

    @staticmethod
    def examination(run, clean):
        """A fixed set of expert episodes, Trajectories, and its exact bounds, nats per step."""
        world, eps = world_of(run.cfg), 0. if clean else run.cfg.eps
        data = generate(world, np.random.default_rng(EVAL_SEED), 1024, eps)
        bayes, known, _ = exact_bounds(world, data, eps)
        mask = data.mask()
        return data, {"bayes": bayes[mask].mean(), "known": known[mask].mean()}

    @staticmethod
    def knows(run, base, data, obs, nll, bounds):
        """How good a base is: a dict of metrics. data: Trajectories, obs (N, T, K) the same as a
        tensor; nll and bounds: nats per action."""
        return {**bounds, "gap_closed": (np.log(4) - nll) / (np.log(4) - bounds["bayes"])}

    @staticmethod
    def evaluated(run, n):
        """More rows for `evaluate`, of n episodes: key -> (text, rate)."""
        return {}

    @staticmethod
    def decoded(data, logits):
        """Lines of text: the first test episode, and the likeliest action under logits
        (1, T, A)."""
        T, arrows = int(data.length[0]), "^>v<"
        return ("subgoal " + "".join(map(str, data.subgoal[0, :T])),
                "expert  " + "".join(arrows[a] for a in data.action[0, :T]),
                "model   " + "".join(arrows[a] for a in logits[0, :T].argmax(-1).tolist()))

    @staticmethod
    def picture(world, things, obs):
        """things (O+W,), obs (K,) -> an RGB picture, and where on it, in pixels, the things lie:
        (O+W, 2), x and y."""
        picture = draw_grid(world, obs, 64)
        return picture, np.stack([things % world.G, things // world.G], axis=1) * 64 + 32
