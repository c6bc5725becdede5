"""Rules of a launcher's settings. They end up in a script for `sbatch`, which reports none of these faults before the
job has waited in the queue, and some never."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from danling_conf.schema.launcher import LauncherConfig
from danling_conf.schema.printable import unprintable
from danling_conf.topology.violation import Violation

_SECTION = "hydra.launcher"
_MEMORY = re.compile(r"[0-9]+[KMGT]?B?", re.IGNORECASE)
_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_SHELL = ("setup",)
"""Settings that are lines of a shell script."""


def launcher_faults(launcher: LauncherConfig) -> Iterator[Violation]:
    """What `sbatch`, `srun` or a shell would misread."""
    for name, value in vars(launcher).items():
        if name.startswith("_"):
            continue
        yield from _text_faults(f"{_SECTION}.{name}", value, "\n\t" if name in _SHELL else "")
        if isinstance(value, float) and not math.isfinite(value):
            yield Violation(f"{_SECTION}.{name}", value, "it must be a finite number", "write the number of GB")
        if value == "" and name != "comment":
            yield Violation(f"{_SECTION}.{name}", "''", "an empty text names nothing", "leave it out")
    for name in ("mem_per_gpu", "mem_per_cpu"):
        value = getattr(launcher, name, None)
        if value and not _MEMORY.fullmatch(value):
            rule = "it must be a whole number, and K, M, G or T"
            yield Violation(f"{_SECTION}.{name}", value, rule, f"write {_SECTION}.{name}=80G, for instance")
    for name, value in (getattr(launcher, "additional_parameters", None) or {}).items():
        path = f"{_SECTION}.additional_parameters.{name}"
        if not _OPTION.fullmatch(str(name)):
            yield Violation(path, value, "it is not the long name of an option of sbatch", "write {mail-type: END}")
        elif not isinstance(value, (str, int, float)) or (isinstance(value, float) and not math.isfinite(value)):
            yield Violation(path, value, "an option of sbatch takes one value", "write a text, a number, true or false")


def folder_faults(folder: Path) -> Iterator[Violation]:
    """A folder whose path `sbatch` would misread where it names the output of jobs."""
    mark = "%" if "%" in str(folder) else unprintable(str(folder))
    if mark:
        rule = f"Slurm writes the output of jobs below it, and reads {mark} in a path as something else"
        yield Violation(
            "workspace_root", str(folder), rule, "choose a directory, a lineage and an experiment without it"
        )


def _text_faults(path: str, value: Any, allowed: str) -> Iterator[Violation]:
    """Characters that would end a line of the script: what follows them would be run as a command."""
    if isinstance(value, str):
        if mark := unprintable(value, allowed):
            yield Violation(path, value, f"{mark} cannot be in a line of a script", "leave it out")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _text_faults(f"{path}.{name}", str(name), allowed)
            yield from _text_faults(f"{path}.{name}", inner, allowed)
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            yield from _text_faults(f"{path}[{index}]", inner, allowed)
