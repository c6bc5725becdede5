"""Refused is what this package finds; what the user's code raises keeps its trace."""

from __future__ import annotations

import pytest

from danling_conf.parallel.fsdp import shard
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.topology.violation import ConfigRefused, refused


def test_a_builder_s_fault_is_refused_with_path_rule_and_fix() -> None:
    with pytest.raises(ConfigRefused) as caught, refused():
        shard(None, FsdpConfig(enabled=True), None)  # type: ignore[arg-type]
    (violation,) = caught.value.violations
    assert (violation.path, violation.value) == ("fsdp.enabled", True)
    assert "no shard axis" in violation.rule
    assert "choose a layout" in violation.fix


def test_an_error_of_the_user_s_code_is_left_alone() -> None:
    def factory() -> None:
        raise ValueError("my model: bug at layer 3: expected 5 got 6")

    with pytest.raises(ValueError, match="bug at layer 3") as caught, refused():
        factory()
    assert not isinstance(caught.value, ConfigRefused)
