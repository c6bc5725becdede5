"""Data, losses, metrics and loops that nobody here made: they train right, or a sentence says why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
from transformers import BatchEncoding

from danling_conf import ConfigRefused, Runner
from tests.support.resumed_runs import Killed, settings_of
from tests.support.small import CLASSES, FEATURES, DropoutNet, Net, Pairs, config, equal, loss, runner, weights

pytestmark = pytest.mark.slow


class Keywords(Net):
    """Takes what it needs by keyword, and whatever else comes."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return super().forward(x)


class Items(Dataset[Any]):
    """The samples of `Pairs`, each made into something else."""

    def __init__(self, make: Callable[[int, Tensor, Tensor], Any], size: int = 24, seed: int = 0) -> None:
        self.pairs, self.make = Pairs(size, seed), make

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Any:
        return self.make(index, *self.pairs[index])


def named(index: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"id": f"sample-{index}", "x": x, "labels": y}


def loss_of_labels(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch["labels"])


class Row(NamedTuple):
    x: Tensor
    labels: Tensor


@dataclass
class Loaded:
    id: list[str]
    x: Tensor
    labels: Tensor

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


def plain(tmp_path: Path, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Weights and results of the same run on pairs."""
    ours = runner(tmp_path, settings)
    metrics = {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
    ours.fit(Net, {"train": Pairs(), "val": Pairs(9, 1)}, loss=loss, metrics=metrics)
    return {"weights": weights(ours), "results": ours.results}


CONTAINERS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "a dict, strings first": (Keywords, {}, {}),
    "BatchEncoding": (Keywords, {"collate_fn": lambda rows: BatchEncoding(_columns(rows))}, {}),
    "inputs by name": (Net, {}, {"batch": {"inputs": ["x"]}}),
    "a dataclass": (
        Net,
        {"collate_fn": lambda rows: Loaded(**_columns(rows))},
        {"batch": {"inputs": {"x": "x"}, "targets": ["labels"]}},
    ),
    "a forward of one's own": (Net, {"forward": lambda model, batch: model(batch["x"])}, {}),
}


def _columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    columns: dict[str, Any] = {"id": [row["id"] for row in rows]}
    return columns | {key: torch.stack([row[key] for row in rows]) for key in ("x", "labels")}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_batch_of_any_container_trains_and_evaluates_as_a_pair_does(tmp_path: Path, name: str) -> None:
    model, options, settings = CONTAINERS[name]
    ours = runner(tmp_path, settings)
    metrics = {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
    ours.fit(model, {"train": Items(named), "val": Items(named, 9, 1)}, loss=loss_of_labels, metrics=metrics, **options)
    expected = plain(tmp_path)
    assert equal(weights(ours), expected["weights"])
    assert ours.results == expected["results"]


def test_the_targets_of_a_named_tuple_are_found_by_name(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    rows = Items(lambda _, x, y: Row(x, y))
    metrics = {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}
    ours.fit(Net, {"train": rows, "val": rows}, loss=lambda output, batch: loss(output, batch), metrics=metrics)
    assert 0 <= ours.results["val.accuracy"] <= 1


def test_a_list_of_samples_is_a_data_set(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    train, val = list(iter(Items(lambda _, x, y: (x, y)))), list(iter(Items(lambda _, x, y: (x, y), 9, 1)))
    ours.fit(Net, {"train": train, "val": val}, loss=loss)
    assert equal(weights(ours), plain(tmp_path)["weights"])


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        (Pairs(), r"datasets\n.*one data set a split is needed, and this is a Pairs"),
        ({"val": Pairs()}, r"there is no split train among val"),
        ({"train": DataLoader(Pairs())}, r"datasets.train\n.*a DataLoader is no data set\n.*pass its data set"),
        ({"train": Pairs(), "val": {"x": 1}}, r"datasets.val\n.*a dict is no data set"),
        ({"train": Pairs(), "val": None}, r"datasets.val\n.*None is no data set"),
        ({"train": Pairs(), "val": []}, r"datasets.val\n.*the split has no samples"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path: Path, datasets: Any, said: str) -> None:
    with pytest.raises(ConfigRefused, match=said):
        runner(tmp_path).fit(Net, datasets, loss=loss)


class Empty(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(("train", "val", "split"), [(Empty(), Pairs(), "train"), (Pairs(), Empty(), "val")])
def test_iterable_data_without_a_batch_is_refused(tmp_path: Path, train: Any, val: Any, split: str) -> None:
    ours = runner(tmp_path)
    with pytest.raises(ConfigRefused, match=rf"datasets.{split}\n.*it returned no batch"):
        ours.fit(Net, {"train": train, "val": val}, loss=loss)
    assert ours.global_step == 0


# Losses


def shaped(kind: str) -> Callable[[Any, Any], Any]:
    def of(output: Tensor, batch: Any) -> Any:
        mean = loss(output, batch)
        return {
            "one": lambda: mean.reshape(1),
            "one by one": lambda: mean.reshape(1, 1),
            "vector": lambda: nn.functional.cross_entropy(output, batch[1], reduction="none"),
            "integer": lambda: mean.long(),
            "detached": lambda: mean.detach(),
            "float": lambda: mean.item(),
            "none": lambda: None,
            "dict": lambda: {"main": mean, "auxiliary": mean},
            "triple": lambda: (mean, mean, mean),
            "count of each": lambda: (mean * 4, torch.ones(4)),
            "no count": lambda: (mean * 4, None),
        }[kind]()

    return of


@pytest.mark.parametrize("kind", ["one", "one by one"])
def test_a_loss_of_one_element_trains_as_a_scalar(tmp_path: Path, kind: str) -> None:
    ours = runner(tmp_path, {"log_interval": 1})
    ours.fit(Net, {"train": Pairs(), "val": Pairs(9, 1)}, loss=shaped(kind))
    expected = plain(tmp_path, {"log_interval": 1})
    assert equal(weights(ours), expected["weights"])
    assert ours.results["val.loss"] == expected["results"]["val.loss"]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("vector", r"a tensor of shape \(4,\) and torch.float32.*one number.*\.mean\(\)"),
        ("integer", r"a tensor of shape \(\) and torch.int64"),
        ("detached", r"without a gradient.*without detach\(\)"),
        ("float", r"the float \d"),
        ("none", r"it returned None"),
        ("dict", r"it returned dict of main, auxiliary"),
        ("triple", r"a tuple of 3 items"),
        ("count of each", r"a pair whose count is a tensor of shape \(4,\)"),
        ("no count", r"a pair whose count is None"),
    ],
)
def test_what_is_no_loss_is_refused_before_the_first_step(tmp_path: Path, kind: str, said: str) -> None:
    ours = runner(tmp_path)
    with pytest.raises(ConfigRefused, match=rf"(?s)loss\n.*{said}"):
        ours.fit(Net, {"train": Pairs()}, loss=shaped(kind))
    assert ours.global_step == 0


# How the model is called, and metrics


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"batch.inputs\n.*Net.forward: .*unexpected keyword argument 'id'.*a batch \(dict of id, x, labels\)"),
        ({"batch": {"inputs": ["image"]}}, r"batch.inputs=image\n.*dict of id, x, labels\) has no such item"),
        ({"batch": {"inputs": {"y": "x"}}}, r"batch.inputs\n.*Net.forward: missing a required argument: 'x'"),
    ],
)
def test_a_model_that_cannot_be_called_with_the_batch_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    ours = runner(tmp_path, settings)
    with pytest.raises(ConfigRefused, match=f"(?s){said}"):
        ours.fit(Net, {"train": Items(named)}, loss=loss_of_labels)
    assert ours.global_step == 0


def test_an_error_inside_of_the_model_keeps_its_trace(tmp_path: Path) -> None:
    class Faulty(Keywords):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return len(x.item) + x  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        runner(tmp_path).fit(Faulty, {"train": Items(named)}, loss=loss_of_labels)


def targets_elsewhere(index: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    return {"x": x, "class_of": y, "weight": torch.tensor(1.0)}


@pytest.mark.parametrize(
    ("metric", "settings", "options", "said"),
    [
        (MulticlassAccuracy(CLASSES), {}, {}, r"batch.targets=null\n.*dict of x, class_of, weight\) has no labels"),
        (MulticlassAccuracy(CLASSES), {"batch": {"targets": ["y"]}}, {}, r"batch.targets=y\n.*no such item"),
        (
            MulticlassAccuracy(CLASSES),
            {},
            {"metric_inputs": lambda output, batch: (output, batch["x"])},
            r"metrics.own\n.*its update cannot take \(a tensor of shape \(4, 3\)",
        ),
        (
            MulticlassConfusionMatrix(CLASSES),
            {"batch": {"targets": ["class_of"]}},
            {},
            r"metrics.own\n.*its compute returned a tensor of shape \(3, 3\).*a metric is one number",
        ),
    ],
)
def test_metrics_are_tried_on_one_batch_before_training(
    tmp_path: Path, metric: Any, settings: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    ours, data = runner(tmp_path, settings), Items(targets_elsewhere)
    with pytest.raises(ConfigRefused, match=f"(?s){said}"):
        ours.prepare(
            Keywords,
            {"train": data, "val": data},
            loss=lambda output, batch: nn.functional.cross_entropy(output, batch["class_of"]),
            metrics={"own": metric},
            **options,
        )
    ours.close()


def test_metrics_are_updated_with_what_the_user_makes_of_output_and_batch(tmp_path: Path) -> None:
    ours, data = runner(tmp_path), Items(targets_elsewhere, 9)
    ours.fit(
        Keywords,
        {"train": Items(targets_elsewhere), "val": data},
        loss=lambda output, batch: nn.functional.cross_entropy(output, batch["class_of"]),
        metrics={"mean": MeanMetric()},
        metric_inputs=lambda output, batch: (batch["x"],),
    )
    assert ours.results["val.mean"] == pytest.approx(data.pairs.inputs.mean().item())


def unpadded(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Its first tensor has no dim for the samples."""
    inputs, targets = zip(*rows, strict=True)
    return {"bounds": torch.arange(7), "x": torch.stack(inputs), "labels": torch.stack(targets)}


def test_samples_that_the_rule_counts_wrongly_are_counted_by_the_user(tmp_path: Path) -> None:
    splits = {"train": Pairs(), "val": Pairs(9, 1)}
    with pytest.raises(ConfigRefused, match=r"(?s)count_samples\n.*has 7 samples, and 4 were drawn"):
        runner(tmp_path).fit(Keywords, splits, loss=loss_of_labels, collate_fn=unpadded)
    ours = runner(tmp_path)
    ours.fit(
        Keywords, splits, loss=loss_of_labels, collate_fn=unpadded, count_samples=lambda batch: len(batch["labels"])
    )
    assert ours.results["val.loss"] == plain(tmp_path)["results"]["val.loss"]


class Drawing(Pairs):
    """Each sample draws from the generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = super().__getitem__(index)
        return x + torch.randn(FEATURES), y


def test_the_batch_that_is_tried_changes_nothing(tmp_path: Path) -> None:
    found = []
    for splits in ({}, {"val": Drawing(9, 1), "test": Drawing(5, 2)}):
        ours = runner(tmp_path, {"score_split": "train", "eval_interval": 6})
        ours.prepare(DropoutNet, {"train": Drawing(), **splits}, loss=loss)
        found.append([ours.step(batch).item() for batch in ours.batches("train")])
        ours.close()
    assert found[0] == found[1]


# Iterable data


class Stream(IterableDataset[Any]):
    """The samples of `Pairs`, one after another, without a length."""

    def __init__(self, size: int) -> None:
        self.pairs = Pairs(size)

    def __iter__(self) -> Iterator[Any]:
        return iter([self.pairs[index] for index in range(len(self.pairs))])


def trained(
    root: Path, data: Any, settings: dict[str, Any], *, kill_at: int | None = None, model: Any = DropoutNet
) -> dict[str, Any]:
    ours = Runner(settings_of(root, settings))
    losses = []
    try:
        ours.prepare(model, {"train": data, "val": Pairs(9, 1)}, loss=loss)
        for batch in ours.batches("train"):
            losses.append(ours.step(batch).item())
            if ours.global_step == kill_at:
                raise Killed
        ours.finish()
    except Killed:
        pass
    finally:
        ours.close()
    run = str(ours.world.attempt.run_directory)
    return {"losses": losses, "weights": weights(ours), "step": ours.global_step, "run": run, "epoch": ours.epoch}


REMAINDERS = {"drop": 2, "step": 3}
"""Optimizer steps of an epoch of ten samples in batches of two, two of which make a step."""


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("data", [Stream(10), Pairs(10)], ids=["iterable", "map-style"])
def test_no_micro_batch_passes_into_the_next_epoch(tmp_path: Path, data: Any, remainder: str) -> None:
    """Losses and weights are those of a loop by hand."""
    settings = {
        "dataloader": {"batch_size": 2, "train": {"shuffle": None if isinstance(data, Stream) else False}},
        "epochs": 2,
        "accum_steps": 2,
        "accum_remainder": remainder,
        "optim": {"type": "sgd", "lr": 0.1},
        "scheduler": {"type": "constant"},
    }
    torch.manual_seed(5)
    model = Net()
    by_hand = Net()
    by_hand.load_state_dict(model.state_dict())
    ours = trained(tmp_path, data, settings, model=model)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    pairs = Pairs(10)
    for _ in range(2):
        for rows in ((0, 4), (4, 8), (8, 10))[: REMAINDERS[remainder]]:
            inputs, targets = pairs.inputs[slice(*rows)], pairs.targets[slice(*rows)]
            loss(by_hand(inputs), (inputs, targets)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ours["step"] == 2 * REMAINDERS[remainder]
    for name, value in by_hand.state_dict().items():
        assert torch.allclose(ours["weights"][name], value, atol=1e-6), name


def test_a_sum_and_its_count_weigh_alike_in_a_shorter_step(tmp_path: Path) -> None:
    """A step of one micro-batch, where two are planned, is divided by its own count."""

    def summed(output: Tensor, batch: Any) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(batch[1])

    found = []
    for of in (loss, summed):
        settings = {"epochs": 1, "accum_steps": 2, "accum_remainder": "step", "scheduler": {"type": "constant"},
                    "dataloader": {"batch_size": 2}}  # fmt: skip
        ours = runner(tmp_path, settings)
        torch.manual_seed(5)
        ours.fit(Net(), {"train": Stream(10)}, loss=of)
        assert ours.global_step == 3
        found.append(weights(ours))
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, atol=1e-6), name


@pytest.mark.parametrize(
    ("budget", "kill_at"),
    [({"epochs": 3}, 1), ({"steps": 6}, 1), ({"steps": 6}, 0)],
    ids=["epochs", "steps, after an epoch", "steps, inside of an epoch"],
)
@pytest.mark.parametrize("remainder", REMAINDERS)
def test_a_resumed_run_on_iterable_data_is_the_uninterrupted_one(
    tmp_path: Path, remainder: str, budget: dict[str, int], kill_at: int
) -> None:
    settings = {"dataloader": {"batch_size": 2}, "accum_steps": 2, "accum_remainder": remainder, **budget,
                "checkpoint": {"interval": 1}, "scheduler": {"type": "constant"}}  # fmt: skip
    last = REMAINDERS[remainder] * kill_at or 1
    whole = trained(tmp_path, Stream(10), settings)
    part = trained(tmp_path, Stream(10), settings, kill_at=last + ("epochs" in budget))
    resumed = trained(tmp_path, Stream(10), {**settings, "resume": part["run"]})
    assert 0 < len(resumed["losses"]) < len(whole["losses"])
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert equal(resumed["weights"], whole["weights"])
    assert (resumed["step"], resumed["epoch"]) == (whole["step"], whole["epoch"])


# The loop


def survived(root: Path, *, accumulate: int, fails: set[int]) -> tuple[Runner, list[list[Any]]]:
    """Train in a loop that skips batches that fail; the batches of each optimizer step that took place."""
    calls = 0

    def failing(output: Tensor, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls in fails:
            raise torch.OutOfMemoryError("as if")
        return loss(output, batch)

    ours = runner(root, {"steps": 4, "accum_steps": accumulate})
    torch.manual_seed(5)
    ours.prepare(Net(), {"train": Pairs()}, loss=failing)
    steps: list[list[Any]] = []
    step: list[Any] = []
    for number, batch in enumerate(ours.batches("train")):
        assert number < 40, f"still at step {ours.global_step}"
        try:
            ours.step(batch)
        except torch.OutOfMemoryError:
            step = []
            continue
        step.append(batch)
        if len(step) == accumulate:
            steps.append(step)
            step = []
    ours.finish()
    return ours, steps


@pytest.mark.parametrize(("accumulate", "fails"), [(1, {2}), (1, {1, 2}), (2, {4}), (3, {2, 3})])
def test_a_step_that_raised_and_was_survived_leaves_nothing_behind(
    tmp_path: Path, accumulate: int, fails: set[int]
) -> None:
    ours, steps = survived(tmp_path, accumulate=accumulate, fails=fails)
    assert (ours.global_step, len(steps)) == (4, 4)
    torch.manual_seed(5)
    by_hand = Net()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for step in steps:
        for batch in step:
            (loss(by_hand(batch[0]), batch) / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert equal(weights(ours), by_hand.state_dict())


def test_a_runner_trains_once(tmp_path: Path) -> None:
    finished, failed, prepared = runner(tmp_path), runner(tmp_path), Runner(config(tmp_path))
    finished.fit(Net, {"train": Pairs()}, loss=loss)
    with pytest.raises(ConfigRefused):
        failed.fit(Net, {}, loss=loss)
    prepared.prepare(Net, {"train": Pairs()}, loss=loss)
    for ours, said in ((finished, "has finished"), (failed, "has failed"), (prepared, "was prepared before")):
        with pytest.raises(RuntimeError, match=f"this runner {said}: make another Runner"):
            ours.fit(Net, {"train": Pairs()}, loss=loss)
