"""Models that nobody here wrote, over the data axes: three steps of SGD are what one process makes of them, or refused.

Momentum and weight decay are on: a parameter that has a gradient of zeros moves, one that has none does not.
"""

from __future__ import annotations

import functools
import logging
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations

from danling_conf import ConfigRefused
from danling_conf.components import optimizer as optimizers
from danling_conf.parallel import batch_norm
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.mesh import data_rank_and_degree, make
from danling_conf.parallel.model import assemble
from danling_conf.schema import Layout
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.optim import OptimConfig
from danling_conf.schema.parallel import ParallelConfig
from tests.support.spawn import RankFailed, run

pytestmark = pytest.mark.slow

STEPS, BATCH, WIDTH = 3, 8, 4
EXACT = 1e-5
LAYOUTS = {
    "ddp2": Layout(replicate=2),
    "fsdp2": Layout(shard=2, fsdp=True),
    "hsdp2x1": Layout(replicate=2, shard=1, fsdp=True),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Model(nn.Module):
    """Two blocks and a head."""

    block: Callable[[], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ScalarBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class Scalar(Model):
    block = ScalarBlock

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.temperature


class DtypesBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.scale64 = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
        self.phase = nn.Parameter(torch.full((WIDTH,), 0.5 + 0.25j))
        self.whole = nn.Parameter(torch.arange(WIDTH, dtype=torch.int8), requires_grad=False)
        self.flags = nn.Parameter(torch.arange(WIDTH) % 2 == 0, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward((x * self.scale64).float()) * (self.whole.float() + 1) / WIDTH
        return torch.where(self.flags, (x * self.phase).real, (x * self.phase).imag)


class Dtypes(Model):
    block = DtypesBlock


class Frozen(Model):
    """A frozen block, and one that is frozen in part."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[0].requires_grad_(False)
        self.blocks[1].linear.weight.requires_grad_(False)


class AdapterBlock(Block):
    """A frozen layer with an adapter of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.linear.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Adapters(Model):
    block = AdapterBlock

    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)


class Tied(Model):
    """A weight that two blocks share, and a block that is there twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].linear.weight = self.blocks[0].linear.weight
        self.again = self.blocks[1]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.again(x))


class ParametrizedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(parametrizations.weight_norm(self.linear))


class Parametrized(Model):
    block = ParametrizedBlock


class HookedBlock(Block):
    """torch's older way, which keeps the weight it computes as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.linear = nn.utils.weight_norm(self.linear)


class Hooked(Model):
    block = HookedBlock


class BufferBlock(Block):
    """One buffer is saved, one is not, and one counts steps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.linspace(-1, 1, WIDTH))
        self.register_buffer("factor", torch.linspace(0.5, 1, WIDTH), persistent=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x * self.factor + self.offset / self.calls)


class Buffers(Model):
    block = BufferBlock


class NormBlock(Block):
    """Batch normalisation of features, and of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain = nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(1, momentum=None, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.plain(self.norm(x)[:, None] + 1)[:, 0])


class Norm(Model):
    block = NormBlock


class Unused(Model):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(WIDTH, WIDTH)


class BranchesByStep(Model):
    """Every second step passes another block and another head."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, 1)
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        even = self.step % 2 == 0
        return (self.other if even else self.head)(self.blocks[int(even)](x))


class BranchesBySample(Model):
    """The first sample of a rank chooses the block, so that ranks pass different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.ParameterList([nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0)])

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for half in x.chunk(2 if len(x) == BATCH else 1):
            chosen = 0 if half[0, 0] < 0 else 1
            outputs.append(self.head(self.blocks[chosen](half) * self.scale[chosen]))
        return torch.cat(outputs)


class ExpertsBlock(Block):
    """Experts inside of a block, of which the first sample of a rank chooses one; before a step, all are used."""

    def __init__(self, since: int = 0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.since, self.step = since, 0

    def forward(self, x: Tensor) -> Tensor:
        chosen = list(self.experts) if self.step < self.since else [self.experts[int(x[0, 0] > 0)]]
        self.step += 1
        return super().forward(x) + sum(expert(x) for expert in chosen)


class Experts(Model):
    block = ExpertsBlock


class ExpertsLater(Model):
    block = functools.partial(ExpertsBlock, 1)


class Alternating(Model):
    """Ranks pass their two blocks in different orders, in the first step or later; all parameters are used."""

    def __init__(self, since: int = 0) -> None:
        super().__init__()
        self.since, self.step = since, 0

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        parts = x.chunk(2) if len(x) == BATCH else (x,)
        for rank, part in enumerate(parts, 0 if len(parts) == 2 else dist.get_rank()):
            for block in list(self.blocks)[:: -1 if rank and self.step >= self.since else 1]:
                part = block(part)
            outputs.append(self.head(part))
        self.step += 1
        return torch.cat(outputs)


class MethodBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)

    def mix(self, x: Tensor, *, scale: float) -> Tensor:
        return self(self.feed(x)) * scale

    def feed(self, x: Tensor) -> Tensor:
        return self.up(x)


class BlockMethods(Model):
    """Calls methods of its blocks, which call each other and the block."""

    block = MethodBlock

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block.mix(block.feed(x), scale=0.5)
        return self.head(x)


class WithLoss(Model):
    """Its loss uses a parameter of its own before it calls the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)

    def compute_loss(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self(self.first(x)) * self.head.weight.sum() - y) ** 2).mean()


@dataclass
class Output:
    prediction: Tensor
    extra: dict[str, list[Tensor]]


class DataclassOutput(Model):
    def forward(self, x: Tensor, *, shift: Tensor) -> Output:
        found = super().forward(x + shift)
        return Output(found, {"more": [found * 2]})


class ObjectOutput:
    def __init__(self, prediction: Tensor) -> None:
        self.prediction = prediction


class PlainObject(Model):
    def forward(self, x: Tensor) -> ObjectOutput:
        return ObjectOutput(super().forward(x))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0,
                 decoder_start_token_id=0)
    )  # fmt: skip


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=16, num_mel_bins=4, d_model=8, encoder_layers=2, decoder_layers=2,
                      encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
                      max_source_positions=8, max_target_positions=8, dropout=0.0, decoder_start_token_id=0,
                      pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def squares(output: Any, batch: dict[str, Tensor]) -> Tensor:
    return ((getattr(output, "prediction", output) - batch["y"]) ** 2).mean()


@dataclass(frozen=True)
class Kind:
    """A model, and how it is called."""

    model: Callable[[], nn.Module]
    forward: Callable[[Any, Any], Any] = lambda model, batch: model(batch["x"])
    loss: Callable[[Any, Any], Any] = squares
    unused: str = "refuse"
    synchronise: bool = False
    """Batch normalisation."""
    compile: str | None = None
    """The scope of compilation."""
    accumulate: int = 1
    refused: dict[str, str] | None = None
    """Under which layouts it is refused, and what the refusal names."""


def by_method(model: Any, batch: Any) -> Any:
    return model.compute_loss(batch["x"], batch["y"])


def with_penalty(model: Any, batch: Any) -> Any:
    return model(batch["x"]) + sum(block.linear.weight.square().sum() for block in model.blocks)


def with_gradient_penalty(model: Any, batch: Any) -> Any:
    x = batch["x"].clone().requires_grad_()
    output = model(x)
    if not torch.is_grad_enabled():  # an evaluation
        return output
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    return output + slope.square().mean(1, keepdim=True)


def as_is(output: Any, batch: Any) -> Any:
    return output


def own_loss(output: Any, batch: Any) -> Any:
    return output.loss


DIFFERENTIATES = "the forward or the loss differentiates itself"

KINDS = {
    "parameters without a dimension": Kind(Scalar),
    "parameters without a dimension, accumulated": Kind(Scalar, accumulate=2),
    "several dtypes": Kind(Dtypes),
    "frozen blocks": Kind(Frozen),
    "adapters": Kind(Adapters),
    "tied weights": Kind(Tied),
    "parametrizations": Kind(Parametrized),
    "weights by hooks": Kind(Hooked),
    "buffers": Kind(Buffers),
    "batch normalisation": Kind(Norm, synchronise=True),
    "methods of blocks": Kind(BlockMethods),
    "methods of blocks, compiled": Kind(BlockMethods, compile="block"),
    "a penalty on weights": Kind(
        Model, with_penalty,
        refused=dict.fromkeys(("fsdp2", "hsdp2x1"), "the forward uses blocks.0.linear.weight outside of its block")),
    "a penalty on weights, allowed": Kind(Model, with_penalty, unused="allow"),
    "a gradient penalty": Kind(
        Model, with_gradient_penalty, refused=dict.fromkeys(("fsdp2", "hsdp2x1"), DIFFERENTIATES)),
    "an unused layer": Kind(Unused, refused={"ddp2": "b.weight, b.bias"}),
    "an unused layer, allowed": Kind(Unused, unused="allow"),
    "branches by step, allowed": Kind(BranchesByStep, unused="allow"),
    "branches by step": Kind(
        BranchesByStep, refused={"ddp2": "other.weight", "fsdp2": "passes blocks.1 where it passes blocks.0",
                                 "hsdp2x1": "passes blocks.1 where it passes blocks.0"}),
    "blocks in another order": Kind(
        Alternating, refused=dict.fromkeys(("fsdp2", "hsdp2x1"), "blocks.1 on some ranks where it passes blocks.0")),
    "blocks in another order, allowed": Kind(Alternating, unused="allow"),
    "branches by sample, allowed": Kind(BranchesBySample, unused="allow"),
    "experts by sample": Kind(Experts, refused=dict.fromkeys(LAYOUTS, "gradient on some ranks only: blocks.0.experts")),
    "experts by sample, later": Kind(ExpertsLater, refused=dict.fromkeys(LAYOUTS, "in some steps and none in others")),
    "a method": Kind(WithLoss, by_method, as_is),
    "a method, accumulated": Kind(WithLoss, by_method, as_is, accumulate=2),
    "a method, compiled blocks": Kind(WithLoss, by_method, as_is, compile="block"),
    "a method, compiled": Kind(WithLoss, by_method, as_is, compile="model"),
    "keywords and a dataclass": Kind(DataclassOutput, lambda model, batch: model(x=batch["x"], shift=batch["y"])),
    "an object": Kind(PlainObject),
    "an object, unused allowed": Kind(PlainObject, unused="allow"),
    "T5": Kind(t5, lambda model, batch: model(input_ids=batch["ids"], labels=batch["labels"]), own_loss),
    "Whisper": Kind(whisper, lambda model, batch: model(input_features=batch["mel"], labels=batch["labels"]), own_loss),
}  # fmt: skip


OF_RANKS = {"batch normalisation of each rank": Kind(Norm)}
"""What no data axis trains as one process does."""


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH, generator=generator)
        x[0, 0], x[BATCH // 2, 0] = -1.0, 1.0  # the halves of a batch choose different branches
        ids = torch.randint(3, 16, (2, BATCH, 6), generator=generator)
        mel = torch.randn(BATCH, 4, 16, generator=generator)
        found.append({"x": x, "y": x.sum(1, keepdim=True), "ids": ids[0], "labels": ids[1], "mel": mel})
    return found


def full(tensor: Tensor) -> Tensor:
    whole = tensor.detach()
    return (whole.full_tensor() if isinstance(whole, DTensor) else whole).clone()


def train(kind: Kind, layout: Layout, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Gradients of the first step and weights after the last, in full; or the refusal."""
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(batch_norm.__name__).addHandler(handler)
    assembled = assemble(
        kind.model,
        layout=layout,
        mesh=mesh,
        device=torch.device("cpu"),
        seed=7,
        fsdp=FsdpConfig(enabled=layout.fsdp),
        compile=CompileConfig(enable=kind.compile is not None, backend="aot_eager", scope=kind.compile or "block"),
        activation_checkpointing=ActivationCheckpointingConfig(),
        parallel=ParallelConfig(unused_parameters=kind.unused, sync_batch_norm=kind.synchronise),
    )
    logging.getLogger(batch_norm.__name__).removeHandler(handler)
    section = OptimConfig(type="SGD", lr=0.1)
    section.momentum, section.weight_decay = 0.9, 0.1
    optimizer = optimizers.make(assembled.module, section)
    passes = Passes(assembled, kind.forward, kind.loss, layout, torch.device("cpu"))
    named = optimizers.cleaned(assembled.module)
    result: dict[str, Any] = {}
    rank, degree = data_rank_and_degree(mesh)
    try:
        for batch in batches():
            parts = {name: value.chunk(degree)[rank].chunk(kind.accumulate) for name, value in batch.items()}
            for index in range(kind.accumulate):
                part = {name: value[index] for name, value in parts.items()}
                passes.train(part, micro_batches=kind.accumulate, last=index == kind.accumulate - 1)
            passes.finish(item for _, item in named)
            result.setdefault("gradients", {name: full(item.grad) for name, item in named if item.grad is not None})
            optimizer.step()
            optimizer.zero_grad()
    except ConfigRefused as error:
        return {"refused": str(error)}
    buffers = {name.removeprefix("module."): item.clone() for name, item in assembled.module.named_buffers()}
    measured = passes.evaluate({name: value.chunk(degree)[rank] for name, value in batch.items()}, largest=BATCH,
                               counts=True)  # fmt: skip
    total = measured.mean.float()
    if degree > 1:
        dist.all_reduce(total)
    return {
        **result,
        "weights": {name: full(item) for name, item in named},
        "buffers": buffers,
        "warnings": heard,
        "loss": {"loss": total / degree},
    }


def train_all(names: list[str], layouts: list[str]) -> dict[tuple[str, str], dict[str, Any]]:
    torch.manual_seed(0)
    meshes = {name: make(LAYOUTS[name], "cpu") for name in layouts}
    results = {}
    for name in names:
        for layout in layouts:
            try:
                results[name, layout] = train((KINDS | OF_RANKS)[name], LAYOUTS[layout], meshes[layout])
            except Exception:  # of a cell; the others are looked at all the same
                results[name, layout] = {"error": traceback.format_exc()}
            torch._dynamo.reset()
    return results


def order_of_later() -> None:
    """Two steps, in the second of which rank 1 passes its blocks in another order."""
    layout = LAYOUTS["fsdp2"]
    assembled = assemble(
        functools.partial(Alternating, since=1), layout=layout, mesh=make(layout, "cpu"), device=torch.device("cpu"),
        seed=7, fsdp=FsdpConfig(enabled=True), compile=CompileConfig(),
        activation_checkpointing=ActivationCheckpointingConfig(),
    )  # fmt: skip
    passes = Passes(assembled, Kind(Alternating).forward, squares, layout, torch.device("cpu"))
    for batch in batches()[:2]:
        passes.train({name: value.chunk(2)[dist.get_rank()] for name, value in batch.items()})
        passes.finish(assembled.module.parameters())


@functools.cache
def trained() -> list[dict[tuple[str, str], dict[str, Any]]]:
    """The results of all cells, by rank: one world for all of them."""
    return run(train_all, 2, [*KINDS, *OF_RANKS], list(LAYOUTS), timeout=500, collectives=60)


@functools.cache
def reference(name: str) -> dict[str, Any]:
    kind = KINDS[name]
    return train(Kind(kind.model, kind.forward, kind.loss), Layout(), None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_model_is_what_one_process_makes(name: str, layout: str) -> None:
    refused, expected = (KINDS[name].refused or {}).get(layout), reference(name)
    for results in trained():
        found = results[name, layout]
        assert "error" not in found, found["error"]
        if refused is not None:
            assert refused in found["refused"]
            assert refused == DIFFERENTIATES or "parallel.unused_parameters=allow" in found["refused"]
            continue
        assert "refused" not in found, found["refused"]
        for part in ("gradients", "weights", "buffers", "loss"):
            assert found[part].keys() == expected[part].keys(), part
            for key, value in expected[part].items():
                assert_close(found[part][key], value, f"{part} {key}")


def test_statistics_of_each_rank_are_warned_of_and_the_first_rank_gives_its_own_to_all() -> None:
    first, second = trained()
    for layout in LAYOUTS:
        found = first["batch normalisation of each rank", layout]
        assert len(found["warnings"]) == 1
        assert found["warnings"][0].startswith("batch normalisation blocks.0.norm uses the samples of its own rank")
        assert first["batch normalisation", layout]["warnings"] == []
        if layout == "ddp2":  # before each forward
            continue
        for name, value in second["batch normalisation of each rank", layout]["buffers"].items():
            assert torch.equal(value, found["buffers"][name]), name
            assert value.dtype == torch.int64 or value.abs().sum() > 0


def test_blocks_in_another_order_later_are_refused() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed:.*blocks\.1 where it passes blocks\.0 in the first"):
        run(order_of_later, 2)


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.dtype == expected.dtype, what
    if not (found.is_floating_point() or found.is_complex()):
        assert torch.equal(found, expected), what
        return
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    assert error <= EXACT, f"{what}: {error:.1e}"
