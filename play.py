"""Watch the trained agent: `python play.py` plays one episode step by step, with gate and code.

It takes base.pt, meta.pt and policy.pt from assets/ (or from --out, where train.py wrote them), so
that there is something to see before anything is trained. `--seed` chooses the board, `--gif`
writes a film instead. `--task 0-2-1` sets another task: it will fail, as nothing tells the policy.
"""
import dataclasses
import sys
from pathlib import Path

import numpy as np

import train
from config import Parser, Refused, world_of
from envs import ACTIONS, ascii_grid
from internal_rl import internal_episodes
from metacontroller import BETA_THRESHOLD
from runs import ASSETS, seed_everything


def episode(folder, task, seed):
    """One episode of the policy in `folder`. Returns (body, world, Trajectories, success,
    InternalEnvironment)."""
    run = train.open_run(folder, "policy")
    base, meta, policy = train.rl(run)
    world = world_of(run.cfg)
    if task:
        world = dataclasses.replace(world, post="-".join(map(str, world.read_task(task))))
    rng = seed_everything(seed, "eval", 0)
    data, success, env = internal_episodes(base, meta, world, rng, 1, policy)
    return train.BODIES[run.cfg.body], world, data, bool(success[0]), env


def tell(world, data, success, env):
    """Print the board, then a line for every step: what is done under which code."""
    T = int(data.length[0])
    obs = data.obs()[0]
    if obs.dtype.kind == "i":  # the grid's, in index form
        print(ascii_grid(world, obs[0]))
    print("step  target  action  gate          code")
    for t in range(T):
        beta, code = env.gates[0, t].item(), env.codes[0, t].tolist()
        opened = beta > BETA_THRESHOLD
        action = data.action[0, t]
        name = ACTIONS[action] if np.ndim(action) == 0 else "torques"
        numbers = " ".join(f"{x:5.1f}" for x in code) if opened else "  (as before)"
        gate = f"{beta:.2f} {'opens' if opened else ''}"
        print(f"{t:4}  {data.target[0, t]:6}  {name:7} {gate:12}  {numbers}")
    print(f"\nvisited {data.visited(0, world.O)}: {'success' if success else 'failure'}")


def main(argv=None):
    parser = Parser("play.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=train.PRESETS, default="grid-small")
    parser.add_argument("--out", default=str(ASSETS), help="folder with <preset>/seed0 [assets]")
    parser.add_argument("--task", default="", help="colours in order, such as 0-2-1")
    parser.add_argument("--seed", type=int, default=0, help="which board")
    parser.add_argument("--gif", default="", help="write a film to this file")
    args = parser.parse_args(argv)
    folder = Path(args.out) / args.preset / "seed0"
    try:
        if not (folder / "policy.pt").exists():
            raise Refused(f"there is no policy.pt in {folder}: train one by `python train.py "
                          f"--preset {args.preset}`, then `python play.py "
                          f"--preset {args.preset} --out runs`")
        if args.seed < 0:
            raise Refused(f"--seed must not be negative, and is {args.seed}")
        if args.gif and Path(args.gif).suffix.lower() != ".gif":
            raise Refused(f"--gif writes films that end in .gif, not in {args.gif!r}")
        body, world, data, success, env = episode(folder, args.task, args.seed)
        if args.gif:
            from figures import film  # needs matplotlib, which takes a second to import
            film(Path(args.gif), body, world, data, 0, env, "success" if success else "failure")
        else:
            tell(world, data, success, env)
    except (Refused, ValueError, OSError, RuntimeError) as refusal:
        print(f"play.py: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
