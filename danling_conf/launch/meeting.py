"""Ranks that somebody else started meet: rank 0 resolves the configuration, the others read what it froze."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from danling_conf.topology.rank_environment import RankEnvironment

_KEY = "danling_conf/frozen"
_READ = "danling_conf/read"
_REFUSED = b"refused"
_WAIT = timedelta(minutes=10)
_LINGER_SECONDS = 10.0


def meet(ranks: RankEnvironment) -> Any:
    """The `torch.distributed.Store` of this world, at MASTER_ADDR and MASTER_PORT."""
    import torch.distributed as distributed

    for name, value in master_address(ranks, os.environ).items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RANK", str(ranks.rank))
    os.environ.setdefault("WORLD_SIZE", str(ranks.world_size))
    store, _, _ = next(iter(distributed.rendezvous("env://", ranks.rank, ranks.world_size, timeout=_WAIT)))
    # torchrun may start all ranks again over the same store.
    return distributed.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def announce(store: Any, content: str | None, world_size: int) -> None:
    """Rank 0 gives the frozen configuration to the others; None tells them that it was refused."""
    store.set(_KEY, _REFUSED if content is None else content.encode())
    if content is None:
        # Rank 0 may hold the store itself: it stays until the others have read, or have had the time to.
        deadline = time.monotonic() + _LINGER_SECONDS
        while store.add(_READ, 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def await_configuration(store: Any) -> str | None:
    """What rank 0 announced; None when the configuration was refused."""
    store.wait([_KEY], _WAIT)
    content = store.get(_KEY)
    store.add(_READ, 1)
    return None if content == _REFUSED else content.decode()


def master_address(ranks: RankEnvironment, environment: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT where the launcher gives none: srun's first node, and a port of the job's own."""
    if ranks.launcher != "srun":
        return {}
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    if ranks.local_world_size == ranks.world_size:
        address = "127.0.0.1"
    elif shutil.which("scontrol"):
        address = _address_of(_scontrol("show", "hostnames", nodes).split()[0])
    else:
        raise RuntimeError(f"MASTER_ADDR is not set, and scontrol, which tells the first of {nodes}, is not installed")
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    step = ".".join(environment.get(name, "0") for name in names)
    # Below the ports that systems give to outgoing connections.
    port = 15000 + int(hashlib.sha256(step.encode()).hexdigest(), 16) % 17000
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _address_of(node: str) -> str:
    """The address by which Slurm itself reaches a node; its name where that is all there is."""
    found = re.search(r"\bNodeAddr=(\S+)", _scontrol("-o", "show", "node", node))
    return found[1] if found else node


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", *words], capture_output=True, text=True, check=True).stdout
