"""The tables of options are torch's own, and faults of options are found without torch."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from danling_conf.schema.optim import OptimConfig
from danling_conf.schema.scheduler import SchedulerConfig
from danling_conf.schema.torch_options import (
    OPTIMIZERS,
    SCHEDULERS,
    find_optimizer,
    find_scheduler,
    group_problems,
    optimizer_options,
    option_problems,
    scheduler_options,
)

NOT_OPTIONS = {"self", "params", "optimizer", "last_epoch", "verbose"}


def accepted(kind):
    parameters = inspect.signature(kind.__init__).parameters
    return {name: item for name, item in parameters.items() if name not in NOT_OPTIONS}


def optimizer_classes():
    import torch

    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            yield name, kind


def scheduler_classes():
    from torch.optim import lr_scheduler, swa_utils

    for module in (lr_scheduler, swa_utils):
        for name, kind in vars(module).items():
            if not inspect.isclass(kind) or name in ("LRScheduler", "_LRScheduler"):
                continue
            if issubclass(kind, lr_scheduler.LRScheduler):
                yield name, kind


def compare(entry, kind):
    theirs = accepted(kind)
    ours = {name for name, option in entry.options.items() if not option.own}
    assert ours | set(entry.objects) == set(theirs), f"add to or remove from the table of {kind.__name__}"
    required = {name for name, item in theirs.items() if item.default is inspect.Parameter.empty}
    assert {name for name, option in entry.options.items() if option.required} == required
    kinds = {
        bool: "bool",
        int: ("int", "float"),
        float: ("float", "float or floats"),
        str: "str",
        tuple: ("floats", "any"),
    }
    for name, option in entry.options.items():
        default = theirs[name].default if name in theirs else None
        if default not in (None, inspect.Parameter.empty):
            assert option.kind in kinds[type(default)] or option.kind == "float or floats", (kind.__name__, name)
            if isinstance(default, tuple) and option.length is not None:
                assert option.length == len(default)
            if option.choices is not None:
                assert default in option.choices


def test_every_optimizer_of_torch_is_in_the_table_with_its_options():
    classes = dict(optimizer_classes())
    assert set(classes) == set(OPTIMIZERS)
    for name, kind in classes.items():
        compare(OPTIMIZERS[name], kind)


def test_every_scheduler_of_torch_is_in_the_table_with_its_options():
    classes = dict(scheduler_classes())
    assert set(classes) == {name for name, entry in SCHEDULERS.items() if not entry.shape}
    for name, kind in classes.items():
        if SCHEDULERS[name].refused is None:
            compare(SCHEDULERS[name], kind)


def test_the_tables_need_no_torch():
    code = "import danling_conf.schema.torch_options, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["adamw", "AdamW", "ADAMW", "torch.optim.AdamW"])
def test_names_are_found_in_any_case(name):
    assert find_optimizer(name) is OPTIMIZERS["AdamW"]


def test_unknown_names_and_own_classes():
    assert find_optimizer("adamv") is None
    assert find_scheduler("cosin") is None
    assert find_optimizer("my.package.Lion").own_class
    assert option_problems(find_optimizer("my.package.Lion"), {"anything": object()}) == []


def test_aliases_and_shapes_of_schedulers():
    assert find_scheduler("plateau") is find_scheduler("reducelronplateau") is SCHEDULERS["ReduceLROnPlateau"]
    assert find_scheduler("plateau").metric_driven
    assert not find_scheduler("steplr").metric_driven
    assert all(find_scheduler(shape).shape for shape in ("constant", "linear", "cosine", "wsd"))


def only(problems):
    assert len(problems) == 1, problems
    return problems[0]


@pytest.mark.parametrize(
    ("type_", "options", "option", "said"),
    [
        ("adamw", {"beta": [0.9, 0.95]}, "beta", "mean betas?"),
        ("adamw", {"betas": 0.9}, "betas", "list of numbers"),
        ("adamw", {"betas": [0.9]}, "betas", "2 numbers"),
        ("adamw", {"betas": ["a", "b"]}, "betas", "list of numbers"),
        ("sgd", {"nesterov": 1}, "nesterov", "bool"),
        ("sgd", {"momentum": "0.9"}, "momentum", "number"),
        ("sgd", {"momentum": True}, "momentum", "number"),
        ("sgd", {"params": []}, "params", "remove"),
        ("lbfgs", {"max_iter": 2.5}, "max_iter", "integer"),
        ("muon", {"adjust_lr_fn": "match_rms"}, "adjust_lr_fn", "mean match_rms_adamw?"),
    ],
)
def test_faults_of_optimizer_options(type_, options, option, said):
    problem = only(option_problems(find_optimizer(type_), options))
    assert problem.option == option
    assert problem.value == options[option]
    assert said in problem.why + problem.fix


@pytest.mark.parametrize(
    ("type_", "options", "option", "said"),
    [
        ("steplr", {}, "step_size", "needs it"),
        ("steplr", {"step_size": 3, "warmup_steps": 4}, "warmup_steps", "by shape"),
        ("cosine", {"decay_steps": 4}, "decay_steps", "no such option"),
        ("multisteplr", {"milestones": [1, 2.5]}, "milestones", "list of integers"),
        ("cycliclr", {"base_lr": 0.1, "max_lr": [1, 2], "scale_fn": "f"}, "scale_fn", "Python object"),
        ("plateau", {"mode": "maximum"}, "mode", "mean max?"),
        ("lambdalr", {}, "type", "Python function"),
        ("swalr", {"swa_lr": 0.1}, "type", "cannot be built"),
    ],
)
def test_faults_of_scheduler_options(type_, options, option, said):
    problem = only(option_problems(find_scheduler(type_), options))
    assert problem.option == option
    assert said in problem.why + problem.fix


def test_what_the_run_fills_may_be_left_out():
    for type_ in ("cosineannealinglr", "linearlr", "polynomiallr", "onecyclelr"):
        assert option_problems(find_scheduler(type_), {}) == []


def test_null_counts_as_left_out():
    assert option_problems(find_optimizer("adamw"), {"betas": None, "fused": None}) == []
    assert only(option_problems(find_scheduler("steplr"), {"step_size": None})).option == "step_size"


def test_options_of_sections_are_declared_and_open_ones_with_a_value():
    optim = OptimConfig(type="sgd", lr=0.1)
    optim.momentum = 0.9
    assert optimizer_options(optim) == {"lr": 0.1, "momentum": 0.9}
    scheduler = SchedulerConfig(type="wsd", warmup_steps=3, interval="epoch")
    scheduler.gamma = None
    assert scheduler_options(scheduler) == {"warmup_steps": 3}


@pytest.mark.parametrize(
    ("type_", "group", "option", "said"),
    [
        ("sgd", {"lr": 0.1}, "pattern", "regular expression"),
        ("sgd", {"pattern": "("}, "pattern", "regular expression"),
        ("sgd", {"pattern": "a", "lr": 0.1, "lr_multiplier": 2.0}, "lr_multiplier", "keep one"),
        ("sgd", {"pattern": "a", "lr_multiplyer": 2.0}, "lr_multiplyer", "mean lr_multiplier?"),
        ("sgd", {"pattern": "a", "lr_multiplier": "2"}, "lr_multiplier", "number"),
        ("sgd", {"pattern": "a", "beta1": 0.8}, "beta1", "no `betas`"),
        ("sgd", {"pattern": "a", "algorithm": "muon"}, "algorithm", "no such option"),
        ("rprop", {"pattern": "a", "weight_decay_multiplier": 0.0}, "weight_decay_multiplier", "no `weight_decay`"),
        ("adamw", {"pattern": "a", "betas": [0.9, 0.9], "beta2": 0.8}, "beta2", "keep one"),
        ("muon", {"pattern": "a", "algorithm": "adam"}, "algorithm", "`adamw`"),
    ],
)
def test_faults_of_parameter_groups(type_, group, option, said):
    problem = only(group_problems(find_optimizer(type_), group))
    assert problem.option == option
    assert said in problem.why + problem.fix


def test_sound_parameter_groups():
    adamw, muon = find_optimizer("adamw"), find_optimizer("muon")
    assert group_problems(adamw, {"pattern": "bias$", "weight_decay": 0, "lr_multiplier": 2, "beta1": 0.8}) == []
    assert group_problems(muon, {"pattern": "x", "algorithm": "adamw", "eps": 1e-8, "amsgrad": True}) == []
