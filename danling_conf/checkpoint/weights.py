"""Weights for inference: of a run, a checkpoint, an export or a safetensors file, loaded into a plain module.

A checkpoint's names and shapes are those of the whole model, so it does not matter which layout wrote it. One process
reads it by itself: there is no process group, no mesh and no configuration.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from danling_conf.checkpoint import state
from danling_conf.checkpoint.fit import ModelDiffers, differing_ties, listed, misfit, ties, without_tied
from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.state import MODEL
from danling_conf.checkpoint.weight_sources import OpenWeights, candidates, open_one

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What `load_weights` found. `missing` and `unexpected` are empty where it was strict."""

    path: Path
    """The checkpoint, export or file that was loaded."""
    step: int | None
    """Optimizer steps done when it was saved; None for files that we did not write."""
    missing: tuple[str, ...] = ()
    """Names of the module's that the source lacks; they keep their values."""
    unexpected: tuple[str, ...] = ()
    """Names of the source's that the module lacks."""


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
            folder; a folder of safetensors; a safetensors file; a state dict that `torch.save` wrote; or what DanLing
            0.4 saved.
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
    with opened(Path(source).expanduser(), best=best) as on_disk:
        found = replace(on_disk, tensors=on_disk.for_model(module))
        known, targets = found.known, without_tied(tensors, found.known)
        extra = state.extra_names(module)
        missing = sorted({*targets, *extra} - {*known, *found.extra})
        unexpected = sorted({*known, *found.extra} - {*tensors, *extra})
        shared = {name: item for name, item in targets.items() if name in known}
        _check(found, shared, missing if strict else [], unexpected if strict else [], cast=cast)
        differing = differing_ties(shared, ties(shared), found.tensors, alone=True)
        if differing:
            raise ModelDiffers(found.path, f"the model ties {listed(differing)}, whose values differ in it")
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
    found = candidates(source, best)
    with ExitStack() as stack:
        yield _first_whole(found, stack)


def _first_whole(found: list[Path], stack: ExitStack) -> OpenWeights:
    faults: list[str] = []
    for path in found:
        with ExitStack() as attempt:
            try:
                result = open_one(path, attempt)
            except Broken as error:
                faults.append(str(error))
                continue
            stack.push(attempt.pop_all())
        for fault in faults:
            _log.warning("passed over a broken checkpoint: %s", fault)
        return result
    raise Broken("; ".join(faults))


def _check(
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
    other = {name: (known[name].dtype, item.dtype) for name, item in shared.items() if known[name].dtype != item.dtype}
    differing = [
        f"{name.removeprefix(MODEL)} {_short(dtypes[0])} for {_short(dtypes[1])}"
        for name, dtypes in other.items()
        if not (cast and _castable(*dtypes))
    ]
    faults = [misfit(mine, theirs, set(mine))]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        hint = " (cast=True converts)" if not cast and all(_castable(*dtypes) for dtypes in other.values()) else ""
        faults.append(f"of another dtype {', '.join(differing[:3])}{more}{hint}")
    if any(faults):
        raise ModelDiffers(found.path, "; ".join(fault for fault in faults if fault))


def _castable(*dtypes: torch.dtype) -> bool:
    return all(dtype.is_floating_point for dtype in dtypes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
