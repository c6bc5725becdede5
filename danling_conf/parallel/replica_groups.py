"""Replica groups of TorchFT: the manager of one rank, and averages over the ranks of the same place in all groups.

A replica group is a world of its own, with its own mesh. Rank r of one group meets rank r of the others in a process
group that is made anew whenever a group joins or leaves. What a step is made of becomes valid by a vote: errors of
communication are not raised, and gradients are garbage until then.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from danling_conf.parallel.process_group import gathered
from danling_conf.schema.fault_tolerance import AUTO, FtConfig
from danling_conf.topology.rendezvous import ADDRESS_VARIABLE, LOOPBACK

_log = logging.getLogger(__name__)
_OVERRULING = ("TORCHFT_TIMEOUT_SEC", "TORCHFT_QUORUM_TIMEOUT_SEC", "TORCHFT_CONNECT_TIMEOUT_SEC",
               "TORCHFT_QUORUM_RETRIES")  # fmt: skip
"""Variables by which torchft silently replaces what it is passed."""
_BUCKET_BYTES = 1 << 25
"""Largest buffer in which gradients are averaged together."""
_PAUSE_SECONDS = 0.3
"""Between two questions for a quorum that was not found."""


class NoQuorum(RuntimeError):
    """There were too few groups, or no lighthouse, for as long as a group waits."""


class ReplicaGroup:
    """This rank's side of the agreement between groups.

    Args:
        index: of this group, from 0.
        rank, world_size: of this process in its group.
        store: address and port of the group's own store.
        lighthouse: address, `http://HOST:PORT`.
        step: optimizer steps done, as all groups count them.
        state: returns this rank's training state: plain values and local tensors, for a group that joins.
        load: takes such a state over.
        stopped: whether a signal has asked this rank to stop, which then does not wait any longer.
    """

    def __init__(
        self,
        section: FtConfig,
        *,
        index: int,
        rank: int,
        world_size: int,
        store: tuple[str, int],
        lighthouse: str,
        step: int,
        state: Callable[[], dict[str, Any]],
        load: Callable[[dict[str, Any]], None],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        # torchft's servers say something of every quorum otherwise.
        os.environ.setdefault("RUST_LOG", "error")
        from danling_conf.parallel.weights_transport import WeightsTransport

        self.section, self.index = section, index
        self.healed = False
        """Whether the last quorum has brought this group to the state of another."""
        self._began_at = step
        self._vote_limit = timedelta(seconds=section.timeout_seconds)
        self._load, self._stopped = load, stopped
        for name in _OVERRULING:
            if os.environ.pop(name, None) is not None:
                _log.warning("%s is set, and not read: the settings of ft say how long is waited", name)
        address = address_of(section)
        with _listening_at(address):
            self.manager = _manager_class()(
                pg=_process_group(section),
                load_state_dict=None,
                state_dict=None,
                min_replica_size=section.min_replica_size,
                # The state is sent while nothing runs: during a forward pass of FSDP2 parameters are gathered.
                use_async_quorum=False,
                timeout=timedelta(seconds=section.timeout_seconds),
                quorum_timeout=timedelta(seconds=section.quorum_timeout_seconds),
                connect_timeout=timedelta(seconds=section.timeout_seconds),
                quorum_retries=section.quorum_retries,
                rank=rank,
                world_size=world_size,
                store_addr=store[0],
                store_port=store[1],
                lighthouse_addr=lighthouse,
                # torchft reads the number at the end, and appends what makes each start of a group another member.
                replica_id=f"group-{index}",
                # It would let each rank of a group take over from another group. Weights are compared instead.
                init_sync=False,
                hostname=address,
                checkpoint_transport=WeightsTransport(address),
            )
        self.manager.register_state_dict_fn("training", self._take_over, state)
        self.manager.load_state_dict({"step": step, "batches_committed": 0})

    def _take_over(self, state: dict[str, Any]) -> None:
        self._load(state)
        self.healed = True

    @property
    def step(self) -> int:
        """Steps that groups have agreed on."""
        return int(self.manager.current_step())

    @property
    def participants(self) -> int:
        """Groups that take part in the step under way."""
        return int(self.manager.num_participants())

    def begin(self) -> bool:
        """Meet the other groups before a step. The first step of a run waits for all groups. Collective in the group.

        Returns:
            Whether this group was behind, and has taken over the state of another.

        Raises:
            NoQuorum: there were too few groups for `ft.quorum_timeout_seconds`, or no lighthouse.
        """
        deadline = time.monotonic() + self.section.quorum_timeout_seconds
        self.healed = False
        while True:
            self._quorum(deadline)
            short = self.step == self._began_at and self.participants < self.section.group_size
            # The ranks of a group fetch from different ones, of which one may have died: all go on, or none.
            if not any(gathered(self.manager.errored() is not None)) and not short:
                return self.healed
            # A round without a step: the others do the same, or refuse theirs.
            if any(gathered(time.monotonic() > deadline)):
                raise NoQuorum(f"{self.participants} of {self.section.group_size} groups came to the first step")
            self.manager.report_error(RuntimeError("the group cannot begin the step"))
            self.manager.should_commit(timeout=self._vote_limit)
            time.sleep(_PAUSE_SECONDS)

    def _quorum(self, deadline: float) -> None:
        """Ask for a quorum until there is one. A lighthouse that is gone for a while ends nobody."""
        share = self.section.quorum_timeout_seconds / (self.section.quorum_retries + 1)
        while True:
            left = deadline - time.monotonic()
            try:
                # Not less than a second: ranks of a group ask at slightly different moments, and wait for each other.
                self.manager.start_quorum(timeout=timedelta(seconds=max(1.0, min(left, share))))
                return
            except (TimeoutError, RuntimeError, ConnectionError) as error:
                if time.monotonic() >= deadline or self._stopped():
                    # Not the error's own text, which is a record of gRPC's.
                    raise NoQuorum("the lighthouse named no quorum: it is gone, or groups are too few") from error
                _log.warning("no quorum yet: %s", str(error).partition("\n")[0])
                self.manager.forget_quorum()
                time.sleep(min(_PAUSE_SECONDS, max(0.0, left)))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors in place over the groups that take part. What went wrong shows in the vote only."""
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                self._reduce(bucket[0].view(-1))
                continue
            flat = torch.cat([item.reshape(-1) for item in bucket])
            self._reduce(flat)
            for item, part in zip(bucket, flat.split([item.numel() for item in bucket]), strict=True):
                item.copy_(part.view_as(item))

    def _reduce(self, flat: Tensor) -> None:
        self.manager.allreduce(flat).wait()

    def are_equal(self, number: int) -> bool:
        """Whether a whole number, of at most 48 bits, is the same in all groups. Counts only with the vote."""
        halves = torch.tensor([number >> 24, number & 0xFFFFFF], dtype=torch.float64)
        means = halves.clone()
        self._reduce(means)
        return bool(torch.equal(means, halves))

    def commit(self) -> bool:
        """Vote on the step: whether all ranks of this group have got everything. Collective in the group."""
        return bool(self.manager.should_commit(timeout=self._vote_limit))

    def close(self) -> None:
        """Leave the other groups."""
        self.manager.shutdown(wait=False)


def address_of(section: FtConfig) -> str:
    """The address of this machine at which other groups reach it. Raises OSError where `auto` finds none."""
    if section.address == AUTO:
        return socket.gethostbyname(socket.gethostname())
    return section.address or os.environ.get(ADDRESS_VARIABLE, LOOPBACK)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its shard, or all of it. Shares the memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _process_group(section: FtConfig) -> Any:
    from torchft.process_group import ProcessGroupGloo, ProcessGroupNCCL

    timeout = timedelta(milliseconds=section.process_group_timeout_ms)
    return ProcessGroupNCCL(timeout=timeout) if section.process_group == "nccl" else ProcessGroupGloo(timeout=timeout)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype and device, in order, as many as fit into a buffer."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for item in tensors:
        kinds.setdefault((item.dtype, item.device), []).append(item)
    for items in kinds.values():
        bucket: list[Tensor] = []
        size = 0
        for item in items:
            if bucket and size + item.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            if item.numel():
                bucket.append(item)
                size += item.nbytes
        if bucket:
            yield bucket


def _manager_class() -> Any:
    # It logs every vote of every rank.
    for name in ("torchft", "torchft_quorums", "torchft_commits"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from torchft.manager import Manager

    class RetryingManager(Manager):
        """A manager that can ask for a quorum again after that failed; torchft's raises the same error for ever."""

        def forget_quorum(self) -> None:
            self._quorum_future = None

    return RetryingManager


@contextmanager
def _listening_at(address: str) -> Iterator[None]:
    """Let torchft's manager listen at one address: by itself it listens on all of this machine's."""
    from torchft import manager

    server = manager.ManagerServer

    def at_address(*arguments: Any, bind: str, **options: Any) -> Any:
        host = f"[{address}]" if ":" in address else address
        return server(*arguments, bind=f"{host}:{bind.rpartition(':')[2]}", **options)

    manager.ManagerServer = at_address
    try:
        yield
    finally:
        manager.ManagerServer = server
