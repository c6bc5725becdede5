"""Ranks that are forked from one process: they see what Python's own start shows, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from danling_conf.launch import forked
from danling_conf.topology.machine import accelerator_files
from tests.support.commands import APP, REPOSITORY, Ranks, alive, all_gone, run, runs, started, wait_for

FORKED_APP = Path(__file__).with_name("forked_app.py")
WARM = "launch/warm.py"


@pytest.fixture
def forking() -> None:
    if not forked.can_fork():
        pytest.skip("this machine has an accelerator, or another kernel than Linux: ranks are never forked")


def facts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def arguments(folder: Path) -> list[str]:
    return ["steps=1", f"workspace_root={folder}", f"data.folder={folder}", "parallel=ddp2"]


def started_one_by_one(folder: Path) -> dict[str, str]:
    """An environment in which every process has a second thread, so that none may be forked."""
    (folder / "sitecustomize.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["script", "module", "one by one"])
@pytest.mark.usefixtures("forking")
def test_a_rank_is_as_python_starts_it(tmp_path: Path, how: str) -> None:
    """Each case but the last is forked, and compared with what Python documents; the last is Python itself."""
    env = started_one_by_one(tmp_path) if how == "one by one" else {"PYTHONPATH": str(REPOSITORY)}
    words = ["-m", "tests.launch.forked_app"] if how == "module" else [str(FORKED_APP)]
    done = run([sys.executable, *words, *arguments(tmp_path)], cwd=tmp_path, env=env)
    assert done.code == 0, done.text
    assert ("ranks are started one by one" in done.err) == (how == "one by one")
    found = facts_of(tmp_path)
    assert [facts["environment"] for facts in found] == ["0", "1"]
    assert found[0]["loaded"] == [0, 1]
    assert found[0]["parent"] == found[1]["parent"]
    for facts in found:
        assert facts["file"] == str(FORKED_APP)
        assert facts["argv"] == [str(FORKED_APP), *arguments(tmp_path)]
        assert facts["package"] == ("tests.launch" if how == "module" else None)
        assert facts["path"][0] == str(tmp_path if how == "module" else FORKED_APP.parent)
        assert facts["main"]
        assert facts["session"]
        assert any(word.endswith(WARM) for word in facts["command"]) == (how != "one by one")
        assert any("forked_app" in word for word in facts["command"])
    for one, other in zip(found[0]["drawn"], found[1]["drawn"], strict=True):
        assert one != other


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_an_error_of_a_module_is_shown_as_python_shows_it(tmp_path: Path) -> None:
    done = run(
        [FORKED_APP, *arguments(tmp_path)], cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "BROKEN_RANK": "1"}
    )
    assert done.code == 1, done.text
    assert "rank 1 failed: ended with exit code 1" in done.err
    (log,) = runs(tmp_path)[0].glob("attempts/*/rank-1.log")
    first, second, *_, last = log.read_text().splitlines()
    assert first == "Traceback (most recent call last):"
    assert second.startswith(f'  File "{FORKED_APP}", line ')
    assert last == "KeyError: 'this module is broken'"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["warm", "signal", "command"])
@pytest.mark.usefixtures("forking")
def test_no_rank_is_left_of_a_start_that_is_cut_short(tmp_path: Path, what: str) -> None:
    command: list[str | Path] = [APP, "steps=3", f"workspace_root={tmp_path}", f"data.ranks={tmp_path}",
                                 "data.do=wait", "parallel=ddp2"]  # fmt: skip
    with started(command, cwd=tmp_path) as process:
        (warm,) = wait_for(lambda: warm_children(process), "the warm process")
        if what == "warm":
            os.kill(warm, signal.SIGKILL)
        elif what == "command":
            process.kill()
        else:
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)  # until nobody is left who could write
    assert "Traceback" not in err
    if what == "warm":
        assert process.returncode == 1
        assert "rank 0 failed: the process that starts the ranks was ended by SIGKILL before it had started them" in err
    elif what == "signal":
        assert process.returncode == 128 + signal.SIGTERM
        assert "stopped by SIGTERM" in err
    assert all_gone({0: warm})
    assert not Ranks(tmp_path).facts()


def warm_children(process: subprocess.Popen[str]) -> list[int]:
    assert process.poll() is None
    return [pid for pid in children(process.pid) if WARM in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
@pytest.mark.usefixtures("forking")
def test_ranks_that_were_not_told_to_begin_end(tmp_path: Path) -> None:
    """Forked, and waiting for the word of a command that gives up. Those that were told are children of this one."""
    script = tmp_path / "script.py"
    script.write_text(f"import os, sys\nopen({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').close()\nsys.exit(7)\n")
    starts = [
        forked.RankStart(environment={"RANK": str(rank)}, output=None, passed=None, error=tmp_path / "error")
        for rank in range(2)
    ]
    command = [sys.executable, "-u", str(script)]
    given_up, told = (forked.WarmProcess(command, {**os.environ, "OMP_NUM_THREADS": "1"}, starts) for _ in range(2))
    wait_for(lambda: not alive(given_up.pid), "the ranks to be forked")
    given_up.kill()
    assert not list(tmp_path.glob("[01]"))
    ranks = wait_for(told.forked, "the ranks to begin")
    assert [rank.wait() for rank in ranks] == [7, 7]
    assert len(list(tmp_path.glob("[01]"))) == 2


def test_ranks_are_forked_where_no_driver_could_have_been_opened(tmp_path: Path) -> None:
    assert accelerator_files(tmp_path) == []
    for name in ("nvidiactl", "nvidia0", "kfd", "dri/renderD128", "accel/accel0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        assert accelerator_files(tmp_path)
        (tmp_path / name).unlink()
        if "/" in name:
            (tmp_path / name).parent.rmdir()
