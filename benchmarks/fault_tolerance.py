"""What the death of a rank costs: replica groups beside a run that is started again from its checkpoint.

Run it as `python benchmarks/fault_tolerance.py`. See benchmarks/README.md for what is compared, and how.
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
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from danling_conf.records.membership import Event, changes_of
from danling_conf.records.metrics import read_metrics, series
from tests.crash.group_killing import REPOSITORY, attempt_in, command, recoveries, strike, together, wait_for

STEPS, PAUSE = 100_000, 0.05
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
GROUPS = ("parallel=fsdp2", "ft.group_size=3", "ft.min_replica_size=2", "ft.max_restarts=100")
ALONE = ("parallel=hsdp3x2", "ft=none", "auto_resume=true")


def main() -> None:
    print("| | longest pause of those that train | steps repeated or lost | samples not seen | all train again after |")
    print("|---|---|---|---|---|")
    for name, measure in (("replica groups", with_groups), ("restart from a checkpoint", with_restart)):
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {measure(Path(folder))} |", flush=True)


def started(root: Path, *overrides: str) -> subprocess.Popen[bytes]:
    with open(root / "output.txt", "ab") as output:
        argv = command(root, *overrides, f"steps={STEPS}", f"data={{digests:{root},pause:{PAUSE}}}")
        argv = [word for word in argv if overrides[1].startswith("ft.") or not word.startswith(("ft.", "ft=torch"))]
        return subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=ENVIRONMENT)


def with_groups(root: Path) -> str:
    process = started(root, *GROUPS)
    try:
        attempt = wait_for(lambda: together(root, process), process)
        time.sleep(5.0)
        killed = time.time()
        strike(attempt, "kill of one rank", random.Random(0))
        pause = longest_pause(root, killed, 12.0)
        wait_for(lambda: list(recoveries(changes_of(attempt))) or None, process)
        (again,) = recoveries(changes_of(attempt))
        refused = max(per_group(attempt, Event.REFUSED).values(), default=0)
        wait_for(lambda: lost_samples(root) or None, process)
        return f"{pause:.1f} s | {refused} | {lost_samples(root):.0f} | {again:.1f} s"
    finally:
        end(process)


def with_restart(root: Path) -> str:
    process = started(root, *ALONE)
    try:
        wait_for(lambda: newest_step(root) > 100 or None, process)
        attempt = attempt_in(root)
        assert attempt is not None
        beat = json.loads((attempt.parent.parent / "heartbeats" / "rank-1.json").read_text())
        reached, killed = newest_step(root), time.time()
        os.kill(beat["pid"], signal.SIGKILL)
        process.wait()
        (root / "0.jsonl").rename(root / "before.txt")
        process = started(root, *ALONE)
        wait_for(lambda: newest_step(root) or None, process)
        first, again = steps(root)[0][0], time.time() - killed
        return f"{again:.1f} s | {reached - first + 1} | 0 | {again:.1f} s"
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a command and wait for its ranks, which save before they leave."""
    process.terminate()
    try:
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def steps(root: Path) -> list[tuple[int, float]]:
    """Steps that rank 0 has noted."""
    path = root / "0.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return [(found["step"], found["time"]) for found in map(json.loads, lines)]


def newest_step(root: Path) -> int:
    found = steps(root)
    return found[-1][0] if found else 0


def longest_pause(root: Path, since: float, seconds: float) -> float:
    """The longest time between two steps of any group, in the time after a moment."""
    time.sleep(seconds)
    gaps = []
    for path in root.glob("*.jsonl"):
        times = [json.loads(line)["time"] for line in path.read_text().splitlines()[:-1]]
        after = [moment for moment in times if moment >= since - 1]
        if after and after[-1] > since + seconds / 2:
            gaps.append(max(later - earlier for earlier, later in pairwise(after)))
    return min(gaps)


def per_group(attempt: Path, event: Event) -> dict[int, int]:
    found: dict[int, int] = {}
    for change in changes_of(attempt):
        if change.event is event:
            found[change.group] = found.get(change.group, 0) + 1
    return found


def lost_samples(root: Path) -> float:
    (run,) = root.glob("lin/exp/[!.]*")
    found = series(read_metrics(run), "ft.lost_samples")
    return found[-1][1] if found else 0.0


if __name__ == "__main__":
    main()
