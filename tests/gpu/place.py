"""Where a part of the GPU script runs, the model that it trains, and what it returns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import danling_conf
from models.decoder import Decoder, DecoderConfig

Figures = dict[str, Any]
"""What a part has measured, by name; JSON can hold it."""
VOCABULARY = 256


class NotRun(Exception):
    """The part needs what this machine lacks. The message says what."""


@dataclass(frozen=True)
class Place:
    """Device, sizes and a folder of its own for one part."""

    device: str
    """`cuda` or `cpu`."""
    tiny: bool
    """Sizes that a CPU trains in a second, for trying the script itself."""
    folder: Path

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    def need_cuda(self, why: str) -> None:
        if not self.cuda:
            raise NotRun(f"needs CUDA: {why}")

    @property
    def model(self) -> DecoderConfig:
        if self.tiny:
            return DecoderConfig(width=32, depth=2, heads=2, context=16)
        return DecoderConfig(width=768, depth=12, heads=12, context=1024)

    @property
    def steps(self) -> int:
        return 6 if self.tiny else 30

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def overrides(self, *more: str) -> list[str]:
        base = [
            f"workspace_root={self.folder}", f"parallel.mesh_device_type={self.device}", "seed=3",
            f"steps={self.steps}", "dataloader.batch_size=4", "optim.lr=3e-3", "checkpoint=none", "log_interval=2",
        ]  # fmt: skip
        return [*base, *more]


class Sequences(Dataset[tuple[Tensor, Tensor]]):
    """Arithmetic progressions of tokens, which a decoder learns in a few steps; the same in every process."""

    def __init__(self, length: int, size: int = 512) -> None:
        generator = torch.Generator().manual_seed(0)
        start, stride = torch.randint(VOCABULARY, (2, size, 1), generator=generator)
        self.tokens = (start + (stride % 7 + 1) * torch.arange(length + 1)) % VOCABULARY

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


def loss_of(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1).float(), batch[1].flatten())


@dataclass
class Trained:
    """What a run has left."""

    losses: list[float]
    step_seconds: float
    """Median, without the first third of the steps, in which kernels are chosen and compiled."""
    peak_bytes: int
    runner: danling_conf.Runner = field(repr=False)
    weights: dict[str, Tensor] = field(repr=False)

    @property
    def run(self) -> Path:
        return self.runner.world.attempt.run_directory

    @property
    def figures(self) -> Figures:
        return {
            "loss": round(self.losses[-1], 4),
            "step_ms": round(1e3 * self.step_seconds, 3),
            "peak_mib": round(self.peak_bytes / 2**20, 1),
        }

    def learned(self) -> None:
        first, last = self.losses[0], self.losses[-1]
        assert last < 0.99 * first, f"the loss fell from {first:.4f} to {last:.4f} only"


def train(
    place: Place,
    *overrides: str,
    model: Callable[[], nn.Module] | None = None,
    until: int | None = None,
    at_step: Callable[[danling_conf.Runner, Any], None] | None = None,
    **options: Any,
) -> Trained:
    """Train on sequences, in a loop of one's own.

    Args:
        overrides: as on a command line.
        model: factory; the decoder where it is None.
        until: step after which the runner is closed, as by a program that ends there.
        at_step: called with the runner and the batch before each step.
        options: of `Runner.prepare`.
    """
    if place.cuda:
        torch.cuda.reset_peak_memory_stats()
    runner = danling_conf.Runner(danling_conf.compose(place.overrides(*overrides)))
    losses, moments = [], []
    options = {"loss": loss_of, **options}
    try:
        runner.prepare(model or partial(Decoder, place.model), {"train": Sequences(place.model.context)}, **options)
        for batch in runner.batches("train"):
            assert batch[0].device.type == place.device, f"a batch is on {batch[0].device}"
            if at_step is not None:
                at_step(runner, batch)
            losses.append(runner.step(batch))
            place.synchronize()
            moments.append(time.perf_counter())
            if runner.global_step == until:
                runner.checkpoints.drain()
                break
        else:
            runner.finish()
    finally:
        runner.close()
    weights = {name: whole(value) for name, value in runner.model.state_dict().items()}
    spans = [after - before for before, after in pairwise(moments)]
    steady = sorted(spans[len(spans) // 3 :])
    peak = torch.cuda.max_memory_allocated() if place.cuda else 0
    return Trained([item.item() for item in losses], steady[len(steady) // 2], peak, runner, weights)


def whole(value: Tensor) -> Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().cpu().clone()
