"""What a plan asks of a model that it does not have: all of it is reported at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from danling_conf.parallel import expert, tensor
from danling_conf.schema import Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import ConfigRefused, SettingError


def test_each_name_of_a_plan_that_matches_nothing_is_reported() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    section = ParallelConfig(tensor_plan={"heads": "colwise", "head": "rowwise", "blocks.*.up": "colwise"})
    with pytest.raises(ConfigRefused) as refused:
        tensor.plan_for(model, section, 2)
    assert [(item.path, item.value) for item in refused.value.violations] == [
        ("parallel.tensor_plan.heads", "colwise"),
        ("parallel.tensor_plan.blocks.*.up", "colwise"),
    ]


def test_numbers_that_the_degree_does_not_divide_are_one_sentence() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    model.tensor_divisors = {"model.heads": 3, "model.kv_heads": 1, "model.width": 4}  # type: ignore[assignment]
    with pytest.raises(SettingError) as refused:
        tensor.plan_for(model, ParallelConfig(tensor_plan={"head": "colwise"}), 2)
    violation = refused.value.violation
    assert (violation.path, violation.value) == ("parallel.axes.tensor", 2)
    assert violation.rule == "it must divide model.heads=3 and model.kv_heads=1"


@pytest.mark.parametrize("changed", [parametrizations.weight_norm, spectral_norm])
def test_a_weight_that_is_computed_is_not_sharded(changed: Any) -> None:
    model = nn.ModuleDict({"up": changed(nn.Linear(4, 4))})
    mesh: Any = SimpleNamespace(size=lambda: 2)  # looked at no further
    with pytest.raises(SettingError, match="the weight of up is computed of other parameters"):
        tensor.parallelize(model, {"up": "colwise"}, mesh, loss_parallel=False)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(nn.Linear(3, 3).weight.detach().expand(3, 3, 3).clone()) for _ in range(2))


def test_experts_that_the_degrees_do_not_divide() -> None:
    model = nn.ModuleDict({str(number): Experts() for number in range(3)})
    model.ep_plan = {"*": expert.GROUPED, "*.up": "colwise"}  # type: ignore[assignment]
    layout = Layout(shard=4, expert=2, expert_tensor=2, fsdp=True)
    with pytest.raises(ConfigRefused) as refused:
        expert.parallelize(model, layout, None, None)  # type: ignore[arg-type]
    assert [(item.path, item.value, item.rule) for item in refused.value.violations] == [
        (
            "parallel.axes.expert",
            2,
            "it must divide the 3 experts of 0.up and 3 experts of 0.down and 3 experts of 1.up and 3 more",
        ),
        (
            "parallel.axes.expert_tensor",
            2,
            "the ep_plan of ModuleDict does not say how to shard 0.down and 1.down and 2.down",
        ),
        (
            "parallel.axes.expert_tensor",
            2,
            "it must divide the width 3 of 0.up and width 3 of 1.up and width 3 of 2.up",
        ),
    ]
