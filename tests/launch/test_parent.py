"""Processes whose parent is gone: each is told once, however many threads the parent had, and none begins unseen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from danling_conf.launch.parent import as_parent
from tests.support.commands import (
    REPOSITORY,
    Ranks,
    alive,
    all_gone,
    attempts,
    environment,
    run,
    runs,
    started,
    wait_for,
)

CHILD = """
import os, signal, sys, time
from danling_conf.launch.parent import end_with_parent
from danling_conf.records.stopped import note_stop

count, limit = 0, time.monotonic() + 60
def told(number, frame):
    global count, limit
    count, limit = count + 1, time.monotonic() + 0.5

signal.signal(signal.SIGTERM, told)
end_with_parent()
if sys.argv[1] == "stopping":
    note_stop()
os.write(1, b"ready\\n")
while time.monotonic() < limit and not (sys.argv[1] == "stopping" and os.getppid() != int(sys.argv[2])):
    time.sleep(0.01)
time.sleep(0.5)
os.write(1, f"{sys.argv[1]} {count}\\n".encode())  # in one piece: all children write to this pipe
"""
PARENT = """
import os, subprocess, sys, threading, time
from danling_conf.launch.parent import as_parent
for _ in range(16):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
environment = {**os.environ, **as_parent()}
for index in range(12):
    how = "stopping" if index % 4 == 3 else "running"
    subprocess.Popen([sys.executable, "-c", sys.argv[1], how, str(os.getpid())], env=environment)
time.sleep(600)
"""
SIGNALLED = Path(__file__).parents[1] / "checkpoint" / "signalled.py"


def test_a_parent_of_many_threads_that_is_killed_counts_once() -> None:
    """The kernel's signal of a parent's death is repeated for its threads. A child that stops already is not told."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment()
    ) as parent:
        assert parent.stdout is not None
        assert {parent.stdout.readline() for _ in range(12)} == {"ready\n"}
        parent.kill()
        told = sorted(parent.stdout.read().split("\n"))
    assert told == ["", *["running 1"] * 9, *["stopping 0"] * 3]


def test_a_child_of_a_parent_that_is_gone_does_not_begin() -> None:
    script = textwrap.dedent(
        """
        from danling_conf.launch.parent import end_with_parent
        end_with_parent()
        print("begun")
        """
    )
    gone = {name: "1" for name in as_parent()}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=REPOSITORY,
        env=environment(gone),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert done.stderr == "not started: the command that started this process is gone\n"


def listening(pid: int) -> set[str]:
    """The addresses at which a process listens, as /proc writes them."""
    held = {os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in held:
                found.add(words[1].partition(":")[0])
    return found


@pytest.mark.slow
def test_ranks_of_a_command_that_is_killed_save_and_keep_the_run_until_they_have(tmp_path: Path) -> None:
    """In a long step, under a command with many threads. They listen on the loopback interface alone."""
    gate = tmp_path / "gate"
    command = [SIGNALLED, "steps=100000", "seed=1", "dataloader.batch_size=4", "parallel=ddp2",
               f"data.ranks={tmp_path}", f"data.gate={gate}", "auto_resume=true"]  # fmt: skip
    env = {"PYTHONPATH": str(REPOSITORY), "THREADS": "16"}
    with started(command, cwd=tmp_path, env=env) as process:
        pids = Ranks(tmp_path).wait(2, process)
        listened = [listening(pid) for pid in (process.pid, *pids.values())]
        process.kill()
        process.wait()
        # Told at once, they are still in their step.
        refused = run(command, cwd=tmp_path, env=env)
        assert refused.code == 2, refused.text
        assert f"the run is live: ranks of process {process.pid} on " in refused.err
        assert all(map(alive, pids.values()))
        assert len(attempts(runs(tmp_path)[0])) == 1
        gate.touch()
        assert all_gone(pids)
        out, err = process.communicate()
    assert listened == [set(), {"0100007F"}, {"0100007F"}]
    assert "second signal" not in out + err
    (directory,) = runs(tmp_path)
    latest = (directory / "checkpoints" / "latest").resolve().name
    assert f"stopped by SIGTERM; saved at step {int(latest[-8:])}" in out
    again = run([*command, f"steps={int(latest[-8:]) + 1}"], cwd=tmp_path, env=env)
    assert again.code == 0, again.text
    assert f"step={int(latest[-8:]) + 1} " in again.out


@pytest.mark.slow
def test_no_job_goes_on_unseen_after_its_client_was_killed_while_it_started(tmp_path: Path) -> None:
    app = SIGNALLED.parents[1] / "support" / "rank_app.py"
    command = [app, "-m", "steps=3", f"workspace_root={tmp_path}", "data.do=wait", f"data.ranks={tmp_path}",
               "optim.lr=1,2,3,4", "hydra.launcher.parallel_jobs=4"]  # fmt: skip
    with started(command, cwd=tmp_path) as client:
        jobs = wait_for(lambda: len(children(client.pid)) == 4 and children(client.pid), "the jobs to be started")
        client.kill()
        client.wait()
        assert all_gone(dict(enumerate(jobs)))
    assert not list(tmp_path.rglob("rank-*.json"))
    assert [attempt for directory in runs(tmp_path) for attempt in directory.glob("attempts/*")] == []


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
