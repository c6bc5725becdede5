"""Contents of a checkpoint's small files: what must be in `shared.pt` and in a rank's file, and of which type.

A fitting checksum says that a file is as it was written, not that a run has written it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.safe_load import load_plain
from danling_conf.checkpoint.state import Known
from danling_conf.topology.violation import ConfigRefused, SettingError

_Check = Callable[[Any], bool]
_MOST_STEPS = 1 << 62


def shared(path: Path) -> dict[str, Any]:
    """The state that all ranks share. Raises Broken."""
    found = _table(path, ("optimizer", "scheduler", "scaler", "runner", "settings"), "what was saved of a run")
    for name in ("scheduler", "scaler"):
        _require(path, found, name, lambda value: value is None or _is_named(value), "a table or nothing")
    for name in ("optimizer", "runner", "settings"):
        _require(path, found, name, _is_named, "a table")
    if "callbacks" in found:
        _require(path, found, "callbacks", _is_named, "a table")
    runner = found["runner"]
    for name in ("global_step", "epoch", "epoch_step"):
        if name in runner:
            _require(path, runner, name, _is_count, "a count", inside="runner.")
    for name, fits in (("results", _is_number), ("evaluated_at", _is_count)):
        if name in runner:
            _require(path, runner, name, _is_table_of(fits), "a table of numbers", inside="runner.")
    _check_optimizer(path, found["optimizer"])
    return found


def own(path: Path) -> dict[str, Any]:
    """The state of one rank. Raises Broken."""
    found = _table(path, ("loader", "generators"), "a rank's part of a checkpoint")
    _require(path, found, "generators", lambda value: value is None or _is_state(value), "a table or nothing")
    _require(path, found, "loader", lambda value: value is None or _is_loader(value), "the state of a loader")
    return found


def loader(path: Path) -> dict[str, Any]:
    """The state of a loader in a file of its own. Raises Broken."""
    found = load_plain(path)
    if not _is_loader(found):
        raise Broken(f"{path}: it is not the state of a loader")
    return found  # type: ignore[no-any-return]


@contextmanager
def as_saved(path: Path, what: str) -> Iterator[None]:
    """Raise Broken where a part of a file cannot be taken over: it is not what a run has saved there."""
    try:
        yield
    except (Broken, SettingError, ConfigRefused):
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise Broken(f"{path}: its {what} is not what was saved of a run: {reason}") from error


def alike(saved: Any, current: Any) -> bool:
    """Whether a saved value is of the kind of the present one: a number, as many numbers, a table with its names. One
    of another kind would fail in the first step, or in the first product."""
    if current is None or saved is None:
        return current is None
    if isinstance(current, dict):
        return isinstance(saved, dict) and all(
            name in saved and alike(saved[name], value) for name, value in current.items()
        )
    if isinstance(current, (list, tuple)):
        if not isinstance(saved, (list, tuple)):
            return False
        return not current or (len(saved) == len(current) and all(map(alike, saved, current)))
    if isinstance(saved, torch.Tensor) and not isinstance(current, torch.Tensor) and saved.numel() != 1:
        return False
    numbers = (int, float, complex, torch.Tensor)
    return isinstance(saved, numbers) if isinstance(current, numbers) else isinstance(saved, type(current))


def tensors_of(options: Mapping[str, Any]) -> dict[str, Known] | None:
    """Shape and dtype of the tensors that were in the optimizer's state, by name; None where it does not say."""
    if "tensors" not in options:
        return None
    return {name: Known(tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in options["tensors"].items()}


def _check_optimizer(path: Path, options: dict[str, Any]) -> None:
    for name in ("groups", "values", "extra"):
        if name not in options:
            raise Broken(f"{path}: its optimizer has no {name}, which is part of what was saved of a run")
    _require(path, options, "groups", _is_groups, "a list of groups of parameters", inside="optimizer.")
    _require(path, options, "values", _is_table_of(_is_named), "a table by parameter", inside="optimizer.")
    _require(path, options, "extra", _is_named, "a table", inside="optimizer.")
    for name, fits in (("frozen", _is_whole), ("tensors", _is_description)):
        if name in options:
            _require(path, options, name, _is_table_of(fits), "a table by parameter", inside="optimizer.")


def _table(path: Path, names: tuple[str, ...], what: str) -> dict[str, Any]:
    found = load_plain(path)
    if not (_is_named(found) and found.keys() >= set(names)):
        raise Broken(f"{path}: it is not {what}, which holds {', '.join(names)}")
    return found  # type: ignore[no-any-return]


def _require(path: Path, table: Mapping[str, Any], name: str, fits: _Check, called: str, *, inside: str = "") -> None:
    if not fits(table[name]):
        raise Broken(f"{path}: its {inside}{name} is not {called}, which was saved there")


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _is_state(value: Any) -> bool:
    # An empty one, a loader takes without a word, and begins its epoch anew.
    return _is_named(value) and len(value) > 0


_LOADER_COUNTS = (
    "epoch", "taken_by_all", "samples_yielded", "_num_yielded", "_sampler_iter_yielded", "_steps_since_snapshot",
    "_num_workers",
)  # fmt: skip
_LOADER_TABLES = ("loader", "_snapshot", "_main_snapshot", "_sampler_iter_state", "sampler_iter_state")


def _is_loader(value: Any) -> bool:
    """Whether a value can be the state of a loader. What a data set of the user's saves in it may be anything."""
    if not _is_state(value) or not all(_is_count(value[name]) for name in _LOADER_COUNTS if name in value):
        return False
    if "sampler_iter_state" in value and "samples_yielded" not in value:
        return False
    if "taken_by_all" in value and "epoch" not in value:
        return False
    if "_sampler_iter_state" in value and "_index_sampler_state" not in value:
        return False
    return all(value[name] is None or _is_loader(value[name]) for name in _LOADER_TABLES if name in value)


def _is_table_of(fits: _Check) -> _Check:
    return lambda value: _is_named(value) and all(fits(item) for item in value.values())


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_whole(value) and 0 <= value < _MOST_STEPS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_groups(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(_is_named(group) and group.keys() >= {"names", "options"} for group in value)
        and all(isinstance(group["names"], list) and _is_named(group["options"]) for group in value)
        and all(isinstance(name, str) for group in value for name in group["names"])
    )


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], list)
        and all(_is_whole(size) and size >= 0 for size in value[0])
        and isinstance(value[1], str)
        and isinstance(getattr(torch, value[1], None), torch.dtype)
    )
