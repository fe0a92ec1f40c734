"""Draw what the runs measured: `python figures.py --preset grid-small` reads runs/ and writes
pictures into figures/grid-small/.

  1. curves     training losses against the exact bounds (envs.exact_bounds)
  2. success    success against episodes, linear and log axis, median and quartiles over seeds
                (Fig. 8, A5)
  3. film       a GIF of the agent at the post-training task, with its gate and its code
  4. analyses   what `python analysis.py WHAT` measured: probes (Fig. 3), layers (Fig. 4),
                ablations (Fig. A2), rate (Fig. 7), rivals, gates (Fig. 6, A3), codes, transplant
                (B.3.2)
  5. everything

First results.py writes results.json from the runs' logs. 1 and 3 are drawn from the .jsonl logs and
.pt files of all seeds found; 2 and 4 from results.json alone: without runs, from the one in
assets/. What has no data is skipped, saying so. Nothing is trained.
"""
import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.ticker import MaxNLocator

import train
from config import Parser, Refused, world_of
from envs import PALETTE
from internal_rl import internal_episodes
from metacontroller import BETA_THRESHOLD
from results import SHORT, logs, ready, write_results
from runs import ASSETS, EVAL_SEED, seed_everything

METHODS = {"policy": "internal RL", "policy-forced": "forced switching",
           "policy-cotrain": "co-training", "policy-compile": "CompILE", "raw": "raw-action RL"}
ARMS = {"frozen": "frozen base", "cotrained": "co-trained"}
# Told apart by colour-blind readers, too.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00")


def save(figure, path):
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)
    print(f"wrote {path}")


def label_ends(axis, ends, gap):
    """Name each curve at its end, right of the axis and none on another: ends is a list of
    (height, text, colour), gap the least distance, as a share of the axis."""
    low, high = axis.get_ylim()
    ends, heights = sorted(ends), []
    for y, _, _ in ends:
        heights.append(max([y, *(h + gap * (high - low) for h in heights)]))
    lower = np.mean(heights) - np.mean([y for y, _, _ in ends])
    for height, (_, text, colour) in zip(heights, ends):
        axis.annotate(text, (1.03, height - lower), xycoords=("axes fraction", "data"), fontsize=8,
                      va="center", color=colour)


# ---------------------------------------------------------------------------------------- 1. curves

def draw_curves(folders, to):
    titles = {"base": "stage 1: base model", "control": "C.3: true subgoals",
              "meta": "stage 2: metacontroller"}
    panels = {title: logs(folders, name) for name, title in titles.items()}
    panels = {title: seeds for title, seeds in panels.items() if seeds}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), sharey=True,
                                squeeze=False)
    for axis, (title, seeds) in zip(axes[0], panels.items()):
        for log in seeds:
            axis.plot([line["step"] for line in log], [line["nll"] for line in log],
                      color=COLOURS[0], alpha=.7)
        for key, text in (("bayes", "Bayes-optimal, goal unknown"), ("known", "goal known")):
            bound = seeds[0][-1].get(key)  # the ant's NLL has no exact bounds
            if bound is not None:
                axis.axhline(bound, color="black", ls="--" if key == "bayes" else ":", lw=1)
                axis.annotate(text, (1, bound), xycoords=("axes fraction", "data"), fontsize=7,
                              ha="right", va="bottom", xytext=(-3, 1), textcoords="offset points")
        axis.set(title=f"{title} ({seeds_of(seeds)})", xlabel="optimiser step")
    axes[0, 0].set_ylabel("action NLL, nats")
    save(figure, to / "curves.png")


def wilson(rate, n, z=1.96):
    """Wilson's interval of 95% for a share of n: (low, high)."""
    middle, half = rate + z * z / 2 / n, z * (rate * (1 - rate) / n + z * z / 4 / n / n) ** .5
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def draw_share(axis, x, rate, n, **style):
    """A share of n, with its interval."""
    low, high = wilson(rate, n)
    axis.errorbar(x, rate, [[max(rate - low, 0)], [max(high - rate, 0)]], fmt="o", **style)


def seeds_of(seeds):
    return f"{len(seeds)} seed" + "s" * (len(seeds) > 1)


# -------------------------------------------------------------------------- 2. success (Fig. 8, A5)

def draw_success(seeds, to):
    """Fig. 8, A5. seeds: this preset's entry of results.json; older ones have no curves. Up to
    three seeds are drawn each, more as median and quartiles."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1, 1, 1.4))
    ends = []
    for (name, label), colour in zip(METHODS.items(), COLOURS):
        found = [seed.get(f"{SHORT[name]}_curve") for seed in seeds]
        curves = [dict(curve) for curve in found if curve]
        if not curves:
            continue
        if len(curves) < 4:  # each of them
            lines = [(list(curve), list(curve.values())) for curve in curves]
        else:  # median and quartiles, where every seed was evaluated
            episodes = sorted(set.intersection(*map(set, curves)))
            # (seeds, points)
            success = np.array([[curve[n] for n in episodes] for curve in curves])
            low, middle, high = np.quantile(success, (.25, .5, .75), axis=0)
            lines = [(episodes, middle)]
            for axis in axes[:2]:
                axis.fill_between(episodes, low, high, color=colour, alpha=.25, lw=0)
        for axis, (x, y) in itertools.product(axes[:2], lines):
            axis.plot(x, y, color=colour, marker=".", lw=1.2, clip_on=False)
        end = np.median([y[-1] for _, y in lines])
        ends.append((end, f"{label}\n({seeds_of(curves)})", colour))
    for axis in axes[:2]:
        axis.set(xlabel="episodes")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
    for axis in axes[1:]:  # linear below 1e-3, so that 0 is at 0
        axis.set_yscale("symlog", linthresh=1e-3)
        axis.set_yticks([0, 1e-3, 1e-2, 1e-1, 1], ["0", "0.001", "0.01", "0.1", "1"])
    for axis in axes:
        axis.set_ylim(0, 1)
    axes[0].set(ylabel="success, post-training task")
    label_ends(axes[0], ends, .12)
    shown = 0
    for (name, label), colour in zip(METHODS.items(), COLOURS):
        key = f"{SHORT[name]}_success"
        ran = [seed for seed in seeds if seed.get(key) is not None]
        for k, seed in enumerate(ran):
            draw_share(axes[2], shown + .1 * k, seed[key], seed["eval_episodes"], color=colour,
                       ms=4, lw=1.2, clip_on=False)
        if ran:
            words = label.replace("-action", "").replace("co-", "co-\n").replace(" ", "\n")
            axes[2].text(shown, -.04, f"{words}\n{seeds_of(ran)}", color=colour, fontsize=7,
                         ha="center", va="top", transform=axes[2].get_xaxis_transform())
            shown += 1
    axes[2].set(title="at the end, every seed, 95% intervals", xlim=(-.6, shown - .4), xticks=[])
    figure.subplots_adjust(wspace=.8)
    save(figure, to / "success.png")


# ------------------------------------------------------------------------------------------ 3. film

def draw_film(folder, to):
    run = train.open_run(folder, "policy")
    body, world = train.BODIES[run.cfg.body], world_of(run.cfg)
    base, meta, policy = train.rl(run)
    rng = seed_everything(EVAL_SEED, "eval", 10)
    data, success, env = internal_episodes(base, meta, world, rng, 64, policy)
    # A success if there is one; the title says which it is.
    n = int(np.flatnonzero(success)[0]) if success.any() else int(data.length.argmax())
    film(to / "agent.gif", body, world, data, n, env, "success" if success[n] else "failure")


def film(path, body, world, data, n, env, end):
    """A GIF of episode n: the board with colour numbers, the gate and the code below."""
    T = int(data.length[n])
    obs, gate, code = data.obs()[n], env.gates[n, :T].numpy(), env.codes[n, :T].numpy().T
    task = "-".join(map(str, world.post_task))
    figure, (board, above, below) = plt.subplots(3, 1, figsize=(4.6, 6.4),
                                                 height_ratios=(4.4, .8, .9))
    figure.subplots_adjust(left=.14, right=.96, top=.93, bottom=.08, hspace=.25)

    def frame(t):
        for axis in (board, above, below):
            axis.clear()
        picture, places = body.picture(world, data.things[n], obs[t])
        board.imshow(picture)
        for k, (x, y) in enumerate(places[:world.O]):
            board.text(x, y, str(k), fontsize=11, weight="bold", color="white", ha="center",
                       va="center")
        outcome = f"   visited {data.visited(n, world.O)}: {end}" if t == T else ""
        board.set(title=f"task {task}{outcome}", xticks=[], yticks=[])
        shown = np.arange(min(t + 1, T))
        above.bar(shown, gate[shown], width=.8, color="black")
        above.set(ylabel="gate", xlim=(-.5, T - .5), ylim=(0, 1), xticks=[], yticks=[0, 1])
        seen = np.where(np.arange(T) <= t, code, np.nan)  # (n_z, T)
        below.imshow(seen, aspect="auto", cmap="coolwarm", vmin=-2.5, vmax=2.5)
        below.set(ylabel="code z", xlabel="step", yticks=[])
        below.xaxis.set_major_locator(MaxNLocator(integer=True))

    times = sorted({*range(0, T, max(1, T // 60)), T})
    movie = FuncAnimation(figure, frame, frames=times)
    movie.save(path, PillowWriter(fps=10 if T > 60 else 3), dpi=70)
    plt.close(figure)
    print(f"wrote {path}")


# -------------------------------------------------------------------------------------- 4. analyses

# Each draws the rows of one analysis, of all seeds, as experiments.py describes them; a row has the
# seed that it was measured on.

def shades(n):
    """n blues, light to dark: for what is ordered, such as lengths of training."""
    return [plt.get_cmap("Blues")(.35 + .6 * k / max(n - 1, 1)) for k in range(n)]


def median_line(axis, x, values, colour):
    """The median of values (seeds, points) over x, with quartiles."""
    low, middle, high = np.quantile(np.array(values), (.25, .5, .75), axis=0)
    axis.plot(x, middle, color=colour, marker="o", clip_on=False)
    axis.fill_between(x, low, high, color=colour, alpha=.25, lw=0)
    return middle


def by_layer(axis, rows, key, label):
    """One line for each length of base training: the median over seeds of `key`, a list over
    layers, and the quartiles. rows: of all seeds."""
    steps, ends = sorted({row["base_steps"] for row in rows}), []
    for length, colour in zip(steps, shades(len(steps))):
        values = [row[key] for row in rows if row["base_steps"] == length]  # (seeds, L+1)
        middle = median_line(axis, range(len(values[0])), values, colour)
        ends.append((middle[-1], f"{length:,} steps", colour))
    label_ends(axis, ends, .06)
    axis.set(xlabel="layer (0: the embedding)", ylabel=label, xticks=range(len(middle)))


def measured_on(rows):
    return seeds_of({row["seed"] for row in rows})


def draw_probes(rows, to):
    """C.2. At the lines' ends: optimiser steps of the base."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    chance, best = (np.median([row[key] for row in rows]) for key in ("chance_subgoal",
                                                                      "bayes_subgoal"))
    for height, text in ((chance, "chance"), (best, "Bayes posterior")):
        axes[0].axhline(height, color="black", ls=":", lw=1)
        axes[0].annotate(text, (0, height), fontsize=8, va="bottom")
    by_layer(axes[0], rows, "subgoal", "accuracy of a linear probe")
    by_layer(axes[1], rows, "action", "accuracy of a linear probe")
    axes[0].set_title(f"which subgoal is it in? ({measured_on(rows)})")
    axes[1].set_title("which action is next?")
    figure.subplots_adjust(wspace=.55)
    save(figure, to / "probes.png")


def draw_layers(rows, to):
    """C.3. Left: success; right, the longest base: legs that demonstrations show, and others."""
    found = {}  # (seed, base_steps) -> its rows in the order of layers
    for row in rows:
        found.setdefault((row["seed"], row["base_steps"]), []).append(row)
    tables = []
    for (_, steps), cells in found.items():
        cells = sorted(cells, key=lambda row: row["layer"])
        legs = np.array([[np.nan if x is None else x for x in row["success_by_leg"]]
                         for row in cells])  # (L+1, legs)
        unseen = np.array(cells[0]["unseen"])
        tables.append({"base_steps": steps, "success": [row["success"] for row in cells],
                       "seen": np.nanmean(legs[:, ~unseen], axis=1),
                       "unseen": np.nanmean(legs[:, unseen], axis=1)})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    by_layer(axes[0], tables, "success", "success, post-training task")
    longest, ends = max(row["base_steps"] for row in rows), []
    for name, colour in (("seen", COLOURS[2]), ("unseen", COLOURS[4])):
        values = np.array([table[name] for table in tables if table["base_steps"] == longest])
        middle = np.median(values, axis=0)
        axes[1].plot(range(len(middle)), middle, color=colour, marker="o", clip_on=False)
        ends.append((middle[-1], f"{name} legs", colour))
    axes[1].set(xlabel="layer (0: the embedding)", ylabel="success of a leg", ylim=(0, 1),
                xticks=range(len(middle)), title=f"legs, base of {longest:,} steps")
    label_ends(axes[1], ends, .06)
    axes[0].set(title=f"true-subgoal controllers ({measured_on(rows)})", ylim=(0, 1))
    figure.subplots_adjust(wspace=.55)
    save(figure, to / "layers.png")


def by_seed(rows, key, value):
    """Rows of a table -> a list for each (seed, meta_seed), of its values in the order of key. What
    has not all of its points yet is left out."""
    found = {}
    for row in sorted(rows, key=lambda row: row[key]):
        found.setdefault((row["seed"], row.get("meta_seed", 0)), []).append(row[value])
    whole = max(map(len, found.values()))
    return [line for line in found.values() if len(line) == whole]


def draw_ablations(rows, to):
    """Fig. A2: C.3 success against what the base was trained with; at equal distances."""
    labels = {"base_steps": "steps of base training", "base_wd": "weight decay",
              "lam": "weight of the observation loss", "eps": "random actions of the expert"}
    measured = [field for field in labels if any(row["field"] == field for row in rows)]
    figure, axes = plt.subplots(1, len(measured), figsize=(13, 3.2), sharey=True, squeeze=False)
    for axis, field in zip(axes[0], measured):
        own = [row for row in rows if row["field"] == field]
        values = sorted({row["value"] for row in own})
        median_line(axis, range(len(values)), by_seed(own, "value", "success"), COLOURS[0])
        axis.set_xticks(range(len(values)), [f"{value:,g}" for value in values])
        axis.set(xlabel=labels[field], ylim=(0, 1))
    axes[0, 0].set_ylabel("C.3 success, post-training task")
    axes[0, 0].set_title(measured_on(rows), fontsize=10, loc="left")
    save(figure, to / "ablations.png")


def draw_rate(rows, to):
    """Fig. 7, and how often the gate opens. Filled: F1 above .9; numbers: alpha."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    ends = []
    for (arm, text), colour in zip(ARMS.items(), COLOURS):
        own = [row for row in rows if row["arm"] == arm]
        alphas = sorted({row["alpha"] for row in own})
        nll, kl, switches = (np.median(by_seed(own, "alpha", key), axis=0)
                             for key in ("nll", "kl", "switches"))
        axes[0].plot(kl, nll, color=colour, lw=1)
        for row in own:
            axes[0].plot(row["kl"], row["nll"], "o", color=colour, ms=5,
                         mfc=colour if row["aligned"] else "white")
        for k, (x, y, alpha) in enumerate(zip(kl, nll, alphas)):
            axes[0].annotate(f"{alpha:g}", (x, y), fontsize=7, xytext=(5, -9 if k % 2 else 3),
                             textcoords="offset points", color=colour)
        median_line(axes[1], alphas, by_seed(own, "alpha", "switches"), colour)
        ends.append((switches[-1], text, colour))
    axes[0].set(xlabel="KL, nats per step", ylabel="action NLL, nats per step",
                title="filled: the gate finds the subgoals (F1 > .9)")
    true = np.median([row["true_switches"] for row in rows])
    axes[1].axhline(true, color="black", ls=":", lw=1)
    axes[1].annotate("changes of subgoal", (min(alphas), true), fontsize=8, xytext=(0, -14),
                     textcoords="offset points")
    axes[1].set(xlabel="alpha", ylabel="openings of the gate per episode", xscale="log")
    label_ends(axes[1], ends, .06)
    count = len({(row["seed"], row["meta_seed"]) for row in rows})
    many = f"{count} metacontroller" + "s" * (count > 1)
    axes[1].set_title(f"{many} in each arm, on {measured_on(rows)}", fontsize=10)
    figure.subplots_adjust(wspace=.3)
    save(figure, to / "rate.png")


def draw_rivals(rows, to):
    """Is it the frozen base, or our views? Internal RL of every seed, from episode 0 on."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, views in zip(axes, (True, False)):
        ends = []
        for (arm, text), colour in zip(ARMS.items(), COLOURS):
            own = [row for row in rows if (row["arm"], row["views"]) == (arm, views)]
            for row in own:
                episodes, success = zip(*row["rl_curve"])
                axis.plot(episodes, success, color=colour, lw=1.2, clip_on=False)
            if own:
                middle = np.median([row["success"] for row in own])
                ends.append((middle, f"{text} ({seeds_of(own)})", colour))
        axis.set(xlabel="episodes of internal RL", ylim=(0, 1), xlim=(0, None),
                 title="codes steer other views" if views else "codes steer their own episode")
        axis.ticklabel_format(axis="x", style="sci", scilimits=(3, 3))
        label_ends(axis, ends, .08)
    axes[0].set_ylabel("success")
    figure.subplots_adjust(wspace=.6)
    save(figure, to / "rivals.png")


def colour_of(subgoal):
    return PALETTE[subgoal % len(PALETTE)] / 255


def draw_gates(rows, to):
    """Fig. 6, A3, of the first seed. Background: the true subgoal, with the colour that is reached
    written where it is reached."""
    rows = [row for row in rows if row["seed"] == rows[0]["seed"]]
    panels = [(row["where"], episode) for row in rows for episode in row["episodes"]]
    figure, axes = plt.subplots(len(panels), 1, figsize=(8, 1.1 * len(panels)), sharex=True,
                                sharey=True)
    longest = max(len(episode["beta"]) for _, episode in panels)
    titles = {"demonstrations": "demonstrations of the pretraining tasks",
              "policy": "the post-training task, under the policy of internal RL"}
    for k, (axis, (where, episode)) in enumerate(zip(axes, panels)):
        subgoal, beta, T = np.array(episode["subgoal"]), episode["beta"], len(episode["beta"])
        begin = np.flatnonzero(np.diff(subgoal, prepend=-1))  # (subgoals,)
        for a, b in zip(begin, [*begin[1:], T]):
            axis.axvspan(a - .5, b - .5, color=colour_of(subgoal[a]), alpha=.3, lw=0)
        for t, colour in episode["arrivals"]:
            axis.text(t, 1.08, str(colour), ha="center", va="bottom", fontsize=8)
        # A bar for each step, so that two openings side by side are two. The first is open by
        # construction: an outline.
        axis.bar(np.arange(1, T), beta[1:], width=.7, color="black")
        axis.bar(0, 1, width=.7, color="none", edgecolor="black")
        axis.axhline(BETA_THRESHOLD, color="black", ls=":", lw=.5)
        axis.set(ylabel="gate", ylim=(0, 1.05), xlim=(-.5, longest - .5), yticks=[0, .5, 1])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if k == 0 or where != panels[k - 1][0]:
            axis.set_title(titles[where], fontsize=9, loc="left", pad=16)
    axes[-1].set_xlabel("step (background: true subgoal; number: a colour was reached just before; "
                        "outline: open by construction)")
    figure.subplots_adjust(hspace=.7)
    save(figure, to / "gates.png")


def draw_codes(rows, to):
    """What codes mean, of the first seed: the codes of demonstrations in the plane, where codes
    from the prior lead, and one code on several boards."""
    row = rows[0]
    figure = plt.figure(figsize=(11, 6.4))
    above, below = figure.subfigures(2, 1, height_ratios=(1.5, 1))
    plane, table = above.subplots(1, 2)
    S = len(row["confusion"]) - 1
    x, y, subgoal = np.array(row["plane"]).T
    for k in range(S):
        own = subgoal == k
        plane.scatter(x[own], y[own], s=9, color=colour_of(k))
        plane.text(np.median(x[own]), np.median(y[own]), str(k), weight="bold", fontsize=13)
    first, second = row["explained"]
    plane.set(title="codes of demonstrations, by true subgoal", xlabel=f"component 1 ({first:.0%})",
              ylabel=f"component 2 ({second:.0%})")
    table.imshow(row["confusion"], cmap="Blues", vmin=0, vmax=1)
    for (a, b), share in np.ndenumerate(np.array(row["confusion"])):
        table.text(b, a, f"{share:.2f}", ha="center", va="center", fontsize=8,
                   color="white" if share > .6 else "black")
    names = [*map(str, range(S)), "none"]
    groups = [f"{name} ({size})" for name, size in zip(names, row["sizes"])]
    table.set(title="codes from the prior: where they lead, shares", xlabel="subgoal",
              ylabel="group (codes in it)")
    table.set_xticks(range(S + 1), names)
    table.set_yticks(range(S + 1), groups)
    for axis, board in zip(below.subplots(1, len(row["boards"])), row["boards"]):
        path, side = np.array(board["path"]), row["side"]
        for k, cell in enumerate(board["things"]):
            wall = k >= row["colours"]
            shade = (.3, .3, .3) if wall else colour_of(k)
            axis.add_patch(plt.Rectangle((cell % side - .5, cell // side - .5), 1, 1, color=shade))
            if not wall:
                axis.text(cell % side, cell // side, str(k), color="white", ha="center",
                          va="center", fontsize=8)
        axis.plot(path % side, path // side, color="black", lw=1.5)
        axis.plot(path[0] % side, path[0] // side, "o", color="black")
        axis.set(xlim=(-.5, side - .5), ylim=(side - .5, -.5), aspect="equal", xticks=[], yticks=[])
    above.subplots_adjust(bottom=.12, wspace=.35)
    below.subplots_adjust(top=.82, bottom=.05)
    below.suptitle(f"one code, of group {row['leads_to']}, held fixed on {len(row['boards'])} "
                   f"boards; dot: start", fontsize=10)
    save(figure, to / "codes.png")


def draw_transplant(rows, to):
    """B.3.2: every seed, with Wilson intervals of 95%."""
    figure, axis = plt.subplots(figsize=(6, 3.2))
    kinds = [("transplant", "a random colour's code,\nput in midway"),
             ("unseen", "after subgoal 0, the code of 1:\nnever demonstrated")]
    for x, (kind, _) in enumerate(kinds):
        for k, (given, colour) in enumerate((("without", "black"), ("with", COLOURS[0]))):
            for j, row in enumerate(row for row in rows if row.get(f"{kind}_{given}") is not None):
                rate, n = row[f"{kind}_{given}"], row[f"{kind}_{given}_n"]
                draw_share(axis, x + .3 * k + .06 * j, rate, n, color=colour)
            axis.text(x + .3 * k, -.04, f"{given}\nthe code", color=colour, va="top", fontsize=8)
    axis.set(ylim=(0, 1), xlim=(-.3, len(kinds) - .3), ylabel="visits the colour next", xticks=[],
             title=f"codes of other episodes, put in ({measured_on(rows)})")
    for x, (_, text) in enumerate(kinds):
        axis.text(x + .15, .97, text, ha="center", va="top", fontsize=9)
    save(figure, to / "transplant.png")


DRAWN = {"probe": draw_probes, "layers": draw_layers, "ablate": draw_ablations,
         "rate": draw_rate, "rivals": draw_rivals, "gates": draw_gates, "codes": draw_codes,
         "transplant": draw_transplant}


# ------------------------------------------------------------------------------------ 5. everything

def main(argv=None):
    parser = Parser("figures.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--preset", choices=train.PRESETS, default="grid-small")
    parser.add_argument("--out", default="runs", help="folder that train.py wrote to")
    parser.add_argument("--to", default="figures", help="folder for results.json and, in a folder "
                        "for each preset, the pictures")
    args = parser.parse_args(argv)
    folders = sorted((Path(args.out) / args.preset).glob("seed*"))
    shipped = json.loads((ASSETS / "results.json").read_text())
    if not folders and args.preset not in shipped:
        print(f"figures.py: nothing in {Path(args.out) / args.preset}; run train.py --preset "
              f"{args.preset} first", file=sys.stderr)
        return 2
    to = Path(args.to)
    pictures = to / args.preset
    pictures.mkdir(parents=True, exist_ok=True)
    try:
        if folders:
            seeds, analyses = write_results(folders, args.preset, to)
        else:
            seeds = shipped[args.preset]["seeds"]
            analyses = shipped.get("analyses", {}).get(args.preset, {})
        if any("rl_curve" in seed for seed in seeds):
            draw_success(seeds, pictures)
        else:
            print("draw_success: no curves in results.json, skipped")
        for what, draw in DRAWN.items():
            if what in analyses:
                draw(analyses[what], pictures)
            else:
                print(f"{draw.__name__}: nothing in results.json, skipped")
        for draw, name in ((draw_curves, "base"), (draw_film, "policy")):
            # Only finished checkpoints: an unfinished one would be trained on.
            have = [folder for folder in folders if ready(folder, name)]
            if not have:
                print(f"{draw.__name__}: no finished {name}.pt, skipped")
            else:
                draw(have if draw is draw_curves else have[0], pictures)
    except (Refused, RuntimeError) as refusal:  # RuntimeError: no driver to draw with
        print(f"figures.py: {refusal}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
