"""Observability of a run: profiler, heartbeat, plan, trackers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class ProfilingConfig:
    """`torch.profiler` over a bounded number of steps."""

    read_by: ClassVar[str] = "danling_conf.components.profiler"

    enabled: bool = setting(False, semantic=False)
    """Trace some steps with `torch.profiler`."""
    wait: int = setting(1, at_least=0, semantic=False)
    """Steps that are skipped before each cycle."""
    warmup: int = setting(1, at_least=0, semantic=False)
    """Steps that are traced and discarded, since the first traced steps are slow."""
    active: int = setting(3, at_least=1, semantic=False)
    """Steps that are recorded."""
    repeat: Optional[int] = setting(None, at_least=1, semantic=False)
    """Cycles of wait, warm-up and active steps. Unset: as many as the run has."""
    record_shapes: bool = setting(False, semantic=False)
    """Record the shapes of operators' inputs."""
    profile_memory: bool = setting(False, semantic=False)
    """Record allocations."""
    with_stack: bool = setting(False, semantic=False)
    """Record Python stacks (slow)."""
    with_flops: bool = setting(False, semantic=False)
    """Estimate the FLOPs of matrix products and convolutions."""
    trace_dir: str = setting("profiles", semantic=False)
    """Directory of the traces, relative to the run, or absolute."""


@dataclass(kw_only=True)
class HeartbeatConfig:
    """A machine-readable file for each rank, which shows how far it is."""

    read_by: ClassVar[str] = "danling_conf.runner.observe.heartbeat"

    enabled: bool = setting(False, semantic=False)
    """Write heartbeats."""
    interval_seconds: float = setting(60.0, above=0, semantic=False)
    """Seconds between heartbeats."""
    dir_name: str = setting("heartbeats", semantic=False)
    """Subdirectory of the run for heartbeats."""


@dataclass(kw_only=True)
class PlanConfig:
    """A plan of the run, made beside it: memory and time that are then compared with what is measured."""

    read_by: ClassVar[str] = "danling_conf.runner.observe.planned"

    enabled: bool = setting(False, semantic=False)
    """Plan the run in a process of its own on the main rank's machine, while it trains, and write the peaks of memory
    and the time of a step into `run.json`. What then goes beyond its plan by more than a tenth is said in the log."""
    gpu: Optional[str] = setting(None, semantic=False)
    """Accelerator, by its name in `danling-conf plan` or as a YAML file. Unset: the one that the run has; without one,
    memory is planned and time is not."""
    gpus_per_node: Optional[int] = setting(None, at_least=1, semantic=False)
    """Accelerators of a node, which decide what passes between nodes. Unset: ranks of the main rank's node."""


@dataclass(kw_only=True)
class WandbConfig:
    """Scalars to Weights & Biases."""

    read_by: ClassVar[str] = "danling_conf.runner.observe.trackers"

    enabled: bool = setting(False, semantic=False)
    """Log scalars to Weights & Biases."""
    project: Optional[str] = setting(None, semantic=False)
    """Project. Unset: `lineage`."""
    entity: Optional[str] = setting(None, semantic=False)
    """Entity or team. Unset: the account's default."""
    group: Optional[str] = setting(None, semantic=False)
    """Group of runs. Unset: `experiment`."""
    name: Optional[str] = setting(None, semantic=False)
    """Display name. Unset: the run id."""
    job_type: Optional[str] = setting(None, semantic=False)
    """Job type. Unset: none."""
    tags: Any = setting(None, kinds=(str, list), semantic=False)
    """Tags of the run: one string or a list. Unset: none."""
    dir: Optional[str] = setting(None, semantic=False)
    """Local directory. Unset: the run's directory."""
    mode: Optional[str] = setting(None, choices=("online", "offline", "disabled"), semantic=False)
    """`online`, `offline` or `disabled`. Unset: online."""


@dataclass(kw_only=True)
class MlflowConfig:
    """Scalars and settings to MLflow."""

    read_by: ClassVar[str] = "danling_conf.runner.observe.trackers"

    enabled: bool = setting(False, semantic=False)
    """Log scalars to MLflow."""
    tracking_uri: Optional[str] = setting(None, semantic=False)
    """Address of the tracking server or database. Unset: a SQLite database in the run's directory."""
    experiment: Optional[str] = setting(None, semantic=False)
    """Experiment of MLflow. Unset: `lineage/experiment`."""
    name: Optional[str] = setting(None, semantic=False)
    """Display name. Unset: the run id."""
