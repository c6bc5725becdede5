"""Violation: a fault of a configuration as data, and the errors that carry violations to the place that shows them."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from danling_conf.schema.printable import printable, printable_lines

_LONGEST = 1000
"""Characters of a setting and its value that are shown."""


@dataclass(frozen=True)
class Violation:
    """A setting that breaks a rule: where, what, why, and how to fix it."""

    path: str
    """Dotted path of the setting, as it is written on the command line; empty for the command line as a whole."""
    value: Any
    """The given value; `ABSENT` where the fault is not in a value."""
    rule: str
    """The rule that it breaks."""
    fix: str
    """What to do."""

    def __str__(self) -> str:
        head = self.path if self.value is ABSENT else f"{self.path}={show(self.value)}"
        head = head if len(head) <= _LONGEST else f"{head[:_LONGEST]}…"
        return printable_lines(f"{printable(head)}\n    {self.rule}\n    fix: {self.fix}")


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"  # pickle by name: it is compared by identity, and a copy would not be the same object


ABSENT = _Absent()


def show(value: Any) -> str:
    """A value as it is typed on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


class PlainError(RuntimeError):
    """An error of nobody's code, such as a full disk: its message is all that a user needs, without a trace."""


def trace_of(error: BaseException) -> str:
    """The stack trace of an error; empty for a PlainError."""
    return "" if isinstance(error, PlainError) else "".join(traceback.format_exception(error))


class SettingError(ValueError):
    """A builder cannot do what a setting requests. It carries the violation, and `str()` formats it.

    Args:
        path: path of the setting, or name of the argument.
        value: its value; ABSENT where the value does not matter.
        rule: the rule that it breaks.
        fix: what to do.
    """

    def __init__(self, path: str, value: Any, rule: str, fix: str) -> None:
        self.violation = Violation(path, value, rule, fix)
        super().__init__(str(self.violation))

    def __reduce__(self) -> tuple[object, ...]:
        item = self.violation
        return type(self), (item.path, item.value, item.rule, item.fix)


class ConfigRefused(ValueError):
    """The configuration breaks rules; `violations` holds all of them."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__(self.report())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.violations,)

    def report(self) -> str:
        """All violations as text."""
        count = len(self.violations)
        lines = [f"configuration refused: {count} fault{'s' if count > 1 else ''}"]
        lines += [f"  {item}".replace("\n", "\n  ") for item in self.violations]
        return "\n".join(lines)


@contextmanager
def refused() -> Iterator[None]:
    """Turn a builder's SettingError into a refusal, which is shown without a stack trace: the user changes the setting.

    An error in the user's model, data or metrics keeps its trace.

    Raises:
        ConfigRefused: with the error's violation.
    """
    try:
        yield
    except SettingError as error:
        raise ConfigRefused([error.violation]) from error


def refuse(violations: Iterable[Violation]) -> None:
    """Raise SettingError for one violation and ConfigRefused for several. Does nothing without any."""
    found = list(violations)
    if len(found) == 1:
        (item,) = found
        raise SettingError(item.path, item.value, item.rule, item.fix)
    if found:
        raise ConfigRefused(found)


def unique(violations: Iterable[Violation]) -> list[Violation]:
    """Violations in order, without repeats."""
    seen: dict[tuple[str, str], Violation] = {}
    for item in violations:
        seen.setdefault((item.path, item.rule), item)
    return list(seen.values())
