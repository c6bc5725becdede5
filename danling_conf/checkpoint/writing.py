"""Writing one checkpoint: every rank its files, then all of them durable, then visible. The same for both backends."""

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
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from danling_conf.checkpoint import durable, manifest
from danling_conf.checkpoint.background import SaveFailed
from danling_conf.checkpoint.durable import Sum
from danling_conf.checkpoint.folder import BEST, LATEST, Folder
from danling_conf.checkpoint.manifest import Manifest
from danling_conf.checkpoint.safe_load import ordinary_errors
from danling_conf.checkpoint.sources import STATE

SHARED = "shared.pt"


def rank_file(rank: int) -> str:
    """Name of the file of a rank's own state: loaders and random number generators."""
    return f"rank-{rank}.pt"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A checkpoint that is ready to be written: nothing in it changes any more."""

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
    """Writes checkpoints into a run's folder. Collective: every rank writes the same job.

    Args:
        group: what the ranks agree over; None is the default group.
        keep: history checkpoints to retain; 0 keeps all.
    """

    def __init__(self, folder: Folder, *, rank: int, world_size: int, group: Any, keep: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._group, self._keep = group, keep

    def write(self, job: Job) -> None:
        """Write, make durable, make visible, and remove what is not kept. Raises SaveFailed, on every rank."""
        aside = self.folder.aside(job.name)
        self._together(job, lambda: self._make_room(aside))
        sums = self._together(job, lambda: self._write_files(job, aside))
        files = {name: item for found in sums for name, item in found.items()}
        self._together(job, lambda: self._commit(job, aside, files) if self.rank == 0 else None)
        durable.enter(durable.IDLE)

    def _make_room(self, aside: Path) -> None:
        if self.rank == 0:
            self.folder.guard()
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def _write_files(self, job: Job, aside: Path) -> dict[str, Sum]:
        durable.enter(durable.WRITING)
        sums = self._write_shards(job, aside) if job.facts.backend == "dcp" else self._write_state(job, aside)
        sums[rank_file(self.rank)] = durable.write(aside / rank_file(self.rank), job.own)
        if self.rank == 0:
            sums[SHARED] = durable.write(aside / SHARED, job.shared)
        durable.enter(durable.MAKING_DURABLE)
        for name in sums:
            durable.sync(aside / name)
        return sums

    def _write_state(self, job: Job, aside: Path) -> dict[str, Sum]:
        if self.rank != 0:
            return {}
        with durable.create(aside / STATE) as file:
            torch.save(job.tensors, file)  # type: ignore[arg-type]
        return {STATE: file.sum}

    def _write_shards(self, job: Job, aside: Path) -> dict[str, Sum]:
        writer = _ShardWriter(aside)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with ordinary_errors("shards"):
            dcp.save(
                job.tensors, storage_writer=writer, planner=planner, process_group=self._group,
                no_dist=self.world_size == 1,
            )  # fmt: skip
        return writer.sums

    def _commit(self, job: Job, aside: Path, files: Mapping[str, Sum]) -> None:
        facts = replace(job.facts, files=files)
        manifest.write(aside, facts)
        durable.sync(aside)
        durable.enter(durable.RENAMING)
        final = self.folder.publish(aside, job.name)
        for name in (LATEST, BEST) if job.best else (LATEST,):
            self.folder.point(name, final)
        durable.enter(durable.PRUNING)
        self.folder.prune(self._keep)

    def _together(self, job: Job, do: Callable[[], Any]) -> list[Any]:
        """What every rank's `do` gives. It fails on all ranks where it fails on one."""
        result, fault = None, None
        try:
            result = do()
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            fault = error
        outcomes: list[Any] = [(result, fault and _told(fault))]
        if self.world_size > 1:
            outcomes = [None] * self.world_size
            distributed.all_gather_object(outcomes, (result, fault and _told(fault)), group=self._group)
        faults = [f"rank {rank}: {text}" if self.world_size > 1 else text
                  for rank, (_, text) in enumerate(outcomes) if text]  # fmt: skip
        if faults:
            if self.rank == 0:
                shutil.rmtree(self.folder.aside(job.name), ignore_errors=True)
            raise SaveFailed(self._message(job.name, faults)) from fault
        return [found for found, _ in outcomes]

    def _message(self, name: str, faults: list[str]) -> str:
        reasons = "; ".join(dict.fromkeys(faults))
        return (
            f"{self.folder.path / name}: the checkpoint could not be written: {reasons}; what was saved before is "
            "whole: mend that, and go on by resume"
        )


class _Files(FileSystem):
    """Takes the checksums of the files that DCP writes."""

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
    """DCP's writer into a folder that is there and empty; durability is seen to by `Writer`."""

    def __init__(self, path: Path) -> None:
        # With several threads it loses a thread's error and says that all went well.
        super().__init__(path, single_file_per_rank=True, sync_files=False, thread_count=1)
        self.fs = _Files()

    @property
    def sums(self) -> dict[str, Sum]:
        return self.fs.sums  # type: ignore[attr-defined]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future = super().write_data(plan, planner)
        missing = {item.index for item in plan.items} - {result.index for result in future.wait()}
        if missing:
            raise OSError(errno.EIO, f"{len(missing)} of {len(plan.items)} entries were not written", str(self.path))
        return future


def _told(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        told = f"{error.strerror}: {error.filename}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            parent = next(path for path in Path(error.filename).parents if path.exists())
            told += f" ({shutil.disk_usage(parent).free} bytes are free)"
        return told
    return f"{type(error).__name__}: {error}".splitlines()[0]
