"""The last lines of a run: for a person, and one for a script."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from danling_conf.resolution.run_directory import Attempt
from danling_conf.runner.cadence import Cadence
from danling_conf.runner.score import Score

_OWN_WORDS = ("resume=", "auto_resume=", "steps=", "epochs=", "hydra/launcher=", "hydra.sweep", "-m", "--multirun")


def conclusion(
    *, attempt: Attempt, score: Score, results: Mapping[str, float], step: int, cadence: Cadence, resumable: bool
) -> list[str]:
    """Score, directory and how to go on; the last line is `step=N NAME=VALUE ... run=PATH`."""
    lines = []
    if score.best is not None:
        lines.append(f"score {score.key} {score.best:.6g}, the best, at step {score.best_step}")
    run = shown(attempt.run_directory)
    lines.append(f"run directory {run}")
    if resumable:
        lines.append(f"to go on: {resume_command(attempt, cadence)}")
    values = " ".join(f"{name}={value:.6g}" for name, value in results.items())
    lines.append(f"step={step} {values} run={run}".replace("  ", " "))
    return lines


def resume_command(attempt: Attempt, cadence: Cadence) -> str:
    """The command that goes on with a run, for twice its length."""
    budget = f"epochs={2 * cadence.epochs}" if cadence.epochs is not None else f"steps={2 * (cadence.steps or 1)}"
    script, *overrides = attempt.command
    words = [word for word in overrides if not word.startswith(_OWN_WORDS)]
    return shlex.join(["python", shown(Path(script)), *words, budget, f"resume={shown(attempt.run_directory)}"])


def shown(path: Path) -> str:
    """A path relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
