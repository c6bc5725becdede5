"""The learning rate of every step, whatever advances the schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from danling_conf import ConfigRefused
from tests.support.small import Net, Pairs, loss, runner

DATASETS = {"train": Pairs(), "val": Pairs(8, seed=1)}  # 6 steps an epoch


class Scripted(Metric):
    """Gives the values of a script, one an evaluation."""

    higher_is_better = False

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = list(values)
        self.given = 0

    def update(self, output: Any, targets: Any) -> None:
        pass

    def reset(self) -> None:
        pass

    def compute(self) -> torch.Tensor:
        self.given += 1
        return torch.tensor(self.values[self.given - 1])


def rates(root: Path, settings: dict[str, Any], datasets: Any = DATASETS, **options: Any) -> list[float]:
    """The learning rate that each optimizer step was made with."""
    ours = runner(root, settings)
    ours.prepare(Net, datasets, loss=loss, **options)
    used = []
    for batch in ours.batches("train"):
        used.append(ours.optimizer.param_groups[0]["lr"])
        ours.step(batch)
    ours.finish()
    return used


def test_constant(tmp_path: Path) -> None:
    assert rates(tmp_path, {"steps": 3}) == [0.1] * 3


def test_by_step(tmp_path: Path) -> None:
    used = rates(tmp_path, {"steps": 5, "scheduler": {"type": "linear"}})
    assert used == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])


def test_by_step_counts_optimizer_steps_and_not_micro_batches(tmp_path: Path) -> None:
    used = rates(tmp_path, {"steps": 2, "accum_steps": 2, "scheduler": {"type": "linear"}})
    assert used == pytest.approx([0.1, 0.1, 0.05, 0.05])


def test_by_step_in_epoch_mode_knows_the_length_of_the_run(tmp_path: Path) -> None:
    used = rates(tmp_path, {"epochs": 2, "scheduler": {"type": "cosine"}})
    assert used == pytest.approx([0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(12)])


def test_by_epoch(tmp_path: Path) -> None:
    used = rates(tmp_path, {"epochs": 2, "scheduler": {"type": "linear", "interval": "epoch"}})
    assert used == pytest.approx([0.1] * 6 + [0.05] * 6)


def test_by_epoch_does_not_wait_for_evaluations(tmp_path: Path) -> None:
    settings = {"epochs": 3, "eval_interval": 3, "scheduler": {"type": "StepLR", "step_size": 1, "gamma": 0.5}}
    used = rates(tmp_path, {**settings, "scheduler": {**settings["scheduler"], "interval": "epoch"}})
    assert used == pytest.approx([0.1] * 6 + [0.05] * 6 + [0.025] * 6)


def test_by_epoch_in_step_mode_is_by_evaluation(tmp_path: Path) -> None:
    settings = {"steps": 6, "eval_interval": 2, "scheduler": {"type": "linear", "interval": "validation"}}
    used = rates(tmp_path, settings)
    assert used == pytest.approx([0.1, 0.1, 0.1 * 2 / 3, 0.1 * 2 / 3, 0.1 / 3, 0.1 / 3])


PLATEAU = {"type": "plateau", "patience": 0, "factor": 0.1}


@pytest.mark.parametrize(
    ("scheduler", "values", "expected"),
    [
        (PLATEAU, [1.0, 2.0, 0.5], [0.1] * 12 + [0.01] * 6),  # the score, which should fall
        ({**PLATEAU, "monitor": "val.scripted"}, [1.0, 0.5, 0.6], [0.1] * 18),
        ({**PLATEAU, "mode": "max"}, [1.0, 0.5, 0.6], [0.1] * 12 + [0.01] * 6),
    ],
)
def test_by_a_metric(tmp_path: Path, scheduler: dict[str, Any], values: list[float], expected: list[float]) -> None:
    settings = {"epochs": 3, "score_name": "scripted", "scheduler": scheduler}
    used = rates(tmp_path, settings, metrics={"scripted": Scripted(*values)})
    assert used == pytest.approx(expected)


def test_the_direction_of_a_plateau_is_that_of_the_score(tmp_path: Path) -> None:
    settings = {"epochs": 3, "score_name": "scripted", "score_mode": "max", "scheduler": PLATEAU}
    used = rates(tmp_path, settings, metrics={"scripted": Scripted(1.0, 0.5, 2.0)})
    assert used == pytest.approx([0.1] * 12 + [0.01] * 6)


def test_a_monitored_metric_has_a_direction_of_its_own(tmp_path: Path) -> None:
    class Rising(Scripted):
        higher_is_better = True  # and the score, the loss, is better when it falls

    settings = {"epochs": 3, "scheduler": {**PLATEAU, "monitor": "val.scripted"}}
    assert set(rates(tmp_path, settings, metrics={"scripted": Rising(1.0, 2.0, 3.0)})) == {0.1}


@pytest.mark.parametrize(
    ("settings", "values"),
    [({"epochs": 1}, [1.0]), ({"epochs": 5, "eval_interval": 2}, [1.0, 0.9, 0.8]), ({"steps": 3}, [1.0, 0.9, 0.8])],
)
def test_a_metric_advances_only_when_it_is_new(tmp_path: Path, settings: dict[str, Any], values: list[float]) -> None:
    """A plateau of no patience that meets no plateau: every advance sees a better value than the one before."""
    used = rates(tmp_path, {**settings, "score_name": "scripted", "scheduler": PLATEAU},
                 metrics={"scripted": Scripted(*values)})  # fmt: skip
    assert set(used) == {0.1}


def test_by_the_training_loss(tmp_path: Path) -> None:
    """Only a training split, and log lines that are rarer than evaluations: the loss is up to date all the same."""
    settings = {"steps": 8, "eval_interval": 1, "log_interval": 100, "optim": {"lr": 0.05}}
    scheduler = {"type": "plateau", "patience": 0, "threshold": 0.0}
    used = rates(tmp_path, {**settings, "dataloader": {"shuffle": False, "batch_size": 24}, "scheduler": scheduler},
                 {"train": Pairs()})  # fmt: skip
    assert set(used) == {0.05}  # the loss of the whole data falls at every step


class Halving(LRScheduler):
    """A class of the user's own."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        return [base * 0.5**self.last_epoch for base in self.base_lrs]


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    used = rates(tmp_path, {"steps": 3, "scheduler": {"type": f"{__name__}.Halving"}})
    assert used == pytest.approx([0.1, 0.05, 0.025])


def test_data_without_a_length_and_a_schedule_that_needs_one(tmp_path: Path) -> None:
    from tests.runner.test_fit import Stream

    ours = runner(tmp_path, {"epochs": 1, "scheduler": {"type": "cosine"}})
    with pytest.raises(ConfigRefused, match="the run's length is not known"):
        ours.fit(Net, {"train": Stream()}, loss=loss)
    assert rates(tmp_path, {"epochs": 1, "scheduler": {"type": "StepLR", "step_size": 1}}, {"train": Stream()}) == [
        pytest.approx(0.1),
        pytest.approx(0.01),
    ]


@pytest.mark.parametrize("monitor", ["val.accurcy", "test.loss", "train.accuracy"])
def test_a_metric_that_no_evaluation_gives_is_refused_before_training(tmp_path: Path, monitor: str) -> None:
    ours = runner(tmp_path, {"epochs": 1, "scheduler": {"type": "plateau", "monitor": monitor}})
    with pytest.raises(ConfigRefused, match=f"scheduler.monitor={monitor}") as refusal:
        ours.fit(Net, {**DATASETS, "test": Pairs()}, loss=loss)
    assert "choose one of val.loss, train.loss" in str(refusal.value)
    assert ours.global_step == 0
