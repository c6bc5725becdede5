"""Checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from danling_conf.schema.fsdp import DTYPE_ALIASES, DTYPES
from danling_conf.schema.setting import setting

_ASYNC = "asynchronous saving"
_FT = "fault tolerance"


@dataclass(kw_only=True)
class CheckpointConfig:
    """What is saved of a run, how often, and what a loaded checkpoint gives back."""

    read_by: ClassVar[str] = "danling_conf.checkpoint"

    dir_name: str = setting("checkpoints", semantic=False)
    """Subdirectory of the run that holds its checkpoints."""
    async_enabled: bool = setting(True, semantic=False, pending=_ASYNC)
    """Persist checkpoints asynchronously, where the backend can."""
    async_mode: Optional[str] = setting(
        None, choices=("disabled", "async", "async_with_pinned_mem"), semantic=False, pending=_ASYNC
    )
    """`disabled`, `async`, `async_with_pinned_mem`. Unset: derived from `checkpoint.async_enabled`."""
    dedicated_async_process_group: bool = setting(True, semantic=False, pending=_ASYNC)
    """Give asynchronous saving a process group of its own, so that it cannot delay training's collectives."""
    async_process_group_backend: str = setting("gloo", semantic=False, pending=_ASYNC)
    """Backend of that process group."""
    backend: str = setting(
        "auto", choices=("auto", "file", "dcp"), semantic=False, read_by="danling_conf.topology.rules.effect"
    )
    """`file` gathers everything into one file; `dcp` writes shards from every rank
    (`torch.distributed.checkpoint`) and is not implemented yet: one file is written, and the run says so; `auto` is
    `file`."""
    wait_timeout: Optional[float] = setting(None, at_least=0, semantic=False, pending=_ASYNC)
    """Seconds to wait for asynchronous writes at shutdown. Unset: wait for ever."""
    interval: Optional[int] = setting(None, at_least=1, semantic=False, read_by="danling_conf.runner.cadence")
    """Save every so many epochs (epoch mode) or optimizer steps (step mode), each kept in the history. Unset: after an
    evaluation that improves the score, and at the end."""
    keep_latest_k: int = setting(0, at_least=0, semantic=False, pending="checkpoint retention")
    """History checkpoints to retain; 0 keeps all."""
    load_only: bool = setting(False, semantic=False)
    """Never write checkpoints; still load them."""
    enable_ft_dataloader_checkpoints: bool = setting(False, semantic=False, pending=_FT)
    """Write a data-loader checkpoint per replica, for fault-tolerance recovery."""
    ft_replica_id: Optional[str] = setting(None, semantic=False, pending=_FT)
    """Replica id in that checkpoint's directory name. Unset: `FT_REPLICA_ID`, then the rank."""
    ft_dataloader_checkpoint_prefix: str = setting("ft-replica", semantic=False, pending=_FT)
    """Prefix of that directory's name."""
    exclude_from_loading: Any = setting(None, kinds=(str, list), pending="partial loading")
    """Keys that loading skips: `optimizer`, `scheduler`, `dataloaders`, or dotted keys. Aliases: `data_loader` and
    `dataloader` for `dataloaders`, `lr_scheduler` for `scheduler`. One string or a list. Unset: all
    is loaded."""
    last_save_model_only: bool = setting(False, semantic=False, pending="model-only exports")
    """The last checkpoint holds the model alone."""
    export_dtype: Optional[str] = setting(
        None, choices=DTYPES, aliases=DTYPE_ALIASES, semantic=False, pending="model-only exports"
    )
    """dtype to which the final model-only export is cast: fp32, fp16, bf16, fp64. Unset: as trained."""
