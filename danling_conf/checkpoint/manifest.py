"""Manifest of a checkpoint: `checkpoint.json`, which is written last and has the checksum of every other file.

Needs no torch, so that checkpoints can be listed where it is not installed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from danling_conf.checkpoint import durable
from danling_conf.checkpoint.durable import Sum
from danling_conf.schema.files import CHECKPOINT_FILE, EXPORT_FILE, Damaged, read_object
from danling_conf.schema.layout import Layout

FACTS, EXPORTED = CHECKPOINT_FILE, EXPORT_FILE
FORMAT = 2
SAFETENSORS = "safetensors"
"""Backend of an export."""
_BACKENDS = ("file", "dcp", SAFETENSORS)


class Broken(ValueError):
    """A checkpoint is not as it was saved: a file is missing, damaged or foreign."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The facts of one checkpoint."""

    step: int
    """Optimizer steps done."""
    epoch: int
    """Epochs done."""
    saved: str
    """Time of the save, as ISO 8601 with the offset from UTC."""
    backend: str
    """`file` or `dcp`; `SAFETENSORS` for an export."""
    layout: str
    """Name of the layout it was written under."""
    degrees: Mapping[str, int]
    """Degrees of that layout."""
    fsdp: bool
    """Whether that layout sharded by FSDP."""
    history: bool
    """Whether to keep it when `latest` and `best` have moved on."""
    optimizer: str
    """Class of the optimizer."""
    groups: int = 1
    """Replica groups that trained; one of them wrote the checkpoint."""
    group: int = 0
    """Which one."""
    files: Mapping[str, Sum] = field(default_factory=dict)
    """Size and checksum of every other file of the checkpoint, by name."""

    @property
    def made_under(self) -> Layout:
        """The layout it was written under."""
        return Layout(**self.degrees, fsdp=self.fsdp)

    @property
    def data_degree(self) -> int:
        """How many data ranks there were, of all replica groups."""
        return self.made_under.data_degree * self.groups

    @property
    def time(self) -> datetime:
        """Time of the save."""
        return datetime.fromisoformat(self.saved).astimezone()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(item.size for item in self.files.values())


def write(folder: Path, manifest: Manifest, name: str = FACTS) -> None:
    """Write the manifest, which makes the folder a complete checkpoint. It is durable when this returns.

    Args:
        name: name of the file; `EXPORTED` for an export, which cannot be resumed.
    """
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=1)
    durable.write_file(folder / name, text.encode() + b"\n")
    durable.sync(folder / name)


def read(folder: Path, name: str = FACTS) -> Manifest:
    """The manifest of a checkpoint. Raises Broken, with the path, where it is missing or damaged."""
    path = folder / name
    try:
        content = read_object(path)
        checksum = content.pop("checksum")
        made_by = content.pop("format")
    except FileNotFoundError:
        raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
    except Damaged as damage:
        raise Broken(f"{path}: it cannot be read: {damage.reason}") from damage
    except KeyError as error:
        raise Broken(f"{path}: it cannot be read: it has no {error.args[0]}") from error
    if checksum != _checksum({"format": made_by, **content}):
        raise Broken(f"{path}: it cannot be read: its checksum differs: it was changed or damaged after it was written")
    if made_by != FORMAT:
        raise Broken(f"{path}: it cannot be read: its format is {made_by}, and this version reads {FORMAT}")
    try:
        content["files"] = {name: Sum(**item) for name, item in content["files"].items()}
        # Those of earlier versions say nothing of replica groups.
        known = {"groups": 1, "group": 0, **content}
        found = Manifest(**{item.name: known[item.name] for item in fields(Manifest)})
        _check_types(found)
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise Broken(f"{path}: it cannot be read: {type(error).__name__}: {error}") from error
    # A checkpoint may come from someone else: its names must not lead out of its folder.
    for file in found.files:
        if "/" in file or file in ("", ".", "..", name):
            raise Broken(f"{path}: it cannot be read: it names a file outside of its folder, {file!r}")
    return found


def _check_types(found: Manifest) -> None:
    """Raises ValueError or TypeError where a fact is not what the field says: a fitting checksum does not tell."""
    counts = [found.step, found.epoch, found.groups, found.group, *found.degrees.values()]
    for item in found.files.values():
        counts += [item.size, item.crc32]
    wrong: list[Any] = [item for item in counts if type(item) is not int or item < 0]
    wrong += [item for item in (found.layout, found.optimizer) if not isinstance(item, str)]
    wrong += [found.backend] if found.backend not in _BACKENDS else []
    wrong += [item for item in (found.history, found.fsdp) if not isinstance(item, bool)]
    if wrong:
        raise ValueError(f"{str(wrong[0])[:40]!r} is another value than what is written there")
    found.made_under  # noqa: B018  raises for invalid degrees
    found.time  # noqa: B018  raises for what is no time


def verify(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare files with their checksums: all, or those named. Raises Broken with the first that differs."""
    for name in manifest.files if names is None else names:
        check_size(folder, manifest, name)
        path = folder / name
        try:
            found = durable.sum_of(path)
        except OSError as error:
            raise Broken(f"{path}: it cannot be read: {error.strerror}") from error
        if found != manifest.files[name]:
            raise Broken(
                f"{path}: it cannot be read: its checksum differs: it was changed or damaged after it was written"
            )


def check_size(folder: Path, manifest: Manifest, name: str) -> None:
    """Compare the size of a file with that in the manifest. Raises Broken where it differs, or is no regular file."""
    path, expected = folder / name, manifest.files[name].size
    try:
        size = durable.size_of(path)
    except FileNotFoundError:
        raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
    except Damaged as damage:
        raise Broken(f"{path}: it cannot be read: {damage.reason}") from damage
    if size != expected:
        rule = "it is empty" if not size else f"it has {size} bytes and was written with {expected}"
        raise Broken(f"{path}: it cannot be read: {rule}")


def check_listed(folder: Path, manifest: Manifest, names: Iterable[str], listed_by: str = FACTS) -> None:
    """Raises Broken where the manifest has no checksum of a file that is about to be read."""
    for name in names:
        if name not in manifest.files:
            raise Broken(f"{folder / listed_by}: it has no checksum of {name}, which is part of the checkpoint")


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
