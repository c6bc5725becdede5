"""Safe loading of checkpoints that someone else may have written: nothing in them is executed.

torch.distributed.checkpoint unpickles its `.metadata` without restriction, and loads bytes in a shard by an
unrestricted `torch.load`. Here the metadata may construct only the classes that describe tensors, and bytes are not
read at all.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from danling_conf.checkpoint.manifest import Broken
from danling_conf.schema.files import DEEPEST, Damaged, open_regular

METADATA = ".metadata"
_MOST_CONTAINERS = 1_000_000
"""Lists and tables in a file; those of a run hold some thousands."""
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
    """Reads the shards of a checkpoint folder, and nothing outside of it.

    Args:
        listed: the files that have a checksum; no other is read.
        objects: whether the folder may hold other objects than tensors, which are not read.
    """

    def __init__(self, path: Path, listed: Collection[str], *, objects: bool = False) -> None:
        super().__init__(path)
        self._listed, self._objects = listed, objects

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with open(path, "rb") as file:
                metadata: Metadata = _Unpickler(file).load()
        except FileNotFoundError:
            raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
        except Exception as error:  # a damaged pickle may raise anything
            raise Broken(f"{path}: it cannot be read: {_line(error)}") from error
        try:
            self._check(metadata)
        except Broken:
            raise
        except Exception as error:  # fields of any type, or none
            raise Broken(f"{path}: it cannot be read: it does not describe shards: {_line(error)}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _check(self, metadata: Any) -> None:
        """Raises Broken where the metadata is not of whole tensors in files of this folder."""
        path = Path(self.path) / METADATA
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise Broken(f"{path}: it cannot be read: it does not describe shards")
        for info in metadata.storage_data.values():
            inside = isinstance(info.relative_path, str) and "/" not in info.relative_path
            if not inside or info.relative_path.startswith("."):
                raise Broken(f"{path}: it cannot be read: it names a file outside of its folder, {info.relative_path}")
            if info.relative_path not in self._listed:
                raise Broken(f"{path}: it names {info.relative_path}, of which the checkpoint has no checksum")
            if info.transform_descriptors:
                raise Broken(f"{path}: it cannot be read: it asks for transforms, which are not applied")
        regions = sorted((info.relative_path, info.offset, info.length) for info in metadata.storage_data.values())
        for (file, start, length), (after, begin, _) in pairwise(regions):
            if start < 0 or length < 0 or (file == after and start + length > begin):
                raise Broken(f"{path}: it names bytes of {file} twice, or none that are in it")
        for name, item in metadata.state_dict_metadata.items():
            if not isinstance(item, TensorStorageMetadata) and self._objects:
                continue
            if not isinstance(item, TensorStorageMetadata):
                raise Broken(f"{self.path}: it cannot be read: {name} is no tensor")
            fault = uncovered(item)
            if fault:
                raise Broken(f"{path}: the shards of {name} do not make up the tensor: {fault}")
            for chunk in item.chunks:
                if MetadataIndex(name, chunk.offsets) not in metadata.storage_data:
                    raise Broken(f"{path}: it names no file for the shard of {name} at {tuple(chunk.offsets)}")

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the parts that this rank needs. Raises Broken, with file and tensor."""
        # Not torch's own: it casts a shard of another dtype than its metadata says, and names neither file nor tensor.
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            path, name = Path(self.path) / info.relative_path, item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                raise Broken(f"{path}: {name} is no tensor, and objects are not loaded from a file")
            target = planner.resolve_tensor(item).detach()
            try:
                with open(path, "rb") as file:
                    file.seek(info.offset)
                    content = io.BytesIO(file.read(info.length))
                shard = torch.load(content, map_location="cpu", weights_only=True)
            except Exception as error:
                raise Broken(f"{path}: {name} cannot be read: {_line(error)}") from error
            dtype, shape = self._saved[item.storage_index]
            fault = not_plain(shard)
            if not fault and (shard.dtype, shard.shape) != (dtype, shape):
                fault = (
                    f"it is {shard.dtype} of shape {tuple(shard.shape)}, and the metadata says {dtype} {tuple(shape)}"
                )
            if fault:
                raise Broken(f"{path}: {name} is not what was saved: {fault}")
            where = tuple(
                slice(start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True)
            )
            target.copy_(shard[where])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def set_up_storage_reader(self, metadata: Metadata, *args: Any, **kwargs: Any) -> None:
        super().set_up_storage_reader(metadata, *args, **kwargs)
        self._saved = {
            MetadataIndex(name, chunk.offsets): (item.properties.dtype, chunk.sizes)
            for name, item in metadata.state_dict_metadata.items()
            if isinstance(item, TensorStorageMetadata)
            for chunk in item.chunks
        }

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The tensors of the checkpoint. Raises Broken."""
        return self.read_metadata().state_dict_metadata  # type: ignore[return-value]


def uncovered(item: TensorStorageMetadata) -> str:
    """Why the chunks of a tensor are not all of it, each element once; "" where they are."""
    if not isinstance(item.properties.dtype, torch.dtype):
        return "it has no dtype"
    size = tuple(item.size)
    places = [tuple(zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in item.chunks]
    for place in places:
        inside = len(place) == len(size) and all(
            start >= 0 and length >= 0 and start + length <= whole
            for (start, length), whole in zip(place, size, strict=True)
        )
        if not inside:
            return f"one lies outside of its shape {size}"
    held = [place for place in places if all(length for _, length in place)]
    if sum(prod(length for _, length in place) for place in held) != prod(size):
        return f"they hold {sum(prod(length for _, length in place) for place in held)} of {prod(size)} elements"
    return "" if _disjoint(held) else "some overlap"


def _disjoint(places: list[tuple[tuple[int, int], ...]]) -> bool:
    """Whether no two boxes overlap. Shards lie in a grid: by their first dimension they fall into slabs, so that
    thousands of them are compared in order and not in pairs."""
    if len(places) < 2:
        return True
    if not places[0]:
        return False  # two shards of a scalar
    slabs: dict[tuple[int, int], list[tuple[tuple[int, int], ...]]] = {}
    for first, *rest in places:
        slabs.setdefault(first, []).append(tuple(rest))
    ordered = sorted(slabs)
    apart = all(start + length <= after for (start, length), (after, _) in pairwise(ordered))
    return apart and all(_disjoint(inner) for inner in slabs.values())


def not_plain(item: Any) -> str:
    """Why a value is not a tensor with values in memory; "" where it is."""
    if not isinstance(item, Tensor):
        return f"it is {type(item).__name__}, and no tensor"
    if type(item) not in (Tensor, nn.Parameter) or item.is_quantized or item.layout != torch.strided:
        return "it is not a dense tensor"
    return "" if item.device.type == "cpu" else "it has no values"


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
        os.close(open_regular(path))  # a FIFO would be waited for, and a device read without end
        mapped = mapped and zipfile.is_zipfile(path)  # files of torch before 1.6 are none
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        _check_nesting(content)
    except FileNotFoundError:
        raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
    except Damaged as damage:
        raise Broken(f"{path}: it cannot be read as a checkpoint: {damage.reason}") from damage
    except Exception as error:
        raise Broken(f"{path}: it cannot be read as a checkpoint: {_reason(path, error)}") from error
    return content


def _check_nesting(content: Any) -> None:
    """Raises ValueError where values are nested more deeply, or repeated more often, than code that walks them can
    take: in a few bytes, a pickle can hold a list of itself, or lists that double at every level."""
    containers = (dict, list, tuple, set)
    waiting, walked = [(content, 1)] if isinstance(content, containers) else [], 0
    while waiting:
        value, depth = waiting.pop()
        walked += 1
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if walked > _MOST_CONTAINERS:
            raise ValueError(f"it holds more than {_MOST_CONTAINERS} lists and tables")
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        waiting += [(item, depth + 1) for item in inner if isinstance(item, containers)]


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
    if path.stat().st_size == 0:
        return "it is empty"
    if not zipfile.is_zipfile(path) and "weights_only" not in str(error):
        return "it is damaged: no whole archive as torch.save writes it"
    return _line(error)


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if "weights_only" in str(error):
        # torch's own text advises to load without the restriction, which would execute what the file says.
        return "it holds other objects than tensors and plain values, which are not loaded from a file"
    return lines[0] if lines else type(error).__name__
