"""`danling-conf import`: reads a configuration of DanLing 0.4 into one of ours, and says what is different."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from danling_conf.cli.importing.settings import translate
from danling_conf.cli.importing.translation import Translation
from danling_conf.config.resolve import merge_leaves
from danling_conf.config.typed import check_declarations
from danling_conf.groups.base import BASE_NAME
from danling_conf.schema import RunnerConfig
from danling_conf.schema.files import Damaged, read_regular
from danling_conf.schema.open_sections import open_sections
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation


def import_file(source: str, output: str | None) -> int:
    """Translate a file, and write the result to `output`, or else to standard output.

    Raises:
        ConfigRefused: the file cannot be read, holds what has no meaning here, or `output` exists.
    """
    path = Path(source).expanduser()
    made = translate(_nested(_read(path)))
    _check(made)
    text = _as_yaml(made, path.name)
    if output is None:
        sys.stdout.write(text)
        print("\n".join(made.notes), file=sys.stderr)
        return 0
    target = Path(output).expanduser()
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        rule = "it exists, and nothing is overwritten"
        raise ConfigRefused([Violation("--output", output, rule, "name another file")]) from None
    except OSError as error:
        raise ConfigRefused(
            [Violation("--output", output, f"it cannot be written: {error.strerror}", "name another file")]
        ) from error
    print(f"{target}: written; check it with: danling-conf check SCRIPT --config-name {target.stem}")
    print("\n".join(f"  {line}" for line in made.notes))
    return 0


def _read(path: Path) -> Mapping[str, Any]:
    def refused(rule: str) -> ConfigRefused:
        return ConfigRefused([Violation("FILE", str(path), rule, "name a YAML or JSON file that DanLing reads")])

    try:
        text = read_regular(path).decode()
        found: Any = json.loads(text) if path.suffix == ".json" else _yaml(text)
    except FileNotFoundError:
        raise refused("there is no such file") from None
    except Damaged as damage:
        raise refused(damage.reason) from damage
    except UnicodeDecodeError as error:
        raise refused(f"it is not UTF-8: byte {error.start}") from error
    except (YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise refused(f"it cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise refused("it holds no mapping of settings")
    return found


def _yaml(text: str) -> Any:
    """OmegaConf's YAML, in which 1e-3 is a number. Interpolations stay as they are written."""
    created = OmegaConf.create(text)
    return OmegaConf.to_container(created, resolve=False)


def _nested(content: Mapping[Any, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings, at any depth. Raises ConfigRefused where a key is a value and a section too."""
    nested: dict[str, Any] = {}
    for key, value in content.items():
        *owners, last = str(key).split(".")
        place = nested
        for owner in owners:
            place = place.setdefault(owner, {})
            if not isinstance(place, dict):
                raise _twice(str(key))
        value = _nested(value) if isinstance(value, Mapping) else value
        if last not in place:
            place[last] = value
        elif isinstance(place[last], dict) and isinstance(value, dict):
            place[last] = _merged(place[last], value, str(key))
        else:
            raise _twice(str(key))
    return nested


def _merged(first: dict[str, Any], second: dict[str, Any], path: str) -> dict[str, Any]:
    merged = dict(first)
    for key, value in second.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(merged[key], dict) and isinstance(value, dict):
            merged[key] = _merged(merged[key], value, f"{path}.{key}")
        else:
            raise _twice(f"{path}.{key}")
    return merged


def _twice(path: str) -> ConfigRefused:
    return ConfigRefused([Violation(path, ABSENT, "the file has it twice", "keep one of them")])


def _check(made: Translation) -> None:
    """Refuse values of another type than their settings have. What they mean together is for `check` to say, which
    knows the machine."""
    node = OmegaConf.structured(RunnerConfig)
    open_sections(node)
    faults = [*merge_leaves(node, _nested(made.settings), RunnerConfig), *check_declarations(node, RunnerConfig)]
    if faults:
        raise ConfigRefused(faults)


def _as_yaml(made: Translation, name: str) -> str:
    lines = [f"# Imported from DanLing's {name}. What means something else here, or has gone:"]
    lines += [f"#   {note}" for note in made.notes]
    choices = [{f"override {group}": choice} for group, choice in sorted(made.presets.items())]
    tree = {"defaults": [BASE_NAME, *choices, "_self_"], **_nested(made.settings)}
    return "\n".join(lines) + "\n" + OmegaConf.to_yaml(OmegaConf.create(tree))
