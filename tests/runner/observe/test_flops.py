"""FLOPs of a model and the share of a device's peak: counted, not guessed; unset where they are not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danling_conf.records.metrics import read_metrics, series
from danling_conf.runner.batch import default_forward
from danling_conf.runner.observe import flops
from danling_conf.runner.observe.flops import Utilisation, peak_flops, peak_of_name
from tests.support.small import CLASSES, FEATURES, Net, Pairs, loss, runner
from tests.support.spawn import run

FORWARD = 2 * (FEATURES * 8 + 8 * CLASSES)
"""Of one sample: a multiplication and an addition for each weight."""
BACKWARD = 2 * FORWARD - 2 * FEATURES * 8
"""Twice as much, but nobody needs the gradient of the input."""


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989e12),
        ("NVIDIA H100 PCIe", "fp16", False, 756e12),
        ("NVIDIA A100-SXM4-40GB", None, True, 156e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", False, 19.5e12),
        ("Somebody's own", "bf16", True, None),
    ],
)
def test_peaks_of_devices(name: str, precision: str | None, tf32: bool, expected: float | None) -> None:
    assert peak_of_name(name, precision, tf32=tf32) == expected


def test_nothing_is_made_up_for_a_cpu(tmp_path: Path) -> None:
    assert peak_flops(torch.device("cpu"), "bf16") is None
    ours = runner(tmp_path)
    ours.fit(Net, {"train": Pairs()}, loss=loss)
    assert ours.setup.utilisation.flops_per_sample is None
    assert not any("train.mfu" in line for line in read_metrics(ours.world.attempt.run_directory))


@pytest.mark.parametrize("model", [Net, Net()], ids=["factory", "module"])
def test_the_model_s_flops(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "peak_flops", lambda device, precision: 1e6)
    used = Utilisation(model, default_forward, loss, device=torch.device("cpu"), precision=None, devices=4)
    state = torch.get_rng_state()
    used.count((torch.randn(6, FEATURES), torch.zeros(6, dtype=torch.long)))
    assert used.flops_per_sample == FORWARD + BACKWARD
    assert used.of(1000.0) == pytest.approx(1000 * (FORWARD + BACKWARD) / 4e6)
    if isinstance(model, nn.Module):
        assert all(parameter.grad is None and parameter.device.type == "cpu" for parameter in model.parameters())
    torch.set_rng_state(state)


class Reading(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * float(x.sum() > 0)


def test_a_model_that_cannot_run_without_data_has_no_utilisation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flops, "peak_flops", lambda device, precision: 1e6)
    ours = runner(tmp_path)
    ours.fit(Reading, {"train": Pairs()}, loss=loss)
    assert ours.global_step == 6
    assert "the model's FLOPs are not known" in (ours.world.attempt.directory / "rank-0.log").read_text()


def shares(root: str, parallel: dict[str, Any]) -> tuple[float | None, list[float], list[float]]:
    """FLOPs of a sample, and at each line MFU and samples per second."""
    flops.peak_flops = lambda device, precision: 1e9  # type: ignore[assignment]
    ours = runner(root, {"log_interval": 2, "accum_steps": 2, **parallel})
    ours.prepare(Net, {"train": Pairs(96)}, loss=loss)
    for batch in ours.batches("train"):
        ours.step(batch)
    ours.finish()
    history = read_metrics(ours.world.attempt.run_directory)
    return (
        ours.setup.utilisation.flops_per_sample,
        [value for _, value in series(history, "train.mfu")],
        [value for _, value in series(history, "train.samples_per_second")],
    )


@pytest.mark.slow
def test_the_whole_model_counts_under_any_layout(tmp_path: Path) -> None:
    parallel = {"parallel": {"axes": {"shard": 2}}, "fsdp": {"enabled": True}}
    for per_sample, found, speed in run(shares, 2, str(tmp_path), parallel):
        assert per_sample == FORWARD + BACKWARD
        assert len(found) == 3
        assert found == pytest.approx([each * (FORWARD + BACKWARD) / 2e9 for each in speed])
