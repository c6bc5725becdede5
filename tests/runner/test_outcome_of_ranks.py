"""What two ranks share beside gradients: evaluated buffers, results, batches; in mixed precision too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import IterableDataset

from danling_conf.components import dataloader
from danling_conf.runner.data import shortest_length, while_all_have_one
from danling_conf.schema.dataloader import DataloaderConfig
from tests.support.small import CLASSES, FEATURES, Pairs, loss, losses_of, runner
from tests.support.spawn import run

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp2": {"parallel": {"axes": {"replicate": 2}}},
    "fsdp2": {"parallel": {"axes": {"shard": 2}}, "fsdp": {"enabled": True}},
}
MIXED = {
    "ddp2": {**LAYOUTS["ddp2"], "precision": "bf16"},
    "fsdp2": {
        **LAYOUTS["fsdp2"],
        "fsdp": {"enabled": True, "mp_policy": {"param_dtype": "bf16", "reduce_dtype": "fp32"}},
    },
}
HELD_OUT = Pairs(9, seed=1)


class Normed(nn.Module):
    """Batch normalisation, whose running statistics follow the samples of a rank."""

    seen: set[torch.dtype] = set()

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.seen.add(hidden.dtype)
        return self.second(torch.tanh(self.norm(hidden)))


class Share:
    """A metric that does not synchronise itself: the mean class of the samples that this rank saw."""

    higher_is_better = True

    def reset(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, output: Tensor, targets: Tensor) -> None:
        self.seen.append(targets)

    def compute(self) -> float:
        return torch.cat(self.seen).double().mean().item()


def outcome(root: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train three steps and evaluate; what there is on this rank, and what rank 0 would save."""
    Normed.seen = set()
    settings = {"steps": 3, "optim": {"type": "sgd", "lr": 0.1}, "score_name": "share", **settings}
    ours = runner(root, settings)
    losses = losses_of(ours, Normed, {"train": Pairs(), "val": HELD_OUT}, metrics={"share": Share})
    whole = get_model_state_dict(ours.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    own = {name.removeprefix("module."): buffer.clone() for name, buffer in ours.model.named_buffers()}
    return {"losses": losses, "results": ours.results, "score": ours.score.best, "whole": whole, "buffers": own,
            "dtypes": Normed.seen, "kept": {item.dtype for item in ours.model.parameters()}}  # fmt: skip


def outcomes_on_ranks(root: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    plain = {name: outcome(root, settings) for name, settings in LAYOUTS.items()}
    return {**plain, **{f"{name} mixed": outcome(root, settings) for name, settings in MIXED.items()}}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(outcomes_on_ranks, 2, str(tmp_path_factory.mktemp("outcomes")))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_evaluated_is_what_is_saved(ranks: list[dict[str, Any]], layout: str) -> None:
    first, second = (rank[layout] for rank in ranks)
    assert first["losses"] != second["losses"]  # other samples, and so other statistics
    model = Normed()
    model.load_state_dict(first["whole"])
    with torch.no_grad():
        expected = loss(model.eval()(HELD_OUT.inputs), (None, HELD_OUT.targets)).item()
    for found in (first, second):
        assert found["results"]["val.loss"] == pytest.approx(expected, rel=1e-5)
        for name in ("norm.running_mean", "norm.running_var"):
            assert torch.equal(found["buffers"][name], first["whole"][name])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_metric_without_synchronisation_is_rank_zeros_on_all(ranks: list[dict[str, Any]], layout: str) -> None:
    mine = HELD_OUT.targets[0::2].double().mean().item()
    assert mine != pytest.approx(HELD_OUT.targets[1::2].double().mean().item())
    for rank in ranks:
        assert rank[layout]["results"]["val.share"] == rank[layout]["score"] == pytest.approx(mine)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MIXED)
def test_mixed_precision_trains(ranks: list[dict[str, Any]], layout: str) -> None:
    for rank in ranks:
        mixed, plain = rank[f"{layout} mixed"], rank[layout]
        assert (mixed["dtypes"], plain["dtypes"]) == ({torch.bfloat16}, {torch.float32})
        assert mixed["kept"] == {torch.float32}
        assert mixed["losses"] == pytest.approx(plain["losses"], rel=0.05)
        assert mixed["losses"] != plain["losses"]
    first, second = (rank[f"{layout} mixed"]["results"] for rank in ranks)
    assert first == second


class Shards(IterableDataset[int]):
    """Numbers, dealt out by `shard`."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    def shard(self, num_shards: int, index: int) -> Shards:
        return Shards(self.numbers[index::num_shards])


def uneven_epochs() -> dict[str, Any]:
    rank = distributed.get_rank()
    loader = dataloader.make(Shards(list(range(5))), DataloaderConfig(batch_size=1), "train",
                             data_rank=rank, data_degree=2)  # fmt: skip
    taken = []
    for _ in range(2):
        for batch in while_all_have_one(iter(loader)):
            distributed.all_reduce(batch)  # as gradients are
            taken.append(batch.item())
        distributed.barrier()  # what follows an epoch
    nothing = list(while_all_have_one(iter([1] * rank)))
    lengths = [shortest_length(len(loader)), shortest_length(rank), shortest_length(None if rank else 4)]
    return {"taken": taken, "nothing": nothing, "lengths": lengths}


@pytest.mark.slow
def test_uneven_shares_of_a_training_split_give_equally_many_batches() -> None:
    """Five samples: 0, 2, 4 on one rank, and 1, 3 on the other."""
    for found in run(uneven_epochs, 2):
        assert found == {"taken": [1, 5, 1, 5], "nothing": [], "lengths": [2, 0, None]}


def test_a_single_process_takes_every_batch() -> None:
    assert list(while_all_have_one(iter([1, 2, 3]))) == [1, 2, 3]
    assert (shortest_length(3), shortest_length(None)) == (3, None)


def resumed_on_ranks(root: str) -> dict[str, Any]:
    from tests.support.resumed_runs import train

    torch.set_num_threads(1)
    found = {}
    for name, layout in LAYOUTS.items():
        settings = {**layout, "steps": 5, "eval_interval": 2, "checkpoint": {"load_only": False, "interval": 2}}
        whole = train(f"{root}/whole/{name}", settings, model=Normed)
        part = train(f"{root}/part/{name}", settings, kill_at=3, model=Normed)
        resumed = train(f"{root}/part/{name}", {**settings, "resume": str(part["run"])}, model=Normed)
        found[name] = {"whole": whole, "part": part, "resumed": resumed}
    return found


@pytest.mark.slow
def test_running_statistics_are_resumed(tmp_path: Path) -> None:
    ranks = run(resumed_on_ranks, 2, str(tmp_path))
    for layout in LAYOUTS:
        for number, rank in enumerate(ranks):
            whole, resumed = rank[layout]["whole"], rank[layout]["resumed"]
            assert resumed["began"] == 2
            assert resumed["losses"] == whole["losses"][2:]
            assert resumed["results"] == whole["results"]
            assert resumed["best"] == whole["best"]
            if number == 0:
                assert all(torch.equal(resumed["weights"][name], value) for name, value in whole["weights"].items())
                assert whole["weights"]["norm.running_mean"].abs().sum() > 0
