"""A device without memory: the error names step and settings, a loop can survive it, and the run records the word."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from danling_conf.records.status import EXIT_FAILED, Status, outcome_of
from danling_conf.runner.observe.out_of_memory import OutOfMemory, ways_out
from tests.support.command_line import run, write_app
from tests.support.small import Net, Pairs, config, loss, runner

APP = """
from __future__ import annotations
import torch
from torch import nn
import danling_conf
from tests.support.small import Pairs, loss

class Block(nn.Module):
    # Its device is full in the twentieth forward, which a plan does not come to.
    def __init__(self):
        super().__init__()
        self.map, self.calls = nn.Linear(5, 5), 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\\nSee documentation")
        return torch.tanh(self.map(x))

class Full(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

@danling_conf.main()
def train(config):
    return danling_conf.Runner(config).fit(Full, {{"train": Pairs(96)}}, loss=loss)

if __name__ == "__main__":
    train()
"""


class FullOnce(Net):
    """Runs out of memory in its second forward."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


def test_a_loop_survives_it_and_is_told_what_to_change(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    ours.prepare(FullOnce, {"train": Pairs()}, loss=loss)
    seen = []
    for batch in ours.batches("train"):
        try:
            ours.step(batch)
        except torch.OutOfMemoryError as error:
            seen.append(error)
    ours.finish()
    (error,) = seen
    assert isinstance(error, OutOfMemory)
    assert str(error).splitlines()[0] == (
        "out of memory on cpu in step 2: CUDA out of memory. Tried to allocate 2.00 GiB."
    )
    assert "dataloader.batch_size=2 accum_steps=2" in str(error)
    assert outcome_of(error).status is Status.OUT_OF_MEMORY
    assert ours.global_step == 6


def test_ways_out_are_those_that_the_run_does_not_use_yet(tmp_path: Path) -> None:
    sharded = {"parallel": {"axes": {"shard": 1}}, "fsdp": {"enabled": True}, "precision": "bf16"}
    used = config(tmp_path, {**sharded, "activation_checkpointing": {"mode": "full"}, "dataloader": {"batch_size": 1}})
    assert [way.partition(":")[0] for way in ways_out(used)] == ["fsdp=offload"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "step", "settings"),
    [
        ("single", 20, ("plan.enabled=true",)),  # planned beside it, and still under way when the device is full
        ("ddp2", 20, ()),  # both ranks at once: the one that ends the run may not be the one that plans it
        ("pp2", 5, ()),  # torch's pipeline raises an error of its own for it
    ],
)
def test_the_run_ends_with_its_plan_and_three_ways_out(
    tmp_path: Path, layout: str, step: int, settings: tuple[str, ...]
) -> None:
    app = write_app(tmp_path, APP)
    outcome = run(
        app, f"parallel={layout}", "steps=24", "dataloader.batch_size=4", f"workspace_root={tmp_path}", *settings,
        PYTHONPATH=str(Path(__file__).parents[3]),
    )  # fmt: skip
    assert outcome.code == EXIT_FAILED
    assert f"out of memory on cpu in step {step}" in outcome.err
    assert "  planned: " in outcome.err
    assert "Traceback" not in outcome.err
    ways = [line for line in outcome.err.splitlines() if line.startswith("  try ")]
    assert len(ways) == 3
    assert "less; " in ways[0]
    (result,) = tmp_path.rglob("result.json")
    assert json.loads(result.read_text())["status"] == Status.OUT_OF_MEMORY
    logs = "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    assert "Traceback" in logs, "the place of the allocation stands in the log"
