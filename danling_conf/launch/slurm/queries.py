"""Queries of Slurm through its commands: partitions before submission, jobs afterwards.

They parse text, not `--json`: only sinfo and squeue have that, and not on every cluster.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from danling_conf.records.status import Status

_SECONDS = 60
"""Timeout of a Slurm command. The controller normally answers in milliseconds."""

ENDS = {
    "COMPLETED": Status.COMPLETED,
    "FAILED": Status.FAILED,
    "CANCELLED": Status.CANCELLED,
    "TIMEOUT": Status.TIMED_OUT,
    "DEADLINE": Status.TIMED_OUT,
    "OUT_OF_MEMORY": Status.OUT_OF_MEMORY,
    "NODE_FAIL": Status.NODE_LOST,
    "BOOT_FAIL": Status.NODE_LOST,
    "PREEMPTED": Status.PREEMPTED,
    "REVOKED": Status.CANCELLED,
}
"""Slurm's final states, and the status of each."""
_TASK = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,\-]+): (?P<how>.+)$", re.MULTILINE)


class SlurmUnavailable(RuntimeError):
    """Slurm does not answer."""


@dataclass(frozen=True, kw_only=True)
class Partition:
    """What a partition offers; None where Slurm does not say or sets no limit."""

    name: str
    nodes: int
    """Nodes that a job can have."""
    gpus_per_node: int
    """GPUs of the node that has the most."""
    cpus_per_node: int
    """CPUs of the node that has the fewest."""
    minutes: float | None
    """Longest time limit."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says of a job."""

    state: str
    """Slurm's own word: `PENDING`, `RUNNING`, `COMPLETED`."""
    reason: str = ""
    exit_code: str = ""


def run(*argv: str) -> str:
    """Output of a Slurm command. Raises SlurmUnavailable with the last line of its error."""
    if shutil.which(argv[0]) is None:
        raise SlurmUnavailable(f"{argv[0]} is not installed here: submit from a machine of the cluster")
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmUnavailable(f"{' '.join(argv)}: no answer within {_SECONDS} s") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise SlurmUnavailable(f"{argv[0]}: {lines[-1]}")
    return done.stdout


def partition(name: str | None) -> Partition:
    """The partition of that name, or the default one. Raises SlurmUnavailable, or LookupError where it does not
    exist."""
    lines = run("sinfo", "-h", "-N", "-O", "NodeList:|,PartitionName:|,CPUs:|,Gres:|,Time:|,Default:|,MaxCPUsPerNode:|")
    rows = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines() if line.strip()]
    default = default_partition() if name is None else name
    mine = [row for row in rows if row[1] == default]
    if not mine:
        raise LookupError(f"there is no partition {default}; there are {', '.join(sorted({row[1] for row in rows}))}")
    limits = run("scontrol", "-o", "show", "partition", default)
    shown = dict(item.split("=", 1) for item in limits.split() if "=" in item)
    nodes = len(mine)
    if shown.get("MaxNodes", "UNLIMITED").isdigit():
        nodes = min(nodes, int(shown["MaxNodes"]))
    return Partition(
        name=default,
        nodes=nodes,
        gpus_per_node=max(_gpus(row[3]) for row in mine),
        cpus_per_node=min(int(row[2]) for row in mine),
        minutes=_minutes(shown.get("MaxTime", "UNLIMITED")),
    )


def default_partition() -> str:
    """Name of the default partition. Raises LookupError where there is none."""
    for line in run("scontrol", "-o", "show", "partition").splitlines():
        if "Default=YES" in line:
            return re.search(r"PartitionName=(\S+)", line)[1]  # type: ignore[index]
    raise LookupError("the cluster has no default partition")


def largest_array() -> int:
    """The largest number of jobs in an array."""
    # MaxArraySize is one more than the highest index that sbatch accepts.
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config"), re.MULTILINE)
    return max(1, int(found[1]) - 1) if found else 1000


def states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """States of the jobs that Slurm still knows, by `ID` or `ARRAY_TASK`.

    The queue shows jobs for some minutes after their end (MinJobAge); accounting, where there is any, has older ones.

    Raises SlurmUnavailable where squeue does not answer.
    """
    wanted = set(job_ids)
    # squeue first: sacct reads a database that lags behind the controller by seconds, and many clusters have none.
    # `-r` lists each task of an array. All jobs of the user in one call: a call for each would overload the controller.
    found: dict[str, JobState] = {}
    for line in run("squeue", "--states=all", "-r", "-h", "--me", "-o", "%i|%T|%r").splitlines():
        job_id, state, reason = line.split("|", 2)
        if job_id in wanted:
            found[job_id] = JobState(state=state, reason=reason)
    missing = wanted - found.keys()
    if missing:
        found |= _accounted(missing)
    return found


def show(job_id: str) -> dict[str, str]:
    """The fields of `scontrol show job`. Raises SlurmUnavailable, also where Slurm no longer knows the job."""
    return dict(item.split("=", 1) for item in run("scontrol", "-o", "show", "job", job_id).split() if "=" in item)


def node_state(name: str) -> str:
    """Slurm's words for a node: `IDLE`, `MIXED`, `DOWN`; with `+NOT_RESPONDING`, or `*` at the end, where it does not
    answer. Raises SlurmUnavailable."""
    shown = run("scontrol", "-o", "show", "node", name)
    return next((item[6:] for item in shown.split() if item.startswith("State=")), "")


def first_death(log: Path, since: int = 0) -> str | None:
    """The first task of a step that failed, and how, as srun printed it; None where it printed nothing.

    A task that was killed cannot write its own error.

    Args:
        log: standard error of the batch script, over all starts of the job.
        since: size of the log, in bytes, when the newest start started.
    """
    try:
        text = log.read_bytes()[since:].decode(errors="replace")
    except OSError:
        return None
    found = _TASK.search(text)
    if found is None:
        return None
    hint = ": memory may have run out" if found["how"] in ("Killed", "Out Of Memory") else ""
    how = "killed (SIGKILL)" if found["how"] == "Killed" else found["how"]
    several = "ranks" if re.search(r"[,\-]", found["ranks"]) else "rank"
    return f"{several} {found['ranks']} on {found['node']}: {how}{hint}"


def time_of(stamp: str) -> float | None:
    """A time stamp of Slurm in seconds since 1970; None for `Unknown`, `N/A` and the like."""
    try:
        return datetime.strptime(stamp, "%Y-%m-%dT%H:%M:%S").timestamp()
    except ValueError:
        return None


def own_job(environment: Mapping[str, str] = os.environ) -> str:
    """The id of this process's job: `ARRAY_TASK` for a task of an array.

    SLURM_JOB_ID is a number of its own for each task, which neither sbatch nor squeue's `%i` shows.
    """
    if "SLURM_ARRAY_JOB_ID" in environment:
        return f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    return environment["SLURM_JOB_ID"]


def _accounted(job_ids: set[str]) -> dict[str, JobState]:
    """States of jobs from accounting; {} where the cluster has none."""
    if shutil.which("sacct") is None:
        return {}
    try:
        lines = run("sacct", "-n", "-P", "-X", "-j", ",".join(sorted(job_ids)), "-o", "JobID,State,ExitCode")
    except SlurmUnavailable:
        return {}
    found = {}
    for line in lines.splitlines():
        job_id, state, code = line.split("|")
        found[job_id] = JobState(state=state.split()[0], exit_code=code)  # the state may be "CANCELLED by 1000"
    return {job_id: state for job_id, state in found.items() if job_id in job_ids}


def _gpus(gres: str) -> int:
    """GPUs in a list of generic resources: `gpu:8`, `gpu:a100:4(S:0-1),shard:16`."""
    return sum(int(count) for count in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))


def _minutes(limit: str) -> float | None:
    """A time limit in minutes: `1-12:00:00`, `02:00:00`, `30:00`, `UNLIMITED`."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(item or 0) for item in found.groups())
    return days * 1440 + hours * 60 + minutes + seconds / 60
