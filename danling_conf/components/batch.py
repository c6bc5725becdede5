"""Batches as trees: containers of any kind that hold tensors, walked, moved, counted and cut.

What a collate function returns is the user's own: tuples, mappings, named tuples, dataclasses, `BatchEncoding`, objects
with a `.to()`. Strings, numbers and 0-d tensors may stand anywhere in it. torch's pytrees know neither dataclasses nor
mappings that are no `dict`, and would take such a batch for a leaf: nothing of it would be moved or cut, silently.
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from danling_conf._torch_private.dispatch import tree_flatten, tree_unflatten
from danling_conf.topology.violation import ABSENT, SettingError

CountSamples = Callable[[Any], int]
"""Samples in a batch, or in a microbatch of it."""


def tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in the order of its containers, depth first. Those inside opaque objects are not seen."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for child in _children(batch) or ():
        yield from tensors(child)


def named_tensors(batch: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch, each with what it is called in a program: `batch[0]`, `batch['x']`, `batch.x`.

    Args:
        name: of the batch itself.
    """
    if isinstance(batch, Tensor):
        yield name, batch
        return
    children = _children(batch) or []
    if isinstance(batch, Mapping):
        names = [f"{name}[{key!r}]" for key in batch]
    elif named := names_of(batch):
        names = [f"{name}.{item}" for item in named if hasattr(batch, item)]
    else:
        names = [f"{name}[{place}]" for place in range(len(children))]
    for each, child in zip(names, children, strict=False):
        yield from named_tensors(child, each)


def map_tensors(function: Callable[[Tensor], Any], batch: Any, *, other: Callable[[Any], Any] | None = None) -> Any:
    """A batch of the same containers whose tensors are what `function` returns for them.

    Args:
        other: maps what is neither tensor nor container. None: it stays.

    Raises:
        SettingError: a container that cannot be made anew with other items.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    children = _children(batch)
    if children is None:
        return batch if other is None else other(batch)
    mapped = [map_tensors(function, child, other=other) for child in children]
    if all(new is old for new, old in zip(mapped, children, strict=True)):
        return batch
    return _with_children(batch, mapped)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device. An object with a `.to()` of its own moves by it, inside containers as
    well; a `dict` and what transformers makes of one (`BatchEncoding`) are walked."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if has_to(batch) and not isinstance(batch, (dict, UserDict)):
        return batch.to(device)
    children = _children(batch)
    if children is None:
        return batch
    moved = [to_device(child, device) for child in children]
    if all(new is old for new, old in zip(moved, children, strict=True)):
        return batch
    return _with_children(batch, moved)


def count_samples(batch: Any) -> int:
    """Samples in a batch: the first dim of its first tensor that has one; where none has, the length of its first list
    of plain values, such as strings.

    Raises:
        SettingError: there is neither, as in an object that only has a `.to()`.
    """
    for tensor in tensors(batch):
        if tensor.ndim:
            return tensor.shape[0]
    found = _length_of_plain_list(batch)
    if found is None:
        raise SettingError(
            "count_samples",
            ABSENT,
            f"{described(batch)} holds no tensor with a dimension to count samples by",
            "pass count_samples=, a function of a batch that returns its number of samples",
        )
    return found


def rows(batch: Any, part: slice, size: int) -> Any:
    """Some samples of a batch of `size`: of each tensor whose first dim is `size`, its rows, and of each list of
    `size` items that is one item a sample (strings, numbers, tensors without that dim), its items. All else is whole.

    Raises:
        SettingError: the batch holds an object that cannot be cut.
    """
    if isinstance(batch, Tensor):
        return batch[part] if batch.ndim and batch.shape[0] == size else batch
    children = _children(batch)
    if children is None:
        check_walkable(batch, "parallel.axes.pipeline", "be cut into microbatches")
        return batch
    if isinstance(batch, (list, tuple)) and len(batch) == size and not _is_record(batch):
        inner = list(tensors(batch))
        if not any(tensor.ndim and tensor.shape[0] == size for tensor in inner):
            return batch[part]
    cut = [rows(child, part, size) for child in children]
    if all(new is old for new, old in zip(cut, children, strict=True)):
        return batch
    return _with_children(batch, cut)


def check_walkable(batch: Any, path: str, what: str) -> None:
    """Refuse objects inside a batch that hold tensors of which only their own `.to()` knows.

    Args:
        path: of the setting that asks for more than moving.
        what: is done to the batch under it, as in `be cut into microbatches`.
    """
    children = _children(batch)
    for child in children or ():
        check_walkable(child, path, what)
    if children is None and not isinstance(batch, Tensor) and has_to(batch):
        raise SettingError(
            path,
            ABSENT,
            f"a batch with a {type(batch).__name__} in it cannot {what}, since only its own .to() knows its tensors",
            "let collate_fn return a mapping, tuple or dataclass of tensors, or set the degree to 1",
        )


def has_to(value: Any) -> bool:
    """Whether an object moves by a `.to()` of its own."""
    return not isinstance(value, type) and callable(getattr(value, "to", None))


def item_of(batch: Any, key: str) -> Any:
    """An item of a batch by its name: a key of a mapping, a position in a sequence, else an attribute.

    Raises:
        KeyError: there is no such item.
    """
    if isinstance(batch, Mapping):
        return batch[key]
    if isinstance(batch, Sequence) and key.lstrip("-").isdigit():
        try:
            return batch[int(key)]
        except IndexError:
            raise KeyError(key) from None
    try:
        return getattr(batch, key)
    except AttributeError:
        raise KeyError(key) from None


def described(batch: Any) -> str:
    """What a batch is, in words: its type and the names of its items."""
    kind = type(batch).__name__
    names = names_of(batch)
    if names:
        return f"a batch ({kind} of {', '.join(names)})"
    if isinstance(batch, (list, tuple)):
        return f"a batch ({kind} of {len(batch)} items)"
    return f"a batch ({kind})"


def names_of(batch: Any) -> list[str]:
    """Names of the items of a mapping, named tuple or dataclass; none of what has no names."""
    if isinstance(batch, Mapping):
        return [str(key) for key in batch]
    if _is_record(batch):
        return list(batch._fields)
    return [item.name for item in fields(batch)] if _is_dataclass(batch) else []


def _children(node: Any) -> list[Any] | None:
    """The items of a container; None for what is none."""
    if isinstance(node, (Tensor, str, bytes)):
        return None
    if isinstance(node, Mapping):
        # A mapping that moves itself and is no dict, such as a TensorDict, keeps its items in a way of its own.
        return list(node.values()) if isinstance(node, (dict, UserDict)) or not has_to(node) else None
    if isinstance(node, (list, tuple)):
        # A PackedSequence is a tuple, and one of its tensors must stay on the CPU.
        return None if has_to(node) else list(node)
    if _is_dataclass(node):
        return [getattr(node, item.name) for item in fields(node) if hasattr(node, item.name)]
    leaves, _ = tree_flatten(node, is_leaf=lambda item: item is not node)
    return None if len(leaves) == 1 and leaves[0] is node else leaves


def _with_children(node: Any, children: Sequence[Any]) -> Any:
    """A container like `node` with other items."""
    try:
        if isinstance(node, Mapping):
            items = dict(zip(node, children, strict=True))
            if not hasattr(node, "__setitem__"):
                return type(node)(items)  # type: ignore[call-arg]
            made: Any = copy.copy(node)
            for key, value in items.items():
                made[key] = value
            return made
        if _is_record(node):
            return type(node)(*children)
        if isinstance(node, (list, tuple)):
            return type(node)(children)
        if _is_dataclass(node):
            made = copy.copy(node)
            names = [item.name for item in fields(node) if hasattr(node, item.name)]
            for name, value in zip(names, children, strict=True):
                object.__setattr__(made, name, value)  # of a frozen one as well
            return made
    except TypeError as error:
        raise SettingError(
            "collate_fn",
            ABSENT,
            f"a {type(node).__name__} in a batch cannot be made anew with other items ({error})",
            "let it return a dict, tuple or dataclass, or give the type a .to(device)",
        ) from error
    _, spec = tree_flatten(node, is_leaf=lambda item: item is not node)
    return tree_unflatten(list(children), spec)


def _length_of_plain_list(batch: Any) -> int | None:
    children = _children(batch)
    if children is None:
        return None
    inner = [_children(child) for child in children]
    if isinstance(batch, (list, tuple)) and not _is_record(batch) and all(item is None for item in inner):
        return len(batch)
    return next((found for child in children if (found := _length_of_plain_list(child)) is not None), None)


def _is_record(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _is_dataclass(node: Any) -> bool:
    return is_dataclass(node) and not isinstance(node, type)
