"""Faults of a configuration that only show once objects are built: refused like the others, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation


@contextmanager
def refused() -> Iterator[None]:
    """Turn a builder's `path: rule: fix` into a refusal, without a stack trace for what is the user's to mend."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigRefused):
            raise
        path, _, rest = str(error).partition(": ")
        rule, _, fix = rest.replace("; ", ": ").rpartition(": ")
        if not rule:
            raise
        raise ConfigRefused([Violation(path, ABSENT, rule, fix)]) from error
