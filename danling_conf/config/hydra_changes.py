"""Parts of Hydra that are replaced while it works for our `main`: work that it repeats, and steps that hide faults.

Private names, like those of hydra_adapter.py, which is the only module that uses this one. Each replacement ends with
the block that asked for it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, cast

import hydra
from hydra import version
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.plugins.sweeper import Sweeper
from omegaconf import AnyNode, BooleanNode, DictConfig, FloatNode, IntegerNode, OmegaConf, StringNode, ValueNode
from omegaconf.base import Box, Metadata, Node

from danling_conf.groups.base import base_names
from danling_conf.groups.source import SCHEME


@contextmanager
def without_waste() -> Iterator[None]:
    """Spare Hydra work that it repeats, without another result: a fifth of a start."""
    with _asked_once(), _parsed_once(), _empty_presets_left_out(), _parents_left_alone(), quick_copies():
        yield


@contextmanager
def _empty_presets_left_out() -> Iterator[None]:
    """Merge no preset that sets nothing into our base config: each merge goes over all of the configuration, and most
    of the choices of the base config are such presets."""
    merge = ConfigLoaderImpl._compose_config_from_defaults_list

    def merge_the_rest(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        return merge(self, list(_without_empty(defaults, repo)), repo)

    loader: Any = ConfigLoaderImpl
    loader._compose_config_from_defaults_list = merge_the_rest
    try:
        yield
    finally:
        loader._compose_config_from_defaults_list = merge


def _without_empty(defaults: Sequence[ResultDefault], repo: IConfigRepository) -> Iterator[ResultDefault]:
    """Leave out empty presets that follow a base config, with nothing but presets of ours in between: a file could have
    set a section to null, which an empty preset would bring back."""
    schemas = repo.get_schema_source()  # Hydra 1.3 merges a config with the one of its name in there
    behind_base = False
    for item in defaults:
        path = item.config_path
        loaded = repo.load_config(path) if path is not None else None
        if path is None or loaded is None or not loaded.path.startswith(f"{SCHEME}://"):
            behind_base = False
        elif path in base_names():
            behind_base = not item.package
        elif behind_base and not loaded.config and not schemas.is_config(path):
            continue
        yield item


@contextmanager
def _asked_once() -> Iterator[None]:
    """Spare Hydra 1.3 two kinds of work that it repeats for each entry of a defaults list.

    It parses two versions for each question whether it behaves as 1.2, and makes a configuration of all choices, for
    entries that refer to others (`${optim}`), where there are none. Hydra 1.4 does neither.
    """
    lists: Any = defaults_list
    parse, choices = version._get_version, getattr(lists, "_create_interpolation_map", None)
    if not hydra.__version__.startswith("1.3") or choices is None:
        yield
        return

    def choices_where_needed(overrides: Overrides, entries: Sequence[Any], self_added: bool) -> DictConfig:
        needed = any(entry.is_interpolation() for entry in entries)
        return choices(overrides, entries, self_added) if needed else OmegaConf.create()

    version._get_version, lists._create_interpolation_map = cache(parse), choices_where_needed
    try:
        yield
    finally:
        version._get_version, lists._create_interpolation_map = parse, choices


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Parse an override once, of those that are asked for again and again: by Hydra and by our checks."""
    parser: Any = OverridesParser
    theirs = parser.parse_rule

    @lru_cache(maxsize=1024)
    def parsed(text: str) -> Override:
        return cast("Override", theirs(OverridesParser.create(), text, "override"))

    def parse_rule(self: OverridesParser, s: str, rule_name: str) -> Any:
        return copy.deepcopy(parsed(s)) if rule_name == "override" else theirs(self, s, rule_name)

    parser.parse_rule = parse_rule
    try:
        yield
    finally:
        parser.parse_rule = theirs


@contextmanager
def _parents_left_alone() -> Iterator[None]:
    """Give a node of OmegaConf its parent again only where it has another one.

    After each merge OmegaConf does so for all nodes below, and each forgets the flags that it has found at its parents.
    """
    box: Any = Box
    theirs = box._re_parent

    def re_parent(self: Box) -> None:
        content = self.__dict__["_content"]
        inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else (content,)
        for child in inner:
            if isinstance(child, Node) and child.__dict__["_parent"] is not self:
                child._set_parent(self)
            if isinstance(child, Box):
                re_parent(child)

    box._re_parent = re_parent
    try:
        yield
    finally:
        box._re_parent = theirs


@contextmanager
def quick_copies() -> Iterator[None]:
    """Let `copy.deepcopy` copy OmegaConf's plain nodes and the metadata of all nodes by hand, to the same result.

    Hydra copies whole configurations, five times before a function is called. The larger half of each copy is that of
    the nodes' metadata, field by field, by way of pickle's protocol. All but two of the fields are types, names and
    flags, which need no copy. Most of the rest makes an empty node first, with metadata that is then replaced.
    """
    if hasattr(Metadata, "__deepcopy__"):  # by an enclosing one
        yield
        return
    theirs = {kind: vars(kind)["__deepcopy__"] for kind in _PLAIN_NODES}
    replaced: dict[Any, Any] = {Metadata: _copied, **dict.fromkeys(_PLAIN_NODES, _copied_node)}
    for kind, copied in replaced.items():
        kind.__deepcopy__ = copied
    try:
        yield
    finally:
        del Metadata.__deepcopy__  # type: ignore[attr-defined]
        for kind, copied in theirs.items():
            kind.__deepcopy__ = copied


_PLAIN_NODES: tuple[Any, ...] = (AnyNode, BooleanNode, FloatNode, IntegerNode, StringNode)


def _copied_node(self: ValueNode, memo: dict[int, Any]) -> ValueNode:
    made = object.__new__(type(self))
    state = made.__dict__
    state.update(self.__dict__)  # the value and the parent are not copied
    state["_metadata"], state["_flags_cache"] = _copied(self._metadata, memo), None
    return made


def _copied(self: Metadata, memo: dict[int, Any]) -> Metadata:
    made = object.__new__(type(self))
    state = made.__dict__
    state.update(self.__dict__)
    if not isinstance(self.key, (str, int)):
        state["key"] = copy.deepcopy(self.key, memo)
    if self.flags is not None:
        state["flags"] = dict(self.flags)
    state["resolver_cache"] = copy.deepcopy(self.resolver_cache, memo) if self.resolver_cache else defaultdict(dict)
    return made


@contextmanager
def batches_unvalidated() -> Iterator[None]:
    """Keep Hydra's sweepers from composing their jobs before they pass them to the launcher.

    A sweeper composes every job once to validate it, and stops at the first fault. Our launchers compose and check all
    jobs before any starts, and report all faults. The sweeper's validation would hide all but one of them, and cost
    more than our whole check. No setting turns it off, and the sweeper is created inside `Hydra.multirun`, whose body
    differs between versions, so the method is replaced on the base class of all sweepers. This is safe: other launchers
    have been refused before a sweep starts, and a process runs one sweep at a time.
    """
    validate = Sweeper.validate_batch_is_legal

    def accept(self: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        """Does nothing: the launcher checks the jobs."""

    Sweeper.validate_batch_is_legal = accept  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = validate  # type: ignore[method-assign]


@dataclass(frozen=True, kw_only=True)
class BrokenValue:
    """The first value on a command line that Hydra could not apply."""

    error: Exception
    values: tuple[str, ...]
    """All values of the command line, as they were given."""
    number: int
    """Its place among them."""
    seen: Any
    """What was seen before it was applied, which may change a part of the configuration before it fails."""


Look = Callable[[Override, DictConfig], Any]


@contextmanager
def first_broken_value(look: Look) -> Iterator[list[BrokenValue]]:
    """Let Hydra finish a configuration without the first value that it cannot apply, and without those after it.

    A command line with a fault would otherwise be composed twice: to the fault, and without values, to look for more.
    Yields the value, once it is found. Where Hydra then fails for want of these values, its first error is raised.
    """
    found: list[BrokenValue] = []
    apply = ConfigLoaderImpl._apply_overrides_to_config

    def apply_until_broken(values: Sequence[Override], config: DictConfig) -> None:
        for number, item in enumerate(values):
            seen = look(item, config)
            try:
                apply([item], config)
            except ConfigCompositionException as error:
                if item.is_hydra_override():
                    raise
                given = tuple(str(each.input_line) for each in values)
                found.append(BrokenValue(error=error, values=given, number=number, seen=seen))
                return

    loader: Any = ConfigLoaderImpl
    loader._apply_overrides_to_config = staticmethod(apply_until_broken)
    try:
        yield found
    except Exception:
        if found:
            raise found[0].error from found[0].error.__cause__
        raise
    finally:
        loader._apply_overrides_to_config = staticmethod(apply)
