"""Weights for inference: of a run, a checkpoint, an export or a safetensors file, loaded into a plain module.

A checkpoint's names and shapes are those of the whole model, so it does not matter which layout wrote it. One process
reads it by itself: there is no process group, no mesh and no configuration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danling_conf.checkpoint import danling_files, manifest, sources, state
from danling_conf.checkpoint.folder import BEST, EXPORT, Folder, reading
from danling_conf.checkpoint.loading import ModelDiffers, NothingSaved, misfit, open_tensors, without_tied
from danling_conf.checkpoint.manifest import EXPORTED, FACTS, Broken, Manifest
from danling_conf.checkpoint.safe_load import load_plain
from danling_conf.checkpoint.sources import Source
from danling_conf.checkpoint.state import MODEL, Known
from danling_conf.checkpoint.writing import SHARED
from danling_conf.schema.files import danling_checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What `load_weights` found. `missing` and `unexpected` are empty where it was strict."""

    path: Path
    """The checkpoint, export or file that was loaded."""
    step: int | None
    """Optimizer steps done when it was saved; None for safetensors that we did not write."""
    missing: tuple[str, ...] = ()
    """Names of the module's that the source lacks; they keep their values."""
    unexpected: tuple[str, ...] = ()
    """Names of the source's that the module lacks."""


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


def load_weights(
    module: nn.Module, source: str | os.PathLike[str], *, best: bool = False, strict: bool = True, cast: bool = False
) -> LoadedWeights:
    """Load trained weights into a plain module, in place: for inference, in one process, whatever layout wrote them.

        model = MyModel()
        danling_conf.load_weights(model, "experiments/lin/exp/1a2b3c4d5e6f")
        model.eval()

    Checksums are compared before anything is loaded, and the module is changed only where everything fits. Nothing is
    executed from a file: tensors and plain values are all that is read.

    Args:
        module: on any device except meta. It may be compiled.
        source: a run's directory, which means its newest whole checkpoint or export; a checkpoint's or an export's
            folder; a folder of safetensors; a safetensors file; or a checkpoint of DanLing 0.4.
        best: the run's best checkpoint in place of its newest.
        strict: refuse names that only one of both has. False: load what they share, and return the others.
        cast: convert between floating-point dtypes. False: refuse a dtype that differs.

    Raises:
        NothingSaved: there are no weights at `source`.
        Broken: a file is missing, or is not what was saved.
        ModelDiffers: the weights do not fit the module; the message names what is missing or differs.
        ValueError: the module is on the meta device. The errors above are ValueErrors too.
        ImportError: the source needs the package safetensors.
    """
    tensors = state.model_tensors([module])
    on_meta = [name.removeprefix(MODEL) for name, item in tensors.items() if item.is_meta]
    if on_meta:
        raise ValueError(f"{on_meta[0]} is on the meta device, which holds no values: build the model on a real device")
    with opened(Path(source).expanduser(), best=best) as found:
        known, targets = found.known, without_tied(tensors, found.known)
        extra = state.extra_names(module)
        missing = sorted({*targets, *extra} - {*known, *found.extra})
        unexpected = sorted({*known, *found.extra} - {*tensors, *extra})
        shared = {name: item for name, item in targets.items() if name in known}
        _check(module, found, shared, missing if strict else [], unexpected if strict else [], cast=cast)
        found.tensors.load(shared, alone=True)
        state.load_extra([module], found.extra)
    return LoadedWeights(
        path=found.path,
        step=None if found.facts is None else found.facts.step,
        missing=tuple(name.removeprefix(MODEL) for name in missing),
        unexpected=tuple(name.removeprefix(MODEL) for name in unexpected),
    )


@contextmanager
def opened(source: Path, *, best: bool = False) -> Iterator[OpenWeights]:
    """Open the newest whole weights at `source`, or the best. A broken checkpoint of a run is passed over with a
    warning; one that is named is an error. Raises NothingSaved, Broken, or ImportError."""
    foreign = None if best else danling_checkpoint(source)
    if foreign is not None:
        yield OpenWeights(path=foreign, facts=None, tensors=danling_files.weights(foreign))
        return
    found = _candidates(source, best)
    with ExitStack() as stack:
        yield _first_whole(found, stack)


def _first_whole(found: list[Path], stack: ExitStack) -> OpenWeights:
    faults: list[str] = []
    for path in found:
        with ExitStack() as attempt:
            try:
                result = _open(path, attempt)
            except Broken as error:
                faults.append(str(error))
                continue
            stack.push(attempt.pop_all())
        for fault in faults:
            _log.warning("passed over a broken checkpoint: %s", fault)
        return result
    raise Broken("; ".join(faults))


def _candidates(source: Path, best: bool) -> list[Path]:
    """What may be loaded, the newest first."""
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
    entries = [(entry.step, 1, entry.path) for folder in folders for entry in Folder(folder).entries()]
    for folder in folders:
        if (folder / EXPORT / EXPORTED).is_file():
            entries.append((_step_of_export(folder / EXPORT), 0, folder / EXPORT))
    if not entries:
        raise NothingSaved(f"{source}: there is no checkpoint in it, no export, and no safetensors")
    # At one step a checkpoint comes before an export, which may have been cast.
    return [path for *_, path in sorted(entries, reverse=True)]


def _is_one(path: Path) -> bool:
    """Whether a folder is a checkpoint or an export, or looks like one."""
    return (path / FACTS).is_file() or (path / EXPORTED).is_file() or path.resolve().name.startswith("ckpt-")


def _is_plain(path: Path) -> bool:
    """Whether a folder holds safetensors."""
    return path.is_dir() and bool(sources.safetensors_files(path))


def _step_of_export(path: Path) -> int:
    try:
        return manifest.read(path, EXPORTED).step
    except Broken:
        return -1


def _open(path: Path, stack: ExitStack) -> OpenWeights:
    """Verify and open. Raises Broken, NothingSaved, or ImportError."""
    if (path / EXPORTED).is_file() or not _is_one(path):
        facts = manifest.read(path, EXPORTED) if (path / EXPORTED).is_file() else None
        if facts is not None:
            manifest.verify(path, facts)
        plain = sources.safetensors(path)
        if plain is None:
            raise NothingSaved(f"{path}: it holds no safetensors, and other files of weights are not read")
        return OpenWeights(path=path, facts=facts, tensors=plain)
    path = path.resolve()
    stack.enter_context(reading(path))  # its run, which may be alive, does not remove it meanwhile
    facts = manifest.read(path)
    manifest.verify(path, facts)
    shared = load_plain(path / SHARED)
    if not (isinstance(shared, dict) and isinstance(shared.get("optimizer"), dict)):
        raise Broken(f"{path / SHARED}: it is not what was saved of a run")
    return OpenWeights(
        path=path,
        facts=facts,
        tensors=open_tensors(path, facts),
        settings=shared.get("settings") or {},
        extra=shared["optimizer"].get("extra") or {},
    )


def _check(
    module: nn.Module,
    found: OpenWeights,
    shared: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    *,
    cast: bool,
) -> None:
    """Compare names, shapes and dtypes. Raises ModelDiffers."""
    known = found.known
    none: tuple[int, ...] = ()
    mine = {**dict.fromkeys(missing, none), **{name: tuple(item.shape) for name, item in shared.items()}}
    theirs = {**dict.fromkeys(unexpected, none), **{name: known[name].shape for name in shared}}
    differing = [
        f"{name.removeprefix(MODEL)} {_short(known[name].dtype)} for {_short(item.dtype)}"
        for name, item in shared.items()
        if known[name].dtype != item.dtype and not (cast and _castable(known[name].dtype, item.dtype))
    ]
    faults = [misfit(mine, theirs, set(mine))]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        hint = "" if cast else " (cast=True converts)"
        faults.append(f"of another dtype {', '.join(differing[:3])}{more}{hint}")
    if any(faults):
        own_loader = callable(getattr(module, "from_pretrained", None)) and (found.path / "config.json").is_file()
        if own_loader and (missing or unexpected):
            faults.append(f"{type(module).__name__}.from_pretrained reads its folder by its own names")
        raise ModelDiffers(found.path, "; ".join(fault for fault in faults if fault))


def _castable(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point for dtype in dtypes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
