"""The runner's loop against loops written by hand."""

from __future__ import annotations

import copy
import gc
import json
import logging
import multiprocessing
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

import danling_conf
from danling_conf import ConfigRefused
from tests.support.small import CLASSES, Net, Pairs, config, equal, loss, losses_of, runner, weights


def by_hand(model: nn.Module, dataset: Pairs, *, steps: int, batch_size: int = 4, accumulate: int = 1,
            max_norm: float | None = None, seed: int = 3) -> list[float]:  # fmt: skip
    """SGD over the order of torch's own DistributedSampler."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0, shuffle=True, seed=seed)
    losses: list[float] = []
    epoch = 0
    while len(losses) < steps * accumulate:
        sampler.set_epoch(epoch)
        for micro, indices in enumerate(BatchSampler(sampler, batch_size, drop_last=True), 1):
            batch = (
                torch.stack([dataset.inputs[i] for i in indices]),
                torch.stack([dataset.targets[i] for i in indices]),
            )
            value = loss(model(batch[0]), batch)
            (value / accumulate).backward()
            losses.append(value.item())
            if micro % accumulate == 0:
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                optimizer.zero_grad()
            if len(losses) == steps * accumulate:
                break
        epoch += 1
    return losses


def given() -> Net:
    torch.manual_seed(11)
    return Net()


@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_losses_and_weights_are_bitwise_those_of_a_loop_by_hand(
    tmp_path: Path, accumulate: int, max_norm: float | None
) -> None:
    steps = 8  # 24 samples are 6 batches: the run crosses into another epoch
    expected = given()
    expected_losses = by_hand(expected, Pairs(), steps=steps, accumulate=accumulate, max_norm=max_norm)
    ours = runner(tmp_path, {"steps": steps, "accum_steps": accumulate, "max_grad_norm": max_norm})
    assert losses_of(ours, given(), {"train": Pairs()}) == expected_losses
    assert equal(weights(ours), expected.state_dict())
    assert ours.global_step == steps


def test_clipping_changes_the_weights(tmp_path: Path) -> None:
    free, clipped = runner(tmp_path), runner(tmp_path, {"max_grad_norm": 0.05})
    for each in (free, clipped):
        losses_of(each, given(), {"train": Pairs()})
    assert not equal(weights(free), weights(clipped))


def test_fit_is_the_same_run_as_a_loop_of_ones_own(tmp_path: Path) -> None:
    fitted, own = runner(tmp_path), runner(tmp_path)
    datasets = {"train": Pairs(), "val": Pairs(9, seed=1)}
    score = fitted.fit(Net, datasets, loss=loss)
    own.prepare(Net, datasets, loss=loss)
    for batch in own.batches("train"):
        own.step(batch)
    assert own.finish() == score == min(fitted.results["val.loss"], score)
    assert equal(weights(fitted), weights(own))
    assert fitted.results == own.results
    assert fitted.world.attempt.run_directory != own.world.attempt.run_directory


@dataclass
class Output:
    loss: Tensor
    logits: Tensor


class WithLoss(nn.Module):
    """Takes a mapping's items as keywords and returns its own loss, as Hugging Face's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, features: Tensor, labels: Tensor) -> Output:
        logits = self.net(features)
        return Output(nn.functional.cross_entropy(logits, labels), logits)


class Mappings(Pairs):
    def __getitem__(self, index: int) -> Any:
        return {"features": self.inputs[index], "labels": self.targets[index]}


def test_mappings_and_a_model_with_its_own_loss(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = WithLoss()
    expected = copy.deepcopy(model.net)
    ours = runner(tmp_path, {"score_name": "accuracy"})
    ours.prepare(model, {"train": Mappings(), "val": Mappings(7, seed=1)},
                 metrics={"accuracy": MulticlassAccuracy(CLASSES, average="micro")})  # fmt: skip
    losses = [ours.step(batch).item() for batch in ours.batches("train")]
    score = ours.finish()
    assert losses == by_hand(expected, Pairs(), steps=6)
    held_out = Pairs(7, seed=1)
    with torch.no_grad():
        right = (expected(held_out.inputs).argmax(1) == held_out.targets).double().mean().item()
    assert ours.results["val.accuracy"] == pytest.approx(right)
    assert score >= right  # the best of all evaluations


def test_a_model_without_a_loss_is_told_to_pass_one(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    with pytest.raises(ConfigRefused, match="pass loss="):
        ours.fit(Net, {"train": Pairs()})


def test_a_module_is_taken_over_with_its_weights_and_a_factory_is_seeded_by_the_run(tmp_path: Path) -> None:
    module = given()
    ours = runner(tmp_path)
    ours.prepare(module, {"train": Pairs()}, loss=loss)
    assert equal(weights(ours), given().state_dict())
    ours.close()
    first, second, other = runner(tmp_path), runner(tmp_path), runner(tmp_path, {"seed": 4})
    for each in (first, second, other):
        torch.manual_seed(0 if each is first else 1)  # what the process did before does not matter
        each.prepare(Net, {"train": Pairs()}, loss=loss)
        each.close()
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))


class Stream(IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Any:
        yield from (Pairs(8)[index] for index in range(8))


@pytest.mark.parametrize(
    ("settings", "dataset", "steps", "epochs", "micro_batches"),
    [
        ({"steps": 5}, Pairs(), 5, 0, 5),
        ({"steps": 6}, Pairs(), 6, 0, 6),  # 6 batches an epoch: it ends with the epoch, which no batch has left
        ({"steps": 7}, Pairs(), 7, 1, 7),
        ({"epochs": 2}, Pairs(), 12, 2, 12),
        ({"epochs": 2, "dataloader": {"batch_size": 5}}, Pairs(), 8, 2, 8),  # 24 / 5: the rest is dropped
        ({"epochs": 2, "dataloader": {"batch_size": 5, "drop_last": False}}, Pairs(), 10, 2, 10),
        ({"epochs": 2, "accum_steps": 4}, Pairs(), 2, 2, 8),  # 6 micro-batches: two of them make no step
        ({"steps": 3, "accum_steps": 4}, Pairs(), 3, 2, 12),
        ({"epochs": 3}, Stream(), 6, 3, 6),
        ({"steps": 3}, Stream(), 3, 1, 3),
    ],
)
def test_length_of_a_run(
    tmp_path: Path, settings: dict[str, Any], dataset: Any, steps: int, epochs: int, micro_batches: int
) -> None:
    ours = runner(tmp_path, settings)
    losses = losses_of(ours, Net, {"train": dataset})
    assert (ours.global_step, ours.epoch, len(losses)) == (steps, epochs, micro_batches)


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    ordered = {"shuffle": False}
    whole = runner(tmp_path, {"steps": 2, "dataloader": {"batch_size": 12, **ordered}})
    parts = runner(tmp_path, {"steps": 2, "accum_steps": 3, "dataloader": {"batch_size": 4, **ordered}})
    losses_of(whole, Net, {"train": Pairs()})
    losses_of(parts, Net, {"train": Pairs()})
    for name, value in weights(whole).items():
        assert torch.allclose(value, weights(parts)[name], rtol=0, atol=1e-6), name


def test_the_rest_of_an_epoch_is_not_carried_into_the_next(tmp_path: Path) -> None:
    """Six micro-batches and steps of four: each epoch's step starts with that epoch's first micro-batch."""
    ours = runner(tmp_path, {"steps": 2, "accum_steps": 4, "dataloader": {"shuffle": False}})
    ours.prepare(Net, {"train": Pairs()}, loss=loss)
    seen = []
    for batch in ours.batches("train"):
        seen.append(batch[0])
        ours.step(batch)
    ours.finish()
    assert all(torch.equal(left, right) for left, right in zip(seen[:4], seen[4:], strict=True))


def test_an_epoch_shorter_than_a_step_is_refused(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"accum_steps": 7})
    with pytest.raises(ConfigRefused, match="accum_steps=7") as refusal:
        ours.prepare(Net, {"train": Pairs()}, loss=loss)
    ours.close()
    assert "6 micro-batches" in str(refusal.value)
    assert "at most 6" in str(refusal.value)


def test_no_training_split_is_refused(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    with pytest.raises(ConfigRefused, match="there is no split train among val, tests"):
        ours.prepare(Net, {"val": Pairs(), "tests": Pairs()}, loss=loss)
    ours.close()


@pytest.mark.parametrize(("interval", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4])])
def test_log_interval(tmp_path: Path, interval: int, expected: list[int]) -> None:
    ours = runner(tmp_path, {"log_interval": interval})
    losses = losses_of(ours, Net, {"train": Pairs()})
    text = (ours.world.attempt.directory / "rank-0.log").read_text()
    lines = re.findall(r"step (\d+)/6  loss (\S+)  lr 1.00e-01", text)
    assert [int(step) for step, _ in lines] == expected
    for step, shown in lines:  # each shows the mean since the line before
        recent = losses[int(step) - interval : int(step)]
        assert float(shown) == pytest.approx(sum(recent) / interval, abs=1e-4)


def test_logs_of_the_main_process_can_be_left_out(tmp_path: Path) -> None:
    with_log, without = runner(tmp_path), runner(tmp_path, {"log": False})
    for each in (with_log, without):
        losses_of(each, Net, {"train": Pairs()})
    assert (with_log.world.attempt.directory / "run.log").read_text().count("step 6/6")
    assert not (without.world.attempt.directory / "run.log").exists()
    assert (without.world.attempt.directory / "rank-0.log").read_text().count("step 6/6")


@dataclass
class Taken:
    """What a runner changes in its process."""

    gc: bool
    deterministic: bool
    warn_only: bool
    handlers: list[logging.Handler]

    @classmethod
    def now(cls) -> Taken:
        return cls(
            gc.isenabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            [*logging.getLogger().handlers, *logging.getLogger("danling_conf").handlers],
        )


class Broken(Net):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("this model is broken")


@pytest.mark.parametrize("model", [Net, Broken])
def test_the_process_is_left_as_it_was_also_after_an_error(tmp_path: Path, model: type[Net]) -> None:
    settings = {"deterministic": True, "gc": {"interval": 2}}
    before = Taken.now()
    ours = runner(tmp_path, settings)
    assert Taken.now() != before
    if model is Broken:
        with pytest.raises(RuntimeError, match="this model is broken"):
            ours.fit(model, {"train": Pairs()}, loss=loss)
    else:
        ours.fit(model, {"train": Pairs()}, loss=loss)
    assert Taken.now() == before
    # The run is no longer live: it can be claimed again.
    run = ours.world.attempt.run_directory
    again = danling_conf.Runner(config(tmp_path, {**settings, "resume": str(run)}))
    again.close()
    assert again.world.attempt.run_directory == run


def test_a_run_is_live_while_its_runner_is(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    run = ours.world.attempt.run_directory
    with pytest.raises(ConfigRefused, match="the run is live"):
        runner(tmp_path, {"resume": str(run)})
    ours.close()
    runner(tmp_path, {"resume": str(run)}).close()
    assert json.loads((run / "run.json").read_text())["seed"] == 3


def test_a_forked_child_does_not_keep_a_run_alive(tmp_path: Path) -> None:
    """As loader workers are, which outlive a killed process for some seconds."""
    ours = runner(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True)
    child.start()
    try:
        ours.close()
        runner(tmp_path, {"resume": str(ours.world.attempt.run_directory)}).close()
        assert child.is_alive()
    finally:
        child.kill()
        child.join()


def test_report_lines_are_shown_with_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Any] = []

    def report(model: nn.Module, results: Any) -> list[str]:
        seen.append((type(model), model.training, dict(results)))
        return ["one line of mine"]

    ours = runner(tmp_path)
    ours.fit(Net, {"train": Pairs(), "val": Pairs(8, seed=1)}, loss=loss, report=report)
    assert seen == [(Net, False, ours.results)]
    assert "one line of mine" in capsys.readouterr().out.splitlines()
