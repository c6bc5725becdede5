"""Sources of weights: what a path to weights means, verified and opened.

The path is a run's, which means its newest weights, a checkpoint's, an export's, or that of files that others wrote.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from danling_conf.checkpoint import contents, danling_files, disk_names, manifest, sources
from danling_conf.checkpoint.folder import BEST, EXPORT, Folder, reading, real
from danling_conf.checkpoint.manifest import EXPORTED, FACTS, Broken, Manifest
from danling_conf.checkpoint.sources import Source
from danling_conf.checkpoint.state import MODEL, Known
from danling_conf.checkpoint.writing import SHARED
from danling_conf.schema.files import danling_checkpoint

Verify = Callable[[Path, Manifest], None]


class NothingSaved(ValueError):
    """There is no checkpoint, not even a broken one."""


@dataclass(frozen=True, kw_only=True)
class OpenWeights:
    """A source whose files are verified and open."""

    path: Path
    facts: Manifest | None
    """None for safetensors that we did not write."""
    tensors: Source
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration that a checkpoint holds; empty for an export."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Extra state of modules (`get_extra_state`) that a checkpoint holds."""

    @property
    def known(self) -> dict[str, Known]:
        """Shape and dtype of every tensor of the model, by name."""
        return {name: item for name, item in self.tensors.known.items() if name.startswith(MODEL)}

    def for_model(self, model: nn.Module) -> Source:
        """The tensors by the names of a model, which those of transformers write otherwise. Raises Broken."""
        of_ours = self.facts is not None and self.facts.backend != "safetensors"
        return self.tensors if of_ours else disk_names.in_memory(self.tensors, self.path, model)


def candidates(source: Path, best: bool = False) -> list[Path]:
    """What may be loaded, the newest first. Raises NothingSaved."""
    foreign = danling_checkpoint(source)
    if foreign is not None and not best:
        return [foreign]
    itself = source.is_file() or _is_one(source) or _is_plain(source)
    if best and itself:
        raise NothingSaved(f"{source}: the best is chosen among the checkpoints of a run, and this is no run")
    if itself:
        return [source]
    # A run names the folder of its checkpoints itself (`checkpoint.dir_name`), and may have changed the name.
    folders = [path for path in (source, *sorted(source.glob("*"))) if path.is_dir()]
    if best:
        pointed = [path for folder in folders if (path := Folder(folder).pointed(BEST)) is not None]
        if not pointed:
            raise NothingSaved(f"{source}: it has no best checkpoint; the newest needs no `best`")
        return pointed
    # At one step a checkpoint comes before an export, which may have been cast. What has no readable manifest comes
    # first: it may be the newest, and whoever takes another says so.
    entries = [
        (entry.manifest is None, entry.step, 1, entry.path) for folder in folders for entry in Folder(folder).entries()
    ]
    for path in (folder / EXPORT for folder in folders):
        if path.is_dir():
            step = _step_of_export(path)
            entries.append((step is None, step or 0, 0, path))
    if not entries:
        raise NothingSaved(f"{source}: there is no whole checkpoint in it, no export, and no safetensors")
    return [path for *_, path in sorted(entries, reverse=True)]


def _is_one(path: Path) -> bool:
    """Whether a folder is a checkpoint or an export, or looks like one."""
    return os.path.lexists(path / FACTS) or os.path.lexists(path / EXPORTED) or real(path).name.startswith("ckpt-")


def _is_plain(path: Path) -> bool:
    """Whether a folder holds safetensors."""
    return path.is_dir() and bool(sources.safetensors_files(path))


def _step_of_export(path: Path) -> int | None:
    try:
        return manifest.read(path, EXPORTED).step
    except Broken:
        return None


def open_one(path: Path, stack: ExitStack, verify: Verify = manifest.verify) -> OpenWeights:
    """Verify and open. Raises Broken, NothingSaved, or ImportError.

    Args:
        stack: keeps the run, which may be alive, from removing the checkpoint.
        verify: compares checksums.
    """
    foreign = danling_checkpoint(path)
    if foreign is not None:
        return OpenWeights(path=foreign, facts=None, tensors=danling_files.weights(foreign))
    if path.is_file() and path.suffix != ".safetensors":
        return OpenWeights(path=path, facts=None, tensors=sources.plain_file(path))
    if path.name == EXPORT or os.path.lexists(path / EXPORTED) or not _is_one(path):
        facts = None
        if os.path.lexists(path / EXPORTED) or path.name == EXPORT:
            facts = manifest.read(path, EXPORTED)
            verify(path, facts)
        plain = sources.safetensors(path, facts)
        if plain is None:
            raise NothingSaved(f"{path}: there is no checkpoint in it, and no safetensors")
        return OpenWeights(path=path, facts=facts, tensors=plain)
    path = real(path)
    stack.enter_context(reading(path))
    facts = manifest.read(path)
    verify(path, facts)
    manifest.check_listed(path, facts, [SHARED])
    shared = contents.shared(path / SHARED)
    return OpenWeights(
        path=path,
        facts=facts,
        tensors=sources.open_tensors(path, facts),
        settings=shared["settings"],
        extra=shared["optimizer"]["extra"],
    )
