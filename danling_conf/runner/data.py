"""Loaders of a run's splits, and how ranks agree on the number of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from danling_conf.components import dataloader
from danling_conf.components.samplers import ShardedSampler
from danling_conf.parallel.context import sequence_length
from danling_conf.parallel.init_plan import seeded
from danling_conf.parallel.model import Assembled
from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.waiting import waiting
from danling_conf.schema.dataloader import DataloaderConfig
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import ABSENT, SettingError

Batch = TypeVar("Batch")


def make_loaders(
    datasets: Mapping[str, Any],
    section: DataloaderConfig,
    *,
    data_rank: int,
    data_degree: int,
    seed: int,
    collate_fn: Callable[[list[Any]], Any] | None,
) -> dict[str, Any]:
    """One loader a split.

    Raises:
        SettingError: there is no split `train`, or one without samples.
    """
    if "train" not in datasets:
        known = ", ".join(datasets) or "none"
        raise SettingError("datasets", ABSENT, f"there is no split train among {known}", "name it so")
    for split, dataset in datasets.items():
        if hasattr(dataset, "__len__") and not len(dataset):
            rule = f"the split {split} has no samples"
            raise SettingError("datasets", ABSENT, rule, "leave it out, or pass one that has some")
    return {
        split: dataloader.make(
            dataset,
            section,
            split,
            data_rank=data_rank,
            data_degree=data_degree,
            seed=seed,
            collate_fn=collate_fn,
        )
        for split, dataset in datasets.items()
    }


def batches_per_epoch(loader: Any) -> int | None:
    """Batches of a training epoch on the rank that has fewest; None for data without a length. Collective."""
    return shortest_length(len(loader) if hasattr(loader.dataset, "__len__") else None)


def same_number_on_all_ranks(loader: Any, iterator: Iterator[Any]) -> Iterator[Any]:
    """An epoch's batches, as many on every rank. The sampler of a map-style data set shares it out evenly; the shares
    of an iterable one may differ."""
    return iterator if isinstance(loader.sampler, ShardedSampler) else while_all_have_one(iterator)


def while_all_have_one(iterator: Iterator[Batch]) -> Iterator[Batch]:
    """Batches for as long as every rank has one; what a rank has beyond that is not used. Collective.

    For training on an iterable data set, whose shares may differ: a rank that continued alone would reduce gradients
    with ranks that are past it. One number is reduced before each batch.
    """
    if not is_distributed():
        yield from iterator
        return
    for batch in iterator:
        if not _least(1):
            return
        yield batch
    _least(0)


def shortest_length(length: int | None) -> int | None:
    """Batches of an epoch on the rank that has fewest; None where a rank does not know (None). Collective."""
    if not is_distributed():
        return length
    least = _least(-1 if length is None else length)
    return None if least < 0 else least


def _least(value: int) -> int:
    # On the CPU, over gloo: ranks agree on how much data there is without waiting for an accelerator.
    shared = torch.tensor(value, device="cpu")
    with waiting("the number of batches"):
        distributed.all_reduce(shared, op=distributed.ReduceOp.MIN)
    return int(shared.item())


def evaluated_splits(splits: Mapping[str, Any], score_split: str, *, final: bool) -> list[str]:
    """The splits that an evaluation looks at: a test split only at the end, unless the score comes from it."""
    return [
        split
        for split in splits
        if not dataloader.is_training(split) and (final or not split.startswith("test") or split == score_split)
    ]


def any_batch(loader: Any, size: int = 1) -> Any:
    """A batch of the data set's first sample, `size` times: for a rank that has none, or to look at."""
    dataset = loader.dataset
    sample = dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))
    collate = loader.collate_fn or torch.utils.data.default_collate
    return collate([sample] * size)


def example_of(loader: Any, seed: int) -> Callable[[], Any] | None:
    """A function that returns a batch of two samples to look at; None for data without random access, of which looking
    takes a sample away. It leaves the generators as they are."""
    if not hasattr(loader.dataset, "__getitem__"):
        return None

    def example() -> Any:
        with seeded(seed):
            return any_batch(loader, size=2)

    return example


def check_sequences(loaders: Mapping[str, Any], model: Assembled, layout: Layout, section: ParallelConfig) -> None:
    """Look at a sample of each split before the first step: a sequence that the ranks cannot share evenly would end the
    run later. Data without random access is not looked at. Raises SettingError."""
    shares = layout.tensor if section.sequence_parallel else 1
    if model.context is None and shares == 1:
        return
    for loader in loaders.values():
        if not hasattr(loader.dataset, "__getitem__"):
            continue
        batch = any_batch(loader)
        length = sequence_length(batch if model.context is None else model.context.part(batch))
        if length is not None and length % shares:
            raise SettingError(
                "parallel.sequence_parallel",
                True,
                f"a sequence of {length} tokens cannot be shared out evenly over the tensor degree, {shares}",
                "make its length a multiple, or set sequence_parallel to false",
            )
