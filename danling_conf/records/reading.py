"""Tolerant reading of records: the readable part of a file, and a warning that names the file where it is damaged.

A command that shows twenty runs must show nineteen of them when a file of the twentieth is torn. So nothing here
raises: what is missing or damaged reads as absent, and each damage is logged with the file's name. Commands print these
warnings (`shown_damage`); in a run they go to the rank's log.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from danling_conf.schema.files import LARGEST_BYTES, RESERVE, RESULT, Damaged, parse_object, read_object, read_regular
from danling_conf.schema.printable import printable

_log = logging.getLogger("danling_conf.records.damage")
_LATEST_MOMENT = 1e11
"""Later times, in seconds since 1970, are damage: `datetime` cannot represent much more."""

Value = TypeVar("Value")


def warn_of_damage(path: Path, reason: str) -> None:
    """Log that a file, or a part of it, is skipped."""
    _log.warning("%s: %s", path, reason)


@contextmanager
def shown_damage() -> Iterator[None]:
    """Print warnings of damage to standard error inside the block, each once."""
    handler = _Once()
    propagates, _log.propagate = _log.propagate, False
    _log.addHandler(handler)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.propagate = propagates


class _Once(logging.Handler):
    """Prints each warning once: a live view reads the same damaged file every second."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self._seen:
            self._seen.add(text)
            print(printable(f"warning: {text}"), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Fields:
    """A JSON object of a record, read by name and type.

    A value of another type reads as absent, with a warning.
    """

    path: Path
    """The file, for warnings."""
    values: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    """Dotted path of the object in its file, with a trailing dot."""

    def __bool__(self) -> bool:
        return bool(self.values)

    def text(self, name: str) -> str | None:
        return self._typed(name, str, "text")

    def integer(self, name: str) -> int | None:
        return self._typed(name, int, "an integer")

    def number(self, name: str) -> float | None:
        """A finite number."""
        found = self.values.get(name)
        if is_number(found):
            return float(self.values[name])
        if found is not None:
            self._wrong(name, "a number")
        return None

    def flag(self, name: str) -> bool:
        return bool(self._typed(name, bool, "true or false"))

    def table(self, name: str) -> Fields:
        """A nested object; empty where there is none."""
        found: dict[str, Any] | None = self._typed(name, dict, "an object")
        return Fields(self.path, found or {}, f"{self.prefix}{name}.")

    def texts(self, name: str) -> list[str]:
        """A list of texts; [] where there is none."""
        found: list[Any] = self._typed(name, list, "a list") or []
        if not all(isinstance(item, str) for item in found):
            self._wrong(name, "a list of texts")
            return []
        return found

    def _typed(self, name: str, kind: type[Value], called: str) -> Value | None:
        found = self.values.get(name)
        # `isinstance(True, int)` holds: booleans pass as booleans only.
        if found is None or (isinstance(found, kind) and isinstance(found, bool) == (kind is bool)):
            return found
        self._wrong(name, called)
        return None

    def _wrong(self, name: str, called: str) -> None:
        warn_of_damage(self.path, f"{self.prefix}{name} is not {called}, and is left out")


def read_fields(path: Path, *needed: str) -> Fields:
    """The object in a JSON file; empty where there is no such file, and, with a warning, where it is damaged.

    Args:
        needed: keys that every such file has. Where one is missing, that is damage, and the rest is still read.
    """
    found = read_json(path)
    missing = [name for name in needed if name not in found]
    if found and missing:
        warn_of_damage(path, f"{', '.join(missing)} missing")
    return Fields(path, found)


def read_result(attempt: Path) -> Fields:
    """How an attempt says that it ended; empty where it does not.

    Where the file of the result could not be made, the end stands in the room that was kept for it.
    """
    found = read_fields(attempt / RESULT)
    if found:
        return found
    try:
        # Blank as long as the attempt has not ended, and torn where it was killed while it wrote its end.
        return Fields(attempt / RESERVE, parse_object(read_regular(attempt / RESERVE)))
    except (OSError, ValueError):
        return found


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file as it is; {} where there is none."""
    try:
        found = read_object(path)
    except FileNotFoundError:
        return {}
    except Damaged as damage:
        warn_of_damage(damage.path, damage.reason)
        return {}
    if not found:
        warn_of_damage(path, "there is nothing in it")
    return found


def read_text(path: Path, limit: int | None = LARGEST_BYTES, *, most: int | None = None) -> str:
    """The text of a file, with bytes replaced that are not UTF-8; "" where there is no file.

    Args:
        limit: see `read_regular`; likewise `most`.
    """
    try:
        return read_regular(path, limit, most=most).decode(errors="replace")
    except FileNotFoundError:
        return ""
    except Damaged as damage:
        warn_of_damage(damage.path, damage.reason)
        return ""


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; JSON written by Python may hold NaN and Infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_moment(value: Any) -> bool:
    """Whether a value is a time in seconds since 1970."""
    return is_number(value) and 0 <= value < _LATEST_MOMENT
