"""Evaluation of one split: exact over all samples, whatever the number of ranks.

The loss here is the mean over samples, each batch's mean loss counting by its number of samples.
In training it is the plain mean over micro-batches and data ranks. The two agree where batches are of one size, and are
exact where a batch's loss is a mean over its samples; a mean over something that samples hold unequally much of, such
as tokens that are not masked, weighs each sample alike, and not each token. A loss that returns a sum and its count
is the mean over what it counts, here and in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from danling_conf._torch_private import saved_buffers
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.process_group import is_distributed
from danling_conf.runner.batch import count_samples, metric_inputs, to_device
from danling_conf.runner.data import any_batch
from danling_conf.runner.observe.meters import reduce_sum


def measure(passes: Passes, loader: Any, *, metrics: Mapping[str, Any], device: torch.device) -> dict[str, float]:
    """Mean loss over all samples of a split, and its metrics. Collective.

    A rank may have a batch less than another. Forward passes communicate, so it takes part with a batch that it has
    seen, and drops the result.

    What is evaluated is what a checkpoint would hold, and the results are the same on every rank: rank 0's buffers and
    rank 0's results are used on all; in a pipeline, those of the first rank of each stage, and of the last stage. A
    metric that does not synchronise itself over ranks, unlike those of torchmetrics, is thus that of one rank's share
    of the samples.

    Args:
        passes: of the model, which is left in the mode (train or eval) that it came in.
        loader: yields this rank's batches.
        metrics: torchmetrics objects by name (anything with `update`, `compute` and `reset`).
    """
    model = passes.model
    training = model.parts[0].training
    model.train(False)
    for part in model.parts:
        _share_buffers(part, model.batch if model.pipeline is not None else None)
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for metric in metrics.values():
        metric.reset()

    def update(output: Any, batch: Any) -> None:
        for metric in metrics.values():
            metric.update(*metric_inputs(output, batch))

    try:
        for batch, largest, counts in _as_many_as_the_longest(loader, device):
            batch = batch if device.type == "cpu" else to_device(batch, device)
            measured = passes.evaluate(batch, largest=largest, counts=counts, use=update if metrics else None)
            # The weight may be a tensor on the device: read as a number, each batch would wait for it.
            sums += torch.stack([measured.total.double(), sums.new_tensor(0.0) + measured.weight])
        results = {name: float(metric.compute()) for name, metric in metrics.items()}
    finally:
        model.train(training)
    mean = reduce_sum(sums).ratio()
    return _of_one_rank(results if mean is None else {"loss": mean, **results}, passes.rank_with_outputs, device)


def _share_buffers(model: nn.Module, batch: DeviceMesh | None) -> None:
    """Copy rank 0's saved buffers of floating point to every rank: running statistics follow each rank's own samples.
    In a pipeline, each stage has its own, and `batch` are the ranks that share them."""
    if not is_distributed():
        return
    group = None if batch is None else batch.get_group()
    for buffer in saved_buffers(model):
        if buffer.is_floating_point() and not isinstance(buffer, DTensor):
            shared = buffer.detach().contiguous()
            distributed.broadcast(shared, group=group, group_src=0)
            buffer.copy_(shared)


def _of_one_rank(results: dict[str, float], source: int, device: torch.device) -> dict[str, float]:
    """The results of the rank `source`, on every rank: what follows from them (a new best, an early stop) must not
    differ."""
    if not results or not is_distributed():
        return results
    values = torch.tensor(list(results.values()), dtype=torch.float64, device=device)
    distributed.broadcast(values, src=source)
    return dict(zip(results, values.tolist(), strict=True))


def _as_many_as_the_longest(loader: Any, device: torch.device) -> Iterator[tuple[Any, int, bool]]:
    """Batches, as many on every rank as on the rank that has most; each with the number of samples of the largest batch
    that a rank has now, and whether it counts."""
    if not is_distributed():
        yield from ((batch, count_samples(batch), True) for batch in loader)
        return
    last = None
    iterator = iter(loader)
    while True:
        batch = next(iterator, None)
        samples = torch.tensor(0 if batch is None else count_samples(batch), device=device)
        distributed.all_reduce(samples, op=distributed.ReduceOp.MAX)
        largest = int(samples.item())
        if not largest:
            return
        if batch is not None:
            last = batch
        elif last is None:
            last = any_batch(loader)
        yield last, largest, batch is not None
