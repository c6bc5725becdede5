"""A run of replica groups of which ranks are killed at random moments: what the test of fault tolerance counts.

Every rank notes a digest of its weights and its optimizer's state at every step. Where several groups note the same
step, the ranks of the same place must note the same; and the run must end where an undisturbed one ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from danling_conf.records.membership import Change, Event, changes_of
from danling_conf.records.metrics import read_metrics
from danling_conf.records.reading import read_fields
from danling_conf.schema.files import RESULT

REPOSITORY = Path(__file__).parents[2]
APP = REPOSITORY / "tests" / "support" / "group_app.py"
_LIMIT_SECONDS = 150.0
_STEP_SECONDS = 1.0
"""Longer than a step takes on a machine that is busy with other things too."""
_QUIET_STEPS = 300
_RANKS = 6
_EVALUATED = 25
"""Steps between two evaluations."""
_NOISE = 0.1
"""By how much the loss of a disturbed run may differ: it has not seen the samples of groups that were away."""
WAYS = ("kill of one rank", "kill of a group", "stop of one rank")


@dataclass
class Report:
    """What became of a run."""

    steps: int
    kills: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    compared: int = 0
    """Digests that were compared with that of another group."""
    caught_up: int = 0
    """Groups that took over the state of another."""
    refused: int = 0
    seeds: int = 0
    """Different seeds of generators, of all ranks over the run."""
    losses: dict[int, float] = field(default_factory=dict)
    """Of the evaluations, by step."""
    seconds: float = 0.0
    recoveries: list[float] = field(default_factory=list)
    """Seconds from the start of a group that had died until it took part."""

    def line(self) -> str:
        kills = ", ".join(f"{number} x {way}" for way, number in self.kills.items()) or "none"
        return (
            f"{self.steps} steps, kills: {kills}; {self.caught_up} groups caught up, {self.refused} steps refused, "
            f"{self.compared} digests equal, loss {list(self.losses.values())[-1]:.4f} ({self.seconds:.0f} s)"
        )


def settings(root: Path) -> list[str]:
    """Short time limits, in a workspace."""
    return [
        f"workspace_root={root}", "seed=3", "ft=torchft", "optim.lr=0.02", "dataloader.batch_size=4",
        "ft.heartbeat_timeout_ms=2500", "ft.process_group_timeout_ms=5000", "ft.timeout_seconds=20",
        "ft.join_timeout_seconds=20", "ft.quorum_timeout_seconds=60", "log_interval=5", "checkpoint.interval=20",
        "heartbeat=default", "heartbeat.interval_seconds=0.5",
    ]  # fmt: skip


def command(root: Path, *overrides: str) -> list[str]:
    """Starts the app with these settings."""
    return [sys.executable, str(APP), *settings(root), *overrides]


def run_with_kills(
    root: Path, *, kills: int, steps: int = 100_000, seed: int = 0, pause: float = 0.1, ways: Any = WAYS
) -> Report:
    """Run three groups of two ranks under FSDP2, and kill some of them.

    A kill comes once all groups take part again, so that one is always there to take over from. The run ends soon after
    the last, or after so many steps.
    """
    digests = root / "digests"
    digests.mkdir(parents=True)
    began, chosen, enough = time.monotonic(), random.Random(seed), root / "enough"
    report = Report(0)
    given = (f"steps={steps}", f"data={{digests:{digests},pause:{pause},until:{enough}}}", "parallel=fsdp2",
             "ft.group_size=3", "ft.min_replica_size=2", "ft.max_restarts=100",
             f"eval_interval={_EVALUATED}")  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    with open(root / "output.txt", "w") as output:
        process = subprocess.Popen(
            command(root, *given), stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment
        )
        try:
            while sum(report.kills.values()) < kills and process.poll() is None:
                attempt = wait_for(lambda: together(root, process), process)
                if attempt is None:
                    break
                all_have_stepped(digests, process)
                time.sleep(chosen.uniform(0.1, 1.5))
                way, struck = ways[sum(report.kills.values()) % len(ways)], time.time()
                if strike(attempt, way, chosen):
                    report.kills[way] += 1
                    if way.startswith("kill"):
                        wait_for(partial(has_died, attempt, struck), process)
            if kills and wait_for(lambda: together(root, process), process) is not None:
                all_have_stepped(digests, process)
                enough.touch()
            process.wait(timeout=_LIMIT_SECONDS + (0 if kills else steps * _STEP_SECONDS))
        finally:
            process.kill()
            process.wait()
    assert process.returncode == 0, (root / "output.txt").read_text()
    look_at(root, report)
    report.seconds = time.monotonic() - began
    return report


def wait_for(what: Any, process: subprocess.Popen[bytes], limit: float = _LIMIT_SECONDS) -> Any:
    """What a function returns, as soon as it is not None; None where the process ends before."""
    deadline = time.monotonic() + limit
    while process.poll() is None:
        found = what()
        if found is not None:
            return found
        assert time.monotonic() < deadline, "nothing has happened for too long"
        time.sleep(0.05)
    return None


def all_have_stepped(digests: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait for the end of a step of each rank: to take part is to begin one, which may take long."""
    noted = sizes_of(digests)

    def have() -> bool | None:
        sizes = sizes_of(digests)
        return (len(sizes) == _RANKS and all(size > noted.get(path, 0) for path, size in sizes.items())) or None

    wait_for(have, process)


def sizes_of(folder: Path) -> dict[Path, int]:
    """Bytes of each rank's notes."""
    return {path: path.stat().st_size for path in folder.iterdir()}


def attempt_in(root: Path) -> Path | None:
    """The only attempt below a workspace."""
    return next(iter(root.glob("*/*/*/attempts/*")), None)


def together(root: Path, process: subprocess.Popen[bytes]) -> Path | None:
    """The attempt, where all of its groups take part; None where not."""
    attempt = attempt_in(root)
    if attempt is None:
        return None
    last = {change.group: change.event for change in changes_of(attempt)}
    taking_part = [event in (Event.JOINED, Event.REFUSED) for event in last.values()]
    return attempt if len(taking_part) == 3 and all(taking_part) else None


def has_died(attempt: Path, since: float) -> bool | None:
    """True once the death of a group is known."""
    return any(item.event is Event.DIED and item.time > since for item in changes_of(attempt)) or None


def strike(attempt: Path, way: str, chosen: random.Random) -> bool:
    """Kill or stop ranks of a group. Returns whether there was one."""
    ranks: dict[int, list[int]] = defaultdict(list)
    for path in (attempt.parent.parent / "heartbeats").glob("rank-*.json"):
        beat = json.loads(path.read_text())
        ranks[beat["group"]].append(beat["pid"])
    group = chosen.choice(sorted(ranks))
    pids = sorted(ranks[group])
    try:
        if way == "kill of one rank":
            os.kill(chosen.choice(pids), signal.SIGKILL)
        elif way == "kill of a group":
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        else:
            pid = chosen.choice(pids)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(6.0)
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return False
    return True


def look_at(root: Path, report: Report) -> None:
    """Compare what the groups noted, and read how the run ended."""
    found: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
    drawn: dict[tuple[int, str], int] = {}
    for path in (root / "digests").glob("*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            # A step that a group repeats after it has caught up counts as it was the last time.
            found[line["step"], line["rank"]][path.name] = (line["digest"], line["lr"], line["epoch"])
            drawn[line["step"], path.name] = line["seed"]
    for (step, rank), of_groups in found.items():
        assert len(set(of_groups.values())) == 1, f"step {step}, rank {rank}: {of_groups}"
        report.compared += len(of_groups) - 1
    # No two ranks draw alike at a step, and a group that has caught up does not draw what it drew from its start.
    for step, _ in found:
        of_step = [seed for (at, _), seed in drawn.items() if at == step]
        assert len(set(of_step)) == len(of_step), f"step {step}: two ranks have the same random numbers"
    report.seeds = len(set(drawn.values()))
    report.steps = max(step for step, _ in found)
    assert {step for step, _ in found} == set(range(1, report.steps + 1))
    attempt = attempt_in(root)
    assert attempt is not None
    assert read_fields(attempt / RESULT).text("status") == "completed"
    changes = changes_of(attempt)
    report.caught_up = sum(item.event is Event.JOINED and item.why != "" for item in changes)
    report.refused = sum(item.event is Event.REFUSED for item in changes)
    report.recoveries = list(recoveries(changes))
    history = read_metrics(attempt.parent.parent)
    assert [line["step"] for line in history][-1] == report.steps
    report.losses = {line["step"]: line["val.loss"] for line in history if "val.loss" in line}


def recoveries(changes: list[Change]) -> Any:
    """Seconds from each further start of a group until it took part."""
    started: dict[int, float] = {}
    seen: set[int] = set()
    for item in changes:
        if item.event is Event.STARTED:
            if item.group in seen:
                started[item.group] = item.time
            seen.add(item.group)
        elif item.event is Event.JOINED and item.group in started:
            yield item.time - started.pop(item.group)


def main(kills: int = 30, runs: int = 3) -> None:
    """Kill ranks in so many runs, beside one that nothing happens to. Raises where a run did not survive."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = run_with_kills(Path(folder, "quiet"), steps=_QUIET_STEPS, kills=0, pause=0.0)
        print(quiet.line(), flush=True)
        reports = []
        for number in range(runs):
            report = run_with_kills(Path(folder, str(number)), kills=kills // runs, seed=number)
            last = max(step for step in report.losses if step in quiet.losses)
            mine, theirs = report.losses[last], quiet.losses[last]
            print(f"{report.line()}; at step {last} {mine:.4f}, undisturbed {theirs:.4f}", flush=True)
            assert abs(mine - theirs) < _NOISE
            reports.append(report)
    seconds = sorted(item for report in reports for item in report.recoveries)
    print(
        f"replica groups: {sum(sum(report.kills.values()) for report in reports)} kills, "
        f"{sum(report.compared for report in reports)} digests equal, 0 different; a killed group took part again "
        f"after {seconds[len(seconds) // 2]:.1f} s (median of {len(seconds)})"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 30)
