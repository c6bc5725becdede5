"""Docs of settings, read from the source of the dataclass that declares them.

Python discards a string under a field, so it is read from the source file. A setting's meaning is then written once, in
the place where editors show it too.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from danling_conf.schema.nearest import nearest
from danling_conf.schema.setting import Facts, facts_of


@dataclass(frozen=True, kw_only=True)
class Described:
    """A setting or a section: type, default, doc, reader."""

    path: str
    type: str
    default: Any
    doc: str
    read_by: str
    facts: Facts
    section: Any = None
    """The dataclass of a section or of an unset mapping; None for a plain setting."""


def field_docs(kind: type) -> dict[str, str]:
    """Doc of every field of a dataclass: the string under its declaration, in its own source or that of a base."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            docs |= _own_docs(base)
    return docs


def field_types(kind: type) -> dict[str, str]:
    """Type of every field of a dataclass in a readable form: `int | None`."""
    # `Field.type` is a string where the module postpones annotations, and a type otherwise.
    return {
        item.name: item.type.__name__ if isinstance(item.type, type) else _readable(str(item.type))
        for item in fields(kind)
    }


def describe(kind: type, path: str) -> Described | None:
    """The description of the setting or section at a dotted path; None where there is none."""
    parts = path.split(".")
    owner = kind
    for index, part in enumerate(parts):
        item = next((item for item in fields(owner) if item.name == part and not part.startswith("_")), None)
        if item is None:
            split: Any = getattr(owner, "open_to", None)
            # A name of the user's own, such as a split's; one that is like a setting's is a misspelling.
            own = isinstance(split, type) and part.isidentifier() and not part.startswith("_")
            if not own or nearest(part, [item.name for item in fields(owner)], cutoff=0.7):
                return None
            if index == len(parts) - 1:
                return Described(
                    path=path,
                    type="mapping",
                    default=None,
                    doc=inspect.cleandoc(split.__doc__ or ""),
                    read_by=vars(split).get("read_by", "your own code"),
                    facts=Facts(),
                    section=split,
                )
            owner = split
            continue
        inner = item.default_factory if is_dataclass(item.default_factory) else facts_of(item).shape
        if index == len(parts) - 1:
            return Described(
                path=path,
                type=_type_of(item, owner),
                default=item.default if inner is None or facts_of(item).shape else None,
                doc=field_docs(owner).get(part) or inspect.cleandoc((inner or owner).__doc__ or ""),
                read_by=_reader(item, owner, inner),
                facts=facts_of(item),
                section=inner if isinstance(inner, type) else None,
            )
        if not isinstance(inner, type):
            return None
        owner = inner
    return None


def _type_of(item: Field[Any], owner: type) -> str:
    """Type of a setting in a readable form, even where OmegaConf cannot express it."""
    facts = facts_of(item)
    if facts.shape is not None:
        return "mapping | None"
    if facts.kinds is not None:
        names: dict[type, str] = {list: "list[str]", dict: "dict[str, Any]"}
        return " | ".join([names.get(kind, kind.__name__) for kind in facts.kinds] + ["None"])
    return field_types(owner)[item.name]


def _reader(item: Field[Any], owner: type, inner: Any) -> str:
    """Module that reads a setting. A user's subclass does not inherit our reader for the settings that it adds."""
    declaring = next(base for base in owner.__mro__ if item.name in inspect.get_annotations(base))
    return str(facts_of(item).read_by or vars(inner or declaring).get("read_by", "your own code"))


@cache
def _own_docs(kind: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # a class without a source file, for instance from an earlier notebook cell
        return {}
    body = ast.parse(source).body[0]
    docs: dict[str, str] = {}
    if isinstance(body, ast.ClassDef):
        for declared, following in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            if isinstance(declared, ast.AnnAssign) and isinstance(declared.target, ast.Name) and is_text:
                docs[declared.target.id] = inspect.cleandoc(str(following.value.value))  # type: ignore[attr-defined]
    return docs


def _readable(annotation: str) -> str:
    text = annotation.replace("typing.", "")
    while True:
        start = text.find("Optional[")
        if start < 0:
            break
        depth, end = 0, start + len("Optional")
        for end in range(start + len("Optional"), len(text)):
            depth += {"[": 1, "]": -1}.get(text[end], 0)
            if depth == 0:
                break
        inner = text[start + len("Optional[") : end]
        text = f"{text[:start]}{inner} | None{text[end + 1 :]}"
    if text.startswith("Union["):
        head, _, tail = text.removeprefix("Union[").partition("]")
        text = " | ".join(part.strip() for part in head.split(",")) + tail
    return text.replace("List[", "list[").replace("Dict[", "dict[")
