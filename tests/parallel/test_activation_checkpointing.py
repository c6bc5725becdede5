from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.utils._python_dispatch import TorchDispatchMode

from danling_conf.parallel import activation_checkpointing as recomputation
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return x + scale * self.dropout(self.layer(x).sigmoid())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return x.sum()


class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def step(**settings: Any) -> tuple[Counter[str], list[torch.Tensor]]:
    """Operators that a forward and a backward call, and the gradients."""
    torch.manual_seed(0)
    model = recomputation.apply(Model(), ActivationCheckpointingConfig(**settings))
    with Count() as count:
        model(torch.randn(3, 4)).backward()
    return count.calls, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("settings", "products", "sigmoids"),
    [
        ({"mode": "none"}, 4, 4),
        ({"mode": "full"}, 8, 8),
        ({"mode": "every_n", "every_n": 2}, 6, 6),
        ({"mode": "every_n", "every_n": 3}, 5, 5),
        ({"mode": "selective"}, 4, 8),
        ({"mode": "selective", "keep_ops": ["aten.sigmoid.default"]}, 8, 4),
        ({"mode": "selective", "keep_ops": ["aten.sigmoid", "torch.ops.aten.addmm.default"]}, 4, 4),
    ],
)
def test_each_mode_recomputes_what_it_says_and_gradients_stay(
    settings: dict[str, Any], products: int, sigmoids: int
) -> None:
    calls, gradients = step(**settings)
    assert (calls["aten.addmm.default"], calls["aten.sigmoid.default"]) == (products, sigmoids)
    for found, expected in zip(gradients, step(mode="none")[1], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("keep", "recomputed"), [(None, 2), (["aten.addmm"], 0)], ids=["default", "named"])
def test_every_second_product_is_computed_again_unless_named(keep: list[str] | None, recomputed: int) -> None:
    model = nn.Module()
    # The last result of a block is needed by nothing in it, and so never computed again.
    layers = [nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Sigmoid()]
    model.blocks = nn.ModuleList([nn.Sequential(*copy.deepcopy(layers)) for _ in range(2)])
    recomputation.apply(model, ActivationCheckpointingConfig(mode="selective", keep_ops=keep))
    with Count() as count:
        first = model.blocks[0](torch.randn(3, 4))
        model.blocks[1](first).sum().backward()
    assert count.calls["aten.addmm.default"] == 6 + recomputed


def test_names_and_classes_stay() -> None:
    plain, model = Model(), recomputation.apply(Model(), ActivationCheckpointingConfig(mode="full"))
    names = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(get_model_state_dict(model)) == names
    assert type(model.blocks[0]) is Block


def test_a_deep_copy_recomputes_its_own_blocks() -> None:
    model = recomputation.apply(Model(), ActivationCheckpointingConfig(mode="full"))
    copied = copy.deepcopy(model)
    copied(torch.randn(3, 4)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in copied.parameters())


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Model(), {"mode": "selective", "keep_ops": ["aten.mm.default", "aten.nm"]}, r"keep_ops\[1\]=aten\.nm\n"),
        (Model(), {"mode": "selective", "keep_ops": ["mm"]}, r"(?s)keep_ops\[0\]=mm\n.*fix: .*aten\.mm\.default"),
        (nn.Linear(2, 2), {"mode": "full"}, r"mode=full\n\s+Linear has no repeated blocks"),
        (Model(), {"mode": "every_n", "every_n": 5}, r"every_n=5\n\s+Model has 4 repeated blocks"),
    ],
)
def test_what_cannot_take_effect_is_refused(model: nn.Module, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recomputation.apply(model, ActivationCheckpointingConfig(**settings))


def test_keywords_rebuild_the_section() -> None:
    build = recomputation.from_keywords(mode="full")
    assert isinstance(build(Model()), Model)
    with pytest.raises(ValueError, match=r"activation_checkpointing\.mode=most\n\s+it must be one of none, full"):
        recomputation.from_keywords(mode="most")
