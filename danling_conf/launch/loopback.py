"""Rendezvous of the ranks of one machine, for torch elastic: its store listens on the loopback interface only.

Elastic's own rendezvous listens on every interface of the machine, though all ranks are on it. A store takes commands
from whoever connects.
"""

from __future__ import annotations

from functools import cache

from danling_conf.topology.rendezvous import LOOPBACK, listen

_NAME = "danling_loopback"


@cache
def loopback() -> str:
    """Register the rendezvous with elastic. Returns its name, for `LaunchConfig.rdzv_backend`."""
    from torch.distributed import PrefixStore, TCPStore
    from torch.distributed.elastic.rendezvous import (
        RendezvousHandler,
        RendezvousInfo,
        RendezvousParameters,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )

    class LoopbackRendezvous(RendezvousHandler):
        """The rendezvous of one agent, which is all of its own world."""

        def __init__(self, parameters: RendezvousParameters) -> None:
            self._run_id = parameters.run_id
            listening = listen(LOOPBACK, 0)
            self._port = listening.getsockname()[1]
            self._store = TCPStore(
                LOOPBACK, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )

        @property
        def use_agent_store(self) -> bool:
            return True

        def get_backend(self) -> str:
            return _NAME

        def get_run_id(self) -> str:
            return self._run_id

        def next_rendezvous(self) -> RendezvousInfo:
            store = PrefixStore(self._run_id, self._store)
            return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(LOOPBACK, self._port))

        def num_nodes_waiting(self) -> int:
            return 0

        def is_closed(self) -> bool:
            return False

        def set_closed(self) -> None:
            """Does nothing: nobody else could join."""

        def shutdown(self) -> bool:
            return True

    rendezvous_handler_registry.register(_NAME, LoopbackRendezvous)
    return _NAME
