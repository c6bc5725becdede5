"""Families of transformers get the initial weights of a plain call, bit for bit, also where ranks replay it."""

from __future__ import annotations

import pytest
import torch

from danling_conf.parallel.init_plan import record, seeded
from danling_conf.parallel.initialize import materialize
from tests.support.families import FAMILIES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", FAMILIES)
def test_a_replayed_construction_is_bitwise_a_plain_call(name: str) -> None:
    source = record(FAMILIES[name].build, 3)
    model = source.model
    materialize([model], device=torch.device("cpu"), source=source)
    with seeded(3):
        expected = FAMILIES[name].build()
    ours = dict(model.named_parameters()) | dict(model.named_buffers())
    theirs = dict(expected.named_parameters()) | dict(expected.named_buffers())
    assert list(ours) == list(theirs)
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
