"""A multi-layer perceptron for small classification tasks."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn


@dataclass(kw_only=True)
class MLPConfig:
    """Settings of an `MLP`.

    Raises:
        ValueError: for a value that no model can be built from; the message names `model.<setting>`.
    """

    inputs: int = 64
    """Features of a sample."""
    width: int = 64
    """Features of each hidden layer."""
    depth: int = 2
    """Number of hidden layers."""
    classes: int = 10
    """Number of classes."""
    dropout: float = 0.0
    """Probability of dropping a hidden feature."""

    def __post_init__(self) -> None:
        for name in ("inputs", "width", "depth", "classes"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: a probability, 0 or more and less than 1")


class Layer(nn.Module):
    """Linear map, ReLU, dropout."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear(x).relu())


class MLP(nn.Module):
    """(batch, inputs) -> logits (batch, classes)."""

    def __init__(self, config: MLPConfig) -> None:
        super().__init__()
        widths = [config.inputs] + [config.width] * config.depth
        self.layers = nn.ModuleList(Layer(inputs, outputs, config.dropout) for inputs, outputs in pairwise(widths))
        self.head = nn.Linear(config.width, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
