"""Parts of an app of Hydra, made by `hydra.utils.instantiate`: its data, its model, and its loop for one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset


def spirals(size: int, noise: float) -> dict[str, TensorDataset]:
    """Two spirals of points in the plane, (size, 2), and which of them a point is on, for training and validation."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(size) % 2
    radius = torch.rand(size, generator=generator).sqrt()
    angle = 2 * math.pi * radius + math.pi * labels
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    points += noise * torch.randn(size, 2, generator=generator)
    part = size // 5
    return {
        "train": TensorDataset(points[part:], labels[part:]),
        "val": TensorDataset(points[:part], labels[:part]),
    }


class MLP(nn.Sequential):
    """A perceptron from points in the plane to two classes."""

    def __init__(self, width: int, depth: int) -> None:
        sizes = [2, *[width] * depth]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
        super().__init__(*hidden, nn.Linear(width, 2))


class Trainer:
    """A loop in one process."""

    def __init__(self, max_epochs: int, batch_size: int) -> None:
        self.max_epochs, self.batch_size = max_epochs, batch_size

    def fit(
        self, model: nn.Module, optimizer: Callable[[Iterable[Tensor]], Optimizer], splits: dict[str, TensorDataset]
    ) -> float:
        """Returns the loss on the validation split."""
        made = optimizer(model.parameters())
        for _ in range(self.max_epochs):
            for points, labels in DataLoader(splits["train"], self.batch_size, shuffle=True, drop_last=True):
                made.zero_grad()
                cross_entropy(model(points), labels).backward()
                made.step()
        points, labels = splits["val"].tensors
        return cross_entropy(model(points), labels).item()
