"""Writer of checkpoints: every rank writes its files, all are made durable, and then the checkpoint becomes visible.

Both backends share this, so that neither can publish a checkpoint that is not complete on the disk.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.serialization import get_crc32_options, set_crc32_options

from danling_conf.checkpoint import durable, manifest
from danling_conf.checkpoint.background import SaveFailed
from danling_conf.checkpoint.durable import Sum
from danling_conf.checkpoint.folder import BEST, LATEST, Folder
from danling_conf.checkpoint.manifest import Manifest
from danling_conf.checkpoint.safe_load import ordinary_errors
from danling_conf.checkpoint.sources import STATE
from danling_conf.parallel.waiting import waiting
from danling_conf.topology.violation import PlainError

SHARED = "shared.pt"


def rank_file(rank: int) -> str:
    """Name of the file of a rank's own state: loaders and random number generators."""
    return f"rank-{rank}.pt"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A checkpoint that is ready to be written. Training no longer changes anything in it."""

    name: str
    tensors: dict[str, Tensor]
    """For `dcp`, this rank's share of all tensors; for `file`, all of them on rank 0 and none elsewhere."""
    shared: bytes
    """State that is the same on all ranks, as `torch.save` writes it; used on rank 0."""
    own: bytes
    """This rank's own state, likewise."""
    facts: Manifest
    best: bool


class Writer:
    """Writes checkpoints into a run's folder. Collective: every rank writes its part of a checkpoint.

    Args:
        group: process group for the collectives of a save; None is the default group.
        keep: history checkpoints to keep; 0 keeps all.
    """

    def __init__(self, folder: Folder, *, rank: int, world_size: int, group: Any, keep: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._group, self._keep = group, keep

    def write_checkpoint(self, snapshot: Snapshot) -> None:
        """Write a checkpoint, publish it, and prune older ones. Raises SaveFailed, on every rank."""
        staging = self.folder.staging(snapshot.name)
        self._together(snapshot, lambda: self._make_room(staging))
        sums = self._together(snapshot, lambda: self._write_files(snapshot, staging))
        files = {name: item for found in sums for name, item in found.items()}
        self._together(snapshot, lambda: self._commit(snapshot, staging, files) if self.rank == 0 else None)
        durable.enter(durable.IDLE)

    def _make_room(self, staging: Path) -> None:
        if self.rank == 0:
            self.folder.check_token()
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)

    def _write_files(self, snapshot: Snapshot, staging: Path) -> dict[str, Sum]:
        durable.enter(durable.WRITING)
        sums = (
            self._write_shards(snapshot, staging)
            if snapshot.facts.backend == "dcp"
            else self._write_state(snapshot, staging)
        )
        sums[rank_file(self.rank)] = durable.write_file(staging / rank_file(self.rank), snapshot.own)
        if self.rank == 0:
            sums[SHARED] = durable.write_file(staging / SHARED, snapshot.shared)
        durable.enter(durable.MAKING_DURABLE)
        for name in sums:
            durable.sync(staging / name)
        return sums

    def _write_state(self, snapshot: Snapshot, staging: Path) -> dict[str, Sum]:
        if self.rank != 0:
            return {}
        with durable.create(staging / STATE) as file, _without_inner_checksums():
            torch.save(snapshot.tensors, file)  # type: ignore[arg-type]
        return {STATE: file.sum}

    def _write_shards(self, snapshot: Snapshot, staging: Path) -> dict[str, Sum]:
        writer = _ShardWriter(staging)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with ordinary_errors("shards"), waiting("the shards of a checkpoint"), _without_inner_checksums():
            save(
                snapshot.tensors,
                storage_writer=writer,
                planner=planner,
                process_group=self._group,
                no_dist=self.world_size == 1,
            )
        return writer.files.sums

    def _commit(self, snapshot: Snapshot, staging: Path, files: Mapping[str, Sum]) -> None:
        # The order is what makes a crash harmless: files, manifest, folder entries, rename, links, and only then the
        # removal of older checkpoints.
        facts = replace(snapshot.facts, files=files)
        manifest.write(staging, facts)
        durable.sync(staging)
        durable.enter(durable.RENAMING)
        final = self.folder.publish(staging, snapshot.name, facts)
        for name in (LATEST, BEST) if snapshot.best else (LATEST,):
            self.folder.point(name, final)
        durable.enter(durable.PRUNING)
        self.folder.prune(self._keep)

    def _together(self, snapshot: Snapshot, do: Callable[[], Any]) -> list[Any]:
        """What `do` returned on every rank. If it fails on one rank, it fails on all: with SaveFailed, or the plain
        error of a rank."""
        result, fault = None, None
        try:
            result = do()
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            fault = error
        # A plain error, such as that another attempt has the run, is no fault of the disk, and stays what it is.
        own = (result, fault and _reason(fault), fault if isinstance(fault, PlainError) else None)
        outcomes: list[Any] = [own]
        if self.world_size > 1:
            outcomes = [None] * self.world_size
            with waiting("the other ranks' part of a checkpoint"):
                distributed.all_gather_object(outcomes, own, group=self._group)
        faults = [
            f"rank {rank}: {text}" if self.world_size > 1 else text
            for rank, (_, text, _) in enumerate(outcomes)
            if text
        ]
        if faults:
            if self.rank == 0:
                shutil.rmtree(self.folder.staging(snapshot.name), ignore_errors=True)
            for *_, plain in outcomes:
                if plain is not None:
                    raise plain
            raise SaveFailed(self._message(snapshot.name, faults)) from fault
        return [found for found, *_ in outcomes]

    def _message(self, name: str, faults: list[str]) -> str:
        reasons = "; ".join(dict.fromkeys(faults))
        return (
            f"{self.folder.path / name}: the checkpoint could not be written: {reasons}; earlier checkpoints are "
            "complete: fix the cause, and resume the run"
        )


@contextmanager
def _without_inner_checksums() -> Iterator[None]:
    """Let `torch.save` write no checksum of each tensor: that of the file covers every byte, and is compared when it is
    loaded, which torch's are not."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


class _Files(FileSystem):
    """File system of DCP's writer that takes the checksum of every file."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        with durable.create(Path(path)) as file:
            yield file
        self.sums[Path(path).name] = file.sum

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _ShardWriter(FileSystemWriter):
    """DCP's writer, into an existing empty folder. `Writer` makes the files durable."""

    def __init__(self, path: Path) -> None:
        # One thread: with several, DCP loses the error of a thread and reports success.
        super().__init__(path, single_file_per_rank=True, sync_files=False, thread_count=1)
        self.fs = self.files = _Files()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        # A second guard against errors that DCP loses: every entry must have been written.
        missing = {item.index for item in plan.items} - {result.index for result in future.wait()}
        if missing:
            raise OSError(errno.EIO, f"{len(missing)} of {len(plan.items)} entries were not written", str(self.path))
        return future


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        reason = f"{error.strerror}: {error.filename}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            parent = next(path for path in Path(error.filename).parents if path.exists())
            reason += f" ({shutil.disk_usage(parent).free} bytes are free)"
        return reason
    return f"{type(error).__name__}: {error}".splitlines()[0]
