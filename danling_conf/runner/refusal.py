"""Refusal of a configuration whose faults show only once objects are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError, Violation

_OURS = __name__.partition(".")[0]


@contextmanager
def refused() -> Iterator[None]:
    """Refuse what a builder cannot do with a setting, without a stack trace: the user has to change the setting.

    An error in the user's model, data or metrics keeps its trace.
    """
    with _refused_by_text():
        try:
            yield
        except SettingError as error:
            raise ConfigRefused([error.violation]) from error


@contextmanager
def _refused_by_text() -> Iterator[None]:
    """The same for builders that raise `path: rule: fix` as text."""
    try:
        yield
    except ConfigRefused:
        raise
    except (ValueError, TypeError) as error:
        if not _raised_here(error.__traceback__):
            raise
        path, _, rest = str(error).partition(": ")
        rule, _, fix = rest.replace("; ", ": ").rpartition(": ")
        raise ConfigRefused([Violation(path, ABSENT, rule or rest, fix or "fix the setting")]) from error


def _raised_here(traceback: TracebackType | None) -> bool:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] == _OURS
