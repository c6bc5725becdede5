"""Data loaders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class SplitDataloaderConfig:
    """Settings of one split's loader: `dataloader.train.shuffle=false`."""

    read_by: ClassVar[str] = "danling_conf.build.dataloader"

    batch_size: Optional[int] = setting(None, at_least=1)
    """Local batch size: samples per data rank and microbatch. Unset: 1."""
    shuffle: Optional[bool] = None
    """Draw samples in a new order each epoch. Unset: train shuffles, other splits do not."""
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

    read_by: ClassVar[str] = "danling_conf.build.dataloader"
    open_to: ClassVar[type] = SplitDataloaderConfig

    _target_: str = "danling_conf.build.dataloader.from_keywords"
    _recursive_: bool = False
