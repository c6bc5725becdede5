"""Families of transformers and modules of torch under every axis: what one process trains, or refused in words.

python -m tests.distributed.test_foreign_models                # every model, every layout; writes docs/models.md
python -m tests.distributed.test_foreign_models OPT pp2 full   # one of each, with activation checkpointing
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danling_conf.groups.layout_names import parse_layout
from danling_conf.parallel import hugging_face, mesh
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.init_plan import seeded
from danling_conf.parallel.model import assemble
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import data_rank
from danling_conf.topology.violation import ConfigRefused, SettingError
from tests.distributed import models_table
from tests.distributed.models_table import (
    EXACT,
    LAYOUTS,
    NO_CUT,
    OF_OTHERS,
    OWN_ATTENTION,
    SETTINGS,
    WITHOUT_PLAN,
    Outcome,
)
from tests.support.families import FAMILIES, MODULES, module_batch
from tests.support.odd_models import ODD, odd_batch
from tests.support.spawn import run

pytestmark = pytest.mark.slow

SIZE, STEPS, SEED, MICROBATCHES = 8, 2, 7, 2
LIMIT_SECONDS = 1500
"""For all cells in one world of two ranks; on two free cores they take a fraction of it."""

Batch = dict[str, Tensor]


def model_and_batches(name: str) -> tuple[Callable[[], nn.Module], list[Batch]]:
    if name in FAMILIES:
        family = FAMILIES[name]
        return family.build, [family.batch(SIZE, seed) for seed in range(STEPS)]
    if name in ODD:
        return ODD[name], [odd_batch(SIZE, seed) for seed in range(STEPS)]
    return MODULES[name], [module_batch(name, SIZE, seed) for seed in range(STEPS)]


def forward(model: Any, batch: Batch) -> Tensor:
    output = model(**{name: item for name, item in batch.items() if name != "targets"})
    return getattr(output, "logits", output)


def loss_of(output: Tensor, batch: Batch) -> Tensor:
    if batch["targets"].is_floating_point():
        return F.mse_loss(output, batch["targets"])
    return F.cross_entropy(output.flatten(0, -2).float(), batch["targets"].flatten())


Values = dict[str, dict[str, Tensor]]
"""`initial` weights, `gradients` of the first step, and `final` weights."""


@functools.cache
def alone(name: str, accumulated: int = 1) -> Values:
    """What a plain loop of torch's makes of it in one process, which accumulates so many parts of each batch."""
    factory, batches = model_and_batches(name)
    with seeded(SEED):
        model = factory()
    hugging_face.prepare(model)
    values: Values = {"initial": copied(model), "gradients": {}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, batch in enumerate(batches):
        for number in range(accumulated):
            part = {key: item.chunk(accumulated)[number] for key, item in batch.items()}
            (loss_of(forward(model, part), part) / accumulated).backward()
        if step == 0:
            values["gradients"] = gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return {**values, "final": {**copied(model), **buffers(model)}}


def laid_out(name: str, layout_name: str, recompute: str) -> float:
    """The largest relative error of this rank's gradients and weights; infinite where initial weights differ."""
    factory, batches = model_and_batches(name)
    layout = parse_layout(layout_name)
    made = mesh.make(layout, "cpu")
    settings = SETTINGS.get(name, {}) if layout.data_degree > 1 else {}
    assembled = assemble(
        factory,
        layout=layout,
        mesh=made,
        device=torch.device("cpu"),
        seed=SEED,
        fsdp=FsdpConfig(enabled=layout.fsdp),
        compile=CompileConfig(),
        activation_checkpointing=ActivationCheckpointingConfig(mode=recompute),
        parallel=ParallelConfig(pipeline_n_microbatches=MICROBATCHES, **settings),
        example=lambda: {key: item[:2] for key, item in batches[0].items()},
        forward=forward,
    )
    passes = Passes(assembled, forward, loss_of, layout, torch.device("cpu"))
    parameters = [item for _, item in assembled.named_parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    rank, degree = data_rank(layout, dist.get_rank()), layout.data_degree
    values: Values = {"initial": joined(assembled.parts, copied), "gradients": {}}
    for step, batch in enumerate(batches):
        passes.train({key: item.chunk(degree)[rank] for key, item in batch.items()})
        passes.finish(parameters)
        if step == 0:
            values["gradients"] = joined(assembled.parts, gradients)
        optimizer.step()
        optimizer.zero_grad()
    values["final"] = joined(assembled.parts, copied)
    if assembled.pipeline is None:
        return largest_error(values, alone(name), complete=True)
    values["final"] |= joined(assembled.parts, buffers)
    return largest_error(values, alone(name, MICROBATCHES if name in BY_MICROBATCH else 1), complete=False)


def largest_error(found: Values, expected: Values, *, complete: bool) -> float:
    worst = 0.0
    for kind in ("initial", "gradients", "final"):
        if complete and kind != "final" and found[kind].keys() != expected[kind].keys():
            raise AssertionError(f"{kind}: not in both: {sorted(found[kind].keys() ^ expected[kind].keys())}")
        floor = 1e-3 * torch.stack([item.double().norm() for item in expected[kind].values()]).norm()
        for name, value in found[kind].items():
            wanted = expected[kind][name]
            if kind == "initial":
                worst = max(worst, 0.0 if torch.equal(value, wanted) else float("inf"))
            else:
                difference = (value.double() - wanted.double()).norm() / wanted.double().norm().clamp(floor)
                worst = max(worst, difference.item())
    return worst


def joined(parts: tuple[nn.Module, ...], of: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: item for part in parts for name, item in of(part).items()}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {clean(name): full(item.detach()).clone() for name, item in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """What forward may change and a checkpoint holds."""
    named = model.named_buffers(remove_duplicate=False)
    return {clean(name): item.detach().clone() for name, item in named if name in model.state_dict()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {clean(name): full(item.grad).clone() for name, item in model.named_parameters() if item.grad is not None}


def full(item: Tensor) -> Tensor:
    return item.full_tensor() if isinstance(item, DTensor) else item


def clean(name: str) -> str:
    return name.removeprefix("module.")


def outcome(name: str, layout: str, recompute: str) -> Outcome:
    try:
        error = laid_out(name, layout, recompute)
    except (SettingError, ConfigRefused) as refusal:
        return Outcome(refused=" ".join(str(refusal).split()))
    except Exception as failure:
        return Outcome(failed=f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}")
    worst = torch.tensor(error)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Outcome(error=worst.item())


def all_outcomes(cells: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], Outcome]:
    found = {}
    for cell in cells:
        found[cell] = outcome(*cell)
        if dist.get_rank() == 0:
            print(*cell, found[cell], flush=True)
    return found


REFUSED: dict[str, dict[str, str]] = {
    "tp2": dict.fromkeys(("StableLm", "GPT-2", "OpenAI GPT", "GPT-Neo", "OPT", "BLOOM", "Falcon"), WITHOUT_PLAN),
    "pp2": {
        **dict.fromkeys(("ALBERT", "T5", "BART", "Pegasus", "Whisper", "LSTM", "nn.Transformer", "U-Net"), NO_CUT),
        **dict.fromkeys(("Mamba", "Mamba-2", "ViT", "DeiT", "Swin", "Wav2Vec2", "Llama 4"), OF_OTHERS),
    },
    "cp2": dict.fromkeys(("OpenAI GPT", "GPT-Neo", "Falcon", "XGLM"), OWN_ATTENTION),
}
"""By layout, families that are refused, and how."""

DECODERS = (
    "Llama", "Qwen3", "Gemma", "Phi", "Granite", "StableLm", "GPT-2", "OpenAI GPT", "GPT-Neo", "GPT-NeoX", "GPT-J",
    "CodeGen", "OPT", "BLOOM", "Falcon", "MPT", "XGLM", "BioGPT", "Mixtral", "Qwen3-MoE",
)  # fmt: skip
OTHERS = ("ViT", "Wav2Vec2", "T5", "Whisper", "Mamba")

EQUAL = {
    "ddp2": (*DECODERS, "Llama 4", *OTHERS, "BERT", "ConvNet", "LoRA (peft)"),
    "fsdp2": (*DECODERS, "Llama 4", *OTHERS, "BERT", "ConvNet", "LoRA (peft)", "Handmade"),
    "tp2": (
        "Llama",
        "Llama 4",
        "Qwen3",
        "Gemma",
        "Phi",
        "Granite",
        "GPT-NeoX",
        "GPT-J",
        "CodeGen",
        "Mixtral",
        "Qwen3-MoE",
    ),
    "pp2": (*DECODERS, "BERT", "ModernBERT", "ConvNeXt", "ConvNet"),
    "cp2": ("Llama", "StableLm", "GPT-2", "GPT-NeoX", "GPT-J", "CodeGen", "OPT", "BioGPT", "Mixtral", "Qwen3-MoE"),
}  # fmt: skip
"""By layout, models that train what one process trains."""

ODD_EQUAL = {
    "ddp2": ("Spectral", "compiled_head"),
    "fsdp2": ("Spectral", "Counting", "compiled_head"),
    "pp2": ("Spectral", "Normalised", "PlainTensor", "Counting", "CountingBuffer", "Masked", "InPlace"),
}
ODD_REFUSED = {
    "ddp2": {
        "Codebook": "ranks have other values of code",
        "max_norm": "embed.table .* changes its weight in the forward",
        "lazy": "head.weight .* has no shape",
        "hook_of_parameter": "the parameter head.weight .* has a hook",
    },
    "fsdp2": {
        "Clamped": r"the forward changes the parameter blocks\.0\.linear\.weight",
        "InPlace": "a block changes its input in place",
        "sparse": "embed.table gives sparse gradients",
        "scripted": "head is a ScriptModule",
        "hook_of_parameter": "the parameter head.weight .* has a hook",
    },
    "pp2": {
        "Clamped": r"forward changes the parameter blocks\.0\.linear\.weight",
        "Reentrant": r"recomputes in blocks\.0 by torch.utils.checkpoint with use_reentrant=True",
        "KeepsInGlobal": "is kept outside of its modules",
        "FeedsBack": "what .* after the blocks made is used before the blocks, the next time",
        "NormalisedBetween": "the buffer norm.running_mean .* is changed after the blocks",
        "hooked": "itself has a hook",
    },
}
BY_MICROBATCH = {*ODD, *(name for name, settings in SETTINGS.items() if "sync_batch_norm" in settings)}
"""Models that forward changes: a pipeline trains them as one process that accumulates its microbatches."""

CELLS = [
    (name, layout, "none")
    for layout in LAYOUTS
    for cells in (EQUAL, REFUSED, ODD_EQUAL, ODD_REFUSED)
    for name in cells.get(layout, ())
]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, str], Outcome]:
    """Every cell, in one world of two ranks."""
    found: dict[tuple[str, str, str], Outcome] = run(all_outcomes, 2, CELLS, timeout=LIMIT_SECONDS)[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_train_what_one_process_trains(layout: str, outcomes: dict[Any, Outcome]) -> None:
    wrong = {
        name: str(outcomes[name, layout, "none"])
        for name in (*EQUAL[layout], *ODD_EQUAL.get(layout, ()))
        if (error := outcomes[name, layout, "none"].error) is None or error > EXACT
    }
    assert wrong == {}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_others_are_refused_before_the_first_step(layout: str, outcomes: dict[Any, Outcome]) -> None:
    wrong = {
        name: str(outcomes[name, layout, "none"])
        for name, why in {**REFUSED.get(layout, {}), **ODD_REFUSED.get(layout, {})}.items()
        if not re.search(why, outcomes[name, layout, "none"].refused or "")
    }
    assert wrong == {}


def no_gradient(layout: str) -> str | None:
    """Why BERT is refused, whose head has a bias that its forward does not use."""
    SETTINGS.pop("BERT")
    return outcome("BERT", layout, "none").refused


def test_parameters_without_a_gradient_are_named_with_the_setting() -> None:
    for said in run(no_gradient, 2, "ddp2"):
        assert said is not None
        assert "get no gradient: cls.predictions.bias" in said
        assert "parallel.unused_parameters=allow" in said


def main(names: list[str]) -> None:
    chosen = [name for name in names if name not in (*LAYOUTS, "full")] or [*FAMILIES, *MODULES]
    layouts = [name for name in names if name in LAYOUTS] or LAYOUTS
    recompute = "full" if "full" in names else "none"
    cells = [(name, layout, recompute) for name in chosen for layout in layouts]
    found = run(all_outcomes, 2, cells, timeout=2 * LIMIT_SECONDS)[0]
    if not names:
        models_table.write({(name, layout): found[name, layout, recompute] for name, layout, _ in cells})


if __name__ == "__main__":
    main(sys.argv[1:])
