"""The learning-rate curves of DanLing, against rates that the release computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from danling_conf.cli.importing.optimization import CURVE
from danling_conf.components import scheduler
from danling_conf.schema.scheduler import SchedulerConfig
from danling_conf.topology.violation import SettingError

CASES = json.loads((Path(__file__).parent / "fixtures" / "rates.json").read_text())


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


def made(total_steps: int, **options):
    section = SchedulerConfig(type=CURVE)
    for name, value in options.items():
        setattr(section, name, value)
    assert scheduler.needs_length(section)
    return scheduler.make(optimizer(), section, total_steps)


def rates(schedule, count: int) -> list[float]:
    found = []
    for _ in range(count):
        found.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case["options"].values())))
def test_rate_for_rate(case):
    options = dict(case["options"])
    schedule = made(options.pop("total_steps"), method=options.pop("type"), **options)
    assert rates(schedule, 40) == pytest.approx(case["rates"], rel=1e-12)


def test_resumed_in_the_middle():
    whole = rates(made(40, method="cosine"), 40)
    first = made(40, method="cosine")
    rates(first, 15)
    second = made(40, method="cosine")
    scheduler.resume(second, first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(second, 25) == pytest.approx(whole[15:])


def test_resumed_for_a_longer_run():
    first = made(40, method="linear")
    rates(first, 15)
    longer = made(80, method="linear")
    scheduler.resume(longer, first.state_dict())
    assert rates(longer, 65) == pytest.approx(rates(made(80, method="linear"), 80)[15:])


@pytest.mark.parametrize(
    "options", [{"method": "cubic"}, {"final_lr": 1, "final_lr_ratio": 1}, {"warmup_steps": 9}, {"scaling": "odd"}]
)
def test_refusals(options):
    with pytest.raises(SettingError, match="DanLingLR refuses"):
        made(10, **options)
