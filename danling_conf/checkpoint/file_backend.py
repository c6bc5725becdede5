"""Checkpoints as plain files: one of the whole state by rank 0, one of each rank's own state."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"


def rank_file(folder: Path, rank: int) -> Path:
    """The file of a rank's own state: loaders and random number generators."""
    return folder / f"rank-{rank}.pt"


def write(path: Path, content: Any) -> None:
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> Any:
    """Read a file that `write` made. Only tensors and plain values are constructed.

    Raises ValueError, with the path, when it is not such a file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file, so the checkpoint is not whole") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: it cannot be read as a checkpoint: {reason}") from error


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable: a rename is lost in a crash otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
