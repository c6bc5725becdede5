"""Nodes of OmegaConf as it makes them itself, in a fraction of the time: typed ones of a class, and plain ones.

OmegaConf asks about each of 170 settings what it could be, copies each node of a section into the section above it, and
so takes as long as the rest of composing. Most settings are plain numbers, flags and texts, whose nodes are made here.
`_content` and `_metadata` are private in OmegaConf; both are the form in which it pickles its nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import (
    AnyNode,
    BooleanNode,
    DictConfig,
    FloatNode,
    IntegerNode,
    ListConfig,
    Node,
    OmegaConf,
    StringNode,
    UnionNode,
)
from omegaconf.errors import OmegaConfBaseException

_NODES: dict[Any, type[Any]] = {bool: BooleanNode, int: IntegerNode, float: FloatNode, str: StringNode}


def typed_node_of(kind: type) -> DictConfig:
    """The same as `OmegaConf.structured(kind)`: a typed node with the defaults of a dataclass.

    Raises OmegaConf's errors for a class that it cannot express.
    """
    try:
        return _node_of(kind)
    except (_LeftToOmegaConf, OmegaConfBaseException):  # whose message names the class
        return _by_omegaconf(kind)


def plain_node_of(value: Any, key: Any = None) -> Any:
    """The same as `OmegaConf.create(value)` for mappings, lists and plain values of ours, whose types need no proof."""
    if not isinstance(value, (Mapping, list)):
        return AnyNode(value, key=key)
    node = DictConfig({}, key=key) if isinstance(value, Mapping) else ListConfig([], key=key)
    content = node.__dict__["_content"]
    for name, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        child = plain_node_of(inner, name)
        child._set_parent(node)
        if isinstance(value, Mapping):
            content[name] = child
        else:
            content.append(child)
    return node


class _LeftToOmegaConf(Exception):
    """A class that is unusual as a whole."""


def _by_omegaconf(kind: type) -> DictConfig:
    node = OmegaConf.structured(kind)
    assert isinstance(node, DictConfig)
    return node


def _node_of(kind: Any, key: str | None = None, hint: Any = Any, optional: bool = True) -> DictConfig:
    """The node of a class, or of a section below `key` that is declared as `hint`."""
    if kind.__dataclass_params__.frozen or issubclass(kind, dict):
        raise _LeftToOmegaConf
    node = DictConfig({}, key=key, is_optional=optional)
    content = node.__dict__["_content"]
    hints = get_type_hints(kind)
    others: DictConfig | None = None
    for item in fields(kind):
        child = _simple(item, hints[item.name])
        if child is None:
            others = others if others is not None else _by_omegaconf(kind)
            child = others.__dict__["_content"][item.name]
        child._set_parent(node)
        content[item.name] = child
    node._metadata.ref_type, node._metadata.object_type = hint, kind
    return node


def _simple(item: Field[Any], hint: Any) -> Node | None:
    """The node of a setting of a usual type, or of a section; None for any other."""
    if "omegaconf_ignore" in item.metadata:
        raise _LeftToOmegaConf
    declared, optional = _without_none(hint)
    factory: Any = item.default_factory
    if factory is declared and is_dataclass(declared):
        # OmegaConf makes an object of the section, which may set its own fields.
        made_plainly = factory.__dataclass_params__.init and not hasattr(factory, "__post_init__")
        return _node_of(declared, item.name, declared, optional) if made_plainly else None
    value = factory() if factory is not MISSING else "???" if item.default is MISSING else item.default
    node: Node | None = None
    if declared in _NODES:
        node = _NODES[declared](value, key=item.name, is_optional=optional)
    elif declared is Any and value is None:
        node = AnyNode(None, key=item.name)
    elif value is None and get_origin(declared) is Union and set(get_args(declared)) <= set(_NODES):
        node = UnionNode(None, declared, key=item.name, is_optional=optional)
    elif not value and get_origin(declared) is list:
        (element,) = get_args(declared)
        node = ListConfig(value, key=item.name, ref_type=declared, element_type=element, is_optional=optional)
    elif not value and get_origin(declared) is dict:
        name, element = get_args(declared)
        node = DictConfig(
            value, key=item.name, ref_type=declared, key_type=name, element_type=element, is_optional=optional
        )
    return node


def _without_none(hint: Any) -> tuple[Any, bool]:
    """A type without the None of its `Optional`, and whether it had one."""
    if get_origin(hint) is not Union:
        return hint, hint is Any
    kinds = tuple(kind for kind in get_args(hint) if kind is not type(None))
    return (Union[kinds], True) if len(kinds) < len(get_args(hint)) else (hint, False)
