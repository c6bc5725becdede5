"""Which files hold tests, in which order, and how many threads a worker has."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

LONG = (
    "distributed/test_foreign_models.py", "distributed/test_matrix.py", "checkpoint/test_exact.py",
    "launch/test_groups.py", "runner/observe/test_collective_timeout.py", "documents/test_blocks.py",
    "examples/test_commands.py", "checkpoint/test_layouts.py", "checkpoint/test_signals.py", "crash/test_killed.py",
    "gpu/test_gpu.py", "cli/test_endings.py", "launch/test_local_workers.py", "distributed/test_deepspeed.py",
    "launch/test_joining.py", "plan/test_accuracy.py", "plan/test_proposals.py", "plan/test_engine.py",
    "runner/test_replicas.py", "crash/test_disks.py", "examples/test_gan.py", "examples/test_own_loop.py",
    "runner/test_artifacts.py", "documents/test_site.py", "config/test_fuzzed_command_lines.py",
    "distributed/test_foreign_data_axes.py", "cli/test_init.py", "apps/test_example.py",
    "config/test_sweep_composer.py", "groups/test_presets.py",
)  # fmt: skip
"""Files that take half a minute: they come first, so that no worker is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish() -> None:
    # What has been imported by now stays. Each collection would look through it, for up to a quarter of a test's time.
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    # Ranks that wait for a call take a seventh of a core, by gloo's threads: none wait while another file runs.
    spawn = sys.modules.get("tests.support.spawn")
    if spawn is not None and (nextitem is None or nextitem.path != item.path):
        spawn.close_shared()


def pytest_configure() -> None:
    # Workers share the cores: several threads in each only wait for one another.
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Modules of other marks are not even imported: with `-m composition` torch may not be installed, sweepers are
    where `-m sweeper` is, and `-m slurm` needs few of them."""
    if not collection_path.match("test_*.py"):
        return None
    text, chosen = collection_path.read_text(), config.option.markexpr
    if chosen in ("composition", "slurm", "sweeper"):
        return f"mark.{chosen}" not in text or None
    return "mark.sweeper" in text or None
