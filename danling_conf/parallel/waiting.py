"""Marks around code that may wait for other ranks, for the heartbeat.

That a collective was started and has not ended says little by itself: gradients are reduced while the backward pass
goes on, and ranks agree on signals while they train. Whether a rank waits, only the code that waits knows. It says so
with `waiting`; the heartbeat's thread reads it.
"""

from __future__ import annotations

from threading import get_ident

_marks: dict[int, list[str]] = {}
"""What each thread may wait for, innermost last. A checkpoint's thread waits for other ranks while training goes on."""


class waiting:
    """Mark a block in which this thread may wait for other ranks. One object may mark any number of blocks.

    Args:
        what: names the block in the heartbeat, such as `the backward pass`.
    """

    __slots__ = ("what",)

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        marks().append(self.what)

    def __exit__(self, *_: object) -> None:
        marks().pop()


def marks() -> list[str]:
    """What this thread may wait for, innermost last. A step appends and pops by itself, which calls no function."""
    return _marks.setdefault(get_ident(), [])


def waits_for(thread: int) -> str | None:
    """What the thread with this identifier may wait for now; None outside of every `waiting` block."""
    marks = _marks.get(thread)
    # One read: the thread may leave its block between two of them.
    return next(reversed(marks), None) if marks else None
