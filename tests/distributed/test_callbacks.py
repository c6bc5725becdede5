"""Callbacks over several ranks: the average of one process, one mean of all ranks, one rank that stops all."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from danling_conf import EMA, Callback, ConfigRefused, SamplePredictions
from danling_conf.groups.layout_names import parse_layout
from danling_conf.runner.callbacks import TrainingRun
from models.decoder import Decoder, DecoderConfig
from tests.distributed.test_runner import LENGTH, VOCABULARY, Tokens, loss
from tests.support.small import Net, Pairs, runner
from tests.support.spawn import run

pytestmark = pytest.mark.slow

LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2")


class Logs(Callback):
    """Logs a value of each rank, and another name on each rank; one rank stops the run."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def on_step_end(self, runner: TrainingRun) -> None:
        rank = runner.world.ranks.rank
        runner.log("own.rank", torch.tensor(float(rank)))
        runner.log(f"own.of-{rank}", rank + 10)
        if runner.global_step == self.stop_at and rank == 1:
            runner.stop("rank 1 has enough")


def whole(tensors: Any) -> dict[str, Tensor]:
    return {name: (item.full_tensor() if isinstance(item, DTensor) else item).detach().clone()
            for name, item in tensors.items()}  # fmt: skip


def trained(root: str, name: str, changes: dict[str, Any], stop_at: int | None = None) -> dict[str, Any]:
    layout = parse_layout(name)
    settings = {
        "steps": 4,
        "eval_interval": 2,
        "evaluate_first": True,
        "log_interval": 1,
        "optim": {"type": "adamw", "lr": 0.01},
        "dataloader": {"batch_size": 8 // layout.data_degree, "val": {"batch_size": 4}},
        "checkpoint": {"load_only": False, "interval": 2},
        "parallel": {"axes": layout.degrees()},
        "fsdp": {"enabled": layout.fsdp},
        **changes,
    }
    work = runner(f"{root}/{name}", settings)
    config = DecoderConfig(width=16, depth=2, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY)
    average = EMA(0.7)
    several = layout.world_size > 1
    callbacks = [average, SamplePredictions(2), *([Logs(stop_at)] if several else [])]
    splits = {"train": Tokens(64, 0), "val": Tokens(8, 1)}
    work.fit(functools.partial(Decoder, config), splits, loss=loss, callbacks=callbacks)
    folder = work.world.attempt.run_directory
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "run": str(folder),
        "step": work.global_step,
        "average": whole(average.tensors()),
        "weights": whole(dict(work.setup.assembled.named_parameters())),
        "results": work.results,
        "texts": (folder / "texts.jsonl").read_text().splitlines(),
        "logged": {key: value for line in lines for key, value in line.items() if key.startswith("own.")},
    }


@functools.cache
def alone(root: str) -> dict[str, Any]:
    return trained(root, "single", {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_average_and_logged_values(root: str, name: str) -> None:
    expected = alone(root)
    ranks = run(trained, 2, root, name, {})
    found: dict[str, Tensor] = {key: item for rank in ranks for key, item in rank["average"].items()}
    assert found.keys() == expected["average"].keys()
    for key, item in expected["average"].items():
        torch.testing.assert_close(found[key], item, rtol=1e-4, atol=1e-5, msg=key)
    assert ranks[0]["results"]["val.loss"] == pytest.approx(expected["results"]["val.loss"], rel=1e-5)
    assert ranks[0]["logged"] == {"own.rank": 0.5, "own.of-0": 10.0, "own.of-1": 11.0}
    assert len(ranks[0]["texts"]) == len(expected["texts"]) == 3


@pytest.mark.parametrize("name", ["ddp2", "fsdp2"])
def test_resumed_average_is_bitwise_that_of_a_whole_run(root: str, name: str) -> None:
    whole_run = run(trained, 2, f"{root}/whole", name, {})
    first = run(trained, 2, f"{root}/cut", name, {"steps": 2})
    again = run(trained, 2, f"{root}/cut", name, {"resume": first[0]["run"]})
    for rank in range(2):
        for part in ("weights", "average"):
            for key, item in whole_run[rank][part].items():
                assert torch.equal(again[rank][part][key], item), (rank, part, key)


def test_one_rank_stops_all(root: str) -> None:
    ranks = run(trained, 2, f"{root}/stopped", "ddp2", {"steps": 40, "eval_interval": 40}, 2)
    assert [rank["step"] for rank in ranks] == [3, 3]
    assert "val.loss" in ranks[0]["results"]


def different(root: str) -> str:
    work = runner(root, {"parallel": {"axes": parse_layout("ddp2").degrees()}})
    callbacks = [Logs()] if work.world.ranks.rank else []
    try:
        work.fit(Net, {"train": Pairs()}, callbacks=callbacks)
    except ConfigRefused as refusal:
        return refusal.violations[0].rule
    return ""


def test_ranks_with_different_callbacks_are_refused(root: str) -> None:
    assert run(different, 2, f"{root}/different") == ["rank 1 has Logs, and rank 0 has none"] * 2
