"""Compilation by `torch.compile`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from danling_conf.schema.setting import setting


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
    precompile_artifact_dir: Optional[str] = setting(None, semantic=False, pending="stack=graph")
    """Directory of compiler-cache artifacts (graph stack). Unset: none are kept."""
    memory_policy: Optional[str] = setting(None, semantic=False, choices=("default",), pending="stack=graph")
    """Graph-memory policy label (graph stack): unset or `default`."""

    _target_: str = "danling_conf.parallel.compile.from_keywords"
    _recursive_: bool = False
