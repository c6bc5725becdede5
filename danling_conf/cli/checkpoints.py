"""`danling-conf checkpoints`: lists the checkpoints of runs, and whether they are complete."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from danling_conf.checkpoint import manifest
from danling_conf.checkpoint.folder import BEST, EXPORT, LATEST, Entry, Folder, reading, real
from danling_conf.checkpoint.manifest import EXPORTED, FACTS, Broken, Manifest
from danling_conf.records.find import runs_or_refuse
from danling_conf.records.reading import read_fields
from danling_conf.records.run_directory import attempts_in
from danling_conf.schema.files import FROZEN

_HEAD = ("checkpoint", "step", "epoch", "saved", "size", "layout", "backend", "state", "")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def list_checkpoints(directory: str, *, check: bool) -> tuple[list[str], bool]:
    """Lines about the checkpoints of a run, of a sweep's runs, or of all runs below a directory; and whether all of
    them are complete.

    Args:
        check: compare checksums of files, and not only their sizes.

    Raises ConfigRefused where there is no run.
    """
    lines: list[str] = []
    whole = True
    for run in runs_or_refuse(directory):
        shown, fine = _of_run(run, check)
        lines += ([""] if lines else []) + shown
        whole = whole and fine
    return lines, whole


def _of_run(run: Path, check: bool) -> tuple[list[str], bool]:
    folder = Folder(folder_of(run))
    entries = sorted(folder.entries(), key=lambda entry: (entry.step, entry.path.name))
    named = {name: folder.pointed(name) for name in (LATEST, BEST)}
    rows, faults = [], []
    for entry in entries:
        fault = _fault(entry, check)
        names = [name for name, target in named.items() if target == real(entry.path)]
        rows.append(_row(entry.path.name, entry.manifest, fault, names, check))
        if fault:
            faults.append(fault)
    export = folder.path / EXPORT
    if export.is_dir():
        facts, fault = _export(export, check)
        rows.append(_row(EXPORT, facts, fault, ["the model alone"], check))
        faults += [fault] if fault else []
    lines = [f"{run}: {len(entries)} checkpoint{'' if len(entries) == 1 else 's'} in {folder.path.name}/"]
    if rows:
        lines += _table([_HEAD, *rows])
    lines += [f"unfinished: {path}" for path in folder.unfinished()]
    lines += [
        f"{name} points to nothing"
        for name, target in named.items()
        if target is None and (folder.path / name).is_symlink()
    ]
    return lines + [f"broken: {fault}" for fault in faults], not faults


def folder_of(run: Path) -> Path:
    """The run's checkpoint folder, as its attempts are configured."""
    for attempt in reversed(attempts_in(run)):
        configured = read_fields(attempt / FROZEN, "config").table("config").table("checkpoint").text("dir_name")
        if configured and Path(configured).name == configured and "\0" not in configured:
            return run / configured
    found = sorted(path.parent.parent for path in run.glob(f"*/ckpt-*/{FACTS}"))
    return found[0] if found else run / "checkpoints"


def saved_step(run: Path) -> int | None:
    """The step of the checkpoint that a run would resume from; None where there is none, or it cannot be read."""
    latest = Folder(folder_of(run)).pointed(LATEST)
    if latest is None:
        return None
    # Those of steps are named by them; of an epoch the manifest knows.
    by_step = re.fullmatch(r"ckpt-s([0-9]{8,15})", latest.name)
    try:
        return int(by_step[1]) if by_step is not None else manifest.read(latest).step
    except Broken:
        return None


def _fault(entry: Entry, check: bool) -> str:
    if entry.manifest is None:
        return entry.fault
    try:
        with reading(entry.path):
            _compare(entry.path, entry.manifest, check)
    except Broken as error:
        return str(error)
    return ""


def _export(path: Path, check: bool) -> tuple[Manifest | None, str]:
    try:
        facts = manifest.read(path, EXPORTED)
        _compare(path, facts, check)
    except Broken as error:
        return None, str(error)
    return facts, ""


def _compare(path: Path, facts: Manifest, check: bool) -> None:
    """Raises Broken where a file is missing or has another size, or, with `check`, another checksum."""
    if check:
        manifest.verify(path, facts)
        return
    for name in facts.files:
        manifest.check_size(path, facts, name)


def _row(name: str, facts: Manifest | None, fault: str, names: list[str], check: bool) -> tuple[str, ...]:
    state = "broken" if fault else "verified" if check else "whole"
    if facts is None:
        return (name, "?", "?", "?", "?", "?", "?", state, " ".join(names))
    saved = datetime.fromisoformat(facts.saved).strftime("%Y-%m-%d %H:%M:%S")
    return (
        name,
        str(facts.step),
        str(facts.epoch),
        saved,
        readable_size(facts.size),
        facts.layout,
        facts.backend,
        state,
        " ".join(names),
    )


def readable_size(count: float) -> str:
    """Bytes in a readable unit: 1.5 MB."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {_UNITS[-1]}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    right = {1, 2, 4}
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
