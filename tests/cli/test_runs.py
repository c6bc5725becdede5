"""`danling-conf runs`: what is shown of a sweep, of a run and of all runs below a directory."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from danling_conf.sweep.rows import Row
from danling_conf.sweep.table import table_lines
from tests.support.commands import APP, run, runs
from tests.support.sweeps import run_sweep, sweep_in, write_sweep


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two values of two settings; half of the jobs failed."""
    root = tmp_path_factory.mktemp("swept")
    done = run_sweep(root, "optim.lr=1e-3,1e-1", "data.do=nothing,fail")
    assert done.code == 1, done.text
    return root


def shown(capsys: Any, *words: str | Path, code: int = 0) -> str:
    assert main(["runs", *map(str, words)]) == code
    return capsys.readouterr().out


def test_the_table_has_what_differs_and_the_best_first(swept: Path, capsys: Any) -> None:
    sweep = sweep_in(swept).path
    out = shown(capsys, sweep)
    lines = out.splitlines()
    assert lines[0] == f"sweep {sweep}: 4 jobs: 2 completed, 2 failed"
    assert lines[1].split() == ["job", "optim.lr", "data.do", "state", "score", "attempts", "took", "run"]
    assert [line.split()[:5] for line in lines[2:6]] == [
        ["#0", "0.001", "nothing", "completed", "0.001"],
        ["#2", "0.1", "nothing", "completed", "0.1"],
        ["#1", "0.001", "fail", "failed", "1"],
        ["#3", "0.1", "fail", "failed", "1"],
    ]
    assert "#1 failed: RuntimeError: the gate is shut" in out
    assert f"to resume: danling-conf resume {sweep}" in out
    assert "\x1b" not in out


def test_a_root_shows_its_sweep_and_a_run_itself(swept: Path, capsys: Any) -> None:
    assert shown(capsys, swept / "ws") == shown(capsys, sweep_in(swept).path)
    for run_directory in runs(swept):
        out = shown(capsys, run_directory)
        assert run_directory.name in out
        assert "1 job: " in out
        assert f"of the sweep {sweep_in(swept).path}" in out


def test_csv(swept: Path, capsys: Any) -> None:
    rows = list(csv.DictReader(io.StringIO(shown(capsys, swept, "--csv"))))
    assert [(row["job"], row["optim.lr"], row["data.do"], row["state"], row["score"]) for row in rows] == [
        ("0", "0.001", "nothing", "completed", "0.001"), ("2", "0.1", "nothing", "completed", "0.1"),
        ("1", "0.001", "fail", "failed", ""), ("3", "0.1", "fail", "failed", ""),
    ]  # fmt: skip
    assert all(Path(row["run"]).is_dir() and row["sweep"] == str(sweep_in(swept).path) for row in rows)
    assert float(rows[0]["ended"]) >= float(rows[0]["started"])
    assert rows[2]["error"] == "RuntimeError: the gate is shut"


def test_json(swept: Path, capsys: Any) -> None:
    found = json.loads(shown(capsys, swept, "--json"))
    assert found["sweeps"][0]["cluster"] == "local"
    assert found["sweeps"][0]["looked_after"] is False
    assert "data.do=nothing,fail" in found["sweeps"][0]["command"]
    first = found["jobs"][0]
    assert first["settings"] == {"optim.lr": 0.001, "data.do": "nothing"}
    assert first["job_id"] == first["key"]
    assert Path(first["run"]).name == first["config_id"]


def test_the_page_needs_nothing_from_elsewhere(swept: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "new" / "sweep.html"
    assert str(target) in shown(capsys, swept, "--html", target)
    content = target.read_text()
    assert "http://" not in content
    assert "https://" not in content
    assert "<link" not in content.replace('<link rel="icon" href="data:,">', "")
    assert "src=" not in content
    assert "loss over optim.lr" in content
    assert "optim.lr (log)" in content  # two decades
    assert "loss over data.do" not in content  # it does not vary among those with a score
    assert "loss by all that varies" in content
    assert content.count('<span class="badge good">completed</span>') == 2
    assert "RuntimeError: the gate is shut" in content


@pytest.mark.slow
def test_the_page_shows_curves_of_loss(tmp_path: Path, capsys: Any) -> None:
    overrides = ["data.do=train", f"data.ranks={tmp_path}", "optim.lr=0.1,0.2", "checkpoint=none"]
    done = run([APP, "-m", "steps=3", f"workspace_root={tmp_path / 'ws'}", *overrides], cwd=tmp_path)
    assert done.code == 0, done.text
    out = shown(capsys, tmp_path / "ws")
    assert out.count("3/3") == 2
    shown(capsys, tmp_path / "ws", "--html", tmp_path / "page.html")
    content = (tmp_path / "page.html").read_text()
    assert "train.loss" in content
    assert "val.loss" in content
    assert "#0 lr=0.1" in content
    assert "optim.lr (log)" not in content


@pytest.mark.parametrize(("config", "order"), [
    ({"score_mode": "max"}, ["#1", "#0"]), ({"score_mode": "min"}, ["#0", "#1"]), ({}, ["#0", "#1"]),
    ({"score_name": "accuracy"}, ["#1", "#0"]),
])  # fmt: skip
def test_what_is_best_is_for_the_configuration_to_say(
    tmp_path: Path, capsys: Any, config: dict[str, Any], order: list[str]
) -> None:
    jobs = [
        {"lr": lr, "config": config, "lines": [{"status": "running"}, {"status": "completed", "score": lr}]}
        for lr in (0.1, 0.2)
    ]
    write_sweep(tmp_path / "sweeps" / "one", jobs)
    assert [line.split()[0] for line in shown(capsys, tmp_path).splitlines()[2:4]] == order


def test_a_torn_line_and_broken_files_are_passed_over(tmp_path: Path, capsys: Any) -> None:
    ended = [{"status": "queued"}, {"status": "running"}, {"status": "completed", "score": 1.0}]
    sweep = write_sweep(tmp_path / "sweeps" / "one", [{"lr": lr, "lines": ended} for lr in (0.1, 0.2)])
    with open(sweep.path / "jobs.jsonl", "a") as file:
        file.write('[1]\n{"key": 3}\n{"key": "unknown", "status": "running"}\n{"key": "0000000000')
    (sweep.path / "jobs" / ("1" * 12) / "job.json").write_text("{")
    (sweep.path / "sweep.json").unlink()
    out = shown(capsys, tmp_path)
    assert "2 jobs: 2 completed" in out
    json.loads(shown(capsys, tmp_path, "--json"))
    assert main(["resume", str(sweep.path)]) == 2
    assert "its sweep.json is missing or broken" in capsys.readouterr().err


@pytest.mark.slow
def test_a_root_with_several_sweeps_and_a_run_of_its_own(tmp_path: Path, capsys: Any) -> None:
    assert run_sweep(tmp_path, "optim.lr=1e-3").code == 0
    assert run_sweep(tmp_path, "optim.lr=1e-2,1e-1", "hydra.sweep.dir=elsewhere").code == 0
    alone = [*_single(tmp_path), "optim.lr=0.5"]
    assert run(alone, cwd=tmp_path).code == 0
    out = shown(capsys, tmp_path)
    assert "4 runs: 4 completed" in out
    assert [line.split()[-1] for line in out.splitlines()[2:5]].count("elsewhere") == 2
    assert out.splitlines()[1].split()[:2] == ["job", "optim.lr"]
    # A run knows its sweep, wherever that is.
    one = next(Path(row["run"]) for row in json.loads(shown(capsys, tmp_path, "--json"))["jobs"] if row["score"] == 0.1)
    assert "job #1 of the sweep" in shown(capsys, one)
    for command in ("resume", "cancel"):
        assert main([command, str(tmp_path)]) == 2
        refused = capsys.readouterr().err
        assert "there are 2 sweeps in it" in refused
        assert str(tmp_path / "elsewhere") in refused


def _single(root: Path) -> list[str | Path]:
    from tests.support.sweeps import APP as gated

    return [gated, "steps=3", f"workspace_root={root / 'ws'}", f"data.gate={root / 'gate'}"]


@pytest.mark.parametrize("command", ["runs", "resume", "cancel", "logs"])
def test_directories_without_anything_are_refused(tmp_path: Path, capsys: Any, command: str) -> None:
    for directory, words in ((tmp_path / "none", "no such directory"), (tmp_path, "there is no run and no sweep")):
        assert main([command, str(directory)]) == 2
        refused = capsys.readouterr().err
        assert words in refused
        assert str(directory) in refused
        assert "fix: name a run's directory" in refused


def rows(count: int, settings: int) -> list[Row]:
    return [
        Row(
            number=number, state="completed", score=number / 7, attempts=1, seconds=75.0, run=Path(f"/ws/{number:012}"),
            sweep=Path("/ws/sweeps/one"), step=7, total_steps=10,
            settings={f"section.setting_{name}": f"{'value' * 9}{number}" for name in range(settings)},
        )
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_table_fits_the_terminal(width: int) -> None:
    lines = table_lines(rows(3, settings=4), width)
    assert all(len(line) <= width for line in lines[:4])
    assert "no room for " in lines[4]
    assert "section.setting_0" in lines[0]


def test_without_a_terminal_nothing_is_left_out() -> None:
    lines = table_lines(rows(3, settings=4), None)
    assert len(lines) == 4
    assert lines[1].count("value" * 9) == 4
    assert "1m15s" in lines[1]
    assert "7/10" in lines[1]


def test_the_reader_may_leave_early(swept: Path) -> None:
    command = f"{os.sys.executable} -m danling_conf.cli.main runs {swept} --json | head -1"  # type: ignore[attr-defined]
    done = run(["bash", "-o", "pipefail", "-c", command], cwd=swept)
    assert (done.code, done.out, done.err) == (0, "{\n", "")
