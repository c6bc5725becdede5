"""Nodes of configuration classes are those that OmegaConf makes itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional, Union

import pytest
from omegaconf import MISSING, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.groups.presets import GROUPS
from danling_conf.groups.source import LAUNCHERS, SUBMITIT, _with_sections, layout_settings
from danling_conf.schema import RunnerConfig
from danling_conf.schema.typed_node import plain_node_of, typed_node_of

pytestmark = pytest.mark.composition

OURS = [RunnerConfig, *LAUNCHERS.values(), *SUBMITIT.values()]


class Colour(Enum):
    RED = 1


@dataclass
class Plain:
    number: int = 3
    rate: float = 1
    name: Optional[str] = None
    needed: str = MISSING


@dataclass
class SetsItself:
    number: int = 3

    def __post_init__(self) -> None:
        self.number = 4


@dataclass(frozen=True)
class Frozen:
    number: int = 3


@dataclass(kw_only=True)
class Own(RunnerConfig):
    required: int
    also: Union[int, str] = 3
    perhaps: Optional[Union[bool, int]] = None
    place: Path = Path("here")
    colour: Colour = Colour.RED
    anything: Any = field(default_factory=lambda: {"a": [1, {"b": None}]})
    names: List[str] = field(default_factory=lambda: ["a"])
    none: Optional[List[int]] = None
    several: Dict[str, int] = field(default_factory=dict)
    refers: str = "${lineage}"
    counts: int = "${steps}"  # type: ignore[assignment]
    plain: Plain = field(default_factory=Plain)
    perhaps_plain: Optional[Plain] = None
    sets_itself: SetsItself = field(default_factory=SetsItself)
    frozen: Frozen = field(default_factory=Frozen)
    changed: Plain = field(default_factory=lambda: Plain(number=5))


def everything(node: Any, parent: Any = None) -> Any:
    """All that a node holds, but its caches, and that each child knows its parent."""
    if not isinstance(node, Node):
        return node
    assert node._get_parent() is parent
    state = {name: value for name, value in vars(node).items() if name not in ("_parent", "_content", "_flags_cache")}
    content = vars(node).get("_content")
    if isinstance(content, dict):
        content = {key: everything(child, node) for key, child in content.items()}
    elif isinstance(content, list):
        content = [everything(child, node) for child in content]
    else:
        content = everything(content, node)
    return type(node), vars(state.pop("_metadata")), state, content


@pytest.mark.parametrize(
    "kind", [RunnerConfig, Own, Plain, SetsItself, Frozen, *LAUNCHERS.values(), *SUBMITIT.values()]
)
def test_it_is_the_node_of_omegaconf(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of 2.4, where a default of `float` is an int
        mine, theirs = typed_node_of(kind), OmegaConf.structured(kind)
    assert everything(mine) == everything(theirs)


@pytest.mark.parametrize(
    "value",
    [preset.settings for presets in GROUPS.values() for preset in presets.values()]
    + [_with_sections(layout_settings("fsdp8")), {}, [], [{"override a/b@c": None}, "_self_"], {"a": {"b": [1, {}]}}],
    ids=str,
)
def test_a_plain_node_is_that_of_omegaconf(value):
    assert everything(plain_node_of(value)) == everything(OmegaConf.create(value))


def test_a_class_that_cannot_be_expressed_raises_what_omegaconf_raises():
    @dataclass
    class Wrong:
        number: int = "three"  # type: ignore[assignment]

    with pytest.raises(OmegaConfBaseException) as theirs:
        OmegaConf.structured(Wrong)
    with pytest.raises(type(theirs.value)) as mine:
        typed_node_of(Wrong)
    assert str(mine.value) == str(theirs.value)


def test_our_classes_are_not_left_to_omegaconf(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("OmegaConf.structured was called")

    monkeypatch.setattr(OmegaConf, "structured", fail)
    for kind in OURS:
        typed_node_of(kind)
