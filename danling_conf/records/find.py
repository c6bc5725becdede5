"""The runs that a path stands for: a run's own directory, a sweep's, or one above them."""

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
    """The run directories that `path` stands for, in the sweep's order, else by name; none where there are none."""
    if has(path, RUN_FILE):
        yield path
    elif has(path, LEDGER):
        yield from dict.fromkeys(record.run for record in Ledger(path).records().values() if record.run is not None)
    else:
        yield from sorted(found.parent for found in path.rglob(RUN_FILE))


def has(folder: Path, name: str) -> bool:
    """Whether there is something of that name in a folder: damaged or not, it says what the folder is."""
    return os.path.lexists(folder / name)


def sweep_of(run: Path) -> tuple[SweepDirectory, Record] | None:
    """The newest sweep that a run is a job of, and which job; None for a run of its own."""
    folders = {path.parent for path in (run.parent / "sweeps").glob(f"*/{LEDGER}")}
    attempt = newest_attempt(run)
    if attempt is not None:
        hydra = read_fields(attempt / FROZEN).table("hydra")
        cwd, named = hydra.table("runtime").text("cwd"), hydra.table("sweep").text("dir")
        if cwd and named and "\0" not in cwd + named:  # it may have been put elsewhere
            folders.add(Path(cwd) / named)
    for folder in sorted(folders, key=lambda folder: folder.name, reverse=True):
        with contextlib.suppress(OSError):  # it was moved or removed
            found = (folder / LEDGER).stat()
            record = _jobs_by_run(folder, found.st_size, found.st_mtime_ns).get(run.resolve())
            if record is not None:
                return SweepDirectory(path=folder), record
    return None


@lru_cache(maxsize=32)
def _jobs_by_run(sweep: Path, size: int, changed: int) -> Mapping[Path, Record]:
    """The jobs of a sweep by their runs, read anew when the ledger has changed: a view of a thousand runs asks for
    each of them, every second."""
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
        raise ConfigRefused([Violation("RUN", directory, rule, "give a run's directory, a sweep's, or one above them")])
    return found
