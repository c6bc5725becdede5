"""What a run does to its process: seeds, deterministic operators, precision, garbage collection."""

from __future__ import annotations

import gc
import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from tests.support.small import DropoutNet, Net, Pairs, equal, loss, losses_of, runner, weights

TRAIN = {"train": Pairs()}


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    first, second, other = runner(tmp_path), runner(tmp_path), runner(tmp_path, {"seed": 4})
    losses = []
    for each in (first, second, other):
        torch.manual_seed(len(losses))  # what the process drew before is no part of the run
        losses.append(losses_of(each, DropoutNet, TRAIN))
    assert losses[0] == losses[1] != losses[2]
    assert equal(weights(first), weights(second))
    assert not equal(weights(first), weights(other))


def test_a_drawn_seed_is_recorded_and_repeats_the_run(tmp_path: Path) -> None:
    drawn, another = runner(tmp_path, {"seed": None}), runner(tmp_path, {"seed": None})
    losses = losses_of(drawn, DropoutNet, TRAIN)
    seed = json.loads((drawn.world.attempt.run_directory / "run.json").read_text())["seed"]
    assert seed == drawn.world.attempt.seed != another.world.attempt.seed
    another.close()
    assert losses_of(runner(tmp_path, {"seed": seed}), DropoutNet, TRAIN) == losses


def test_every_generator_is_seeded(tmp_path: Path) -> None:
    drawn = []
    for seed in (3, 3, 4):
        ours = runner(tmp_path, {"seed": seed})
        ours.prepare(Net, TRAIN, loss=loss)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(()).item()))
        ours.close()
    assert drawn[0] == drawn[1]
    assert all(mine != other for mine, other in zip(drawn[0], drawn[2], strict=True))


class Putting(Net):
    """Uses `put_`, which has no deterministic variant on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
        return super().forward(x)


def test_deterministic_mode_refuses_an_operator_without_such_a_variant(tmp_path: Path) -> None:
    losses_of(runner(tmp_path), Putting, TRAIN)
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        runner(tmp_path, {"deterministic": True}).fit(Putting, TRAIN, loss=loss)
    assert not torch.are_deterministic_algorithms_enabled()
    losses_of(runner(tmp_path, {"deterministic": True}), Net, TRAIN)


class Looking(Net):
    """Keeps the dtype of what its first layer gives."""

    seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        self.seen.append(hidden.dtype)
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [(None, torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_precision_is_that_of_the_computation_and_not_of_the_weights(
    tmp_path: Path, precision: str | None, dtype: torch.dtype
) -> None:
    Looking.seen = []
    ours = runner(tmp_path, {"precision": precision})
    ours.fit(Looking, {**TRAIN, "val": Pairs(6, seed=1)}, loss=loss)
    assert set(Looking.seen) == {dtype}  # in training and in evaluation
    assert {value.dtype for value in weights(ours).values()} == {torch.float32}
    assert ours.global_step == 6


def test_fp16_scales_its_loss_and_clips_what_is_unscaled(tmp_path: Path) -> None:
    settings = {"optim": {"lr": 0.01}, "max_grad_norm": 0.5}
    full, half = runner(tmp_path, settings), runner(tmp_path, {**settings, "precision": "fp16"})
    losses_of(full, Net, TRAIN)
    losses_of(half, Net, TRAIN)
    assert not equal(weights(full), weights(half))
    for name, value in weights(full).items():
        assert torch.allclose(value, weights(half)[name], atol=1e-4), name


def collections(root: Path, section: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], set[bool]]:
    """The steps, with the generation, after which a run collects; and whether collection is automatic meanwhile."""
    ours = runner(root, {"steps": 7, "gc": section})
    collected: list[Any] = []
    automatic = set()
    ours.prepare(Net, TRAIN, loss=loss)
    monkeypatch.setattr(gc, "collect", lambda generation=2: collected.append((ours.global_step, generation)))
    for batch in ours.batches("train"):
        automatic.add(gc.isenabled())
        ours.step(batch)
    monkeypatch.undo()
    ours.finish()
    assert gc.isenabled()
    return collected, automatic


def test_garbage_collection_is_paced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert collections(tmp_path, {}, monkeypatch) == ([], {True})
    assert collections(tmp_path, {"interval": 3}, monkeypatch) == ([(3, 1), (6, 1)], {False})
    assert collections(tmp_path, {"interval": 2, "generation": 0}, monkeypatch)[0] == [(2, 0), (4, 0), (6, 0)]
    assert collections(tmp_path, {"interval": 5, "disable_automatic": False}, monkeypatch) == ([(5, 1)], {True})


def test_a_process_that_collects_by_hand_goes_on_doing_so(tmp_path: Path) -> None:
    gc.disable()
    try:
        losses_of(runner(tmp_path, {"gc": {"interval": 3}}), Net, TRAIN)
        assert not gc.isenabled()
    finally:
        gc.enable()
