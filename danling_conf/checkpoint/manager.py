"""The checkpoints of a run: written aside, made visible when whole, named `latest`, `best`, and by step."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as distributed
from torch import nn
from torch.optim import Optimizer

from danling_conf.checkpoint import file_backend
from danling_conf.checkpoint.state import gather, scatter_model, scatter_optimizer
from danling_conf.schema.checkpoint import CheckpointConfig

_log = logging.getLogger(__name__)

LATEST, BEST, FACTS = "latest", "best", "checkpoint.json"


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
            history = history or self._facts(final).get("history", False)
            facts = {"step": step, "world_size": self.world_size, "history": history}
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
            ValueError: there is no whole checkpoint at `source`.
        """
        folder = self.find(source)
        state = self._read_state(folder)
        scatter_model(model, state["model"])
        scatter_optimizer(model, optimizer, state["optimizer"])
        shared = {key: value for key, value in state.items() if key not in ("model", "optimizer")}
        saved = self._facts(folder).get("world_size", 1)
        own = file_backend.read(file_backend.rank_file(folder, self.rank % saved))
        own["same_world"] = saved == self.world_size
        if self.world_size > 1:
            received = [shared]
            distributed.broadcast_object_list(received, src=0)
            shared = received[0]
        return shared, own

    def load_weights(self, source: Path, model: nn.Module) -> None:
        """Load only the model's weights. Raises ValueError as `restore` does."""
        scatter_model(model, self._read_state(self.find(source))["model"])

    def find(self, source: Path) -> Path:
        """The checkpoint folder that `source` names: itself, or the latest of a run.

        Raises ValueError when there is none.
        """
        for folder in (source, source / self.folder.name / LATEST):
            if (folder / FACTS).is_file():
                return folder.resolve()
        raise ValueError(
            f"{source}: there is no whole checkpoint in it, nor as its {self.folder.name}/{LATEST}: "
            "give a run that has saved, or one of its checkpoints"
        )

    def _read_state(self, folder: Path) -> dict[str, Any]:
        # Rank 0's reading decides for all: a rank that went on alone would wait for the others for ever.
        if self.rank == 0:
            try:
                state, fault = file_backend.read(folder / file_backend.STATE), None
            except ValueError as error:
                state, fault = {}, str(error)
        else:
            state, fault = {"model": {}, "optimizer": {}}, None
        if self.world_size > 1:
            faults = [fault]
            distributed.broadcast_object_list(faults, src=0)
            fault = faults[0]
        if fault is not None:
            raise ValueError(fault)
        return state

    def _facts(self, folder: Path) -> dict[str, Any]:
        path = folder / FACTS
        return json.loads(path.read_text()) if path.is_file() else {}

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
            if folder.resolve() not in named and not self._facts(folder).get("history", False):
                # Renamed first: what is half removed must not look like a checkpoint.
                gone = folder.with_name(f".{folder.name}.old")
                os.replace(folder, gone)
                shutil.rmtree(gone)

    def _barrier(self) -> None:
        if self.world_size > 1:
            distributed.barrier()
