"""Evaluation of one split: exact over all samples, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from danling_conf.runner.batch import Forward, count_samples, metric_inputs, to_device
from danling_conf.runner.meters import reduce_sum


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Any,
    *,
    forward: Forward,
    loss: Callable[[Any, Any], Tensor],
    metrics: Mapping[str, Any],
    device: torch.device,
) -> dict[str, float]:
    """Mean loss over all samples of a split, and its metrics. Collective.

    A rank may have a batch less than another. Forward passes communicate, so it takes part with a batch that it has
    seen, and leaves the outcome out.

    Args:
        model: left in the mode (train or eval) that it came in.
        loader: yields this rank's batches.
        metrics: torchmetrics objects by name (anything with `update`, `compute` and `reset`).
    """
    training = model.training
    model.eval()
    # DDP's forward would synchronise buffers, which evaluation does not change.
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for metric in metrics.values():
        metric.reset()
    try:
        for batch, counts in _aligned(loader, device):
            batch = batch if device.type == "cpu" else to_device(batch, device)
            output = forward(inner, batch)
            value = loss(output, batch)
            if counts:
                samples = count_samples(batch)
                sums += torch.stack([value.double() * samples, value.new_tensor(samples, dtype=torch.float64)])
                for metric in metrics.values():
                    metric.update(*metric_inputs(output, batch))
        results = {name: float(metric.compute()) for name, metric in metrics.items()}
    finally:
        model.train(training)
    mean = reduce_sum(sums).ratio()
    return results if mean is None else {"loss": mean, **results}


def _aligned(loader: Any, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """Batches with whether they count: on every rank as many as on the rank that has most."""
    if not (distributed.is_initialized() and distributed.get_world_size() > 1):
        yield from ((batch, True) for batch in loader)
        return
    last = None
    iterator = iter(loader)
    while True:
        batch = next(iterator, None)
        more = torch.tensor(int(batch is not None), device=device)
        distributed.all_reduce(more, op=distributed.ReduceOp.MAX)
        if not more.item():
            return
        if batch is not None:
            last = batch
        elif last is None:
            last = _any_batch(loader)
        yield last, batch is not None


def _any_batch(loader: Any) -> Any:
    """A batch for a rank that has none: the data set's first sample."""
    dataset = loader.dataset
    sample = dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))
    collate = loader.collate_fn or torch.utils.data.default_collate
    return collate([sample])
