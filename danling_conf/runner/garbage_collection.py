"""Python's garbage collector, paced: every rank collects at the same step, so that none makes the others wait."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from danling_conf.schema.process import GcConfig


@contextmanager
def paced(section: GcConfig) -> Iterator[None]:
    """Switch automatic collection off for the time of a run, where the section asks for it."""
    pause = section.interval is not None and section.disable_automatic and gc.isenabled()
    if pause:
        gc.collect()
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def collect(section: GcConfig) -> None:
    """One paced collection."""
    gc.collect(section.generation)
