"""Marks around code that may wait for other ranks, for the heartbeat.

That a collective was started and has not ended says little by itself: gradients are reduced while the backward pass
goes on, and ranks agree on signals while they train. Whether a rank waits, only the code that waits knows. It says so
with `waiting`; the heartbeat's thread reads it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_marks: dict[int, list[str]] = {}
"""What each thread may wait for, innermost last. A checkpoint's thread waits for other ranks while training goes on."""


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Mark a block in which this thread may wait for other ranks.

    Args:
        what: names the block in the heartbeat, such as `the backward pass`.
    """
    marks = _marks.setdefault(threading.get_ident(), [])
    marks.append(what)
    try:
        yield
    finally:
        marks.pop()


def waits_for(thread: int) -> str | None:
    """What the thread with this identifier may wait for now; None outside of every `waiting` block."""
    marks = _marks.get(thread)
    # One read: the thread may leave its block between two of them.
    return next(reversed(marks), None) if marks else None
