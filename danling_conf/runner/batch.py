"""What of a batch goes where: to the model, to its loss, to metrics."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danling_conf.components.batch import described, item_of, names_of
from danling_conf.schema.dataloader import BatchConfig
from danling_conf.topology.violation import ABSENT, SettingError

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""

MetricInputs = Callable[[Any, Any], tuple[Any, ...]]
"""Arguments of a metric's `update`, from the model's output and the batch."""

_TARGETS = ("labels", "label", "targets", "target")


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: the first of a pair, the items of a mapping as keywords, or the batch itself."""
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    if isinstance(batch, Mapping):
        return _call(model, batch, (), {str(key): value for key, value in batch.items()})
    return model(batch)


def forward_of(section: BatchConfig) -> Forward:
    """How a model is called with a batch where the user passes no `forward`, as `batch.inputs` says."""
    inputs = section.inputs
    if inputs is None:
        return default_forward
    arguments = dict(inputs) if isinstance(inputs, Mapping) else {str(name): str(name) for name in inputs}

    def forward(model: nn.Module, batch: Any) -> Any:
        values = {name: _item(batch, str(item), "batch.inputs") for name, item in arguments.items()}
        by_position = [value for name, value in values.items() if name.isdigit()]
        by_keyword = {name: value for name, value in values.items() if not name.isdigit()}
        return _call(model, batch, tuple(by_position), by_keyword)

    return forward


def loss_of_output(output: Any, batch: Any) -> Tensor:
    """The loss that a model returns itself (`output.loss`, as Hugging Face's do)."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise SettingError(
            "loss",
            ABSENT,
            f"no loss was passed, and the model's output ({type(output).__name__}) has none",
            "pass loss=, a function of output and batch",
        )
    return loss


def metric_inputs_of(section: BatchConfig) -> MetricInputs:
    """What metrics are updated with where the user passes no `metric_inputs`: predictions, then targets.

    Predictions are the output, or its `logits` where it is no tensor and has them. Targets are the items that
    `batch.targets` names, else the first of `labels`, `label`, `targets` and `target` that the batch has, else the
    second item of a tuple or list.
    """
    names = section.targets

    def inputs(output: Any, batch: Any) -> tuple[Any, ...]:
        if names is None:
            return _predictions(output), _targets(batch)
        return (_predictions(output), *(_item(batch, name, "batch.targets") for name in names))

    return inputs


def _predictions(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def _targets(batch: Any) -> Any:
    for name in _TARGETS:
        if name in names_of(batch) or (not isinstance(batch, (tuple, list, Mapping, Tensor)) and hasattr(batch, name)):
            return item_of(batch, name)
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return batch[1]
    raise SettingError(
        "batch.targets",
        None,
        f"metrics are updated with targets, and {described(batch)} has no {', '.join(_TARGETS)}",
        "name them (batch.targets=[y]), or pass metric_inputs=, a function of output and batch",
    )


def _item(batch: Any, name: str, path: str) -> Any:
    try:
        return item_of(batch, name)
    except KeyError:
        raise SettingError(path, name, f"{described(batch)} has no such item", "name one that it has") from None


def _call(model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        # Only a call that does not fit the signature is the batch's fault; all else is an error inside the model.
        unfit = _unfit(model, args, kwargs)
        if unfit is None:
            raise
        first = next(iter(names_of(batch)), "0")
        raise SettingError(
            "batch.inputs",
            ABSENT,
            f"{unfit}, and it is called with {described(batch)}",
            f"name the items that it takes (batch.inputs=[{first}], or batch.inputs={{x: {first}}}), or pass forward=",
        ) from error


def _unfit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a model cannot be called with these arguments; None where it can."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(inner, nn.Module):  # a stage of a pipeline
        return None
    try:
        inspect.signature(type(inner).forward).bind(inner, *args, **kwargs)
    except TypeError as error:
        return f"{type(inner).__name__}.forward: {error}"
    return None
