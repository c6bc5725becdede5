"""A plan or a forward that computes something else over the axes is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danling_conf.groups.layout_names import parse_layout
from danling_conf.parallel import mesh
from danling_conf.parallel.model import assemble
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import SettingError
from tests.support.spawn import run

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.scale, self.proj = nn.Linear(16, 48), nn.LayerNorm(4), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (item.unflatten(-1, (-1, 4)).transpose(1, 2) for item in self.qkv(x).chunk(3, dim=-1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        heads = self.up(x).unflatten(-1, (-1, 4))
        return x + self.down(self.scale(heads).flatten(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


RIGHT = {"blocks.*.up": "colwise", "blocks.*.scale": "replicated_with_grad_allreduce", "blocks.*.down": "rowwise"}
FUSED = {**RIGHT, "blocks.*.qkv": "colwise", "blocks.*.proj": "rowwise"}
UNSUMMED = {name: style for name, style in RIGHT.items() if name != "blocks.*.scale"}


def refusals(plans: list[dict[str, str]]) -> list[str | None]:
    made = mesh.make(parse_layout("tp2"), "cpu")
    found: list[str | None] = []
    for plan in plans:
        try:
            assemble(
                Net,
                layout=parse_layout("tp2"),
                mesh=made,
                device=torch.device("cpu"),
                seed=0,
                fsdp=FsdpConfig(),
                compile=CompileConfig(),
                activation_checkpointing=ActivationCheckpointingConfig(),
                parallel=ParallelConfig(tensor_plan=plan),
                example=lambda: torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)),
                forward=_call,
            )
            found.append(None)
        except SettingError as error:
            found.append(f"{error.violation.path}: {error.violation.rule}")
    return found


def _call(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return model(batch)


def test_a_wrong_plan_is_refused_with_its_entries_and_a_right_one_is_not() -> None:
    right, fused, unsummed = run(refusals, 2, [RIGHT, FUSED, UNSUMMED])[0]
    assert right is None
    assert fused is not None
    assert "blocks.*.qkv: colwise" in fused
    assert "computes something else in blocks.0.proj" in fused
    assert unsummed is not None
    assert "gives blocks.0.scale.weight another gradient" in unsummed
