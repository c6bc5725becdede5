"""Data-parallel layouts of sizes that no degree divides train what a single process trains on the same global batch."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from danling_conf.components import gradients, precision
from danling_conf.parallel.mesh import data_rank_and_degree, make
from danling_conf.parallel.model import assemble
from danling_conf.schema import Layout
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig, OffloadPolicyConfig
from tests.support.decoder import LENGTH, VOCABULARY, Decoder
from tests.support.spawn import RankFailed, run, shared

pytestmark = pytest.mark.slow

GLOBAL_BATCH, STEPS, WORLD_SIZE = 8, 3, 4
EXACT = 1e-5
"""Largest relative error in fp32: the order of summation differs between layouts, nothing else."""

SINGLE = Layout()
DDP4 = Layout(replicate=4)
FSDP4 = Layout(shard=4, fsdp=True)
HSDP2X2 = Layout(replicate=2, shard=2, fsdp=True)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train the decoder."""

    layout: Layout
    accumulate: int = 1
    max_norm: float | None = None
    loss_factor: float = 1.0
    precision: str | None = None
    fsdp: dict[str, Any] = field(default_factory=dict)
    recompute: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=dict)
    given: bool = False
    """Hand over a module, with other weights on each rank but rank 0, instead of a factory."""


CELLS = {
    "fsdp4, accumulation and clipping": Cell(layout=FSDP4, accumulate=2, max_norm=0.1),
    "hsdp2x2, accumulation and clipping": Cell(layout=HSDP2X2, accumulate=2, max_norm=0.1),
    "ddp4, recompute every block": Cell(layout=DDP4, recompute={"mode": "full"}),
    "fsdp4, recompute every block": Cell(layout=FSDP4, recompute={"mode": "full"}),
    "hsdp2x2, recompute selectively": Cell(layout=HSDP2X2, recompute={"mode": "selective"}),
    "fsdp4, keep gathered parameters": Cell(layout=FSDP4, fsdp={"reshard_after_forward": False}),
    "fsdp4, reshard to pairs": Cell(layout=FSDP4, fsdp={"reshard_after_forward": 2}),
    "hsdp2x2, reshard": Cell(layout=HSDP2X2, fsdp={"reshard_after_forward": True}),
    "fsdp4, named classes": Cell(layout=FSDP4, fsdp={"module_classes": ["Block", "Embedding"]}),
    "fsdp4, host memory": Cell(layout=FSDP4, fsdp={"offload_policy": OffloadPolicyConfig()}),
    "fsdp4, compiled": Cell(layout=FSDP4, compile={"enable": True, "backend": "aot_eager", "fullgraph": True}),
    "fsdp4, compiled and recomputed": Cell(
        layout=FSDP4, compile={"enable": True, "backend": "aot_eager"}, recompute={"mode": "full"}
    ),
    "ddp4, compiled and recomputed": Cell(
        layout=DDP4, compile={"enable": True, "backend": "aot_eager"}, recompute={"mode": "full"}
    ),
    "ddp4, compiled whole": Cell(layout=DDP4, compile={"enable": True, "backend": "aot_eager", "scope": "model"}),
    "ddp4, compiled, python_reducer": Cell(
        layout=DDP4,
        accumulate=2,
        compile={"enable": True, "backend": "aot_eager", "optimize_ddp": "python_reducer_without_compiled_forward"},
    ),
    "ddp4, python_reducer": Cell(
        layout=DDP4, compile={"enable": True, "backend": "aot_eager", "optimize_ddp": "python_reducer"}
    ),
    "fsdp4, a module": Cell(layout=FSDP4, given=True),
    "ddp4, a module": Cell(layout=DDP4, given=True),
}
BF16 = Cell(layout=FSDP4, precision="bf16")
WRONG_SCALE = Cell(layout=FSDP4, loss_factor=4.0)
REFERENCES = {
    "plain": Cell(layout=SINGLE),
    "clipped": Cell(layout=SINGLE, max_norm=0.1),
    "a module": Cell(layout=SINGLE, given=True),
}


def reference_of(name: str) -> str:
    return next((key for key in ("clipping", "a module") if name.endswith(key)), "plain").replace("clipping", "clipped")


def train(cell: Cell) -> dict[str, Any]:
    """Three SGD steps; initial weights, and losses, gradients and weights of the global batch, each in full."""
    mesh = make(cell.layout, "cpu")
    model: Any = Decoder
    if cell.given:
        torch.manual_seed(100 + (dist.get_rank() if dist.is_initialized() else 0))
        model = Decoder()
    model = assemble(
        model,
        layout=cell.layout,
        mesh=mesh,
        device=torch.device("cpu"),
        seed=7,
        fsdp=FsdpConfig(enabled=cell.layout.fsdp, **cell.fsdp),
        compile=CompileConfig(**cell.compile),
        activation_checkpointing=ActivationCheckpointingConfig(**cell.recompute),
        precision=cell.precision,
    ).module
    result: dict[str, Any] = {"initial": weights(model), "losses": [], "norms": []}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rank, degree = data_rank_and_degree(mesh)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        batch = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
        parts = batch.chunk(degree)[rank].chunk(cell.accumulate)
        loss = torch.zeros(())
        for index, part in enumerate(parts):
            with gradients.accumulate(model, last=index == len(parts) - 1):
                logits = model(part[:, :-1]).float().flatten(0, 1)
                part_loss = torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten()) / len(parts)
                (part_loss * cell.loss_factor).backward()
            loss += part_loss.detach()
        if step == 0:
            result["gradients"] = {name: full(p.grad) for name, p in model.named_parameters()}
        if cell.max_norm is not None:
            result["norms"].append(gradients.clip(model.parameters(), cell.max_norm).item())
        optimizer.step()
        optimizer.zero_grad()
        if degree > 1:
            dist.all_reduce(loss)
        result["losses"].append(loss.item() / degree)
    result["gradients"] = {name.removeprefix("module."): value for name, value in result["gradients"].items()}
    return {**result, "weights": weights(model)}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole state dict on rank 0, under the names that checkpoints use."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=dist.is_initialized())
    return {name: value.clone() for name, value in get_model_state_dict(model, options=options).items()}


@functools.cache
def on_four_ranks(name: str) -> dict[str, Any]:
    """What rank 0 has after a cell; each cell trains once."""
    return shared(train, WORLD_SIZE, {**CELLS, "bf16": BF16, "wrong scale": WRONG_SCALE}[name])[0]


def overflow_on_one_rank() -> bool:
    """Whether every weight stays as it was when the scaled fp16 loss overflows on one rank alone."""
    model = assemble(
        Decoder,
        layout=FSDP4,
        mesh=make(FSDP4, "cpu"),
        device=torch.device("cpu"),
        seed=7,
        fsdp=FsdpConfig(enabled=True),
        compile=CompileConfig(),
        activation_checkpointing=ActivationCheckpointingConfig(),
    ).module
    before = weights(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), precision.scaler("fp16", "cpu")
    loss = model(torch.zeros(1, LENGTH, dtype=torch.long)).square().mean()
    scaler.scale(loss).backward()
    if dist.get_rank() == 1:
        first = next(parameter for parameter in model.parameters() if parameter.grad.to_local().numel())
        first.grad.to_local().fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()
    after = weights(model)
    return all(torch.equal(before[name], after[name]) for name in before) and scaler.get_scale() < 2.0**16


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    return {name: train(cell) for name, cell in REFERENCES.items()}


def largest_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest error of a tensor relative to its norm, or to a thousandth of all of them where that is larger."""
    assert list(found) == list(expected)
    floor = 1e-3 * torch.stack([value.norm() for value in expected.values()]).norm()
    return max(((found[name] - expected[name]).norm() / expected[name].norm().clamp(floor)).item() for name in expected)


@pytest.mark.parametrize("name", CELLS)
def test_losses_gradients_and_weights_are_those_of_a_single_process(name: str, references: dict[str, Any]) -> None:
    found, expected = on_four_ranks(name), references[reference_of(name)]
    assert found["losses"] == pytest.approx(expected["losses"], rel=EXACT)
    assert found["norms"] == pytest.approx(expected["norms"], rel=EXACT)
    assert largest_error(found["gradients"], expected["gradients"]) < EXACT
    assert largest_error(found["weights"], expected["weights"]) < EXACT


def test_bf16_is_close_and_not_fp32_in_disguise(references: dict[str, Any]) -> None:
    found, expected = on_four_ranks("bf16"), references["plain"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    together = [torch.cat([value.flatten() for value in of["gradients"].values()]) for of in (found, expected)]
    assert 1e-4 < (together[0] - together[1]).norm() / together[1].norm() < 2e-2
    assert all(value.dtype is torch.float32 for value in found["weights"].values())


def test_a_wrong_gradient_scale_does_not_pass(references: dict[str, Any]) -> None:
    wrong, expected = on_four_ranks("wrong scale"), references["plain"]
    assert largest_error(wrong["gradients"], expected["gradients"]) > 1
    assert largest_error(wrong["weights"], expected["weights"]) > 1e-2


@pytest.mark.parametrize("name", CELLS)
def test_initial_weights_are_bitwise_those_of_a_single_process(name: str, references: dict[str, Any]) -> None:
    found, expected = on_four_ranks(name)["initial"], references[reference_of(name)]["initial"]
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_an_overflow_on_one_rank_skips_the_step_on_all() -> None:
    assert all(shared(overflow_on_one_rank, WORLD_SIZE))


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("this rank is broken")
    dist.barrier()


def test_a_failing_rank_is_named_with_its_error() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed:.*this rank is broken"):
        run(fail_on_rank_1, 2)


def stop_on_rank_1() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)
    dist.barrier()


def test_a_rank_that_has_stopped_is_named() -> None:
    with pytest.raises(RankFailed, match=r"(?s)ranks \[1\] have stopped; rank 0, which waited"):
        run(stop_on_rank_1, 2, collectives=2)
