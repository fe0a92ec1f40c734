"""Draw what the runs measured: `python figures.py --preset grid-small` reads runs/ and writes pictures into figures/grid-small/.

  1. curves     training losses against the exact bounds (envs.exact_bounds)
  2. success    success against episodes, linear and log axis, median and quartiles over seeds (Fig. 8, A5)
  3. gate       gate against true subgoals in example episodes (Fig. 6, A3)
  4. film       a GIF of the agent at the post-training task, with its gate and its code
  5. results    results.json: the numbers of every seed, from the runs' own logs; README's tables are these

Each is drawn from the .jsonl logs and .pt files of all seeds found; one whose data is missing is skipped, saying so. Nothing is trained.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter

import train
from envs import PALETTE, draw_ant, draw_grid, generate, pose_of
from internal_rl import internal_episodes

LABELS = {"policy": "internal RL", "policy-forced": "forced switching", "policy-cotrain": "co-training", "raw": "raw-action RL"}


def open_run(folder, name):
    """A Run with the configuration that checkpoint `name` in this folder was made with."""
    saved = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)["fingerprint"]
    cfg = train.PRESETS[saved["preset"]]
    asked = train.fingerprint(train.Run(cfg, saved["preset"], folder), name)
    known = dataclasses.asdict(train.Config()) | saved  # a field younger than the checkpoint had its default (see train.difference)
    cfg = dataclasses.replace(cfg, **{field: known[field] for field in asked if field != "preset"})
    return train.Run(cfg, saved["preset"], folder, extend=False)


def ready(folder, name):
    """Is there a checkpoint `name` whose training has ended?"""
    return (folder / f"{name}.pt").exists() and train.finished(open_run(folder, name), name)


def logs(folders, name):
    """The logs of all seeds whose training has ended."""
    return [train.read_log(train.Run(None, "", folder), name) for folder in folders if ready(folder, name)]


def save(figure, path):
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"wrote {path}")


# ------------------------------------------------------------------------------------------------ 1. curves

def draw_curves(folders, to):
    panels = [(name, title, logs(folders, name)) for name, title in
              (("base", "stage 1: base model"), ("control", "C.3: true subgoals"), ("meta", "stage 2: metacontroller"))]
    panels = [panel for panel in panels if panel[2]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), squeeze=False)
    for axis, (_, title, seeds) in zip(axes[0], panels):
        for log in seeds:
            axis.plot([line["step"] for line in log], [line["nll"] for line in log], color="tab:blue", alpha=.7)
        if seeds[0][-1].get("bayes") is not None:  # the ant's NLL has no exact bounds
            axis.axhline(seeds[0][-1]["bayes"], color="black", ls="--", lw=1, label="Bayes-optimal, goal unknown")
            axis.axhline(seeds[0][-1]["known"], color="black", ls=":", lw=1, label="goal known")
            axis.legend(fontsize=7)
        axis.set(title=f"{title} ({len(seeds)} seeds)", xlabel="step", ylabel="action NLL, nats")
    save(figure, to / "curves.png")


# ------------------------------------------------------------------------------------------------ 2. success (Fig. 8, A5)

def draw_success(folders, to):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for name, colour in zip(LABELS, ("tab:blue", "tab:orange", "tab:green", "tab:red")):
        seeds = logs(folders, name)
        if not seeds:
            continue
        curves = [{line["episodes"]: line["eval_success"] for line in log} for log in seeds]
        episodes = sorted(set.intersection(*(set(curve) for curve in curves)))  # at which every seed was evaluated
        success = np.array([[curve[n] for n in episodes] for curve in curves])  # (seeds, evaluations)
        low, middle, high = np.quantile(success, (.25, .5, .75), axis=0)
        for axis in axes:
            axis.plot(episodes, middle.clip(2e-4), color=colour, label=f"{LABELS[name]} ({len(seeds)} seeds)")
            axis.fill_between(episodes, low, high, color=colour, alpha=.25, lw=0)
    for axis, scale in zip(axes, ("linear", "log")):
        axis.set(xlabel="episodes", ylabel="success on the post-training task", yscale=scale)
        axis.set_ylim(*((-.02, 1.02) if scale == "linear" else (1.5e-4, 1.2)))  # 0 of 2,000 is drawn at 2e-4
    axes[0].legend(fontsize=8)
    save(figure, to / "success.png")


# ------------------------------------------------------------------------------------------------ 3. gate (Fig. 6, A3)

def draw_gate(folder, to, episodes=4):
    run = open_run(folder, "meta")
    base, meta = train.discover(run)
    world = train.world_of(run.cfg)
    rng = train.seed_everything(train.EVAL_SEED, "eval", 9)
    ant = world.body == "ant"
    data = train.Demonstrations(run, "clean", train.expert(run))[np.arange(episodes)] if ant else generate(world, rng, episodes)
    with torch.no_grad():
        reading = base.reading(base.lower(torch.from_numpy(data.obs())))
        _, beta, _, _ = meta(reading, torch.from_numpy(data.length) + 1, torch.randn(*data.subgoal.shape, meta.n_z))
    figure, axes = plt.subplots(episodes, 1, figsize=(8, 1.3 * episodes), sharex=True, sharey=True)
    for n, axis in enumerate(axes):
        T = data.length[n]
        begin = np.flatnonzero(np.diff(data.subgoal[n, :T], prepend=-1))  # (subgoals of the episode,)
        for a, b in zip(begin, [*begin[1:], T]):
            axis.axvspan(a - .5, b - .5, color=PALETTE[data.subgoal[n, a] % len(PALETTE)] / 255, alpha=.3, lw=0)
        axis.step(np.arange(T), beta[n, :T], where="mid", color="black")
        axis.set(ylabel="gate", ylim=(-.05, 1.05), xlim=(-.5, data.length.max() - .5))
    axes[-1].set_xlabel("step (colour: true subgoal; line: switching gate)")
    save(figure, to / "gate.png")


# ------------------------------------------------------------------------------------------------ 4. film

def draw_film(folder, to):
    run = open_run(folder, "policy")
    base, meta, policy = train.rl(run)
    world = train.world_of(run.cfg)
    data, success, env = internal_episodes(base, meta, world, train.seed_everything(train.EVAL_SEED, "eval", 10), 64, policy)
    n = int(np.flatnonzero(success)[0]) if success.any() else int(data.length.argmax())  # a success if there is one; the title says
    T, ant = int(data.length[n]), world.body == "ant"
    obs, gate, code = data.obs()[n], env.gates[n, :T].numpy(), env.codes[n, :T].numpy().T
    figure, (left, above, below) = plt.subplots(1, 3, figsize=(9, 3.2), width_ratios=(1, 1.1, 1.1))
    task = "-".join(map(str, world.post_task))

    def frame(t):
        for axis in (left, above, below):
            axis.clear()
        left.imshow(draw_ant(world, data.things[n], pose_of(world, obs[t])) if ant else draw_grid(world, obs[t]))
        for k in range(0 if ant else world.O):
            row, column = divmod(int(obs[t, k]), world.G)
            left.text(column * 32 + 4, row * 32 + 9, str(k), fontsize=8)
        left.set(title=f"{task}: {data.visited(n) if t == T else ''}", xticks=[], yticks=[])
        above.step(np.arange(min(t + 1, T)), gate[:t + 1], where="mid", color="black")
        above.set(title="gate", xlim=(-.5, T), ylim=(-.05, 1.05), xlabel="step")
        below.imshow(np.where(np.arange(T) <= t, code, np.nan), aspect="auto", cmap="coolwarm", vmin=-2.5, vmax=2.5)
        below.set(title=f"code z ({'success' if success[n] else 'failure'})", xlabel="step", yticks=[])

    figure.tight_layout()
    times = sorted({*range(0, T, 4 if ant else 1), T})
    FuncAnimation(figure, frame, frames=times).save(to / "agent.gif", PillowWriter(fps=10 if ant else 3), dpi=70)
    plt.close(figure)
    print(f"wrote {to / 'agent.gif'}")


# ------------------------------------------------------------------------------------------------ 5. results

def seed_results(folder):
    """The numbers of one seed, for results.json. None where something has not been run.

    bayes_gap_closed, switch_f1 (exact step), switch_f1_1 (+-1), switch_f1_5, undecided (gates): shares. code_identity: share of its maximum. *_success: share
    of fresh episodes of the post-training task; rl_success_normalised: divided by the ant's expert's. nll: of the base, nats per action; right_turns*: see
    internal_rl.right_turns. gate_*: see internal_rl.opened_at_arrivals. *_episodes: episodes trained on. raw_unchanged: raw RL's weights are still the base's, bit for bit: no episode was ever rewarded. minutes: the path of `--stage rl`, rivals but
    raw excluded, the ant's demonstrations included and its walker not; base_minutes: the part of the base.
    """
    last = {name: (logs([folder], name) or [[{}]])[0][-1] for name in ("base", "control", "meta", "policy", "raw")}
    read = lambda name: json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    plain, base, meta, identity = read("eval.json"), last["base"], last["meta"], last["meta"].get("code_identity")
    weights = lambda name: torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)["model"]
    unchanged = all(torch.equal(a, b) for a, b in zip(weights("base").values(), weights("raw").values())) if last["raw"] else None
    made = [read(f"demonstrations-{kind}/made.json").get("seconds", 0) for kind in ("noisy", "clean")]
    expert = plain.get("expert_success")
    own = ({"bayes_gap_closed": base.get("gap_closed")} if "right_turns" not in base else
           {"expert_success": expert, "nll": base.get("nll"), "right_turns": base.get("right_turns"),
            "right_turns_bayes": base.get("right_turns_bayes"), "right_turns_blind": base.get("right_turns_blind"), "switch_f1_5": meta.get("f1_5"),
            "transplant_with": plain.get("transplant_with"),
            "transplant_without": plain.get("transplant_without"),
            "rl_success_normalised": plain["rl_success"] / expert if expert and "rl_success" in plain else None})
    return {"seed": int(folder.name.removeprefix("seed")), **own,
            "control_success": plain.get("control_success"), "switch_f1": meta.get("f1"), "switch_f1_1": meta.get("f1_1"),
            "undecided": meta.get("undecided"), "code_identity": identity and identity / meta["code_identity_max"], "code_success": plain.get("code_success"),
            "rl_success": plain.get("rl_success"), "rl_episodes": last["policy"].get("episodes"),
            "gate_next_door": plain.get("gate_next_door"), "gate_elsewhere": plain.get("gate_elsewhere"),
            "raw_success": plain.get("raw_success"), "raw_episodes": last["raw"].get("episodes"), "raw_unchanged": unchanged,
            "forced_success": read("eval-forced.json").get("rl_success"), "cotrain_success": read("eval-cotrain.json").get("rl_success"),
            "blind_success": plain.get("blind_success"), "minutes": sum(made) / 60 + sum(line.get("seconds", 0) for line in last.values()) / 60,
            "base_minutes": base.get("seconds", 0) / 60}


RIVALS = ("forced_success", "cotrain_success")  # evaluated by themselves, see train.evaluate
ROWS = (("base: share of the gap to Bayes closed", "bayes_gap_closed", "{:.1%}"), ("base: NLL, nats per action", "nll", "{:.2f}"),
        ("base: right turns", "right_turns", "{:.3f}"), ("Bayes-optimal: right turns", "right_turns_bayes", "{:.3f}"),
        ("goal-blind: right turns", "right_turns_blind", "{:.3f}"),
        ("the ant's expert, success", "expert_success", "{:.3f}"), ("true-subgoal controllers (C.3), success", "control_success", "{:.3f}"),
        ("gate F1, exact step", "switch_f1", "{:.3f}"), ("gate F1, +-1 step", "switch_f1_1", "{:.3f}"), ("gate F1, +-5 steps", "switch_f1_5", "{:.3f}"),
        ("gates between .1 and .9", "undecided", "{:.1%}"),
        ("code identity, share of its maximum", "code_identity", "{:.1%}"), ("transplanted code (B.3.2), success", "transplant_with", "{:.3f}"),
        ("the same without the code", "transplant_without", "{:.3f}"), ("codes from the prior, success", "code_success", "{:.4f}"),
        ("**internal RL, success**", "rl_success", "{:.3f}"), ("divided by the expert's", "rl_success_normalised", "{:.3f}"),
        ("the gate opens at an arrival straight from another colour", "gate_next_door", "{:.1%}"), ("from an empty cell", "gate_elsewhere", "{:.1%}"),
        ("episodes of internal RL", "rl_episodes", "{:,}"),
        ("raw-action RL, success", "raw_success", "{:.4f}"), ("episodes of raw-action RL", "raw_episodes", "{:,}"),
        ("raw-action RL left the base's weights as they were", "raw_unchanged", "{}"),
        ("forced switching, success", "forced_success", "{:.4f}"), ("co-training, success", "cotrain_success", "{:.4f}"),
        ("blind sampling, success", "blind_success", "{:.5f}"), ("minutes", "minutes", "{:.0f}"),
        ("of these, the base", "base_minutes", "{:.0f}"))


def write_results(folders, preset, to):
    """Put these seeds into this preset's entry of results.json and print the entry as the README's table. Other seeds and presets stay as they are.

    Of a seed that the file knows, a folder in which only rivals were evaluated adds their numbers, and rivals that it lacks keep theirs.
    """
    path = to / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    known = {seed["seed"]: seed for seed in results.get(preset, {}).get("seeds", [])}
    for folder in folders:
        new = seed_results(folder)
        old = known.get(new["seed"], {})
        rivals = {key: new[key] for key in RIVALS if new[key] is not None}
        known[new["seed"]] = old | (rivals if old and not (folder / "eval.json").exists() else
                                    {key: value for key, value in new.items() if key not in RIVALS or key not in old} | rivals)
    seeds = [known[k] for k in sorted(known)]
    results[preset] = {"seeds": seeds}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}\n\n| | " + " | ".join(f"seed {seed['seed']}" for seed in seeds) + " |\n" + "|---" * (len(seeds) + 1) + "|")
    for title, key, form in ROWS:
        if any(key in seed for seed in seeds):
            print(f"| {title} | " + " | ".join("not run" if seed.get(key) is None else form.format(seed[key]) for seed in seeds) + " |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=train.PRESETS, default="grid-small")
    parser.add_argument("--out", default="runs", help="folder that train.py wrote to")
    parser.add_argument("--to", default="figures", help="folder for results.json and, in a folder for each preset, the pictures")
    args = parser.parse_args(argv)
    folders = sorted((Path(args.out) / args.preset).glob("seed*"))
    if not folders:
        print(f"figures.py: nothing in {Path(args.out) / args.preset}; run train.py --preset {args.preset} first", file=sys.stderr)
        return 2
    to = Path(args.to)
    pictures = to / args.preset
    pictures.mkdir(parents=True, exist_ok=True)
    for draw, name, seeds in ((draw_curves, "base", "all"), (draw_success, "policy", "all"),
                              (draw_gate, "meta", "one"), (draw_film, "policy", "one")):
        try:  # only finished checkpoints: an unfinished one would be trained on
            have = [folder for folder in folders if ready(folder, name)]
            if not have:
                print(f"{draw.__name__}: no finished {name}.pt, skipped")
            else:
                draw(have if seeds == "all" else have[0], pictures)
        except train.Refused as refusal:
            print(f"figures.py: {refusal}", file=sys.stderr)
            return 2
    write_results(folders, args.preset, to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
