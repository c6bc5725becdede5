"""Import of a large library without passes of the garbage collector.

Importing torch makes a million objects that stay. The collector looks at them again and again in vain, for a fifth of
the import's time.
"""

from __future__ import annotations

import gc
import importlib
from types import ModuleType


def import_large(name: str) -> ModuleType:
    """`importlib.import_module` with the collector paused."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if enabled:
            gc.enable()
