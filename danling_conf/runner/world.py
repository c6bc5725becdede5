"""World of a run: its ranks meet and form the process group and the mesh, under one configuration."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import DeviceMesh

from danling_conf.config.identity import differences, job_id, plain
from danling_conf.parallel import mesh as meshes
from danling_conf.parallel import process_group
from danling_conf.parallel.device import device_type, local_device
from danling_conf.records.current import Current, current
from danling_conf.records.frozen import freeze_attempt
from danling_conf.records.run_directory import Attempt, claim, refusing_unwritable, warn
from danling_conf.records.run_lock import RankLock, RunLock
from danling_conf.schema import Layout, RunnerConfig
from danling_conf.topology.layout import data_rank, layout_of, random_stream
from danling_conf.topology.rank_environment import SINGLE, RankEnvironment, started_rank
from danling_conf.topology.rendezvous import keep_to_loopback, rendezvous_variables
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands among the ranks."""

    ranks: RankEnvironment
    layout: Layout
    device: torch.device
    mesh: DeviceMesh | None
    expert_mesh: DeviceMesh | None
    """The same ranks on the axes of the experts; None for a layout without."""
    stream: int
    """Of random numbers, see `topology.layout.random_stream`."""
    attempt: Attempt
    lock: RunLock | RankLock | None
    """Of the run directory, or this rank's share of it, where the runner itself claimed it; None under a launcher."""
    group: int
    """Index of this rank's replica group."""
    groups: int
    """Number of replica groups; 1 without fault tolerance."""
    repeats_signals: bool
    """Whether signals are sent again while a run saves, see `Current`."""

    @property
    def data_rank(self) -> int:
        """Among the data ranks of all groups."""
        return self.group * self.layout.data_degree + self.rank_in_group

    @property
    def data_degree(self) -> int:
        """Of all groups together."""
        return self.groups * self.layout.data_degree

    @property
    def rank_in_group(self) -> int:
        """Among the data ranks of this group. They share an evaluation: each group does all of it, so that what follows
        from it is the same in all of them, whichever take part."""
        return data_rank(self.layout, self.ranks.rank)


def join(config: RunnerConfig) -> World:
    """Join the world that this process was started for: by our `main`, by a launcher, or alone.

    Raises ConfigRefused on every rank when the ranks do not have the same configuration.
    """
    started = current()
    ranks = started.ranks if started is not None else started_rank() or SINGLE
    layout = layout_of(config)
    if layout.world_size != ranks.world_size:
        raise ConfigRefused([_wrong_size(layout, ranks)])
    kind = device_type(config.parallel.mesh_device_type)
    device = local_device(kind, ranks.local_rank)
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    if ranks.world_size > 1 or layout.fsdp or config.stack == "deepspeed":
        if not distributed.is_initialized():
            if config.ft.address is None:
                keep_to_loopback(ranks, os.environ)
            store = started.store if started is not None else None
            rank, size = (ranks.rank, ranks.world_size) if store is not None else (None, None)
            if store is None and ranks.world_size > 1:
                for name, value in rendezvous_variables(ranks, os.environ).items():
                    os.environ.setdefault(name, value)
            process_group.start(config.comm, kind, store=store, rank=rank, world_size=size)
        _compare(config, ranks)
    attempt, lock = _claimed(config, ranks, started)
    mesh = meshes.make(layout, kind, use_device_mesh=config.parallel.use_device_mesh)
    several = config.ft.enabled
    group = ranks.group if ranks.groups > 1 else config.ft.replica_id if several else 0
    stream = random_stream(layout, ranks.rank, sequence_parallel=config.parallel.sequence_parallel)
    return World(
        ranks=ranks,
        layout=layout,
        device=device,
        mesh=mesh,
        expert_mesh=meshes.make_expert(layout, mesh),
        stream=group * layout.world_size + stream,
        attempt=attempt,
        lock=lock,
        group=group,
        groups=config.ft.group_size if several else 1,
        repeats_signals=started is not None and started.repeats_signals,
    )


def _wrong_size(layout: Layout, ranks: RankEnvironment) -> Violation:
    found = "this process is alone" if ranks.world_size == 1 else f"{ranks.launcher} started {ranks.world_size}"
    return Violation(
        "parallel",
        ABSENT,
        f"its degrees multiply to {layout.world_size} processes, and {found}",
        f"start {layout.world_size} with torchrun or danling_conf.main, or choose a layout of {ranks.world_size}",
    )


def _claimed(
    config: RunnerConfig, ranks: RankEnvironment, started: Current | None
) -> tuple[Attempt, RunLock | RankLock | None]:
    """The attempt: the launcher's, else claimed by rank 0 for all ranks."""
    if started is not None:
        return started.attempt, None
    outcome: list[Any] = [None]
    lock = None
    if ranks.main:
        try:
            attempt, lock = claim(config)
            with refusing_unwritable(config):
                freeze_attempt(config, attempt, Path(sys.argv[0]).absolute())
            warn(attempt, config)
            outcome = [attempt.to_json()]
        except ConfigRefused as refusal:
            outcome = [refusal]
    if ranks.world_size > 1:
        distributed.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], ConfigRefused):
        raise outcome[0]
    attempt = Attempt.from_json(outcome[0])
    return attempt, lock or RankLock(attempt.run_directory, attempt.token)


def _compare(config: RunnerConfig, ranks: RankEnvironment) -> None:
    """Refuse different configurations: the ranks would train something else than configured, or wait for ever."""
    if ranks.world_size == 1:
        return
    mine = plain(config)
    hashes: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(hashes, job_id(config))
    if len(set(hashes)) == 1:
        return
    first = [mine]
    distributed.broadcast_object_list(first, src=0)
    everywhere: list[Any] = [None] * ranks.world_size
    distributed.all_gather_object(everywhere, differences(mine, first[0]))
    raise ConfigRefused(
        [
            Violation(path, theirs, f"rank {rank} has this, and rank 0 has {ours}", "start all ranks the same way")
            for rank, changed in enumerate(everywhere)
            for path, (theirs, ours) in changed.items()
        ]
    )
