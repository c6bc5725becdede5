"""Runs and sweeps that only exist as files, whole, as runs leave them: for tests of what reads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danling_conf.records.ledger import Ledger
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory

ATTEMPT = "20260101-000000"
BEGAN = 1_700_000_000.0
CONFIG: dict[str, Any] = {
    "optim": {"lr": 0.1}, "score_mode": None, "score_name": "loss", "steps": 10, "epochs": None,
    "checkpoint": {"dir_name": "checkpoints"}, "fsdp": {"enabled": False},
    "heartbeat": {"enabled": True, "interval_seconds": 1.0, "dir_name": "heartbeats"},
    "parallel": {"mesh_device_type": "cpu", "axes": {"ddp": 1}},
}  # fmt: skip


def write_run(run: Path, *, result: dict[str, Any] | None = None) -> Path:
    """A run of one attempt and two ranks, with every file that a run can have.

    Args:
        result: how it ended; None where it wrote nothing.
    """
    attempt = run / "attempts" / ATTEMPT
    attempt.mkdir(parents=True)
    (run / "heartbeats").mkdir()
    write(run / "run.json", {"run_id": run.name, "config_id": "c" * 12, "seed": 1, "parent": None,
                             "created": "2026-01-01T00:00:00+0000", "settings": CONFIG})  # fmt: skip
    (run / "run.lock").write_text(f"process 99999999 on {os.uname().nodename}")
    write(attempt / "frozen.json", {
        "job_id": "d" * 12, "class": ["danling_conf.schema", "RunnerConfig"], "config": CONFIG, "code_id": "abc",
        "hydra": {"runtime": {"cwd": str(run)}, "sweep": {"dir": "nowhere"}},
        "attempt": {"run_directory": str(run), "directory": str(attempt), "seed": 1, "restore": None,
                    "command": ["gone.py", "steps=10"]},
    })  # fmt: skip
    if result is not None:
        write(attempt / "result.json", result)
    write(attempt / "environment.json", {
        "host": "h", "python": "3.11", "torch": "2.13", "cpus": 2, "cuda": None, "platform": "Linux",
        "accelerators": [], "packages": {"torch": "2.13"},
    })  # fmt: skip
    (attempt / "difference.yaml").write_text("optim:\n  lr: 0.1\n")
    (attempt / "git.diff").write_text("+changed\n")
    (attempt / "rank-0.log").write_text("this is rank 0\n")
    for rank in range(2):
        write(run / "heartbeats" / f"rank-{rank}.json", {
            "attempt": ATTEMPT, "rank": rank, "world_size": 2, "host": "h", "pid": 7, "step": 5, "total_steps": 10,
            "epoch": 0, "state": "training", "state_since": BEGAN, "last_step_time": BEGAN, "memory_bytes": 9,
            "written": BEGAN, "interval": 1.0, "waiting_share": 0.1,
        })  # fmt: skip
    lines = [{"time": BEGAN + step, "attempt": ATTEMPT, "step": step, "epoch": 0, "train.loss": 1.0 / step}
             for step in range(1, 6)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    checkpoint = run / "checkpoints" / "ckpt-s00000005"
    checkpoint.mkdir(parents=True)
    write(checkpoint / "checkpoint.json", {"format": 2, "step": 5})
    return run


def write_sweep_of(
    root: Path, *results: dict[str, Any] | None, lines: Sequence[dict[str, Any]] | None = None, cluster: str = "local"
) -> SweepDirectory:
    """A sweep whose jobs ended as the results say, each with its run.

    Args:
        results: for each job; None where it wrote none.
        lines: of the ledger for each job, after it was queued; None for those of a job that ran and ended so. A job
            without any has a run without an attempt.
    """
    sweep = SweepDirectory(path=root / "exp" / "sweeps" / "one")
    sweep.path.mkdir(parents=True)
    write(sweep.path / "sweep.json", {
        "created": "2026-01-01", "command": ["train.py", "-m"], "cluster": cluster,
        "program": {"words": ["gone.py"], "directory": str(root), "code_id": "abc"},
        "launcher": {"on_failure": "continue", "parallel_jobs": None},
    })  # fmt: skip
    for number, result in enumerate(results):
        key = f"{number:x}" * 12
        run = write_run(root / "exp" / key, result=result)
        if lines is not None and not lines:
            shutil.rmtree(run / "attempts")
        folder = sweep.path / "jobs" / key
        folder.mkdir(parents=True)
        write(folder / "job.json", {
            "key": key, "job": number, "overrides": ["steps=10"], "world_size": 1, "shape": None, "job_id": key,
            "program": {"words": ["gone.py"], "directory": str(root), "code_id": "abc"}, "hydra": None,
            "binding": {"run_directory": str(run), "restore": None, "notes": []}, "config": CONFIG,
            "launcher": {"on_failure": "continue"}, "class": ["danling_conf.schema", "RunnerConfig"],
        })  # fmt: skip
        write(folder / "error-0.json", {"rank": 0, "raised_at": BEGAN, "message": "broken", "traceback": "Trace"})
        (folder / "output.log").write_text("printed\n")
        ledger = Ledger(sweep.path)
        ledger.add(key, job=number, job_id=key, config_id="c" * 12, status=Status.PLANNED, overrides=["steps=10"],
                   run=str(run), steps=10, epochs=None, layout="ddp1")  # fmt: skip
        slurm = {"slurm": "7_0"} if cluster == "slurm" else {}
        ledger.add(key, status=Status.QUEUED, **slurm)
        start = {"attempt": ATTEMPT, "host": os.uname().nodename, "pid": 99999999, **slurm}
        for line in [{"status": "running"}, result or {}] if lines is None else lines:
            ledger.add(key, **line, **(start if line.get("status") == "running" else {}))
    return sweep


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content) + "\n")
