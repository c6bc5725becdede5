"""Weights in the checkpoints of DanLing 0.4: a file of `torch.save`, or shards of `torch.distributed.checkpoint`.

Of a file, only tensors and plain values are constructed. DanLing saves other objects beside the weights (functions of
its scheduler, the state of NumPy's generator); a placeholder stands for each of them, and nothing of theirs is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from danling_conf.checkpoint import sources
from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.safe_load import SafeReader, load_plain
from danling_conf.checkpoint.sources import Source
from danling_conf.checkpoint.state import MODEL
from danling_conf.schema.files import danling_checkpoint

_COMPILED = "_orig_mod."
"""In the names of a compiled model's weights, which DanLing saves as they are."""


class _Unread:
    """Stands for an object of a class that is not loaded. It takes whatever the file would give that object."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class _Shards(Source):
    """Shards by the names that the model has when it is not compiled."""

    def __init__(self, reader: SafeReader, described: Mapping[str, TensorStorageMetadata]) -> None:
        super().__init__(reader, described)
        self._saved = {_cleaned(name): name for name in described}
        self.known = {_cleaned(name): item for name, item in self.known.items()}

    def load(self, tensors: dict[str, Tensor], *, alone: bool = False) -> None:
        super().load({self._saved[name]: item for name, item in tensors.items()}, alone=alone)


def weights(path: Path) -> Source:
    """The model's tensors in a checkpoint, as `danling_checkpoint` names it.

    Raises:
        Broken: it cannot be read, or holds no model.
    """
    if path.is_dir():
        return _shards(path)
    if _foreign_classes(path):
        with suppress(Broken):  # what is wrong with it, `plain_file` says
            model = _file(path).get("model")
            tensors = model.items() if isinstance(model, Mapping) else ()
            found = {_cleaned(f"{MODEL}{name}"): item for name, item in tensors if isinstance(item, Tensor)}
            if found:
                return sources.of_content(found)
    plain = sources.plain_file(path).content or {}
    return sources.of_content({_cleaned(name): item for name, item in plain.items()})


def not_taken(source: Path) -> list[str]:
    """Names of what a checkpoint holds beside the model's weights. Raises Broken."""
    path = danling_checkpoint(source)
    if path is None:
        return []
    if path.is_dir():
        names = dict.fromkeys(name.partition(".")[0] for name in _reader(path).read_metadata().state_dict_metadata)
        return [name for name in names if f"{name}." != MODEL]
    content = _file(path)
    return [str(name) for name, item in content.items() if name != "model" and not isinstance(item, Tensor | None)]


def _shards(path: Path) -> Source:
    reader = _reader(path)
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: item
        for name, item in described.items()
        if name.startswith(MODEL) and isinstance(item, TensorStorageMetadata)
    }
    if not tensors:
        raise _no_model(path, dict.fromkeys(name.partition(".")[0] for name in described))
    return _Shards(reader, tensors)


def _reader(path: Path) -> SafeReader:
    # DanLing keeps no checksums, so every shard beside the description may be read.
    return SafeReader(path, [file.name for file in path.glob("*.distcp")], objects=True)


def _cleaned(name: str) -> str:
    return name.replace(_COMPILED, "")


def _foreign_classes(path: Path) -> list[str]:
    """Classes in a file that `weights_only` refuses."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # a damaged file may raise anything; `load_plain` says what is wrong with it
        return []


def _file(path: Path) -> Mapping[str, Any]:
    # torch names the classes that weights_only refuses, and takes a class of ours in the place of each.
    with torch.serialization.safe_globals([(_Unread, name) for name in _foreign_classes(path)]):
        content = load_plain(path, mapped=True)
    return content if isinstance(content, Mapping) else {}


def _no_model(path: Path, content: Mapping[str, Any]) -> Broken:
    return Broken(
        f"{path}: it holds no weights by the name `model`; it has {', '.join(map(str, content)) or 'nothing'}"
    )
