"""Refusal of a configuration whose faults show only once objects are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from danling_conf.topology.violation import ConfigRefused, SettingError


@contextmanager
def refused() -> Iterator[None]:
    """Refuse what a builder cannot do with a setting, without a stack trace: the user has to change the setting.

    An error in the user's model, data or metrics keeps its trace.
    """
    try:
        yield
    except SettingError as error:
        raise ConfigRefused([error.violation]) from error
