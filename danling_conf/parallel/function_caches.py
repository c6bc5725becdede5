"""Caches of functions (`functools.lru_cache`) after a run on fake tensors: a mask that one keeps would be without a
value for good, and real tensors would be computed with it."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from danling_conf._torch_private.dispatch import tree_leaves
from danling_conf._torch_private.fakes import is_fake

_KIND = type(functools.lru_cache(lambda: None))
_OTHERS = sys.stdlib_module_names | {"torch", "numpy", "scipy", "sympy"}
"""Packages whose caches hold no tensors of a model."""


@contextmanager
def fake_values_forgotten() -> Iterator[None]:
    """Caches that keep a fake tensor are empty after it."""
    try:
        yield
    finally:
        for cache in _caches():
            if any(is_fake(item) for item in _tensors(cache)):
                cache.cache_clear()


def cached_tensors() -> Iterator[Tensor]:
    """What the caches of functions keep."""
    for cache in _caches():
        yield from _tensors(cache)


def _caches() -> list[Any]:
    found = (item for item in gc.get_referrers(_KIND) if type(item) is _KIND)
    return [item for item in found if str(getattr(item, "__module__", "")).partition(".")[0] not in _OTHERS]


def _tensors(cache: Any) -> list[Tensor]:
    return [item for item in tree_leaves(gc.get_referents(cache)) if isinstance(item, Tensor)]
