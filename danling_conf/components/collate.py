"""Collation: samples into a batch, as torch's default does it, and dataclasses as well.

What cannot be put into a batch is refused by the split and its place in a sample. torch names a type, or two sizes.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import default_collate, get_worker_info

from danling_conf._torch_private.attributes import carried_out_of_a_worker
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

_COLLATE = "or pass collate_fn=, a function that makes a batch of a list of samples"


def collate(samples: list[Any], *, split: str) -> Any:
    """A batch of samples. Tensors, arrays and numbers become tensors with a dim for the samples in front.

    Raises:
        ConfigRefused: a sample holds what makes no batch, or samples differ in shape.
    """
    try:
        made = _together(samples)
    except (TypeError, RuntimeError, ValueError, KeyError, AttributeError):
        fault = _fault(samples, "sample")
        if fault is None:
            raise
    else:
        # It would be lost on its way out of a worker, whose parent waited for ever.
        if get_worker_info() is None or (kind := _local_class(samples[0])) is None:
            return made
        rule = f"a sample holds a {kind.__qualname__}, a class that is in no module, and cannot leave a worker process"
        fault = rule, f"define it at the top of a file, or set dataloader.{split}.num_workers=0"
    refusal = ConfigRefused([Violation(f"datasets.{split}", ABSENT, *fault)])
    if get_worker_info() is None:
        raise refusal
    return carried_out_of_a_worker(refusal)


def _local_class(item: Any) -> type | None:
    """The class of a container in a sample that its module does not have by its name, so that it cannot be pickled."""
    kind: Any = type(item)
    if _is_dataclass(item):
        parts = [getattr(item, name) for name in _names(item)]
    elif isinstance(item, Mapping):
        parts = list(item.values())
    elif isinstance(item, (list, tuple)):
        parts = list(item)
    else:
        return None
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    if found is not kind:
        return kind
    return next((inner for part in parts if (inner := _local_class(part)) is not None), None)


def _together(samples: Sequence[Any]) -> Any:
    first = samples[0]
    if not _is_dataclass(first):
        return default_collate(list(samples))
    made = copy.copy(first)
    for name in _names(first):
        object.__setattr__(made, name, _together([getattr(sample, name) for sample in samples]))  # of a frozen one too
    return made


def _fault(samples: Sequence[Any], place: str) -> tuple[str, str] | None:
    """Why samples make no batch, and what to do; None where that is not known.

    Args:
        place: of these items in a sample, as a program calls it.
    """
    first = samples[0]
    kinds = list(dict.fromkeys(_kind(item) for item in samples))
    if not _is_collated(first) or any(item is None for item in samples):
        odd = next((item for item in samples if not _is_collated(item) or item is None), first)
        rule = f"{place} is {_kind(odd)}, of which no batch can be made"
        return rule, f"{_instead_of(odd)}, {_COLLATE}"
    if len(kinds) > 1 and not all(isinstance(item, (int, float)) for item in samples):
        return f"{place} is {kinds[0]} in one sample and {kinds[1]} in another", f"return one type, {_COLLATE}"
    if _is_array(first):
        shapes = list(dict.fromkeys(tuple(item.shape) for item in samples))
        if len(shapes) > 1:
            rule = f"{place} has the shape {shapes[0]} in one sample and {shapes[1]} in another"
            return rule, f"bring them to one shape, {_COLLATE} (that pads, as torch.nn.utils.rnn.pad_sequence does)"
        return None
    if isinstance(first, Mapping):
        for key in first:
            if any(key not in item for item in samples):
                return f"{place} has the key {key!r} in some samples only", f"return it in each, {_COLLATE}"
        return _first_of((f"{place}[{key!r}]", [item[key] for item in samples]) for key in first)
    if _is_dataclass(first):
        return _first_of((f"{place}.{name}", [getattr(item, name) for item in samples]) for name in _names(first))
    if isinstance(first, Sequence) and not isinstance(first, (str, bytes)):
        sizes = list(dict.fromkeys(map(len, samples)))
        if len(sizes) > 1:
            return (
                f"{place} has {sizes[0]} items in one sample and {sizes[1]} in another",
                f"return as many, {_COLLATE}",
            )
        return _first_of((f"{place}[{index}]", [item[index] for item in samples]) for index in range(len(first)))
    return None


def _first_of(parts: Any) -> tuple[str, str] | None:
    return next((found for place, items in parts if (found := _fault(items, place)) is not None), None)


def _is_collated(item: Any) -> bool:
    return _is_array(item) or _is_dataclass(item) or isinstance(item, (Mapping, Sequence, int, float))


def _is_array(item: Any) -> bool:
    """A tensor, or an array or a number of numpy of a dtype that tensors have."""
    if isinstance(item, Tensor):
        return True
    return type(item).__module__ == "numpy" and hasattr(item, "shape") and item.dtype.kind in "biufc"


def _is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)


def _names(item: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(item) if hasattr(item, each.name)]


def _kind(item: Any) -> str:
    if item is None:
        return "None"
    if type(item).__module__ == "numpy" and hasattr(item, "dtype"):
        return f"an array of {item.dtype}"
    kind = type(item)
    return (
        f"a {kind.__qualname__}" if kind.__module__ in ("builtins", "torch") else f"a {kind.__module__}.{kind.__name__}"
    )


def _instead_of(item: Any) -> str:
    if type(item).__module__.startswith("PIL."):
        return "make it a tensor in the data set (torch.from_numpy(numpy.array(image)), or a transform of torchvision)"
    if item is None:
        return "leave it out of the sample"
    return "return tensors, arrays, numbers, strings, and mappings, tuples or dataclasses of them"
