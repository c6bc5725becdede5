"""Rendezvous address of ranks under a launcher that sets none, such as srun; and what ranks may listen on.

Every rank derives the same address from Slurm's variables, since ranks cannot communicate before they have met.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, MutableMapping

from danling_conf.topology.rank_environment import RankEnvironment

LOOPBACK = "127.0.0.1"
ADDRESS_VARIABLE = "DANLING_CONF_ADDRESS"
"""Environment variable of a rank whose replica group has others on other machines: the address of its own."""
_log = logging.getLogger(__name__)


def listen(address: str, port: int) -> socket.socket:
    """A listening socket at one address of this machine: torch's stores listen on all of them by themselves.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the address is not of this machine, or the port is taken.
    """
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    return socket.create_server((address, port), family=family, backlog=socket.SOMAXCONN)


def listen_as_master(environment: Mapping[str, str]) -> int | None:
    """The descriptor of a socket that listens at MASTER_ADDR and MASTER_PORT, for the store that rank 0 serves.

    None where torch's store has to listen on all addresses, as it does by itself: MASTER_ADDR is a name that others may
    know under another address than this machine does, or an address that is translated on the way to this machine. Also
    where the port is taken, as by an earlier store of this process.
    """
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    try:
        known = {found[4][0] for found in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)}
        # Many machines have their own name at 127.0.1.1, where no other machine reaches them.
        if address not in {*known, "localhost"} and (len(known) > 1 or known <= {LOOPBACK, "127.0.1.1", "::1"}):
            return None
        return listen(address, port).detach()
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            _log.warning("%s: the store listens on all addresses of this machine: %s", address, error)
        return None


def keep_to_loopback(ranks: RankEnvironment, environment: MutableMapping[str, str]) -> None:
    """Let the ranks of a run on one machine communicate over its loopback interface, unless the environment says
    otherwise. Without this, gloo listens on the address of the machine's name."""
    names = {name for _, name in socket.if_nameindex()} & {"lo", "lo0"}
    # The address as well: ranks whose launcher does not say how many are on a node count as being on one.
    addresses = environment.get("MASTER_ADDR", LOOPBACK), environment.get(ADDRESS_VARIABLE, LOOPBACK)
    here = all(address in (LOOPBACK, "localhost", "::1") for address in addresses)
    if names and here and ranks.local_world_size == ranks.world_size:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(variable, min(names))


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
        return {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": _port(f"submitit {environment['SUBMITIT_LOCAL_JOB_ID']}")}
    if ranks.launcher != "srun":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if ranks.local_world_size == ranks.world_size:
        # All ranks are on one node. Its own name may not resolve there, and may lead through a firewall.
        address = LOOPBACK
    elif shutil.which("scontrol"):
        address = address_of_node(hosts_of(nodes)[0])
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


def hosts_of(nodes: str) -> list[str]:
    """The nodes that a list of Slurm's names: `n[1-3]`."""
    return _scontrol("show", "hostnames", nodes).split()


def address_of_node(node: str) -> str:
    """The address by which Slurm itself reaches a node, since its name may not resolve; the name where there is
    none."""
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("-o", "show", "node", node))
    return found[1] if found else node


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], capture_output=True, text=True, check=True).stdout
