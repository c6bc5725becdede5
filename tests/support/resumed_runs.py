"""Runs that are interrupted and resumed, in one process or on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from danling_conf import Runner, RunnerConfig
from tests.support.small import DropoutNet, Pairs, config, loss

SAVING: dict[str, Any] = {
    "checkpoint": {"load_only": False},
    "optim": {"type": "adamw", "lr": 0.01},
    "scheduler": {"type": "cosine"},
}
"""State in every part of a checkpoint; the model's dropout adds the generators."""


class Killed(Exception):
    """The process ended here."""


def splits() -> dict[str, Any]:
    return {"train": Pairs(24), "val": Pairs(9, seed=1)}


def settings_of(root: Path | str, settings: Mapping[str, Any]) -> RunnerConfig:
    """A resolved configuration of a run that saves."""
    merged = OmegaConf.merge(OmegaConf.create(SAVING), dict(settings))
    return config(root, OmegaConf.to_container(merged))  # type: ignore[arg-type]


def start(root: Path | str, settings: Mapping[str, Any]) -> Runner:
    """A runner that saves."""
    return Runner(settings_of(root, settings))


def train(
    root: Path | str, settings: Mapping[str, Any], *, kill_at: int | None = None, model: Any = DropoutNet
) -> dict[str, Any]:
    """Train to the end, or until the process is lost after step `kill_at`: losses, learning rates, weights, results."""
    runner = start(root, settings)
    losses, rates = [], []
    try:
        runner.prepare(model, splits(), loss=loss)
        began = runner.global_step
        for batch in runner.batches("train"):
            rates.append(runner.optimizer.param_groups[0]["lr"])
            losses.append(runner.step(batch).item())
            if runner.global_step == kill_at:
                raise Killed
        runner.finish()
    except Killed:
        pass
    finally:
        runner.close()
    return {
        "began": began,
        "losses": losses,
        "rates": rates,
        "weights": whole_weights(runner.model),
        "results": runner.results,
        "best": (runner.score.best, runner.score.best_step),
        "run": runner.world.attempt.run_directory,
        "attempt": runner.world.attempt.directory,
        "step": runner.global_step,
        "epoch": runner.epoch,
        "seed": runner.world.attempt.seed,
    }


def whole_weights(model: torch.nn.Module) -> dict[str, Any]:
    """Unsharded weights, on rank 0."""
    found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.detach().clone() for name, value in found.items()}


def checkpoints(run: Path) -> list[str]:
    """Names in a run's folder of checkpoints, hidden ones included."""
    folder = run / "checkpoints"
    return sorted(item.name for item in folder.iterdir()) if folder.is_dir() else []


def pointed(run: Path) -> dict[str, str]:
    """Where the names point to."""
    return {name: (run / "checkpoints" / name).resolve().name for name in ("latest", "best")}
