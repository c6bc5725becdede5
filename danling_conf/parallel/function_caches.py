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
        forget_fake_values()


def forget_fake_values() -> None:
    """Empty the caches that keep a fake tensor. It looks at every object that there is: 30 ms."""
    for cache in _caches():
        if any(is_fake(item) for item in _tensors(cache)):
            cache.cache_clear()


def cached_tensors() -> Iterator[Tensor]:
    """What the caches of functions keep."""
    for cache in _caches():
        yield from _tensors(cache)


def _caches() -> list[Any]:
    found = {id(item): item for item in gc.get_referrers(_KIND) if type(item) is _KIND}
    if gc.get_freeze_count():  # frozen objects are no referrers; those that matter are in modules
        found |= {id(item): item for item in _in_modules()}
    return [item for item in found.values() if not _is_other(str(getattr(item, "__module__", "")))]


def _in_modules() -> Iterator[Any]:
    """The caches of modules' functions and of their classes' methods."""
    for name, module in list(sys.modules.items()):
        if _is_other(name):
            continue
        for value in list(getattr(module, "__dict__", {}).values()):  # anything may stand for a module
            held = vars(value).values() if isinstance(value, type) else (value,)
            yield from (item for item in held if type(item) is _KIND)


def _is_other(module: str) -> bool:
    return module.partition(".")[0] in _OTHERS


def _tensors(cache: Any) -> list[Tensor]:
    return [item for item in tree_leaves(gc.get_referents(cache)) if isinstance(item, Tensor)]
