"""Files of a run and of a sweep: the name of each on disk, and the one way to read and to replace those that hold JSON.

Every room that names such a file imports it from here, so that a rename is one line. The reader trusts nothing: a user,
another program or a full disk may have left anything in a file's place.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

RUN_FILE = "run.json"
"""In a run's directory: what the run is."""
LAYOUTS_INDEX = ".layouts.index"
"""Beside the runs of an experiment: which configurations differ in their layout only."""
RUN_LOCK = "run.lock"
"""In a run's directory: held by the live attempt."""
RANKS_LOCK = "ranks.lock"
"""In a run's directory: shared by the ranks of the live attempt, which may outlive the command that started them."""
LEAD_LOCK = "lead.lock"
"""In an attempt with replica groups: held by the group that writes the run's records."""
MEMBERSHIP = "groups.jsonl"
"""In an attempt with replica groups: when each started, joined, died and left."""
ATTEMPTS = "attempts"
"""Folder of a run, with a folder for each attempt."""
FROZEN = "frozen.json"
"""In an attempt: its configuration as every rank reads it."""
RESULT = "result.json"
"""In an attempt: how it ended."""
RESERVE = ".result.json"
"""In an attempt that has not ended: room for its result, for a disk that is full by then. Of one whose
result could not be made: how it ended."""
PLAN_FILE = "plan.json"
"""In an attempt: its plan, as `danling-conf plan --json` prints it. It is whole once it is JSON, and removed where none
can be made."""
PLAN_LOG = "plan.log"
"""In an attempt: why it could not be planned."""
DIFFERENCE = "difference.yaml"
"""In an attempt: the settings that differ from the defaults."""
ENVIRONMENT = "environment.json"
"""In an attempt: host, packages, accelerators."""
DIFF = "git.diff"
"""In an attempt or a sweep: the code's difference from its commit."""
METRICS = "metrics.jsonl"
"""In a run's directory: what it measured, over all attempts."""
METRICS_INDEX = "metrics.index"
"""In a run's directory, of a long run: what each few hundred lines of its metrics say, summed up."""
TEXTS = "texts.jsonl"
"""In a run's directory: texts that were logged, such as sample predictions, over all attempts."""
LEDGER = "jobs.jsonl"
"""In a sweep's directory: the ledger of its jobs."""
SWEEP_FILE = "sweep.json"
"""In a sweep's directory: the command, how its app is started, the launcher's settings."""
SWEEP_LOCK = "following.lock"
"""In a sweep's directory: held by the process that monitors the sweep."""
JOB_FILE = "job.json"
"""In a job's folder of a sweep: the frozen job."""
CHECKPOINT_FILE = "checkpoint.json"
"""In a checkpoint: its facts, written last."""
EXPORT_FILE = "export.json"
"""In an export of the model alone: its facts."""

ARTIFACT_NAME = "compile-{}.tar"
"""In `compile.precompile_artifact_dir`: a packed compile cache, by the hash of what it is for."""
ARTIFACT_FACTS = "artifact.json"
"""First in a packed compile cache: what it is for, size and checksum of every file in it."""
_DANLING_SHARDS = (".metadata", "runner.yaml")
"""In a folder of shards that DanLing 0.4 wrote: torch's description of them, and the run's settings."""
_DANLING_LATEST, _DANLING_POINTER = "latest.pth", "latest.pointer"

LARGEST_BYTES = 1 << 26
"""A JSON object of ours is far smaller; what is larger is not read into memory."""
DEEPEST = 100
"""Levels of nesting that a configuration can have; recursive code downstream must not run out of stack."""
LARGEST_INTEGER = 1 << 64
"""The first integer that is too large for a record, whatever its sign."""
LONGEST_NAME = 255
"""Bytes of a file's name on Linux."""


def error_file(folder: Path, rank: int) -> Path:
    """The file, in an attempt or a job's folder, that says why a rank failed."""
    return folder / f"error-{rank}.json"


def group_file(attempt: Path, group: int) -> Path:
    """The file, in an attempt with replica groups on Slurm, that says how a group's task ended."""
    return attempt / f"group-{group}.json"


def danling_checkpoint(path: Path) -> Path | None:
    """The checkpoint of DanLing that a path names: a `.pth` file, a folder of shards, or the latest one in a folder of
    checkpoints or in a run. None where it names none of DanLing's."""
    if path.is_file():
        return path if path.suffix == ".pth" else None
    if any((path / name).is_file() for name in (RUN_FILE, CHECKPOINT_FILE)):
        return None
    if all((path / name).is_file() for name in _DANLING_SHARDS):
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / _DANLING_LATEST).is_file():
            return folder / _DANLING_LATEST
        pointer = folder / _DANLING_POINTER
        if pointer.is_file():
            with suppress(Damaged):
                named = read_regular(pointer, 4096).decode(errors="replace").strip()
                return folder / named if Path(named).name == named else None
    return None


class Damaged(ValueError):
    """A file does not hold what was written there. Carries `path` and `reason`."""

    def __init__(self, path: Path, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


def read_regular(path: Path, limit: int | None = LARGEST_BYTES, *, start: int = 0, most: int | None = None) -> bytes:
    """The bytes of a regular file.

    Args:
        limit: the most bytes that are read; None for any number.
        start: number of bytes at the beginning to skip.
        most: number of bytes to read at most, of a file of any size.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        Damaged: it is not a regular file, is larger than `limit`, or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        if limit is not None and size > limit:
            raise Damaged(path, f"it has {size} bytes, and no more than {limit} are read")
        if most is not None:
            return os.pread(descriptor, most, start)
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(start)
            return file.read(-1 if limit is None else limit)
    except OSError as error:
        raise Damaged(path, f"it cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading; the caller closes it. Raises as `read_regular` does."""
    try:
        # Without O_NONBLOCK, opening a FIFO blocks until a writer comes, which may be never.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            raise Damaged(path, "it is a link to nothing") from error
        raise FileNotFoundError(error.errno, error.strerror, str(path)) from error
    except OSError as error:
        raise Damaged(path, f"it cannot be read: {error.strerror}") from error
    # fstat on the open file: a check of the path before opening could see another file.
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise Damaged(path, f"it is {_kind(mode)}, not a file")
    return descriptor


def no_links(path: str, flags: int) -> int:
    """The `opener` with which records are opened for writing: not through a link, which may lead to any file.

    Raises OSError: ELOOP for a link.
    """
    # Without O_NONBLOCK, opening a FIFO could block for ever.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)


def open_lock(path: Path) -> int:
    """A descriptor of a lock file, which is made where there is none. Writes nothing.

    Raises:
        OSError: it cannot be opened for writing, see `no_links`.
        Damaged: it is not a regular file.
    """
    descriptor = no_links(str(path), os.O_RDWR | os.O_CREAT)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise Damaged(path, f"it is {_kind(mode)}, not a file")
    return descriptor


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises FileNotFoundError, or Damaged for anything that is not one."""
    try:
        return parse_object(read_regular(path))
    except Damaged:
        raise
    except ValueError as error:
        raise Damaged(path, str(error)) from error


def parse_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError, with the reason, for anything else, and for one that is nested too deeply
    or holds numbers or text that no reader can show."""
    if not content.strip():
        raise ValueError("it is empty")
    try:
        found = json.loads(content.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits; thousands of open brackets
        raise ValueError(f"it is not usable JSON: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ValueError("it is not a JSON object")
    _check(found)
    return found


def _check(content: Any) -> None:
    """Raises ValueError where a value is nested too deeply, too large, or text that is not UTF-8."""
    # A loop and not recursion, which the nesting that it looks for would exhaust.
    waiting = [(content, 1)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            # JSON can escape half a surrogate pair, which raises as soon as it is printed or written.
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError("it holds text that is not UTF-8")
        elif isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
            raise ValueError("it holds an integer of more than 64 bits")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically: readers see all of it or none of it, and so does the next boot after a power cut."""
    # fsync before the rename: file systems may order the rename before the data, and leave an empty file after a crash.
    # The process id keeps two writers of the same file from sharing a temporary one.
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", opener=no_links) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
