"""Faults of a configuration that only show once objects are built: refused like the others, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError, Violation

_OURS = __name__.partition(".")[0]


@contextmanager
def refused() -> Iterator[None]:
    """Turn a builder's `path: rule: fix` into a refusal, without a stack trace for what is the user's to mend.

    Only what this package raises itself is meant so. An error in the user's model, data or metrics keeps its trace.
    """
    try:
        yield
    except ConfigRefused:
        raise
    except SettingError as error:
        raise ConfigRefused([error.violation]) from error
    except (ValueError, TypeError) as error:
        if not _raised_here(error.__traceback__):
            raise
        path, _, rest = str(error).partition(": ")
        rule, _, fix = rest.replace("; ", ": ").rpartition(": ")
        raise ConfigRefused([Violation(path, ABSENT, rule or rest, fix or "mend the setting")]) from error


def _raised_here(traceback: TracebackType | None) -> bool:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    module = "" if traceback is None else str(traceback.tb_frame.f_globals.get("__name__", ""))
    return module.partition(".")[0] == _OURS
