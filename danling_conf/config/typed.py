"""Check of keys and values against their declarations. It runs before the rules of `topology`, which need valid
types."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import MISSING, Field, fields, is_dataclass
from decimal import Decimal
from keyword import iskeyword
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, ValueNode, open_dict
from omegaconf.errors import OmegaConfBaseException

from danling_conf.schema import Facts, facts_of
from danling_conf.schema.files import DEEPEST, LARGEST_INTEGER
from danling_conf.schema.nearest import nearest
from danling_conf.schema.setting import fraction_in
from danling_conf.schema.typed_node import typed_node_of
from danling_conf.topology.violation import ABSENT, Violation, show

NO_SUCH_SETTING = "there is no such setting"
_LARGEST = 1 << 63
"""The first integer that a seed, a step or a size cannot be: torch counts in 64 bits, with a sign."""
_OUTER_LEVELS = 10
"""Levels that a record has around a mapping of the user's own."""


def check_declarations(
    node: DictConfig, kind: type, prefix: str = "", *, only: Collection[str] | None = None
) -> list[Violation]:
    """Check every key and value below `node` against the dataclass `kind`, and make `node` canonical.

    Aliases become their canonical spelling. A setting that breaks its declaration is reset to its default, so that the
    rules can check the rest.

    Args:
        only: keys of `node` to check; all of them when None.
    """
    return list(_check_section(node, kind, prefix, only))


def unknown_key(kind: type, path: str, root: type | None = None) -> Violation:
    """The violation of an undeclared key, with the nearest declared one as its fix."""
    prefix, _, key = path.rpartition(".")
    siblings = [item.name for item in fields(kind) if not item.name.startswith("_")]
    near = nearest(key, siblings, cutoff=0.6)
    where = f"{prefix}." if prefix else ""
    if near:
        fix = f"did you mean {where}{near}?"
    else:
        paths = setting_paths(root) if root else setting_paths(kind, where)
        elsewhere = [known for known in paths if known.rpartition(".")[2] == key.casefold()]
        if elsewhere:
            fix = f"did you mean {' or '.join(elsewhere)}?"
        elif prefix:
            fix = f"{prefix} has {', '.join(siblings)}"
        else:
            of_root = [item.name for item in fields(root or kind) if not item.name.startswith("_")]
            close = nearest(path, [*of_root, *setting_paths(root or kind)], cutoff=0.6)
            own = f"to add a key of your own, write +{path}=..., or declare it in a file"
            fix = f"did you mean {close}?" if close else own
    return Violation(path, ABSENT, NO_SUCH_SETTING, fix)


def setting_paths(kind: type, prefix: str = "") -> list[str]:
    """Dotted paths of all settings below a dataclass."""
    paths: list[str] = []
    for item in fields(kind):
        if item.name.startswith("_"):
            continue
        inner = section_type(item)
        shape = facts_of(item).shape
        if inner is None:
            paths.append(prefix + item.name)
        for below in (inner, shape):
            if below is not None:
                paths += setting_paths(below, f"{prefix}{item.name}.")
    return paths


def section_type(item: Field[Any]) -> type | None:
    """The dataclass of a field that is a section, else None."""
    factory = item.default_factory
    return factory if factory is not MISSING and isinstance(factory, type) and is_dataclass(factory) else None


def _check_section(
    node: DictConfig, kind: type, prefix: str, only: Collection[str] | None = None
) -> Iterator[Violation]:
    declared = {item.name: item for item in fields(kind)}
    open_to = getattr(kind, "open_to", None)
    for name in declared.keys() - set(node.keys()):
        if not name.startswith("_"):
            fix = f"leave it out, or write {prefix}{name}=null" if declared[name].default is None else "leave it out"
            yield Violation(f"~{prefix}{name}", ABSENT, "a setting that a class declares cannot be removed", fix)
            with open_dict(node):
                _reset(node, declared[name])
    for key in list(node.keys()):
        if only is not None and key not in only:
            continue
        path = f"{prefix}{key!s}"
        # `_get_node` and `_is_` are private, and a third of the time of the public access to each of 170 settings.
        child: Any = node._get_node(key, validate_access=False)
        refers = _may_refer(child) and child._is_interpolation()
        broken = _broken_interpolation(node, key, path) if refers else None
        if broken is not None:
            yield broken
            _reset(node, declared[str(key)]) if key in declared else _remove(node, key)
        elif key in declared and str(key).startswith("_") and "read_by" in vars(kind):
            yield from _check_door(node, declared[key], path)
        elif key in declared:
            yield from _check_setting(node, child, declared[key], path, refers)
        elif open_to is not None and not _can_be_name(str(key)):
            yield Violation(
                path, ABSENT, "a name here needs letters, digits and underscores, and no Python keyword", "rename it"
            )
            _remove(node, key)
        elif isinstance(open_to, str) and not prefix:
            yield from _check_own(node, str(key), kind)
        elif isinstance(open_to, type):
            if OmegaConf.is_dict(node[key]):
                yield from _check_shape(node, key, open_to, path, sparse=True)
            else:
                yield unknown_key(kind, path)
                _remove(node, key)
        elif open_to is None:
            yield unknown_key(kind, path)
            _remove(node, key)


def _check_own(node: DictConfig, key: str, kind: type) -> Iterator[Violation]:
    """Check a key of the app itself, at the root: it must not be a misspelt one of ours."""
    broken = _broken_value(node, key, key)
    if broken is not None:
        yield broken
        _remove(node, key)
        return
    value = node[key]
    meant = _misspelt(key, value, kind)
    if meant is not None:
        yield Violation(key, ABSENT, NO_SUCH_SETTING, f"did you mean {meant}? A key of your own needs another name")
        _remove(node, key)
    elif OmegaConf.is_dict(value):
        yield from _check_free_form(value, key)


def _misspelt(key: str, value: Any, kind: type) -> str | None:
    """The setting at the root that an undeclared key is meant as; None for a key of the app's own.

    Apps have their own `models/` and `logger/` beside our `model` and `log`: a mapping is a misspelt section only if
    all of its keys are settings of that section.
    """
    known = {item.name: item for item in fields(kind) if not item.name.startswith("_")}
    near = nearest(key, known, cutoff=0.8)
    if near is None or abs(len(near) - len(key)) > 1:
        return None
    section = section_type(known[near])
    if OmegaConf.is_dict(value):
        inside = {item.name for item in fields(section)} if section is not None else set()
        return near if value and set(value) <= inside else None
    return None if OmegaConf.is_list(value) and section is not None else near


def _check_door(node: DictConfig, item: Field[Any], path: str) -> Iterator[Violation]:
    """`_target_` and `_recursive_` of our sections are for `instantiate`; a run builds them itself."""
    if node[item.name] != item.default:
        rule = f"a run builds this section itself, as {show(item.default)}"
        fix = "leave it out; model and callbacks take a _target_ of your own"
        yield Violation(path, node[item.name], rule, fix)
        _reset(node, item)


def _may_refer(child: Any) -> bool:
    """Whether a node may be an interpolation or `???`, which only text can be. Most are numbers and flags."""
    return not isinstance(child, ValueNode) or isinstance(child._value(), str)


def _can_be_name(key: str) -> bool:
    """Whether an open key can be a field of a configuration object; a leading underscore is reserved for Hydra."""
    return key.isidentifier() and not iskeyword(key) and not key.startswith("_")


def _check_setting(node: DictConfig, child: Any, item: Field[Any], path: str, refers: bool) -> Iterator[Violation]:
    facts = facts_of(item)
    if OmegaConf.is_missing(node, item.name) if refers else _may_refer(child) and child._is_missing():
        yield Violation(path, ABSENT, "it must be given", f"set {path}=...")
        _fill(node, item)
        return
    value = node[item.name] if refers else None if child._is_none() else child
    if isinstance(value, ValueNode):
        value = value._value()
    inner = section_type(item)
    if inner is None and isinstance(value, DictConfig | ListConfig):
        broken = list(_check_free_form(value, path))
        if broken:
            yield from broken
            _reset(node, item)
            return
    if inner is not None:
        if value is None:
            yield Violation(path, None, "a section cannot be null", "leave it out")
            _reset(node, item)
        else:
            section: Any = value
            yield from _check_section(section, OmegaConf.get_type(section) or inner, f"{path}.")
    elif value is None:
        return
    elif facts.shape is not None:
        yield from _check_shape(node, item.name, facts.shape, path)
    elif facts.kinds is None and isinstance(value, DictConfig):
        return
    else:
        fault = value_fault(facts, value)
        if fault is not None:
            yield Violation(path, value, *fault)
            _reset(node, item)
        elif facts.aliases and str(value) in facts.aliases:
            node[item.name] = facts.aliases[str(value)]


def _check_free_form(node: DictConfig | ListConfig, prefix: str, depth: int = 1) -> Iterator[Violation]:
    """Check a mapping of the user's own: by its dataclass where it has one, such as one in Hydra's ConfigStore; else
    its interpolations, and that a record can hold it."""
    kind = OmegaConf.get_type(node)
    if isinstance(node, DictConfig) and is_dataclass(kind):
        yield from _check_section(node, kind, f"{prefix}.")
        return
    of_list = isinstance(node, ListConfig)
    for key in reversed(range(len(node))) if of_list else list(node.keys()):
        path = f"{prefix}[{key}]" if of_list else f"{prefix}.{key}"
        broken = _broken_value(node, key, path) or _unstorable(node[key], path, depth)
        if broken is not None:
            yield broken
            _remove(node, key)
        elif OmegaConf.is_config(node[key]):
            yield from _check_free_form(node[key], path, depth + 1)


def _broken_value(node: DictConfig | ListConfig, key: Any, path: str) -> Violation | None:
    """The fault of a value that cannot be read: it is missing, or its interpolation does not resolve."""
    if OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
        return Violation(path, ABSENT, "it must be given", f"set {path}=...")
    return _broken_interpolation(node, key, path)


def _unstorable(value: Any, path: str, depth: int) -> Violation | None:
    """The fault of a value that its run's records could not hold, or could not be read with."""
    if isinstance(value, int) and abs(value) >= LARGEST_INTEGER:
        return Violation(path, value, "an integer has at most 64 bits", "write it as a text, or as a float")
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return Violation(path, value, "it is not UTF-8", "write it in UTF-8")
    if depth >= DEEPEST - _OUTER_LEVELS:
        return Violation(path, ABSENT, f"it is nested more than {depth} levels deep", "make it flatter")
    return None


def _broken_interpolation(node: DictConfig | ListConfig, key: Any, path: str) -> Violation | None:
    if not OmegaConf.is_interpolation(node, key):
        return None
    try:
        node[key]
    except (OmegaConfBaseException, RecursionError) as error:
        reason = (str(error).strip() or "Recursive").splitlines()[0]
        if isinstance(error, RecursionError) or "Recursive" in reason:
            reason = "it comes back to itself through other settings"
        return Violation(path, _unresolved(node, key), reason, "fix the interpolation")
    return None


def _unresolved(node: DictConfig | ListConfig, key: Any) -> Any:
    raw: Any = OmegaConf.to_container(node, resolve=False)
    return raw[key]


def value_fault(facts: Facts, value: Any) -> tuple[str, str] | None:
    """Rule and fix for a value that its setting does not allow; None for an allowed value."""
    return _choice_fault(facts, value) or _kind_fault(facts, value) or _range_fault(facts, value)


def _choice_fault(facts: Facts, value: Any) -> tuple[str, str] | None:
    allowed = [*(facts.choices or ()), *(facts.aliases or {})]
    if facts.choices is None or str(value) in allowed:
        return None
    named = list(facts.choices)
    if facts.fraction is not None:
        if fraction_in(str(value), facts.fraction) is not None:
            return None
        named.append(f"{facts.fraction}:X with X from 0 to 1")
    near = nearest(str(value), allowed)
    return f"it must be one of {', '.join(named)}", f"did you mean {near}?" if near else "choose one of them"


def _kind_fault(facts: Facts, value: Any) -> tuple[str, str] | None:
    if facts.kinds is None or isinstance(_plain(value), facts.kinds):
        return None
    names = " or a ".join(_KINDS[kind] for kind in facts.kinds)
    return f"it must be a {names}", "set keys below it" if dict in facts.kinds else "write one name, or [one,another]"


def _range_fault(facts: Facts, value: Any) -> tuple[str, str] | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # Not `<` and so on: NaN is neither less nor greater than anything, and has to be refused.
    if facts.at_least is not None and not value >= facts.at_least:
        return f"it must be at least {show(facts.at_least)}", f"choose {show(facts.at_least)} or more"
    if facts.at_most is not None and not value <= facts.at_most:
        return f"it must be at most {show(facts.at_most)}", f"choose {show(facts.at_most)} or less"
    if facts.above is not None and not value > facts.above:
        return f"it must be greater than {show(facts.above)}", "choose a larger value"
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "an integer has at most 64 bits", f"choose {_LARGEST - 1} or less"
    return None


def _check_shape(node: DictConfig, key: Any, shape: type, path: str, sparse: bool = False) -> Iterator[Violation]:
    """Check a mapping in an open place of the schema leaf by leaf, and replace it with its dataclass.

    Args:
        sparse: replace it with a mapping of only the given keys instead.
    """
    given = node[key]
    if not OmegaConf.is_dict(given):
        yield Violation(path, given, "it must be null or a mapping", f"write {path}.{fields(shape)[0].name}=...")
        node[key] = None
        return
    typed = typed_node_of(shape)
    known = {item.name for item in fields(shape)}
    for name, value in _plain(given).items():
        inner = f"{path}.{name}"
        if name not in known:
            yield unknown_key(shape, inner)
            continue
        try:
            typed[name] = value
        except OmegaConfBaseException as error:
            yield wrong_type(inner, value, error)
    yield from _check_section(typed, shape, f"{path}.")
    # A split overrides only what the user wrote: the defaults of other keys must not override the section's values.
    node[key] = {name: typed[name] for name in _plain(given) if name in known} if sparse else typed


def wrong_type(path: str, value: Any, error: Exception) -> Violation:
    """The violation of a value that OmegaConf rejected."""
    reason = str(error).strip().splitlines()[0].rstrip(".")
    for message, rule, fix in _REFUSALS:
        if message in reason:
            if isinstance(value, float) and value.is_integer() and "Integer" in message:
                fix = f"write {int(Decimal(repr(value)))}"  # int(1e23) is not 10**23
            if isinstance(value, list) and "ListConfig" in message:
                rule, fix = "it must be a list of lists", "write [[one],[another]]"
            return Violation(path, value, rule, fix.replace("PATH", path))
    hint = re.search(r"type hint '(.+)'", reason)
    names = [shown for name, shown in _PRIMITIVES.items() if hint and re.search(rf"\b{name}\b", hint[1])]
    if names:
        return Violation(path, value, f"it must be {', or '.join(names)}", "write one of these")
    return Violation(path, value, reason, "write a value of that type")


_KINDS: dict[type, str] = {str: "string", list: "list of strings", dict: "mapping"}

_REFUSALS = (
    ("converted to Integer", "it must be a whole number", "write a whole number, such as 8"),
    ("converted to Float", "it must be a number", "write a number, such as 0.001"),
    ("not a valid bool", "it must be true or false", "write true or false"),
    ("to string", "it must be one string", "write a string"),
    ("is not Optional", "it cannot be null", "leave it out for the default"),
    ("is not a ListConfig", "it must be a list", "write [one,another]"),
    ("to Dict[", "it must be a mapping", "set what is below it: PATH.KEY=VALUE"),
    ("is not a subclass of", "it must be a section", "set what is below it: PATH.KEY=VALUE"),
)
"""A part of OmegaConf's message that versions 2.3 and 2.4 share, the rule, and the fix.

OmegaConf's errors carry no data. A message that is not listed is shown as it is.
"""

_PRIMITIVES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "Optional": "null",
}


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _remove(node: DictConfig | ListConfig, key: Any) -> None:
    with open_dict(node):
        del node[key]  # `pop` would resolve it


def _fill(node: DictConfig, item: Field[Any]) -> None:
    """Set a missing setting to any value that its type allows, so that the rest can be checked."""
    values: tuple[Any, ...] = (item.default, None, 1, "", True, [], {})
    for value in values:
        with suppress(OmegaConfBaseException, ValueError):
            node[item.name] = value
            if not OmegaConf.is_missing(node, item.name):
                return


def _reset(node: DictConfig, item: Field[Any]) -> None:
    if item.default is not MISSING:
        node[item.name] = item.default
    elif item.default_factory is not MISSING:
        node[item.name] = item.default_factory()
