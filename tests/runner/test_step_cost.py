"""What a step costs beside forward, backward and the optimizer, counted in calls: time would depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import danling_conf
from tests.support.small import Net, Pairs, loss, runner

PACKAGE = str(Path(danling_conf.__file__).parent)
MOST_CALLS = 11
"""Functions of the package that a step calls, where nothing is due after it."""


def test_a_step_calls_few_functions_of_ours(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"steps": 6, "log_interval": 6, "eval_interval": 6, "max_grad_norm": None})
    ours.prepare(Net, {"train": Pairs()}, loss=loss)
    steps: list[list[str]] = []

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            steps[-1].append(frame.f_code.co_qualname)

    for batch in ours.batches("train"):
        steps.append([])
        before = sys.getprofile()
        sys.setprofile(note)
        try:
            ours.step(batch)
        finally:
            sys.setprofile(before)
    ours.finish()
    # The first step proves the model, the last one logs and saves; between them it may be asked whether to log.
    least = min(steps, key=len)
    assert "Loop.step" in least
    assert len(least) <= MOST_CALLS, least
