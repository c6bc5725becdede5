"""`danling-conf init`: a project that trains at once, and never another's files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from danling_conf.cli.init import project_files
from danling_conf.cli.main import TASKS, main
from danling_conf.groups.layout_names import parse_layout
from tests.support.command_line import REPOSITORY, run


@pytest.mark.parametrize("task", TASKS)
def test_what_is_written(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine", "--task", task]) == 0
    shown = capsys.readouterr().out
    written = {str(path.relative_to("mine")) for path in Path("mine").rglob("*") if path.is_file()}
    assert written == project_files(task).keys()
    assert {"train.py", "data.py", "test_train.py", "conf/train.yaml", "conf/profile/slurm.yaml"} <= written
    assert "cd mine" in shown
    for name in written:
        assert name in shown
    assert main(["check", "mine/train.py", "parallel=fsdp2", "compile=max"]) == 0
    assert main(["check", "mine/train.py", "+profile=slurm", "parallel=fsdp8", "--gpus-per-node", "8"]) == 0
    assert "fsdp8" in capsys.readouterr().out


@pytest.mark.parametrize("taken", ["train.py", "conf/profile/slurm.yaml"])
def test_nothing_is_overwritten(taken, tmp_path, capsys):
    (tmp_path / taken).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken).write_text("mine\n")
    assert main(["init", str(tmp_path)]) == 2
    assert taken in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / taken]
    assert (tmp_path / taken).read_text() == "mine\n"


def test_a_link_to_nothing_is_kept(tmp_path, capsys):
    (tmp_path / "data.py").symlink_to(tmp_path / "elsewhere")
    assert main(["init", str(tmp_path)]) == 2
    assert "data.py" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


def test_other_files_may_be_there(tmp_path):
    (tmp_path / "README.md").write_text("mine\n")
    assert main(["init", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == "mine\n"


def test_a_file_in_the_place_of_the_directory(tmp_path, capsys):
    (tmp_path / "mine").write_text("a file\n")
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "a file\n"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_its_own_test_passes(task, tmp_path):
    """It trains in it; the project's style is that of this repository."""
    main(["init", str(tmp_path), "--task", task])
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(REPOSITORY / "pyproject.toml"), "."]
    for command in (ruff, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_it_runs_in_several_processes(tmp_path):
    main(["init", str(tmp_path), "--task", "lm"])
    layout = "tp2"
    short = ("steps=2", "scheduler.warmup_steps=0", "depth=1", "val_fraction=0.01")
    done = run(tmp_path / "train.py", f"parallel={layout}", *short, PYTHONPATH=str(REPOSITORY))
    assert done.code == 0, done.err
    assert "val.loss=" in done.out.splitlines()[-1]
    assert len(list(tmp_path.rglob("rank-*.log"))) == parse_layout(layout).world_size
