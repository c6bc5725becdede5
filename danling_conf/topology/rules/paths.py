"""Rules of directories and files that a run needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import CHECKPOINT_FILE, RUN_FILE
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import Violation

_WEIGHTS = "*.safetensors"


def writable_root(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The run's directory can be created."""
    root = Path(config.workspace_root).expanduser()
    found = root.absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    if not found.is_dir():
        yield Violation(
            "workspace_root", config.workspace_root, f"{found} is not a directory", "choose a directory to write to"
        )
    elif not os.access(found, os.W_OK | os.X_OK):
        yield Violation(
            "workspace_root", config.workspace_root, f"{found} cannot be written", "choose a directory to write to"
        )


def artifact_directory(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Compile artifacts are in a directory. One that cannot be written can be read all the same."""
    given = config.compile.precompile_artifact_dir
    if given is None:
        return
    found = Path(given).expanduser().absolute()
    while not found.exists() and found != found.parent:
        found = found.parent
    if not given or not found.is_dir():
        what = f"{found} is not a directory" if given else "it names no directory"
        yield Violation("compile.precompile_artifact_dir", given, what, "choose a directory, which may be missing yet")


def plain_names(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Names that become one folder each must be one path part."""
    names = {
        "lineage": config.lineage,
        "experiment": config.experiment,
        "checkpoint.dir_name": config.checkpoint.dir_name,
        "heartbeat.dir_name": config.heartbeat.dir_name,
    }
    for path, name in names.items():
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            yield Violation(path, name, "it must be the name of one folder", "use a name without slashes")
    if config.experiment == "sweeps":
        yield Violation(
            "experiment", "sweeps", "that name is reserved for the directories of sweeps", "choose another name"
        )


def existing_sources(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """What is resumed or loaded exists, and is a run or a checkpoint."""
    for key, is_run in (("resume", RUN_FILE), ("pretrained", CHECKPOINT_FILE)):
        source = getattr(config, key)
        if source is None:
            continue
        folder = Path(source).expanduser()
        checkpoints = folder / config.checkpoint.dir_name
        # A broken checkpoint of a run passes here: loading names what is wrong with it.
        inside = [folder] if folder.name.startswith("ckpt-") else []
        marks = [folder / is_run, folder / CHECKPOINT_FILE, *checkpoints.glob(f"[!.]*/{CHECKPOINT_FILE}")]
        if key == "pretrained":
            marks += [*folder.glob(_WEIGHTS), *(checkpoints / "export").glob(_WEIGHTS)]
            marks += [folder] if folder.suffix == ".safetensors" else []
        if not folder.exists():
            yield Violation(key, source, "there is no such file or directory", "give a run's directory or a checkpoint")
        elif not inside and not any(mark.is_file() for mark in marks):
            rule = f"there is no checkpoint in it, nor in its {config.checkpoint.dir_name}/"
            more = ", or a folder of safetensors" if key == "pretrained" else ""
            yield Violation(key, source, rule, f"give a run's directory or a checkpoint{more}")
