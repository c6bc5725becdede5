"""Frozen configuration of an attempt: written once by the process that composed it, and read by every rank.

Ranks do not compose again: a file edited between the starts of two ranks would give them different configurations.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from danling_conf.config.hydra_job import take_part
from danling_conf.config.identity import canonical, difference_from_defaults, job_id, plain
from danling_conf.config.readonly import freeze
from danling_conf.config.resolve import as_yaml, inspect, own_sections, save, typed_node
from danling_conf.records.code import code_identity
from danling_conf.records.reading import read_fields
from danling_conf.records.run_directory import Attempt, attempt_order, attempts_in
from danling_conf.schema import RunnerConfig, declared_class
from danling_conf.schema.files import DIFF, DIFFERENCE, FROZEN, write_whole
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context


def freeze_attempt(
    config: RunnerConfig, attempt: Attempt, script: Path, hydra: Mapping[str, Any] | None = None
) -> None:
    """Write the configuration of an attempt in three forms, with its code and its command line.

    Args:
        hydra: Hydra's own settings (`hydra_job.hydra_settings`), for ranks that compose nothing themselves.
    """
    folder = attempt.directory
    code = code_identity(script.parent)
    save(config, folder / "config.yaml")
    write_whole(folder / "canonical.json", canonical(config) + "\n")
    write_whole(folder / DIFFERENCE, as_yaml(difference_from_defaults(config)))
    if code.diff:
        write_whole(folder / DIFF, code.diff)
    # Last: once this file exists, all others of the attempt do.
    write_whole(folder / FROZEN, frozen_content(config, attempt, code.code_id, hydra))


def frozen_content(config: RunnerConfig, attempt: Attempt, code_id: str, hydra: Mapping[str, Any] | None = None) -> str:
    """The frozen configuration as JSON: all that a rank needs to join."""
    content = {**frozen_job(config, hydra), "code_id": code_id, "attempt": attempt.to_json()}
    return json.dumps(content, indent=1) + "\n"


def frozen_job(config: RunnerConfig, hydra: Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of a frozen configuration that all attempts share."""
    kind = declared_class(config)
    return {
        "job_id": job_id(config),
        "class": _name_of(kind),
        "sections": {path: _name_of(section) for path, section in own_sections(config).items()},
        "config": plain(config),
        "hydra": hydra,
    }


def thaw(content: str, kind: type[RunnerConfig] | None = None) -> tuple[Any, Attempt]:
    """The configuration and the attempt of `frozen_content`.

    Raises:
        ValueError: the configuration read here differs from the one that was frozen.
    """
    frozen = json.loads(content)
    return thaw_job(frozen, kind), Attempt.from_json(frozen["attempt"])


def thaw_job(frozen: Mapping[str, Any], kind: type[RunnerConfig] | None = None) -> Any:
    """The configuration of `frozen_job`. Raises ValueError as `thaw`."""
    kind = kind or _class_of(*frozen["class"])
    # The rules were applied where the command ran. This node may have other devices, so an empty machine stands in.
    sections = {path: _class_of(*name) for path, name in frozen.get("sections", {}).items()}
    node = typed_node(frozen["config"], kind, sections)
    config, _ = inspect(node, kind=kind, context=Context(machine=Machine()), spent=True)
    config = freeze(config)
    # Catches a node with another version of the app's class, whose new defaults would train something else.
    if job_id(config) != frozen["job_id"]:
        raise ValueError(
            f"the frozen configuration has job id {frozen['job_id']}, and this process reads {job_id(config)} from it: "
            f"its {kind.__name__} differs from that of the process that wrote it"
        )
    return config


def take_part_in(content: str) -> DictConfig | None:
    """Enter the Hydra job of `frozen_content`. Returns Hydra's own node; None where the attempt has no Hydra job."""
    frozen = json.loads(content)
    return None if frozen["hydra"] is None else take_part(frozen["hydra"], frozen["config"])


def earlier_code(attempt: Attempt) -> str | None:
    """The code identity of the attempt before this one; None for the first."""
    mine = attempt_order(attempt.directory.name)
    earlier = [folder for folder in attempts_in(attempt.run_directory) if attempt_order(folder.name) < mine]
    known = [folder for folder in earlier if (folder / FROZEN).is_file()]
    return read_fields(known[-1] / FROZEN).text("code_id") if known else None


def code_of(attempt: Attempt) -> str | None:
    """The code identity of an attempt; None where nothing was frozen."""
    return read_fields(attempt.directory / FROZEN).text("code_id")


def _name_of(kind: type) -> list[str]:
    return [kind.__module__, kind.__qualname__]


def _class_of(module: str, qualname: str) -> Any:
    # `__main__` is in sys.modules under that name only; importing it by name would run the script a second time.
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
