"""Search for the config file behind an error of Hydra's that names none: a circle of defaults lists, another encoding,
a file without settings."""

from __future__ import annotations

import copy
import errno
import re
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.default_element import GroupDefault, InputDefault
from hydra.errors import HydraException
from yaml import YAMLError

from danling_conf.groups.source import SCHEME
from danling_conf.topology.violation import ABSENT, Violation


def defect_of(repository: Any, primary: str | None, overrides: Sequence[str], error: Exception) -> Violation:
    """The fault that made Hydra raise a bare builtin error.

    Args:
        repository: Hydra's, of all configs of the app.
        primary: name of the primary config.
    """
    texts = [item.lstrip("+").partition("=") for item in overrides if "=" in item]
    if getattr(error, "errno", None) == errno.ENAMETOOLONG:
        longest = max(overrides, key=len)
        rule = "a name is longer than a file system takes"
        return Violation(f"{longest[:40]}...", ABSENT, rule, "shorten it")
    chosen = [f"{re.split('@', group)[0]}/{name}" for group, _, name in texts if repository.group_exists(group)]
    for start in (primary, *chosen):
        found = _defect_below(repository, start, ()) if start else None
        if found is not None:
            return found
    return Violation("configuration", ABSENT, str(error).splitlines()[0], "fix the configuration files")


def circle_from(repository: Any, primary: str | None) -> Violation | None:
    """A circle of defaults lists that starts at the primary config.

    Looked for before Hydra composes: with a base config in the circle it would take a minute to run out of stack.
    """
    try:
        return _defect_below(repository, primary, ()) if primary else None
    except HydraException:
        return None  # Hydra reports it when it composes


def _defect_below(repository: Any, path: str, above: tuple[str, ...]) -> Violation | None:
    """The defect of a config, or of one that its defaults list reaches."""
    file = f"{path}.yaml"
    if path in above:
        way = " -> ".join([*above[above.index(path) :], path])
        return Violation(file, ABSENT, f"its defaults list comes back to itself: {way}", "remove one of these entries")
    source = next((item for item in repository.get_sources() if item.is_config(path)), None)
    if source is None or source.scheme() == SCHEME:  # ours refer to ours, and have no circles
        return None
    try:
        loaded = repository.load_config(path)
    except YAMLError:
        return None  # reported with its line when Hydra composes
    except UnicodeDecodeError as error:
        rule = f"it is not encoded as UTF-8: byte {error.object[error.start]:#x} at position {error.start}"
        return Violation(file, ABSENT, rule, "save it as UTF-8")
    except OSError as error:
        rule = "a config file holds a mapping of settings" if "object type" in str(error) else str(error)
        return Violation(file, ABSENT, rule, "write KEY: VALUE in it")
    for entry in (loaded.defaults_list or []) if loaded is not None else []:
        for below in _reached(entry, path):
            found = _defect_below(repository, below, (*above, path))
            if found is not None:
                return found
    return None


def _reached(entry: InputDefault, path: str) -> Iterator[str]:
    """The configs that an entry in the defaults list of `path` names."""
    if entry.is_self() or entry.is_override():
        return
    entry = copy.copy(entry)
    entry.update_parent(path.rpartition("/")[0], "")
    if not isinstance(entry, GroupDefault):
        yield entry.get_config_path()
        return
    for name in entry.get_options() if entry.is_options() else [entry.get_name()]:
        if name is not None:
            yield f"{entry.get_group_path()}/{name}"
