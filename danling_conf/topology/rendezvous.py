"""Rendezvous address of ranks under a launcher that sets none, such as srun.

Every rank derives the same address from Slurm's variables, since ranks cannot communicate before they have met.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Mapping

from danling_conf.topology.rank_environment import RankEnvironment


def rendezvous_variables(ranks: RankEnvironment, environment: Mapping[str, str]) -> dict[str, str]:
    """Environment variables of torch's rendezvous: RANK, WORLD_SIZE, LOCAL_RANK and, if the launcher sets none,
    MASTER_ADDR and MASTER_PORT."""
    return {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "LOCAL_RANK": str(ranks.local_rank),
        **_master_address(ranks, environment),
    }


def _master_address(ranks: RankEnvironment, environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: the first node of the job, and a port that differs between jobs of a node."""
    if ranks.launcher == "submitit":
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port(f"submitit {environment['SUBMITIT_LOCAL_JOB_ID']}")}
    if ranks.launcher != "srun":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if ranks.local_world_size == ranks.world_size:
        # All ranks are on one node. Its own name may not resolve there, and may lead through a firewall.
        address = "127.0.0.1"
    elif shutil.which("scontrol"):
        address = _address_of(_scontrol("show", "hostnames", nodes).split()[0])
    else:
        raise RuntimeError(f"MASTER_ADDR is not set, and scontrol, which finds the first of {nodes}, is not installed")
    # The restart count is part of it: ranks of a lost node may still listen on the port of the earlier start.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return {"MASTER_ADDR": address, "MASTER_PORT": _port(".".join(environment.get(name, "0") for name in names))}


def _port(job: str) -> str:
    """A port derived from the job, the same on all ranks, and below the range of ephemeral ports: there, any outgoing
    connection could have taken it."""
    # Not `hash()`, which Python seeds differently in each process.
    return str(15000 + int(hashlib.sha256(job.encode()).hexdigest(), 16) % 17000)


def _address_of(node: str) -> str:
    """The address by which Slurm itself reaches a node, since its name may not resolve; the name where there is
    none."""
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("-o", "show", "node", node))
    return found[1] if found else node


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
