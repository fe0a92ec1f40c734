"""How fast the worlds are, as ratios measured side by side: `python bench.py`. Machines are noisy,
so the rivals take turns and medians are compared.

  ant      actions per second of AntWorlds (physics, rules, observations) against the bare physics
           steps inside them, on the same threads; and against gymnasium's AsyncVectorEnv of Ant-v5
           with one worker per core (which needs `pip install imageio`, and is left out without)
  grid     expert episodes per second, and steps per second of GridWorlds against one GridPinpad
           after the other
"""
import argparse
import importlib.util
import os
import time

import gymnasium as gym
import numpy as np

from ant import FRAME_SKIP, AntWorlds
from envs import GridWorlds, World, generate, sample_layouts

ANT = World(G=4, O=4, W=1, T=10 ** 9, task_set="singles", body="ant")
GRID = World()


def rate(work, amount):
    """How much of `amount` a second `work()` gets done."""
    begin = time.perf_counter()
    work()
    return amount / (time.perf_counter() - begin)


def compare(title, unit, rivals, rounds):
    """rivals: name -> (work, amount). They take turns, `rounds` times; the first is compared with
    every other, round by round."""
    rates = {name: [] for name in rivals}
    for _ in range(rounds + 1):
        for name, (work, amount) in rivals.items():
            rates[name].append(rate(work, amount))
    rates = {name: np.array(x[1:]) for name, x in rates.items()}  # the first round warms up
    print(f"\n{title}")
    first = next(iter(rates))
    for name, values in rates.items():
        ratio = rates[first] / values
        against = (f"   {first} is {np.median(ratio):.2f} times as fast ({ratio.min():.2f} to "
                   f"{ratio.max():.2f})")
        print(f"  {name:44} {np.median(values):>10,.0f} {unit}{'' if name == first else against}")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def ants(rounds, n=256, steps=40):
    rng = np.random.default_rng(0)
    action = rng.uniform(-.3, .3, (n, 8))  # small torques: the ants stay on their feet

    def worlds():
        layout = sample_layouts(ANT, np.random.default_rng(1), n)
        return AntWorlds(ANT, [ANT.post_task] * n, *layout, np.random.default_rng(1), cores())

    def played(w):
        for _ in range(steps):
            w.obs()
            w.done[:] = False  # nobody drops out: as many physics steps as below
            w.step(action)

    def bare(w):
        w.ants.ctrl[:] = action
        for _ in range(steps):
            w.ants.sim.step(None, FRAME_SKIP)

    ours, same = worlds(), worlds()
    rivals = {"AntWorlds": (lambda: played(ours), steps * n),
              "their mj_step calls alone": (lambda: bare(same), steps * n)}
    if importlib.util.find_spec("imageio") is None:
        print("gymnasium's Ant-v5 is left out: it needs `pip install imageio`")
        compare(f"ant, {n} worlds on {cores()} threads", "actions/s", rivals, rounds)
        return
    theirs = gym.make_vec("Ant-v5", num_envs=cores(), vectorization_mode="async")
    theirs.reset(seed=0)
    few = steps * n // cores() // 8

    def gymnasium():
        for _ in range(few):
            theirs.step(action[:cores()].astype(np.float32))

    rivals[f"AsyncVectorEnv of Ant-v5, {cores()} workers"] = gymnasium, few * cores()
    compare(f"ant, {n} worlds on {cores()} threads", "actions/s", rivals, rounds)
    theirs.close()


def grid(rounds, n=1024, steps=50):
    rng = np.random.default_rng(0)
    layouts, actions = sample_layouts(GRID, rng, n), rng.integers(4, size=(steps, n))
    single = gym.make("GridPinpad-v0").unwrapped

    def together():
        worlds = GridWorlds(GRID, [GRID.post_task] * n, *layouts)
        for action in actions:
            worlds.obs()
            worlds.step(action)

    def alone():
        single.reset(seed=0)
        for action in actions[:, 0]:
            single.step(int(action))

    compare(f"grid, {n} worlds", "steps/s", {"GridWorlds": (together, steps * n),
                                             "GridPinpad, one world": (alone, steps)}, rounds)
    compare("grid experts", "episodes/s", {"generate": (lambda: generate(GRID, rng, 2048), 2048)},
            rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    ants(arguments.rounds)
    grid(arguments.rounds)
