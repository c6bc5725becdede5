"""An app of plain Hydra with a loop of its own: what our presets compose, `instantiate` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import TensorDataset

from tests.support.spawn import run

CONF = Path(__file__).with_name("flat") / "conf"


def trained() -> dict[str, Any]:
    """On one of two ranks: the sections as the app's own loop makes them, and a few steps."""
    chosen = ["parallel=fsdp2", "fsdp=fp32", "compile=aot_eager", "optim=sgd", "scheduler=cosine", "dataloader=ordered"]
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose("config", [*(f"+{item}" for item in chosen), "dataloader.batch_size=4", "optim.lr=0.05"])
        wrong = hydra.compose("config", ["+fsdp=bf16", "fsdp.mp_policy.param_dtype=f32"])
    mesh = instantiate(config.parallel)()
    torch.manual_seed(0)
    model = instantiate(config.compile)(nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 1)))
    model = instantiate(config.fsdp)(model, mesh=mesh)
    optimizer = instantiate(config.optim)(model)
    schedule = instantiate(config.scheduler)(optimizer, total_steps=8)
    inputs = torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
    losses = []
    for values, targets in instantiate(config.dataloader)(data, split="train", seed=0):
        loss = ((model(values) - targets) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    with pytest.raises(InstantiationException, match="bf16"):
        instantiate(wrong.fsdp)
    sharded = isinstance(model, FSDPModule), model[0].weight.placements[0].is_shard()
    return {"losses": losses, "rate": optimizer.param_groups[0]["lr"], "sharded": sharded}


@pytest.mark.slow
def test_every_section_is_made_alone() -> None:
    for found in run(trained, 2):
        assert found["sharded"] == (True, True)
        assert len(found["losses"]) == 8
        assert sum(found["losses"][4:]) < sum(found["losses"][:4])  # of batches that differ
        assert found["rate"] == pytest.approx(0.005)  # a tenth, at the end
