"""The long crash test: `python -m tests.crash.run [KILLS]` kills so many runs while they save, 240 if not said."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter

from tests.crash.killing import CASES, PHASES, Report, kill_while_saving
from tests.support.processes import call


def crash(kills: int, seed: int = 0) -> list[Report]:
    """Kill runs of every case, as many of each, and print what became of them. Raises where one did not survive."""
    reports = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as root:
            reports.append(call(kill_while_saving, root, case, -(-kills // len(CASES)), seed))
        print(reports[-1].line(), flush=True)
    return reports


def summary(reports: list[Report]) -> str:
    """One line with counts."""
    kills = sum((report.kills for report in reports), Counter[str]())
    counts = ", ".join(f"{phase} {kills[phase]}" for phase in PHASES)
    return (
        f"crash test: {sum(kills[phase] for phase in PHASES)} kills in saves ({counts}); "
        f"{sum(report.resumed for report in reports)} attempts resumed, each from the newest whole checkpoint; "
        f"{sum(report.verified for report in reports)} visible checkpoints verified, 0 broken"
    )


if __name__ == "__main__":
    began = time.monotonic()
    done = crash(int(sys.argv[1]) if len(sys.argv) > 1 else 240)
    print(f"{summary(done)} ({time.monotonic() - began:.0f} s)")
