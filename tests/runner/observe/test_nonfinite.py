"""Losses and gradients that are not finite: counted, left out or the end, on all ranks alike, with their samples."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from danling_conf.records.metrics import read_metrics
from danling_conf.runner.observe.nonfinite import NotFinite
from tests.distributed.test_runner import LENGTH, VOCABULARY, Tokens
from tests.distributed.test_runner import loss as token_loss
from tests.support.small import Net, Pairs, equal, loss, runner, weights
from tests.support.spawn import run

BAD_SAMPLE = 7


class OneBad(Pairs):
    """Of which one sample's features are not a number."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = super().__getitem__(index)
        return inputs * (math.nan if index == BAD_SAMPLE else 1.0), targets


class BadGradient(torch.autograd.Function):
    """The identity, with gradients that are not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.inf


def of_log(ours: Any) -> list[dict[str, Any]]:
    path = ours.observers.nonfinite.record
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bad_batch(ours: Any, batch_size: int, epoch: int = 0) -> tuple[int, list[int]]:
    """The micro-batch that holds the bad sample, and its samples."""
    sampler = ours.loaders["train"].sampler
    order = sampler.samples(epoch, 0, len(sampler))
    number = order.index(BAD_SAMPLE) // batch_size
    return number, order[number * batch_size : (number + 1) * batch_size]


@pytest.mark.parametrize("log_interval", [1, 6])
def test_counted_with_its_samples(tmp_path: Path, log_interval: int, capsys: pytest.CaptureFixture[str]) -> None:
    ours = runner(tmp_path, {"log_interval": log_interval, "optim": {"lr": 0.0}, "epochs": 2, "steps": None})
    ours.fit(Net, {"train": OneBad()}, loss=loss)
    expected = []
    for epoch in (0, 1):
        number, indices = bad_batch(ours, 4, epoch)
        assert BAD_SAMPLE in indices
        expected.append({"step": 6 * epoch + number + 1, "epoch": epoch, "what": "loss", "micro_batch": number,
                         "indices": indices})  # fmt: skip
    # With a learning rate of 0 the weights become not a number at the first bad step, and all that follow are bad.
    assert of_log(ours)[0] == expected[0]
    history = read_metrics(ours.world.attempt.run_directory)
    assert history[-1]["train.nonfinite_steps"] == 12 - expected[0]["step"] + 1
    out = capsys.readouterr().out
    assert out.count("the loss or the gradients are not finite") == 1  # said once
    assert str(expected[0]["step"]) in out


def test_skipped_as_if_the_step_had_not_been(tmp_path: Path) -> None:
    """The weights are those of a run without the bad batch, momentum and weight decay included."""
    adamw = {"type": "adamw", "lr": 0.01, "weight_decay": 0.1}
    settings = {"nonfinite": "skip", "log_interval": 4, "optim": adamw, "accum_steps": 2,
                "dataloader": {"batch_size": 2}}  # fmt: skip
    ours = runner(tmp_path, settings)
    ours.prepare(Net, {"train": OneBad()}, loss=loss)
    kept = [weights(ours)]
    for batch in ours.batches("train"):
        ours.step(batch)
        kept.append(weights(ours))
    ours.finish()
    number, indices = bad_batch(ours, 2)
    step = number // 2  # counted from 0; each has two micro-batches
    assert equal(kept[2 * step], kept[2 * step + 2])
    assert all(not equal(kept[2 * other], kept[2 * other + 2]) for other in range(6) if other != step)
    assert ours.global_step == 6
    assert ours.observers.nonfinite.steps == 1
    loss_line, gradients = of_log(ours)
    assert loss_line == {"step": step + 1, "epoch": 0, "what": "loss", "micro_batch": number, "indices": indices}
    assert gradients == {"step": step + 1, "epoch": 0, "what": "gradients"}


def test_the_end_where_that_is_asked_for(tmp_path: Path) -> None:
    settings = {
        "nonfinite": "fail",
        "log_interval": 100,
        "eval_interval": 6,
        "checkpoint": {"load_only": False, "interval": 6},
    }
    ours = runner(tmp_path, settings)
    with pytest.raises(NotFinite, match=r"are not finite; batches are in .*nonfinite-rank"):
        ours.fit(Net, {"train": OneBad()}, loss=loss)
    assert ours.global_step == 6  # before the evaluation and the checkpoint at the end
    assert not list((ours.world.attempt.run_directory / "checkpoints").glob("ckpt-*"))
    assert of_log(ours)[0]["indices"] == bad_batch(ours, 4)[1]
    runner(tmp_path, {"nonfinite": "fail"}).fit(Net, {"train": Pairs()}, loss=loss)


def test_samples_that_cannot_be_written_down_stop_nothing(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"nonfinite": "skip"})
    ours.prepare(Net, {"train": OneBad()}, loss=loss)
    ours.observers.nonfinite.record = tmp_path / "nowhere" / "file"
    for batch in ours.batches("train"):
        ours.step(batch)
    ours.finish()
    log = (ours.world.attempt.directory / "rank-0.log").read_text()
    assert "could not be written down" in log
    assert str(bad_batch(ours, 4)[1]) in log


def test_gradients_alone(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"nonfinite": "skip", "steps": 2})

    class Infinite(Net):
        def forward(self, x: Tensor) -> Tensor:
            return BadGradient.apply(super().forward(x))

    ours.prepare(Infinite, {"train": Pairs()}, loss=loss)
    before = weights(ours)
    losses = [ours.step(batch).item() for batch in ours.batches("train")]
    ours.finish()
    assert all(math.isfinite(value) for value in losses)
    assert equal(before, weights(ours))
    assert [line["what"] for line in of_log(ours)] == ["gradients", "gradients"]


def test_a_loss_scaler_deals_with_its_own_overflows(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"precision": "fp16", "nonfinite": "fail", "steps": 3, "max_grad_norm": 1.0})
    ours.prepare(Net, {"train": Pairs()}, loss=loss)
    ours.setup.scaler._init_scale = 1e38
    for batch in ours.batches("train"):
        ours.step(batch)
    ours.finish()


def on_ranks(root: str, mode: str, parallel: dict[str, Any]) -> dict[str, Any]:
    settings = {"nonfinite": mode, "log_interval": 3, "steps": 3, **parallel}
    ours = runner(root, settings)
    ours.prepare(Net, {"train": OneBad()}, loss=loss)
    error = ""
    try:
        for batch in ours.batches("train"):
            ours.step(batch)
        ours.finish()
    except NotFinite as found:
        error = str(found)
        ours.close()
    sampler = ours.loaders["train"].sampler
    order = sampler.samples(0, 0, len(sampler))
    return {"error": error, "bad": ours.observers.nonfinite.steps, "has": BAD_SAMPLE in order, "log": of_log(ours),
            "finite": all(bool(parameter.isfinite().all()) for parameter in ours.model.parameters()),
            "batches": [order[4 * number : 4 * number + 4] for number in range(3)]}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["count", "skip", "fail"])
@pytest.mark.parametrize("layout", ["ddp2", "fsdp2"])
def test_all_ranks_decide_alike(tmp_path: Path, mode: str, layout: str) -> None:
    sharded = layout == "fsdp2"
    axes = {"shard": 2} if sharded else {"replicate": 2}
    found = run(on_ranks, 2, str(tmp_path), mode, {"parallel": {"axes": axes}, "fsdp": {"enabled": sharded}})
    assert found[0]["error"].partition(";")[0] == found[1]["error"].partition(";")[0]
    assert bool(found[0]["error"]) == (mode == "fail")
    assert found[0]["bad"] == found[1]["bad"] > 0
    (owner,) = [rank for rank in (0, 1) if found[rank]["has"]]
    first = next(line for line in found[owner]["log"] if line["what"] == "loss")
    assert BAD_SAMPLE in first["indices"]
    assert first["indices"] == found[owner]["batches"][first["micro_batch"]]
    if mode == "skip":
        assert found[0]["bad"] == 1
        assert found[0]["finite"]
        assert found[1]["finite"]
        # The other rank's loss was fine; the gradients that both have were not.
        assert {line["what"] for line in found[1 - owner]["log"]} == {"gradients"}


def in_a_pipeline(root: str, name: str) -> dict[str, Any]:
    """The loss of one batch is not a number, which only the last stage sees."""
    from functools import partial

    from danling_conf.groups.source import layout_settings
    from models.decoder import Decoder, DecoderConfig

    seen: list[int] = []

    def bad_loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(ours.global_step)
        return token_loss(output, batch) * (math.nan if ours.global_step == 1 else 1.0)

    settings = {"nonfinite": "skip", "log_interval": 3, "steps": 3, "dataloader": {"batch_size": 4}}
    ours = runner(root, {**settings, **layout_settings(name)})
    model = DecoderConfig(width=16, depth=2, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY)
    ours.prepare(partial(Decoder, model), {"train": Tokens(32, 0)}, loss=bad_loss)
    kept = []
    for batch in ours.batches("train"):
        ours.step(batch)
        kept.append([getattr(item, "to_local", lambda item=item: item)().detach().clone() for part in ours.parts
                     for item in part.parameters()])  # fmt: skip
    ours.finish()
    same = [all(map(torch.equal, before, after)) for before, after in itertools.pairwise(kept)]
    return {"bad": ours.observers.nonfinite.steps, "same": same}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pp2", "tp2"])
def test_stages_and_parts_of_a_model_decide_alike(tmp_path: Path, name: str) -> None:
    for found in run(in_a_pipeline, 2, str(tmp_path), name):
        assert found == {"bad": 1, "same": [True, False]}  # the second of three steps was left out
