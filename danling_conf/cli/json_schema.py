"""JSON Schema of a configuration: by it, editors complete, explain and check YAML while it is typed.

A file may hold any part of a configuration, so nothing is required, and wherever a value stands an interpolation may
stand as well. What needs the whole configuration (the rules) is left to `danling-conf check`.
"""

from __future__ import annotations

import inspect
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf

from danling_conf.cli.inspect_app import inspect_app
from danling_conf.config.check import compose_or_refuse
from danling_conf.config.hydra_adapter import Composer, ConfigSearch, composer
from danling_conf.config.typed import section_type
from danling_conf.groups.base import base_names
from danling_conf.groups.layout_names import NAME_PATTERN
from danling_conf.groups.presets import GROUPS
from danling_conf.groups.source import LAUNCHER_GROUP, LAUNCHERS, LAYOUTS
from danling_conf.launch.app import App
from danling_conf.schema import RunnerConfig
from danling_conf.schema.docs import field_docs
from danling_conf.schema.nearest import nearest
from danling_conf.schema.setting import Facts, facts_of
from danling_conf.schema.torch_options import OPTIMIZERS, SCHEDULERS, Entry
from danling_conf.topology.violation import ConfigRefused, Violation

Schema = dict[str, Any]

DIALECT = "http://json-schema.org/draft-07/schema#"
_OPEN: dict[str, Mapping[str, Entry]] = {"optimizer options": OPTIMIZERS, "scheduler options": SCHEDULERS}
"""Sections that take options of torch's classes, by their `open_to`."""
_INTERPOLATION = {"$ref": "#/definitions/interpolation"}
_PRIMITIVES: dict[Any, Schema] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    # OmegaConf takes `experiment: 12` as text. Not floats: `12e3` would become 12000.0, and the editor should say so.
    str: {"type": ["string", "integer"]},
    type(None): {"type": "null"},
}


def print_schema(script: str | None, section: str | None) -> str:
    """The schema as JSON.

    Args:
        script: an app, whose own settings, groups and files are then part of it.
        section: a section, for the files of its group (`conf/optim/mine.yaml`); None for the whole configuration.

    Raises:
        ConfigRefused: the app cannot be composed, or there is no such section.
    """
    if script is None:
        with composer(ConfigSearch(config_name="danling")) as composing:
            schema = json_schema(composing, section, own=False)
    else:
        schema = inspect_app(script, [], lambda app, search, _: _of_app(app, search, section))
    return json.dumps(schema, indent=1)


def _of_app(app: App, search: ConfigSearch, section: str | None) -> Schema:
    with composer(search) as composing:
        return json_schema(composing, section, own=True)


def json_schema(composing: Composer, section: str | None, *, own: bool) -> Schema:
    """The schema of what an app composes.

    Args:
        own: whether the composer knows all of the user's files, so that other choices are wrong.
    """
    composed = compose_or_refuse(composing, [])
    declared: Any = OmegaConf.get_type(composed)
    typed = isinstance(declared, type) and is_dataclass(declared)
    kind: type = declared if typed else RunnerConfig
    content: Any = OmegaConf.to_container(composed)
    names = {item.name for item in fields(kind)}
    undeclared = {key: value for key, value in content.items() if str(key) not in names and key != "hydra"}
    root = _section(kind, content)
    properties: Schema = root["properties"]
    properties |= {str(key): _example(value) for key, value in undeclared.items()}
    strict = own and not composed.hydra.searchpath
    groups = {group: _choices(group, composing, strict=strict) for group in composing.groups()}
    properties |= {"defaults": _defaults(groups, strict=strict), "hydra": _hydra()}
    # An app with keys of its own may bring more of them in any file.
    root["additionalProperties"] = bool(undeclared) or not typed
    if section is not None:
        root = _of_section(section, kind, root)
    return {
        "$schema": DIALECT,
        "title": f"danling-conf: {section or 'configuration'}",
        **root,
        "definitions": {
            "interpolation": {
                "type": "string",
                "pattern": r"\$\{.+\}|^\?\?\?$",
                "description": "An interpolation of OmegaConf, or `???` for a value that must be given.",
            },
            **{_definition(group): choices for group, choices in groups.items()},
        },
    }


def _of_section(section: str, kind: type, root: Schema) -> Schema:
    """The schema of a file in a section's group. Raises ConfigRefused."""
    names = [item.name for item in fields(kind) if section_type(item) is not None]
    if section not in names:
        near = nearest(section, names)
        fix = f"did you mean {near}?" if near else f"choose among {', '.join(names)}"
        raise ConfigRefused([Violation("--section", section, "there is no such section", fix)])
    properties: Schema = root["properties"]
    found: Schema = dict(properties[section]["anyOf"][0])
    return {**found, "properties": {**found["properties"], "defaults": properties["defaults"]}}


def _section(kind: type, content: Any = None) -> Schema:
    """The schema of a section.

    Args:
        content: what the app composes there; its keys are offered where a section is free-form.
    """
    hints, docs = get_type_hints(kind), field_docs(kind)
    content = content if isinstance(content, Mapping) else {}
    properties = {
        item.name: _setting(item, hints[item.name], docs.get(item.name, ""), content.get(item.name))
        for item in fields(kind)
        if not item.name.startswith("_")
    }
    open_to = getattr(kind, "open_to", None)
    others: Any = False
    if isinstance(open_to, type):
        others = _section(open_to)
    elif open_to is not None:
        others = True
        properties = _options(_OPEN.get(open_to, {}).values()) | properties
    return {
        "type": "object",
        "properties": properties,
        # Of hydra.utils.instantiate.
        "patternProperties": {"^_[a-z]+_$": {}},
        "additionalProperties": others,
    }


def _setting(item: Field[Any], hint: Any, doc: str, content: Any) -> Schema:
    facts, inner = facts_of(item), section_type(item)
    if inner is not None:
        doc = doc or inspect.cleandoc(inner.__doc__ or "")
        return {"anyOf": [_section(inner, content), _INTERPOLATION], **_described(doc)}
    found: Schema = {**_value(_plain(hint, facts, content)), **_described(doc)}
    if item.default is not MISSING and isinstance(item.default, (bool, int, float, str)):
        found["default"] = item.default
    return found


def _plain(hint: Any, facts: Facts, content: Any) -> Schema:
    """The values of a setting, interpolations apart."""
    if facts.shape is not None:
        return {"anyOf": [_section(facts.shape), {"type": "null"}]}
    if facts.kinds is not None:
        by_kind: dict[type, Schema] = {str: _PRIMITIVES[str], list: {"type": "array"}, dict: {"type": "object"}}
        return {"anyOf": [*(by_kind[kind] for kind in facts.kinds), {"type": "null"}]}
    if facts.choices is not None:
        names = [*facts.choices, *(facts.aliases or {})]
        values: list[Any] = [*names, *(int(name) for name in names if name.isdecimal())]
        return {"enum": [*values, *([None] if type(None) in get_args(hint) else [])]}
    found = _of_type(hint)
    if found.get("type") == "object" and isinstance(content, Mapping):
        found = {**found, **_example(content)}
    bounds = {"minimum": facts.at_least, "maximum": facts.at_most, "exclusiveMinimum": facts.above}
    return found | {name: bound for name, bound in bounds.items() if bound is not None}


def _of_type(hint: Any) -> Schema:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _PRIMITIVES:
        return dict(_PRIMITIVES[hint])
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of_type(kind) for kind in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _value(_of_type(arguments[0] if arguments else Any))}
    if origin is dict:
        return {"type": "object", "additionalProperties": _value(_of_type(arguments[1]))}
    if origin is Literal:
        return {"enum": list(arguments)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.name for member in hint]}
    if isinstance(hint, type) and is_dataclass(hint):
        return _section(hint)
    return {}


def _value(schema: Schema) -> Schema:
    """A schema, or an interpolation in its place."""
    return {"anyOf": [schema, _INTERPOLATION]} if schema else {}


def _example(value: Any) -> Schema:
    """A free-form key: what the app composes there is offered, and anything is accepted."""
    if not isinstance(value, Mapping):
        return {}
    return {"properties": {str(key): _example(inner) for key, inner in value.items()}}


def _options(entries: Iterable[Entry]) -> Schema:
    """The options of torch's classes: offered, and not judged, since the class may be the user's own."""
    owners: dict[str, list[str]] = {}
    for entry in entries:
        for name in entry.options:
            owners.setdefault(name, []).append(entry.name)
    return {name: {"description": f"An option of {', '.join(sorted(kinds))}."} for name, kinds in owners.items()}


def _described(doc: str) -> Schema:
    return {"description": " ".join(doc.split())} if doc else {}


def _definition(group: str) -> str:
    return f"choice of {group.replace('/', '.')}"


def _defaults(groups: Mapping[str, Schema], *, strict: bool) -> Schema:
    """A defaults list: configs by name, and a choice of each group in every way that Hydra spells it.

    Args:
        strict: whether there are no other groups. Only absolute names can be judged: others may be relative.
    """
    unknown = rf"^(override |optional )*/(?!({'|'.join(groups)})(@|$))"
    references = {group: {"$ref": f"#/definitions/{_definition(group).replace(' ', '%20')}"} for group in groups}
    spelled = {
        f"{prefix}{slash}{group}": choices
        for group, choices in references.items()
        for prefix in ("", "override ")
        for slash in ("", "/")
    }
    # With `optional`, or at a package of its own.
    others = {rf"^(override |optional )*/?{group}(@.+)?$": choices for group, choices in references.items()}
    named = [{"enum": ["_self_", *base_names()]}, {"type": "string"}]
    return {
        "type": "array",
        "description": "What this file is composed of, in order: `_self_` is its own content, and later entries win.",
        "items": {
            "anyOf": [
                *named,
                {
                    "type": "object",
                    "properties": spelled,
                    "patternProperties": others,
                    **({"propertyNames": {"not": {"pattern": unknown}}} if strict else {}),
                    # A file below a group names its groups relative to it, and a package with dots is a name too.
                    "additionalProperties": {"type": ["string", "null", "array"]},
                },
            ]
        },
    }


def _choices(group: str, composing: Composer, *, strict: bool) -> Schema:
    """The choices of a group.

    Args:
        strict: whether the composer knows all of them.
    """
    presets = GROUPS.get(group, {})
    documented = {name: preset.doc for name, preset in presets.items()}
    if group == LAUNCHER_GROUP:
        documented = {name: inspect.cleandoc(kind.__doc__ or "") for name, kind in LAUNCHERS.items()}
    names = dict.fromkeys([*documented, *composing.options(group)])
    found: list[Schema] = [{"const": name, **_described(documented.get(name, ""))} for name in names]
    if group == LAYOUTS:
        found.append({"type": "string", "pattern": NAME_PATTERN})
    if not strict:
        found.append({"type": "string"})
    one = {"anyOf": [*found, _INTERPOLATION]}
    return {"anyOf": [*found, _INTERPOLATION, {"type": "null"}, {"type": "array", "items": one}]}


def _hydra() -> Schema:
    """Hydra's own settings: the launchers' are known, the rest is Hydra's to judge."""
    launcher: Schema = {}
    for kind in LAUNCHERS.values():
        launcher |= _section(kind)["properties"]
    return {"type": "object", "properties": {"launcher": {"type": "object", "properties": launcher}}}
