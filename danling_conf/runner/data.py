"""Loaders of a run's splits, and how ranks agree on the number of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch.utils.data import DataLoader, IterableDataset

from danling_conf.components import dataloader
from danling_conf.components.samplers import ShardedSampler
from danling_conf.parallel.context import sequence_length
from danling_conf.parallel.init_plan import seeded
from danling_conf.parallel.model import Assembled
from danling_conf.parallel.process_group import gathered, is_distributed, refuse_together
from danling_conf.parallel.waiting import waiting
from danling_conf.schema.dataloader import DataloaderConfig
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import ABSENT, SettingError, Violation

Batch = TypeVar("Batch")


def make_loaders(
    datasets: Mapping[str, Any],
    section: DataloaderConfig,
    *,
    data_rank: int,
    data_degree: int,
    seed: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    evaluating: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """One loader a split. Collective.

    Args:
        data_rank, data_degree: which share this rank trains on.
        evaluating: which share it evaluates, rank and degree; None for the same.

    A data set is anything with `__getitem__` and `__len__`, a list of samples too, or a torch `IterableDataset`.

    Raises:
        ConfigRefused: on all ranks alike: there is no split `train`, or one without samples; something is no data set;
            ranks do not have the same splits, or as many samples.
        SettingError: see `components.dataloader.make`.
    """
    refuse_together(faults(datasets))
    refuse_together(_differences([dict(item) for item in gathered(_sizes(datasets))]))
    made = {}
    for split, dataset in datasets.items():
        own = (data_rank, data_degree)
        rank, degree = own if evaluating is None or dataloader.is_training(split) else evaluating
        made[split] = dataloader.make(
            dataset, section, split, data_rank=rank, data_degree=degree, seed=seed, collate_fn=collate_fn
        )
    return made


def batches_per_epoch(loader: Any) -> int | None:
    """Batches of a training epoch on the rank that has fewest; None for data without a length. Collective.

    Raises:
        SettingError: that rank has none.
    """
    found = shortest_length(len(loader) if hasattr(loader.dataset, "__len__") else None)
    if found == 0:
        raise no_batch("train")
    return found


def same_number_on_all_ranks(
    loader: Any, iterator: Iterator[Any], *, uneven: Callable[[], None] = lambda: None
) -> Iterator[Any]:
    """An epoch's batches, as many on every rank. The sampler of a map-style data set shares it out evenly; the shares
    of an iterable one may differ: `uneven` is called where they do."""
    return iterator if isinstance(loader.sampler, ShardedSampler) else while_all_have_one(iterator, uneven=uneven)


def while_all_have_one(iterator: Iterator[Batch], *, uneven: Callable[[], None] = lambda: None) -> Iterator[Batch]:
    """Batches for as long as every rank has one; what a rank has beyond that is not used. Collective.

    `uneven` is called, on every rank, where some ranks have a batch left that others have not.

    For training on an iterable data set, whose shares may differ: a rank that continued alone would reduce gradients
    with ranks that are past it. One number is reduced before each batch.
    """
    if not is_distributed():
        yield from iterator
        return
    while True:
        batch = next(iterator, None)
        least, most = _extremes(int(batch is not None))
        if not least:
            if most:
                uneven()
            return
        assert batch is not None  # every rank has one
        yield batch


def shortest_length(length: int | None) -> int | None:
    """Batches of an epoch on the rank that has fewest; None where a rank does not know (None). Collective."""
    if not is_distributed():
        return length
    least, _ = _extremes(-1 if length is None else length)
    return None if least < 0 else least


def _extremes(value: int) -> tuple[int, int]:
    """The least and the most that a rank has."""
    # On the CPU, over gloo: ranks agree on how much data there is without waiting for an accelerator.
    shared = torch.tensor([value, -value], device="cpu")
    with waiting("the number of batches"):
        distributed.all_reduce(shared, op=distributed.ReduceOp.MIN)
    least, most = shared.tolist()
    return least, -most


def no_batch(split: str) -> SettingError:
    """The refusal of a split that returned no batch."""
    return SettingError(
        f"datasets.{split}",
        ABSENT,
        "it returned no batch on some rank" if split == "train" else "it returned no batch on any rank",
        "check the data set and its shard(num_shards, index), or use fewer data ranks",
    )


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
    sample = next(iter(dataset)) if is_iterable(dataset) else dataset[0]
    return loader.collate_fn([sample] * size)


def example_of(loader: Any, seed: int) -> Callable[[], Any] | None:
    """A function that returns a batch of two samples to look at; None for data without random access, of which looking
    takes a sample away. It leaves the generators as they are."""
    if is_iterable(loader.dataset):
        return None

    def example() -> Any:
        with seeded(seed):
            return any_batch(loader, size=2)

    return example


def is_iterable(dataset: Any) -> bool:
    """Whether a data set is read from its start only. (torch's `IterableDataset` has a `__getitem__` that raises.)"""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def check_sequences(loaders: Mapping[str, Any], model: Assembled, layout: Layout, section: ParallelConfig) -> None:
    """Look at a sample of each split before the first step: a sequence that the ranks cannot share evenly would end the
    run later. Data without random access is not looked at. Raises SettingError."""
    shares = layout.tensor if section.sequence_parallel else 1
    if model.context is None and shares == 1:
        return
    for loader in loaders.values():
        if is_iterable(loader.dataset):
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


def faults(datasets: Any) -> list[Violation]:
    """What is wrong with the data sets, as this rank sees them."""
    if not isinstance(datasets, Mapping):
        rule = f"one data set a split is needed, and this is a {type(datasets).__name__}"
        return [Violation("datasets", ABSENT, rule, 'pass a mapping, such as {"train": ..., "val": ...}')]
    found = []
    if "train" not in datasets:
        known = ", ".join(map(str, datasets)) or "none"
        found.append(Violation("datasets", ABSENT, f"there is no split train among {known}", "name it so"))
    for split, dataset in datasets.items():
        fault = _fault(dataset)
        if fault is not None:
            found.append(Violation(f"datasets.{split}", ABSENT, *fault))
    return found


def _fault(dataset: Any) -> tuple[str, str] | None:
    """Why something is no data set, and what to do; None where it is one."""
    kind = type(dataset).__name__
    if isinstance(dataset, DataLoader):
        return f"a {kind} is no data set", "pass its data set; batch size, workers and so on are settings (dataloader)"
    if dataset is None or isinstance(dataset, (str, bytes, Mapping)):
        what = "None" if dataset is None else f"a {kind}"
        return f"{what} is no data set", "pass one with __getitem__ and __len__, a list of samples, or leave it out"
    if hasattr(dataset, "__len__") and not len(dataset):
        return "the split has no samples", "leave it out, or pass one that has some"
    return None


def _sizes(datasets: Mapping[str, Any]) -> list[tuple[str, int | None]]:
    """Samples of each split, in order; None where they are read one after another: each rank may have a shard."""
    return [
        (split, None if is_iterable(dataset) or not hasattr(dataset, "__len__") else len(dataset))
        for split, dataset in datasets.items()
    ]


def _differences(sizes: list[dict[str, int | None]]) -> list[Violation]:
    """Where ranks do not have the same data; the runner shares it out, and would repeat or lose samples."""
    first = sizes[0]
    for rank, other in enumerate(sizes):
        if list(other) != list(first):
            rule = f"rank {rank} has the splits {', '.join(other)}, and rank 0 has {', '.join(first)}"
            return [Violation("datasets", ABSENT, rule, "pass the same splits in the same order on every rank")]
    found = []
    for split, size in first.items():
        others = [rank for rank, other in enumerate(sizes) if other[split] != size]
        if others:
            rank = others[0]
            rule = f"it has {_samples(size)} on rank 0 and {_samples(sizes[rank][split])} on rank {rank}"
            fix = "pass the whole data set on every rank: the runner gives each rank its share"
            found.append(Violation(f"datasets.{split}", ABSENT, rule, fix))
    return found


def _samples(size: int | None) -> str:
    return "no known number of samples" if size is None else f"{size} samples"
