"""Sweeps as a user submits them, and what they leave behind."""

from __future__ import annotations

from pathlib import Path

from danling_conf.records.ledger import Ledger, Record
from tests.support.commands import Result, run
from tests.support.slurm_cluster import Cluster

APP = Path(__file__).with_name("slurm_app.py")
LIMIT = 150.0
SETTINGS = ["hydra/launcher=danling_slurm", "seed=1", "checkpoint.async_enabled=false", "log_interval=1000"]
"""Common to all: saves are done when they are said to be, and a run logs little."""


def command(root: Path, *more: str) -> list[str | Path]:
    return [APP, *more, *SETTINGS, f"workspace_root={root}"]


def submit(cluster: Cluster, root: Path, *more: str, limit: float = LIMIT) -> Result:
    return run(command(root, *more), cwd=root, env=cluster.environment, limit=limit)


def sweep_of(root: Path) -> Path:
    (found,) = root.glob("lin/exp/sweeps/*")
    return found


def jobs_of(root: Path) -> list[Record]:
    return list(Ledger(sweep_of(root)).records().values())


def slurm_job(cluster: Cluster, record: Record) -> dict[str, str]:
    return cluster.job(record.facts["slurm"])


def statuses(root: Path) -> list[str]:
    """The state of every job; [] before there is a sweep."""
    if not list(root.glob("lin/exp/sweeps/*/jobs.jsonl")):
        return []
    return [record.status for record in jobs_of(root)]


def write_recipes(root: Path, **launchers: dict[str, int]) -> None:
    """A folder of configs with recipes that differ in settings of the launcher."""
    folder = root / "conf" / "recipe"
    folder.mkdir(parents=True)
    for name, settings in launchers.items():
        lines = "".join(f"    {key}: {value}\n" for key, value in settings.items())
        (folder / f"{name}.yaml").write_text(f"# @package _global_\nhydra:\n  launcher:\n{lines}")
