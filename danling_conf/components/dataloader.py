"""Data loaders: resumable at any batch, with the same samples at any data degree."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from danling_conf._torch_private.attributes import shut_down_workers
from danling_conf.components.collate import collate
from danling_conf.components.instantiate import section_from
from danling_conf.components.samplers import DROP, REPEAT, UNEVEN, ShardedSampler, seed_of
from danling_conf.schema.dataloader import OF_WORKERS, DataloaderConfig, SplitDataloaderConfig, without_workers
from danling_conf.schema.setting import open_keys
from danling_conf.schema.torch_options import nearest
from danling_conf.topology.violation import ABSENT, SettingError, Violation, refuse

_SETTINGS = tuple(item.name for item in fields(SplitDataloaderConfig))


def settings_for(section: DataloaderConfig, split: str) -> SplitDataloaderConfig:
    """The settings of one split: its own, else those of all splits, else for `shuffle` and `drop_last` whether it is
    trained on (`train`, or a name that starts so). What remains None is left to torch.

    Raises:
        SettingError: an unknown key of a split, or a setting of workers where there are none; ConfigRefused where
            several are wrong.
    """
    own = _overrides(section, split)
    merged = {name: own.get(name, getattr(section, name)) for name in _SETTINGS}
    if not merged["num_workers"]:
        refuse(_without_effect(section, split, merged))
        merged |= dict.fromkeys(OF_WORKERS)
    for name in ("shuffle", "drop_last"):
        if merged[name] is None:
            merged[name] = is_training(split)
    return SplitDataloaderConfig(**merged)


def _without_effect(section: DataloaderConfig, split: str, merged: Mapping[str, Any]) -> Iterator[Violation]:
    """Settings of worker processes for a split that has none."""
    faults = without_workers(section)
    for name in OF_WORKERS:
        path = _path(section, split, name)
        if path in faults:
            fix = f"set {path.rpartition('.')[0]}.num_workers=2, or {path}=null"
            yield Violation(path, merged[name], "it is a property of worker processes, and num_workers is 0", fix)


def is_training(split: str) -> bool:
    """Whether a split of this name is trained on."""
    return split.startswith("train")


def make(
    dataset: Dataset[Any],
    section: DataloaderConfig,
    split: str,
    *,
    data_rank: int = 0,
    data_degree: int = 1,
    seed: int = 0,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> StatefulDataLoader[Any]:
    """Build the loader of one split for one data rank. Call `set_epoch(loader, epoch)` before each epoch.

    The batches of all data ranks at a step are, together, the batch of a single process with `data_degree` times the
    batch size. Ranks have equally many batches of a training split: without `drop_last` a few samples are repeated to
    that end. Other splits are sharded without repetition, so that metrics are exact; without `drop_last` a rank may
    have one batch more than another, or none at all, which a loop with collectives inside has to expect.

    Worker processes are seeded from `seed`, the data rank and the epoch. The state of the loader is exact with any
    number of workers, in the middle and at the end of an epoch; random numbers that a worker draws in a sample start
    again when it is restarted.

    An iterable data set shards itself by `shard(num_shards=, index=)`, and over its own workers by torch's contract
    (`torch.utils.data.get_worker_info`).

    Raises:
        SettingError: settings that contradict each other or the data set, or a data set that has no length and is not
            iterable; ConfigRefused where several settings are wrong.
    """
    settings = settings_for(section, split)
    generator = torch.Generator().manual_seed(seed_of(seed, data_rank, 0))
    options = {name: value for name in _SETTINGS if (value := getattr(settings, name)) is not None}
    shuffle = options.pop("shuffle")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        if _asks_for_shuffle(section, split):
            why = f"an iterable data set ({type(dataset).__name__}) decides its own order"
            fix = "shuffle in the data set and set it to null"
            raise SettingError(_path(section, split, "shuffle"), True, why, fix)
        dataset = _shard(dataset, split, data_rank, data_degree)
    else:
        options["sampler"] = _sampler(dataset, section, split, data_rank, data_degree, shuffle, seed, generator)
    with warnings.catch_warnings():
        # torchdata 0.11 calls a function that torch has deprecated; no user can act on the warning.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        collate_fn = collate_fn or functools.partial(collate, split=split)
        return StatefulDataLoader(
            dataset, collate_fn=collate_fn, generator=generator, worker_init_fn=_own_process_group, **options
        )


def from_keywords(**keywords: Any) -> functools.partial[StatefulDataLoader[Any]]:
    """The section's `_target_`: a partial of `make` that waits for `dataset` and, by keyword, `split`."""
    return functools.partial(make, section=section_from(DataloaderConfig, keywords, path="dataloader"))


def set_epoch(loader: StatefulDataLoader[Any], epoch: int) -> None:
    """Choose the order of the next epoch and the seeds of its workers. Call it before the epoch, and before a state of
    that epoch is loaded. An iterable data set's own `set_epoch` is called, if it has one."""
    for part in (loader.sampler, loader.dataset):
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)


def resume(loader: StatefulDataLoader[Any], state: Mapping[str, Any], *, data_degree: int) -> None:
    """Let the next iteration continue where a saved one was, also under another data degree or number of workers.

    With the same degree and workers it continues exactly, with the data set's own state where it has one. Otherwise the
    samples that are left of the epoch are sharded over the present ranks: none is seen twice or never, except for what
    `drop_last` leaves out or repeats at the end of every epoch.

    Args:
        state: of a loader of the same split with the same batch size.
        data_degree: that it was made under.

    Raises:
        SettingError: the data set is iterable and shards itself: its position is known for the same degree and workers
            only.
    """
    sampler, workers = loader.sampler, _snapshot(state).get("_num_workers", 0)
    now = sampler.degree if isinstance(sampler, ShardedSampler) else data_degree
    if (data_degree, workers) == (now, loader.num_workers):
        loader.load_state_dict(dict(state))
        return
    if not isinstance(sampler, ShardedSampler):
        raise SettingError(
            "dataloader.num_workers",
            loader.num_workers,
            f"the position in an iterable data set was saved with {workers} workers",
            "use as many, or checkpoint.exclude_from_loading=dataloaders, which starts the epoch again",
        )
    sampler.begin_at(taken_by_all(state, batch_size=loader.batch_size or 1, data_degree=data_degree))


def taken_by_all(state: Mapping[str, Any], *, batch_size: int, data_degree: int) -> int:
    """Samples of the epoch that all ranks together had taken when the state of a loader was saved."""
    inner = _snapshot(state)["_sampler_iter_state"]
    inner = inner.get("sampler_iter_state", inner)  # wrapped where samples are put into batches
    since = state.get("_steps_since_snapshot", 0)
    return int(inner["taken_by_all"]) + since * batch_size * data_degree


def _snapshot(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a loader's state that holds its sampler's; with worker processes it lies deeper."""
    return state["_snapshot"]["_main_snapshot"] if "_snapshot" in state else state


def stop_workers(loader: StatefulDataLoader[Any]) -> None:
    """End a loader's worker processes; the next iteration starts new ones.

    The garbage collector may free the workers' queues before the iterator, which then waits five seconds for each.
    """
    shut_down_workers(loader)


def _own_process_group(worker: int) -> None:
    """Put a worker into a process group of its own.

    Launchers and terminals send signals to the whole process group of the training process. That process still needs
    its workers to finish a step, and they end when it does.
    """
    os.setpgid(0, 0)


def _overrides(section: DataloaderConfig, split: str) -> dict[str, Any]:
    own = open_keys(section).get(split)
    if own is None:
        return {}
    if isinstance(own, SplitDataloaderConfig):
        own = {name: value for name in _SETTINGS if (value := getattr(own, name)) is not None}
    if not isinstance(own, Mapping):
        fix = f"write `dataloader.{split}.batch_size=...` and the like"
        raise SettingError(f"dataloader.{split}", own, "it must be a mapping of settings of that split", fix)
    refuse(
        Violation(f"dataloader.{split}.{name}", value, "a split has no such setting", nearest(name, _SETTINGS))
        for name, value in own.items()
        if name not in _SETTINGS
    )
    return dict(own)


def _path(section: DataloaderConfig, split: str, name: str) -> str:
    return f"dataloader.{split}.{name}" if name in _overrides(section, split) else f"dataloader.{name}"


def _asks_for_shuffle(section: DataloaderConfig, split: str) -> bool:
    return bool(_overrides(section, split).get("shuffle", section.shuffle))


def _shard(dataset: Any, split: str, data_rank: int, data_degree: int) -> Any:
    if not isinstance(dataset, IterableDataset):
        fix = "give it `__getitem__` and `__len__`, or make it a torch.utils.data.IterableDataset"
        rule = f"the data set ({type(dataset).__name__}) has neither samples by index nor an iterator"
        raise SettingError(f"split {split}", ABSENT, rule, fix)
    if data_degree == 1:
        return dataset
    shard: Any = getattr(dataset, "shard", None)
    if not callable(shard):
        why = (
            f"an iterable data set cannot be sharded from outside: each of the {data_degree} data ranks would see all "
            f"samples of {type(dataset).__name__}"
        )
        fix = "give it `shard(num_shards, index)`, which returns the data set of one rank, or use a data degree of 1"
        raise SettingError(f"split {split}", ABSENT, why, fix)
    return shard(num_shards=data_degree, index=data_rank)


def _sampler(
    dataset: Any,
    section: DataloaderConfig,
    split: str,
    data_rank: int,
    data_degree: int,
    shuffle: bool,
    seed: int,
    generator: torch.Generator,
) -> ShardedSampler:
    if not hasattr(dataset, "__len__"):
        fix = "give it `__len__`, or make it a torch.utils.data.IterableDataset"
        raise SettingError(f"split {split}", ABSENT, f"the data set ({type(dataset).__name__}) has no length", fix)
    size, settings = len(dataset), settings_for(section, split)
    batch_size = settings.batch_size or 1
    remainder = UNEVEN
    if is_training(split):
        remainder = DROP if settings.drop_last else REPEAT
        if size < (batch_size * data_degree if settings.drop_last else 1):
            why = (
                f"the {size} samples of split {split} make no batch: one takes {batch_size} on each of {data_degree} "
                f"data ranks"
            )
            fix = "use a smaller batch_size or fewer data ranks, or set drop_last=false"
            raise SettingError(_path(section, split, "batch_size"), batch_size, why, fix)
    elif settings.drop_last:
        remainder = DROP
    if remainder == DROP and not is_training(split) and size < batch_size * data_degree:
        why = f"the {size} samples of split {split} make no whole batch of {batch_size} on each of {data_degree} ranks"
        fix = f"set dataloader.{split}.drop_last=false, which evaluates every sample, or use a smaller batch_size"
        raise SettingError(_path(section, split, "drop_last"), True, why, fix)
    return ShardedSampler(
        size,
        rank=data_rank,
        degree=data_degree,
        shuffle=shuffle,
        seed=seed,
        remainder=remainder,
        generator=generator,
    )
