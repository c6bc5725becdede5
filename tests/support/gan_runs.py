"""Runs of examples/gan.py in a process of a test, killed for real."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import danling_conf

REPOSITORY = Path(__file__).resolve().parents[2]


def trained(root: str, overrides: list[str], kill_at: int | None = None, stop_at: int | None = None) -> Any:
    """Train in this process, as the rank that it is; or kill it after a step, or ask the first rank to stop. The last
    loss, or the words of a run that has stopped."""
    import gan
    from danling_conf.records.stopped import Stopped
    from danling_conf.runner.checkpoints import Checkpoints

    if kill_at is not None:
        after = Checkpoints.after_step

        def killing(self: Checkpoints, step: int) -> None:
            after(self, step)
            if step == kill_at:
                self.manager.drain()
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.after_step = killing  # type: ignore[method-assign]
    if stop_at is not None:
        after = Checkpoints.after_step

        def stopping(self: Checkpoints, step: int) -> None:
            if step == stop_at and os.environ.get("RANK", "0") == "0":
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)  # until the thread that listens has heard it
            after(self, step)

        Checkpoints.after_step = stopping  # type: ignore[method-assign]
    settings = [f"workspace_root={root}", "width=32", *overrides]
    config = danling_conf.compose(settings, config_name="gan", config_path=REPOSITORY / "conf")
    try:
        return gan.train(config)
    except Stopped as stopped:
        return str(stopped)
