"""A model, data and a configuration that train in milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import Dataset

import danling_conf
from danling_conf import RunnerConfig

FEATURES, CLASSES = 5, 3


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """`size` samples of (features, class), the same in every process."""

    def __init__(self, size: int = 24, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, FEATURES, generator=generator)
        self.targets = self.inputs[:, :CLASSES].argmax(1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Net(nn.Module):
    """Two layers, and dropout where it is asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.dropout(torch.tanh(self.first(x))))


class DropoutNet(Net):
    """With dropout: a factory without arguments."""

    def __init__(self) -> None:
        super().__init__(dropout=0.5)


def loss(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output.float(), batch[1])


def config(root: Path | str, settings: Mapping[str, Any] | None = None) -> RunnerConfig:
    """A resolved configuration: six steps of SGD on batches of four, no checkpoints; `settings` change it."""
    base = {
        "workspace_root": str(root),
        "seed": 3,
        "optim": {"type": "sgd", "lr": 0.1},
        "dataloader": {"batch_size": 4},
        "checkpoint": {"load_only": True},
    }
    merged = OmegaConf.to_container(OmegaConf.merge(base, dict(settings or {})))
    if not {"steps", "epochs"} & merged.keys():
        merged["steps"] = 6
    return danling_conf.resolve(merged)


def runner(root: Path | str, settings: Mapping[str, Any] | None = None) -> danling_conf.Runner:
    return danling_conf.Runner(config(root, settings))


def losses_of(runner: danling_conf.Runner, model: Any, datasets: Mapping[str, Any], **options: Any) -> list[float]:
    """Train in a loop of one's own; the loss of every micro-batch."""
    runner.prepare(model, datasets, loss=options.pop("loss", loss), **options)
    losses = [runner.step(batch).item() for batch in runner.batches("train")]
    runner.finish()
    return losses


def weights(runner: danling_conf.Runner) -> dict[str, Tensor]:
    """The model's weights, by name."""
    return {name: value.detach().clone() for name, value in runner.model.state_dict().items()}


def equal(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Whether two sets of weights are bitwise the same."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
