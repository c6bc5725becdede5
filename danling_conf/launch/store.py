"""Rendezvous stores. Of ranks on one machine that a command has started: rank 0 serves it. Of ranks under torchrun or
srun: rank 0 publishes the frozen configuration, and the others read it.

There the configuration does not go through a file, since nodes may not share a file system, or see a new file only
later.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from danling_conf.schema.imports import import_large
from danling_conf.topology.rank_environment import RankEnvironment
from danling_conf.topology.rendezvous import listen_as_master, rendezvous_variables

_KEY = "danling_conf/frozen"
_READ = "danling_conf/read"
_DONE = "danling_conf/done"
_REFUSED = b"refused"
_WAIT = timedelta(minutes=10)
_LINGER_SECONDS = 10.0
SERVED_VARIABLE = "DANLING_CONF_STORE"
"""Environment variable of rank 0: the descriptor of the socket at which the command of local ranks listens."""
_served: Any = None
"""The store that this process serves: it ends with the last reference."""


def serve() -> None:
    """Serve the store of local ranks from now on, where this is their rank 0.

    Not in the process that started them: it would need torch, and ranks that save after its death need the store.
    """
    global _served
    distributed = import_large("torch.distributed")  # on every rank, since every rank needs it
    descriptor = os.environ.pop(SERVED_VARIABLE, "")
    if descriptor:
        _served = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=int(descriptor),
        )


def meet(ranks: RankEnvironment) -> Any:
    """The `torch.distributed.Store` of this world, at MASTER_ADDR and MASTER_PORT. Blocks until rank 0 serves it."""
    distributed = import_large("torch.distributed")
    for name, value in rendezvous_variables(ranks, os.environ).items():
        os.environ.setdefault(name, value)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun serves the store
        store, _, _ = next(iter(distributed.rendezvous("env://", ranks.rank, ranks.world_size, timeout=_WAIT)))
    else:
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            ranks.world_size,
            is_master=ranks.main,
            timeout=_WAIT,
            multi_tenant=True,  # a function that calls `init_process_group` itself then shares the server
            master_listen_fd=listen_as_master(os.environ) if ranks.main else None,
        )
    # torchrun restarts all ranks over the same store, where they would read the keys of the start before.
    return distributed.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def announce(store: Any, content: str | None, world_size: int) -> None:
    """Publish the frozen configuration as rank 0; None where it was refused."""
    store.set(_KEY, _REFUSED if content is None else content.encode())
    if content is None:
        # Rank 0 may be the store's server, and its exit would cut the others off: stay until they have read.
        deadline = time.monotonic() + _LINGER_SECONDS
        while store.add(_READ, 0) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)


def await_configuration(store: Any) -> str | None:
    """The configuration that rank 0 announced; None when it was refused."""
    store.wait([_KEY], _WAIT)
    content = store.get(_KEY)
    store.add(_READ, 1)
    return None if content == _REFUSED else content.decode()


def say_done(store: Any) -> None:
    """Count this rank as one whose function has returned."""
    store.add(_DONE, 1)


def await_others(store: Any, world_size: int) -> None:
    """Wait until the functions of all other ranks have returned; only then is the run complete.

    Where one fails instead, the launcher ends this process.
    """
    while store.add(_DONE, 0) < world_size - 1:
        time.sleep(0.05)
