"""How a run is kept: checkpoints are whole or refused, sizes that can't work are refused, stopping
loses nothing, results do not vanish."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from conftest import FORKS, ROOT, TINY
from test_train import NAMES, copied, edited, refused

import config
import runs
import train

# ------------------------------------------------------------------------------------ checkpoints


def kept(path):
    """What is loaded from a file, or None if it is refused in one sentence."""
    try:
        return runs.load_checkpoint(path)
    except config.Refused as refusal:
        assert len(str(refusal).splitlines()) == 1 and path.name in str(refusal)
        return None


@pytest.mark.parametrize("name", NAMES)
def test_no_damage_is_loaded_silently(finished, tmp_path, name):
    """One bit turned, or a block of 512 bytes zeroed or made random: refused, or the same content
    (a bit that nobody reads: padding, a time stamp)."""
    content = (finished[0] / "smoke" / "seed0" / f"{name}.pt").read_bytes()
    whole = runs.load_checkpoint(finished[0] / "smoke" / "seed0" / f"{name}.pt")
    path, chance, refusals = tmp_path / f"{name}.pt", random.Random(name), 0
    for k in range(90):
        damaged = bytearray(content)
        if k % 3 == 0:
            damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            begin = 512 * chance.randrange(len(content) // 512)
            damaged[begin : begin + 512] = bytes(512) if k % 3 == 1 else chance.randbytes(512)
        path.write_bytes(damaged)
        loaded = kept(path)
        refusals += loaded is None
        assert loaded is None or runs.digest(loaded) == runs.digest(whole)
    assert refusals > 60


def without_digest(saved):
    return {key: value for key, value in saved.items() if key != "sha256"}


MALFORMED = {
    "fingerprint": [None, [], "text"],
    "model": [None, [], 3],
    "optimizer": [None, "text"],
    "done": [None, 1, "yes"],
    "step": [None, -1, 0.5, "3", True],
    "seconds": [None, "3", 1, float("nan"), -1.0],
    "dtype": [None, 3, "torch.int8"],
    "parent": [3, []],
}


@pytest.mark.parametrize("key", MALFORMED)
def test_content_that_is_none_of_ours_is_refused(finished, tmp_path, key):
    """With a digest that is right: what is wrong is the content itself."""
    saved = without_digest(torch.load(finished[0] / "smoke/seed0/meta.pt", weights_only=True))
    path = tmp_path / "meta.pt"
    runs.save_checkpoint(path, saved)
    assert kept(path) is not None
    for wrong in MALFORMED[key]:
        runs.save_checkpoint(path, saved | {key: wrong})
        assert kept(path) is None, wrong
    runs.save_checkpoint(path, {k: v for k, v in saved.items() if k != key})
    assert kept(path) is None
    torch.save(saved, path)  # no digest
    assert kept(path) is None


@pytest.mark.parametrize(
    "spoil",
    [lambda x: x.double(), lambda x: x * float("nan"), lambda x: 3, lambda x: x.long()],
    ids=["double", "nan", "number", "long"],
)
def test_weights_are_finite_floats(finished, tmp_path, spoil):
    saved = without_digest(torch.load(finished[0] / "smoke/seed0/meta.pt", weights_only=True))
    first = next(iter(saved["model"]))
    saved["model"][first] = spoil(saved["model"][first])
    runs.save_checkpoint(tmp_path / "meta.pt", saved)
    assert kept(tmp_path / "meta.pt") is None


def foreign_files(folder):
    """Files that are no checkpoint at all, one after the other, as meta.pt."""
    path = folder / "meta.pt"
    torch.save(torch.zeros(3), path)
    yield path
    torch.save([1, 2], path)
    yield path
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    yield path
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")  # a pickle that would run a command
    yield path
    with open(path, "wb") as file:
        torch.save({"a": 1}, file, _use_new_zipfile_serialization=False)
    yield path
    path.unlink()
    path.symlink_to("meta.pt")  # to itself
    yield path
    path.unlink()
    path.mkdir()
    yield path


def test_files_of_others_are_refused_in_one_sentence(tmp_path, recwarn):
    count = sum(kept(path) is None for path in foreign_files(tmp_path))
    assert count == 7 and not [str(w.message) for w in recwarn.list]


def test_a_torchscript_archive_is_refused_without_a_word_of_pytorchs(tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "meta.pt")
    asked = subprocess.run(
        [
            sys.executable,
            "-c",
            "import runs, pathlib; runs.load_checkpoint("
            f"pathlib.Path({str(tmp_path / 'meta.pt')!r}))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Refused" in asked.stderr and "Warning" not in asked.stderr


def test_one_weight_changed_by_hand_is_seen(finished, tmp_path, capsys):
    """Also in checkpoints that nothing is trained on."""
    for name in ("control", "policy", "raw"):
        path = copied(finished, tmp_path / name) / f"{name}.pt"
        saved = torch.load(path, weights_only=True)
        next(iter(saved["model"].values())).view(-1)[0] += 1e-3
        torch.save(saved, path)
        sentence = refused([*TINY, "--out", str(tmp_path / name / "runs")], capsys)
        assert f"{name}.pt is damaged" in sentence


def test_moments_of_another_shape_and_steps_beyond_the_end_are_refused(finished, tmp_path, capsys):
    path = copied(finished, tmp_path) / "meta.pt"
    saved = torch.load(path, weights_only=True)
    line = [*TINY, "--stage", "discover", "--out", str(tmp_path / "runs")]
    moments = saved["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].flatten()[:-1]
    edited(path, optimizer=saved["optimizer"])
    assert train.main(line) == 2 and "does not fit" in capsys.readouterr().err
    edited(path, optimizer={"state": {}})
    assert train.main(line) == 2 and "does not fit" in capsys.readouterr().err
    edited(
        path,
        optimizer=torch.load(finished[0] / "smoke/seed0/meta.pt", weights_only=True)["optimizer"],
        step=46,
        done=False,
    )
    assert "step 46, more than the 45" in refused(line, capsys)


def test_a_damaged_log_is_refused(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    edited(folder / "meta.pt", done=False, step=20)
    (folder / "meta.jsonl").write_text('{"step": 3}\nnonsense\n')
    assert train.main([*TINY, "--stage", "discover", "--out", str(tmp_path / "runs")]) == 2
    assert "meta.jsonl is damaged" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(finished, tmp_path, capsys):
    folder = copied(finished, tmp_path)
    edited(folder / "base.pt", done=False, step=60)
    before = (folder / "base.pt").read_bytes()
    (folder / "base.pt.partial").symlink_to("/dev/full")
    line = [*TINY, "--stage", "pretrain", "--out", str(tmp_path / "runs")]
    assert train.main(line) == 1
    err = capsys.readouterr().err
    assert "No space left" in err and "Traceback" not in err
    assert (folder / "base.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------- sizes

IMPOSSIBLE = {  # option and value -> what the sentence must name
    "G": "3000",
    "T": "1000000",
    "width": "1048576",
    "hidden": "100000000",
    "rank": "100000",
    "eval_episodes": "1000000000",
    "base_batch": "100000000",
    "layers": "100000000",
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_sizes_beyond_the_machine_are_refused_before_anything_is_written(name, tmp_path, capsys):
    begin = time.time()
    sentence = refused(
        ["--preset", "grid-small", "--out", str(tmp_path / "runs"), f"--{name}", IMPOSSIBLE[name]],
        capsys,
    )
    assert f"--{name} {IMPOSSIBLE[name]} asks for more memory" in sentence
    assert not (tmp_path / "runs").exists() and time.time() - begin < 5


def test_absurd_numbers_are_refused(tmp_path, capsys):
    for flags, word in (
        (["--hidden", "99999999999999999999"], "--hidden"),
        (["--T", "9" * 401], "--T"),
        (["--eps", "-inf"], "--eps"),
        (["--alpha", "inf"], "--alpha"),
        (["--alpha=--"], "--alpha"),
        (["--preset=--"], "--preset"),
    ):
        assert word in refused(["--preset", "smoke", "--out", str(tmp_path / "x"), *flags], capsys)
    assert not (tmp_path / "x").exists()


def test_every_preset_fits_into_a_machine_of_its_kind(monkeypatch):
    monkeypatch.setattr(config, "machine_memory", lambda: 16 * 2**30)
    for preset in train.PRESETS.values():
        config.check(preset, preset)
    monkeypatch.setattr(config, "machine_memory", lambda: 2**20)
    with pytest.raises(config.Refused, match="preset"):
        config.check(train.PRESETS["smoke"], train.PRESETS["smoke"])


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 3"),
    ],
)
def test_out_of_memory_later_on_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def too_much(*args, **named):
        raise error

    monkeypatch.setattr(train, "pretraining_loss", too_much)
    assert train.main([*TINY, "--stage", "pretrain", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "out of memory" in err and "--meta_batch 32" in err and "--eval_episodes 40" in err


# ----------------------------------------------------------------------------- stopping, going on


def trained(line, errors):
    """In a process of its own, which heeds Ctrl-C; what a shell begins with & ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with errors.open("w") as file, contextlib.redirect_stderr(file):
        sys.exit(train.main(line))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_saves_the_step_that_was_under_way(tmp_path, number):
    folder = tmp_path / "smoke" / "seed0"
    often = ["--base_steps", "100000", "--evaluations", "100000", "--save_seconds", "3600"]
    line = [*TINY, "--out", str(tmp_path), "--stage", "pretrain", *often]
    process = FORKS.Process(target=trained, args=(line, tmp_path / "errors"), daemon=True)
    process.start()
    while not (folder / "base.jsonl").exists() or len(runs.read_log(folder, "base")) < 20:
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(timeout=30)
    err = (tmp_path / "errors").read_text()
    assert process.exitcode == 128 + number and "base is saved at step" in err, err
    step = torch.load(folder / "base.pt", weights_only=True)["step"]
    assert step == runs.read_log(folder, "base")[-1]["step"] >= 20  # nothing is lost
    assert f"step {step};" in err and "Traceback" not in err


def test_a_stop_in_the_last_step_of_a_stage_does_not_begin_the_next(tmp_path, capsys, monkeypatch):
    genuine, calls = train.optimise, []

    def asked(*args):
        loss = genuine(*args)
        calls.append(loss)
        if len(calls) == 70:  # of 70
            signal.raise_signal(signal.SIGTERM)
        return loss

    monkeypatch.setattr(train, "optimise", asked)
    assert train.main([*TINY, "--stage", "control", "--out", str(tmp_path)]) == 128 + signal.SIGTERM
    assert "base is saved at step 70" in capsys.readouterr().err
    assert runs.load_checkpoint(tmp_path / "smoke/seed0/base.pt")["done"]
    assert not (tmp_path / "smoke/seed0/control.pt").exists()


@pytest.fixture
def heeding_ctrl_c():
    """What a shell begins with & ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_leaves_at_once(heeding_ctrl_c):
    with pytest.raises(KeyboardInterrupt), runs.Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_results_do_not_vanish(finished, tmp_path, capsys, monkeypatch):
    """Finished at 12 updates, extended to 40, killed at 14, then 12 asked for again."""
    folder = copied(finished, tmp_path)
    line = [*TINY, "--out", str(tmp_path / "runs"), "--save_seconds", "0", "--rl_updates"]
    genuine, calls = train.internal_rl_step, []

    def killed(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*args)

    monkeypatch.setattr(train, "internal_rl_step", killed)
    assert train.main([*line, "40"]) == 130
    monkeypatch.setattr(train, "internal_rl_step", genuine)
    capsys.readouterr()
    sentence = refused([*line, "12"], capsys)
    assert "policy.pt is at step 14, more than the 12 asked for" in sentence
    assert train.main([*line, "15"]) == 0
    assert "internal RL " in capsys.readouterr().out
    assert train.main([*line, "5"]) == 0
    text = capsys.readouterr().out
    assert "policy: finished earlier with 15 updates, more than the 5 asked for" in text
    assert "internal RL " in text and runs.read_log(folder, "policy")[-1]["step"] == 15


def test_what_was_trained_a_minute_ago_is_not_called_reused(finished):
    assert "reused" not in finished[1] and "finished earlier" not in finished[1]


def test_the_output_begins_with_what_differs_and_has_a_table_that_fits(finished):
    lines = finished[1].splitlines()
    assert lines[0].startswith("smoke, seed 0: base_steps=70") and "G=3" not in lines[0]
    table = lines[next(k for k, line in enumerate(lines) if line.startswith("success on")) :]
    ends = {len(line) for line in table if line.startswith("  ")}
    assert len(ends) == 1 and max(ends) <= 79
    raw = [line for line in lines if line.startswith("      task")][-1]
    assert "gate" not in raw  # raw RL has none


def test_a_log_in_a_file_is_made_of_lines(finished):
    _, out, err = finished
    assert "\r" not in out + err and "\n  base     70  nll" in out


def test_help_names_groups_defaults_and_presets(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "stage 2: the metacontroller",
        "the world (A.1.2",
        "ant-small: a laptop",
        "weight of the KL [grid-paper: 0.17]",
    ):
        assert word in " ".join(text.split())


def test_digests_tell_types_shapes_and_names_apart():
    one = torch.arange(4.0)
    variants = [
        {"a": one},
        {"b": one},
        {"a": one.view(2, 2)},
        {"a": one.double()},
        {"a": one + 1},
        {"a": [one]},
        {"a": one.tolist()},
        {"a": one, "b": None},
    ]
    assert len({runs.digest(x) for x in variants}) == len(variants)
    assert runs.digest({"a": one}) == runs.digest({"a": one.clone()})


def test_every_step_count_has_an_option():
    cfg = config.Config()
    assert all(isinstance(getattr(cfg, field), int) for field in config.STEPS.values())
    assert set(config.STEPS) == set(config.DEPENDS)
    groups = {f.metadata["group"] for f in config.fields(config.Config)}
    assert groups == set(config.GROUPS) and {g for x in config.DEPENDS.values() for g in x} < groups
