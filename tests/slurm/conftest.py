"""One private cluster for all tests of Slurm; without Slurm they are reported as not run, unless it is required."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.slurm_cluster import ACCOUNTING_PROGRAMS, PROGRAMS, Cluster, missing

_PREEMPTION = "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE"
_PARTITIONS = (
    "PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=15\n"
    "PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10\n"
    "PartitionName=short Nodes=ALL MaxTime=30 MaxNodes=1 State=UP PriorityTier=1"
)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster of two nodes with eight CPUs and four GPUs each."""
    _need(PROGRAMS)
    # pytest's own folders are too long a path for sockets.
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        Cluster(Path(folder), gpus=4, partitions=_PARTITIONS, extra=_PREEMPTION) as cluster,
    ):
        yield cluster


@pytest.fixture(scope="session")
def accounted() -> Iterator[Cluster]:
    """A cluster whose jobs are found by sacct alone: the queue forgets them at once."""
    _need((*PROGRAMS, *ACCOUNTING_PROGRAMS))
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder,
        Cluster(Path(folder), accounting=True, min_job_age=2) as cluster,
    ):
        yield cluster


def _need(programs: tuple[str, ...]) -> None:
    absent = missing(programs)
    if absent and os.environ.get("DANLING_REQUIRE_SLURM") == "1":
        pytest.fail(f"DANLING_REQUIRE_SLURM is set, and {', '.join(absent)} are not installed")
    if absent:
        pytest.skip(f"not run: needs {', '.join(absent)}")
