"""Batches as the runner reads them: pairs, mappings and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from danling_conf._torch_private import map_tensors

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on a batch."""


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: the first of a pair, the items of a mapping as keywords, or the batch itself."""
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)


def loss_of_output(output: Any, batch: Any) -> Tensor:
    """The loss that a model returns itself (`output.loss`, as Hugging Face's do)."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(f"no loss was passed, and the model's output ({type(output).__name__}) has none: pass loss=")
    return loss


def metric_inputs(output: Any, batch: Any) -> tuple[Any, Any]:
    """What a metric is updated with: the output, and the second of a pair or the labels of a mapping."""
    if isinstance(batch, (tuple, list)):
        return output, batch[1]
    if isinstance(batch, Mapping) and "labels" in batch:
        return getattr(output, "logits", output), batch["labels"]
    raise TypeError(f"a batch of type {type(batch).__name__} has no targets for metrics: use pairs, or labels")


def count_samples(batch: Any) -> int:
    """Samples in a batch: the length of its first tensor.

    Raises TypeError when it holds no tensor.
    """
    if isinstance(batch, Tensor):
        return batch.shape[0]
    items = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(batch, (tuple, list, Mapping)):
        for item in items:
            if isinstance(item, (Tensor, tuple, list, Mapping)):
                return count_samples(item)
    raise TypeError(f"a batch of type {type(batch).__name__} holds no tensor to count samples by")


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device."""
    return map_tensors(lambda item: item.to(device, non_blocking=True), batch)
