"""Checkpoints: what is saved, how, and what a loaded one restores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from danling_conf.schema.fsdp import DTYPE_ALIASES, DTYPES
from danling_conf.schema.setting import setting

LOADED_PARTS = ("model", "optimizer", "scheduler", "scaler", "dataloaders", "generators", "runner", "callbacks")
"""Parts that a checkpoint restores, by the names that `checkpoint.exclude_from_loading` takes."""
_ALIASES = {"data_loader": "dataloaders", "dataloader": "dataloaders", "lr_scheduler": "scheduler"}

DISABLED, ASYNC, PINNED = "disabled", "async", "async_with_pinned_mem"


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is saved of a run, how often, and what a loaded checkpoint restores."""

    read_by: ClassVar[str] = "danling_conf.checkpoint"

    dir_name: str = setting("checkpoints", semantic=False)
    """Subdirectory of the run that holds its checkpoints."""
    async_enabled: bool = setting(True, semantic=False, read_by="danling_conf.schema.checkpoint")
    """Write checkpoints in the background: training waits for a copy in memory, not for the disk."""
    async_mode: Optional[str] = setting(None, choices=(DISABLED, ASYNC, PINNED), semantic=False)
    """`disabled`: training waits until the checkpoint is on the disk. `async`: it waits for a copy in memory.
    `async_with_pinned_mem`: with the backend `dcp` and an accelerator that memory is page-locked, which makes the copy
    faster. Unset: `async` or `disabled`, by `checkpoint.async_enabled`; set, it overrides that."""
    dedicated_async_process_group: bool = setting(True, semantic=False)
    """Give saving a process group of its own, so that it can run beside training. False: several ranks cannot
    communicate in the background, and training waits for the disk as with `disabled`."""
    async_process_group_backend: str = setting("gloo", semantic=False)
    """Backend of that process group. `gloo` goes over the CPU and leaves the accelerator to training."""
    backend: str = setting("auto", choices=("auto", "file", "dcp"), semantic=False)
    """`file`: rank 0 gathers everything and writes one file. `dcp`: every rank writes its shards
    (`torch.distributed.checkpoint`). `auto`: `dcp` with several ranks, else `file`. Either is loaded, whatever this
    is set to."""
    wait_timeout: Optional[float] = setting(None, at_least=0, semantic=False)
    """Seconds to wait at the end for a checkpoint that is still being written; the run fails when that is not enough.
    Unset: wait forever."""
    interval: Optional[int] = setting(None, at_least=1, semantic=False, read_by="danling_conf.runner.cadence")
    """Save every so many epochs (epoch mode) or optimizer steps (step mode), each kept in the history. Unset: about ten
    times a run and never at every step, of which only the newest is kept. An evaluation that improves the score, and
    the end, are saved in any case."""
    keep_latest_k: int = setting(0, at_least=0, semantic=False)
    """History checkpoints to retain, the newest ones, `latest` among them; 0 keeps all. What `best` points to, and what
    is being read, is not removed either."""
    load_only: bool = setting(False, semantic=False)
    """Never write checkpoints; still load them."""
    enable_ft_dataloader_checkpoints: bool = setting(False, semantic=False)
    """Write the loader's state of each replica beside every checkpoint as well, and resume from it: a replica that
    returns finds its own position in the data, whichever replica wrote the checkpoint."""
    ft_replica_id: Optional[str] = setting(None, semantic=False, read_by="danling_conf.checkpoint.replicas")
    """Replica id in that folder's name. Unset: `FT_REPLICA_ID`, then the rank."""
    ft_dataloader_checkpoint_prefix: str = setting(
        "ft-replica", semantic=False, read_by="danling_conf.checkpoint.replicas"
    )
    """Prefix of that folder's name."""
    save_frozen: bool = setting(True, semantic=False, read_by="danling_conf.checkpoint.manager")
    """Save the parameters that are not trained too. False: a checkpoint leaves them out, which makes that of a large
    model with small adapters small. Who resumes from it has them from the model's factory and `pretrained`; the run is
    refused where they are other ones. Exports hold all weights."""
    exclude_from_loading: Any = setting(None, kinds=(str, list))
    """Keys that loading skips: `model`, `optimizer`, `scheduler`, `scaler`, `dataloaders`, `generators`, `runner`,
    `callbacks`, or dotted keys below them, such as `model.head`, `optimizer.head.weight` or `callbacks.EMA`. Aliases:
    `data_loader` and `dataloader` for `dataloaders`, `lr_scheduler` for `scheduler`. One string or a list. Unset: all
    is loaded."""
    last_save_model_only: bool = setting(False, semantic=False, read_by="danling_conf.runner.saving")
    """The last checkpoint of the run is an export of the model alone (safetensors, in `export`), from which a run
    cannot be resumed."""
    export_dtype: Optional[str] = setting(None, choices=DTYPES, aliases=DTYPE_ALIASES, semantic=False)
    """dtype to which the final export of the model is cast: fp32, fp16, bf16, fp64. Set without
    `checkpoint.last_save_model_only`, the export is written beside the last checkpoint. Unset: as trained."""


def excluded(section: CheckpointConfig) -> list[str]:
    """The keys of `exclude_from_loading`, aliases replaced."""
    given = section.exclude_from_loading
    keys = [] if given is None else [given] if isinstance(given, str) else list(given)
    return [".".join([_ALIASES.get(first, first), *rest]) for first, *rest in (str(key).split(".") for key in keys)]


def async_mode(section: CheckpointConfig) -> str:
    """How checkpoints are written: `async_mode` where it is set, else by `async_enabled`."""
    return section.async_mode or (ASYNC if section.async_enabled else DISABLED)
