"""results.json: the numbers of every seed, from the runs' logs, and the table of docs/results.md.

  1. a seed    its numbers by name, and those of its rivals
  2. the file  entries by preset; the rows of `python analysis.py WHAT` under analyses; the table

figures.py calls write_results and draws from this file (but curves of training and films: from
logs and weights). Nothing is trained.
"""
import itertools
import json

import torch

import train
from experiments import EXPERIMENTS
from runs import finished, load_checkpoint, read_log

# How the keys of results.json begin: rl_curve, rl_success and so on.
SHORT = {"policy": "rl", "policy-forced": "forced", "policy-cotrain": "cotrain",
         "policy-compile": "compile", "raw": "raw"}


# --------------------------------------------------------------------------------------- 1. a seed

def ready(folder, name):
    """Is there a checkpoint `name` whose training has ended?"""
    return (folder / f"{name}.pt").exists() and finished(train.open_run(folder, name), name)


def logs(folders, name):
    """The logs of all seeds whose training has ended."""
    return [read_log(folder, name) for folder in folders if ready(folder, name)]


def seed_results(folder):
    """The numbers of one seed, for results.json. None where something has not been run.

    bayes_gap_closed, switch_f1 (exact step), switch_f1_1 (+-1), switch_f1_5, undecided (gates),
    code_none: shares. code_identity: share of ln S. *_success: share of eval_episodes (blind: 20
    times as many) fresh episodes of the post-training task; rl_success_normalised: divided by the
    ant's expert's. nll: of the base, nats per action; right_turns*: see ant.right_turns. gate_*:
    see analysis.opened_at_arrivals.
    *_curve: lists of [episodes, success]. layer: the controlled one, of so many layers.
    control_success_by_leg, success_by_subgoals, opens_*: see analysis.py.
    *_plain_success: codes steer their own episode, without our views (experiments.rivals).
    kl_open, kl_shut: nats per step. *_episodes: episodes trained on. raw_unchanged: raw RL's
    weights are still the base's, bit for bit: no episode was ever rewarded. minutes: the path of
    `--stage rl`, rivals but raw excluded, demonstrations included and the walker not;
    base_minutes: the part of the base.
    """
    last = {name: (logs([folder], name) or [[{}]])[0][-1]
            for name in ("base", "control", "meta", "policy", "raw")}

    def read(name):
        return json.loads((folder / name).read_text()) if (folder / name).exists() else {}

    plain, base, meta = read("eval.json"), last["base"], last["meta"]
    layers = {}
    if meta:
        cfg = train.open_run(folder, "meta").cfg
        layers = {"layer": cfg.layer, "layers": cfg.layers}
    unchanged = None
    if last["raw"]:
        before, after = (load_checkpoint(folder / f"{x}.pt")["model"] for x in ("base", "raw"))
        unchanged = all(torch.equal(a, b) for a, b in zip(before.values(), after.values()))
    made = [read(f"demonstrations-{kind}/made.json").get("seconds", 0)
            for kind in ("noisy", "clean")]
    identity = meta.get("code_identity")
    cells = {(row["arm"], row["views"]): row for row in read_log(folder, "rivals")}
    cotrained = cells.get(("cotrained", True), {})
    expert = plain.get("expert_success")
    normalised = plain["rl_success"] / expert if expert and "rl_success" in plain else None
    seconds = sum(made) + sum(line.get("seconds", 0) for line in last.values())
    numbers = {
        "seed": int(folder.name.removeprefix("seed")),
        "eval_episodes": plain.get("eval_episodes",
                                   train.PRESETS[folder.parent.name].eval_episodes),
        "bayes_gap_closed": base.get("gap_closed"), "expert_success": expert,
        "nll": base.get("nll"),
        **{key: base.get(key) for key in ("right_turns", "right_turns_bayes", "right_turns_blind")},
        "control_success": plain.get("control_success"), "switch_f1": meta.get("f1"),
        "switch_f1_1": meta.get("f1_1"), "switch_f1_5": meta.get("f1_5"),
        **{key: meta.get(key) for key in ("undecided", "kl_open", "kl_shut", "code_none")},
        "code_identity": identity and identity / meta["code_identity_max"],
        **{key: plain.get(key) for key in ("code_success", "rl_success", "success_by_subgoals")},
        **{key: meta.get(key) for key in ("opens_subgoal_end", "opens_inside")},
        "control_success_by_leg": last["control"].get("success_by_leg"), **layers,
        "rl_success_normalised": normalised, "rl_episodes": last["policy"].get("episodes"),
        "gate_next_door": plain.get("gate_next_door"),
        "gate_elsewhere": plain.get("gate_elsewhere"), "raw_success": plain.get("raw_success"),
        "raw_episodes": last["raw"].get("episodes"), "raw_unchanged": unchanged,
        "forced_success": read("eval-forced.json").get("rl_success"),
        "cotrain_success": read("eval-cotrain.json").get("rl_success", cotrained.get("success")),
        "compile_success": read("eval-compile.json").get("rl_success"),
        "frozen_plain_success": cells.get(("frozen", False), {}).get("success"),
        "cotrain_plain_success": cells.get(("cotrained", False), {}).get("success"),
        "blind_success": plain.get("blind_success"), "minutes": seconds / 60,
        "base_minutes": base.get("seconds", 0) / 60}
    for name, short in SHORT.items():
        if ready(folder, name):
            numbers[f"{short}_curve"] = [[line["episodes"], line["eval_success"]]
                                         for line in read_log(folder, name)]
    if cotrained:
        numbers.setdefault("cotrain_curve", cotrained["rl_curve"])
    own = ("expert_success", "nll", "right_turns", "right_turns_bayes", "right_turns_blind",
           "switch_f1_5", "rl_success_normalised")
    skipped = ("bayes_gap_closed",) if "right_turns" in base else own
    return {key: value for key, value in numbers.items() if key not in skipped}


# ------------------------------------------------------------------------------------- 2. the file

# What may be measured apart from the rest of a seed: train.evaluate, experiments.rivals.
RIVAL_KEYS = ("forced_success", "forced_curve", "cotrain_success", "cotrain_curve",
              "compile_success", "compile_curve", "frozen_plain_success", "cotrain_plain_success")
ROWS = {
    "bayes_gap_closed": ("base: share of the gap to Bayes closed", "{:.1%}"),
    "nll": ("base: NLL, nats per action", "{:.2f}"),
    "right_turns": ("base: right turns", "{:.3f}"),
    "right_turns_bayes": ("Bayes-optimal: right turns", "{:.3f}"),
    "right_turns_blind": ("goal-blind: right turns", "{:.3f}"),
    "expert_success": ("the ant's expert, success", "{:.3f}"),
    "control_success": ("true-subgoal controllers (C.3), success", "{:.3f}"),
    "switch_f1": ("gate F1, exact step", "{:.3f}"),
    "switch_f1_1": ("gate F1, +-1 step", "{:.3f}"),
    "switch_f1_5": ("gate F1, +-5 steps", "{:.3f}"),
    "opens_subgoal_end": ("the gate opens where a subgoal ends", "{:.1%}"),
    "opens_inside": ("where a colour inside one is reached", "{:.1%}"),
    "undecided": ("gates between .1 and .9", "{:.1%}"),
    "kl_open": ("KL per step, gate open, nats", "{:.2f}"),
    "kl_shut": ("KL per step, gate shut, nats", "{:.2f}"),
    "code_identity": ("code identity, share of ln S", "{:.1%}"),
    "code_none": ("codes that lead nowhere", "{:.1%}"),
    "code_success": ("codes from the prior, success", "{:.4f}"),
    "rl_success": ("**internal RL, success**", "{:.3f}"),
    "rl_success_normalised": ("divided by the expert's", "{:.3f}"),
    "gate_next_door": ("the gate opens at an arrival straight from another colour", "{:.1%}"),
    "gate_elsewhere": ("from an empty cell", "{:.1%}"),
    "rl_episodes": ("episodes of internal RL", "{:,}"),
    "raw_success": ("raw-action RL, success", "{:.4f}"),
    "raw_episodes": ("episodes of raw-action RL", "{:,}"),
    "raw_unchanged": ("raw-action RL left the base's weights as they were", "{}"),
    "forced_success": ("forced switching, success", "{:.4f}"),
    "cotrain_success": ("co-training, success", "{:.4f}"),
    "compile_success": ("CompILE, success", "{:.4f}"),
    "frozen_plain_success": ("without views: internal RL", "{:.4f}"),
    "cotrain_plain_success": ("without views: co-training", "{:.4f}"),
    "blind_success": ("blind sampling, success", "{:.5f}"),
    "minutes": ("minutes", "{:.0f}"),
    "base_minutes": ("of these, the base", "{:.0f}"),
}


def write_results(folders, preset, to):
    """Put these seeds into this preset's entry of results.json, print the entry as a table and
    return it, and the preset's analyses. Other seeds and presets stay as they are.

    Of a seed that the file knows, a folder in which only rivals were evaluated adds their numbers,
    and rivals that it lacks keep theirs.
    """
    path = to / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    analyses = results.setdefault("analyses", {}).setdefault(preset, {})
    for what, folder in itertools.product(EXPERIMENTS, folders):
        seed = int(folder.name.removeprefix("seed"))
        new = [{"seed": seed, **row} for row in read_log(folder, what)]
        if new:
            others = [row for row in analyses.get(what, []) if row["seed"] != seed]
            analyses[what] = sorted(others + new, key=lambda row: row["seed"])
    known = {seed["seed"]: seed for seed in results.get(preset, {}).get("seeds", [])}
    for folder in folders:
        new = seed_results(folder)
        seed = new["seed"]
        old = known.get(seed, {})
        # A rival that was not run here keeps the numbers that it has.
        kept = {key: old[key] for key in RIVAL_KEYS if key in old and new.get(key) is None}
        if old and not (folder / "eval.json").exists():
            new = {key: new[key] for key in RIVAL_KEYS if new.get(key) is not None}
        known[seed] = old | new | kept
    seeds = [known[k] for k in sorted(known)]
    results[preset] = {"seeds": seeds}
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}\n\n| | " + " | ".join(f"seed {seed['seed']}" for seed in seeds) + " |")
    print("|---" * (len(seeds) + 1) + "|")
    for key, (title, form) in ROWS.items():
        if any(seed.get(key) is not None for seed in seeds):
            cells = ["not run" if seed.get(key) is None else form.format(seed[key])
                     for seed in seeds]
            print(f"| {title} | " + " | ".join(cells) + " |")
    return seeds, analyses
