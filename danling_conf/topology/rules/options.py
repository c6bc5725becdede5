"""Rules of options that exclude or need each other (a run's budget, compile, precision, loaders, saving), and of what
trackers need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from danling_conf.schema import RunnerConfig
from danling_conf.schema.dataloader import without_workers
from danling_conf.schema.nearest import nearest
from danling_conf.schema.runner import callback_entries, of_python
from danling_conf.schema.setting import open_keys
from danling_conf.topology.rules.rule import Context, compiles
from danling_conf.topology.violation import ABSENT, Violation

_INDUCTOR_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def one_budget(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A run has steps or epochs, never both."""
    if config.steps is None and config.epochs is None:
        if context.own_loop:
            return
        yield Violation("steps", None, "a run needs a budget: steps or epochs", "set steps=1000 or epochs=10")
    elif config.steps is not None and config.epochs is not None:
        # One on the command line against one of a file is settled before: the typed one wins.
        rule = f"steps and epochs exclude each other, and epochs={config.epochs} is set as well"
        yield Violation("steps", config.steps, rule, "add epochs=null")


def compile_options(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """torch.compile takes a mode or options; modes are inductor's, and the CPU needs a C++ compiler."""
    section = config.compile
    inductor = section.backend in (None, "inductor")
    if section.mode is not None and section.options:
        yield Violation(
            "compile.mode", section.mode, "torch.compile takes a mode or options, not both", "add compile.options=null"
        )
    if section.mode is not None and not inductor:
        yield Violation(
            "compile.mode", section.mode, f"modes belong to inductor, not to {section.backend}", "compile.mode=null"
        )
    elif section.mode is not None and section.mode not in _INDUCTOR_MODES:
        rule = f"inductor's modes are {', '.join(_INDUCTOR_MODES)}"
        yield Violation("compile.mode", section.mode, rule, "choose one of them")
    if compiles(config) and inductor and context.on_cpu(config) and not context.machine.can_compile():
        yield Violation(
            "compile.enable",
            section.enable,
            "inductor generates C++ for the CPU, and a compiler (CXX, g++, clang++) or Python.h is missing",
            "install a C++ compiler and Python's headers, or compile=aot_eager, or compile=none",
        )


def graph_options(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """What a graph of the whole step cannot be, or was never seen to be."""
    if config.stack != "graph":
        return
    section = config.compile
    if section.fullgraph is False:
        rule = "stack=graph is one graph, and does not go on where it breaks"
        yield Violation("compile.fullgraph", False, rule, "compile.fullgraph=null, or stack=auto compile=whole")
    if section.backend == "eager":
        rule = "it runs a graph as it is, without the backward pass that stack=graph puts inside"
        yield Violation("compile.backend", "eager", rule, "compile.backend=aot_eager, or null")
    if config.precision == "fp16":
        rule = "fp16 needs loss scaling, which is not part of the graph"
        yield Violation("precision", "fp16", rule, "precision=bf16, or stack=auto compile=whole")
    if section.memory_policy not in (None, "default"):
        rule = "backward is in the graph of forward, so that there is no border at which something is kept or not"
        fix = "compile.memory_policy=null, or stack=auto compile=whole"
        yield Violation("compile.memory_policy", section.memory_policy, rule, fix)
    mode = config.activation_checkpointing.mode
    if mode != "none":
        rule = "torch cannot recompute random operators inside of such a graph, of which attention is one"
        fix = "activation_checkpointing.mode=none, or stack=auto compile=whole"
        yield Violation("activation_checkpointing.mode", mode, rule, fix)
    if section.mode in ("reduce-overhead", "max-autotune") and not context.on_cpu(config):
        rule = "it uses CUDA graphs, whose memory the gradients of a whole step would share with the next step"
        yield Violation("compile.mode", section.mode, rule, "compile.mode=max-autotune-no-cudagraphs")


def precision_fits(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """fp16 needs loss scaling, and ranks that hold different gradients would scale differently."""
    policy = config.fsdp.mp_policy
    path, dtype = "precision", config.precision
    if policy is not None:
        path, dtype = "fsdp.mp_policy.param_dtype", policy.param_dtype
    if dtype != "fp16":
        return
    axes = config.parallel.axes
    sharing = [axis for axis in ("context", "pipeline", "tensor") if getattr(axes, axis) not in (0, 1)]
    if config.fsdp.enabled or sharing:
        what = "FSDP" if config.fsdp.enabled else f"the {sharing[0]} axis"
        yield Violation(
            path,
            "fp16",
            f"fp16 needs loss scaling, which is not combined with {what} here",
            f"{path}=bf16, or a ddp layout",
        )


def loader_workers(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Prefetching and persistence are properties of worker processes."""
    for path, value in without_workers(config.dataloader).items():
        workers = f"{path.rpartition('.')[0]}.num_workers=2"
        yield Violation(
            path, value, "it is a property of worker processes, and num_workers is 0", f"set {workers}, or {path}=null"
        )


def saving_with_interval(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """An interval of saving contradicts `load_only`, which never saves."""
    if config.checkpoint.load_only and config.checkpoint.interval is not None:
        yield Violation(
            "checkpoint.interval",
            config.checkpoint.interval,
            "checkpoint.load_only=true writes no checkpoints",
            "drop one of them",
        )


def selection_by_ops(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Operators to keep belong to the selective mode."""
    section = config.activation_checkpointing
    if section.keep_ops is not None and section.mode != "selective":
        yield Violation(
            "activation_checkpointing.keep_ops",
            ABSENT,
            f"operators are kept by the selective mode only, and the mode is {section.mode}",
            "activation_checkpointing.mode=selective",
        )


def declared_splits(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Where the app declares its splits, nothing is set for another."""
    declared = config.dataloader.splits
    if declared is None:
        return
    named = {f"dataloader.{split}": split for split in open_keys(config.dataloader)}
    if config.score_split is not None:
        named["score_split"] = config.score_split
    for path, split in named.items():
        if split not in declared:
            near = nearest(split, declared)
            meant = f"dataloader.{near}" if path != "score_split" else f"score_split={near}"
            fix = f"did you mean {meant}?" if near else "remove it, or add it to dataloader.splits"
            value = ABSENT if path != "score_split" else split
            yield Violation(path, value, f"the app's splits are {', '.join(declared)}", fix)


def named_callbacks(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Each entry of `callbacks` names what it makes."""
    for path, entry in callback_entries(config):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("_target_"), str):
            fix = "write {_target_: danling_conf.EMA, decay: 0.999}, for instance"
            value = entry.get("_target_", ABSENT) if isinstance(entry, Mapping) else entry
            yield Violation(f"{path}._target_", value, "it names no callback", fix)


def targets_of_python(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """What a run makes by name comes from a package. Of a model, which an app may make itself, the builder says so."""
    named: list[tuple[str, Any, str]] = [
        ("optim.type", config.optim.type, "optimizer"),
        ("scheduler.type", config.scheduler.type, "scheduler"),
    ]
    for path, entry in callback_entries(config):
        if isinstance(entry, Mapping):
            named.append((f"{path}._target_", entry.get("_target_"), "callback"))
    for path, target, what in named:
        if module := of_python(target):
            yield Violation(path, target, f"Python's own {module} has no {what}", "name one of a package")


def installed_trackers(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A chosen tracker must be installed: a user would learn only after the run that nothing was tracked."""
    chosen = {
        "tensorboard": ("tensorboard", config.tensorboard),
        "wandb": ("wandb.enabled", config.wandb.enabled),
        "mlflow": ("mlflow.enabled", config.mlflow.enabled),
    }
    for package, (path, wanted) in chosen.items():
        if wanted and package not in context.machine.trackers:
            fix = f"pip install danling-conf[{package}], or leave it out"
            yield Violation(path, True, f"the package {package} is not installed", fix)
