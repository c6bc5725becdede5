"""What of a new program does not fit is said before the first step: the place, the value, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from danling_conf import ConfigRefused
from tests.support.small import CLASSES, FEATURES, Net, Pairs, losses_of, runner

PAIRS = Pairs()


class Width(Net):
    def __init__(self, width: int) -> None:
        super().__init__()


class Reads(nn.Module):
    """An embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(4, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


@dataclass
class Sample:
    x: Tensor
    y: Tensor


def with_targets(make: Callable[[Tensor], Any]) -> list[Any]:
    return [(x, make(y)) for x, y in PAIRS]


def with_inputs(make: Callable[[Tensor], Any]) -> list[Any]:
    return [(make(x), y) for x, y in PAIRS]


def entropy(output: Tensor, batch: Any) -> Tensor:
    return functional.cross_entropy(output, batch[1])


def squares(output: Tensor, batch: Any) -> Tensor:
    return functional.mse_loss(output, batch[1])


def scalar() -> nn.Module:
    return nn.Linear(FEATURES, 1)


REFUSED: dict[str, tuple[Any, list[Any], Any, list[str]]] = {
    "an image": (Net, with_inputs(lambda _: Image.new("L", (4, 4))), entropy, ["datasets.train", "sample[0]", "numpy"]),
    "None": (Net, with_targets(lambda _: None), entropy, ["datasets.train", "sample[1] is None", "collate_fn="]),
    "several lengths": (
        Net,
        [(x[: 3 + index % 3], y) for index, (x, y) in enumerate(PAIRS)],
        entropy,
        ["datasets.train", "sample[0] has the shape (", "pad_sequence"],
    ),
    "float64": (
        Net,
        with_inputs(lambda x: x.numpy().astype("float64")),
        entropy,
        ["datasets.train", "first (Linear)", "float64 and float32", "batch[0].to(torch.float32)"],
    ),
    "bytes": (Net, with_inputs(Tensor.byte), entropy, ["datasets.train", "uint8 and float32"]),
    "labels of int32": (
        Net,
        with_targets(Tensor.int),
        entropy,
        ["loss\n", "int32", "test_first_batch", "batch[1].long()"],
    ),
    "labels of floats": (Net, with_targets(Tensor.float), entropy, ["loss\n", "float32", "batch[1].long()"]),
    "labels from 1": (
        Net,
        with_targets(lambda y: 0 * y + CLASSES),
        entropy,
        ["3 classes takes 0 to 2, and was given 3", "from 0"],
    ),
    "labels of (1,)": (Net, with_targets(lambda y: y[None]), entropy, ["a class a sample", "batch[1].squeeze(-1)"]),
    "binary labels": (
        scalar,
        with_targets(lambda y: y > 1),
        lambda output, batch: functional.binary_cross_entropy_with_logits(output.squeeze(-1), batch[1].long()),
        ["targets of floats", "int64", ".float()"],
    ),
    "(B, 1) and (B,)": (scalar, with_targets(Tensor.float), squares, ["mse_loss", "(4, 1) and (4,)", "squeeze(-1)"]),
    "(B,) made of (B, 1) - (B, 1)": (
        scalar,
        with_targets(lambda y: y[None].float()),
        lambda output, batch: (output.squeeze(-1) - batch[1]).square().mean(),
        ["sub broadcasts the shapes (4,) and (4, 1) to (4, 4)"],
    ),
    "(B, 1) - (B,)": (
        scalar,
        with_targets(Tensor.float),
        lambda output, batch: ((output - batch[1]) ** 2).mean(),
        ["sub broadcasts the shapes (4, 1) and (4,) to (4, 4)"],
    ),
    "tokens as floats": (
        Reads,
        with_inputs(lambda x: x),
        entropy,
        ["embedding (Embedding)", "whole numbers", ".long()"],
    ),
    "tokens out of range": (Reads, with_inputs(lambda _: torch.arange(5)), entropy, ["4 rows takes 0 to 3", "given 4"]),
    "features": (lambda: nn.Linear(7, 2), list(PAIRS), entropy, ["model\n", "linear of 7 features was given 5"]),
    "torch's own loss": (
        Net,
        list(PAIRS),
        functional.cross_entropy,
        ["loss\n", "the batch, batch[0]", "lambda output"],
    ),
    "a loss of the output": (Net, list(PAIRS), lambda output: output.mean(), ["loss\n", "output and the batch"]),
    "a factory with arguments": (
        Width,
        list(PAIRS),
        entropy,
        ["model\n", "Width needs arguments", "'width'", "lambda"],
    ),
    "no factory": ("Net", list(PAIRS), entropy, ["model\n", "a str is neither"]),
    "a dataclass as it is": (
        scalar,
        [Sample(x, y) for x, y in PAIRS],
        entropy,
        ["batch.inputs\n", "not Sample", "batch.x float32", "batch.inputs=[x]"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_at_the_first_batch(tmp_path: Path, name: str) -> None:
    model, data, loss, said = REFUSED[name]
    for split, datasets in (("train", {"train": data}), ("val", {"train": data, "val": data})):
        ours = runner(tmp_path)
        with pytest.raises(ConfigRefused) as caught:
            ours.fit(model, datasets, loss=loss)
        assert ours.global_step == 0
        for part in said:
            assert part.replace("datasets.train", f"datasets.{split}") in str(caught.value)


def test_numbers_of_numpy_that_fit_train_as_tensors_do(tmp_path: Path) -> None:
    arrays = [(x.numpy(), numpy.int64(y)) for x, y in PAIRS]
    assert losses_of(runner(tmp_path), Net, {"train": arrays}) == losses_of(runner(tmp_path), Net, {"train": PAIRS})


def test_samples_that_are_dataclasses_make_a_batch(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"batch": {"inputs": ["x"]}})
    made = [Sample(x, y) for x, y in PAIRS]
    ours.fit(Net, {"train": made}, loss=lambda output, batch: functional.cross_entropy(output, batch.y))
    assert ours.global_step


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, batch: (output[:, None] - output).square().mean() + output.mean(),
        lambda output, batch: functional.mse_loss(output, torch.ones(())),
        lambda output, batch: (output - output.mean(1, keepdim=True)).square().mean(),
    ],
)
def test_what_a_loss_broadcasts_on_purpose_is_not_refused(tmp_path: Path, loss: Any) -> None:
    ours = runner(tmp_path)
    ours.fit(Net, {"train": PAIRS}, loss=loss)
    assert ours.global_step


def test_an_error_of_the_users_own_keeps_its_trace_and_says_which_batch_it_was(tmp_path: Path) -> None:
    def wrong(output: Tensor, batch: Any) -> Tensor:
        return functional.cross_entropy(output, batch["y"])

    with pytest.raises(TypeError) as caught:
        runner(tmp_path).fit(Net, {"train": PAIRS}, loss=wrong)
    assert caught.traceback[-1].name == "wrong"
    assert caught.value.__notes__ == [
        f"this was the first batch of train: batch[0] float32 (4, {FEATURES}), batch[1] int64 (4,)"
    ]


def test_a_compiled_model_is_looked_at_where_it_has_failed(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"compile": {"enable": True, "backend": "eager"}})
    with pytest.raises(ConfigRefused, match=r"(?s)datasets\.train.*float64 and float32"):
        ours.fit(Net, {"train": with_inputs(Tensor.double)}, loss=entropy)


def test_what_no_worker_can_send_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    @dataclass
    class Local:
        x: Tensor

    for data, said in (([Local(x) for x, _ in PAIRS], "Local"), (REFUSED["an image"][1], "PIL.Image.Image")):
        ours = runner(tmp_path, {"dataloader": {"batch_size": 4, "num_workers": 1}})
        with pytest.raises(ConfigRefused, match=f"(?s)datasets.train.*{said}"):
            ours.fit(Net, {"train": data}, loss=entropy)
