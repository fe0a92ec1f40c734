"""How fast everything is, as ratios measured side by side in one process: `python bench.py WHAT`.
Machines are noisy, so rivals take turns and medians are compared.

  stages   a step of every stage of a preset, as train.py takes it: seconds, what part of them is
           making the batch, share of the speed of the machine's own matrix products, episodes and
           environment steps a second, peak memory; on CUDA eager and as graphs; under
           torchrun, process 0's steps, products and memory, and all processes' episodes
  growth   how a step of the base and of stage 2 grows with the length T and the batch B
  peer     against metacontroller-pytorch 0.3.3, if it is installed, on the same episodes
  worlds   ant: AntWorlds against the bare physics steps inside them, on the same threads, and
           against gymnasium's AsyncVectorEnv of Ant-v5 with one worker per core (which needs
           `pip install imageio`, and is left out without); grid: GridWorlds against one GridPinpad
           after the other, and expert episodes
"""
import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import config
import parallel
import runs
import train
from ant import FRAME_SKIP, AntWorlds
from envs import GridWorlds, World, generate, sample_layouts
from grid import grid_parts
from internal_rl import InternalEnvironment, Player, Policy, clipped_update, in_portions
from metacontroller import Metacontroller, discovery_terms
from model import SequenceModel, pretraining_loss

ANT = World(G=4, O=4, W=1, T=10 ** 9, task_set="singles", body="ant")
GRID = World()


def rate(work, amount):
    """How much of `amount` a second `work()` gets done."""
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return amount / (time.perf_counter() - begin)


def median_rate(work, amount, rounds):
    return np.median([rate(work, amount) for _ in range(rounds + 1)][1:])  # the first warms up


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
        print(f"  {name:44} {np.median(values):>10,.1f} {unit}{'' if name == first else against}")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ------------------------------------------------------------------------------------------- stages

def product_rate(run, m, k, n, rounds=7):
    """FLOP/s of an (m, k) x (k, n) product in the run's precision: the median of `rounds`."""
    a = torch.randn(m, k, device=run.device, dtype=run.dtype)
    b = torch.randn(k, n, device=run.device, dtype=run.dtype)
    many = max(1, int(2e9 / (2 * m * k * n)))

    def work():
        for _ in range(many):
            a @ b
    return median_rate(work, many * 2 * m * k * n, rounds)


def memory(run, reset=False):
    """Peak bytes since the last reset; of the whole process where there is no GPU, and nan where
    the system can't reset its mark."""
    if run.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        return float("nan")
    if reset:
        mark.write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class Timed:
    """Stands in for runs.Training.go: takes a few steps and says what they cost; reports and saves
    nothing. Stages that follow go on from what these few steps have learned, so that what is played
    is played badly: episodes are longer, and gates open more often, than in earnest."""

    def __init__(self, run, rounds, label):
        self.run, self.rounds, self.label = run, rounds, label
        self.peak, self.seen = product_rate(run, 1024, 1024, 1024), set()

    def __call__(self, training, source, learn, report, start=None):
        if training.name in self.seen:  # a stage below the one that is measured
            return
        self.seen.add(training.name)
        cfg, run = self.run.cfg, self.run
        source, supervised = iter(source), training.name not in ("policy", "raw")
        begin = time.perf_counter()
        step, item = next(source)  # makes CHUNK batches
        making = (time.perf_counter() - begin) / train.CHUNK if supervised else 0.
        learn(step, item)  # warms up
        def size(item, happened):  # batches differ in length
            return item["mask"].numel() if supervised else happened["raw_steps"]

        step, item = next(source)
        with FlopCounterMode(display=False) as counter:
            happened = learn(step, item)
        flops = counter.get_total_flops() / size(item, happened)
        memory(run, reset=True)
        taking, sizes = [], []
        for _ in range(self.rounds):
            step, item = next(source)
            begin = time.perf_counter()
            happened = learn(step, item)
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            taking.append(time.perf_counter() - begin)
            sizes.append(size(item, happened))
        peak, seconds = memory(run), np.median(taking)
        speed = np.median(flops * np.array(sizes) / taking)  # FLOP/s
        batch = len(item["mask"]) if supervised else cfg.rl_batch
        if supervised:
            shape = item["mask"].numel() // parallel.count(), cfg.width, cfg.hidden
            own = f"{speed / product_rate(run, *shape):.0%} at the model's own shape"
        else:
            own = f"{happened['raw_steps'] / seconds:,.0f} environment steps/s"
        print(f"  {self.label} {training.name:8} {seconds * 1e3:8.1f} ms ({min(taking) * 1e3:.1f} "
              f"to {max(taking) * 1e3:.1f}) + {making * 1e3:.1f} for the batch  "
              f"{batch / (seconds + making):7,.0f} episodes/s  "
              f"{speed / self.peak:4.0%} of the peak, {own}  {peak / 2 ** 20:,.0f} MiB")


def stages(run, rounds):
    """Every stage of a preset, eager and, on CUDA, as graphs."""
    for graphs in dict.fromkeys((False, run.graphs)):
        with tempfile.TemporaryDirectory() as folder:
            folder = parallel.agreed(folder)
            one = dataclasses.replace(run, folder=Path(folder), graphs=graphs, kept={})
            runs.use_shipped(one, "walker")
            timed = Timed(one, rounds, "graphs" if graphs else "eager ")
            print(f"\n{one.preset}, {one.dtype}, products of 1024^3 at {timed.peak / 1e9:,.0f} "
                  f"GFLOP/s")
            usual, runs.Training.go = runs.Training.go, functools.partialmethod(timed)
            try:
                train.pretrain(one)
                runs.use_shipped(one, "base")  # where there is one, a base that can play
                train.control(one)
                train.rl(one)
                train.raw(one)
            finally:
                runs.Training.go = usual


# ------------------------------------------------------------------------------------------- growth

def episodes(run, B, T):
    """Random walks in place of demonstrations: as many steps as wanted, and no padding."""
    layouts = sample_layouts(GRID, np.random.default_rng(0), B)
    worlds = GridWorlds(dataclasses.replace(GRID, T=10 ** 9), [GRID.post_task] * B, *layouts)
    action = np.random.default_rng(1).integers(4, size=(B, T))
    obs = [worlds.obs().copy()]
    for t in range(T):
        worlds.done[:] = False
        worlds.step(action[:, t])
        obs.append(worlds.obs().copy())
    obs, action = torch.from_numpy(np.stack(obs, axis=1)), torch.from_numpy(action)
    return obs.to(run.device), action.to(run.device)  # (B, T+1, K), (B, T)


def learner(run):
    base = SequenceModel(grid_parts(GRID, True), width=256, layers=4, heads=4, hidden=512,
                         buckets=32, layer=2)
    return base.to(run.device), Metacontroller(256).to(run.device)


def base_step(run, base, optimizer, obs, action):
    base.requires_grad_(True)
    with runs.autocast(run):
        loss = pretraining_loss(base, obs, action, torch.ones_like(action, dtype=torch.bool))[0]
    train.optimise(loss, base, optimizer, 1e-4)


def stage2_step(run, base, meta, optimizer, obs, action):
    base.requires_grad_(False)
    noise = torch.randn(*action.shape, meta.n_z, device=run.device)
    with runs.autocast(run):
        terms = discovery_terms(base, meta.train(), obs, action,
                                torch.ones_like(action, dtype=torch.bool), noise)
    train.optimise(terms["nll"] + .1 * terms["kl"], meta, optimizer, 1e-4)


def growth(run, rounds):
    base, meta = learner(run)
    base_optimizer = runs.adamw(base.parameters(), 1e-4, 0.)
    meta_optimizer = runs.adamw(meta.parameters(), 1e-4, 0.)
    print(f"\nmilliseconds a step, width 256, 4 layers, {run.dtype}")
    print("     B    T      base  stage 2")
    for B, T in ((64, 50), (64, 100), (64, 200), (16, 100), (32, 100), (128, 100)):
        data = episodes(run, B, T)
        works = (functools.partial(base_step, run, base, base_optimizer, *data),
                 functools.partial(stage2_step, run, base, meta, meta_optimizer, *data))
        times = [1e3 / median_rate(work, 1, rounds) for work in works]
        print(f"  {B:4} {T:4}  {times[0]:8.1f} {times[1]:8.1f}")


# --------------------------------------------------------------------------------------------- peer

def the_peer():
    """metacontroller-pytorch, whose package is called like our own file; None: not installed."""
    ours, here = sys.modules.pop("metacontroller"), str(Path(__file__).resolve().parent)
    path, sys.path = sys.path, [p for p in sys.path if p not in ("", here)]
    try:
        found = importlib.util.find_spec("metacontroller")
        return found and importlib.import_module("metacontroller")
    finally:
        sys.path = path
        for name in [name for name in sys.modules if name.split(".")[0] == "metacontroller"]:
            del sys.modules[name]
        sys.modules["metacontroller"] = ours


class Handed:
    """Worlds whose observations were made before, and whose episodes do not end."""

    def __init__(self, seen):
        self.seen, self.t, self.done = seen, 0, np.zeros(len(seen), bool)

    def obs(self):
        return self.seen[:, self.t]


def peer(run, rounds):
    """The same sizes as far as the two have them: width 256, 4 layers of 4 heads, MLP of 512 (the
    peer: 4 x 256, gated or not as it comes), control in the middle, rank 16, codes of 8 (the peer
    needs more than its rank: 17), no auxiliary losses. Unequal work, all of it in the peer's way of
    doing things: it reads one-hot boards (637 numbers) and the past actions, has bidirectional
    attention where we have a Hawk for s and two attention layers where we have one Hawk for the
    policy, and its policy runs at every step of an episode, where ours does at openings of the
    gate."""
    package = the_peer()
    if package is None:
        print("the peer is left out: it needs `pip install metacontroller-pytorch==0.3.3`")
        return
    base, meta = learner(run)
    base_optimizer = runs.adamw(base.parameters(), 1e-4, 0.)
    meta_optimizer = runs.adamw(meta.parameters(), 1e-4, 0.)
    policy = Policy(256, meta.n_z).to(run.device)
    policy_optimizer = runs.adamw(policy.parameters(), 1e-4, 0.)
    body = dict(depth=2, heads=4, attn_dim_head=64)
    their_base = package.Transformer(
        256, state_embed_readout=dict(num_continuous=GRID.cells * GRID.K),
        action_embed_readout=dict(num_discrete=4), lower_body=dict(body), upper_body=dict(body),
        next_latent_loss_weight=0.).to(run.device)
    their_meta = package.MetaController(
        256, dim_meta_controller=32, dim_latent=17, hypernetwork_low_rank=16,
        ratio_loss_weight=0.).to(run.device)
    their_base_optimizer = runs.adamw(their_base.parameters(), 1e-4, 0.)
    their_meta_optimizer = runs.adamw(their_meta.parameters(), 1e-4, 0.)

    def boards(obs):  # (B, T, K) cells -> (B, T, K * C)
        return torch.nn.functional.one_hot(obs, GRID.cells).flatten(2).float()

    def their_step(model, optimizer, losses):
        optimizer.zero_grad()
        losses.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()

    def cloning(obs, action, seen):
        def theirs():
            with runs.autocast(run):
                losses = sum(their_base(seen, action, force_behavior_cloning=True))
            their_step(their_base.requires_grad_(True), their_base_optimizer, losses)
        return functools.partial(base_step, run, base, base_optimizer, obs, action), theirs

    def discovery(obs, action, seen):
        def theirs():
            with runs.autocast(run):
                _, nll, kl, _ = their_base(seen, action, meta_controller=their_meta,
                                           discovery_phase=True)
            their_step(their_meta, their_meta_optimizer, nll + .1 * kl)
        ours = functools.partial(stage2_step, run, base, meta, meta_optimizer, obs, action)
        return ours, theirs

    for title, pair, B, T in (("behaviour cloning", cloning, 128, 100),
                              ("stage-2 step", discovery, 64, 50)):
        obs, action = episodes(run, B, T)
        ours, theirs = pair(obs, action, boards(obs[:, :-1]))
        compare(f"{title}, {B} x {T}, {run.dtype}", "steps/s",
                {"ours": (ours, 1), "metacontroller-pytorch": (theirs, 1)}, rounds)

    n, T = 256, 50
    obs, action = episodes(run, n, T)
    seen = boards(obs)
    torch.nn.init.constant_(meta.switch_out.bias, -2.)  # about as restless as a trained gate

    @torch.no_grad()
    def our_rollout():
        rng, worlds = np.random.default_rng(0), Handed(obs.cpu().numpy())
        env = InternalEnvironment(meta, policy.ask, policy.init_memory(n), n, T, rng, run.device)
        player = Player(base, n, T, rng, env, env.state)
        for _ in range(T):
            player(worlds, np.arange(n))
            worlds.t += 1
        return env

    @torch.no_grad()
    def their_rollout():
        cache, past = None, None
        for t in range(T):
            logits, cache = their_base(seen[:, t:t + 1], past, meta_controller=their_meta,
                                       cache=cache, return_cache=True)
            past = torch.distributions.Categorical(logits=logits).sample()

    compare(f"rollout, {n} episodes of {T} steps, the observations handed to both", "steps/s",
            {"ours": (our_rollout, n * T), "metacontroller-pytorch": (their_rollout, n * T)},
            rounds)

    env = our_rollout()
    e, z, logp, mask = env.sequences()
    reward = torch.from_numpy(np.arange(n) % 2).to(z)
    e = torch.randn(n, T, 256, device=run.device)
    code = torch.randn(n, T, 17, device=run.device)
    with torch.no_grad():
        old = their_meta.log_prob(their_meta.get_action_dist_for_internal_rl(e), code)

    def our_logp(rows, m):
        return policy.logp(e[rows, :m], z[rows, :m])

    def our_update():
        clipped_update(list(policy.parameters()), policy_optimizer,
                       lambda: in_portions(our_logp, env.count), logp, reward, mask)

    def their_update():
        loss = their_meta.policy_loss(e, old, code, reward - .5, mask=torch.ones(n, T).bool())
        their_step(their_meta, their_meta_optimizer, loss)

    each = env.count.float().mean().item()
    compare(f"policy update, {n} episodes; ours at {each:.1f} openings each, theirs at {T} steps",
            "updates/s", {"ours": (our_update, 1), "metacontroller-pytorch": (their_update, 1)},
            rounds)


# ------------------------------------------------------------------------------------------- worlds

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


def main(argv=None):
    parser = config.Parser("bench.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=("stages", "growth", "peer", "worlds"))
    parser.add_argument("--preset", choices=config.PRESETS, default="grid-small", help="for stages")
    parser.add_argument("--rounds", type=int, default=7)
    config.add_options(parser)
    args = vars(parser.parse_args(argv))
    parallel.join()
    if parallel.rank():
        sys.stdout = open(os.devnull, "w")
    try:
        cfg = config.configured(args, config.PRESETS[args["preset"]])
        if args["rounds"] < 1:
            raise config.Refused("--rounds must be at least 1")
        config.check(cfg, config.PRESETS[args["preset"]])
    except config.Refused as refusal:
        parser.error(str(refusal))
    run = runs.Run(cfg, args["preset"], Path("runs") / args["preset"] / f"seed{cfg.seed}")
    runs.choose_device(run)
    if args["what"] == "worlds":
        ants(args["rounds"])
        grid(args["rounds"])
    else:
        {"stages": stages, "growth": growth, "peer": peer}[args["what"]](run, args["rounds"])
    parallel.leave()


if __name__ == "__main__":
    main()
