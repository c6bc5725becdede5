"""Nearest name: what was meant by a name that does not exist."""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 200
"""Longer names are not compared: the time grows with the square of the length."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most like `name`, whatever its capitals; None where none is like it.

    Args:
        cutoff: least similarity, from 0 to 1.
    """
    if len(name) > _LONGEST:
        return None
    from difflib import SequenceMatcher, get_close_matches  # for a refusal alone

    by_folded: dict[str, str] = {}
    for item in known:
        by_folded.setdefault(item.casefold(), item)
    folded = name.casefold()
    close = get_close_matches(folded, by_folded, n=3, cutoff=cutoff)
    if not close:
        return None
    # Of names that are equally like it, the one that differs by what was left out: `Fsdp2` is no `hsdp`.
    best = max(close, key=lambda item: (SequenceMatcher(None, folded, item).ratio(), item[:1] == folded[:1]))
    return by_folded[best]
