"""Commands on a disk that becomes full or read-only: `unshare -rm python -m tests.crash.full FOLDER` prints JSON.

In a mount namespace of its own, where a small tmpfs is the workspace.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from danling_conf.records.ledger import Ledger
from danling_conf.records.state import state_of
from danling_conf.sweep.rows import progress
from tests.crash.disks import mount
from tests.support.commands import LIMIT_SECONDS, REPOSITORY, run, runs, started

APP = REPOSITORY / "tests" / "support" / "filling_app.py"
CASES = {
    "full": ["checkpoint.load_only=true", "tensorboard=true"],
    "full with checkpoints": ["checkpoint.interval=1"],
    "full with checkpoints of two ranks": ["checkpoint.interval=1", "parallel=ddp2"],
    "read-only": ["checkpoint.load_only=true", "+data.read_only=true"],
    "read-only with checkpoints": ["checkpoint.interval=1", "+data.read_only=true"],
}


def command(workspace: Path, *settings: str) -> list[str | Path]:
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(workspace))
    return [APP, *settings, "steps=60", "dataloader.batch_size=4", "log_interval=1", "heartbeat.enabled=true",
            "heartbeat.interval_seconds=0.1", f"workspace_root={workspace}"]  # fmt: skip


def stopped_sweep(workspace: Path) -> dict[str, Any]:
    """A sweep whose first job makes the disk read-only: the command waits for the disk, and is stopped then."""
    words = command(workspace, "-m", "seed=1,2", "hydra.launcher.parallel_jobs=1", *CASES["read-only"])
    with started(words, cwd=workspace.parent, env={"PYTHONPATH": str(REPOSITORY)}) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=LIMIT_SECONDS)
    return {"code": process.returncode, "out": out, "err": first + err}


def filled_sweep(workspace: Path) -> dict[str, Any]:
    """A sweep whose first job fills the disk, and what resumes it once there is room."""
    words = command(workspace, "-m", "seed=1,2", "hydra.launcher.parallel_jobs=1", "checkpoint.interval=1")
    done = run(words, cwd=workspace.parent, env={"PYTHONPATH": str(REPOSITORY)})
    (sweep,) = workspace.glob("*/*/sweeps/*")
    facts = [[record.status, record.error] for record in Ledger(sweep).records().values()]
    mount("-o", "remount,size=100m", str(workspace))
    again = run(
        [sys.executable, "-m", "danling_conf.cli.main", "resume", sweep],
        cwd=workspace.parent,
        env={"PYTHONPATH": str(REPOSITORY)},
    )
    return {"code": done.code, "err": done.err, "jobs": facts, "again": again.out}


def main(folder: Path) -> None:
    for name, settings in CASES.items():
        workspace = folder / name
        workspace.mkdir()
        done = run(command(workspace, *settings), cwd=folder, env={"PYTHONPATH": str(REPOSITORY)})
        (made,) = runs(workspace)
        found = {"code": done.code, "out": done.out, "err": done.err, "state": asdict(state_of(made))}
        found["step"] = progress(made)[0]
        print(json.dumps({"case": name, **found}), flush=True)
    (folder / "sweep").mkdir()
    print(json.dumps({"case": "sweep", **stopped_sweep(folder / "sweep")}), flush=True)
    (folder / "full sweep").mkdir()
    print(json.dumps({"case": "full sweep", **filled_sweep(folder / "full sweep")}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
