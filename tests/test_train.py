"""The command line as a user meets it: the whole path, interruptions, wrong input. All on the
smoke preset."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FORKS, TINY, command
from test_metacontroller import WORLD, batch

import config
import runs
import train
from envs import generate, neighbour_table, symmetries
from model import pretraining_loss
from train import view_of

NAMES = ("base", "control", "meta", "policy", "raw")


def weights(out, name):
    return torch.load(Path(out) / "smoke" / "seed0" / f"{name}.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_one_command_runs_every_stage_and_ends_with_the_comparison(finished):
    out, text, _ = finished
    folder = out / "smoke" / "seed0"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [f"{name}.{kind}" for name in NAMES for kind in ("pt", "jsonl")] + ["eval.json"]
    )
    tail = text[text.index("success on the post-training task 0-2-1") :]
    for row in (
        "blind sampling",
        "true-subgoal controllers",
        "codes from the prior",
        "internal RL",
        "raw-action RL",
    ):
        assert row in tail
    for word in (
        "device cpu",
        "dtype torch.float32",
    ):  # each choice with its reason in brackets
        assert f"{word} (" in text
    logs = {name: runs.read_log(folder, name) for name in NAMES}
    assert {"nll", "bayes", "known", "gap_closed", "episodes_per_s"} <= logs["base"][-1].keys()
    assert {"nll", "success", "layer"} <= logs["control"][-1].keys()
    assert {
        "nll",
        "kl_per_episode",
        "switches",
        "true_switches",
        "precision",
        "recall",
        "f1",
        "f1_1",
        "undecided",
        "code_identity",
        "code_success",
    } <= logs["meta"][-1].keys()
    assert {"success", "episodes", "abstract_actions", "std", "raw_steps"} <= logs["policy"][
        -1
    ].keys()
    assert all(
        line["step"] == steps for line, steps in ((logs["base"][-1], 70), (logs["policy"][-1], 12))
    )
    for name in ("policy", "raw"):  # their curves begin before anything is learned
        assert [line["episodes"] for line in logs[name]][:1] == [0]
        assert [line["step"] for line in logs[name]].count(0) == 1


def test_the_precision_is_measured_unless_it_is_asked_for(capsys):
    run, *_ = train.parse(["--preset", "smoke"])
    runs.choose_device(run)
    text = capsys.readouterr().out
    assert f"dtype {run.dtype} (bfloat16 matrix products measured at" in text and run.dtype in (
        torch.float32,
        torch.bfloat16,
    )


def test_a_finished_stage_is_reused_and_fresh_starts_again(finished, tmp_path, capsys):
    out = finished[0]
    before = {name: (out / "smoke" / "seed0" / f"{name}.pt").stat().st_mtime_ns for name in NAMES}
    line = [*TINY, "--out", str(out), "--stage", "discover"]
    assert train.main(line) == 0
    printed = capsys.readouterr()
    assert "finished earlier, reused: base, meta" in printed.out and "discover:" not in printed.err
    assert before == {
        name: (out / "smoke" / "seed0" / f"{name}.pt").stat().st_mtime_ns for name in NAMES
    }
    shutil.copytree(out / "smoke", tmp_path / "smoke")
    line = [*TINY, "--out", str(tmp_path), "--stage", "pretrain", "--fresh"]
    assert train.main(line) == 0 and "reused" not in capsys.readouterr().out
    assert (tmp_path / "smoke" / "seed0" / "base.pt").stat().st_mtime_ns > before["base"]
    assert same(weights(tmp_path, "base"), weights(out, "base"))  # same seed, same weights


@pytest.mark.parametrize(
    "stage, name",
    [
        ("pretrain", "base"),
        pytest.param("control", "control", marks=pytest.mark.slow),  # its loop is stage 2's
        ("discover", "meta"),
        ("rl", "policy"),
        pytest.param("rl", "raw", marks=pytest.mark.slow),  # its loop is the policy's
    ],
)
def test_killed_at_any_moment_it_ends_with_the_same_weights(
    finished, tmp_path, capsys, stage, name
):
    """kill -9 at random moments, several times, then to the end: bit for bit the weights of the
    uninterrupted run."""
    out = finished[0]
    folder = tmp_path / "smoke" / "seed0"
    folder.mkdir(parents=True)
    needed = {
        "base": (),
        "control": ("base",),
        "meta": ("base",),
        "policy": ("base", "control", "meta"),
        "raw": ("base",),
    }[name]
    for other in needed:
        (folder / f"{other}.pt").write_bytes((out / "smoke" / "seed0" / f"{other}.pt").read_bytes())
    more = ["--rival", "raw"] if name == "raw" else []
    line = [*TINY, "--out", str(tmp_path), "--stage", stage, "--save_seconds", "0", *more]
    chance, kills, path = random.Random(name), 0, folder / f"{name}.pt"
    written = lambda: path.stat().st_mtime_ns if path.exists() else 0
    for _ in range(2):
        before = written()
        process = FORKS.Process(target=train.main, args=(line,))
        process.start()
        while written() == before and process.is_alive():  # until it has written a checkpoint
            time.sleep(0.002)
        time.sleep(chance.random() * 0.04)
        kills += process.is_alive() and not torch.load(path, weights_only=True)["done"]
        process.kill()
        process.join()
    assert kills == 2, "the stage finished before it could be killed: nothing was tested"
    capsys.readouterr()
    assert train.main(line) == 0 and f"{name}: continues at step" in capsys.readouterr().out
    assert same(weights(tmp_path, name), weights(out, name))
    steps = [
        entry["step"]
        for entry in map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines())
    ]
    assert steps == sorted(set(steps))  # no evaluation is missing from the log or in it twice


def test_ctrl_c_says_how_to_go_on(tmp_path):
    # A shell that runs the tests in the background makes them ignore Ctrl-C, and children inherit
    # that: back to the default first.
    process = subprocess.Popen(
        command(tmp_path, "--stage", "pretrain", "--base_steps", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (tmp_path / "smoke" / "seed0").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (
        process.returncode == 130
        and "goes on from the last checkpoint" in err
        and "Traceback" not in err
    )


WRONG = {
    "unknown flag": (["--learning_rate", "1"], "learning_rate"),
    "abbreviated flag": (["--base_step", "1"], "base_step"),
    "wrong type": (["--base_steps", "many"], "many"),
    "unknown preset": (["--preset", "huge"], "huge"),
    "unknown stage": (["--stage", "dream"], "dream"),
    "more things than cells": (["--W", "6"], "cells"),
    "too few colours": (["--O", "2"], "colours"),
    "horizon too short": (["--T", "2"], "horizon"),
    "unknown task set": (["--task_set", "none"], "task set"),
    "heads do not divide": (["--heads", "5"], "heads"),
    "no such layer": (["--layer", "9"], "layer"),
    "negative alpha": (["--alpha", "-1"], "alpha"),
    "no steps": (["--meta_steps", "0"], "meta_steps"),
    "unknown gate": (["--gate", "ajar"], "gate"),
    "one bucket": (["--buckets", "1"], "buckets"),
    "not a number": (["--base_lr", "nan"], "base_lr"),
    "rival of another stage": (["--rival", "raw", "--stage", "discover"], "rival"),
    "neither true nor false": (["--relative", "maybe"], "maybe"),
    "splice above one": (["--splice", "1.5"], "splice"),
    "join above one": (["--join", "1.5"], "join"),
    "a rival has no such stage": (["--rival", "forced", "--stage", "pretrain"], "rival"),
    "a rival by the back door": (["--gate", "forced"], "--rival forced"),
    "nothing to train afresh": (["--stage", "eval", "--fresh"], "fresh"),
    "a task that is not colours": (["--post_task", "0-red"], "0-red"),
    "a task of other colours": (["--post_task", "0-7"], "colour 7 does not exist"),
    "a colour twice in a row": (["--post_task", "0-0"], "twice"),
    "eps of one": (["--eps", "1.0"], "eps"),
    "a hold that holds nothing": (["--hold", ".5", "--alpha_start", "9", "--release", "9"], "hold"),
    "no such device": (["--device", "tpu"], "device"),
    "an episode to compare with none": (["--rl_batch", "1"], "rl_batch"),
    "weights that begin with themselves": (["--start", "smoke"], "start"),
    "a gate that the rival replaces": (["--gate", "gumbel", "--rival", "forced"], "gate"),
}


def refused(argv, capsys):
    """Run main; it must refuse in one sentence. Returns the sentence."""
    try:
        code = train.main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and len(err.strip().splitlines()) == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence_and_nothing_is_written(case, tmp_path, capsys):
    flags, word = WRONG[case]
    assert word in refused(["--preset", "smoke", "--out", str(tmp_path / "runs"), *flags], capsys)
    assert not (tmp_path / "runs").exists()


def test_infeasible_world_is_refused_before_training(tmp_path, capsys):
    """A world that exists but in which no expert can finish: horizon enough for the counting
    check, not for the walking."""
    assert "the expert finished" in refused(
        [
            "--preset",
            "smoke",
            "--G",
            "12",
            "--T",
            "4",
            "--task_set",
            "singles",
            "--O",
            "4",
            "--out",
            str(tmp_path / "runs"),
        ],
        capsys,
    )
    assert not (tmp_path / "runs").exists()


def copied(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "runs")
    return tmp_path / "runs" / "smoke" / "seed0"


@pytest.mark.parametrize("name", NAMES)
def test_a_truncated_checkpoint_is_refused(finished, tmp_path, capsys, name):
    path = copied(finished, tmp_path) / f"{name}.pt"
    content = path.read_bytes()
    for size in (0, 100, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:size])
        sentence = refused([*TINY, "--out", str(tmp_path / "runs")], capsys)
        assert f"{name}.pt" in sentence and "damaged" in sentence
        assert path.read_bytes() == content[:size]


def test_a_checkpoint_of_another_preset_or_configuration_is_refused(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    (tmp_path / "runs" / "grid-small" / "seed0").mkdir(parents=True)
    (tmp_path / "runs" / "grid-small" / "seed0" / "base.pt").write_bytes(
        (folder / "base.pt").read_bytes()
    )
    sentence = refused(["--preset", "grid-small", "--out", str(tmp_path / "runs")], capsys)
    assert "base.pt" in sentence and "preset=smoke" in sentence and "preset=grid-small" in sentence
    for flag, value, name in (
        ("--base_lr", "0.5", "base"),
        ("--alpha", "0.5", "meta"),
        ("--rl_lr", "0.5", "policy"),
    ):
        sentence = refused([*TINY, "--out", str(tmp_path / "runs"), flag, value], capsys)
        assert f"{name}.pt" in sentence and flag[2:] in sentence
    # What a stage does not depend on may change: a base serves every metacontroller, every layer,
    # every learning rate of RL.
    assert (
        train.main(
            [
                *TINY,
                "--stage",
                "pretrain",
                "--out",
                str(tmp_path / "runs"),
                "--alpha",
                "0.5",
                "--layer",
                "2",
                "--rl_lr",
                "1",
            ]
        )
        == 0
    )
    assert (
        train.main(
            [
                *TINY,
                "--stage",
                "control",
                "--out",
                str(tmp_path / "runs"),
                "--alpha",
                "0.5",
                "--eval_episodes",
                "7",
            ]
        )
        == 0
    )


def test_finished_rl_can_be_extended_and_equals_a_longer_run(finished, tmp_path):
    folder = copied(finished, tmp_path)
    line = [*TINY, "--rival", "raw", "--rl_updates", "14", "--out"]
    assert train.main([*line, str(tmp_path / "runs")]) == 0  # 12 updates there, 2 more
    (tmp_path / "once" / "smoke").mkdir(parents=True)
    subprocess.run(["cp", "-r", str(folder), str(tmp_path / "once" / "smoke")], check=True)
    (tmp_path / "once" / "smoke" / "seed0" / "raw.pt").unlink()
    assert train.main([*line, str(tmp_path / "once")]) == 0
    assert same(weights(tmp_path / "runs", "raw"), weights(tmp_path / "once", "raw"))
    # What the comparison at its end would refuse is refused at once.
    before = (folder / "raw.pt").stat().st_mtime_ns
    again = [*line, str(tmp_path / "runs"), "--rl_updates", "16", "--alpha", ".5"]
    assert train.main(again) == 2 and (folder / "raw.pt").stat().st_mtime_ns == before


def edited(path, **changes):
    """Write other content into a checkpoint, as a whole file: its digest is right."""
    saved = torch.load(path, weights_only=True)
    del saved["sha256"]
    runs.save_checkpoint(path, {**saved, **changes})


def test_a_checkpoint_trained_on_another_base_is_refused(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    weights_ = torch.load(folder / "base.pt", weights_only=True)["model"]
    weights_["norm.weight"] += 1e-3
    edited(folder / "base.pt", model=weights_)
    assert train.main([*TINY, "--stage", "discover", "--out", str(tmp_path / "runs")]) == 2
    assert "meta.pt was trained on another base" in capsys.readouterr().err


def test_eval_and_figures_take_no_unfinished_checkpoint_for_a_result(finished, tmp_path, capsys):
    import figures

    folder = copied(finished, tmp_path)
    edited(folder / "policy.pt", done=False)
    before = (folder / "policy.pt").read_bytes()
    assert train.main([*TINY, "--stage", "eval", "--out", str(tmp_path / "runs")]) == 0
    out = capsys.readouterr().out
    assert "raw-action RL" in out and "internal RL" not in out
    assert (
        figures.main(
            [
                "--preset",
                "smoke",
                "--out",
                str(tmp_path / "runs"),
                "--to",
                str(tmp_path / "pictures"),
            ]
        )
        == 0
    )
    assert "no finished policy.pt, skipped" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "pictures" / "smoke").iterdir()) == [
        "curves.png"
    ]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "results.json",
        "smoke",
    ]
    assert (folder / "policy.pt").read_bytes() == before


def test_figures_draws_all_that_the_runs_have(finished, tmp_path):
    import figures

    assert (
        figures.main(["--preset", "smoke", "--out", str(finished[0]), "--to", str(tmp_path)]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "smoke"]
    pictures = sorted((tmp_path / "smoke").iterdir())
    assert [path.name for path in pictures] == [
        "agent.gif",
        "curves.png",
        "success.png",
    ]
    assert all(path.stat().st_size > 2000 for path in pictures)
    assert figures.main(["--preset", "grid-paper", "--out", str(finished[0])]) == 2
    (seed,) = json.loads((tmp_path / "results.json").read_text())["smoke"]["seeds"]
    evaluation = json.loads((finished[0] / "smoke" / "seed0" / "eval.json").read_text())
    assert all(seed[key] == value for key, value in evaluation.items())
    assert (
        sum(key.endswith("success") for key in evaluation) == 5 and "gate_elsewhere" in evaluation
    )
    assert (
        seed["rl_episodes"] == seed["raw_episodes"] == 12 * 64
        and seed["forced_success"] is None
        and seed["minutes"] > 0
    )


def test_results_of_other_seeds_and_rivals_are_kept(finished, tmp_path):
    from results import write_results

    folder, other = copied(finished, tmp_path), {"seed": 7, "rl_success": 0.5}
    path = tmp_path / "results.json"

    def written(*seeds):
        path.write_text(json.dumps({"smoke": {"seeds": [*seeds, other]}, "grid-small": {}}))
        write_results([folder], "smoke", tmp_path)
        results = json.loads(path.read_text())
        assert results["smoke"]["seeds"][1] == other and results["grid-small"] == {}
        return results["smoke"]["seeds"][0]

    whole = written()
    assert written({"seed": 0, "rl_success": 2.0, "forced_success": 0.25}) == whole | {
        "forced_success": 0.25
    }  # its rival was not run again
    (folder / "eval.json").unlink()
    (folder / "eval-forced.json").write_text(json.dumps({"rl_success": 0.75}))
    assert written({"seed": 0, "rl_success": 2.0, "cotrain_success": 0.25}) == {
        "seed": 0,
        "rl_success": 2.0,
        "cotrain_success": 0.25,
        "forced_success": 0.75,
    }


def test_a_base_that_comes_with_the_repository_is_used_and_said_so(
    finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(runs, "ASSETS", tmp_path / "assets")
    shipped = tmp_path / "assets" / "smoke" / "seed0"
    shipped.mkdir(parents=True)
    for kind in ("pt", "jsonl"):
        (shipped / f"base.{kind}").write_bytes(
            (finished[0] / "smoke" / "seed0" / f"base.{kind}").read_bytes()
        )
    saved = torch.load(shipped / "base.pt", weights_only=True)
    saved["optimizer"]["state"] = {}  # as it is shipped: the moments of a finished training
    saved["model"]["norm.weight"] += 1e-3  # so that it can be told from one trained here
    edited(shipped / "base.pt", model=saved["model"], optimizer=saved["optimizer"])
    line = [*TINY, "--stage", "pretrain", "--out"]
    assert (
        train.main([*line, str(tmp_path / "a")]) == 0
        and "taken from assets" in capsys.readouterr().out
    )
    assert same(weights(tmp_path / "a", "base"), saved["model"]) and runs.read_log(
        tmp_path / "a/smoke/seed0", "base"
    )
    for out, more in (("b", ["--fresh"]), ("c", ["--base_lr", "1e-3"]), ("d", ["--seed", "1"])):
        assert train.main([*line, str(tmp_path / out), "--base_steps", "40", *more]) == 0
        assert "assets" not in capsys.readouterr().out
    assert (
        train.main([*line, str(tmp_path / "a"), "--fresh"]) == 0
        and "assets" not in capsys.readouterr().out
    )
    assert not same(weights(tmp_path / "a", "base"), saved["model"])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    tmp_path, capsys, monkeypatch
):
    genuine, calls = train.pretraining_loss, [0]

    def poisoned(*args, **named):
        calls[0] += 1
        loss, nll = genuine(*args, **named)
        return (loss * float("nan") if calls[0] == 30 else loss), nll

    monkeypatch.setattr(train, "pretraining_loss", poisoned)
    assert (
        train.main(
            [
                *TINY,
                "--stage",
                "pretrain",
                "--out",
                str(tmp_path),
                "--save_seconds",
                "0",
                "--evaluations",
                "1",
            ]
        )
        == 1
    )
    err = capsys.readouterr().err
    assert "not finite at step 29" in err and "Traceback" not in err
    saved = torch.load(tmp_path / "smoke" / "seed0" / "base.pt", weights_only=True)
    assert saved["step"] == 29 and all(
        torch.isfinite(value).all() for value in saved["model"].values()
    )


def test_a_checkpoint_older_than_a_field_is_opened_with_its_default(finished, monkeypatch):
    """A preset may since have got another value of a field that did not exist then."""
    path = finished[0] / "smoke" / "seed0"
    saved = runs.load_checkpoint(path / "meta.pt")
    del saved["fingerprint"]["segment_rate"]
    monkeypatch.setattr(train, "load_checkpoint", lambda path: saved)
    new = dataclasses.replace(config.PRESETS["smoke"], segment_rate=5, rl_lr=0.5)
    monkeypatch.setitem(train.PRESETS, "smoke", new)
    cfg = train.open_run(path, "meta").cfg
    assert cfg.segment_rate == 10 and cfg.alpha_ramp == 40  # the field's default; what it says
    assert cfg.rl_lr == 0.5  # a metacontroller does not depend on it


def test_a_checkpoint_made_with_an_option_that_is_gone_is_refused(tmp_path):
    run = train.parse([*TINY, "--out", str(tmp_path)])[0]
    ours = runs.fingerprint(run, "base")
    assert runs.difference(run, "base", ours) is None
    assert runs.difference(run, "base", ours | {"compass": False}) is None
    assert runs.difference(run, "base", ours | {"compass": True}) == ("compass", True, False)


def test_rivals_have_files_of_their_own(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    line = [*TINY, "--rl_updates", "3", "--out", str(tmp_path / "runs"), "--rival"]
    assert train.main([*line, "forced"]) == 0 and "forced switching" in capsys.readouterr().out
    assert (folder / "meta-forced.pt").exists() and (folder / "policy-forced.pt").exists()
    last = runs.read_log(folder, "policy-forced")[-1]
    assert last["abstract_actions"] > 1.5  # a code at every step
    assert same(weights(tmp_path / "runs", "meta"), weights(finished[0], "meta"))
    assert train.main([*line, "cotrain"]) == 0 and "co-trained base" in capsys.readouterr().out
    together, base = weights(tmp_path / "runs", "meta-cotrain"), weights(finished[0], "base")
    assert all(
        not torch.equal(together[f"base.{name}"], value) for name, value in base.items()
    )  # its own base, not the frozen one
    run = train.parse([*TINY, "--rival", "cotrain", "--out", str(tmp_path / "runs")])[0]
    assert (
        train.parse([*TINY, "--rival", "cotrain", "--fresh"])[3]
        == run.names
        == ("meta-cotrain", "policy-cotrain")
    )
    forced = train.parse([*TINY, "--rival", "forced", "--fresh"])
    assert forced[0].names == ("base", "meta-forced", "policy-forced") and forced[3] == (
        "meta-forced",
        "policy-forced",
    )  # the base stays
    runs.seed_everything(0, "init", 2)
    train.new_metacontroller(run, None)
    start = train.new_base(run).state_dict()
    assert all(
        not torch.equal(together[f"base.{name}"], value)
        for name, value in start.items()
        if "obs_head" not in name
    )  # every part learns


def test_any_step_can_be_the_first(tmp_path):
    """What a step trains on depends on (seed, stage, step) alone: the root of resuming bit for
    bit."""
    cfg = train.PRESETS["smoke"]
    run = train.Run(cfg, "smoke", tmp_path)

    def steps(first):
        return {
            step: (batch["obs"].clone(), torch.randn(3))
            for step, batch in train.batches(run, "base", 8, False, first, 70)
        }

    whole, part = steps(0), steps(37)
    assert sorted(whole) == list(range(70)) and sorted(part) == list(range(37, 70))
    assert all(torch.equal(a, b) for step in part for a, b in zip(whole[step], part[step]))


def test_weights_of_a_smaller_board_are_begun_with(finished, tmp_path, capsys, monkeypatch):
    """What it has is taken over, by displacement; what it has not is new. Whatever does not fit is
    refused before any work."""
    copied(finished, tmp_path)
    cfg = train.dataclasses.replace(train.PRESETS["smoke"], G=4, W=1, start="smoke")
    monkeypatch.setitem(train.PRESETS, "wide", cfg)
    monkeypatch.setitem(train.PRESETS, "narrow", train.dataclasses.replace(cfg, G=3, start="wide"))
    still = "--base_steps 1 --meta_steps 1 --base_lr 1e-12 --meta_lr 1e-12 --dtype float32".split()
    line = ["--stage", "discover", "--threads", "1", "--out", str(tmp_path / "runs"), "--preset"]
    assert train.main([*line, "wide", *still]) == 0
    for name in ("base", "meta"):
        old = weights(tmp_path / "runs", name)
        path = tmp_path / "runs" / "wide" / "seed0" / f"{name}.pt"
        new = torch.load(path, weights_only=True)["model"]
        assert old.keys() == new.keys()
        for key in old:
            if "bag.weight" not in key and "obs_head" not in key:
                assert torch.allclose(old[key], new[key], atol=1e-7), key
    small, wide = (train.Grid.parts(config.world_of(one), True)[0](32) for one in (
        train.PRESETS["smoke"], cfg))
    base = weights(tmp_path / "runs", "base")
    new = torch.load(tmp_path / "runs" / "wide" / "seed0" / "base.pt", weights_only=True)["model"]
    for model, state in ((small, base), (wide, new)):
        model.load_state_dict({key.removeprefix("embed."): value for key, value in state.items()
                               if key.startswith("embed.")})
    obs = torch.stack([torch.randperm(9)[:4] for _ in range(50)])[:, None]  # (50, 1, K)
    place = obs // 3 * 4 + obs % 3 + 5  # one down, one to the right
    wall = torch.zeros_like(place[..., :1])
    there = torch.cat([place[..., :3], wall, place[..., 3:]], dim=-1)
    wide.bag.weight.data.view(4, 49, 32)[3] = 0  # but for the wall, which is new,
    assert torch.allclose(small(obs), wide(there), atol=1e-6)  # it sees the same
    for preset, flags, word in (
        ("wide", ["--width", "64"], "width=32"),
        ("narrow", [], "G=4"),
        ("wide", ["--start", "grid-small"], "there is no"),
        ("wide", ["--seed", "1"], "there is no"),
        ("wide", ["--start", "huge"], "huge"),
        ("wide", ["--relative", "False"], "relative"),
    ):
        out = ["--stage", "pretrain", "--fresh", "--out", str(tmp_path / "runs")]
        assert word in refused([*out, "--preset", preset, *flags], capsys)
    assert train.finished(train.open_run(tmp_path / "runs" / "wide" / "seed0", "meta"), "meta")


def test_batches_waste_little_on_padding_and_leave_nothing_out():
    cfg = train.PRESETS["grid-small"]
    run = train.Run(cfg, "grid-small", Path("unused"))
    masks = [batch["mask"] for _, batch in train.batches(run, "base", 32, False, 0, train.CHUNK)]
    assert np.mean([mask.float().mean() for mask in masks]) > 0.9
    data = generate(config.world_of(cfg), runs.seed_everything(0, "base", 0), train.CHUNK * 32)
    assert sum(int(mask.sum()) for mask in masks) == data.length.sum()
    assert os.path.exists("unused") is False


def test_rl_that_grows_learns_the_beginnings_first_and_is_tried_on_the_whole(
    finished, tmp_path, monkeypatch
):
    pairs = config.World()
    cfg = train.dataclasses.replace(train.PRESETS["grid-pairs"], grow=3)
    lengths = [len(train.lesson(cfg, pairs, step).post_task) for step in range(20)]
    assert lengths == [2, 2, 2, 4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 10, 10, 12, 12, 12, 12, 12]
    assert train.lesson(cfg, pairs, 4).post_task == pairs.post_task[:4]
    assert train.lesson(train.PRESETS["grid-pairs"], pairs, 0) == pairs

    folder, learned, tried = copied(finished, tmp_path), [], []
    genuine = {name: getattr(train, name) for name in ("internal_rl_step", "internal_episodes")}

    def step(base, meta, policy, optimizer, world, *rest):
        learned.append(world.post_task)
        return genuine["internal_rl_step"](base, meta, policy, optimizer, world, *rest)

    def episodes(base, meta, world, *rest):
        tried.append(world.post_task)
        return genuine["internal_episodes"](base, meta, world, *rest)

    monkeypatch.setattr(train, "internal_rl_step", step)
    monkeypatch.setattr(train, "internal_episodes", episodes)
    (folder / "policy.pt").unlink()
    line = [*TINY, "--out", str(tmp_path / "runs"), "--grow", "2", "--rl_updates"]
    for updates in ("3", "6"):  # extended in the middle of the second beginning
        run = train.parse([*line, updates])[0]
        train.rl(run)
    assert learned == [(0,)] * 2 + [(0, 2)] * 2 + [(0, 2, 1)] * 2
    assert set(tried) == {(0, 2, 1)}


def test_evaluation_and_figures_train_nothing(finished, tmp_path, capsys):
    """RL that was given fewer updates than the preset asks for is finished all the same."""
    import figures

    out = tmp_path / "runs"
    copied(finished, tmp_path)
    few = ["--rl_updates", "3"]
    for name in ("policy", "raw"):
        (out / "smoke" / "seed0" / f"{name}.pt").unlink()
    assert train.main([*TINY, *few, "--out", str(out)]) == 0
    before = {name: weights(out, name) for name in NAMES}
    assert (
        train.main([*TINY, "--stage", "eval", "--out", str(out)]) == 0
    )  # TINY asks for 12 updates
    assert (
        figures.main(["--preset", "smoke", "--out", str(out), "--to", str(tmp_path / "pictures")])
        == 0
    )
    assert all(same(before[name], weights(out, name)) for name in NAMES)
    assert torch.load(out / "smoke" / "seed0" / "policy.pt", weights_only=True)["step"] == 3
    capsys.readouterr()
    assert "nothing" in refused(
        ["--preset", "smoke", "--stage", "eval", "--out", str(tmp_path / "empty")], capsys
    )
    assert not (tmp_path / "empty").exists()


def test_evaluation_does_not_go_on_training_an_input(finished, tmp_path, capsys):
    """Stopped in a new base, with all that rests on the old one still there."""
    folder = copied(finished, tmp_path)
    edited(folder / "base.pt", done=False, step=1)
    before = (folder / "base.pt").read_bytes()
    line = [*TINY, "--stage", "eval", "--out", str(tmp_path / "runs")]
    assert "nothing" in refused(line, capsys) and (folder / "base.pt").read_bytes() == before


def test_an_old_evaluation_does_not_outlive_the_weights_it_speaks_of(finished, tmp_path):
    folder = copied(finished, tmp_path)
    few = ["--meta_steps", "5", "--out", str(tmp_path / "runs")]
    assert train.main([*TINY, "--stage", "discover", "--fresh", *few]) == 0
    assert not (folder / "eval.json").exists()


def test_fresh_deletes_nothing_if_what_it_keeps_is_refused(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    (folder / "meta-forced.pt").write_bytes((folder / "meta.pt").read_bytes())
    before = sorted(path.name for path in folder.iterdir())
    assert (
        train.main(
            [
                *TINY,
                "--rival",
                "forced",
                "--fresh",
                "--width",
                "64",
                "--out",
                str(tmp_path / "runs"),
            ]
        )
        == 2
    )
    assert "base.pt was made with width=32" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_was_begun_with_fresh_is_not_replaced_by_what_is_shipped(
    finished, tmp_path, capsys, monkeypatch
):
    """Killed after a single step, long before save_seconds have passed."""
    monkeypatch.setattr(runs, "ASSETS", finished[0])  # holds smoke/seed0/base.pt
    line = [*TINY, "--stage", "pretrain", "--save_seconds", "3600", "--out", str(tmp_path)]
    genuine, calls = train.optimise, []

    def killed(*args):
        if calls:
            raise KeyboardInterrupt
        calls.append(genuine(*args))
        return calls[0]

    monkeypatch.setattr(train, "optimise", killed)
    assert train.main([*line, "--fresh"]) == 130
    monkeypatch.setattr(train, "optimise", genuine)
    assert train.main(line) == 0
    out = capsys.readouterr().out
    assert "assets" not in out and "base: continues at step 1" in out


def test_a_base_is_shipped_only_with_the_walker_that_it_was_trained_on(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(train.STAGES, "pretrain", lambda run: None)
    source, folder = runs.ASSETS / "ant-small" / "seed0", tmp_path / "ant-small" / "seed0"
    line = [
        "--preset",
        "ant-small",
        "--stage",
        "pretrain",
        "--threads",
        "1",
        "--out",
        str(tmp_path),
    ]
    assert train.main(line) == 0 and (folder / "base.pt").exists()
    assert "trains it here): walker, base" in capsys.readouterr().out
    (folder / "base.pt").unlink()
    saved = torch.load(source / "walker.pt", weights_only=True)
    saved["model"]["log_stds"] += 1e-3  # a walker trained elsewhere
    edited(folder / "walker.pt", model=saved["model"])
    assert (
        train.main(line) == 0
        and "assets" not in capsys.readouterr().out
        and not (folder / "base.pt").exists()
    )


def test_a_view_is_the_end_of_another_episode_and_then_the_episode_in_turned_worlds():
    data = batch(200)
    torch.manual_seed(0)
    view = view_of(data, WORLD, symmetric=True, splice=0.5, join=0.0)
    table, (cells, actions) = torch.from_numpy(neighbour_table(WORLD.G)), symmetries(WORLD.G)
    length, which, spliced = data["mask"].sum(1), set(), 0
    for b in range(200):
        n = int(length[b])
        row, step, obs, action = (view[key][b, :n] for key in ("row", "step", "obs", "action"))
        start = int(
            ((row != b) | (step != torch.arange(n))).sum()
        )  # the other may be the episode itself
        spliced += start > 0
        assert (row[start:] == b).all() and step[start:].tolist() == list(
            range(start, n)
        )  # its own steps where they were
        if start:
            other = int(row[0])
            assert (row[:start] == other).all() and step[:start].tolist() == list(
                range(int(length[other]) - start, int(length[other]))
            )
        for part in (
            slice(0, start),
            slice(start, n),
        ):  # each part: one turned world, in which the rules hold
            o, a = obs[part], action[part]
            if len(o) == 0:
                continue
            assert (o[:, :-1] == o[0, :-1]).all() and len(set(o[0, :-1].tolist())) == WORLD.K - 1
            to = table[o[:-1, -1], a[:-1]]
            assert (
                o[1:, -1] == torch.where(torch.isin(to, o[0, WORLD.O : -1]), o[:-1, -1], to)
            ).all()
            found = {
                g
                for g in range(8)
                if (
                    cells[g][data["obs"][int(row[part][0]), int(step[part][0])]] == o[0].numpy()
                ).all()
            }
            assert found and any(
                (actions[g][data["action"][int(row[part][0]), step[part]]] == a.numpy()).all()
                for g in found
            )
            which |= found
    assert which == set(range(8)) and 60 < spliced < 110
    assert view_of(data, WORLD, symmetric=False, splice=0.0, join=0.0) is None
    turned = view_of(data, WORLD, symmetric=True, splice=0.0, join=0.0)  # whole episodes
    assert (turned["row"] == torch.arange(200)[:, None]).all() and (
        turned["step"] == torch.arange(turned["step"].shape[1])
    ).all()


def test_a_joined_view_is_another_whole_demonstration_and_then_the_episode():
    data = batch(200)
    torch.manual_seed(0)
    view = view_of(data, WORLD, symmetric=False, splice=0.0, join=0.5)
    length, joined = data["mask"].sum(1).tolist(), 0
    for b in range(200):
        other, n = b ^ 1, length[b]
        row, step, obs, mask = (view[key][b] for key in ("row", "step", "obs", "mask"))
        m = 0
        if row[0] != b:  # the other's arrival is seen, steered by the code of what comes next
            m = length[other] + 1
            assert (row[: m - 1] == other).all() and step[:m].tolist() == [*range(m - 1), 0]
            assert row[m - 1] == b and torch.equal(obs[:m], data["obs"][other, :m])
        joined += m > 0
        assert (row[m : m + n] == b).all() and step[m : m + n].tolist() == list(range(n))
        assert torch.equal(obs[m : m + n + 1], data["obs"][b, : n + 1])  # the last one included
        assert torch.equal(view["action"][b, m : m + n], data["action"][b, :n])
        assert mask.tolist() == [t < m + n and t != m - 1 for t in range(len(mask))]
    assert 80 < joined < 120


def test_a_held_code_is_that_of_the_last_step_that_gives_one():
    data, (free, held) = batch(200), (0.0, 0.75)
    views = []
    for hold in (free, held):
        torch.manual_seed(0)
        views.append(view_of(data, WORLD, symmetric=True, splice=0.5, join=0.5, hold=hold))
    free, held = views
    for name in ("obs", "action", "row", "mask"):  # what is seen and done is the step's own
        assert torch.equal(free[name], held[name])
    scored = free["mask"]
    assert (held["step"] <= free["step"])[scored].all()
    later = scored & (free["step"] > 0)
    assert 0.72 < (held["step"] < free["step"])[later].float().mean() < 0.78
    # Between the step that gave the code and the one that it steers, no other gives one.
    given = [dict() for _ in range(200)]  # of each episode: step -> the one whose code it gets
    for row, step, giver in zip(*(x[scored].tolist() for x in
                                  (free["row"], free["step"], held["step"]))):
        assert given[row].setdefault(step, giver) == giver
    for steps in given:
        assert all(steps.get(giver, giver) == giver for giver in steps.values())
        assert all(steps[a] <= steps[b] for a in steps for b in steps if a < b)


def test_codes_are_held_until_the_release(tmp_path, monkeypatch):
    shares = []

    def seen(batch, world, symmetric, splice, join, hold=0.):
        if isinstance(hold, torch.Tensor):  # stage 2
            shares.append((float(hold), float(splice)))
        return view_of(batch, world, symmetric, splice, join, hold)
    monkeypatch.setattr(train, "view_of", seen)
    few = ["--base_steps", "1", "--base_join", "0", "--meta_steps", "8", "--dtype", "float32",
           "--hold", ".5", "--alpha_start", "5", "--release", "2", "--alpha_ramp", "2"]
    line = ["--preset", "smoke", "--stage", "discover", "--fresh", "--out", str(tmp_path)]
    assert train.main([*line, *few, "--device", "cpu"]) == 0
    holds, splices = zip(*shares)
    assert holds == (0.5, 0.5, 0.5, 0, 0, 0, 0, 0)
    assert splices == (0.5,) * 5 + (0.25, 0, 0)  # until alpha has grown


def test_the_base_learns_from_joined_demonstrations(tmp_path, monkeypatch):
    views = []
    monkeypatch.setattr(train, "view_of", lambda *given: views.append(view_of(*given)) or views[-1])
    few = ["--base_steps", "1", "--base_join", "1", "--dtype", "float32", "--device", "cpu"]
    line = ["--preset", "smoke", "--stage", "pretrain", "--fresh", "--out", str(tmp_path), *few]
    assert train.main(line) == 0 and len(views) == 1
    (view,) = views
    assert (view["row"][:, 0] == torch.arange(32) ^ 1).all()  # each begins with its neighbour's
    run = train.parse(line)[0]
    runs.seed_everything(0, "init", 0)
    loss, _ = pretraining_loss(train.new_base(run), view["obs"], view["action"], view["mask"])
    (logged,) = runs.read_log(run.folder, "base")
    assert logged["train_loss"] == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_find_the_eager_result(tmp_path):
    """Every stage with CUDA graphs: the same losses and the same evaluations, to 1e-3."""
    few = ["--base_steps", "40", "--control_steps", "30", "--meta_steps", "30", "--rl_updates", "2"]
    logs = []
    for graphs in ("False", "True"):
        out = tmp_path / graphs
        line = command(out, *few, "--device", "cuda", "--dtype", "float32", "--graphs", graphs)
        done = subprocess.run(line, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        folder = out / "smoke" / "seed0"
        logs.append({name: runs.read_log(folder, name) for name in NAMES})
    for name in NAMES:
        for eager, replayed in zip(*(log[name] for log in logs)):
            for key in ("nll", "loss", "train_loss", "kl_per_episode", "eval_success"):
                assert eager.get(key) == pytest.approx(replayed.get(key), abs=1e-3), (name, key)


def test_episodes_drawn_by_other_processes_are_the_same(tmp_path):
    """Also where a training goes on in the middle of what is drawn at once."""
    for first, last in ((0, 70), (40, 45)):
        found = []
        for workers in (0, 2):
            run = runs.Run(config.PRESETS["smoke"], "smoke", tmp_path, workers=workers)
            source = train.batches(run, "base", 8, False, first, last)
            found.append([(step, torch.rand(1), drawn) for step, drawn in source])
        assert [step for step, _, _ in found[0]] == list(range(first, last))
        for (step, luck, drawn), (other_step, other_luck, other) in zip(*found, strict=True):
            assert step == other_step and luck == other_luck
            assert all(torch.equal(drawn[name], other[name]) for name in drawn)


def test_batches_padded_for_cuda_graphs_have_few_lengths_and_the_same_loss(tmp_path):
    """What CUDA graphs need, checked where there is no GPU: the loss does not see the padding."""
    cfg = train.dataclasses.replace(config.PRESETS["smoke"], T=40)
    run = runs.Run(cfg, "smoke", tmp_path)
    base, meta = train.new_base(run), train.new_metacontroller(run, None).eval()
    torch.nn.init.normal_(base.action_head.weight)  # so that actions differ
    lengths, longer = set(), 0
    for k in range(12):
        data = generate(config.world_of(cfg), np.random.default_rng(k), 6)
        losses = []
        for pad in (False, True):
            batch = train.tensors(run, data, pad)
            torch.manual_seed(k)
            B, T = batch["mask"].shape
            noise = torch.randn(cfg.T, B, cfg.n_z)[:T].transpose(0, 1)
            view = view_of(batch, config.world_of(cfg), True, 0.5, 0.0)
            found = train.discovery_terms(
                base, meta, batch["obs"], batch["action"], batch["mask"], noise, view
            )
            losses.append((found["nll"] + 0.1 * found["kl"]).item())
            assert view["mask"].shape[1] == T
            plain = train.pretraining_loss(base, batch["obs"], batch["action"], batch["mask"])
            losses.append(plain[0].item())
        lengths.add(T)
        longer += T > data.action.shape[1]
        assert losses[:2] == pytest.approx(losses[2:], abs=1e-5)
    assert all(T % 5 == 0 for T in lengths) and len(lengths) <= 8 and longer > 5
