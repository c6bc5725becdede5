"""Runs of examples/gan.py in a process of a test, killed for real."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import danling_conf

REPOSITORY = Path(__file__).resolve().parents[2]


def trained(root: str, overrides: list[str], kill_at: int | None = None) -> Any:
    """Train in this process, as the rank that it is; or kill it after a step. The run, and the last loss."""
    import gan
    from danling_conf.runner.checkpoints import Checkpoints

    if kill_at is not None:
        after = Checkpoints.after_step

        def killing(self: Checkpoints, step: int) -> None:
            after(self, step)
            if step == kill_at:
                self.manager.drain()
                os.kill(os.getpid(), signal.SIGKILL)

        Checkpoints.after_step = killing  # type: ignore[method-assign]
    settings = [f"workspace_root={root}", "width=32", *overrides]
    config = danling_conf.compose(settings, config_name="gan", config_path=REPOSITORY / "conf")
    return gan.train(config)
