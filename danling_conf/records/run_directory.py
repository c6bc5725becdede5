"""Run directory: found or created once, locked while an attempt is alive, never overwritten.

`workspace_root/lineage/experiment/<run id>` is the same on every rank and for every attempt. The run id is the
`config_id`; a fresh start of a configuration that has a run already gets the next number (`<config id>.2`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.config.check import warnings_of
from danling_conf.config.identity import config_id, differences, flatten, layout_name, semantic
from danling_conf.records import layouts_index
from danling_conf.records.layouts_index import LAYOUT_PATHS, LayoutsIndex
from danling_conf.records.reading import read_fields
from danling_conf.records.run_lock import RunLock, check_token
from danling_conf.schema import Layout, RunnerConfig
from danling_conf.schema.files import (
    ATTEMPTS,
    FROZEN,
    RUN_FILE,
    Damaged,
    danling_checkpoint,
    read_object,
    write_whole,
)
from danling_conf.schema.printable import override, printable_lines, shell_line
from danling_conf.topology.layout import layout_of
from danling_conf.topology.violation import ConfigRefused, Violation, show

_STAMP = re.compile(r"\d{8}-\d{6}(\.[1-9]\d{0,8})?$")
"""Name of an attempt."""
_START_SETTINGS = ("pretrained", "checkpoint.exclude_from_loading")
"""Settings of what a run starts from. They have no effect on a resume, so a difference in them does not matter."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One start of a run."""

    run_directory: Path
    """Directory of the run."""
    directory: Path
    """Folder of this attempt, in the run."""
    seed: int
    """The run's seed: as configured, or drawn when the run was created."""
    restore: Path | None = None
    """Run directory or checkpoint that this attempt resumes from; None for a fresh start."""
    token: str = ""
    """Fencing token that it drew when it took the run, see `RunLock`; empty where nothing was taken."""
    command: tuple[str, ...] = ()
    """Script and overrides that started it."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the directory was chosen."""

    @property
    def run_id(self) -> str:
        return self.run_directory.name

    def check_token(self) -> None:
        """Called before every write to the run that a later attempt would see. Raises LostRun where one has taken the
        run over."""
        if self.token:
            check_token(self.run_directory, self.token)

    def to_json(self) -> dict[str, Any]:
        return {
            "run_directory": str(self.run_directory),
            "token": self.token,
            "directory": str(self.directory),
            "seed": self.seed,
            "restore": str(self.restore) if self.restore else None,
            "command": list(self.command),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Attempt:
        return cls(
            run_directory=Path(content["run_directory"]),
            directory=Path(content["directory"]),
            seed=content["seed"],
            token=content["token"],
            restore=Path(content["restore"]) if content["restore"] else None,
            command=tuple(content["command"]),
        )


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The run that a configuration belongs to, and what it resumes from. All attempts of a job share it.

    A sweep binds its jobs when they are submitted: bound when they start, two equal jobs could resume each other's run.
    """

    run_directory: Path
    restore: Path | None = None
    """Run directory or checkpoint to resume from; None for a fresh start."""
    notes: tuple[str, ...] = ()
    """What the user should know about how the directory was chosen."""

    def to_json(self) -> dict[str, Any]:
        restore = str(self.restore) if self.restore else None
        return {"run_directory": str(self.run_directory), "restore": restore, "notes": list(self.notes)}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Binding:
        restore = Path(content["restore"]) if content["restore"] else None
        return cls(run_directory=Path(content["run_directory"]), restore=restore, notes=tuple(content["notes"]))


def claim(config: RunnerConfig, command: Sequence[str] | None = None) -> tuple[Attempt, RunLock]:
    """Find the run that this configuration resumes, or create one; lock it, and open an attempt in it.

    Args:
        command: script and overrides; this process's own when None.

    Raises:
        ConfigRefused: the run cannot be resumed under this configuration, is live, or cannot be written.
    """
    return start(bind(config), config, sys.argv if command is None else command)


def bind(config: RunnerConfig) -> Binding:
    """Find the run that this configuration resumes, or create one. Raises ConfigRefused like `claim`."""
    with refusing_unwritable(config):
        return _bind(config)


def start(
    binding: Binding,
    config: RunnerConfig,
    command: Sequence[str],
    *,
    again: bool = False,
    fence: tuple[str, int] | None = None,
) -> tuple[Attempt, RunLock]:
    """Lock a bound run and open an attempt in it.

    Args:
        command: script and overrides.
        again: whether an earlier attempt of the same binding may have saved a checkpoint to resume from.
        fence: fencing token, see `RunLock`.

    Raises:
        ConfigRefused: the run is live or cannot be written.
    """
    with refusing_unwritable(config):
        run = binding.run_directory
        # Before the attempt: an attempt that then finds the run locked would be the newest, and look lost.
        lock = RunLock(run, fence)
        restore = binding.restore
        if again and any((run / config.checkpoint.dir_name).glob("ckpt-*")):
            restore = run
        return Attempt(
            run_directory=run,
            directory=_make_attempt(run),
            seed=read_run(run)["seed"],
            restore=restore,
            token=lock.token,
            command=tuple(command),
            notes=binding.notes,
        ), lock


@contextmanager
def refusing_unwritable(config: RunnerConfig) -> Iterator[None]:
    """Turns errors of the file system, such as a full disk, into a refusal of the workspace."""
    try:
        yield
    except (OSError, Damaged) as error:
        reason = str(error)
        if isinstance(error, OSError):
            where = "" if error.filename is None else f": {error.filename}"
            reason = f"{error.strerror or error}{where}"
        rule = f"the run's directory cannot be written: {reason}"
        fix = "make room there, or choose another directory"
        raise ConfigRefused([Violation("workspace_root", config.workspace_root, rule, fix)]) from error


def _bind(config: RunnerConfig) -> Binding:
    root = (Path(config.workspace_root).expanduser() / config.lineage / config.experiment).absolute()
    identity = config_id(config)
    run: Path | None = None
    restore: Path | None = None
    parent: Path | None = None
    notes: tuple[str, ...] = ()
    names: list[str] | None = None
    foreign = None if config.resume is None else danling_checkpoint(Path(config.resume).expanduser().absolute())
    if foreign is not None:
        notes = (f"resume={foreign} is a checkpoint of DanLing: this is a new run, which starts from its weights",)
    elif config.resume is not None:
        restore = Path(config.resume).expanduser().absolute()
        owner = owner_of(restore)
        if owner is None:
            parent = restore
        elif restore == owner:
            notes = _refuse_other_semantics(config, owner)
            run = owner
        elif read_run(owner)["config_id"] == identity and is_latest(restore):
            run = owner
        else:
            # Resuming an older checkpoint within its run would overwrite the later ones.
            parent = owner
            notes = (f"this is a new run, which resumes from {restore} of another one",)
    elif config.auto_resume:
        names = _names(root)
        run = restore = _newest_of(root, identity, names)
        if run is None:
            notes = _runs_of_other_layouts(root, config, names)
    if run is not None:
        _refuse_other_folder(config, run)
    if run is None:
        run, made = _make_run(root, identity, config, parent, _names(root) if names is None else names)
        restore = restore if made else run
    return Binding(run_directory=run, restore=restore, notes=notes)


def _refuse_other_folder(config: RunnerConfig, run: Path) -> None:
    """Refuse to resume a run whose checkpoints are in a folder of another name: it would start from nothing."""
    newest, mine = newest_attempt(run), config.checkpoint.dir_name
    theirs = read_fields(newest / FROZEN).table("config").table("checkpoint").text("dir_name") if newest else None
    if theirs is None or theirs == mine or any((run / mine).glob("ckpt-*")):
        return
    if "/" not in theirs and any((run / theirs).glob("ckpt-*")):
        rule = f"the run {run.name} keeps its checkpoints in {theirs}"
        raise ConfigRefused([Violation("checkpoint.dir_name", mine, rule, f"checkpoint.dir_name={theirs}")])


def owner_of(path: Path) -> Path | None:
    """The run directory at or above `path`; None where there is none."""
    for folder in (path, *path.parents):
        if (folder / RUN_FILE).is_file():
            return folder
    return None


def run_of_sweep(sweep: Path, run: Path) -> Path:
    """Where a run of a sweep is: at the path that was written; or, once the workspace was moved, beside the folder of
    its sweeps."""
    here = sweep.absolute().parent.parent / run.name
    moved = here != run and not (run / RUN_FILE).exists() and (here / RUN_FILE).exists()
    return here if moved else run


def is_latest(checkpoint: Path) -> bool:
    """Whether a checkpoint is the one that its run would resume from."""
    # `latest` is a link, and either path may go through further links.
    return (checkpoint.parent / "latest").resolve() == checkpoint.resolve()


_FACTS: dict[str, type | tuple[type, ...]] = {
    "run_id": str,
    "config_id": str,
    "seed": int,
    "parent": (str, type(None)),
    "created": str,
    "settings": dict,
}
"""The keys of a run's file, and their types."""


def read_run(run: Path) -> dict[str, Any]:
    """The content of a run's file. Raises ConfigRefused where it is missing or damaged."""
    try:
        content = read_object(run / RUN_FILE)
        wrong = [name for name, kinds in _FACTS.items() if name not in content or not isinstance(content[name], kinds)]
        if wrong:
            raise Damaged(run / RUN_FILE, f"{', '.join(wrong)} missing or of another type")
    except (OSError, Damaged) as error:
        reason = error.reason if isinstance(error, Damaged) else "there is none"
        fix = "start a new run: drop resume and auto_resume"
        raise ConfigRefused([Violation("resume", str(run), f"{RUN_FILE} is broken: {reason}", fix)]) from error
    return {name: content[name] for name in _FACTS}


def newest_run(root: Path, identity: str) -> Path | None:
    """The newest run of a configuration below `root`; None where there is none."""
    return _newest_of(root, identity, _names(root))


def _newest_of(root: Path, identity: str, names: list[str]) -> Path | None:
    # By number, not by time of change: reading tools and copies change times.
    numbers = sorted(_numbers(names, identity), reverse=True)
    return next((run for run in (_named(root, identity, item) for item in numbers) if (run / RUN_FILE).is_file()), None)


def _names(root: Path) -> list[str]:
    """The names in a directory; none where there is no directory."""
    try:
        return os.listdir(root)
    except FileNotFoundError:
        return []


def _numbers(names: list[str], identity: str) -> list[int]:
    """The numbers of a configuration's runs, by their names alone: a directory may hold thousands of others."""
    mine = [name for name in names if name.startswith(identity)]
    found = (re.fullmatch(rf"{identity}(?:\.([1-9][0-9]*))?", name) for name in mine)
    return [int(item[1] or 1) for item in found if item is not None]


def _named(root: Path, identity: str, number: int) -> Path:
    return root / (identity if number == 1 else f"{identity}.{number}")


def _make_run(
    root: Path, identity: str, config: RunnerConfig, parent: Path | None, names: list[str]
) -> tuple[Path, bool]:
    """Create a run. Returns its directory, and whether this process made it: under `auto_resume`, another one that is
    started at the same moment may have been first.

    Args:
        names: of all that was in `root` a moment ago.
    """
    root.mkdir(parents=True, exist_ok=True)
    seed, numbers = _seed(config, parent), _numbers(names, identity)
    resumes = config.auto_resume and config.resume is None
    # Above all that exist: a run in the place of one that was removed would not be the newest.
    number = max(numbers, default=0) + 1
    while True:
        run = _named(root, identity, number)
        if not os.path.lexists(run) and _publish_run(run, identity, seed, config, parent):
            return run, True
        # One that was started at the same moment.
        if resumes and (newest := newest_run(root, identity)) is not None:
            return newest, False
        number += 1


def _publish_run(run: Path, identity: str, seed: int, config: RunnerConfig, parent: Path | None) -> bool:
    """Make the directory of a run with its file. Returns False where there is one by now."""
    settings = semantic(config)
    content = {
        "run_id": run.name,
        "config_id": identity,
        "seed": seed,
        "parent": str(parent) if parent else None,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings,
    }
    # Renamed when it is whole: nobody sees a run without its file. The rename is atomic, on NFS as well, and fails
    # where the directory exists and is not empty.
    staging = run.with_name(f".{run.name}.{os.uname().nodename}.{os.getpid()}")
    staging.mkdir()
    try:
        write_whole(staging / RUN_FILE, json.dumps(content, indent=1) + "\n")
        os.rename(staging, run)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            return False
        raise
    if run.name == identity:  # by its first run a configuration is known
        layouts_index.add(run.parent, [(run.name, identity, settings)])
    return True


def _seed(config: RunnerConfig, parent: Path | None) -> int:
    """The configured seed, else that of the run that this one resumes from, else a random one."""
    if config.seed is not None:
        return config.seed
    if parent is not None and (parent / RUN_FILE).is_file():
        return int(read_run(parent)["seed"])
    return secrets.randbelow(2**31)


def _make_attempt(run: Path) -> Path:
    attempts = run / ATTEMPTS
    attempts.mkdir(exist_ok=True)
    orders = [attempt_order(folder.name) for folder in attempts_in(run)]
    # Not before the newest, though the clock says so: of another machine, in another time zone, or back from summer.
    stamp = max([time.strftime("%Y%m%d-%H%M%S"), *(each for each, _ in orders)])
    number = max([0, *(number for each, number in orders if each == stamp)]) + 1
    while True:
        attempt = attempts / (stamp if number == 1 else f"{stamp}.{number}")
        try:
            attempt.mkdir()
            return attempt
        except FileExistsError:
            number += 1


def attempts_in(run: Path) -> list[Path]:
    """The folders of a run's attempts, oldest first."""
    folders = [folder for folder in (run / ATTEMPTS).glob("*") if _STAMP.match(folder.name) and folder.is_dir()]
    return sorted(folders, key=lambda folder: attempt_order(folder.name))


def newest_attempt(run: Path) -> Path | None:
    """The folder of the newest attempt; None for a run without attempts."""
    return next(reversed(attempts_in(run)), None)


def attempt_order(attempt: str) -> tuple[str, int]:
    """Sort key of attempts' names. Those of one second are numbered: 20260102-030405, 20260102-030405.2, ..."""
    # As text, `.10` would come before `.2`. A name of a damaged record may hold any number of digits.
    stamp, _, number = attempt.partition(".")
    return stamp, int(number) if number.isdecimal() and len(number) < 10 else 1


def warn(attempt: Attempt, config: RunnerConfig) -> None:
    """Print warnings about an accepted configuration and the run that it was bound to."""
    for line in (*attempt.notes, *warnings_of(config)):
        print(printable_lines(f"warning: {line}"), file=sys.stderr)


def _refuse_other_semantics(config: RunnerConfig, run: Path) -> tuple[str, ...]:
    """Refuse to resume a run that was created under other settings, and name all of them.

    Returns:
        Notes for the user: the differences that `force_resume` overrides.
    """
    made = read_run(run)["settings"]
    changed = {
        path: values
        for path, values in differences(semantic(config), made).items()
        if not path.startswith(_START_SETTINGS)
    }
    layout = {path for path in changed if path.startswith(LAYOUT_PATHS)}
    violations = []
    if layout and not config.parallel.allow_degree_change:
        theirs, mine = _layout_in(made), layout_name(layout_of(config))
        violations.append(
            Violation(
                "parallel",
                mine,
                f"the run was made under the layout {theirs}",
                "choose its layout, or parallel.allow_degree_change=true",
            )
        )
    for path in sorted(changed.keys() - layout):
        mine, theirs = changed[path]
        violations.append(
            Violation(
                path,
                mine,
                f"the run {run.name} was made with {theirs}",
                "resume with the run's own setting, start a new run from one of its checkpoints, or insist by "
                "force_resume=true",
            )
        )
    if config.force_resume:
        insisted = [item for item in violations if item.path != "parallel"]
        violations = [item for item in violations if item.path == "parallel"]
        notes = tuple(f"{item.path}={show(item.value)}: {item.rule}; force_resume=true insists" for item in insisted)
    else:
        notes = ()
    if violations:
        raise ConfigRefused(violations)
    return notes


def _layout_in(settings: dict[str, Any]) -> str:
    """The name of the layout that a run's settings describe."""
    axes = flatten(settings.get("parallel", {}).get("axes", {}))
    known = {axis: degree for axis, degree in axes.items() if axis in Layout().degrees()}
    return layout_name(Layout(**known, fsdp=bool(settings.get("fsdp", {}).get("enabled", False))))


def _runs_of_other_layouts(root: Path, config: RunnerConfig, names: list[str]) -> tuple[str, ...]:
    """A note that names a run of the same configuration under another layout, the newest that is found.

    Args:
        names: of all that is in `root`.
    """
    mine, index = semantic(config), LayoutsIndex(root)
    seen = []
    note: tuple[str, ...] = ()
    for run in index.candidates(names, mine):
        if not (run / RUN_FILE).is_file():
            continue
        try:
            made = read_run(run)
        except ConfigRefused:
            continue
        seen.append((run.name, made["config_id"], made["settings"]))
        changed = differences(mine, made["settings"])
        if changed and all(path.startswith(LAYOUT_PATHS) for path in changed):
            note = (
                f"auto_resume: this configuration has no run yet; {run.name} differs in its layout only "
                f"({shell_line(override('resume', run))} parallel.allow_degree_change=true resumes it)",
            )
            break
    index.add(seen)
    return note
