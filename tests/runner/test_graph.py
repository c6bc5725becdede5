"""The graph stack in a whole run: what the run without it trains, saved and resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.resumed_runs import train
from tests.support.small import DropoutNet, Net, equal

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"steps": 6, "accum_steps": 2, "max_grad_norm": 0.5, "eval_interval": 3}
GRAPH = {**SETTINGS, "stack": "graph", "compile": {"backend": "aot_eager"}, "checkpoint": {"interval": 2}}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_a_run_is_that_without_a_graph(tmp_path: Path) -> None:
    """Accumulation, clipping, a schedule, evaluation: the same losses, scores and weights."""
    expected = train(tmp_path / "eager", SETTINGS, model=Net)
    found = train(tmp_path / "graph", GRAPH, model=Net)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["results"] == pytest.approx(expected["results"], rel=1e-4)
    assert found["rates"] == expected["rates"]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-3, atol=1e-5)
    assert torch._dynamo.config.trace_autograd_ops is False


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", GRAPH, model=DropoutNet)
    torch._dynamo.reset()
    killed = train(tmp_path / "killed", GRAPH, kill_at=5, model=DropoutNet)
    torch._dynamo.reset()
    resumed = train(tmp_path / "killed", {**GRAPH, "resume": str(killed["run"])}, model=DropoutNet)
    assert resumed["began"] == 4
    assert resumed["losses"] == whole["losses"][-4:]
    assert equal(resumed["weights"], whole["weights"])
