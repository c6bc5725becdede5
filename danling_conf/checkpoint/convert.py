"""Conversion of a checkpoint into an export after the run, by one process that has neither its code nor its ranks."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danling_conf.checkpoint import durable, export
from danling_conf.checkpoint.folder import EXPORT
from danling_conf.checkpoint.manifest import SAFETENSORS
from danling_conf.checkpoint.state import MODEL
from danling_conf.checkpoint.weight_sources import NothingSaved, OpenWeights
from danling_conf.checkpoint.weights import opened
from danling_conf.topology.violation import SettingError

_READ_BYTES = 1_000_000_000
"""What is read of a checkpoint at once, so that a large model is never held whole."""
_LIBRARY, _TARGET, _CONFIG = "transformers", "_target_", "config.json"


class _Unknown(Exception):
    """Why the class of a model is not known."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """An export that was written."""

    path: Path
    source: Path
    step: int
    loaded_by: str | None
    """The class of transformers that loads it; None for plain safetensors."""
    reason: str
    """Where the class came from, or why it is not known."""

    def lines(self) -> list[str]:
        """What a user wants to know of it."""
        files = ", ".join(sorted(item.name for item in self.path.iterdir()))
        how = (
            f"{self.loaded_by}.from_pretrained({str(self.path)!r}) loads it: {self.reason}"
            if self.loaded_by
            else f"plain safetensors, without a config.json: {self.reason}; "
            f"danling_conf.load_weights(model, {str(self.path)!r}) loads them"
        )
        return [f"exported step {self.step} of {self.source} to {self.path}: {files}", how]


def convert(source: Path, target: Path, *, best: bool = False, dtype: str | None = None) -> Written:
    """Write the weights at `source` into a new folder, whole or not at all.

    Args:
        source: a run's directory, which means its newest whole checkpoint, or a checkpoint's.
        target: the folder; it must not exist, or be empty.
        best: the run's best checkpoint in place of its newest.
        dtype: to cast floating-point tensors to; None leaves them as trained.

    Raises:
        SettingError: there is something in `target`.
        NothingSaved, Broken, ImportError: see `load_weights`.
        OSError: it cannot be written.
    """
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise SettingError("DIR", str(target), "it exists, and nothing is overwritten", "name a folder that is new")
    import safetensors  # noqa: F401  before anything is written

    with opened(source, best=best) as found:
        if found.facts is None:
            raise NothingSaved(f"{source}: it holds safetensors already, and no checkpoint")
        try:
            model, reason = _model_of(found)
        except _Unknown as unknown:
            model, reason = None, str(unknown)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        facts = replace(found.facts, backend=SAFETENSORS, history=False, saved=now, files={})
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            staging.mkdir()
            export.write_model(staging, model, _read(found), facts, dtype)
            # Refused by the system where another process has written there meanwhile.
            os.rename(staging, target)
            durable.sync(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return Written(
            path=target,
            source=found.path,
            step=facts.step,
            loaded_by=None if model is None else type(model).__name__,
            reason=reason,
        )


def _read(found: OpenWeights) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors, name by name, read some at a time."""
    held: dict[str, Tensor] = {}
    size = 0
    for name, known in found.known.items():
        held[name] = torch.empty(known.shape, dtype=known.dtype)
        size += held[name].nbytes
        if size >= _READ_BYTES:
            found.tensors.load(held, alone=True)
            yield from held.items()
            held, size = {}, 0
    if held:
        found.tensors.load(held, alone=True)
        yield from held.items()


def _model_of(found: OpenWeights) -> tuple[Any, str]:
    """The model of transformers that the weights are of, on the meta device, and where it is named. Raises _Unknown."""
    reasons = []
    for name in (_named_by_settings, _named_by_export):
        try:
            model, origin = name(found)
            _compare(model, found)
        except _Unknown as unknown:
            reasons.append(str(unknown))
        else:
            return model, f"its class is that of {origin}"
    raise _Unknown("; ".join(reasons))


def _named_by_settings(found: OpenWeights) -> tuple[Any, str]:
    """By `model._target_` of the configuration in the checkpoint.

    Not by `instantiate`: a checkpoint may come from anyone, and must not choose what is called. Its configuration may
    name classes of transformers, and plain values.
    """
    section = found.settings.get("model")
    if not isinstance(section, Mapping) or _TARGET not in section:
        raise _Unknown("its configuration names no model._target_")
    target = str(section[_TARGET])
    origin = f"model._target_={target}"
    library, *names = target.split(".")
    if library != _LIBRARY or len(names) not in (1, 2) or names[1:] not in ([], ["from_config"], ["from_pretrained"]):
        raise _Unknown(f"{origin} is not of transformers, so nothing of it is called")
    transformers = _library()
    config = _config(transformers, section, names[1:] == ["from_pretrained"], origin)
    kind = getattr(transformers, names[0], None)
    if not isinstance(kind, type):
        raise _Unknown(f"this version of transformers has no {names[0]}")
    return _on_meta(transformers, kind, config, origin), origin


def _config(transformers: Any, section: Mapping[str, Any], pretrained: bool, origin: str) -> Any:
    """The configuration of transformers in the section `model`."""
    if pretrained:
        folder = Path(str(section.get("pretrained_model_name_or_path", "")))
        if not (folder / _CONFIG).is_file():
            raise _Unknown(f"{origin} starts from {folder}, which is no folder with a {_CONFIG}")
        return _config_in(transformers, folder)
    inner = section.get("config")
    if not isinstance(inner, Mapping) or not str(inner.get(_TARGET, "")).startswith(f"{_LIBRARY}."):
        raise _Unknown(f"{origin} has no model.config of transformers")
    kind = getattr(transformers, str(inner[_TARGET]).partition(".")[2], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PretrainedConfig)):
        raise _Unknown(f"{inner[_TARGET]} is no configuration of transformers")
    try:
        return kind(**{key: value for key, value in inner.items() if key != _TARGET})
    except Exception as error:  # as in a file
        raise _Unknown(f"{inner[_TARGET]}: {_first_line(error)}") from error


def _named_by_export(found: OpenWeights) -> tuple[Any, str]:
    """By the configuration that lies in an export: the source itself, or that at the end of the run."""
    folders = [folder for folder in (found.path, found.path.parent / EXPORT) if (folder / _CONFIG).is_file()]
    if not folders:
        raise _Unknown("there is no export of a model of transformers beside it")
    transformers = _library()
    config = _config_in(transformers, folders[0])
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    kind = getattr(transformers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type):
        raise _Unknown(f"{folders[0] / _CONFIG} names no architecture of transformers")
    return _on_meta(transformers, kind, config, str(folders[0])), str(folders[0] / _CONFIG)


def _config_in(transformers: Any, folder: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of a damaged file the library raises whatever its fields do
        raise _Unknown(f"{folder / _CONFIG} cannot be read: {_first_line(error)}") from error


def _on_meta(transformers: Any, kind: type[Any], config: Any, origin: str) -> Any:
    """The model of a class, or of an `Auto...` class, without values."""
    try:
        with torch.device("meta"):
            if issubclass(kind, transformers.PreTrainedModel):
                return kind(config)
            if kind.__name__.startswith("Auto") and hasattr(kind, "from_config"):
                return kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # it is built of values that may be anything, by code of the library
        raise _Unknown(f"{origin}: it cannot be built: {_first_line(error)}") from error
    raise _Unknown(f"{origin}: {kind.__name__} is no model of transformers")


def _compare(model: Any, found: OpenWeights) -> None:
    """Refuse a class whose names or shapes are not those of the weights."""
    mine = {name: tuple(item.shape) for name, item in model.state_dict().items()}
    theirs = {name.removeprefix(MODEL): item.shape for name, item in found.known.items()}
    differing = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if differing:
        raise _Unknown(f"the weights are not those of {type(model).__name__}: {differing[0]} differs")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _library() -> Any:
    try:
        return importlib.import_module(_LIBRARY)
    except ImportError as error:
        raise _Unknown("transformers is not installed") from error
