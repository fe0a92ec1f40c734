"""What bench.py says of the stages; the peer is optional."""

import re

import pytest

import bench
import runs


def test_every_stage_is_measured_and_nothing_is_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    usual = runs.Training.go
    bench.main(["stages", "--preset", "smoke", "--rounds", "2", "--threads", "1"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "eager" in line]
    assert [line[1] for line in lines] == ["base", "control", "meta", "policy", "raw"]
    assert all(0 < float(line[2]) for line in lines)
    assert runs.Training.go is usual and not list(tmp_path.iterdir())


def test_the_peer_is_optional_and_our_own_file_of_its_name_stays(capsys):
    ours = bench.sys.modules["metacontroller"]
    package = bench.the_peer()
    assert bench.sys.modules["metacontroller"] is ours
    assert package is None or package.__file__ != ours.__file__
    if package is None:
        bench.main(["peer", "--threads", "1"])
        assert "pip install metacontroller-pytorch==0.3.3" in capsys.readouterr().out


def test_wrong_input_is_one_sentence(capsys):
    for line in (["nothing"], ["stages", "--rounds", "0"], ["stages", "--width", "33"]):
        with pytest.raises(SystemExit) as stop:
            bench.main(line)
        assert stop.value.code == 2
        assert re.fullmatch(r"bench\.py: .*\n", capsys.readouterr().err)
