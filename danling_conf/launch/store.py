"""Store at which the ranks of torchrun or srun meet: rank 0 publishes the frozen configuration, the others read it."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

from danling_conf.topology.rank_environment import RankEnvironment
from danling_conf.topology.rendezvous import rendezvous_variables

_KEY = "danling_conf/frozen"
_READ = "danling_conf/read"
_DONE = "danling_conf/done"
_REFUSED = b"refused"
_WAIT = timedelta(minutes=10)
_LINGER_SECONDS = 10.0


def meet(ranks: RankEnvironment) -> Any:
    """The `torch.distributed.Store` of this world, at MASTER_ADDR and MASTER_PORT."""
    import torch.distributed as distributed

    for name, value in rendezvous_variables(ranks, os.environ).items():
        os.environ.setdefault(name, value)
    store, _, _ = next(iter(distributed.rendezvous("env://", ranks.rank, ranks.world_size, timeout=_WAIT)))
    # torchrun may restart all ranks over the same store: keys of an earlier start must not be read.
    return distributed.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def announce(store: Any, content: str | None, world_size: int) -> None:
    """Publish, as rank 0, the frozen configuration; None where it was refused."""
    store.set(_KEY, _REFUSED if content is None else content.encode())
    if content is None:
        # Rank 0 may be the store's server: it stays until the others have read, or have had the time to.
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
    """Count this rank as one that has come to the end of its function."""
    store.add(_DONE, 1)


def await_others(store: Any, world_size: int) -> None:
    """Wait until all other ranks have come to the end of their function: a run is not complete before they have. Where
    one fails instead, the launcher ends this one."""
    while store.add(_DONE, 0) < world_size - 1:
        time.sleep(0.05)
