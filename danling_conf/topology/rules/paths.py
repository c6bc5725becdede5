"""Rules of directories and files that a run needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import CHECKPOINT_FILE, LONGEST_NAME, RUN_FILE, danling_checkpoint
from danling_conf.schema.printable import unprintable
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.violation import Violation

"""Of file systems in use."""
_WEIGHTS = "*.safetensors"


def writable_root(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The run's directory can be created."""
    fault = unwritable(Path(config.workspace_root).expanduser())
    if fault:
        yield Violation("workspace_root", config.workspace_root, fault, "choose a directory to write to")


def unwritable(path: Path) -> str | None:
    """Why a directory cannot be made or written; None where it can."""
    found = path.absolute()
    try:
        while not found.exists() and found != found.parent:
            found = found.parent
    except (OSError, ValueError) as error:  # a name that is too long, a null byte
        return f"it cannot be the path of a directory: {getattr(error, 'strerror', None) or error}"
    if not found.is_dir():
        return f"{found} is not a directory"
    return None if os.access(found, os.W_OK | os.X_OK) else f"{found} cannot be written"


def directory_fault(given: str) -> str | None:
    """Why a path cannot be the directory of one run or one sweep; None where it can."""
    path = Path(given).absolute()
    if not given.strip():
        return "an empty text names no directory"
    if mark := unprintable(given):
        return f"{mark} is not a character for a path"
    if path.resolve() == Path(path.anchor):
        return "the root of the file system cannot be that of a run or a sweep"
    return unwritable(path)


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
        if name.strip() in ("", ".", "..") or "/" in name:
            yield Violation(path, name, "it must be the name of one folder", "use a name without slashes")
        elif len(os.fsencode(name)) > LONGEST_NAME:
            yield Violation(path, name, f"the name of a folder has at most {LONGEST_NAME} bytes", "shorten it")
    for path, name in {"workspace_root": config.workspace_root, **names}.items():
        if mark := unprintable(name):
            yield Violation(path, name, f"{mark} is not a character for a path", "leave it out")
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
            marks += [folder]  # a file of weights: loading says what is wrong with it
        if not folder.exists():
            yield Violation(key, source, "there is no such file or directory", "give a run's directory or a checkpoint")
        elif danling_checkpoint(folder) is None and not inside and not any(mark.is_file() for mark in marks):
            rule = f"there is no checkpoint in it, nor in its {config.checkpoint.dir_name}/"
            more = ", a folder of safetensors, or a file of weights" if key == "pretrained" else ""
            yield Violation(key, source, rule, f"give a run's directory or a checkpoint{more}")
