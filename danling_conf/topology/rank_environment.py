"""Rank environment of this process: the only reader of the variables of torchrun, srun, submitit and our workers."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation


@dataclass(frozen=True, kw_only=True)
class RankEnvironment:
    """The place of this process among those that a launcher started."""

    launcher: str
    """Name of the launcher, for messages."""
    rank: int
    """Index among all processes."""
    world_size: int
    """Number of processes."""
    local_rank: int
    """Index among the processes of this node."""
    local_world_size: int
    """Number of processes on this node."""
    group: int = 0
    """Index of its replica group, where one command started several; ranks are counted within one."""
    groups: int = 1
    """Number of those groups."""
    starts: int = 1
    """How often its replica group was started in this attempt."""

    @property
    def number(self) -> int:
        """Index among the processes of all groups: it is in the names of files that each process has."""
        return self.group * self.world_size + self.rank

    @property
    def total(self) -> int:
        """Number of processes of all groups."""
        return self.groups * self.world_size

    @property
    def main(self) -> bool:
        """Whether this is rank 0, which writes shared files."""
        return self.rank == 0


SINGLE = RankEnvironment(launcher="none", rank=0, world_size=1, local_rank=0, local_world_size=1)
"""A process that no launcher started."""


FROZEN_VARIABLE = "DANLING_CONF_FROZEN"
"""Environment variable that names the frozen configuration of a worker."""
JOB_VARIABLE = "DANLING_CONF_JOB"
"""Environment variable with the path of the job file that a process runs."""
CLUSTER_VARIABLE = "DANLING_CONF_CLUSTER"
"""Environment variable: `slurm` in a process that is one rank of a job; unset where it runs the whole job here."""
GROUP_VARIABLE = "DANLING_CONF_GROUP"
"""Environment variable of a rank whose command has started several replica groups: `INDEX GROUPS STARTS`."""


def in_group(rank: RankEnvironment, environment: Mapping[str, str] = os.environ) -> RankEnvironment:
    """A local worker's rank, with the replica group that it is in."""
    found = re.fullmatch(r"(\d+) (\d+) (\d+)", environment.get(GROUP_VARIABLE, "0 1 1"))
    if found is None:
        raise _contradiction(f"{GROUP_VARIABLE}={environment[GROUP_VARIABLE]} does not name a replica group")
    group, groups, starts = map(int, found.groups())
    return replace(rank, group=group, groups=groups, starts=starts)


def started_rank(environment: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """The rank that a launcher assigned to this process; None when no launcher started it.

    Raises ConfigRefused when the variables contradict each other.
    """
    in_step = "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = RankEnvironment(
            launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "the environment (RANK, WORLD_SIZE)",
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", "RANK"),
            local_world_size=_number(environment, "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
        )
        # srun starts one torchrun on each node, which starts the ranks: they rightly differ from srun's tasks.
        if in_step and found.launcher != "torchrun" and _number(environment, "SLURM_STEP_NUM_TASKS") > 1:
            of_srun = (_number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS"))
            if of_srun != (found.rank, found.world_size):
                raise _contradiction(
                    f"RANK and WORLD_SIZE say rank {found.rank} of {found.world_size}, and srun says rank {of_srun[0]} "
                    f"of {of_srun[1]}"
                )
    # Every shell inside an allocation has the variables of the job. Only srun sets those of a step.
    elif in_step:
        found = RankEnvironment(
            launcher="srun",
            rank=_number(environment, "SLURM_PROCID"),
            world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(environment, "SLURM_LOCALID"),
            # Not SLURM_NTASKS_PER_NODE, which is what was requested: nodes of a step may have different counts.
            local_world_size=_tasks_of_node(environment),
        )
    elif environment.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in environment:
        found = RankEnvironment(
            launcher="submitit",
            rank=_number(environment, "SUBMITIT_LOCAL_GLOBALID"),
            world_size=_number(environment, "SUBMITIT_LOCAL_NTASKS"),
            local_rank=_number(environment, "SUBMITIT_LOCAL_LOCALID"),
            local_world_size=_number(environment, "SUBMITIT_LOCAL_NTASKS"),
        )
    else:
        return None
    if not (0 <= found.rank < found.world_size and 0 <= found.local_rank < found.local_world_size <= found.world_size):
        raise _contradiction(
            f"{found.launcher} describes an impossible process: rank {found.rank} of {found.world_size}, "
            f"local rank {found.local_rank} of {found.local_world_size}"
        )
    return found


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Tasks of this node, from a list such as `4(x2),1`: four on each of two nodes, and one on a third."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["SLURM_STEP_NUM_TASKS"])
    counts: list[int] = []
    for item in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if found is None:
            raise _contradiction(f"SLURM_STEP_TASKS_PER_NODE={text} is not a list of numbers of tasks")
        counts += [int(found[1])] * int(found[2] or 1)
    node = _number(environment, "SLURM_NODEID") if "SLURM_NODEID" in environment else 0
    if node >= len(counts):
        raise _contradiction(f"SLURM_NODEID={node}, and SLURM_STEP_TASKS_PER_NODE={text} names {len(counts)} nodes")
    return counts[node]


def _number(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        if name in environment:
            text = environment[name]
            if not text.isdigit():
                raise _contradiction(f"{name}={environment[name]} is not a number")
            return int(text)
    raise _contradiction(f"{names[0]} is missing")


def _contradiction(rule: str) -> ConfigRefused:
    return ConfigRefused(
        [Violation("environment", ABSENT, rule, "start with torchrun or srun, or unset its variables")]
    )
