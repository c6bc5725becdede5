"""Plans against real ranks: some of the cells of `make plan-accuracy`."""

from __future__ import annotations

import pytest

from tests.plan.accuracy import CELLS, TOLERANCE, compare

CHOSEN = (
    "llama single",
    "decoder fsdp2 precision=bf16 activation_checkpointing.mode=full accum_steps=2 max_grad_norm=1",
    "decoder tp2",
    "decoder single compile.enable=true compile.backend=aot_eager compile.memory_policy=budget:0.3",
    "decoder pp2 parallel.pipeline_schedule=DualPipeV",
    "experts fsdp2_ep2",
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CHOSEN)
def test_each_rank_takes_what_was_planned(name):
    cell = next(cell for cell in CELLS if str(cell) == name)
    outcome = compare(cell)
    assert len(outcome.measured) == cell.world_size
    assert max(map(abs, outcome.errors)) < TOLERANCE, outcome
