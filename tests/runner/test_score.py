"""Model selection: which number is the score, which step is the best, when a run gives up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torchmetrics.classification import MulticlassAccuracy

from danling_conf import ConfigRefused
from danling_conf.runner.score import infer_split
from tests.runner.test_scheduler import Scripted
from tests.support.small import CLASSES, Net, Pairs, loss, runner


@pytest.mark.parametrize(
    ("configured", "splits", "expected"),
    [
        (None, ["train", "test", "validate", "val"], "val"),
        (None, ["train", "test", "validate"], "validate"),
        (None, ["train", "dev", "test"], "dev"),
        (None, ["train", "test", "validation"], "validation"),
        (None, ["train", "test", "val_unseen"], "val_unseen"),
        (None, ["train"], "train"),
        (None, ["train_clean", "train", "holdout"], "holdout"),
        ("test", ["train", "test", "val"], "test"),
        ("train", ["train", "val"], "train"),
    ],
)
def test_split_of_the_score(tmp_path: Path, configured: str | None, splits: list[str], expected: str) -> None:
    assert infer_split(configured, splits) == expected
    ours = runner(tmp_path, {"steps": 1, "score_split": configured})
    ours.fit(Net, {split: Pairs() for split in splits}, loss=loss)
    assert ours.score.key == f"{expected}.loss"
    assert ours.score.best == ours.results[f"{expected}.loss"]


def test_settings_of_a_split_without_a_data_set_are_refused(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"steps": 1, "dataloader": {"trian": {"batch_size": 3}}})
    with pytest.raises(
        ValueError, match=r"(?s)dataloader\.trian.*there are train, val.*did you mean dataloader\.train\?"
    ):
        ours.fit(Net, {"train": Pairs(), "val": Pairs()}, loss=loss)


def test_a_configured_split_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for named, fix in (("vla", r"did you mean score_split=val\?"), ("gone", "name one of them")):
        ours = runner(tmp_path, {"steps": 1, "score_split": named})
        with pytest.raises(ConfigRefused, match=rf"(?s)score_split={named}.*there are train, val.*{fix}"):
            ours.fit(Net, {"train": Pairs(), "val": Pairs()}, loss=loss)


@pytest.mark.parametrize(
    ("mode", "higher", "best"), [(None, True, 3.0), (None, False, 1.0), ("min", True, 1.0), ("max", None, 3.0)]
)
def test_direction_of_the_score(tmp_path: Path, mode: str | None, higher: bool | None, best: float) -> None:
    metric = Scripted(2.0, 3.0, 1.0)
    metric.__dict__["higher_is_better"] = higher
    ours = runner(tmp_path, {"steps": 3, "score_name": "scripted", "score_mode": mode})
    score = ours.fit(Net, {"train": Pairs(), "val": Pairs()}, loss=loss, metrics={"scripted": metric})
    assert score == ours.score.best == best
    assert ours.score.best_step == [2.0, 3.0, 1.0].index(best) + 1


def test_a_metric_says_in_which_direction_it_is_better(tmp_path: Path) -> None:
    accuracy = MulticlassAccuracy(CLASSES, average="micro")
    ours = runner(tmp_path, {"steps": 12, "eval_interval": 4, "score_name": "accuracy", "optim": {"lr": 1.0}})
    seen = []
    ours.prepare(Net, {"train": Pairs(), "val": Pairs(40, seed=1)}, loss=loss, metrics={"accuracy": accuracy})
    for batch in ours.batches("train"):
        ours.step(batch)
        if ours.global_step % 4 == 0:
            seen.append(ours.results["val.accuracy"])
    assert ours.finish() == max(seen) > min(seen)


@pytest.mark.parametrize(
    ("settings", "splits", "message"),
    [
        ({"score_name": "accurcy"}, ["train", "val"], "score_name=accurcy.*choose one of loss, scripted"),
        ({"score_name": "scripted"}, ["train", "val"], "score_mode=null.*score_mode=min or"),
        ({"score_name": "scripted", "score_mode": "max"}, ["train"], "score_split=train.*scripted is not measured"),
        ({"score_split": "train_b"}, ["train", "train_b", "val"], "score_split=train_b.*loss is not measured"),
    ],
)
def test_a_score_that_cannot_be_is_refused(
    tmp_path: Path, settings: dict[str, Any], splits: list[str], message: str
) -> None:
    metric = Scripted(1.0)
    metric.__dict__["higher_is_better"] = None
    ours = runner(tmp_path, settings)
    with pytest.raises(ConfigRefused, match=f"(?s){message}"):
        ours.fit(Net, {split: Pairs() for split in splits}, loss=loss, metrics={"scripted": metric})
    assert ours.global_step == 0


@pytest.mark.parametrize(
    ("patience", "values", "steps"),
    [
        (1, [1.0, 2.0, 0.5, 0.4], 2),
        (2, [1.0, 2.0, 0.5, 0.6, 0.7, 0.1], 5),
        (2, [1.0, 1.0, 1.0, 0.5], 3),  # as good is not better
        (1, [float("nan"), 1.0], 1),
        (None, [1.0, 2.0, 3.0], 3),
        (2, [1.0, 2.0, 3.0], 3),  # exhausted when the run ends anyway
    ],
)
def test_patience(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], patience: int | None, values: list[float], steps: int
) -> None:
    ours = runner(tmp_path, {"steps": len(values), "patience": patience, "score_name": "scripted", "score_mode": "min"})
    ours.fit(Net, {"train": Pairs(), "val": Pairs()}, loss=loss, metrics={"scripted": Scripted(*values)})
    assert ours.global_step == steps
    stopped = steps < len(values)
    assert ("early stop: val.scripted has not improved" in capsys.readouterr().out) == stopped


def test_early_stop_ends_epochs_too(tmp_path: Path) -> None:
    settings = {"epochs": 9, "patience": 1, "score_name": "scripted", "score_mode": "min"}
    ours = runner(tmp_path, settings)
    ours.fit(Net, {"train": Pairs(), "val": Pairs()}, loss=loss, metrics={"scripted": Scripted(1.0, 2.0)})
    assert (ours.epoch, ours.global_step) == (2, 12)


def test_training_loss_as_score_is_not_taken_twice(tmp_path: Path) -> None:
    """Log lines are rarer than evaluations: an old training loss must not count as one that did not improve."""
    settings = {"steps": 6, "eval_interval": 1, "log_interval": 100, "patience": 2, "optim": {"lr": 0.05}}
    ours = runner(tmp_path, {**settings, "dataloader": {"batch_size": 24, "shuffle": False}})
    ours.fit(Net, {"train": Pairs()}, loss=loss)
    assert ours.global_step == 6
    assert ours.score.best_step == 6


def test_a_test_split_waits_for_the_end_unless_it_is_the_score(tmp_path: Path) -> None:
    splits = {"train": Pairs(), "val": Pairs(), "test": Pairs()}
    for settings, early in (({}, False), ({"score_split": "test"}, True)):
        ours = runner(tmp_path, {"steps": 2, "eval_interval": 1, **settings})
        ours.prepare(Net, splits, loss=loss)
        batches = ours.batches("train")
        ours.step(next(batches))
        assert ("test.loss" in ours.results) == early
        ours.step(next(batches))
        ours.finish()
        assert "test.loss" in ours.results


@pytest.mark.parametrize(
    ("settings", "at"),
    [
        ({"steps": 7, "eval_interval": 3}, [3, 6, 7]),
        ({"steps": 6, "eval_interval": 3}, [3, 6]),
        ({"steps": 30}, [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]),
        ({"epochs": 3}, [6, 12, 18]),
        ({"epochs": 3, "eval_interval": 2}, [12, 18]),
    ],
)
def test_when_evaluations_happen(tmp_path: Path, settings: dict[str, Any], at: list[int]) -> None:
    seen = []

    class Watching(Scripted):
        def compute(self) -> Any:
            seen.append(ours.global_step)
            return super().compute()

    ours = runner(tmp_path, settings)
    ours.fit(Net, {"train": Pairs(), "val": Pairs()}, loss=loss, metrics={"scripted": Watching(*range(20))})
    assert seen == [0, *at]  # one batch is tried before training


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    with pytest.raises(ConfigRefused, match=r"datasets.val\n.*the split has no samples"):
        ours.fit(Net, {"train": Pairs(), "val": Pairs(0)}, loss=loss)
