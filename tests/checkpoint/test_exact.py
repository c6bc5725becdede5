"""A run that is killed by `kill -9` goes on as if it had not been: every loss and the weights are bitwise the same."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf.checkpoint.background import SaveFailed
from tests.support.decoder_runs import train
from tests.support.processes import run

pytestmark = pytest.mark.slow

LAYOUTS = {"single": 1, "ddp2": 2, "fsdp4": 4, "fsdp2_tp2": 4, "fsdp2_pp2": 4}
"""Layouts and their ranks."""
STEPS = 6
CASES = [
    *((layout, backend, 0, "disabled") for layout in ("single", "ddp2") for backend in ("file", "dcp")),
    *((layout, backend, 2, "async") for layout in ("single", "ddp2") for backend in ("file", "dcp")),
    # Four ranks take as long as all of those: each backend and each way of saving is there, in pairs that alternate.
    ("fsdp4", "dcp", 0, "disabled"), ("fsdp4", "file", 2, "async"),
    ("fsdp2_tp2", "file", 0, "disabled"), ("fsdp2_tp2", "dcp", 2, "async"),
    ("fsdp2_pp2", "dcp", 0, "disabled"), ("fsdp2_pp2", "file", 2, "async"),
]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an uninterrupted run under a layout does, on every rank; trained once, and without a checkpoint but the
    last, so that saving is compared with not saving as well."""
    found: dict[str, list[dict[str, Any]]] = {}

    def of(layout: str) -> list[dict[str, Any]]:
        if layout not in found:
            root = str(tmp_path_factory.mktemp(layout))
            found[layout] = run(train, LAYOUTS[layout], root, layout, {"steps": STEPS, "checkpoint": {"interval": 100}})
        return found[layout]

    return of


@pytest.mark.parametrize(("layout", "backend", "workers", "mode"), CASES)
def test_a_killed_run_goes_on_exactly(
    uninterrupted: Any, tmp_path: Path, layout: str, backend: str, workers: int, mode: str
) -> None:
    changes: dict[str, Any] = {
        "steps": STEPS, "checkpoint": {"backend": backend, "async_mode": mode, "interval": 1},
    }  # fmt: skip
    if workers:
        changes["dataloader"] = {"num_workers": workers}
    kill_at = random.Random(f"{layout} {backend} {workers}").randrange(2, STEPS)
    ended = run(_killed, LAYOUTS[layout], str(tmp_path), layout, changes, kill_at)
    assert {repr(item) for item in ended} == {"died of SIGKILL"}
    resumed = run(train, LAYOUTS[layout], str(tmp_path), layout, {**changes, "auto_resume": True})
    # In the background the newest save or two may not have come to their end.
    assert 0 < resumed[0]["began"] <= kill_at
    assert mode == "async" or resumed[0]["began"] == kill_at
    for mine, whole in zip(resumed, uninterrupted(layout), strict=True):
        assert mine["began"] == resumed[0]["began"]
        done = 2 * mine["began"]  # micro-batches
        # As text: bitwise, and not a number where another stage has the loss.
        assert repr(mine["losses"]) == repr(whole["losses"][done:])
        assert mine["samples"] == whole["samples"][done:]
        assert (mine["rate"], mine["epoch"]) == (whole["rate"], whole["epoch"])
        for kind in ("weights", "moments"):
            assert mine[kind].keys() == whole[kind].keys()
            assert all(torch.equal(value, whole[kind][name]) for name, value in mine[kind].items())
    assert resumed[0]["weights"]


def _killed(root: str, layout: str, changes: dict[str, Any], kill_at: int) -> None:
    try:
        train(root, layout, changes, kill_at=kill_at)
    except (RuntimeError, SaveFailed):
        # A rank may hear of another's death, by a save in the background, before it comes to its own.
        os.kill(os.getpid(), signal.SIGKILL)
