"""Fit of a checkpoint: compares what it holds with the model and the optimizer, before anything is loaded.

torch copies an integer into a float, casts to any dtype, and puts state of any shape into an optimizer. So whatever is
not said here is loaded without a word.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from danling_conf.checkpoint import state
from danling_conf.checkpoint.contents import alike
from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.sources import Source
from danling_conf.checkpoint.state import MODEL, OPTIMIZER, Known

_SHOWN = 20


class OptimizerDiffers(ValueError):
    """A checkpoint was written with another class of optimizer."""

    def __init__(self, path: Path, saved: str, current: str) -> None:
        self.path, self.saved, self.current = path, saved, current
        super().__init__(f"{path}: it was made with the optimizer {saved}, and this run's is {current}")

    def __reduce__(self) -> tuple[object, ...]:  # one rank's error is sent to the others
        return type(self), (self.path, self.saved, self.current)


class ModelDiffers(ValueError):
    """The weights of a checkpoint do not fit the model, in names, shapes, dtypes or ties."""

    def __init__(self, path: Path, difference: str) -> None:
        self.path, self.difference = path, difference
        super().__init__(f"{path}: its weights do not fit the model: {difference}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.path, self.difference)


def without_tied(tensors: Mapping[str, Tensor], known: Mapping[str, Known]) -> dict[str, Tensor]:
    """Drop tied weights that a checkpoint has under another name only: other libraries save them once."""
    held = {_identity(item) for name, item in tensors.items() if name in known}
    return {name: item for name, item in tensors.items() if name in known or _identity(item) not in held}


def ties(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the model that are one tensor, as far as this rank's shards tell."""
    tied: dict[tuple[Any, ...], list[str]] = {}
    for name, item in tensors.items():
        if _local(item).numel():
            tied.setdefault(_identity(item), []).append(name)
    return [names for names in tied.values() if len(names) > 1]


def differing_ties(
    tensors: Mapping[str, Tensor], groups: Sequence[Sequence[str]], source: Source, *, alone: bool = False
) -> list[str]:
    """Those of `ties` of which the source has different values: the name that is read last would win. Collective,
    unless this process reads `alone`.

    Args:
        tensors: of the model, by name; all of them are in the source.
    """
    copies = {name: torch.empty_like(tensors[name], requires_grad=False) for names in groups for name in names}
    source.load(copies, alone=alone)
    return [
        " and ".join(_short(name) for name in names)
        for names in groups
        if not all(_same(copies[names[0]], copies[name]) for name in names[1:])
    ]


def _same(left: Tensor, right: Tensor) -> bool:
    mine, theirs = (_local(item).contiguous().reshape(-1).view(torch.uint8) for item in (left, right))
    return torch.equal(mine, theirs)  # bits, since NaN differs from itself


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return _local(tensor).data_ptr(), tensor.shape


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def misfit(
    mine: Mapping[str, tuple[int, ...]], theirs: Mapping[str, tuple[int, ...]], everywhere: set[str]
) -> str | None:
    """How a saved model differs from that of this rank, in names and shapes; None where it fits."""
    facts = {
        "it lacks": [_short(name) for name in mine if name not in theirs],
        "the model lacks": [_short(name) for name in theirs if name not in everywhere],
        "of another shape": [
            f"{_short(name)} {theirs[name]} for {shape}"
            for name, shape in mine.items()
            if theirs.get(name, shape) != shape
        ],
    }
    shown = [f"{what} {listed(names)}" for what, names in facts.items() if names]
    return "; ".join(shown) or None


def other_dtypes(tensors: Mapping[str, Tensor], known: Mapping[str, Known], *, exact: bool) -> str | None:
    """How dtypes in a checkpoint differ from those of the tensors it is to be read into; None where they fit.

    Args:
        exact: whether another floating-point dtype is a difference as well. A run that goes on would round its weights;
            one that starts from trained weights wants them in its own precision.
    """
    names = [
        f"{_short(name)} {_named(known[name].dtype)} for {_named(item.dtype)}"
        for name, item in tensors.items()
        if name in known and known[name].dtype != item.dtype
        if exact or not (_kind(known[name].dtype) == _kind(item.dtype) == "floating")
    ]
    return f"of another dtype {listed(names)}" if names else None


def check_extra(path: Path, mine: Mapping[str, Tensor], known: Mapping[str, Known]) -> None:
    """Raises ModelDiffers where further tensors, of callbacks, are not in the checkpoint as they are here."""
    wrong = [name for name, item in mine.items() if name not in known or known[name].shape != tuple(item.shape)]
    if wrong:
        raise ModelDiffers(path, f"absent or of another shape: {listed(wrong)}")
    dtypes = other_dtypes(mine, known, exact=True)
    if dtypes:
        raise ModelDiffers(path, dtypes)


def check_optimizer(
    path: Path,
    parts: Sequence[nn.Module],
    optimizer: Optimizer,
    known: Mapping[str, Known],
    saved: Mapping[str, Known] | None,
) -> None:
    """Compare the tensors of the optimizer's state with those that were saved, and with the parameters.

    Args:
        known: what the checkpoint holds, without what is excluded from loading.
        saved: what was in the optimizer's state, without what is excluded; None where the checkpoint does not say.

    Raises:
        Broken: a tensor is missing, or is not the one that was saved.
        ModelDiffers: a tensor has a shape or a kind that the optimizer cannot have made of its parameter.
    """
    held = {name: item for name, item in known.items() if name.startswith(OPTIMIZER)}
    missing = _uneven(held) if saved is None else sorted(saved.keys() - held)
    if missing:
        raise Broken(f"{path}: it lacks {listed(missing)}, which the optimizer's state had when it was saved")
    other = sorted(name for name, item in (saved or {}).items() if held[name] != item)
    if other:
        raise Broken(f"{path}: of another shape or dtype than when it was saved: {listed(other)}")
    steppable = {id(item) for group in optimizer.param_groups for item in group["params"]}
    keys, wrong = state.keys_by_parameter(held), []
    for name, parameter in state.named_parameters(parts):
        for full in (f"{OPTIMIZER}{name}.{key}" for key in keys.get(name, ()) if id(parameter) in steppable):
            found, shape = held[full], tuple(parameter.shape)
            # What an optimizer of someone else's makes of a parameter is not known; what was saved is what it made.
            unusual = saved is None or full not in saved
            if found.shape != shape and unusual and not _reduced(found.shape, shape):
                wrong.append(f"{full} {found.shape} for {shape}")
            elif found.shape == shape and shape and _kind(found.dtype) != _kind(parameter.dtype) and unusual:
                wrong.append(f"{full} {_named(found.dtype)} for {_named(parameter.dtype)}")
    if wrong:
        raise ModelDiffers(path, f"state of the optimizer of another shape or dtype: {listed(wrong)}")


def check_options(path: Path, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raises Broken where an option that was saved of a group is of another kind than the optimizer's."""
    for group in groups:
        for name, value in group["options"].items():
            mine = [item[name] for item in optimizer.param_groups if name in item]
            if mine and value is not None and not any(alike(value, item) for item in mine):
                raise Broken(f"{path}: the optimizer's {name} in it is {str(value)[:40]!r}, where {mine[0]!r} may be")


def _reduced(shape: tuple[int, ...], parameter: tuple[int, ...]) -> bool:
    """Whether a shape is that of a number, or of a parameter with some dimensions reduced to one."""
    if all(size == 1 for size in shape):
        return True
    return len(shape) == len(parameter) and all(
        size in (1, whole) for size, whole in zip(shape, parameter, strict=True)
    )


def _kind(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "floating" if dtype.is_floating_point else "whole"


def _uneven(held: Iterable[str]) -> list[str]:
    """Tensors that one parameter's state lacks and that of most others has."""
    keys: dict[str, set[str]] = {}
    for name in held:
        parameter, _, key = name.removeprefix(OPTIMIZER).rpartition(".")
        keys.setdefault(parameter, set()).add(key)
    kinds = sorted(keys.values(), key=len)
    most = max(kinds, key=kinds.count, default=set())
    return sorted(f"{OPTIMIZER}{name}.{key}" for name, own in keys.items() if own < most for key in most - own)


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _short(name: str) -> str:
    return name.removeprefix(MODEL)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
