"""Log files of an attempt: one for each rank, and one for the job, which the main process writes."""

from __future__ import annotations

import errno
import io
import logging
import os
import stat
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from danling_conf.topology.rank_environment import RankEnvironment

_OURS = "danling_conf"
ENDS_RANK = "ends_rank"
"""Attribute of a log record that says why a rank ends, which the command shows as the end of the run."""
_shown: set[int | None] = set()
"""Kinds of errors that were shown."""
_position: Callable[[], tuple[int, int]] | None = None
"""Returns the optimizer steps and the epochs that this process has done; None outside of training."""
_reached: tuple[int, int] | None = None
"""What it returned last, where training is over."""


def set_position(position: Callable[[], tuple[int, int]] | None) -> None:
    """Let log lines, and the last record of an attempt, show the optimizer step and the epoch."""
    global _position, _reached
    if _position is not None:
        _reached = _position()
    _position = position


def position() -> tuple[int, int] | None:
    """The optimizer steps and the epochs that this process has done, also when training is over; None before it."""
    return _reached if _position is None else _position()


def rank_log(attempt: Path, rank: int) -> Path:
    """The log file of a rank."""
    return attempt / f"rank-{rank}.log"


def open_logs(attempt: Path, ranks: RankEnvironment, *, log: bool, job_name: str) -> list[logging.Handler]:
    """Log to the rank's file, and on the main process to the job's log as well. Returns the handlers that were added.

    The package's own logger does not propagate: on the console its lines would break the progress display.
    """
    global _reached
    _reached = None
    handlers: list[logging.Handler] = [_file_handler(rank_log(attempt, ranks.number), ranks.number)]
    root, ours = logging.getLogger(), logging.getLogger(_OURS)
    if root.level > logging.INFO or root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    root.addHandler(handlers[0])
    ours.addHandler(handlers[0])
    if ranks.number == 0 and log:
        handlers.append(_file_handler(attempt / f"{job_name}.log", ranks.rank))
        ours.addHandler(handlers[1])
    if ranks.main and not log:
        # Hydra has opened the job's log before the user's function is called; `log=false` has to close it again.
        for handler in list(root.handlers):
            if isinstance(handler, logging.FileHandler) and handler is not handlers[0]:
                root.removeHandler(handler)
    for handler in (*root.handlers, *handlers):  # Hydra's are among them
        if isinstance(handler, logging.FileHandler):
            handler.handleError = partial(_show_unwritable, handler.baseFilename)  # type: ignore[method-assign]
    ours.propagate = False
    return handlers


def close_logs(handlers: list[logging.Handler]) -> None:
    """Remove handlers."""
    for logger in (logging.getLogger(), logging.getLogger(_OURS)):
        for handler in handlers:
            logger.removeHandler(handler)
    for handler in handlers:
        try:
            handler.close()
        except OSError as error:
            show_unwritable(str(getattr(handler, "baseFilename", "log")), error)
    logging.getLogger(_OURS).propagate = True


def is_full(error: OSError) -> bool:
    """Whether a disk takes no more: it is full, or read-only."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def show_unwritable(path: Path | str, error: OSError, so: str = "records miss what cannot be written") -> None:
    """Show that a record cannot be written, once in a process for each kind of error: a full disk fails every line of
    every file.

    Args:
        so: what that means.
    """
    if error.errno in _shown:
        return
    _shown.add(error.errno)
    try:
        print(f"warning: {path}: {error.strerror}: {so}", file=sys.stderr, flush=True)
    except OSError:  # standard error is a file on the same disk
        return


@contextmanager
def on_any_disk(path: Path) -> Iterator[None]:
    """Inside the block, a record that a full or read-only disk does not take is shown, and no error."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        show_unwritable(path, error)


def _show_unwritable(path: str, record: logging.LogRecord) -> None:
    """`Handler.handleError` of log files; logging's own prints a trace for every line."""
    error = sys.exc_info()[1]
    if isinstance(error, OSError):
        show_unwritable(path, error)
    elif logging.raiseExceptions:
        traceback.print_exc()


def log_descriptor(path: Path) -> int:
    """Open a rank's log for its standard output and error. O_APPEND keeps what is printed and what is logged in order,
    as two descriptors of one file have two positions."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def redirect_output(path: Path) -> None:
    """Append this process's standard output and error to `path`.

    The descriptors are replaced, not `sys.stdout`: NCCL and other C++ code write to them directly.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = log_descriptor(path)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


class _Output(io.FileIO):
    """A file that what is printed goes to. What a full disk does not take is dropped, and shown once."""

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        left = view
        try:
            while left:
                left = left[super().write(left) or 0 :]
        except OSError as error:
            if not is_full(error):
                raise
            show_unwritable("standard output", error)
        return len(view)


def outlast_full_disk() -> None:
    """In a process whose output this package sends to a file: a line that is printed must not end training where the
    disk is full."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Not what somebody else, such as a test runner, has put there.
        own = stream is not None and stream is getattr(sys, f"__{name}__")
        if own and stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            stream.flush()
            raw = _Output(stream.fileno(), "w", closefd=False)
            lasting = io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True)
            setattr(sys, name, lasting)
            setattr(sys, f"__{name}__", lasting)


def configure_job_logging(hydra_config: DictConfig) -> None:
    """Apply the job logging that Hydra composed, in a process that Hydra did not start."""
    from hydra.core.utils import configure_log

    configure_log(hydra_config.job_logging, hydra_config.verbose)


class _Line(logging.Formatter):
    """Time, rank, step, level and logger before each message."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s rank {rank} %(step)s %(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        record.step = "starting" if _position is None else f"step {_position()[0]}"
        return super().format(record)


def _file_handler(path: Path, rank: int) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(_Line(rank))
    return handler
