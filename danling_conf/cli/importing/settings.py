"""Translation of DanLing 0.4's settings into ours, with a note for each that means something else here or has gone.

Most settings have the same name and meaning. What is written here is the rest, as the release's code treats it; its
documentation says less. A setting that equals our default is left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from danling_conf.cli.importing.layout import read_stack, translate_deepspeed, translate_layout
from danling_conf.cli.importing.optimization import translate_optimizer, translate_scheduler
from danling_conf.cli.importing.translation import GONE, Translation, dtype_name, keep_section, mapping
from danling_conf.config.identity import flatten
from danling_conf.schema import RunnerConfig
from danling_conf.schema.checkpoint import LOADED_PARTS, CheckpointConfig, excluded
from danling_conf.schema.docs import describe
from danling_conf.topology.violation import ConfigRefused, Violation

_AT_ROOT = frozenset({
    "seed", "deterministic", "steps", "epochs", "score_split", "score_name", "workspace_root", "lineage", "experiment",
    "auto_resume", "resume", "pretrained", "log", "tensorboard", "max_grad_norm",
})  # fmt: skip
"""Settings at the root that mean the same."""
_SECTIONS = frozenset({"comm", "compile", "dataloader", "gc", "heartbeat", "profiling", "wandb"})
"""Sections whose settings mean the same, but for some that `GONE` names."""
_ASYNC_MODES = {"true": "async", "on": "async", "enable": "async", "enabled": "async",
                "false": "disabled", "off": "disabled", "disable": "disabled"}  # fmt: skip


def translate(content: Mapping[str, Any]) -> Translation:
    """Translate a nested configuration of DanLing. Raises ConfigRefused for what DanLing refuses too, or for an
    optimizer or scheduler that is not known here."""
    left, made = dict(content), Translation()
    if left.get("steps") is not None and left.get("epochs") is not None:
        rule = "steps and epochs exclude each other, there and here"
        raise ConfigRefused([Violation("steps", left["steps"], rule, "keep one of them in the file")])
    stack = read_stack(left, made)
    _training(left, made)
    translate_optimizer(left, made)
    translate_scheduler(left, made)
    _checkpoint(left, made)
    translate_layout(stack, left, made)
    translate_deepspeed(left, made)
    _dataloader(mapping(left.get("dataloader"), "dataloader"), made)
    if mapping(left.pop("ft", None), "ft").get("enabled"):
        made.gone("ft.enabled", True, "DanLing never starts a quorum: ft=torchft here is another training")
    for name in [name for name in left if name in _AT_ROOT]:
        made.keep(name, left.pop(name))
    for name in sorted(_SECTIONS & left.keys() - {"dataloader"}):
        keep_section(name, mapping(left.pop(name), name), made)
    left.pop("dataloader", None)
    _own(left, made)
    return made


def _training(left: dict[str, Any], made: Translation) -> None:
    precision = left.pop("precision", None)
    if precision is not None:
        name = dtype_name(precision)
        if name in ("fp16", "bf16", "fp32"):
            made.keep("precision", name)
        else:
            made.gone("precision", precision, "choose fp32, bf16 or fp16")
    accumulated = left.pop("accum_steps", None)
    if accumulated not in (None, 1):
        made.keep("accum_steps", accumulated)
        made.keep("accum_remainder", "step")  # there too, the rest of an epoch makes a step
    patience = left.pop("patience", None)
    if isinstance(patience, (int, float)) and math.isfinite(patience):
        if left.get("epochs") is None:
            made.gone("patience", patience, "without epochs it had no effect there; here it counts evaluations")
        else:
            made.keep("patience", int(patience) + 1)
            made.note("patience", patience, f"there, training went on until it was exceeded: here {int(patience) + 1}")
    if left.pop("skip_nonfinite_grad", False):
        made.keep("nonfinite", "skip")
        made.note("skip_nonfinite_grad", True, "it is nonfinite=skip here")
    log_interval = left.pop("log_interval", None)
    if isinstance(log_interval, int) and log_interval <= 0:
        made.gone("log_interval", log_interval, "lines cannot be switched off; about fifty are written in a run")
    elif log_interval is not None:
        made.keep("log_interval", log_interval)
    for name in ("name", "max_grad_value", "backend", "init_method", "train_splits", "evaluate_splits", "score", "fp8"):
        value = left.pop(name, None)
        if value not in (None, {}, []):
            made.gone(name, value, GONE[name])
    if left.get("auto_resume"):
        made.note("auto_resume", True, "it finds runs of this package only; resume=CHECKPOINT takes DanLing's weights")
    for name in ("resume", "pretrained"):
        if left.get(name) is not None:
            made.note(name, left[name], "of a DanLing checkpoint the model's weights are taken, and nothing else")


def _checkpoint(left: dict[str, Any], made: Translation) -> None:
    section = dict(mapping(left.pop("checkpoint", None), "checkpoint"))
    interval = section.pop("interval", None)
    length = left.get("steps") if left.get("epochs") is None else left.get("epochs")
    if isinstance(interval, int) and interval <= 0:
        text = "there it meant no save before the end; here the end and each better score are saved in any case"
        if isinstance(length, int):
            made.keep("checkpoint.interval", length)
        made.note("checkpoint.interval", interval, text)
    elif interval is not None:
        made.keep("checkpoint.interval", interval)
    elif section and isinstance(length, int):
        # Unset, here it means about ten times a run, without a history.
        made.keep("checkpoint.interval", 1 if left.get("epochs") is not None else max(math.ceil(length / 20), 1))
    mode = section.pop("async_mode", None)
    if mode is not None:
        name = str(mode).strip().lower().replace("-", "_")
        made.keep("checkpoint.async_mode", _ASYNC_MODES.get(name, name))
    if section.get("backend") is not None:
        section["backend"] = str(section["backend"]).strip().lower()
    if section.get("export_dtype") is not None:
        section["export_dtype"] = dtype_name(section["export_dtype"])
    skipped = section.pop("exclude_from_loading", None)
    if skipped:
        names = [skipped] if isinstance(skipped, str) else [str(item) for item in skipped]
        known = {name for name in names if _is_part(name)}
        for name in names:
            if name not in known:
                text = f"a checkpoint has no such part here; parts are {', '.join(LOADED_PARTS)}"
                made.gone("checkpoint.exclude_from_loading", name, text)
        if known:
            made.keep("checkpoint.exclude_from_loading", [name for name in names if name in known])
    if section or interval is not None:
        made.notes.append(
            "checkpoint: a checkpoint is a folder here, ckpt-s<8 digits> or ckpt-e<...>, with links latest and best; "
            "there it was latest.pth, best.pth and ckpt-s<12 digits>.pth, or folders with latest.pointer"
        )
    keep_section("checkpoint", section, made)


def _is_part(name: str) -> bool:
    (key,) = excluded(CheckpointConfig(exclude_from_loading=name))
    return key.partition(".")[0] in LOADED_PARTS


def _dataloader(section: Mapping[str, Any], made: Translation) -> None:
    for key, value in section.items():
        if isinstance(value, Mapping):
            for inner, found in value.items():
                _loader_setting(key, inner, found, made)
        else:
            _loader_setting(None, key, value, made)


def _loader_setting(split: str | None, key: str, value: Any, made: Translation) -> None:
    path = f"dataloader.{split}.{key}" if split else f"dataloader.{key}"
    reason = GONE.get(f"dataloader.{key}")
    if reason is not None:
        if value not in (None, 0, ""):
            made.gone(path, value, reason)
    elif value is None and key in ("shuffle", "drop_last"):
        made.settings[path] = False
        made.note(path, None, "there null was false; unset, here it depends on the split")
    elif value is not None and describe(RunnerConfig, f"dataloader.{key}") is None:
        made.gone(path, value, "loaders have no such setting here")
    elif value is not None:
        made.settings[path] = value


def _own(left: Mapping[str, Any], made: Translation) -> None:
    """The user's own settings: of the model, and the rest."""
    for key, value in left.items():
        target = "model" if key in ("network", "model") else "data" if key == "data" else f"data.{key}"
        if key in ("network", "model", "data") and not isinstance(value, Mapping):
            target = f"{target}.{key}"
        if key not in ("model", "data") or target != key:
            shown = "{...}" if isinstance(value, (Mapping, list)) else value
            made.note(key, shown, f"a setting of your own: config.{target} here")
        found = flatten({str(name): item for name, item in value.items()}) if isinstance(value, Mapping) else None
        if found is None:
            made.settings[target] = value
        else:
            made.settings |= {f"{target}.{name}": item for name, item in found.items()}
