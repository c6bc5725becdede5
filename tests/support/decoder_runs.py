"""Runs of a small decoder under any layout, killed for real: what tests of exactness and of other layouts train."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import Dataset

import danling_conf
from danling_conf.checkpoint.gather import gather
from danling_conf.checkpoint.state import MODEL, model_tensors
from danling_conf.groups.source import layout_settings
from models.decoder import Decoder, DecoderConfig

LENGTH, VOCABULARY = 8, 16

SETTINGS: dict[str, Any] = {
    "seed": 5,
    "steps": 9,
    "accum_steps": 2,
    "max_grad_norm": 0.1,
    "eval_interval": 100,
    "optim": {"type": "adamw", "lr": 0.01},
    "scheduler": {"type": "cosine"},
    "dataloader": {"batch_size": 2},
    "checkpoint": {"interval": 1},
}
"""Everything that has state: moments, a schedule, dropout, clipping, accumulation. Three to twelve steps an epoch."""


class Texts(Dataset[tuple[Tensor, Tensor]]):
    """Random tokens and their successors, the same in every process; a sample knows its index by its first tokens."""

    def __init__(self, size: int = 48) -> None:
        tokens = torch.randint(0, VOCABULARY, (size, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.tokens[index, :-1], self.tokens[index, 1:], index


def model() -> Decoder:
    return Decoder(
        DecoderConfig(width=16, depth=2, heads=2, hidden=32, context=LENGTH, vocab_size=VOCABULARY, dropout=0.2)
    )


def loss(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2).float(), batch[1].flatten())


def settings_of(root: Path | str, layout: str, changes: Mapping[str, Any] | None = None) -> danling_conf.RunnerConfig:
    """The resolved configuration of a run under a layout."""
    merged = OmegaConf.merge(
        OmegaConf.create({**SETTINGS, "workspace_root": str(root)}), layout_settings(layout), dict(changes or {})
    )
    return danling_conf.resolve(OmegaConf.to_container(merged))


def train(
    root: Path | str, layout: str, changes: Mapping[str, Any] | None = None, *, kill_at: int | None = None
) -> dict[str, Any]:
    """Train to the end; or kill this process, as `kill -9` does, after an optimizer step.

    Returns:
        This rank's losses of every micro-batch and the samples they were of, and on rank 0 the final weights.
    """
    runner = danling_conf.Runner(settings_of(root, layout, changes))
    losses, samples = [], []
    try:
        runner.prepare(model, {"train": Texts()}, loss=loss)
        began = runner.global_step
        for batch in runner.batches("train"):
            samples.append(batch[2].tolist())
            losses.append(runner.step(batch).item())
            if runner.global_step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        runner.finish()
        whole = gather(model_tensors(runner.parts), runner.world.layout, runner.world.ranks.rank)
        weights = {name.removeprefix(MODEL): tensor.clone() for name, tensor in whole}
        moments = {
            f"{index}.{key}": value.full_tensor().clone() if hasattr(value, "full_tensor") else value.clone()
            for index, state in enumerate(runner.optimizer.state.values())
            for key, value in state.items()
        }
    finally:
        runner.close()
    return {
        "began": began,
        "losses": losses,
        "samples": samples,
        "weights": weights,
        "moments": moments,
        "run": runner.world.attempt.run_directory,
        "epoch": runner.epoch,
        "rate": runner.optimizer.param_groups[0]["lr"],
    }
