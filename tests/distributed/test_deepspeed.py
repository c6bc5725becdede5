"""Runs on `stack=deepspeed`: what one process without it trains, under every stage of ZeRO and on 1, 2 and 4 ranks.

A world of ranks is called once for all of its cases: they share what the first one imports.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from tests.support.small import Net, Pairs, runner
from tests.support.spawn import shared

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
GLOBAL_BATCH = 16

SETTINGS: dict[str, Any] = {
    "steps": 3,
    "optim": {"type": "adamw", "lr": 0.01, "param_groups": [{"pattern": "bias$", "weight_decay": 0.0}]},
    "dataloader": {"val": {"batch_size": 4}},
    "log_interval": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, clipping, unequal tokens": {"accum_steps": 2, "max_grad_norm": 0.05},
    "SGD, rest of an epoch": {
        "steps": None, "epochs": 2, "accum_steps": 2, "accum_remainder": "step",
        "optim": {"type": "sgd", "lr": 0.1, "momentum": 0.9, "param_groups": None},
    },
    "schedule by step": {"scheduler": {"type": "cosine", "warmup_steps": 1}, "accum_steps": 2},
    "schedule by metric": {
        "eval_interval": 1, "scheduler": {"type": "plateau", "factor": 0.5, "patience": 0, "threshold": 0.5},
    },
}  # fmt: skip
"""Ways to train. What happens to the learning rate shows in the weights."""


class Tied(nn.Module):
    """A frozen layer, a tied weight, and a parameter that no four ranks share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.again = nn.Linear(5, 8)
        self.again.weight = self.net.first.weight
        self.odd = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(x)) * self.odd + self.again(x)[:, :3]


def per_sample(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum and its count, of samples that are unequally many on every rank."""
    used = (batch[0][:, 0] > -0.3).float()
    return (nn.functional.cross_entropy(output.float(), batch[1], reduction="none") * used).sum(), used.sum()


def whole_weights(trained: Any) -> dict[str, Tensor]:
    engine = trained.setup.assembled.engine
    if engine is None:
        return {name: item.detach().clone() for name, item in trained.model.state_dict().items()}
    with engine.whole_weights():
        return {name: item.detach().clone() for name, item in trained.model.state_dict().items()}


def settings_of(degree: int, changes: Mapping[str, Any], stage: int | None) -> dict[str, Any]:
    size = GLOBAL_BATCH // degree // int(changes.get("accum_steps", 1))
    layout = {"dataloader": {"batch_size": size}, "parallel": {"axes": {"replicate": degree}}}
    merged = OmegaConf.to_container(OmegaConf.merge(SETTINGS, layout, dict(changes)))
    if stage is not None:
        zero = {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        merged = OmegaConf.to_container(OmegaConf.merge(zero, merged))  # type: ignore[arg-type]
    return merged  # type: ignore[return-value]


def trained(root: str, degree: int, changes: Mapping[str, Any], stage: int | None, **options: Any) -> dict[str, Any]:
    model = options.pop("model", Tied)
    options.setdefault("loss", per_sample)
    options.setdefault("callbacks", [])
    train = options.pop("train", None) or Pairs(56)
    run = runner(root, settings_of(degree, changes, stage))
    try:
        run.prepare(model, {"train": train, "val": Pairs(9, seed=1)}, **options)
        began = run.global_step
        losses = [run.step(batch).item() for batch in run.batches("train")]
        run.finish()
        rates = [group["lr"] for group in run.optimizer.param_groups]
        return {
            "weights": whole_weights(run),
            "results": run.results,
            "rates": rates,
            "losses": losses,
            "began": began,
            "run": str(run.world.attempt.run_directory),
        }
    finally:
        run.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@functools.cache
def alone(root: str, variant: str) -> dict[str, Any]:
    return trained(root, 1, VARIANTS[variant], None)


def close(found: Mapping[str, Any], expected: Mapping[str, Any], within: float = 1e-6) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=within)
    for name in ("val.loss",):
        assert found["results"][name] == pytest.approx(expected["results"][name], abs=within * 10)
    assert found["rates"] == pytest.approx(expected["rates"])


def cases(root: str, degree: int, chosen: list[tuple[int, str]]) -> dict[tuple[int, str], dict[str, Any]]:
    linear = nn.functional.linear
    found = {(stage, variant): trained(root, degree, VARIANTS[variant], stage) for stage, variant in chosen}
    assert nn.functional.linear is linear, "DeepSpeed has replaced a function of torch for the whole process"
    return found


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_every_stage_is_one_process(root: str, degree: int) -> None:
    """Weights after some steps, the score and the learning rates."""
    fewer = [variant for variant in VARIANTS if degree == 2 or variant in list(VARIANTS)[1:2]]
    chosen = [(stage, variant) for stage in STAGES for variant in fewer]
    for of_rank in shared(cases, degree, root, degree, chosen):
        for (_, variant), found in of_rank.items():
            close(found, alone(root, variant))
