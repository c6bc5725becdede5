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

from danling_conf._torch_private.attributes import saved_buffers
from danling_conf.components.batch import CountSamples, to_device
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.gathering_loss import uneven
from danling_conf.parallel.process_group import is_distributed
from danling_conf.runner.batch import MetricInputs
from danling_conf.runner.observe.meters import reduce_sum
from danling_conf.topology.violation import ConfigRefused


def measure(
    passes: Passes,
    loader: Any,
    split: str,
    *,
    metrics: Mapping[str, Any],
    metric_inputs: MetricInputs,
    device: torch.device,
) -> dict[str, float]:
    """Mean loss over all samples of a split, and its metrics. Collective.

    A rank may have fewer batches than another, or none. Forward passes communicate, so it takes part with a batch that
    it has seen, or that another rank sends it, and drops the result.

    What is evaluated is what a checkpoint would hold, and the results are the same on every rank: rank 0's buffers and
    rank 0's results are used on all; in a pipeline, those of the first rank of each stage, and of the last stage. A
    metric that does not synchronise itself over ranks, unlike those of torchmetrics, is thus that of one rank's share
    of the samples.

    Raises:
        ConfigRefused: on all ranks: they have different batches, and the loss communicates.

    Args:
        passes: of the model, which is left in the mode (train or eval) that it came in.
        loader: yields this rank's batches.
        metrics: torchmetrics objects by name (anything with `update`, `compute` and `reset`).
        metric_inputs: makes the arguments of `update` from output and batch.
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
        inputs = metric_inputs(output, batch)
        for metric in metrics.values():
            metric.update(*inputs)

    try:
        for batch, largest, counts, even in _as_many_as_the_longest(loader, passes.count):
            if passes.communicates and not even:
                raise ConfigRefused([uneven(split)])
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


def _as_many_as_the_longest(loader: Any, count: CountSamples) -> Iterator[tuple[Any, int, bool, bool]]:
    """Batches, as many on every rank as on the rank that has most; each with the number of samples of the largest batch
    that a rank has now, whether it counts, and whether all ranks have one of that size."""
    if not is_distributed():
        yield from ((batch, count(batch), True, True) for batch in loader)
        return
    last = None
    iterator = iter(loader)
    while True:
        batch = next(iterator, None)
        has = batch is not None
        last = batch if has else last
        found = exchange(last, has, count(batch) if has else 0)
        if found is None:
            return
        last, largest, even = found
        yield last, largest, has, even


def exchange(last: Any, has: bool, samples: int) -> tuple[Any, int, bool] | None:
    """A batch for every rank, where any has a new one. Collective, over the CPU.

    Args:
        last: the newest batch of this rank; None where it never had one, which gets another rank's.
        has: whether it is a new one.
        samples: in it.

    Returns:
        A batch, the most samples that a new batch has on any rank, and whether every rank has a new one with as many;
        None where no rank has a new one.
    """
    rank = distributed.get_rank()
    shared = torch.tensor([rank if has else -1, samples, int(last is None), -samples])
    distributed.all_reduce(shared, op=distributed.ReduceOp.MAX)
    source, largest, lacking, least = shared.tolist()
    if source < 0:
        return None
    if lacking:
        sent = [last if rank == source else None]
        distributed.broadcast_object_list(sent, src=source)
        last = sent[0] if last is None else last
    return last, largest, largest == -least
