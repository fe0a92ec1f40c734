"""The paper's analyses: cells are measured once, and an interrupted experiment goes on."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import config
import experiments
import figures
import runs
import train
from envs import World
from experiments import Probes, all_streams, unseen_legs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    cfg = train.dataclasses.replace(
        config.PRESETS["smoke"], base_steps=16, control_steps=3, meta_steps=20, rl_updates=2,
        rl_batch=16, eval_episodes=20, evaluations=1, threads=1
    )
    one = runs.Run(cfg, "smoke", tmp_path_factory.mktemp("runs") / "seed0")
    experiments.probe(one, steps=30)
    experiments.layers(one)
    experiments.gates(one, n=50)
    experiments.codes(one)
    experiments.transplanted(one, n=100)
    experiments.exchange(one)
    return one


def test_the_streams_are_the_models_own(run):
    base = train.pretrain(run)
    obs = train.tensors(run, train.BODIES["point"].examination(run, True)[0])["obs"][:9, :-1]
    streams = all_streams(base, obs)
    assert len(streams) == run.cfg.layers + 1
    assert torch.equal(streams[base.layer], base.lower(obs))
    assert torch.equal(base.norm(streams[-1]), base.upper(base.lower(obs)))


def test_a_probe_reads_one_layer_alone(run):
    torch.manual_seed(0)
    probes, streams = Probes(2, 8, {"subgoal": 3}), [torch.randn(4, 5, 8) for _ in range(3)]
    before = probes(streams)["subgoal"]
    streams[1] = streams[1] + torch.randn(8)
    after = probes(streams)["subgoal"]
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [True, False, True]


def test_every_cell_is_measured_once_and_a_lost_one_again(run, capsys):
    for what, count in (("probe", 4), ("layers", 9)):
        rows = runs.read_log(run.folder, what)
        assert len(rows) == count
        path = run.folder / f"{what}.jsonl"
        text = path.read_text()
        path.write_text("\n".join(text.splitlines()[:-1]) + '\n{"cut')  # killed in the last cell
        capsys.readouterr()
        experiments.probe(run, steps=30) if what == "probe" else experiments.layers(run)
        assert capsys.readouterr().out.count(f"{what}, cell") == 1
        assert runs.read_log(run.folder, what) == rows  # bit for bit


def test_probes_know_more_than_chance_and_less_than_everything(run):
    for row in runs.read_log(run.folder, "probe"):
        assert row["chance_subgoal"] < row["bayes_subgoal"] < 1
        assert all(0.2 < x <= row["bayes_subgoal"] + 0.1 for x in row["subgoal"])


def test_the_unseen_transitions_of_a1():
    """01 -> 23 -> 45 -> 67 -> 01 -> 23: none of them is in Table A1, and none is inside a pair."""
    assert unseen_legs(World()) == [False, False] + [True, False] * 5
    singles = World(G=5, O=4, W=0, T=50, task_set="singles", post="0-1-2-3-0")
    assert unseen_legs(singles) == [False, True, True, True, True]


def test_what_the_gates_figure_shows_is_what_happened(run):
    """Arrivals are the true switches, as every colour of this world is a subgoal; the shares are
    those of the gates."""
    for row in runs.read_log(run.folder, "gates"):
        for episode in row["episodes"]:
            subgoal, arrivals = episode["subgoal"], dict(episode["arrivals"])
            assert len(episode["beta"]) == len(subgoal) and episode["beta"][0] == 1
            changes = [t for t in range(1, len(subgoal)) if subgoal[t] != subgoal[t - 1]]
            assert set(changes) <= set(arrivals)
            assert all(arrivals[t] == subgoal[t - 1] for t in changes)
        assert row["opens_inside"] is None and 0 <= row["opens_subgoal_end"] <= 1


def test_a_code_acts_as_what_its_like_may_replace(run):
    """Alone, without a code, it is the base that predicts."""
    (row,) = runs.read_log(run.folder, "exchange")
    base = runs.read_log(run.folder, "base")[-1]["nll"]
    assert row["alone"] == pytest.approx(base, abs=.05)  # on other demonstrations
    assert {"own", "any", "same_part", "same_subgoal", "same_way", "same_all"} < set(row)


def test_codes_are_grouped_in_one_half_of_the_worlds_and_looked_at_in_the_other(
    run, tmp_path, monkeypatch
):
    """Codes that lead anywhere at random, whatever group chance puts them in, are seen to."""
    trained = train.discover(run)
    monkeypatch.setattr(train, "discover", lambda _: trained)
    monkeypatch.setattr(
        experiments,
        "code_outcomes",
        lambda base, decoder, world, rng: (torch.randn(400, 8), rng.integers(4, size=(400, 64))),
    )
    experiments.codes(dataclasses.replace(run, folder=tmp_path))
    (row,) = runs.read_log(tmp_path, "codes")
    assert np.allclose(row["confusion"], 1 / 4, atol=0.05) and sum(row["sizes"]) == 400


def test_the_mean_code_of_each_true_subgoal_is_given_at_three_lengths(run, tmp_path, monkeypatch):
    base, meta = train.discover(run)
    given = []

    def control_success(base, decoder, codes, world, rng, n):
        given.append(codes)
        return len(given) / 10, None

    monkeypatch.setattr(experiments, "control_success", control_success)
    experiments.codes(dataclasses.replace(run, folder=tmp_path))
    (row,) = runs.read_log(tmp_path, "codes")
    assert row["mean_code_success"] == [0.1, 0.2, 0.3]
    data, z, _ = experiments.encoded(run, base, meta, torch.zeros)
    for subgoal in range(len(given[0])):
        own = [
            z[n, t]
            for n in range(len(data.length))
            for t in range(data.length[n])
            if data.subgoal[n, t] == subgoal
        ]
        mean = torch.stack(own).mean(0)
        for codes, scale in zip(given, (1, 1.5, 2)):
            assert torch.allclose(codes[subgoal], scale * mean, atol=1e-5)


def test_ablations_rates_and_rivals_train_what_their_cells_say(run, tmp_path, monkeypatch):
    """What is trained is faked: each cell is asked for the right configuration, once, and the
    pictures are drawn."""
    one = dataclasses.replace(run, folder=tmp_path / "runs" / "smoke" / "seed0")
    asked = []

    def wrote(run, name, line):
        asked.append((run.cfg, run.folder))
        run.folder.mkdir(parents=True, exist_ok=True)
        runs.write_log(run.folder, name, [line])

    def control(run):
        wrote(run, "control", {"success": 0.5, "success_by_leg": [0.7, 0.7]})
        runs.write_log(run.folder, "base", [{"gap_closed": 0.5}])

    def discover(run):
        keys = ("nll", "switches", "true_switches", "opens_subgoal_end", "code_identity",
                "code_identity_max")
        f1 = 0.95 if run.cfg.alpha < 0.2 else 0.85
        rest = {"f1": f1, "opens_inside": None, "kl_per_episode": 1.0}
        wrote(run, "meta" + runs.suffix(run), dict.fromkeys(keys, 1.0) | rest)

    def rl(run):
        discover(run)
        success = 0.25 + run.cfg.joint / 2
        line = {"episodes": 0, "eval_success": success}
        runs.write_log(run.folder, "policy" + runs.suffix(run), [line])

    monkeypatch.setattr(train, "control", control)
    monkeypatch.setattr(train, "discover", discover)
    monkeypatch.setattr(train, "rl", rl)
    monkeypatch.setattr(train, "pretrain", lambda run: None)
    monkeypatch.setattr(runs, "copy_checkpoint", lambda name, *folders: asked.append(folders))
    experiments.ablate(one)
    mine = dataclasses.asdict(run.cfg)
    changed = [dict(dataclasses.asdict(cfg).items() - mine.items()) for cfg, _ in asked]
    assert len(changed) == 15 and changed.count({}) == 4  # the preset's own values
    assert len({folder for _, folder in asked}) == 12
    assert {"base_steps": run.cfg.base_steps // 4} in changed and {"eps": 0.4} in changed
    asked.clear()
    experiments.rate(one, seeds=2)
    copied = [pair for pair in asked if pair[0] == one.folder]
    cells = [cfg for cfg, _ in asked if isinstance(cfg, config.Config)]
    assert len(copied) == 12 and len(cells) == 24 and all(cfg.gate == "gumbel" for cfg in cells)
    more = run.cfg.base_steps * run.cfg.base_batch / run.cfg.meta_batch
    for cfg in cells:
        assert cfg.meta_steps == run.cfg.meta_steps + (more if cfg.joint else 0)
    assert {(c.joint, c.alpha, c.meta_seed) for c in cells} == {
        (joint, alpha, k) for joint in (False, True) for alpha in experiments.ALPHAS for k in (0, 1)
    }
    assert [row["aligned"] for row in runs.read_log(one.folder, "rate")] == [
        row["alpha"] < 0.2 for row in runs.read_log(one.folder, "rate")
    ]
    asked.clear()
    experiments.rivals(one)
    cells = [cfg for cfg, _ in asked if isinstance(cfg, config.Config)]
    assert len(cells) == len(asked)  # without views the base is another one: none is copied
    views = [(cfg.base_join, cfg.symmetric, cfg.splice, cfg.join) for cfg in cells]
    assert views == [(0.5, True, 0.5, 0.5), (0, False, 0, 0)] * 2
    assert [cfg.meta_steps - run.cfg.meta_steps for cfg in cells] == [0, 0, more, more]
    assert [cfg.joint for cfg in cells] == [False, False, True, True]
    line = ["--preset", "smoke", "--out", str(tmp_path / "runs"), "--to", str(tmp_path)]
    assert figures.main(line) == 0
    pictures = ("ablations", "rate", "rivals")
    assert all((tmp_path / "smoke" / f"{name}.png").exists() for name in pictures)
    (seed,) = json.loads((tmp_path / "results.json").read_text())["smoke"]["seeds"]
    assert (seed["frozen_plain_success"], seed["cotrain_plain_success"]) == (0.25, 0.75)
    assert seed["cotrain_success"] == seed["cotrain_curve"][-1][1]  # the arm with views


def test_the_ant_is_refused(capsys, tmp_path):
    assert experiments.main(["probe", "--preset", "ant-small", "--out", str(tmp_path)]) == 2
    assert "is for the grid so far" in capsys.readouterr().err


def test_the_figures_are_drawn_from_the_results_alone(run, tmp_path, monkeypatch):
    out = run.folder.parent
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smoke").symlink_to(out)
    assert (
        figures.main(["--preset", "smoke", "--out", str(tmp_path / "runs"), "--to", str(tmp_path)])
        == 0
    )
    drawn = [tmp_path / "smoke" / f"{name}.png" for name in (
        "probes", "layers", "gates", "codes", "transplant")]
    assert all(path.exists() for path in drawn)
    for path in drawn:
        path.unlink()
    monkeypatch.setattr(figures, "ASSETS", tmp_path)  # results.json, and no runs
    line = ["--preset", "smoke", "--out", str(tmp_path / "none"), "--to", str(tmp_path)]
    assert figures.main(line) == 0 and all(path.exists() for path in drawn)


def test_wilsons_interval_of_none_and_of_half():
    """As tabulated: it says something about zeros, where the normal interval is empty."""
    assert figures.wilson(0., 2000) == pytest.approx((0, .00192), abs=1e-5)
    assert figures.wilson(.5, 100) == pytest.approx((.4038, .5962), abs=1e-4)
