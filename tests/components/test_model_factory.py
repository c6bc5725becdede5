"""A model that the configuration names."""

from __future__ import annotations

import pytest
from torch import nn

from danling_conf.components.instantiate import model_factory


def test_a_target_and_its_arguments_make_a_model() -> None:
    section = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear", "in_features": 2,
                                                              "out_features": 3}]}  # fmt: skip
    made = model_factory(section)()
    assert isinstance(made, nn.Sequential)
    assert made[0].out_features == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"width": 3}, r"^model\._target_\n\s+no model was passed"),
        ({"_target_": "torch.nn.Linaer"}, r"^model\._target_=torch\.nn\.Linaer\n\s+.*Linaer"),
        ({"_target_": "torch.nn.Linear", "in_feature": 3}, r"^model\._target_=torch\.nn\.Linear\n\s+.*in_feature"),
    ],
)
def test_what_cannot_be_made_says_why(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="(?s)" + message):
        model_factory(section)()
