"""Configuration of a run: all sections, and the settings at the root."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Dict, Optional

from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.checkpoint import CheckpointConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.dataloader import BatchConfig, DataloaderConfig
from danling_conf.schema.deepspeed import DeepspeedConfig
from danling_conf.schema.fault_tolerance import FtConfig
from danling_conf.schema.fsdp import DTYPE_ALIASES, FsdpConfig
from danling_conf.schema.observability import (
    HeartbeatConfig,
    MlflowConfig,
    PlanConfig,
    ProfilingConfig,
    WandbConfig,
)
from danling_conf.schema.optim import OptimConfig
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.schema.process import CommConfig, GcConfig
from danling_conf.schema.scheduler import SchedulerConfig
from danling_conf.schema.setting import setting

_RUN_DIRECTORY = "danling_conf.records.run_directory"


@dataclass(kw_only=True)
class RunnerConfig:
    """Every setting of a run. Subclass it for settings of your own and pass the subclass to `danling_conf.register`."""

    read_by: ClassVar[str] = "danling_conf.runner"
    open_to: ClassVar[str] = "settings of the app"

    stack: str = setting(
        "auto", choices=("auto", "ddp", "parallel", "graph", "deepspeed"), aliases={"torch": "ddp", "ds": "deepspeed"}
    )
    """Runner stack: `ddp` (alias `torch`), `parallel`, `graph` (one process; forward, loss and backward compiled as one
    graph, the optimizer's step as another), `deepspeed` (alias `ds`; data ranks whose states ZeRO partitions, see
    `deepspeed`); `auto` derives `ddp` or `parallel` from the layout."""
    seed: Optional[int] = setting(None, at_least=0)
    """Random seed of weights, data order and dropout. Unset: one is drawn and recorded with the run."""
    deterministic: bool = False
    """Enforce deterministic operations in PyTorch (slower; an operator that has none raises)."""
    precision: Optional[str] = setting(None, choices=("fp32", "bf16", "fp16"), aliases=DTYPE_ALIASES)
    """dtype of the computation: by FSDP's mixed-precision policy where FSDP is on, else by autocast; weights stay fp32.
    Unset: fp32."""

    steps: Optional[int] = setting(None, at_least=1, semantic=False)
    """Step mode: stop after this many optimizer steps. Excludes `epochs`. Unset: epoch mode."""
    epochs: Optional[int] = setting(None, at_least=1, semantic=False)
    """Epoch mode: stop after this many passes over the training split. Excludes `steps`. Unset: step mode."""
    accum_steps: int = setting(1, at_least=1)
    """Micro-batches per optimizer step; gradients are communicated at the last one only."""
    accum_remainder: str = setting("drop", choices=("drop", "step"))
    """What happens to micro-batches at the end of an epoch that are fewer than `accum_steps`: `drop` leaves them out,
    `step` makes an optimizer step of them, weighted by how many they are. None are carried into the next epoch."""
    max_grad_norm: Optional[float] = setting(None, above=0)
    """Clip the norm of all gradients to this. Unset: no clipping."""
    nonfinite: str = setting("count", choices=("count", "skip", "fail"))
    """What happens at a step whose loss or gradients are not finite: `count` reports it, `skip` leaves the optimizer
    step out on all ranks (and measures the gradients' norm at each step), `fail` ends the run at the next log line,
    evaluation or checkpoint. ZeRO leaves out steps whose gradients are not finite in any case."""
    eval_interval: Optional[int] = setting(None, at_least=1, semantic=False)
    """Evaluate every so many epochs (epoch mode) or optimizer steps (step mode), and at the end. Unset: every epoch, or
    ten times a run."""
    evaluate_first: bool = setting(False, semantic=False)
    """Evaluate once before the first step, so that what is broken there is seen at once. The results are logged and do
    not count for the score, the schedule or `patience`; training is the same with and without. Not repeated when a run
    is resumed."""
    patience: Optional[int] = setting(None, at_least=1)
    """Stop after this many evaluations in a row without a better score. Unset: never stop early."""
    score_split: Optional[str] = None
    """Split used for model selection. Unset: `val`, else `validate`, else one whose name begins with `val`,
    else the first split that is not trained on. A name that no data set has is refused."""
    score_name: str = "loss"
    """Metric used for model selection."""
    score_mode: Optional[str] = setting(None, choices=("min", "max"))
    """Whether a smaller or a larger score is better. Unset: the metric's own `higher_is_better`; loss is `min`."""

    workspace_root: str = setting("experiments", semantic=False, read_by=_RUN_DIRECTORY)
    """Root directory of all experiments."""
    lineage: str = setting("lin", semantic=False, read_by=_RUN_DIRECTORY)
    """Top-level namespace of runs. The code's identity (git) is recorded with each attempt, not here."""
    experiment: str = setting("exp", semantic=False, read_by=_RUN_DIRECTORY)
    """Namespace of runs within the lineage."""
    auto_resume: bool = setting(False, semantic=False, read_by=_RUN_DIRECTORY)
    """Resume from the newest checkpoint of this configuration's newest run, if there is one. Priority: `resume`, then
    `auto_resume`, then `pretrained`."""
    resume: Optional[str] = setting(None, semantic=False, read_by=_RUN_DIRECTORY)
    """Run directory, or full-state checkpoint, to resume from. Unset: see `auto_resume`."""
    force_resume: bool = setting(False, semantic=False, read_by=_RUN_DIRECTORY)
    """Resume the run that `resume` names although settings that change its result differ. They are reported, and the
    optimizer's options and the schedule are then those of this configuration."""
    pretrained: Optional[str] = None
    """Weights that are the start of a new run: of a checkpoint, a run, an export, a folder of safetensors as
    `save_pretrained` writes it, or a file: safetensors, or a state dict by `torch.save`. Unset: weights are
    initialised."""

    log: bool = setting(True, semantic=False)
    """Write the main process's log to a file, beside the log of each rank."""
    log_interval: Optional[int] = setting(None, at_least=1, semantic=False)
    """Optimizer steps between log lines. Unset: calculated, about fifty lines a run, and at least one a minute."""
    tensorboard: bool = setting(False, semantic=False)
    """Write TensorBoard scalars."""

    callbacks: Any = setting(None, kinds=(list, dict), read_by="danling_conf.runner.callbacks")
    """Callbacks, in the order in which they are called, as a list or by names of your own (null: left out): each has a
    `_target_`, the dotted path of a subclass of `danling_conf.Callback`, and its arguments (`{_target_:
    danling_conf.EMA, decay: 0.999}`). Those that are passed in code come after them. Unset: none."""
    model: Dict[str, Any] = field(default_factory=dict)
    """Settings of your own model; not interpreted here."""
    data: Dict[str, Any] = field(default_factory=dict)
    """Settings of your own data; not interpreted here."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    deepspeed: DeepspeedConfig = field(default_factory=DeepspeedConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    comm: CommConfig = field(default_factory=CommConfig)
    gc: GcConfig = field(default_factory=GcConfig)
    ft: FtConfig = field(default_factory=FtConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)

    # Apps of Hydra read their DictConfig by these three as well: `if cfg.get("seed"):`.
    def get(self, key: str, default: Any = None) -> Any:
        """The value of a setting or a section at the root, and `default` where there is none."""
        return vars(self)[key] if key in self else default

    def __getitem__(self, key: str) -> Any:
        if key not in self:
            raise KeyError(f"there is no setting {key!r} at the root")
        return vars(self)[key]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and not key.startswith("_") and key in vars(self)


def of_python(target: Any) -> str | None:
    """The module of Python itself that a dotted path begins with, such as `os`; None for one of a package.

    A run makes its model, callbacks, optimizer and schedule by name. Python has none of them, and `os.system` would be
    called.
    """
    module, dot, _ = str(target).partition(".")
    return module if dot and module in sys.stdlib_module_names else None


def callback_entries(config: RunnerConfig) -> list[tuple[str, Any]]:
    """The entries of `callbacks` with their paths, in order, without those that are null."""
    given = config.callbacks or []
    if isinstance(given, Mapping):
        return [(f"callbacks.{name}", entry) for name, entry in given.items() if entry is not None]
    return [(f"callbacks[{index}]", entry) for index, entry in enumerate(given)]
