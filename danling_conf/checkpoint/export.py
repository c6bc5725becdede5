"""Export of the model alone as safetensors; models of transformers are written in their own format.

Other programs read exports, so they hold no optimizer and need no danling-conf.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danling_conf._torch_private.compiling import without_compile
from danling_conf.checkpoint import durable, manifest
from danling_conf.checkpoint.manifest import EXPORTED, Manifest
from danling_conf.checkpoint.sources import INDEX, SINGLE
from danling_conf.checkpoint.state import MODEL
from danling_conf.components.precision import dtype

_FILE_BYTES = 5_000_000_000
"""Largest file of an export. It bounds the part of the model that the main rank holds at once."""


def write(
    staging: Path, parts: Sequence[nn.Module], tensors: Iterator[tuple[str, Tensor]], facts: Manifest, cast: str | None
) -> None:
    """Write an export into an empty folder, on the main rank. It is durable when this returns.

    Args:
        tensors: names and tensors of the whole model, from `gather.gather`.
        cast: dtype for floating-point tensors; None leaves them as trained.

    Raises OSError.
    """
    model = bare(parts[0])
    whole = len(parts) == 1 and facts.degrees["pipeline"] == 1
    write_model(staging, model if is_of_transformers(model) else None, tensors, facts, cast, whole=whole)


def write_model(
    staging: Path,
    model: Any,
    tensors: Iterator[tuple[str, Tensor]],
    facts: Manifest,
    cast: str | None,
    *,
    whole: bool = True,
) -> None:
    """Write an export as `write` does.

    Args:
        model: of transformers, which decides the format; its values are not used, so it may be on the meta device. None
            for any other model.
        whole: whether it is the whole model, and not a stage of a pipeline.
    """
    named = ((name.removeprefix(MODEL), _cast(tensor, cast)) for name, tensor in tensors)
    if model is not None and whole:
        _by_transformers(staging, model, dict(named))
    else:
        _plainly(staging, named)
        if model is not None:
            model.config.save_pretrained(staging)
    written = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in written:
        durable.sync(path)
    # Below it lie further adapters of peft only, which nobody loads from here.
    files = {path.name: durable.sum_of(path) for path in written if path.parent == staging}
    manifest.write(staging, replace(facts, files=files), EXPORTED)
    durable.sync(staging)


def _by_transformers(staging: Path, model: Any, state: dict[str, Tensor]) -> None:
    """Write with transformers, which knows about tied weights, names that differ on disk, and its configuration."""
    held = {item.dtype for item in state.values() if item.is_floating_point()}
    model.save_pretrained(staging, state_dict=state, is_main_process=True)
    config = staging / "config.json"
    if not config.is_file():
        return  # an adapter of peft, alone: the model that it belongs to has its configuration elsewhere
    content = json.loads(config.read_text())
    # transformers records the dtype of the live model, but loads in the recorded dtype: record what was written.
    if len(held) == 1:
        name = str(held.pop()).removeprefix("torch.")
        content |= {key: name for key in ("dtype", "torch_dtype") if key in content}
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _plainly(staging: Path, named: Iterator[tuple[str, Tensor]]) -> None:
    """Write files of at most `_FILE_BYTES`, named and indexed like those of transformers."""
    from safetensors.torch import save_file

    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    size = total = number = 0
    for name, tensor in named:
        if held and size + tensor.nbytes > _FILE_BYTES:
            number += 1
            save_file(held, staging / f"{number}.part", metadata={"format": "pt"})
            held, size = {}, 0
        # safetensors refuses tensors that share memory; each is written on its own.
        held[name] = tensor.contiguous().clone() if _shared(tensor, held.values()) else tensor.contiguous()
        places[name] = number + 1
        size, total = size + tensor.nbytes, total + tensor.nbytes
    save_file(held, staging / f"{number + 1}.part", metadata={"format": "pt"})
    if number == 0:
        (staging / "1.part").rename(staging / SINGLE)
        return
    names = {part: f"model-{part:05d}-of-{number + 1:05d}.safetensors" for part in range(1, number + 2)}
    for part, name in names.items():
        (staging / f"{part}.part").rename(staging / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[part] for name, part in places.items()}}
    (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shared(tensor: Tensor, others: Any) -> bool:
    address = tensor.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == address for other in others)


def _cast(tensor: Tensor, name: str | None) -> Tensor:
    kind = dtype(name)
    return tensor if kind is None or not tensor.is_floating_point() else tensor.to(kind)


def bare(model: nn.Module) -> nn.Module:
    """A model without the wrappers of DDP and of compilation."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return without_compile(inner)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a model has the writer and the configuration that those of transformers have."""
    return callable(getattr(model, "save_pretrained", None)) and hasattr(getattr(model, "config", None), "to_json_file")


def drain(tensors: Iterator[Any]) -> None:
    """Take part in the gather on a rank that keeps nothing: its collectives need every rank."""
    for _ in tensors:
        pass
