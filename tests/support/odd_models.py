"""Models that do what few do: hooks, state in attributes, tensors that no state holds, changes in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 8
_MASKS: dict[int, Tensor] = {}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    def __init__(self, block: Callable[[], nn.Module] = Block, embed: nn.Module | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH) if embed is None else embed
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 5)

    def before(self, h: Tensor) -> Tensor:
        return h

    def after(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(self.embed(x))
        for block in self.blocks:
            h = block(h)
        return self.head(self.after(h))


class Spectral(Block):
    """Vectors that forward changes, and a weight that is an attribute."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.spectral_norm(self.linear)


class Normalised(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x))


class PlainTensor(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(WIDTH) + 0.5

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.1 * self.calls)


class CountingBuffer(Block):
    """What backward needs is changed by the next forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.mul_(1.1)
        return super().forward(x) * self.calls


@functools.lru_cache
def mask(length: int) -> Tensor:
    return torch.ones(length, length).tril()


class Masked(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(mask(x.shape[1]) @ x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(x, inplace=True))


class Clamped(Block):
    def forward(self, x: Tensor) -> Tensor:
        self.linear.weight.data.clamp_(-0.2, 0.2)
        return super().forward(x)


class Reentrant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.linear, x, use_reentrant=True)


class KeepsInGlobal(Model):
    def before(self, h: Tensor) -> Tensor:
        return _MASKS.setdefault(h.shape[1], torch.ones(h.shape[1], h.shape[1]).tril()) @ h


class FeedsBack(Model):
    last: Tensor | None = None

    def before(self, h: Tensor) -> Tensor:
        return h if self.last is None else h - self.last

    def after(self, h: Tensor) -> Tensor:
        self.last = h.detach().mean((0, 1))
        return h


class NormalisedBetween(Model):
    """Running statistics of a module that no stage has, since it has no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False)

    def after(self, h: Tensor) -> Tensor:
        return self.norm(h)


class Codebook(Model):
    """A parameter that follows the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.code = nn.Parameter(torch.zeros(WIDTH), requires_grad=False)

    def before(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.code.lerp_(h.mean((0, 1)), 0.1)
        return h - self.code


class Looked(nn.Module):
    """Rows of a table, for numbers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(10, WIDTH, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x.abs().sum(-1) * 10).long() % 10)


def hooked() -> nn.Module:
    model = Model()
    model.register_forward_hook(lambda _, args, output: output * 1.5)
    return model


def hook_of_parameter() -> nn.Module:
    model = Model()
    model.head.weight.register_hook(lambda gradient: gradient * 2)
    return model


def compiled_head() -> nn.Module:
    model = Model()
    model.head = torch.compile(model.head, backend="eager")  # type: ignore[assignment]
    return model


def lazy() -> nn.Module:
    model = Model()
    model.head = nn.LazyLinear(5)
    return model


def scripted() -> nn.Module:
    model = Model()
    model.head = torch.jit.script(model.head)
    return model


ODD: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: functools.partial(Model, kind) for kind in (
        Spectral, Normalised, PlainTensor, Counting, CountingBuffer, Masked, InPlace, Clamped, Reentrant,
    )},
    **{kind.__name__: kind for kind in (KeepsInGlobal, FeedsBack, NormalisedBetween, Codebook)},
    **{make.__name__: make for make in (hooked, hook_of_parameter, compiled_head, lazy, scripted)},
    "sparse": lambda: Model(embed=Looked(sparse=True)),
    "max_norm": lambda: Model(embed=Looked(max_norm=1.0)),
}  # fmt: skip


def odd_batch(size: int, seed: int) -> dict[str, Tensor]:
    """Inputs and `targets` of any of them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(size, 6, 4, generator=generator),
        "targets": torch.randint(5, (size, 6), generator=generator),
    }
