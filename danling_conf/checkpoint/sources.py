"""Sources of tensors: shards, one file, or safetensors. The same planner reads all of them, each rank its own part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.safe_load import SafeReader, TensorPlanner, load_plain, ordinary_errors
from danling_conf.checkpoint.state import MODEL, Known
from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting

STATE = "state.pt"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""dtypes by the names that safetensors uses."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Source:
    """The tensors of a checkpoint, which can be read into tensors of this rank.

    Attributes:
        known: shape and dtype of each tensor, by name.
    """

    def __init__(self, reader: StorageReader, described: Mapping[str, TensorStorageMetadata]) -> None:
        self._reader = reader
        self.known = {name: Known(tuple(item.size), item.properties.dtype) for name, item in described.items()}

    def load(self, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
        """Read into tensors, whole or sharded. Collective, unless this process reads `alone`.

        Raises Broken or RuntimeError.
        """
        alone = alone or not is_distributed()
        with ordinary_errors("the checkpoint cannot be loaded"), waiting("the checkpoint"):
            load(tensors, storage_reader=self._reader, planner=TensorPlanner(), no_dist=alone)


def shards(folder: Path) -> Source:
    """The shards that `torch.distributed.checkpoint` wrote. Raises Broken."""
    reader = SafeReader(folder)
    return Source(reader, reader.tensors())


def one_file(path: Path) -> Source:
    """The tensors of a file of `torch.save`. Raises Broken."""
    content = load_plain(path, mapped=True)
    if not (isinstance(content, dict) and all(isinstance(item, Tensor) for item in content.values())):
        raise Broken(f"{path}: it cannot be read as a checkpoint: it is not a mapping from names to tensors")
    return of_tensors(content)


def of_tensors(content: Mapping[str, Tensor]) -> Source:
    """Whole tensors by name."""
    reader = _WholeReader(content)
    return Source(reader, reader.described)


def safetensors(path: Path) -> Source | None:
    """The tensors of a safetensors file, or of a folder of them, as a model's; None where there are none.

    Raises:
        Broken: a file is missing or damaged.
        ImportError: the package safetensors is not installed.
    """
    files = safetensors_files(path)
    if not files:
        return None
    from safetensors import SafetensorError, safe_open

    content: dict[str, Any] = {}
    for file in files:
        try:
            opened: Any = safe_open(file, framework="pt", device="cpu")
            content |= {f"{MODEL}{name}": opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise Broken(f"{file}: there is no such file, and {INDEX} names it") from None
        except (OSError, SafetensorError) as error:
            raise Broken(f"{file}: it cannot be read as safetensors: {error}") from error
    reader = _WholeReader(content)
    return Source(reader, reader.described)


def safetensors_files(path: Path) -> list[Path]:
    """The files that hold a model's safetensors: a file, those that a folder's index names, or all in the folder."""
    if path.is_file():
        return [path] if path.suffix == ".safetensors" else []
    index = path / INDEX
    if not index.is_file():
        return [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Broken(f"{index}: it cannot be read: {type(error).__name__}: {error}") from error
    outside = [name for name in names if not isinstance(name, str) or "/" in name]
    if outside:
        raise Broken(f"{index}: it cannot be read: it names a file outside of its folder, {outside[0]}")
    return [path / name for name in names]


class _WholeReader(StorageReader):
    """Reads parts of unsharded tensors, which are in memory or memory-mapped. Each rank reads only what it needs."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._content = content
        self.described = {name: _describe(item) for name, item in content.items()}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def reset(self, checkpoint_id: Any = None) -> None:
        """Does nothing: there is no state to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(state_dict_metadata=dict(self.described), storage_meta=StorageMeta())

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the content is already open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            whole = self._content[item.storage_index.fqn]
            where = tuple(
                slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)
            )
            found = whole if isinstance(whole, Tensor) and not where else whole[where if where else ...]
            target = planner.resolve_tensor(item).detach()
            target.copy_(found)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _describe(item: Any) -> TensorStorageMetadata:
    if isinstance(item, Tensor):
        size, dtype = item.size(), item.dtype
    else:
        size, dtype = torch.Size(item.get_shape()), _dtype_of(item)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[chunk])


def _dtype_of(item: Any) -> torch.dtype:
    """The dtype of a slice of safetensors."""
    found = _DTYPES.get(item.get_dtype())
    if found is None:
        raise Broken(f"a tensor of dtype {item.get_dtype()} is not read from safetensors")
    return found
