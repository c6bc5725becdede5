"""Unfit calls: which fault of a batch it is that a function of torch cannot take its arguments.

torch names two dtypes, or an index out of range, and not what of a batch they are; on an accelerator an index out of
range ends the process. And it broadcasts outputs of shape (B, 1) against targets of shape (B,), with a number for a
loss that is not meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from danling_conf._torch_private.fakes import is_fake
from danling_conf.components.batch import tensors

_CLASSES = ("cross_entropy", "nll_loss")
_BINARY = ("binary_cross_entropy", "binary_cross_entropy_with_logits")
_POINTWISE = ("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "poisson_nll_loss", "gaussian_nll_loss")
_ARITHMETIC = ("add", "sub", "subtract", "rsub", "mul", "multiply", "div", "true_divide", "eq", "ne")
_OF_ONE_DTYPE = frozenset(
    [
        "linear",
        "bilinear",
        "matmul",
        "__matmul__",
        "__rmatmul__",
        "mm",
        "bmm",
        "mv",
        "dot",
        "addmm",
        "baddbmm",
        "einsum",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "group_norm",
        "instance_norm",
        "prelu",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
    ]
)
_CLASS_DTYPES = (torch.int64, torch.uint8)


@dataclass(frozen=True)
class Call:
    """A call of a function of torch."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, position: int, name: str) -> Any:
        """An argument by its place or its name; None where it is not given."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    @property
    def tensors(self) -> list[Tensor]:
        return list(tensors([*self.args, *self.kwargs.values()]))


@dataclass(frozen=True)
class Unfit:
    """Why a call is at fault.

    Attributes:
        rule: what the function takes, and what it was given.
        fix: what to do; `{}` stands for the culprit's name.
        culprit: the tensor at fault; None where the model is.
        by_values: whether other samples could fit, so that other ranks may not find it.
    """

    rule: str
    fix: str
    culprit: Tensor | None = None
    by_values: bool = False


def before(call: Call, given: Callable[[Tensor], bool]) -> Unfit | None:
    """Why a call is at fault that torch would do: it would compute something else, or end the process.

    Args:
        given: whether a tensor is one of the model's output or the batch, as it is.
    """
    if call.name == "embedding":
        return _index_out_of_range(call)
    if call.name in _CLASSES:
        return _class_out_of_range(call)
    operator = call.name.strip("_").removeprefix("i") if call.name.startswith("__") else call.name
    pair = [item for item in (call.argument(0, "input"), call.argument(1, "target")) if isinstance(item, Tensor)]
    if len(pair) == 2 and (call.name in _POINTWISE or (operator in _ARITHMETIC and _are_meant_alike(pair, given))):
        return _crossed(call, *pair)
    return None


def _are_meant_alike(pair: list[Tensor], given: Callable[[Tensor], bool]) -> bool:
    """Whether two tensors are meant to have one shape: both as they are, or a column as it is beside one number a
    sample. A column that the loss makes itself (`x[:, None] - x`) is there to be compared with each."""
    shorter, longer = sorted(pair, key=lambda item: item.ndim)
    return all(map(given, pair)) or (given(longer) and longer.shape == (*shorter.shape, 1))


def after(call: Call) -> Unfit | None:
    """Why a call is at fault that torch refused; None where its own words have to do."""
    return next((found for rule in _RULES for found in rule(call)), None)


def _crossed(call: Call, mine: Tensor, other: Tensor) -> Unfit | None:
    try:
        found = torch.broadcast_shapes(mine.shape, other.shape)
    except RuntimeError:
        return None
    if found.numel() <= max(mine.numel(), other.numel()):
        return None
    longer, shorter = (mine, other) if mine.ndim > other.ndim else (other, mine)
    fix = "give both one shape, as by .squeeze(-1) of the one or .unsqueeze(-1) of the other"
    if longer.ndim == shorter.ndim:
        fix = "give both one shape"
    shapes = f"{_shape(mine)} and {_shape(other)}"
    rule = f"{call.name} broadcasts the shapes {shapes} to {tuple(found)}, and compares each sample with each"
    return Unfit(rule, fix, other)


def _index_out_of_range(call: Call) -> Unfit | None:
    indices, weight = call.argument(0, "input"), call.argument(1, "weight")
    if not _has_values(indices) or not isinstance(weight, Tensor) or _is_float(indices):
        return None
    return _out_of_range(indices, len(weight), f"an embedding of {len(weight)} rows", "make the embedding larger")


def _class_out_of_range(call: Call) -> Unfit | None:
    output, target = call.argument(0, "input"), call.argument(1, "target")
    if not isinstance(output, Tensor) or not _has_values(target) or _is_float(target) or not output.ndim:
        return None
    classes = output.shape[1] if output.ndim > 1 else output.shape[0]
    ignored = call.argument(4, "ignore_index")
    counted = target[target != (-100 if ignored is None else ignored)]
    # In (B, T, C) against (B, T), C is not where it is looked for.
    if target.ndim != max(output.ndim - 1, 0) or target.shape[:1] != output.shape[: min(1, target.ndim)]:
        return None
    if target.shape[1:] != output.shape[2:]:
        return None
    name = f"{call.name} of {classes} classes"
    return _out_of_range(counted, classes, name, "let the model return as many as there are")


def _out_of_range(values: Tensor, size: int, what: str, or_else: str) -> Unfit | None:
    if not values.numel():
        return None
    least, most = int(values.min()), int(values.max())
    if least >= 0 and most < size:
        return None
    rule = f"{what} takes 0 to {size - 1}, and was given {most if most >= size else least}"
    return Unfit(rule, f"count {{}} from 0, or {or_else}", values, by_values=True)


def _indices(call: Call) -> Iterator[Unfit]:
    if call.name == "embedding" and isinstance(indices := call.argument(0, "input"), Tensor) and _is_float(indices):
        yield Unfit(f"an embedding takes whole numbers, and was given {_kind(indices)}", "pass {}.long()", indices)


def _classes(call: Call) -> Iterator[Unfit]:
    if call.name not in _CLASSES:
        return
    output, target = call.argument(0, "input"), call.argument(1, "target")
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        return
    if target.ndim == output.ndim and target.ndim > 1 and target.shape[-1] == 1 and output.shape[-1] != 1:
        yield Unfit(f"{call.name} takes a class a sample, and was given {_kind(target)}", "pass {}.squeeze(-1)", target)
    elif output.ndim == 3 and target.shape == output.shape[:2]:
        rule = f"{call.name} takes the scores of classes along dim 1, and was given {_kind(output)} for {_kind(target)}"
        yield Unfit(rule, "pass output.flatten(0, 1) and {}.flatten()", target)
    elif target.dtype not in _CLASS_DTYPES and (target.shape != output.shape or not _is_float(target)):
        yield Unfit(f"{call.name} takes classes of int64, and was given {_kind(target)}", "pass {}.long()", target)


def _binary(call: Call) -> Iterator[Unfit]:
    if call.name not in _BINARY:
        return
    output, target = call.argument(0, "input"), call.argument(1, "target")
    if not isinstance(target, Tensor) or not isinstance(output, Tensor):
        return
    if target.shape != output.shape:
        rule = f"{call.name} takes targets of the output's shape, and was given {_shape(output)} and {_shape(target)}"
        yield Unfit(rule, "give both one shape, as by .squeeze(-1) of the one or .unsqueeze(-1) of the other", target)
    elif not _is_float(target):
        yield Unfit(f"{call.name} takes targets of floats, and was given {_kind(target)}", "pass {}.float()", target)


def _dtypes(call: Call) -> Iterator[Unfit]:
    """Mixed dtypes: the culprit is what is no weight's."""
    if call.name not in _OF_ONE_DTYPE:  # others take an index, or promote
        return
    found = [item for item in call.tensors if item.dtype != torch.bool]
    if len({item.dtype for item in found}) < 2 or not any(map(_is_float, found)):
        return
    weights = [item for item in found if isinstance(item, torch.nn.Parameter) or item.requires_grad]
    dtype = (weights or [item for item in found if _is_float(item)])[0].dtype
    culprit = next((item for item in found if item.dtype != dtype), None)
    if culprit is None:
        return
    given = " and ".join(dict.fromkeys(_dtype(item.dtype) for item in (culprit, *found)))
    rule = f"{call.name} takes one dtype, and was given {given}"
    yield Unfit(rule, f"pass {{}}.to(torch.{_dtype(dtype)})", culprit)


def _features(call: Call) -> Iterator[Unfit]:
    given, weight = call.argument(0, "input"), call.argument(1, "weight")
    if not isinstance(given, Tensor) or not isinstance(weight, Tensor):
        return
    if call.name == "linear" and weight.ndim == 2 and given.ndim and given.shape[-1] != weight.shape[1]:
        rule = f"linear of {weight.shape[1]} features was given {given.shape[-1]}, a tensor of shape {_shape(given)}"
        fix = "give the layer as many"
        if given.ndim > 2 and given[0].numel() == weight.shape[1]:
            fix = "flatten its input (nn.Flatten())"
        yield Unfit(rule, fix)
    if call.name in ("conv1d", "conv2d", "conv3d"):
        groups, dims = call.argument(6, "groups") or 1, weight.ndim
        channels = weight.shape[1] * groups
        if given.ndim not in (dims - 1, dims) or given.shape[1 - dims] == channels:
            return
        rule = (
            f"{call.name} of {channels} channels was given {given.shape[1 - dims]}, a tensor of shape {_shape(given)}"
        )
        last = given.shape[-1] == channels
        yield Unfit(rule, "move the channels in front of the pixels: .movedim(-1, 1)" if last else "give it as many")


_RULES: tuple[Callable[[Call], Iterator[Unfit]], ...] = (_indices, _classes, _binary, _dtypes, _features)


def _has_values(item: Any) -> bool:
    if not isinstance(item, Tensor) or isinstance(item, DTensor):
        return False
    return item.device.type != "meta" and not is_fake(item)


def _is_float(item: Tensor) -> bool:
    return item.is_floating_point()


def _shape(item: Tensor) -> tuple[int, ...]:
    return tuple(item.shape)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _kind(item: Tensor) -> str:
    return f"{_dtype(item.dtype)} of shape {_shape(item)}"
