"""Sources of tensors: shards, one file, or safetensors. The same planner reads all of them, each rank its own part."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
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

from danling_conf.checkpoint import manifest
from danling_conf.checkpoint.manifest import EXPORTED, Broken, Manifest
from danling_conf.checkpoint.safe_load import SafeReader, TensorPlanner, load_plain, not_plain, ordinary_errors
from danling_conf.checkpoint.state import MODEL, Known
from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting
from danling_conf.schema.files import Damaged, open_regular, read_object

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
PLAIN = (".pt", ".pth", ".bin")
"""Endings of files of `torch.save`, by habit."""
_STATE_DICTS = ("state_dict", "model", "model_state_dict")
"""Names under which a training script keeps its model in a larger table, by habit."""


class Source:
    """The tensors of a checkpoint, which can be read into tensors of this rank.

    Attributes:
        known: shape and dtype of each tensor, by name.
        content: tensors, or what reads a slice of one, by name; None for shards.
    """

    def __init__(
        self,
        reader: StorageReader,
        described: Mapping[str, TensorStorageMetadata],
        content: Mapping[str, Any] | None = None,
    ) -> None:
        self._reader, self.content = reader, content
        self.known = {name: Known(tuple(item.size), item.properties.dtype) for name, item in described.items()}

    def load(self, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
        """Read into tensors, whole or sharded. Collective, unless this process reads `alone`.

        Raises Broken or RuntimeError.
        """
        alone = alone or not is_distributed()
        with ordinary_errors("the checkpoint cannot be loaded"), waiting("the checkpoint"):
            load(tensors, storage_reader=self._reader, planner=TensorPlanner(), no_dist=alone)


def shards(folder: Path, listed: Collection[str]) -> Source:
    """The shards that `torch.distributed.checkpoint` wrote, in files that have a checksum. Raises Broken."""
    reader = SafeReader(folder, listed)
    return Source(reader, reader.tensors())


def open_tensors(path: Path, facts: Manifest) -> Source:
    """The tensors of a checkpoint, by the backend that wrote it. Raises Broken."""
    if facts.backend == "dcp":
        return shards(path, facts.files)
    manifest.check_listed(path, facts, [STATE])
    return one_file(path / STATE)


def one_file(path: Path) -> Source:
    """The tensors of a file of `torch.save`. Raises Broken."""
    return of_content(_tensors_in(path))


def of_content(content: Mapping[str, Any]) -> Source:
    """Whole tensors by name, or what reads slices of them."""
    reader = _WholeReader(content)
    return Source(reader, reader.described, content)


def plain_file(path: Path) -> Source:
    """The tensors of someone else's file of `torch.save`, a state dict or a table with one, as a model's. Raises
    Broken."""
    return of_content({f"{MODEL}{name}": item for name, item in _tensors_in(path, nested=True).items()})


def _tensors_in(path: Path, *, nested: bool = False) -> dict[str, Tensor]:
    content = load_plain(path, mapped=True)
    if nested and isinstance(content, dict):
        inner = [content[name] for name in _STATE_DICTS if isinstance(content.get(name), dict)]
        if len(inner) == 1:  # a checkpoint of a training, beside its optimizer
            content = inner[0]
    if not (isinstance(content, dict) and content):
        raise Broken(f"{path}: it cannot be read as a checkpoint: it is not a mapping from names to tensors")
    for name, item in content.items():
        fault = "its name is no text" if not isinstance(name, str) else not_plain(item)
        if fault:
            rule = "it is not a mapping from names to tensors"
            raise Broken(f"{path}: it cannot be read as a checkpoint: {rule}: {str(name)[:80]}: {fault}")
    return content


def safetensors(path: Path, facts: Manifest | None = None) -> Source | None:
    """The tensors of a safetensors file, or of a folder of them, as a model's; None where there are none.

    Args:
        facts: of an export of ours, which has a checksum of each of its files.

    Raises:
        Broken: a file is missing or damaged, or two of them hold a tensor of the same name.
        ImportError: the package safetensors is not installed.
    """
    places = safetensors_files(path)
    if not places:
        return None
    from safetensors import SafetensorError, safe_open

    content: dict[str, Any] = {}
    holders: dict[str, Path] = {}
    for file, expected in places.items():
        if facts is not None:
            manifest.check_listed(path, facts, [file.name], EXPORTED)
        try:
            os.close(open_regular(file))
            opened: Any = safe_open(file, framework="pt", device="cpu")
            names = list(opened.keys())
        except FileNotFoundError:
            raise Broken(f"{file}: there is no such file, and {INDEX} names it") from None
        except Damaged as damage:
            raise Broken(f"{file}: it cannot be read as safetensors: {damage.reason}") from damage
        except (OSError, SafetensorError) as error:
            raise Broken(f"{file}: it cannot be read as safetensors: {error}") from error
        absent = sorted(expected - set(names))
        if absent:
            raise Broken(f"{file}: it has no {absent[0]}, which {INDEX} says it has")
        for name in names:
            if name in holders:
                raise Broken(f"{file}: it holds {name}, and so does {holders[name].name}: which is meant is not known")
            holders[name] = file
            item = opened.get_slice(name)
            if item.get_dtype() not in _DTYPES:
                raise Broken(f"{file}: {name} is {item.get_dtype()}, which is not read from safetensors")
            content[f"{MODEL}{name}"] = item
    return of_content(content)


def safetensors_files(path: Path) -> dict[Path, set[str]]:
    """The files that hold a model's safetensors, with the names that each must have: the file itself, those that a
    folder's index names, or all in the folder. Raises Broken."""
    if not path.is_dir():
        return {path: set()} if path.suffix == ".safetensors" else {}
    index = path / INDEX
    if not os.path.lexists(index):
        found = [path / SINGLE] if os.path.lexists(path / SINGLE) else sorted(path.glob("*.safetensors"))
        return {file: set() for file in found}
    try:
        weights = read_object(index)["weight_map"].items()
    except Damaged as damage:
        raise Broken(f"{index}: it cannot be read: {damage.reason}") from damage
    except (KeyError, AttributeError, FileNotFoundError):
        raise Broken(f"{index}: it cannot be read: it has no weight_map from names to files") from None
    places: dict[Path, set[str]] = {}
    for name, file in sorted(weights, key=str):
        if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
            raise Broken(f"{index}: it cannot be read: it names a file outside of its folder, {file}")
        places.setdefault(path / file, set()).add(name)
    if os.path.lexists(path / SINGLE) and path / SINGLE not in places:
        raise Broken(f"{path / SINGLE}: {INDEX} beside it names other files: which are meant is not known")
    return places


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
    size, dtype = shape_and_dtype(item)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=[chunk])


def shape_and_dtype(item: Any) -> tuple[torch.Size, torch.dtype]:
    """Of a tensor, or of what reads slices of one: that of safetensors has methods of its own."""
    if not hasattr(item, "get_dtype"):
        return item.shape, item.dtype
    return torch.Size(item.get_shape()), _DTYPES[item.get_dtype()]
