"""Safe loading of checkpoints that someone else may have written: nothing in them is executed.

torch.distributed.checkpoint unpickles its `.metadata` without restriction, and loads bytes in a shard by an
unrestricted `torch.load`. Here the metadata may construct only the classes that describe tensors, and bytes are not
read at all.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from danling_conf.checkpoint.manifest import Broken

METADATA = ".metadata"
_DESCRIPTIONS = "torch.distributed.checkpoint.metadata"
# torch writes its private names among them into the file; nothing else here uses them.
_ALLOWED = {
    *(
        (_DESCRIPTIONS, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("pathlib", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    # Python 3.13 moved the classes, and pickles them under the new module.
    *(("pathlib._local", name) for name in ("Path", "PosixPath", "PurePosixPath")),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not loaded from a file")


class SafeReader(FileSystemReader):
    """Reads the shards of a checkpoint folder, and nothing outside of it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with open(path, "rb") as file:
                metadata = _Unpickler(file).load()
        except FileNotFoundError:
            raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
        except Exception as error:  # a damaged pickle may raise anything
            raise Broken(f"{path}: it cannot be read: {_line(error)}") from error
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise Broken(f"{path}: it cannot be read: it does not describe shards")
        for info in metadata.storage_data.values():
            inside = isinstance(info.relative_path, str) and "/" not in info.relative_path
            if not inside or info.relative_path.startswith("."):
                raise Broken(f"{path}: it cannot be read: it names a file outside of its folder, {info.relative_path}")
            if info.transform_descriptors:
                raise Broken(f"{path}: it cannot be read: it asks for transforms, which are not applied")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors of the checkpoint. Raises Broken."""
        described = self.read_metadata().state_dict_metadata
        for name, item in described.items():
            if not isinstance(item, TensorStorageMetadata):
                raise Broken(f"{self.path}: it cannot be read: {name} is no tensor")
        return described  # type: ignore[return-value]


class TensorPlanner(DefaultLoadPlanner):
    """Loads tensors only."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        raise Broken(f"{read_item.storage_index.fqn}: it is no tensor, and objects are not loaded from a file")


def load_plain(path: Path, *, mapped: bool = False) -> Any:
    """Read a file of `torch.save`. Only tensors and plain values are constructed.

    Args:
        mapped: memory-map tensors, so that only the parts in use are read from disk.

    Raises Broken, with the path, when it is not such a file.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
    except Exception as error:
        raise Broken(f"{path}: it cannot be read as a checkpoint: {_reason(path, error)}") from error


@contextmanager
def ordinary_errors(what: str) -> Iterator[None]:
    """Turn torch's CheckpointException into an ordinary error with the reasons of all ranks that failed.

    torch derives it from BaseException, so it passes every `except Exception` and would end the process. `Broken` and
    OSError are raised as they are; any other error becomes a RuntimeError.
    """
    try:
        with warnings.catch_warnings():
            # A run of one process has no process group on purpose.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            yield
    except CheckpointException as error:
        failures = {rank: failure[0] for rank, failure in error.failures.items()}
        first = failures[min(failures)]
        if not isinstance(first, Exception):  # KeyboardInterrupt, SystemExit
            raise first from error
        if isinstance(first, (Broken, OSError)):
            raise first from error
        reasons = "; ".join(f"rank {rank}: {_line(failure)}" for rank, failure in sorted(failures.items()))
        raise RuntimeError(f"{what}: {reasons}") from first


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty"
    if path.is_file() and not zipfile.is_zipfile(path):
        return "it is damaged: no whole archive as torch.save writes it"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects than tensors and plain values, which are not loaded from a file"
    return _line(error)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
