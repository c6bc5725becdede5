"""Checkpoints as plain files: one of the whole state by rank 0, one of each rank's own state."""

from __future__ import annotations

import os
import pickle
import zipfile
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
        raise ValueError(f"{path}: it cannot be read as a checkpoint: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty"
    if path.is_file() and not zipfile.is_zipfile(path):
        return "it is damaged: no whole archive as torch.save writes it"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects than tensors and plain values, which are not loaded from a file"
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable: a rename is lost in a crash otherwise."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
