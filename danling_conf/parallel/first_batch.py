"""First batch of a split: what does not fit in it is said by its name and the line of the program, not by torch.

The usual faults of a new program (float64 of numpy, labels of int32, a loss that takes other arguments) show when the
model and the loss are first called. They are looked for there and nowhere else: later batches pay nothing.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.overrides import TorchFunctionMode

from danling_conf.components.batch import described, named_tensors, names_of
from danling_conf.parallel.unfit_calls import Call, Unfit, after, before
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError

_TORCH, _OURS = (os.path.dirname(os.path.abspath(item)) + os.sep for item in (torch.__file__, inspect.getfile(Call)))
_OURS = os.path.dirname(_OURS.rstrip(os.sep)) + os.sep
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class _Calls(TorchFunctionMode):
    """Looks at each call of a function of torch before it, and keeps the one that raised."""

    def __init__(self, given: Callable[[Tensor], bool], *, of_loss: bool) -> None:
        super().__init__()
        self.given, self.of_loss = given, of_loss
        self.failed: Call | None = None
        self.unfit: Unfit | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # a function that the user compiles, inside of it
            return func(*args, **(kwargs or {}))
        call = Call(getattr(func, "__name__", ""), args, kwargs or {})
        self.unfit = before(call, self.given) if self.of_loss or call.name == "embedding" else None
        if self.unfit is not None:
            raise _DoesNotFit
        try:
            return func(*args, **call.kwargs)
        except Exception:
            self.failed = call
            raise


class _DoesNotFit(Exception):
    """Leaves the user's code for the sentence about it."""


@contextmanager
def watched_model(split: str, module: Any, batch: Any, *, alone: bool = False) -> Iterator[None]:
    """The context of a model's forward on the first batch of a split.

    Args:
        batch: what the model is called with.
        alone: whether ranks must not wait for each other here, so that a refusal is one rank's own.

    Raises:
        SettingError: the batch does not fit the model, for all ranks alike.
        ConfigRefused: it does not fit by this rank's values, or `alone`.
    """
    calls = _Calls(lambda _: False, of_loss=False)
    try:
        with calls:
            yield
    except Exception as error:
        unfit = calls.unfit or (after(calls.failed) if calls.failed is not None else None)
        if unfit is None and calls.failed is None and _is_of_an_argument(error) and not isinstance(batch, Tensor):
            raise _no_tensor(error, module, batch, split, alone=alone) from error
        if unfit is None:
            _add_note(error, split, batch)
            raise
        name = _name(unfit.culprit, {"batch": batch})
        path = "model" if name is None else f"datasets.{split}"
        where = _where(error, module)
        # By its values, another rank may not find it, and is on its way to the collectives of the forward.
        alone = alone or unfit.by_values
        raise _refusal(path, unfit, name or "its input", where, batch, split, alone=alone) from error


@contextmanager
def watched_loss(split: str, loss: Callable[..., Any], output: Any, batch: Any) -> Iterator[None]:
    """Likewise of a loss, by SettingError. Refuses outputs of shape (B, 1) for targets of (B,) too, which torch does
    not."""
    given = {"output": output, "batch": batch}
    identities = {id(item) for value in given.values() for _, item in named_tensors(value, "")}
    calls = _Calls(lambda item: id(item) in identities, of_loss=True)
    try:
        with calls:
            yield
    except Exception as error:
        if isinstance(error, TypeError) and (found := _uncallable(loss, batch, calls.failed)) is not None:
            raise found from error
        unfit = calls.unfit or (after(calls.failed) if calls.failed is not None else None)
        if unfit is None:
            _add_note(error, split, batch)
            raise
        name = _name(unfit.culprit, given) or "the targets"
        raise _refusal("loss", unfit, name, _where(error, None), batch, split) from error


def _refusal(
    path: str, unfit: Unfit, name: str, where: str, batch: Any, split: str, *, alone: bool = False
) -> SettingError | ConfigRefused:
    rule = f"{where}{unfit.rule}; the first batch of {split} is {_shown(batch)}"
    fix = unfit.fix.format(name)
    if path.startswith("datasets.") and not unfit.by_values:
        fix += ", or let the data set return it so"
    error = SettingError(path, ABSENT, rule, fix)
    return ConfigRefused([error.violation]) if alone else error


def _is_of_an_argument(error: Exception) -> bool:
    """Whether torch has refused an argument for its type, before it looked at tensors."""
    last = [frame.f_code.co_filename for frame, _ in _frames(error.__traceback__)][-1]
    return isinstance(error, TypeError) and last.startswith(_TORCH)


def _no_tensor(error: Exception, module: Any, batch: Any, split: str, *, alone: bool) -> SettingError | ConfigRefused:
    why = str(error).partition("\n")[0]
    rule = f"{_where(error, module)}torch takes no such argument ({why}); the first batch of {split} is {_shown(batch)}"
    first = next(iter(names_of(batch)), "0")
    fix = f"name what the model takes (batch.inputs=[{first}], or batch.inputs={{x: {first}}}), or pass forward="
    found = SettingError("batch.inputs", ABSENT, rule, fix)
    return ConfigRefused([found.violation]) if alone else found


def _uncallable(loss: Callable[..., Any], batch: Any, call: Call | None) -> SettingError | None:
    """Why a loss cannot be called with an output and a batch; None where it can."""
    fix = "pass a function of both, such as loss=lambda output, batch: cross_entropy(output, batch[1])"
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError as error:
        rule = f"it is called with the model's output and the batch: {error}"
        return SettingError("loss", ABSENT, rule, fix)
    except ValueError:  # a function without a signature
        return None
    if call is not None and not isinstance(batch, Tensor) and any(item is batch for item in call.args):
        rule = (
            f"{call.name} takes tensors, and the loss is called with the model's output and the batch, {_shown(batch)}"
        )
        return SettingError("loss", ABSENT, rule, fix)
    return None


def _add_note(error: Exception, split: str, batch: Any) -> None:
    error.add_note(f"this was the first batch of {split}: {_shown(batch)}")


def _name(culprit: Tensor | None, given: Mapping[str, Any]) -> str | None:
    """What a tensor is called in the program; None for one that is no item of what was given."""
    if culprit is None:
        return None
    named = [pair for name, value in given.items() for pair in named_tensors(value, name)]
    found = next((name for name, item in named if item is culprit), None)
    if found is not None:
        return found
    # A view, or what was computed of it: the one item of that dtype and number of elements is meant.
    alike = [name for name, item in named if item.dtype == culprit.dtype and item.numel() == culprit.numel()]
    return alike[0] if len(alike) == 1 else None


def _where(error: BaseException, module: Any) -> str:
    """The module and the user's line in which an error arose, as the beginning of a sentence."""
    name, line = None, None
    names = _names(module) if isinstance(module, nn.Module) else {}
    for frame, number in _frames(error.__traceback__):
        this, file = frame.f_locals.get("self"), frame.f_code.co_filename
        if isinstance(this, nn.Module) and id(this) in names:
            name = names[id(this)]
        if not file.startswith((_TORCH, _OURS)) and os.path.isfile(file):
            line = f"{Path(file).name}:{number}"
    parts = [item for item in (name, line) if item]
    return f"in {', '.join(parts)}, " if parts else ""


def _names(module: nn.Module) -> dict[int, str]:
    found = {}
    for name, part in module.named_modules():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        # FSDP2 makes a class of its own of each that it shards.
        kind = type(part).__mro__[2 if isinstance(part, FSDPModule) else 0].__name__
        found[id(part)] = f"{name} ({kind})" if name else kind
    return found


def _frames(trace: TracebackType | None) -> Iterator[tuple[Any, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _shown(batch: Any) -> str:
    """A batch by its tensors: `batch[0] float64 (8, 8), batch[1] int64 (8,)`."""
    parts = [
        f"{name} {str(item.dtype).removeprefix('torch.')} {tuple(item.shape)}"
        for name, item in named_tensors(batch, "batch")
    ]
    return ", ".join(parts[:6]) + (f" and {len(parts) - 6} more" if len(parts) > 6 else "") or described(batch)
