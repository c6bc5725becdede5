"""The checkpoints of a run: written aside, made visible when whole, named `latest`, `best`, and by step."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as distributed
from torch import nn
from torch.optim import Optimizer

from danling_conf.build import process_group
from danling_conf.checkpoint import file_backend
from danling_conf.checkpoint.state import gather, misfit_of, misfit_of_groups, scatter_model, scatter_optimizer
from danling_conf.schema.checkpoint import CheckpointConfig

_log = logging.getLogger(__name__)

LATEST, BEST, FACTS = "latest", "best", "checkpoint.json"
_PARTS = ("model", "optimizer", "scheduler", "scaler", "runner", "settings")
_OWN_PARTS = ("loader", "generators")

Read = TypeVar("Read")


class NothingSaved(ValueError):
    """There is no checkpoint at all where one was looked for; not that one is broken."""


class CheckpointManager:
    """Saves and restores one run.

    Everything is collective: all ranks call it at the same step. Rank 0 gathers and writes the model and the optimizer;
    each rank writes its loaders and generators.

    Args:
        section: `checkpoint` of the configuration.
        run: the run's directory.
        rank, world_size: of this process.
    """

    def __init__(self, section: CheckpointConfig, run: Path, *, rank: int, world_size: int) -> None:
        self.enabled = not section.load_only
        self.folder = run / section.dir_name
        self.rank, self.world_size = rank, world_size

    def save(
        self,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        shared: dict[str, Any],
        own: dict[str, Any],
        step: int,
        history: bool,
        best: bool = False,
    ) -> Path | None:
        """Write a checkpoint; `latest`, and `best` where it is, point to it afterwards.

        Args:
            shared: further state that is the same on all ranks; plain values and tensors.
            own: this rank's own state.
            step: optimizer steps done.
            history: whether it is kept when a later one takes its names.

        Returns:
            The checkpoint's folder; None when checkpoints are not written.
        """
        if not self.enabled:
            return None
        name = f"ckpt-s{step:08d}"
        final, aside = self.folder / name, self.folder / f".{name}.tmp"
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self._barrier()
        state = gather(model, optimizer)
        file_backend.write(file_backend.rank_file(aside, self.rank), own)
        if self.rank == 0:
            file_backend.write(aside / file_backend.STATE, {**state, **shared})
        self._barrier()
        if self.rank == 0:
            history = history or self._in_history(final)
            facts = {
                "step": step,
                "world_size": self.world_size,
                "history": history,
                "optimizer": type(optimizer).__name__,
            }
            (aside / FACTS).write_text(json.dumps(facts) + "\n")
            file_backend.sync_folder(aside)
            self._publish(aside, final)
            self._point(LATEST, final)
            if best:
                self._point(BEST, final)
            self._prune()
        self._barrier()
        return final

    def restore(self, source: Path, *, model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load a checkpoint, or a run's latest one, into model and optimizer.

        Returns:
            What was saved as `shared` and as `own`; `own` is that of another rank where the world size was another.

        Raises:
            NothingSaved: there is no checkpoint at `source`.
            ValueError: the checkpoint is broken, or does not fit the model or the optimizer. On every rank, also where
                one alone cannot read it.
        """
        state, own = self._agreed(lambda: self._read(self.find(source), model, optimizer))
        scatter_model(model, state["model"])
        scatter_optimizer(model, optimizer, state["optimizer"])
        shared = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
        if self.world_size > 1:
            received = [shared]
            distributed.broadcast_object_list(received, src=0)
            shared = received[0]
        return shared, own

    def load_weights(self, source: Path, model: nn.Module) -> None:
        """Load only the model's weights. Raises ValueError as `restore` does."""
        scatter_model(model, self._agreed(lambda: self._read_state(self.find(source), model))["model"])

    def find(self, source: Path) -> Path:
        """The checkpoint folder that `source` names: itself, or the latest of a run.

        Raises NothingSaved when there is none.
        """
        folder = source / self.folder.name
        # A crash between two renames can leave `latest` pointing nowhere: then the newest whole one is it.
        for found in (source, folder / LATEST, *sorted(folder.glob("ckpt-*"), reverse=True)):
            if (found / FACTS).is_file():
                return found.resolve()
        raise NothingSaved(f"{source}: there is no whole checkpoint in it, nor as its {self.folder.name}/{LATEST}")

    def history(self, source: Path) -> list[Path]:
        """The checkpoints beside the one that `source` names, newest first."""
        folder = source / self.folder.name if (source / self.folder.name).is_dir() else source.resolve().parent
        named = source.resolve() if folder == source.resolve().parent else (folder / LATEST).resolve()
        return [found for found in sorted(folder.glob("ckpt-*"), reverse=True) if found != named]

    def _agreed(self, read: Callable[[], Read]) -> Read:
        """What `read` gives. It fails on all ranks where it fails on one, which the others would wait for for ever."""
        result, fault = None, None
        try:
            result = read()
        except ValueError as error:
            fault = error
        if self.world_size > 1:
            faults: list[Any] = [None] * self.world_size
            distributed.all_gather_object(faults, fault)
            fault = next((item for item in faults if item is not None), None)
        if fault is not None:
            raise fault
        return result  # type: ignore[return-value]

    def _read(self, folder: Path, model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        facts = self._facts(folder)
        made, mine = facts["optimizer"], type(optimizer).__name__
        if made != mine:
            raise ValueError(f"{folder}: it was made with the optimizer {made}, and this run's is {mine}")
        path = file_backend.rank_file(folder, self.rank % facts["world_size"])
        own = file_backend.read(path)
        if not (isinstance(own, dict) and own.keys() >= set(_OWN_PARTS)):
            raise ValueError(f"{path}: it is not a rank's part of a checkpoint, which holds {', '.join(_OWN_PARTS)}")
        own["same_world"] = facts["world_size"] == self.world_size
        state = self._read_state(folder, model)
        misfit = misfit_of_groups(optimizer, state["optimizer"]) if self.rank == 0 else None
        if misfit is not None:
            raise ValueError(f"{folder}: its optimizer does not fit: {misfit}")
        return state, own

    def _read_state(self, folder: Path, model: nn.Module) -> dict[str, Any]:
        """The state on rank 0, which holds it for all; empty parts elsewhere."""
        if self.rank != 0:
            return {part: {} for part in _PARTS}
        path = folder / file_backend.STATE
        state = file_backend.read(path)
        if not (isinstance(state, dict) and state.keys() >= set(_PARTS)):
            raise ValueError(f"{path}: it is not a checkpoint of a run, which holds {', '.join(_PARTS)}")
        misfit = misfit_of(model, state["model"])
        if misfit is not None:
            raise ValueError(f"{folder}: its weights do not fit the model: {misfit}")
        return state

    def _facts(self, folder: Path) -> dict[str, Any]:
        path = folder / FACTS
        if not path.is_file():
            return {}
        try:
            facts = json.loads(path.read_text())
            return {name: facts[name] for name in ("step", "world_size", "history", "optimizer")}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: it cannot be read: {type(error).__name__}: {error}") from error

    def _in_history(self, folder: Path) -> bool:
        """Whether a checkpoint is to be kept; a broken one is, for somebody to look at."""
        try:
            return bool(self._facts(folder).get("history", False))
        except ValueError:
            return True

    def _publish(self, aside: Path, final: Path) -> None:
        if final.exists():
            # The same step saved again, with another name beside it: the old one goes once the new one can replace it.
            old = final.with_name(f".{final.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
            os.replace(aside, final)
            shutil.rmtree(old)
        else:
            os.replace(aside, final)
        file_backend.sync_folder(self.folder)

    def _point(self, name: str, target: Path) -> None:
        temporary = self.folder / f".{name}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        os.replace(temporary, self.folder / name)
        file_backend.sync_folder(self.folder)

    def _prune(self) -> None:
        named = {(self.folder / name).resolve() for name in (LATEST, BEST)}
        for folder in self.folder.glob("ckpt-*"):
            if folder.resolve() not in named and not self._in_history(folder):
                # Renamed first: what is half removed must not look like a checkpoint.
                gone = folder.with_name(f".{folder.name}.old")
                os.replace(folder, gone)
                shutil.rmtree(gone)

    def _barrier(self) -> None:
        if self.world_size > 1:
            # Not on the group whose limit training tightens: rank 0 may write for long.
            process_group.wait_for_all()
