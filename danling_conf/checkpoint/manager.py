"""Checkpoint manager of a run: takes a snapshot, and writes it in the foreground or in the background."""

from __future__ import annotations

import io
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from danling_conf.checkpoint import durable, export, state
from danling_conf.checkpoint.background import Background, SaveFailed
from danling_conf.checkpoint.folder import EXPORT, Folder, name_of
from danling_conf.checkpoint.gather import address, gather, leads
from danling_conf.checkpoint.loading import Loader, gather_objects, on_all_ranks
from danling_conf.checkpoint.manifest import SAFETENSORS, Manifest
from danling_conf.checkpoint.replicas import ReplicaFolder
from danling_conf.checkpoint.several import class_of
from danling_conf.checkpoint.writing import Snapshot, Writer
from danling_conf.parallel import process_group
from danling_conf.schema.checkpoint import DISABLED, PINNED, CheckpointConfig, async_mode
from danling_conf.schema.layout import Layout
from danling_conf.topology.violation import PlainError

_log = logging.getLogger(__name__)


class CheckpointManager:
    """Saves and restores one run.

    Everything is collective: all ranks call it at the same step. A model may be several parts on a rank, the stages of
    a pipeline; names are those in the whole model.

    Args:
        section: `checkpoint` of the configuration.
        run: the run's directory.
        rank: rank of this process.
        layout, layout_name: layout of the ranks, and its name.
        allow_degree_change: whether checkpoints of other layouts may be loaded.
        check_token, token: see `Folder`.
        on_node: see `Loader`.
        whole: whether rank 0 has all tensors of a save, whole.
        groups: index of this replica group, number of them, and how often this one was started by a command that
            starts them all; 0 where it is a run of its own.

    Attributes:
        enabled: whether checkpoints are written.
        mode: how they are written: `disabled` (training waits), `async` or `async_with_pinned_mem`.
        loader: loads checkpoints into the model and the optimizer.
        unfinished: names of checkpoints that a killed attempt did not finish, and that were removed.
    """

    def __init__(
        self,
        section: CheckpointConfig,
        run: Path,
        *,
        rank: int,
        layout: Layout,
        layout_name: str,
        allow_degree_change: bool = False,
        check_token: Callable[[], None] = lambda: None,
        token: str = "",
        on_node: tuple[int, int] = (0, 1),
        whole: bool = False,
        groups: tuple[int, int, int] = (0, 1, 0),
    ) -> None:
        self.section, self.enabled = section, not section.load_only
        self.rank, self.layout, self.layout_name = rank, layout, layout_name
        self._group, self._groups, starts = groups
        # A name of its own for what each group has not finished: the ranks of a dead one may still write.
        mark = f"{token}-{self._group}-{starts}" if starts and token else token
        self.folder = Folder(run / section.dir_name, check_token, mark)
        several = layout.world_size > 1
        self.backend = section.backend if section.backend != "auto" else "dcp" if several and not whole else "file"
        self.replica = (
            ReplicaFolder(section, self.folder.path, rank, self._group if self._groups > 1 else None)
            if self._keeps_replicas
            else None
        )
        self.mode = async_mode(section)
        # Two threads must not share a process group: a collective of the save on one rank would be matched with one of
        # training on another.
        if several and not section.dedicated_async_process_group:
            self.mode = DISABLED
        self.background = Background()
        self._stager: DefaultStager | None = None
        self._writer: Writer | None = None
        self.loader = Loader(
            section,
            rank=rank,
            layout=layout,
            layout_name=layout_name,
            allow_degree_change=allow_degree_change,
            replica=self.replica,
            on_node=on_node,
        )
        self.unfinished: list[str] = []
        # Not where another group may be saving.
        first = self._group == 0 and starts <= 1 if starts else True
        if self.enabled and rank == 0 and first and self.folder.path.is_dir():
            self.unfinished = self.folder.repair()

    @property
    def _keeps_replicas(self) -> bool:
        return self.section.enable_ft_dataloader_checkpoints

    def save(
        self,
        *,
        parts: Sequence[nn.Module],
        optimizer: Optimizer,
        shared: dict[str, Any],
        own: dict[str, Any],
        step: int,
        epoch: int,
        between_epochs: bool = False,
        history: bool,
        best: bool = False,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Path | None:
        """Save the present state. `latest`, and `best` if it is the best one, point to it once it is complete.

        Unless `mode` is `disabled`, this returns after a copy was taken, and a background thread writes it. Only one
        save runs at a time: a second one waits for the first.

        Args:
            shared: further state that is the same on all ranks; plain values and tensors.
            own: this rank's own state.
            step, epoch: optimizer steps and epochs done.
            between_epochs: whether the checkpoint is named by its epoch.
            history: whether to keep it when `latest` and `best` have moved on.
            extra: further tensors by name, laid out as parameters are.

        Returns:
            The checkpoint's folder, which may not exist yet; None when checkpoints are not written.

        Raises:
            SaveFailed: this checkpoint, or the previous one, could not be written.
        """
        if not self.enabled:
            return None
        name = name_of(step, epoch if between_epochs else None)
        self._wait_for_previous(name)
        durable.enter(durable.STAGING)
        writer = self._writer_of_all()
        everything = state.model_tensors(parts) | state.optimizer_tensors(parts, optimizer) | dict(extra or {})
        options = state.options_of(parts, optimizer)
        if not self.section.save_frozen:
            left_out = state.frozen(parts)
            options["frozen"] = state.digests(left_out)
            everything = {name: item for name, item in everything.items() if name not in left_out}
        if self.layout.pipeline > 1:
            options = state.merged_options(gather_objects(options, self.layout.world_size))
        facts = self._facts(step, epoch, history, optimizer)
        # Serialized now: the background thread must not see objects that training goes on changing.
        saved = _bytes({**shared, "optimizer": options}) if self.rank == 0 else b""
        snapshot = Snapshot(
            name=name,
            tensors=self._copied_where_needed(everything),
            shared=saved,
            own=_bytes(own),
            facts=facts,
            best=best,
        )
        replica = None if self.replica is None else _bytes(own["loader"])
        if self.mode == DISABLED:
            self._write(writer, snapshot, replica)
        else:
            self.background.start(f"the checkpoint {name}", lambda: self._write(writer, snapshot, replica))
            durable.enter(durable.IDLE)
        return self.folder.path / name

    def save_place(self, own: dict[str, Any], *, step: int, epoch: int, between_epochs: bool = False) -> None:
        """Save what is this replica's own of a checkpoint that another replica group writes. Raises SaveFailed."""
        if self.enabled and self.replica is not None:
            self._write_place(self.replica, name_of(step, epoch if between_epochs else None), _bytes(own["loader"]))
            self.replica.prune({path.name for path in self.folder.path.glob("ckpt-*")}, newest=2)

    @staticmethod
    def _write_place(replica: ReplicaFolder, name: str, content: bytes) -> None:
        try:
            replica.write(name, content)
        except OSError as error:
            raise SaveFailed(f"{replica.path}: the loader's state could not be written: {error}") from error

    def export(self, *, parts: Sequence[nn.Module], optimizer: Optimizer, step: int, epoch: int) -> Path:
        """Write the model alone, as `checkpoint.export_dtype` says, to `export`. Raises SaveFailed, on every rank."""
        self._wait_for_previous(EXPORT)
        tensors = gather(state.model_tensors(parts), self.layout, self.rank)
        staging, final = self.folder.staging(EXPORT), self.folder.path / EXPORT

        def write_export() -> None:
            if self.rank != 0:
                return export.drain(tensors)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            facts = self._facts(step, epoch, False, optimizer, backend=SAFETENSORS)
            try:
                export.write(staging, parts, tensors, facts, self.section.export_dtype)
            finally:
                export.drain(tensors)  # if this rank fails half-way, the others are still in the gather's collectives
            self.folder.publish(staging, EXPORT)

        try:
            on_all_ranks(write_export, self.layout.world_size, (OSError, RuntimeError, ValueError, ImportError))
        except PlainError:  # another attempt has the run
            raise
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise SaveFailed(f"{final}: the model could not be exported: {error}") from error
        return final

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self.background.busy

    def check(self) -> None:
        """Raise SaveFailed if a background save has failed. Does not block; not collective."""
        if self.background.failure is not None and not self.background.busy:
            self.background.check()

    def drain(self, limit: float | None = None) -> None:
        """Wait for the running save, at most `limit` or `checkpoint.wait_timeout` seconds. Raises SaveFailed."""
        self.background.wait(self.section.wait_timeout if limit is None else limit)

    def close(self) -> None:
        """Release the manager's memory. Call `drain` first: a running save may be lost."""
        if self._stager is not None:
            self._stager.close()
            self._stager = None

    def _wait_for_previous(self, name: str) -> None:
        if self.background.busy:
            _log.info("%s waits for %s, which is still being written", name, self.background.what)
        seconds = self.background.wait()
        if seconds > 1:
            _log.info(
                "%s waited %.1f s for the save before it: saves take longer than the time between them", name, seconds
            )

    def _writer_of_all(self) -> Writer:
        """The writer, made at the first save: it may need a process group, whose creation is collective."""
        if self._writer is None:
            dedicated = self.section.dedicated_async_process_group
            group = process_group.separate(self.section.async_process_group_backend) if dedicated else None
            self._writer = Writer(
                self.folder,
                rank=self.rank,
                world_size=self.layout.world_size,
                group=group if dedicated else process_group.slow_work(),
                keep=self.section.keep_latest_k,
            )
        return self._writer

    def _write(self, writer: Writer, snapshot: Snapshot, replica: bytes | None) -> None:
        if self.replica is not None and replica is not None:
            self._write_place(self.replica, snapshot.name, replica)
        writer.write_checkpoint(snapshot)
        if self.replica is not None:
            self.replica.prune({path.name for path in self.folder.path.glob("ckpt-*")})

    def _copied_where_needed(self, everything: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that this rank writes, copied where training continues before they are written."""
        copy = self.mode != DISABLED
        if self.backend == "dcp":
            if not leads(self.layout, self.rank):
                everything = {name: item for name, item in everything.items() if not state.is_whole(item)}
            return self._copied(everything) if copy else everything
        whole = dict(gather(everything, self.layout, self.rank))
        if not copy:
            return whole
        # The gather has copied what was sharded or on an accelerator. Only tensors on the CPU are still live.
        live = {address(item) for item in everything.values()}
        return whole | self._copied({name: item for name, item in whole.items() if address(item) in live})

    def _copied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._stager is None:
            pinned = self.mode == PINNED and torch.accelerator.is_available()
            options = StagingOptions(
                use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
            )
            self._stager = DefaultStager(options)
        return self._stager.stage(tensors)  # type: ignore[return-value]

    def _facts(
        self, step: int, epoch: int, history: bool, optimizer: Optimizer, backend: str | None = None
    ) -> Manifest:
        return Manifest(
            step=step,
            epoch=epoch,
            saved=datetime.now().astimezone().isoformat(timespec="seconds"),
            backend=backend or self.backend,
            layout=self.layout_name,
            degrees=self.layout.degrees(),
            fsdp=self.layout.fsdp,
            history=history,
            optimizer=class_of(optimizer),
            groups=self._groups,
            group=self._group,
        )


def _bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
