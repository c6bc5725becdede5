"""Rules of checkpoints: settings that contradict each other, and settings without effect."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig, declared_class, defaults_of
from danling_conf.schema.checkpoint import DISABLED, LOADED_PARTS, PINNED, CheckpointConfig, async_mode, excluded
from danling_conf.schema.nearest import nearest
from danling_conf.topology.rules.rule import Context, Ineffective, one_process
from danling_conf.topology.violation import Violation

_ON_DEVICES = ("nccl", "xccl", "hccl")
_BACKENDS = ("gloo", "mpi", "ucc", *_ON_DEVICES)
_WRITING = (
    "async_enabled",
    "async_mode",
    "dedicated_async_process_group",
    "async_process_group_backend",
    "backend",
    "wait_timeout",
    "keep_latest_k",
    "enable_ft_dataloader_checkpoints",
    "last_save_model_only",
    "export_dtype",
)
"""Settings of `checkpoint` that only writing reads."""


def excluded_parts(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """An exclusion from loading must name a part of a checkpoint, or a path below one."""
    for key in excluded(config.checkpoint):
        first = key.partition(".")[0]
        if first not in LOADED_PARTS:
            near = nearest(first, LOADED_PARTS)
            hint = f"did you mean {near}?" if near else f"write model.{key} for a part of the model"
            rule = f"a checkpoint has no part {first}; it has {', '.join(LOADED_PARTS)}"
            given = config.checkpoint.exclude_from_loading
            yield Violation("checkpoint.exclude_from_loading", given, rule, hint)


def background_group(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The process group for saving needs a backend that works here."""
    backend = config.checkpoint.async_process_group_backend
    path = "checkpoint.async_process_group_backend"
    if backend not in _BACKENDS:
        yield Violation(path, backend, f"torch's backends are {', '.join(_BACKENDS)}", "leave it at gloo")
    elif backend in _ON_DEVICES and context.on_cpu(config):
        rule = "it communicates between accelerators, and the run is on the CPU"
        yield Violation(path, backend, rule, "leave it at gloo")


def replica_names(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A replica's folder has the name of one folder, and not one that a checkpoint has."""
    section = config.checkpoint
    names = {
        "checkpoint.ft_dataloader_checkpoint_prefix": section.ft_dataloader_checkpoint_prefix,
        "checkpoint.ft_replica_id": section.ft_replica_id,
    }
    for path, name in names.items():
        if name is not None and (name == "" or "/" in name or "\0" in name or name.startswith((".", "ckpt-"))):
            yield Violation(path, name, "it is part of a folder's name", "use a name with no slashes, such as replica")


def exports_by_safetensors(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """An export needs the package that writes it."""
    section = config.checkpoint
    wanted = {"last_save_model_only": section.last_save_model_only, "export_dtype": section.export_dtype}
    for name, value in wanted.items():
        if value and not section.load_only and not context.machine.safetensors:
            rule = "exports are written by the package safetensors, which is not installed"
            yield Violation(f"checkpoint.{name}", value, rule, "pip install danling-conf[safetensors], or unset it")


def writing_settings(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings of saving that nothing reads in this configuration."""
    section = config.checkpoint
    default = defaults_of(declared_class(section))
    for name, reason in _unread(section, single=one_process(config)):
        if getattr(section, name) != getattr(default, name):
            yield Ineffective(f"checkpoint.{name}", reason)


def _unread(section: CheckpointConfig, *, single: bool) -> Iterator[tuple[str, str]]:
    """Settings that have no effect besides the others, and why, whether or not they are given."""
    if section.load_only:
        yield from ((name, "no checkpoints are written (checkpoint.load_only=true)") for name in _WRITING)
        return
    if section.async_mode is not None:
        yield "async_enabled", f"checkpoint.async_mode={section.async_mode} is given and wins"
    if section.interval is None:
        yield "keep_latest_k", "there is no history without checkpoint.interval"
    if async_mode(section) == DISABLED:
        yield "wait_timeout", "nothing is written in the background"
    if section.async_mode == PINNED and (section.backend == "file" or (section.backend == "auto" and single)):
        yield "async_mode", "memory is page-locked for the backend dcp only; it is as async"
    if single:
        yield "dedicated_async_process_group", "the layout has one process and no process groups"
        yield "async_process_group_backend", "the layout has one process and no process groups"
    elif not section.dedicated_async_process_group:
        yield "async_process_group_backend", "saving has no process group of its own"
    if not section.enable_ft_dataloader_checkpoints:
        reason = "no replica writes a state of its own (checkpoint.enable_ft_dataloader_checkpoints=false)"
        yield "ft_replica_id", reason
        yield "ft_dataloader_checkpoint_prefix", reason


def sources_to_exclude_from(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Exclusions where nothing is loaded, and `force_resume` where nothing is resumed."""
    loads = config.resume is not None or config.auto_resume or config.pretrained is not None
    if config.checkpoint.exclude_from_loading and not loads:
        yield Ineffective("checkpoint.exclude_from_loading", "nothing is loaded")
    if config.force_resume and config.resume is None:
        yield Ineffective("force_resume", "no run is named by resume")
