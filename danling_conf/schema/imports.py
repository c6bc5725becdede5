"""Pauses of the garbage collector, while a large library is imported or a command starts.

Importing torch makes a million objects that stay, and composing a configuration a hundred thousand. The collector looks
at them again and again in vain, for a fifth of the import's time, and a tenth of a command's start.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def uncollected() -> Iterator[Callable[[], None]]:
    """Pauses the collector, unless somebody else has.

    Yields:
        A function that ends the pause early, where other code is called in the middle.
    """
    enabled = gc.isenabled()
    gc.disable()

    def end() -> None:
        if enabled:
            gc.enable()

    try:
        yield end
    finally:
        end()


def import_large(name: str) -> ModuleType:
    """`importlib.import_module` with the collector paused."""
    with uncollected():
        return importlib.import_module(name)
