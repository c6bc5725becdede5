"""Replica groups on one machine: trained as one process would, stopped, resumed, killed, and left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from danling_conf.records.membership import Event, changes_of
from danling_conf.records.metrics import read_metrics, series
from danling_conf.records.reading import read_fields
from danling_conf.schema.files import RESULT
from danling_conf.topology.rendezvous import LOOPBACK, listen
from tests.crash.group_killing import REPOSITORY, attempt_in, command, run_with_kills, wait_for

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
THREE = ("ft.group_size=3", "steps=14", "accum_steps=2", "max_grad_norm=0.5", "scheduler=cosine", "nonfinite=skip")


def start(argv: list[str], output: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    with open(output, "ab") as file:
        return subprocess.Popen(
            argv, cwd=REPOSITORY, env={**ENVIRONMENT, **(environment or {})}, stdout=file, stderr=subprocess.STDOUT
        )


def noted(root: Path, event: Event, groups: int) -> bool | None:
    """True once so many groups have noted an event."""
    attempt = attempt_in(root)
    found = {item.group for item in changes_of(attempt) if item.event is event} if attempt else set()
    return True if len(found) >= groups else None


def ends(process: subprocess.Popen[bytes], limit: float = 90.0) -> int:
    try:
        return process.wait(timeout=limit)
    finally:
        process.kill()
        process.wait()


def history(root: Path) -> dict[str, list[tuple[float, float]]]:
    (run,) = root.glob("lin/exp/[!.]*")
    return {name: series(read_metrics(run), name) for name in ("val.loss", "train.lr", "train.grad_norm")}


def test_groups_train_as_one_process_does_also_when_they_are_stopped_and_resumed(tmp_path: Path) -> None:
    one, three = tmp_path / "one", tmp_path / "three"
    alone = [word for word in command(one, *THREE[1:]) if not word.startswith("ft")]
    assert ends(start([*alone, "dataloader.batch_size=12"], tmp_path / "one.txt")) == 0
    argv, said = command(three, *THREE), tmp_path / "three.txt"
    first = start([*argv, f"data={{pause:0.3,digests:{tmp_path}}}"], said)
    assert wait_for(lambda: noted(three, Event.JOINED, 3), first)
    time.sleep(1.5)
    first.send_signal(signal.SIGTERM)
    assert ends(first) == 128 + signal.SIGTERM
    (run,) = three.glob("lin/exp/[!.]*")
    assert "saved at step" in said.read_text()
    assert ends(start([*argv, f"data={{digests:{tmp_path}}}", f"resume={run}", "force_resume=true"], said)) == 0
    wanted, found = history(one), history(three)
    for name, points in wanted.items():
        assert [step for step, _ in found[name]][-1] == points[-1][0]
        shared = [(value, dict(found[name])[step]) for step, value in points if step in dict(found[name])]
        assert len(shared) >= 2
        for mine, theirs in shared:
            assert mine == pytest.approx(theirs, rel=2e-5)


def test_groups_that_are_too_few_save_and_leave_and_say_so(tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    limits = ("ft.quorum_timeout_seconds=6", "ft.timeout_seconds=6", "ft.join_timeout_seconds=6", "ft.quorum_retries=1")
    argv = command(tmp_path, "ft.group_size=2", "ft.min_replica_size=2", "ft.max_restarts=0", "steps=500",
                   "parallel=fsdp2", *limits)  # fmt: skip
    process = start([*argv, "data={pause:0.1}"], said)
    assert wait_for(lambda: noted(tmp_path, Event.JOINED, 2), process)
    time.sleep(1.0)
    attempt = attempt_in(tmp_path)
    assert attempt is not None
    os.kill(pid_of(attempt, 2), signal.SIGKILL)
    assert ends(process) == 1
    text = said.read_text()
    assert "group 1 died: rank 2 ended by SIGKILL; it was started once, and is given up (ft.max_restarts)" in text
    assert "fewer than 2 of 2 replica groups" in text
    assert "for 6 s (ft.quorum_timeout_seconds); saved at step" in text
    assert "Traceback" not in text
    assert read_fields(attempt / RESULT).text("status") == "failed"
    assert (attempt.parent.parent / "checkpoints" / "latest" / "checkpoint.json").is_file()


def lighthouse(port: int, output: Path) -> subprocess.Popen[bytes]:
    program = str(Path(sys.executable).with_name("torchft_lighthouse"))
    return start(
        [program, "--bind", f"{LOOPBACK}:{port}", "--min_replicas", "2", "--heartbeat_timeout_ms", "1000"], output
    )


def test_groups_that_are_started_one_by_one_outlive_their_lighthouse(tmp_path: Path) -> None:
    with listen(LOOPBACK, 0) as free:
        port = free.getsockname()[1]
    meeting = lighthouse(port, tmp_path / "lighthouse.txt")
    roots = [tmp_path / "0", tmp_path / "1"]
    groups = []
    try:
        for index, root in enumerate(roots):
            argv = command(root, "ft.group_size=2", "steps=60", f"ft.lighthouse={LOOPBACK}:{port}")
            argv = [word for word in argv if not word.startswith(("ft.join_", "ft.heartbeat_"))]
            groups.append(start([*argv, f"ft.replica_id={index}", "data={pause:0.1}"], tmp_path / f"{index}.txt"))
        assert wait_for(lambda: steps_of(roots[0]) > 10 or None, groups[0])
        meeting.kill()
        meeting.wait()
        time.sleep(3.0)
        meeting = lighthouse(port, tmp_path / "lighthouse.txt")
        codes = [ends(group) for group in groups]
    finally:
        for process in (meeting, *groups):
            process.kill()
            process.wait()
    assert codes == [0, 0], [(tmp_path / f"{index}.txt").read_text()[-2000:] for index in range(2)]
    first, second = history(roots[0])["val.loss"], history(roots[1])["val.loss"]
    assert first[-1][0] == 60
    assert first == second  # bit for bit


def steps_of(root: Path) -> int:
    """The newest step in the metrics of a workspace's only run."""
    lines = [line for run in root.glob("lin/exp/[!.]*") for line in read_metrics(run)]
    return lines[-1]["step"] if lines else 0


def test_killed_groups_catch_up(tmp_path: Path) -> None:
    report = run_with_kills(tmp_path, kills=1, ways=("kill of one rank",))
    print(report.line(), report.recoveries)
    assert report.kills == {"kill of one rank": 1}
    assert report.caught_up >= 1
    assert report.compared > 2 * report.steps
    assert report.seeds >= 6 + 2  # of six ranks, and again of the two that have caught up


def pid_of(attempt: Path, rank: int) -> int:
    return int(read_fields(attempt.parent.parent / "heartbeats" / f"rank-{rank}.json").integer("pid") or 0)
