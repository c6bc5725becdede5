"""Last lines of a run: some for a person, and one for a script."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from danling_conf.records.run_directory import Attempt
from danling_conf.runner.cadence import Cadence
from danling_conf.runner.score import Score
from danling_conf.schema.printable import override, printable, shell_line
from danling_conf.topology.rank_environment import RankEnvironment

_OF_THE_LAUNCH = ("resume=", "auto_resume=", "hydra/launcher=", "hydra.sweep", "-m", "--multirun")


def conclusion(
    *,
    attempt: Attempt,
    ranks: RankEnvironment,
    score: Score,
    results: Mapping[str, float],
    step: int,
    cadence: Cadence,
    resumable: bool,
) -> list[str]:
    """Score, directory and the command that resumes the run; the last line is `step=N NAME=VALUE ... run=PATH`."""
    lines = []
    if score.best is not None:
        lines.append(f"score {score.key} {score.best:.6g}, the best, at step {score.best_step}")
    run = shown(attempt.run_directory)
    lines.append(printable(f"run directory {run}"))
    if resumable:
        lines.append(f"to resume: {resume_command(attempt, ranks, cadence)}")
    values = " ".join(f"{name}={value:.6g}" for name, value in results.items())
    lines.append(f"step={step} {values} {shell_line(f'run={run}')}".replace("  ", " "))
    return lines


def resume_command(attempt: Attempt, ranks: RankEnvironment, cadence: Cadence) -> str:
    """The command that resumes a run, for twice its length."""
    key, length = ("epochs", cadence.epochs) if cadence.epochs is not None else ("steps", cadence.steps or 1)
    script, *overrides = attempt.command
    argv = [word for word in overrides if not word.startswith((f"{key}=", *_OF_THE_LAUNCH))]
    resume = override("resume", shown(attempt.run_directory))
    return shell_line(*_program(ranks), shown(Path(script)), *argv, f"{key}={2 * length}", resume)


def resume_stopped_command(attempt: Attempt, ranks: RankEnvironment) -> str:
    """The command that resumes a run that was stopped."""
    script, *overrides = attempt.command
    argv = [word for word in overrides if not word.startswith(_OF_THE_LAUNCH)]
    return shell_line(*_program(ranks), shown(Path(script)), *argv, override("resume", shown(attempt.run_directory)))


def _program(ranks: RankEnvironment) -> list[str]:
    """What runs a script as it was run, with as many ranks."""
    if ranks.launcher == "srun":
        return ["srun", "--ntasks", str(ranks.world_size), "python"]
    if ranks.launcher == "torchrun":
        nodes = ranks.world_size // ranks.local_world_size
        several = ["--nnodes", str(nodes)] if nodes > 1 else []
        return ["torchrun", *several, "--nproc-per-node", str(ranks.local_world_size)]
    return ["python"]


def shown(path: Path) -> str:
    """A path relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
