"""Quick copies of OmegaConf's nodes: Hydra copies whole configurations, five times before a function is called.

The larger half of each copy is that of the nodes' metadata, field by field, by way of pickle's protocol. All but two of
the fields are types, names and flags, which need no copy.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf.base import Metadata


@contextmanager
def quick_copies() -> Iterator[None]:
    """Let `copy.deepcopy` copy the metadata of OmegaConf's nodes by hand, to the same result."""
    if hasattr(Metadata, "__deepcopy__"):  # by an enclosing one
        yield
        return
    Metadata.__deepcopy__ = _copied  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del Metadata.__deepcopy__  # type: ignore[attr-defined]


def _copied(self: Metadata, memo: dict[int, Any]) -> Metadata:
    made = object.__new__(type(self))
    state = made.__dict__
    state.update(self.__dict__)
    state["key"] = copy.deepcopy(self.key, memo)
    if self.flags is not None:
        state["flags"] = dict(self.flags)
    state["resolver_cache"] = copy.deepcopy(self.resolver_cache, memo) if self.resolver_cache else defaultdict(dict)
    return made
