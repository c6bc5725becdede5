"""Which files hold tests."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m composition`, modules without such tests are not even imported: torch may not be installed."""
    if config.option.markexpr == "composition" and collection_path.match("test_*.py"):
        return "mark.composition" not in collection_path.read_text() or None
    return None
