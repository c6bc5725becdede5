"""Every optimizer of `torch.optim` on sharded parameters: the table says which of them torch can step there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from danling_conf.components.muon import ShardedMuon
from danling_conf.parallel import mesh as meshes
from danling_conf.schema.layout import Layout
from danling_conf.schema.torch_options import OPTIMIZERS
from tests.support import spawn

CLOSE = 1e-5


def _model(sparse: bool) -> nn.Module:
    torch.manual_seed(0)
    # Rows that do not divide evenly, and a rank without any.
    return nn.Sequential(nn.Embedding(8, 6, sparse=sparse), nn.Linear(6, 3, bias=False), nn.Linear(3, 1, bias=False))


def _train(model: nn.Module, name: str) -> None:
    # The only one that takes sparse gradients takes no others; of Muon, this package has a class of its own.
    parameters = list(model[0].parameters() if name == "SparseAdam" else model.parameters())
    kind = ShardedMuon if name == "Muon" else getattr(torch.optim, name)
    optimizer = kind(parameters, lr=1e-2)
    inputs = torch.tensor([[0, 1, 2], [3, 5, 7]])
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def _failures(names: list[str]) -> dict[str, str]:
    """The optimizers that fail, or that do other than a single process, each with what is wrong."""
    mesh = meshes.make(Layout(shard=2, fsdp=True), "cpu")
    failed = {}
    for name in names:
        alone, sharded = (_model(sparse=name == "SparseAdam") for _ in range(2))
        _train(alone, name)
        fully_shard(sharded, mesh=mesh["shard"])
        try:
            _train(sharded, name)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            continue
        pairs = zip(alone.parameters(), sharded.parameters(), strict=True)
        distance = max((one - other.full_tensor()).abs().max().item() for one, other in pairs)
        if distance > CLOSE:
            failed[name] = f"differs by {distance}"
    return failed


@pytest.mark.slow
def test_the_table_says_which_optimizers_step_sharded_parameters():
    known = [name for name, entry in OPTIMIZERS.items() if not entry.needs_closure]
    for failed in spawn.shared(_failures, 2, known):
        assert sorted(failed) == [name for name in known if not OPTIMIZERS[name].sharded], failed
