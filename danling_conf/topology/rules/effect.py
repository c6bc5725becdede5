"""Effect rules: settings that are accepted and change nothing. The run warns of each, so none is ignored silently."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig, declared_class, defaults_of
from danling_conf.schema.compile import CompileConfig
from danling_conf.topology.rules.rule import Context, Ineffective, changed, compiles, one_process

_OF_AXIS = {
    "tensor": ("tensor_plan", "sequence_parallel", "loss_parallel"),
    "context": ("context_method", "context_balance"),
    "pipeline": (
        "pipeline_schedule",
        "pipeline_microbatch_size",
        "pipeline_n_microbatches",
        "module_fqns_per_model_part",
    ),
}
_SECTIONS = {
    "profiling": "nothing is traced",
    "heartbeat": "no heartbeats are written",
    "plan": "the run is not planned",
    "wandb": "nothing goes to Weights & Biases",
    "mlflow": "nothing goes to MLflow",
    "ft": "there are no replica groups",
}


def policy_without_fsdp(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """An FSDP policy under a layout that does not shard."""
    if not config.fsdp.enabled:
        yield from changed(config.fsdp, "fsdp", "the layout does not use FSDP (fsdp.enabled=false)")


def settings_without_axis(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings of an axis whose degree is 1."""
    section, default = config.parallel, defaults_of(declared_class(config.parallel))
    for axis, names in _OF_AXIS.items():
        if getattr(section.axes, axis) in (0, 1):
            for name in names:
                if getattr(section, name) != getattr(default, name):
                    yield Ineffective(f"parallel.{name}", f"the {axis} degree is 1")
    axes = section.axes
    if section.sync_batch_norm and {axes.replicate, axes.shard, axes.context} <= {0, 1}:
        yield Ineffective("parallel.sync_batch_norm", "there is one data rank")
    if section.axes.context > 1 and section.context_method == "ulysses" and not section.context_balance:
        yield Ineffective("parallel.context_balance", "ulysses is balanced anyway")


def options_without_compile(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Compiler options while nothing is compiled."""
    section = config.compile
    if not compiles(config):
        yield from changed(config.compile, "compile", "nothing is compiled (compile.enable=false)")
        return
    if section.optimize_ddp != "ddp_optimizer" and (config.fsdp.enabled or config.parallel.axes.replicate == 1):
        yield Ineffective("compile.optimize_ddp", "the layout does not use DDP")
    if section.scope == "model" and config.stack == "graph":
        yield Ineffective("compile.scope", "stack=graph compiles the whole step")
    if section.precompile_artifact_dir is not None and section.backend in ("eager", "aot_eager"):
        yield Ineffective("compile.precompile_artifact_dir", f"{section.backend} generates no code that could be kept")
    if section.memory_policy is not None and section.backend in ("eager", "cudagraphs"):
        yield Ineffective("compile.memory_policy", f"{section.backend} has no choice of what is kept for backward")
    if section.precompile_artifact_dir is None:
        for name in ("precompile_artifact_max_days", "precompile_artifact_max_gb"):
            if getattr(section, name) != getattr(CompileConfig, name):
                yield Ineffective(f"compile.{name}", "no compiled code is kept (compile.precompile_artifact_dir=null)")


def pacing_without_interval(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Garbage-collection settings while collection is not paced."""
    if config.gc.interval is None:
        yield from changed(config.gc, "gc", "collection is not paced (gc.interval=null)")


def limits_without_processes(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Timeouts and precision policies of a run that has one process."""
    if one_process(config) and not config.fsdp.enabled and not context.machine.started_world_size:
        yield from changed(config.comm, "comm", "the layout has one process and no collectives")


def overruled_precision(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """An explicit policy wins over `precision`."""
    policy = config.fsdp.mp_policy
    wanted = config.precision
    if wanted is not None and config.fsdp.enabled and policy is not None and policy.param_dtype != wanted:
        yield Ineffective("precision", f"fsdp.mp_policy is given and wins (param_dtype={policy.param_dtype})")


def unread_mode_settings(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings of another activation-checkpointing mode, and of other schedules."""
    section = config.activation_checkpointing
    if section.every_n != 2 and section.mode != "every_n":
        yield Ineffective("activation_checkpointing.every_n", f"the mode is {section.mode}")
    if config.score_mode is not None and config.patience is None and config.checkpoint.load_only:
        yield Ineffective("score_mode", "no score is used: no early stop, no checkpoints")


def sources_by_priority(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """`resume` wins over `auto_resume`, and both over `pretrained`."""
    if config.resume is not None:
        if config.auto_resume:
            yield Ineffective("auto_resume", "resume is given and comes first")
        if config.pretrained is not None:
            yield Ineffective("pretrained", "resume is given and comes first")


def settings_of_what_is_off(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings of a section that is not enabled."""
    for name, reason in _SECTIONS.items():
        section = getattr(config, name)
        if not section.enabled:
            yield from changed(section, name, f"{reason} ({name}.enabled=false)")
