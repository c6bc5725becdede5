"""Small sweeps on this machine, and sweeps that only exist as files."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.status import Status
from danling_conf.records.sweep_directory import SweepDirectory
from tests.support.commands import Result, run, started, wait_for

APP = Path(__file__).with_name("gated_app.py")


def command(root: Path, *overrides: str) -> list[str | Path]:
    return [APP, "-m", "steps=3", f"workspace_root={root / 'ws'}", f"data.gate={root / 'gate'}", *overrides]


def run_sweep(root: Path, *overrides: str) -> Result:
    """A sweep, run to its end."""
    return run(command(root, *overrides), cwd=root)


@contextmanager
def started_sweep(root: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """The command of a sweep, which runs; what waits in it goes on when the block ends."""
    with started(command(root, *overrides), cwd=root) as process:
        wait_for(lambda: list(root.rglob("jobs.jsonl")), "the ledger")
        try:
            yield process
        finally:
            (root / "gate").touch()


def sweep_in(root: Path) -> SweepDirectory:
    (found,) = root.rglob("jobs.jsonl")
    return SweepDirectory(path=found.parent)


def records(root: Path) -> list[Record]:
    """The jobs of the only sweep below a directory, as its ledger has them."""
    return list(sweep_in(root).ledger.records().values())


def states(root: Path) -> list[str]:
    return [record.status for record in records(root)] if list(root.rglob("jobs.jsonl")) else []


def wait_for_states(root: Path, *expected: str) -> None:
    wait_for(lambda: states(root) == list(expected), f"jobs to be {expected}")


def write_sweep(path: Path, jobs: list[dict[str, Any]], *, cluster: str = "local", **launcher: Any) -> SweepDirectory:
    """A sweep that never ran: files as the command that started it has written them.

    Args:
        jobs: for each, `lr`, `config` for further settings, and `lines` for the ledger.
    """
    path.mkdir(parents=True)
    ledger = Ledger(path)
    for number, job in enumerate(jobs):
        key = f"{number:x}" * 12
        config = {"optim": {"lr": job["lr"]}, "score_mode": None, "score_name": "loss", **job.get("config", {})}
        folder = path / "jobs" / key
        folder.mkdir(parents=True)
        overrides = [f"optim.lr={job['lr']}", *job.get("overrides", [])]
        content = {"key": key, "job": number, "config": config, "overrides": overrides, "launcher": launcher}
        (folder / "job.json").write_text(json.dumps(content))
        ledger.add(key, job=number, job_id=key, config_id=key, status=Status.PLANNED, overrides=overrides,
                   run=str(path.parent.parent / f"run{number}"), steps=10)  # fmt: skip
        for line in job.get("lines", []):
            ledger.add(key, **line)
    asked = {"cluster": cluster, "launcher": {"on_failure": "continue", **launcher}, "command": ["train.py", "-m"]}
    (path / "sweep.json").write_text(json.dumps(asked))
    return SweepDirectory(path=path)


def slurm_of(folder: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    """Stand-ins for Slurm's commands: one job in a state, which `scancel` cancels."""
    folder.mkdir()
    (folder / "state").write_text(state)
    scripts = {
        "squeue": f'echo "7_0|$(cat {folder}/state)|None"',
        "scancel": f'echo "$@" >> {folder}/cancelled; echo CANCELLED > {folder}/state',
        "scontrol": "echo ExitCode=7:0",
        "sbatch": "exit 1",
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
