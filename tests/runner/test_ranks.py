"""Two ranks of one run: exact evaluation, one outcome, the same batch as a single process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as distributed
from torchmetrics.classification import MulticlassAccuracy

from danling_conf import ConfigRefused
from tests.support.small import CLASSES, DropoutNet, Net, Pairs, loss, losses_of, runner
from tests.support.spawn import run

SIZES = (1, 2, 7, 8, 9, 13)
"""Of held-out splits with batches of four: no sample on rank 1, half a batch each, a batch more on one of them."""
DDP2 = {"parallel": {"axes": {"replicate": 2}}}
FSDP2 = {"parallel": {"axes": {"shard": 2}}, "fsdp": {"enabled": True}}


def evaluations(root: str, layout: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Train three steps, then evaluate splits of all sizes."""
    torch.set_num_threads(1)
    settings = {"steps": 3, "dataloader": {"batch_size": batch_size, "val": {"batch_size": 4}}, **layout}
    ours = runner(root, {**settings, "score_name": "accuracy"})
    splits = {"val" if size == SIZES[-1] else f"held{size}": Pairs(size, seed=size) for size in SIZES}
    metrics = {"accuracy": lambda: MulticlassAccuracy(CLASSES, average="micro")}
    losses = losses_of(ours, Net, {"train": Pairs(), **splits}, metrics=metrics)
    return {"results": ours.results, "losses": losses, "score": ours.score.best, "steps": ours.global_step,
            "run": str(ours.world.attempt.run_directory)}  # fmt: skip


def on_two_ranks(root: str) -> dict[str, Any]:
    return {"ddp2": evaluations(root, DDP2, 4), "fsdp2": evaluations(root, FSDP2, 4)}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = str(tmp_path_factory.mktemp("ranks"))
    ranks = run(on_two_ranks, 2, root)
    return {"single": [evaluations(root, {}, 8)], **{name: [rank[name] for rank in ranks] for name in ranks[0]}}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_evaluation_is_that_of_a_single_process_whatever_the_size(outcomes: dict[str, Any], layout: str) -> None:
    expected = outcomes["single"][0]["results"]
    names = {
        f"{split}.{name}" for split in ("val", *(f"held{size}" for size in SIZES[:-1])) for name in ("loss", "accuracy")
    }
    assert expected.keys() == {"train.loss", *names}
    for found in outcomes[layout]:
        assert found["results"] == pytest.approx(expected, rel=1e-5)
        assert found["score"] == pytest.approx(outcomes["single"][0]["score"])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_two_ranks_train_on_one_global_batch(outcomes: dict[str, Any], layout: str) -> None:
    first, second = outcomes[layout]
    mean = [(left + right) / 2 for left, right in zip(first["losses"], second["losses"], strict=True)]
    assert mean == pytest.approx(outcomes["single"][0]["losses"], rel=1e-5)
    assert first["losses"] != second["losses"]
    assert first["run"] == second["run"]


def disagree(root: str) -> str:
    lr = 0.1 + distributed.get_rank()
    with pytest.raises(ConfigRefused) as refusal:
        runner(root, {**DDP2, "optim": {"lr": lr}, "data": {"rank": distributed.get_rank()}})
    return str(refusal.value)


def dropout_of(root: str) -> Any:
    """What dropout leaves of the same input, on this rank."""
    ours = runner(root, DDP2)
    ours.prepare(DropoutNet, {"train": Pairs()}, loss=loss)
    kept = ours.model.module.dropout(torch.ones(64))
    ours.close()
    return kept


def uneven_budget(root: str) -> str:
    """A training split that is too small for two ranks."""
    ours = runner(root, DDP2)
    with pytest.raises(ConfigRefused) as refusal:
        ours.fit(Net, {"train": Pairs(5)}, loss=loss)
    return str(refusal.value)


def nothing_claimed(root: str) -> list[str]:
    return sorted(item.name for item in Path(root).rglob("run.json"))


def refusals(root: str) -> dict[str, Any]:
    return {
        "disagree": disagree(f"{root}/disagree"),
        "claimed": nothing_claimed(f"{root}/disagree"),
        "dropout": dropout_of(root),
        "too small": uneven_budget(root),
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(refusals, 2, str(tmp_path_factory.mktemp("refusals")))


@pytest.mark.slow
def test_ranks_that_disagree_all_stop_with_the_keys_that_differ(refused: list[dict[str, Any]]) -> None:
    for found in refused:
        assert "2 faults" in found["disagree"]
        assert "optim.lr=1.1\n      rank 1 has this, and rank 0 has 0.1" in found["disagree"]
        assert "data.rank=1\n      rank 1 has this, and rank 0 has 0" in found["disagree"]
        assert found["claimed"] == []


@pytest.mark.slow
def test_dropout_differs_between_data_ranks(refused: list[dict[str, Any]]) -> None:
    assert not torch.equal(refused[0]["dropout"], refused[1]["dropout"])


@pytest.mark.slow
def test_a_split_too_small_for_the_ranks_is_refused_on_all(refused: list[dict[str, Any]]) -> None:
    for found in refused:
        assert "dataloader.batch_size=4" in found["too small"]
        assert "the 5 samples of split train make no batch: one takes 4 on each of 2 data ranks" in found["too small"]


def test_the_mean_weighs_batches_by_their_samples(tmp_path: Path) -> None:
    """Nine samples in batches of four: the last one counts for one sample."""
    ours = runner(tmp_path, {"steps": 1})
    held_out = Pairs(9, seed=1)
    losses_of(ours, Net, {"train": Pairs(), "val": held_out})
    with torch.no_grad():
        expected = loss(ours.model(held_out.inputs), (None, held_out.targets)).item()
    assert ours.results["val.loss"] == pytest.approx(expected, rel=1e-6)
