"""The guide's example: an app before and after, and ours in the app as it was."""

from __future__ import annotations

import difflib
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY, Result, run

APP = REPOSITORY / "examples/existing_app"


def changed(before: str, after: str) -> int:
    """Lines that are in one of two files only, blank ones left out."""
    texts = [(APP / name).read_text().splitlines() for name in (before, after)]
    return sum(line[:2] in ("+ ", "- ") and bool(line[2:].strip()) for line in difflib.ndiff(*texts))


def test_the_difference_is_under_fifteen_lines() -> None:
    assert changed("before.py", "after.py") + changed("conf/before.yaml", "conf/after.yaml") < 15


def last(done: Result) -> dict[str, str]:
    assert done.code == 0, done.text
    return done.last


@pytest.mark.slow
def test_the_app_trains_as_before_and_under_any_layout(tmp_path: Path) -> None:
    shorter = ["trainer.max_epochs=8", "trainer.batch_size=16"]
    before = run([APP / "before.py", *shorter, "model.width=32", "+parallel=fsdp2", "+compile=max"], cwd=tmp_path)
    assert float(last(before)["val.loss"]) < 0.3
    after = run([APP / "after.py", *shorter, "model.width=32", "seed=1"], cwd=tmp_path)
    sharded = run([APP / "after.py", *shorter, "model.width=32", "seed=1", "parallel=fsdp2",
                   "dataloader.batch_size=8"], cwd=tmp_path)  # fmt: skip
    assert float(last(after)["val.loss"]) < 0.3
    assert float(last(sharded)["val.loss"]) == pytest.approx(float(last(after)["val.loss"]), rel=0.2)


def test_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    done = run([APP / "after.py", "trainer.max_epoch=5"], cwd=tmp_path)
    assert done.code == 2
    assert "did you mean trainer.max_epochs?" in done.err
