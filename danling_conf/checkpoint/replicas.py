"""Replica folders: the dataloader states of each replica, next to the checkpoints, for fault-tolerant training.

A replica that restarts alone continues its own data, while the model comes from the checkpoint of all replicas.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from danling_conf.checkpoint import durable
from danling_conf.checkpoint.durable import Sum
from danling_conf.checkpoint.manifest import Broken
from danling_conf.schema.checkpoint import CheckpointConfig
from danling_conf.schema.files import read_object

VARIABLE = "FT_REPLICA_ID"


class ReplicaFolder:
    """The dataloader states of the replica that this rank belongs to.

    `checkpoint.ft_replica_id` names the replica, else the environment variable FT_REPLICA_ID, else it is the replica
    group, and without those the rank. With replica groups a name is followed by the group's number.
    """

    def __init__(self, section: CheckpointConfig, folder: Path, rank: int, group: int | None = None) -> None:
        named = section.ft_replica_id or os.environ.get(VARIABLE)
        self.replica = named or str(rank if group is None else group)
        if named and group is not None:
            self.replica = f"{named}-{group}"  # one setting for all groups of a command
        self.path = folder / f"{section.ft_dataloader_checkpoint_prefix}-{self.replica}"
        self._suffix = f".rank-{rank}"

    def write(self, checkpoint: str, content: bytes) -> None:
        """Write the state that belongs to a checkpoint, whole or not at all. Raises OSError."""
        self.path.mkdir(parents=True, exist_ok=True)
        data, facts = self._files(checkpoint)
        # First the checksum goes, then the data is replaced: a crash in between leaves no checksum, not a wrong one.
        facts.unlink(missing_ok=True)
        staging = data.with_name(f".{data.name}")
        found = durable.write_file(staging, content)
        durable.sync(staging)
        os.replace(staging, data)
        staging = facts.with_name(f".{facts.name}")
        durable.write_file(staging, json.dumps(asdict(found)).encode())
        durable.sync(staging)
        os.replace(staging, facts)
        durable.sync(self.path)

    def read(self, checkpoint: str) -> Path:
        """The file with the state that belongs to a checkpoint. Raises Broken when it is missing or damaged."""
        data, facts = self._files(checkpoint)
        try:
            expected = Sum(**read_object(facts))
            found = durable.sum_of(data)
        except (OSError, ValueError, TypeError) as error:
            raise Broken(f"{data}: it cannot be read: {error}") from error
        if found != expected:
            raise Broken(f"{data}: it cannot be read: its checksum differs")
        return data

    def prune(self, checkpoints: set[str], newest: int = 0) -> None:
        """Remove the states of checkpoints that are gone, but for the `newest` so many, whose checkpoints another
        replica group may still be writing. Raises OSError."""
        written = sorted(self.path.glob(f"*{self._suffix}.json"), key=lambda path: path.stat().st_mtime)
        for facts in written[: len(written) - newest]:
            name = facts.name.removesuffix(f"{self._suffix}.json")
            if name not in checkpoints:
                facts.unlink()
                self._files(name)[0].unlink(missing_ok=True)

    def _files(self, checkpoint: str) -> tuple[Path, Path]:
        return self.path / f"{checkpoint}{self._suffix}.pt", self.path / f"{checkpoint}{self._suffix}.json"
