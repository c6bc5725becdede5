"""A forward that differentiates itself is refused where a gather has no second derivative."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from danling_conf.parallel.second_derivatives import NoSecondDerivatives, are_missing
from danling_conf.schema import Layout
from danling_conf.topology.violation import SettingError


@pytest.mark.parametrize(
    ("layout", "create_graph", "path"),
    [
        (Layout(tensor=2), True, "parallel.axes.tensor"),
        (Layout(tensor=2), False, None),
        (Layout(replicate=2, context=2), True, "parallel.axes.context"),
        (Layout(shard=2, fsdp=True), True, "fsdp.enabled"),
        (Layout(shard=2, fsdp=True), False, "fsdp.enabled"),
    ],
)
def test_what_the_layout_cannot_do_is_refused(layout: Layout, create_graph: bool, path: str | None) -> None:
    x = torch.ones(3, requires_grad=True)
    expected: Any = nullcontext() if path is None else pytest.raises(SettingError, match="differentiates itself")
    with expected as refused, NoSecondDerivatives(layout):
        torch.autograd.grad(x.square().sum(), x, create_graph=create_graph)
    assert path is None or refused.value.violation.path == path


def test_replicas_have_them() -> None:
    assert not are_missing(Layout(replicate=4))
