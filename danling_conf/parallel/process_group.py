"""Process groups of a run and their timeouts."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from danling_conf._torch_private.dispatch import real_tensors
from danling_conf._torch_private.distributed import forget_meshes, process_groups, set_timeout
from danling_conf.schema.process import CommConfig
from danling_conf.topology.rendezvous import LOOPBACK, listen_as_master
from danling_conf.topology.violation import ConfigRefused, Violation, unique

_waiting: tuple[dist.ProcessGroup | None, dist.ProcessGroup] | None = None
"""The group for slow work, and the default group that existed when it was made."""


_separate: list[dist.ProcessGroup] = []
"""Groups whose timeout stays: they wait for disks, not for training."""
_FOR_DISKS = timedelta(days=1)
_stores = 0
"""How many stores this process has used."""
_FOR_STORES = timedelta(minutes=30)
"""How long ranks wait for each other where no limit is set: torch's own limit."""


def is_distributed() -> bool:
    """Whether this process is one of several: a world of one may have a process group all the same."""
    return dist.is_initialized() and dist.get_world_size() > 1


def start(
    section: CommConfig,
    device_type: str,
    *,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> None:
    """Initialise the default process group, with `comm.init_timeout_seconds` as the timeout of its collectives.

    CPU tensors always go over gloo; an accelerator has its own backend beside it (`cpu:gloo,cuda:nccl`). Without a
    `store`, ranks meet as the launcher's environment says (`MASTER_ADDR`, `RANK`, ...); without a launcher this process
    is a world of one.

    Raises ValueError where a store comes without rank and world size: an error of the caller, not of a setting.
    """
    backend = (
        "gloo" if device_type == "cpu" else f"cpu:gloo,{device_type}:{dist.get_default_backend_for_device(device_type)}"
    )
    seconds = section.init_timeout_seconds
    timeout = None if seconds is None else timedelta(seconds=seconds)
    # A world of one needs no address to meet at. A shell inside an allocation has RANK-like variables but no address.
    if store is None and rank is None and ("RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1"):
        store, rank, world_size = dist.HashStore(), 0, 1
    if store is None and {"MASTER_ADDR", "MASTER_PORT"} <= set(os.environ):
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _store_of(rank, world_size, timeout or _FOR_STORES)
    if store is None:  # torchrun serves one; or torch says what is missing
        dist.init_process_group(backend, timeout=timeout)
        return
    if rank is None or world_size is None:
        raise ValueError(f"rank={rank}, world_size={world_size}: a store needs both; pass them with it")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _store_of(rank: int, world_size: int, timeout: timedelta) -> dist.Store | None:
    """The store of the launcher's environment, which rank 0 serves; None where torchrun serves it."""
    global _stores
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        listening = listen_as_master(os.environ) if rank == 0 else None
        return dist.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            multi_tenant=True,
            master_listen_fd=listening,
        )
    if address != LOOPBACK or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # Local workers, which may start groups again: in a part of the store without the keys of earlier ones.
    _stores += 1
    store = dist.TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)
    return dist.PrefixStore(f"danling_conf-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}-{_stores}", store)


def tighten(section: CommConfig) -> None:
    """Apply `comm.train_timeout_seconds` to every process group there is. Collective: every rank calls it.

    Meant for once, after the first optimizer step: what is slow only at the start (compilation, connections) is over.
    Work of a single rank that may take longer is waited for on the group of `slow_work`, which keeps the limit of the
    start.
    """
    global _waiting
    if section.train_timeout_seconds is None or not dist.is_initialized():
        return
    # A rank that is still on its way here must not be measured by the new timeout.
    dist.barrier()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    groups = process_groups()
    kept = _waiting_group()
    if kept is None:
        seconds = section.init_timeout_seconds
        timeout = None if seconds is None else timedelta(seconds=seconds)
        _waiting = (dist.group.WORLD, dist.new_group(backend="gloo", timeout=timeout))
    for group in groups:
        if group is not kept and not any(group is other for other in _separate):
            set_timeout(group, timedelta(seconds=section.train_timeout_seconds))


def gathered(value: Any) -> list[Any]:
    """What every rank passes, by rank; without several ranks, only this one's. It pickles. Collective, over the CPU."""
    if not is_distributed():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    with real_tensors():
        dist.all_gather_object(found, value)
    return found


def refuse_together(faults: Sequence[Violation]) -> None:
    """Refuse on all ranks alike where any of them has found a fault: a rank that raised alone would leave the others
    waiting for it. Collective.

    Raises:
        ConfigRefused: with the faults of all ranks.
    """
    found = unique(fault for of_rank in gathered(list(faults)) for fault in of_rank)
    if found:
        raise ConfigRefused(found)


def separate(backend: str) -> dist.ProcessGroup | None:
    """A group of all ranks for work in the background, such as writing a checkpoint. It does not delay the collectives
    of training, and their timeout does not apply: a lost rank is noticed by its connection. Collective; None in a
    single process."""
    if not is_distributed():
        return None
    group = dist.new_group(backend=backend, timeout=_FOR_DISKS)
    _separate.append(group)
    return group


def slow_work() -> dist.ProcessGroup | None:
    """The group on which ranks wait for what one of them does alone, such as writing files: it keeps the time limit of
    the start. None is the default group."""
    return _waiting_group() if dist.is_initialized() else None


def _waiting_group() -> dist.ProcessGroup | None:
    """The group that `tighten` made, if the default group is still the same; None stands for the default group."""
    if _waiting is None or _waiting[0] is not dist.group.WORLD:
        return None
    return _waiting[1]


def stop() -> None:
    """Destroy every process group, if there are any."""
    global _waiting
    _waiting = None
    _separate.clear()
    if dist.is_initialized():
        # What outlives the groups and refers to them makes torch 2.13 crash or abort now and then: sharded models in
        # reference cycles, and meshes in torch's own caches.
        forget_meshes()
        gc.collect()
        dist.destroy_process_group()
