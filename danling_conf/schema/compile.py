"""Compilation by `torch.compile`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from danling_conf.schema.setting import setting

_ARTIFACTS = "danling_conf.parallel.artifacts"
BUDGET = "budget"
"""Word of a memory policy that names how much is kept: `budget:0.5`."""


@dataclass(kw_only=True)
class CompileConfig:
    """`torch.compile` of the model, block by block unless `scope` is `model`."""

    read_by: ClassVar[str] = "danling_conf.parallel.compile"

    enable: bool = setting(False, semantic=False)
    """Compile the model with `torch.compile`."""
    scope: str = setting("block", choices=("block", "model"), semantic=False)
    """What is compiled: each repeated block (short compile times; works under FSDP2), or the whole model."""
    backend: Optional[str] = setting(None, semantic=False)
    """Compiler backend, such as `inductor`, `aot_eager` or `eager`. Unset: torch's default."""
    fullgraph: Optional[bool] = setting(None, semantic=False)
    """Fail on a graph break instead of falling back to eager. Unset: torch's default."""
    dynamic: Optional[bool] = setting(None, semantic=False)
    """Compile for dynamic shapes. Unset: torch decides after the first change of a shape."""
    mode: Optional[str] = setting(None, semantic=False)
    """Mode of inductor: `default`, `reduce-overhead`, `max-autotune`, `max-autotune-no-cudagraphs`. Excludes
    `compile.options`. Unset: torch's default."""
    options: Any = setting(None, kinds=(dict,), semantic=False)
    """Options of the backend, as `torch.compile(options=...)` takes them. Excludes `compile.mode`. Unset: none."""
    optimize_ddp: Optional[str] = setting(
        "ddp_optimizer",
        choices=("ddp_optimizer", "python_reducer", "python_reducer_without_compiled_forward", "no_optimization"),
        semantic=False,
    )
    """How dynamo treats DDP (`torch._dynamo.config.optimize_ddp`). Unset (`null`): left as torch has it."""
    precompile_artifact_dir: Optional[str] = setting(None, semantic=False, read_by=_ARTIFACTS)
    """Directory of packed compile caches: one file for the same versions, device, CPU, compile section, precision,
    layout, model and batch size. A run that finds its file starts from it; another one writes it, after its first
    step and at its end. Loading a file runs code that is in it, so nobody else should be able to write there. Unset:
    only inductor's own cache on this machine."""
    precompile_artifact_max_days: float = setting(30.0, above=0, semantic=False, read_by=_ARTIFACTS)
    """Packed caches that no run has used for so many days are removed when one is written."""
    precompile_artifact_max_gb: float = setting(10.0, above=0, semantic=False, read_by=_ARTIFACTS)
    """Largest size of all packed caches of the directory together, in GB (10^9 bytes); those that were not used for the
    longest time are removed when one is written."""
    memory_policy: Optional[str] = setting(None, semantic=False, choices=("default", "full", "eager"), fraction=BUDGET)
    """What compiled code keeps from forward for backward: `default` as torch chooses (cheap operators are computed
    again), `full` nothing but inputs (all of each graph is computed again), `eager` all that eager execution would
    keep, `budget:0.5` half of what `default` keeps, at the least extra computation. Gradients are the same. Unset: as
    torch's own configuration has it."""

    _target_: str = "danling_conf.parallel.compile.from_keywords"
    _recursive_: bool = False
