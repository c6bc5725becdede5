"""Schedulers: shapes, torch's own with what the run fills in, resume."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from danling_conf.components import optimizer as build_optimizer
from danling_conf.components.scheduler import from_keywords, interval_of, is_metric_driven, make, ratio, resume
from danling_conf.schema.optim import OptimConfig
from danling_conf.schema.scheduler import SchedulerConfig

DECLARED = ("type", "interval", "monitor", "warmup_steps", "decay_steps", "final_lr_ratio")


def section(type_, **settings):
    made = SchedulerConfig(type=type_, **{key: settings.pop(key) for key in DECLARED if key in settings})
    for key, value in settings.items():
        setattr(made, key, value)
    return made


def sgd(lr=1.0, groups=1):
    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr / 2**number} for number in range(groups)]
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def rates(optimizer, scheduler, steps):
    """The learning rate that each update is made with."""
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def shaped(type_, steps, **settings):
    optimizer = sgd()
    return rates(optimizer, make(optimizer, section(type_, **settings), steps), steps + 2)


def test_a_constant_rate_costs_nothing():
    assert make(sgd(), section("constant"), 10) is None
    assert make(sgd(), section("constant", warmup_steps=0), 10) is None


def test_warm_up_is_linear_from_above_zero_and_then_the_shape():
    assert shaped("constant", 6, warmup_steps=3) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert shaped("linear", 6, warmup_steps=2) == pytest.approx([1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25, 0, 0])


def test_linear_and_cosine_end_at_the_final_ratio_and_stay():
    assert shaped("linear", 4, final_lr_ratio=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2, 0.2])
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)] + [0.1, 0.1]
    assert shaped("cosine", 4, final_lr_ratio=0.1) == pytest.approx(expected)


def test_cosine_is_that_of_torch():
    optimizer = sgd()
    theirs = rates(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, 8, eta_min=0.25), 8)
    assert shaped("cosine", 8, final_lr_ratio=0.25)[:8] == pytest.approx(theirs)


def test_wsd_is_flat_and_then_falls_over_its_last_steps():
    assert shaped("wsd", 6, warmup_steps=1, decay_steps=2) == pytest.approx([0.5, 1, 1, 1, 1, 0.5, 0, 0])
    assert shaped("wsd", 10) == pytest.approx([1] * 9 + [0.5, 0, 0])
    assert shaped("wsd", 3)[:3] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine", "wsd"])
def test_a_warm_up_as_long_as_the_run_is_allowed(shape):
    decay = 0 if shape == "wsd" else 1
    seen = [ratio(s, shape=shape, total_steps=4, warmup_steps=4, decay_steps=decay, final_ratio=0) for s in range(5)]
    assert seen[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert math.isfinite(seen[4])
    make(sgd(), section(shape, warmup_steps=4), 4)


def test_groups_keep_their_proportions():
    optimizer = sgd(groups=2)
    scheduler = make(optimizer, section("linear"), 4)
    rates(optimizer, scheduler, 2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.25])


@pytest.mark.parametrize("type_", ["wsd", "cosine", "cosineannealinglr", "onecyclelr", "polynomiallr", "exponentiallr"])
def test_a_schedule_goes_on_from_its_state(type_, tmp_path):
    settings = {"gamma": 0.8} if type_ == "exponentiallr" else {}
    one = sgd()
    first = make(one, section(type_, **settings), 10)
    rates(one, first, 4)
    torch.save([one.state_dict(), first.state_dict()], tmp_path / "state.pt")
    rest = rates(one, first, 6)
    two = sgd(lr=3.0)
    second = make(two, section(type_, **settings), 10)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    two.load_state_dict(states[0])
    second.load_state_dict(states[1])
    assert rates(two, second, 6) == pytest.approx(rest)


def test_a_prolonged_run_follows_the_longer_shape():
    one = sgd()
    first = make(one, section("linear"), 4)
    rates(one, first, 2)
    two = sgd()
    second = make(two, section("linear"), 8)
    second.load_state_dict(first.state_dict())
    second.step()
    assert two.param_groups[0]["lr"] == pytest.approx(1 - 3 / 8)


@pytest.mark.parametrize(
    ("type_", "settings", "kind", "filled"),
    [
        ("CosineAnnealingLR", {}, lr_scheduler.CosineAnnealingLR, {"T_max": 12}),
        ("cosineannealinglr", {"T_max": 5}, lr_scheduler.CosineAnnealingLR, {"T_max": 5}),
        ("linearlr", {}, lr_scheduler.LinearLR, {"total_iters": 12}),
        ("polynomiallr", {"power": 2.0}, lr_scheduler.PolynomialLR, {"total_iters": 12, "power": 2.0}),
        ("onecyclelr", {}, lr_scheduler.OneCycleLR, {"total_steps": 12}),
        ("onecyclelr", {"epochs": 2, "steps_per_epoch": 3}, lr_scheduler.OneCycleLR, {"total_steps": 6}),
        ("steplr", {"step_size": 3}, lr_scheduler.StepLR, {"step_size": 3}),
        ("plateau", {"patience": 2}, lr_scheduler.ReduceLROnPlateau, {"patience": 2, "mode": "min"}),
    ],
)
def test_schedulers_of_torch_get_their_options_and_the_length_of_the_run(type_, settings, kind, filled):
    scheduler = make(sgd(), section(type_, **settings), 12)
    assert type(scheduler) is kind
    assert {name: getattr(scheduler, name) for name in filled} == filled


def test_one_cycle_peaks_at_the_rate_of_each_group_and_lasts_the_run():
    optimizer = sgd(groups=2)
    seen = rates(optimizer, make(optimizer, section("onecyclelr"), 10), 10)
    assert max(seen) == pytest.approx(1.0)
    assert [group["max_lr"] for group in optimizer.param_groups] == [1.0, 0.5]


def test_a_plateau_takes_the_direction_of_its_metric():
    assert make(sgd(), section("plateau"), 5, metric_mode="max").mode == "max"
    assert make(sgd(), section("plateau", mode="min"), 5, metric_mode="max").mode == "min"
    optimizer = sgd()
    scheduler = make(optimizer, section("plateau", patience=0), 5, metric_mode="max")
    for accuracy in (0.1, 0.2, 0.3):
        scheduler.step(accuracy)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_when_a_scheduler_advances():
    assert interval_of(section("cosine")) == "step"
    assert interval_of(section("plateau")) == "epoch"
    assert interval_of(section("steplr", interval="epoch")) == "epoch"
    assert is_metric_driven(section("plateau"))
    assert not is_metric_driven(section("steplr"))


class OwnStep(lr_scheduler.LRScheduler):
    def __init__(self, optimizer, factor=0.5):
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self):
        return [base * self.factor**self.last_epoch for base in self.base_lrs]


class OwnPlateau(lr_scheduler.ReduceLROnPlateau):
    pass


def test_an_own_class_gets_its_options():
    optimizer = sgd()
    path = f"{__name__}.OwnStep"
    assert rates(optimizer, make(optimizer, section(path, factor=0.1), 5), 3) == pytest.approx([1, 0.1, 0.01])
    assert not is_metric_driven(section(path))
    assert is_metric_driven(section(path, monitor="val.loss"))
    assert is_metric_driven(section(f"{__name__}.OwnPlateau"))
    with pytest.raises(ValueError, match=r"scheduler\n +OwnStep .*unexpected keyword argument 'faktor'"):
        make(sgd(), section(path, faktor=0.1), 5)


@pytest.mark.parametrize(
    ("type_", "settings", "said"),
    [
        ("cosin", {}, "scheduler.type=cosin\n.*mean cosine"),
        ("linear", {"warmup_steps": 11}, "scheduler.warmup_steps=11\n.*10 times"),
        ("constant", {"warmup_steps": 11}, "scheduler.warmup_steps=11"),
        ("wsd", {"warmup_steps": 6, "decay_steps": 5}, "scheduler.decay_steps=5\n +with 6 steps of warm-up"),
        ("steplr", {"step_size": 2, "warmup_steps": 2}, "scheduler.warmup_steps=2\n +only a schedule by shape"),
        ("steplr", {}, "scheduler.step_size\n +StepLR needs it"),
        ("lambdalr", {}, "scheduler.type=LambdaLR\n.*by shape"),
        ("onecyclelr", {"pct_start": 3.0}, "scheduler\n +OneCycleLR refuses .*pct_start"),
        ("no_such_package.Warm", {}, "scheduler.type=no_such_package.Warm\n +it cannot be imported"),
    ],
)
def test_faults_say_where_what_and_how_to_fix(type_, settings, said):
    with pytest.raises(ValueError, match="(?s)" + said):
        make(sgd(), section(type_, **settings), 10)


def test_both_parts_of_muon_follow_the_schedule():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = build_optimizer.make(module, OptimConfig(type="muon", lr=1.0))
    scheduler = make(optimizer, section("linear"), 4)
    for _ in range(2):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert {group["algorithm"] for group in optimizer.param_groups} == {"muon", "adamw"}
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="cycle_momentum"):
        make(optimizer, section("onecyclelr"), 4)
    make(optimizer, section("onecyclelr", cycle_momentum=False), 4)


def test_from_keywords_takes_what_hydra_passes():
    optimizer = sgd()
    scheduler = from_keywords(type="steplr", step_size=2, interval="validation")(optimizer, total_steps=4)
    assert rates(optimizer, scheduler, 4) == pytest.approx([1, 1, 0.1, 0.1])


@pytest.mark.parametrize("type_", ["StepLR", "ExponentialLR", "cosine", "plateau"])
def test_a_new_optimizer_goes_on_at_the_rate_of_the_schedule(type_):
    """Where the optimizer's state is left out, its groups have the initial rate, which some schedules multiply."""
    settings = {"StepLR": {"step_size": 2, "gamma": 0.1}, "ExponentialLR": {"gamma": 0.5}, "plateau": {"patience": 0}}
    made = section(type_, **settings.get(type_, {}))
    optimizer, fresh = sgd(), sgd()
    saved = make(optimizer, made, 10, metric_mode="min")
    resumed = make(fresh, made, 10, metric_mode="min")
    for _ in range(5):
        optimizer.step()
        saved.step(*([1.0] if type_ == "plateau" else []))
    resume(resumed, saved.state_dict(), rates=True)
    assert fresh.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1.0
