"""Plans: what their names stand for, and the words that they are written in."""

from __future__ import annotations

from torch import nn

from danling_conf.parallel import tensor
from danling_conf.parallel.plan import matches, plan_of, unmatched
from danling_conf.schema.parallel import TENSOR_STYLES


def model() -> nn.Module:
    blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 4), "down": nn.Linear(4, 2)}) for _ in range(2)])
    return nn.ModuleDict({"layers": blocks, "head": nn.Linear(2, 2)})


def test_a_star_is_one_part_of_a_name_and_later_entries_win() -> None:
    plan = {
        "layers.*.up": "colwise",
        "layers.1.up": "rowwise",
        "head": "colwise_rep",
        "layers.0.down.weight": "special",
    }
    assert list(matches(model(), plan)) == [
        ("layers.0.up", "colwise", False),
        ("layers.1.up", "rowwise", False),
        ("head", "colwise_rep", False),
        ("layers.0.down.weight", "special", True),
    ]
    assert unmatched(model(), {"layers.*": "a", "*.up": "b", "heads": "c"}) == ["*.up", "heads"]


def test_a_model_has_a_plan_where_it_has_entries() -> None:
    made = model()
    assert plan_of(made, "tp_plan") is None
    made.tp_plan = {}
    assert plan_of(made, "tp_plan") is None
    made.tp_plan = {"head": "colwise"}
    assert plan_of(made, "tp_plan") == {"head": "colwise"}


def test_every_style_that_the_schema_knows_can_be_made() -> None:
    made = tensor._styles()
    assert made.keys() == TENSOR_STYLES.keys()
    assert all(make() is not None for make in made.values())
