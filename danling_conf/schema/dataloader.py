"""Data loaders: settings for all splits, and for one split by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, List, Optional

from danling_conf.schema.setting import open_keys, setting

OF_WORKERS = ("prefetch_factor", "persistent_workers")
"""Settings that are properties of worker processes."""


@dataclass(kw_only=True)
class SplitDataloaderConfig:
    """Settings of one split's loader: `dataloader.train.shuffle=false`."""

    read_by: ClassVar[str] = "danling_conf.components.dataloader"

    batch_size: Optional[int] = setting(None, at_least=1)
    """Local batch size: samples per data rank and microbatch. Unset: 1."""
    shuffle: Optional[bool] = None
    """Draw samples in a new order each epoch: up to 2^23 samples that of torch (`DistributedSampler`), beyond it one
    that is computed and takes no memory. Unset: train shuffles, other splits do not."""
    drop_last: Optional[bool] = None
    """Drop the incomplete last batch. Unset: train drops it, other splits keep it."""
    num_workers: Optional[int] = setting(None, at_least=0, semantic=False)
    """Worker processes per loader. Unset: 0, samples are loaded in the training process."""
    persistent_workers: Optional[bool] = setting(None, semantic=False)
    """Keep the workers between epochs. Unset: no."""
    prefetch_factor: Optional[int] = setting(None, at_least=1, semantic=False)
    """Batches loaded in advance by each worker; needs workers. Unset: torch's default."""
    pin_memory: Optional[bool] = setting(None, semantic=False)
    """Put batches in page-locked host memory. Unset: no."""
    in_order: Optional[bool] = None
    """Return batches in the order of the sampler. Unset: yes; without it a resumed run is not exact."""
    snapshot_every_n_steps: Optional[int] = setting(None, at_least=1, semantic=False)
    """How often, in batches, a worker sends its state for checkpoints. Unset: 1."""


@dataclass(kw_only=True)
class DataloaderConfig(SplitDataloaderConfig):
    """Settings of every loader. A key with the name of a split (`dataloader.val.batch_size=3`) overrides them there."""

    read_by: ClassVar[str] = "danling_conf.components.dataloader"
    open_to: ClassVar[type] = SplitDataloaderConfig

    splits: Optional[List[str]] = setting(None, semantic=False, read_by="danling_conf.runner.setup")
    """Names of the app's splits, for its file: `[train, val]`. Settings of any other are then refused before anything
    starts. Unset: they are refused once the data sets are known."""

    _target_: str = "danling_conf.components.dataloader.from_keywords"
    _recursive_: bool = False


@dataclass(kw_only=True)
class BatchConfig:
    """What of a batch goes where. Items are named by the keys of a mapping, the fields of a named tuple or dataclass,
    the positions in a list or tuple, else by attributes."""

    read_by: ClassVar[str] = "danling_conf.runner.batch"

    inputs: Any = setting(None, kinds=(list, dict))
    """Items that the model is called with: a list of names (`[input_ids, attention_mask]`), each passed by that
    keyword, positions by position, or a mapping from the model's arguments to items (`{x: image}`). Unset: the first
    item of a tuple or list, every item of a mapping by keyword, else the batch itself. A `forward` passed from code
    comes first."""
    targets: Optional[List[str]] = None
    """Items that metrics are updated with behind the model's predictions. Unset: the first of `labels`, `label`,
    `targets` and `target` that the batch has, else the second item of a tuple or list."""


def without_workers(section: DataloaderConfig) -> dict[str, Any]:
    """Settings of worker processes, by path and value, that are given where there are no workers.

    A setting that all splits share is fine while one of them has workers; one that is given to a split without workers
    is a mistake.
    """
    splits = {
        name: dict(split) if isinstance(split, Mapping) else _given(split)
        for name, split in open_keys(section).items()
        if isinstance(split, (Mapping, SplitDataloaderConfig))
    }
    found: dict[str, Any] = {}
    if not section.num_workers and not any(split.get("num_workers") for split in splits.values()):
        found |= {f"dataloader.{key}": getattr(section, key) for key in OF_WORKERS}
    for name, split in splits.items():
        if not split.get("num_workers", section.num_workers):
            found |= {f"dataloader.{name}.{key}": split.get(key) for key in OF_WORKERS}
    return {path: value for path, value in found.items() if value}


def _given(split: SplitDataloaderConfig) -> dict[str, Any]:
    return {name: value for name, value in vars(split).items() if value is not None}
