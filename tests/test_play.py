"""The first thing that a visitor sees: the shipped agent, and the README's word for it."""

import re

import pytest
from conftest import ROOT

import play


def test_the_readme_shows_what_play_prints(capsys):
    assert play.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    block = re.search(r"```\n(step  target.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    shown = [line for line in block.splitlines() if line.strip() != "..."]
    # Step, target and action; another CPU may round the numbers behind them differently.
    assert len(shown) == 5 and {line[:22] for line in shown} <= {line[:22] for line in printed}


def test_the_first_exercise_of_the_course_runs(capsys):
    course = (ROOT / "docs" / "course.md").read_text()
    lines = re.search(r'python -c "\n(import play.*?)"\n```', course, re.S).group(1)
    exec(lines.replace("range(20)", "range(1)"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 and all(line.startswith("0 0-1") for line in printed), printed


def test_boards_tasks_and_films(tmp_path, capsys):
    assert play.main(["--seed", "2"]) == 0 and "success" in capsys.readouterr().out
    assert play.main(["--task", "0-2-1"]) == 0  # nothing tells the policy of it
    assert "0-1: failure" in capsys.readouterr().out
    film = tmp_path / "film.gif"
    assert play.main(["--gif", str(film)]) == 0
    assert film.read_bytes()[:4] == b"GIF8" and film.stat().st_size > 10_000


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--task", "0-9"], "colour 9 does not exist"),
        (["--task", "0-red"], "colours in order"),
        (["--seed", "-1"], "--seed"),
        (["--preset", "grid-paper"], "there is no policy.pt"),
        (["--board", "3"], "--board"),
        (["--gif", "/nonexistent/film.gif"], "/nonexistent"),
        (["--gif", "film.xyz"], ".xyz"),
    ],
)
def test_wrong_requests_are_one_sentence(flags, word, capsys):
    try:
        code = play.main(flags)
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2 and word in err and len(err.strip().splitlines()) == 1, err
