"""One cell of the parity matrix: a layout and a way to train, and what a single process makes of the same batches."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danling_conf.components import gradients, precision
from danling_conf.groups.layout_names import parse_layout
from danling_conf.parallel import context, mesh, tensor
from danling_conf.parallel import pipeline as pipelines
from danling_conf.parallel.deepspeed import ZeroEngine
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.graph import compiled_update
from danling_conf.parallel.model import Assembled, assemble, with_engine
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.deepspeed import DeepspeedConfig, ZeroConfig
from danling_conf.schema.fsdp import FsdpConfig, OffloadPolicyConfig
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import data_rank
from models.decoder import Decoder, DecoderConfig

GLOBAL_BATCH, STEPS, LENGTH, VOCABULARY = 16, 2, 16, 32
IGNORED = -100

TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}
"""Largest error relative to the norm of the tensor, by the dtype of the computation: in fp32, only the order of sums
differs between layouts; bf16 is compared with a single process in fp32."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to train the decoder."""

    layout: str
    variant: str = "plain"
    parallel: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    recompute: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    family: str | None = None
    """A configuration class of transformers, whose model is trained in place of the decoder of the examples."""
    precision: str = "fp32"
    accumulate: int = 1
    max_norm: float | None = None
    graph: bool = False
    """Forward, loss and backward are one graph, and the optimizer's step is another."""
    zero: int | None = None
    """Stage of ZeRO, in whose engine the model is then. It keeps no gradients to compare."""
    weighted: bool = False
    """Labels are masked, unequally on every rank; the loss gives a sum and its count."""
    fault: str | None = None
    """What is done wrong on purpose, which the comparison must notice."""

    @property
    def world_size(self) -> int:
        return parse_layout(self.layout).world_size

    def __str__(self) -> str:
        return f"{self.layout}, {self.variant}"


@dataclass
class Trained:
    """What training gave: of the whole model, or of one rank's stages."""

    losses: list[float]
    norms: list[float]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    schedules: set[str] = field(default_factory=set)
    """Of the pipeline, as torch was asked for them."""


def model_of(cell: Cell) -> nn.Module:
    """A decoder small enough for any rank, with numbers that every degree up to 4 divides."""
    layout, depth = parse_layout(cell.layout), depth_of(cell)
    if cell.family is not None:
        return library_model(cell.family, {"num_hidden_layers": depth, **cell.model})
    experts = layout.expert > 1 or layout.expert_tensor > 1
    settings = {
        "width": 32, "depth": depth, "heads": 4, "kv_heads": 4 if "tp4" in cell.layout else 2, "hidden": 48,
        "context": LENGTH, "vocab_size": VOCABULARY, "experts": 4 if experts else 0, **cell.model,
    }  # fmt: skip
    return Decoder(DecoderConfig(**settings))


def depth_of(cell: Cell) -> int:
    """A first and a last block; four where stages share them."""
    return 2 if parse_layout(cell.layout).pipeline == 1 else 4


def library_model(family: str, settings: dict[str, Any]) -> nn.Module:
    """A model of transformers, with random weights."""
    import transformers

    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "head_dim": 8,
        "pad_token_id": 0, "tie_word_embeddings": False, **settings,
    }  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, family)(**sizes))


def batches(weighted: bool) -> list[tuple[Tensor, Tensor]]:
    """The global batches: inputs and targets."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, LENGTH + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        if weighted:
            # Later samples, and later tokens, are masked more.
            share = torch.linspace(1, 0.1, GLOBAL_BATCH)[:, None] * torch.linspace(1, 0.3, LENGTH)
            targets[torch.rand(targets.shape, generator=generator) > share] = IGNORED
        made.append((tokens[:, :-1], targets))
    return made


def parallel_of(cell: Cell) -> dict[str, Any]:
    """A cell's settings of `parallel`; a microbatch a stage beside tensor or context parallelism, unless set.

    Every microbatch of such a stage is many small collectives: sixteen, one for each sample, take many times as long.
    """
    layout = parse_layout(cell.layout)
    counted = {"pipeline_microbatch_size", "pipeline_n_microbatches"} & cell.parallel.keys()
    few = layout.pipeline > 1 and layout.tensor * layout.context > 1 and not counted
    return {**({"pipeline_n_microbatches": layout.pipeline} if few else {}), **cell.parallel}


def train(cell: Cell, kind: str = "cpu") -> Trained:
    """As `_train`, with the schedules that the pipeline took."""
    with mock.patch.object(pipelines, "get_schedule_class", wraps=pipelines.get_schedule_class) as asked:
        return replace(_train(cell, kind), schedules={call.args[0] for call in asked.call_args_list})


def _train(cell: Cell, kind: str) -> Trained:
    """Two SGD steps on this rank: losses of the global batch, gradients of the first step and weights in full.

    The second step is the one with momentum, and with what the first has set up.

    Args:
        kind: type of the device; the ranks' process group is gloo's on any.
    """
    layout, device = parse_layout(cell.layout), torch.device(kind)
    torch._dynamo.config.optimize_ddp = True
    made = mesh.make(layout, kind)
    assembled = assemble(
        functools.partial(model_of, cell),
        layout=layout,
        mesh=made,
        device=device,
        seed=7,
        fsdp=FsdpConfig(enabled=layout.fsdp, **cell.fsdp),
        compile=CompileConfig(**cell.compile),
        activation_checkpointing=ActivationCheckpointingConfig(**cell.recompute),
        parallel=ParallelConfig(**parallel_of(cell)),
        expert_mesh=mesh.make_expert(layout, made),
        precision=cell.precision,
        for_engine=cell.zero is not None,
    )
    inject(cell, assembled)
    if cell.fault is not None:
        assembled = replace(assembled, prove_layout=None)  # the matrix has to notice by itself
    initial = {clean(name): full(item.detach()) for name, item in assembled.named_parameters()}
    parameters = [parameter for _, parameter in assembled.named_parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    if cell.zero is not None:
        assembled = with_engine(assembled, engine_of(cell, assembled, optimizer, layout, device), made)
    autocast = functools.partial(precision.autocast, None if layout.fsdp else cell.precision, kind)
    loss = weighted_loss if cell.weighted and cell.fault != "mean" else mean_loss
    section = CompileConfig(**cell.compile)
    passes = Passes(
        assembled,
        lambda model, batch: model(batch[0]),
        loss,
        layout,
        device,
        autocast=autocast,
        graph=section if cell.graph else None,
    )
    engine = assembled.engine
    update = compiled_update(optimizer, section) if cell.graph else optimizer.step if engine is None else engine.step
    rank, degree = data_rank(layout, dist.get_rank() if dist.is_initialized() else 0), layout.data_degree
    pipeline = assembled.pipeline
    result = Trained([], [], initial, {}, {})
    for step, batch in enumerate(batches(cell.weighted)):
        own = [item.chunk(degree)[rank].to(device).chunk(cell.accumulate) for item in batch]
        total = torch.zeros(2, device=device)
        for index in range(cell.accumulate):
            micro = (own[0][index], own[1][index])
            measured = passes.train(micro, micro_batches=cell.accumulate, last=index == cell.accumulate - 1)
            total += torch.stack([measured.total, torch.as_tensor(measured.weight, dtype=torch.float32, device=device)])
        passes.finish(parameters)
        if cell.max_norm is not None and engine is None:
            group = None if pipeline is None else pipeline.group
            result.norms.append(gradients.clip(parameters, cell.max_norm, pipeline=group).item())
        if step == 0 and engine is None:
            result.gradients = {clean(name): full(item.grad) for name, item in assembled.named_parameters()}
        update()
        if engine is None:
            optimizer.zero_grad()
        elif cell.max_norm is not None:
            result.norms.append(float(engine.norm))
        if dist.is_initialized():
            dist.all_reduce(total)
        result.losses.append((total[0] / total[1]).item())
    with nullcontext() if engine is None else engine.whole_weights():
        result.weights = {clean(name): full(item.detach()) for name, item in assembled.named_parameters()}
    return result


def engine_of(
    cell: Cell, assembled: Assembled, optimizer: torch.optim.Optimizer, layout: Layout, device: torch.device
) -> ZeroEngine:
    assert cell.zero is not None
    return ZeroEngine(
        assembled.module,
        optimizer,
        DeepspeedConfig(zero_optimization=ZeroConfig(stage=cell.zero)),
        batch_size=GLOBAL_BATCH // layout.data_degree // cell.accumulate,
        max_norm=cell.max_norm,
        device=device,
        local_rank=dist.get_rank(),
    )


@functools.cache
def _alone(family: str | None, model: tuple[tuple[str, Any], ...], max_norm: float | None, weighted: bool) -> Trained:
    return train(Cell(layout="single", family=family, model=dict(model), max_norm=max_norm, weighted=weighted))


def alone(cell: Cell) -> Trained:
    """What a single process makes of the same batches, in fp32 and with nothing beside."""
    settings = {"num_hidden_layers": depth_of(cell), **cell.model} if cell.family else vars(model_of(cell).config)
    found = _alone(cell.family, tuple(settings.items()), cell.max_norm, cell.weighted)
    return found if cell.zero is None else replace(found, gradients={})


def largest_error(found: Trained, expected: Trained) -> float:
    """Largest error of losses, gradients and weights, relative to the norm of each tensor, or to a thousandth of all of
    them where that is larger; infinite where initial weights differ in a single bit."""
    differing = [name for name, value in found.initial.items() if not torch.equal(value, expected.initial[name])]
    if differing:
        return float("inf")  # weights depend on the seed and on nothing else
    errors = [abs(mine - theirs) / abs(theirs) for mine, theirs in zip(found.losses, expected.losses, strict=True)]
    errors += [abs(mine - theirs) / abs(theirs) for mine, theirs in zip(found.norms, expected.norms, strict=True)]
    for mine, theirs in ((found.gradients, expected.gradients), (found.weights, expected.weights)):
        if not theirs:  # ZeRO keeps no gradients
            continue
        floor = 1e-3 * torch.stack([value.norm() for value in theirs.values()]).norm()
        errors += [((mine[name] - theirs[name]).norm() / theirs[name].norm().clamp(floor)).item() for name in mine]
    return max(errors)


def joined(of_ranks: list[Trained], expected: Trained) -> Trained:
    """The whole model, of what each rank has; a name that several have is checked on all of them."""
    losses = {tuple(item.losses) for item in of_ranks}
    assert len(losses) == 1, f"ranks disagree on the losses: {losses}"
    result = replace(of_ranks[0], initial={}, gradients={}, weights={})
    for kind in ("initial", "gradients", "weights"):
        target = getattr(result, kind)
        for item in of_ranks:
            for name, value in getattr(item, kind).items():
                worse = name in target and _error(value, expected, kind, name) > _error(
                    target[name], expected, kind, name
                )
                if name not in target or worse:
                    target[name] = value
        missing = getattr(expected, kind).keys() ^ target.keys()
        assert not missing, f"{kind}: not in both: {sorted(missing)}"
    return result


def _error(value: Tensor, expected: Trained, kind: str, name: str) -> float:
    return float((value - getattr(expected, kind)[name]).norm())


def mean_loss(output: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    output = getattr(output, "logits", output)
    return F.cross_entropy(output.flatten(0, 1).float(), batch[1].flatten(), ignore_index=IGNORED)


def weighted_loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    total = F.cross_entropy(output.flatten(0, 1).float(), batch[1].flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (batch[1] != IGNORED).sum()


def full(value: Tensor | None) -> Tensor:
    assert value is not None, "a parameter has no gradient"
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def clean(name: str) -> str:
    return name.removeprefix("module.")


def inject(cell: Cell, assembled: Assembled) -> None:
    """Do something wrong on purpose; each of these passed unnoticed in somebody's training."""
    if cell.fault == "scale":
        for _, parameter in assembled.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda item: item.grad.mul_(1.01))
    elif cell.fault == "shards":
        # As torch initialises what is sharded on the CPU: every rank draws the same numbers for its part.
        torch.manual_seed(7)
        for _, parameter in assembled.named_parameters():
            if isinstance(parameter, DTensor):
                torch.nn.init.normal_(parameter.to_local().detach(), std=0.1)
    elif cell.fault == "collective":
        for part in assembled.parts:
            for number, hook in list(part.embedding._forward_hooks.items()):
                if hook is tensor.copied:
                    del part.embedding._forward_hooks[number]
    elif cell.fault == "positions":
        for part in assembled.parts:
            for number, hook in list(part._forward_pre_hooks.items()):
                if getattr(hook, "func", None) is context._give_positions:
                    del part._forward_pre_hooks[number]
    elif cell.fault == "mask":
        axis = assembled.context
        assert axis is not None
        held = axis.held
        axis.held = lambda rank=None: tuple(reversed(held(rank))) if rank is None else held(rank)  # type: ignore
    elif cell.fault == "experts":
        for part in assembled.parts:
            for module in part.modules():
                if hasattr(module, "_exchange"):
                    module._exchange.scale = 1.0
    else:
        assert cell.fault in (None, "mean"), cell.fault


def offloaded() -> dict[str, Any]:
    return {"offload_policy": OffloadPolicyConfig()}
