"""Finder of runs: a path names a run's own directory, a sweep's, or any directory above them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.reading import read_fields
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.sweep_directory import SweepDirectory
from danling_conf.schema.files import FROZEN, LEDGER, RUN_FILE
from danling_conf.topology.violation import ConfigRefused, Violation


def runs_in(path: Path) -> Iterator[Path]:
    """Yields the run directories at or below `path`: those of a sweep in its order, others by name."""
    if has(path, RUN_FILE):
        yield path
    elif has(path, LEDGER):
        yield from dict.fromkeys(record.run for record in Ledger(path).records().values() if record.run is not None)
    else:
        yield from sorted(found.parent for found in path.rglob(RUN_FILE))


def has(folder: Path, name: str) -> bool:
    """Whether a folder has an entry of that name, damaged or not."""
    # lexists: a dangling link or a FIFO still shows what the folder is, and its damage is then reported by name.
    return os.path.lexists(folder / name)


def sweep_of(run: Path) -> tuple[SweepDirectory, Record] | None:
    """The newest sweep that a run is a job of, with the job's record; None for a run outside of any sweep."""
    # By default a sweep lies beside its runs; `hydra.sweep.dir` may put it elsewhere, and the frozen settings say
    # where.
    folders = {path.parent for path in (run.parent / "sweeps").glob(f"*/{LEDGER}")}
    attempt = newest_attempt(run)
    if attempt is not None:
        hydra = read_fields(attempt / FROZEN).table("hydra")
        cwd, named = hydra.table("runtime").text("cwd"), hydra.table("sweep").text("dir")
        if cwd and named and "\0" not in cwd + named:  # a NUL, in a damaged file, makes every system call raise
            folders.add(Path(cwd) / named)
    for folder in sorted(folders, key=lambda folder: folder.name, reverse=True):
        with contextlib.suppress(OSError):  # the sweep was moved or removed after the run
            found = (folder / LEDGER).stat()
            record = _jobs_by_run(folder, found.st_size, found.st_mtime_ns).get(run.resolve())
            if record is not None:
                return SweepDirectory(path=folder), record
    return None


@lru_cache(maxsize=32)
def _jobs_by_run(sweep: Path, size: int, changed: int) -> Mapping[Path, Record]:
    """The jobs of a sweep by their runs.

    Cached by the ledger's size and time of change: a live view of a thousand runs looks each of them up every second.
    """
    found: dict[Path, Record] = {}
    for record in Ledger(sweep).records().values():
        if record.run is not None:
            found.setdefault(record.run.resolve(), record)
    return found


def runs_or_refuse(directory: str) -> list[Path]:
    """The runs of a directory that a user named. Raises ConfigRefused where there is none."""
    path = Path(directory).expanduser()
    found = list(runs_in(path))
    if not found:
        rule = "there is no run in it" if path.is_dir() else "there is no such directory"
        raise ConfigRefused([Violation("RUN", directory, rule, "name a run's directory, a sweep's, or one above them")])
    return found
