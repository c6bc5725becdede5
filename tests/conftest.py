"""Which files hold tests, and how many threads a worker has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_configure() -> None:
    # Workers share the cores: several threads in each only wait for one another.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules for another environment are not even imported: with `-m composition` torch may not be installed, and
    sweepers are where `-m sweeper` is."""
    if not collection_path.match("test_*.py"):
        return None
    text, chosen = collection_path.read_text(), config.option.markexpr
    if chosen in ("composition", "sweeper"):
        return f"mark.{chosen}" not in text or None
    return "mark.sweeper" in text or None
