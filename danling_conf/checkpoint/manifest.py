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
    files: Mapping[str, Sum] = field(default_factory=dict)
    """Size and checksum of every other file of the checkpoint, by name."""

    @property
    def made_under(self) -> Layout:
        """The layout it was written under."""
        return Layout(**self.degrees, fsdp=self.fsdp)

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
        found = Manifest(**{item.name: content[item.name] for item in fields(Manifest)})
        found.made_under  # noqa: B018  raises for invalid degrees
        datetime.fromisoformat(found.saved)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Broken(f"{path}: it cannot be read: {type(error).__name__}: {error}") from error
    # A checkpoint may come from someone else: its names must not lead out of its folder.
    for file in found.files:
        if "/" in file or file in ("", ".", "..", name):
            raise Broken(f"{path}: it cannot be read: it names a file outside of its folder, {file!r}")
    return found


def verify(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> None:
    """Compare files with their checksums: all, or those named. Raises Broken with the first that differs."""
    for name in manifest.files if names is None else names:
        path, expected = folder / name, manifest.files[name]
        try:
            found = durable.sum_of(path)
        except FileNotFoundError:
            raise Broken(f"{path}: there is no such file, so the checkpoint is not whole") from None
        except OSError as error:
            raise Broken(f"{path}: it cannot be read: {error.strerror}") from error
        if found.size != expected.size:
            rule = (
                "it is empty" if not found.size else f"it has {found.size} bytes and was written with {expected.size}"
            )
            raise Broken(f"{path}: it cannot be read: {rule}")
        if found != expected:
            raise Broken(
                f"{path}: it cannot be read: its checksum differs: it was changed or damaged after it was written"
            )


def _checksum(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
