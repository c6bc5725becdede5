"""Index of an experiment's configurations: which of them differ in their layout only.

What a run was made with stands in its file, and an experiment may have thousands of runs: to look at each took most of
a start. So a line is added when a run is made. The index only says which runs are worth reading: those that it does not
know, of another version or moved here, are looked at as well, and whoever reads one adds it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from danling_conf.config.identity import flatten
from danling_conf.schema.files import LAYOUTS_INDEX, Damaged, no_links, read_regular

LAYOUT_PATHS = ("parallel.axes.", "fsdp.enabled", "stack")
"""Beginnings of the paths of settings that are a run's layout."""

_LINE = re.compile(r"^([0-9a-f]{12}) ([0-9a-f]{12})$", re.MULTILINE)
"""All lines are of one length: of two that hosts append at the same place, which NFS allows, one is whole."""
_NAME = re.compile(r"([0-9a-f]{12})(?:\.([1-9][0-9]{0,8}))?")
"""Name of a run: a `config_id`, and a number."""
_LOOKED_AT = 32
"""Runs that are looked at, of those that the index names and of those that it does not know."""


Made = tuple[str, str, Mapping[str, Any]]
"""A run's name, `config_id` and settings."""


class LayoutsIndex:
    """The index beside the runs in `root`, read when it is made. Damaged lines count as missing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            content = read_regular(root / LAYOUTS_INDEX)
        except (FileNotFoundError, Damaged):
            content = b""
        self._known: dict[str, str] = dict(_LINE.findall(content.decode("latin-1")))

    def candidates(self, names: Iterable[str], settings: Mapping[str, Any]) -> list[Path]:
        """Runs that may differ from a configuration in their layout only, newest first.

        Args:
            names: of all that is in `root`.
            settings: the configuration's part that changes the result of training.
        """
        wanted = _without_layout(settings)
        alike, unknown = [], []
        for name in names:
            known = self._known.get(name.partition(".")[0])
            if known is None:
                unknown.append(name)
            elif known == wanted:
                alike.append(name)
        found = [
            *self._newest(heapq.nlargest(_LOOKED_AT, alike, key=_number)),
            *self._newest(name for name in unknown if name != LAYOUTS_INDEX),
        ]
        return [self._root / name for _, name in sorted(found, reverse=True)]

    def add(self, runs: Iterable[Made]) -> None:
        """Add what runs were made with that it does not know."""
        add(self._root, [made for made in runs if made[1] not in self._known])

    def _newest(self, names: Iterable[str]) -> list[tuple[float, str]]:
        """Those that changed last, with the time."""
        times = []
        for name in names:
            with suppress(OSError):  # a link to nothing, or to itself
                times.append(((self._root / name).stat().st_mtime, name))
        return heapq.nlargest(_LOOKED_AT, times)


def add(root: Path, runs: Iterable[Made]) -> None:
    """Add what runs were made with to the index in `root`."""
    # A name that a user gave says nothing about what the run is.
    lines = [
        f"{config} {_without_layout(settings)}\n".encode()
        for name, config, settings in runs
        if (found := _NAME.fullmatch(name)) is not None and found[1] == config
    ]
    # A line that cannot be written costs a later start a look at the run, and nothing else.
    with suppress(OSError):
        if lines:
            with open(root / LAYOUTS_INDEX, "ab", opener=no_links) as file:
                file.write(b"".join(lines))


def _without_layout(settings: Mapping[str, Any]) -> str:
    """Hash of settings without those of the layout. Where it becomes another one, the index needs another name."""
    flat = flatten(dict(settings)).items()
    kept = {path: value for path, value in flat if value != {} and not path.startswith(LAYOUT_PATHS)}
    # 1 and 1.0 are one value, as they are where settings are compared.
    numbers = json.loads(json.dumps(kept), parse_int=float)
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:12]


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return 0 if found is None else int(found[2] or 1)
