"""A model made ready for training under a layout."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from danling_conf.parallel import activation_checkpointing as recomputation
from danling_conf.parallel import compile as compilation
from danling_conf.parallel import context as context_axis
from danling_conf.parallel import ddp, hugging_face
from danling_conf.parallel import expert as expert_axis
from danling_conf.parallel import fsdp as sharding
from danling_conf.parallel import stages as stages_of
from danling_conf.parallel import tensor as tensor_axis
from danling_conf.parallel import trial as trials
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.context import ContextParallel
from danling_conf.parallel.init_plan import Source, build, meta_copy, named_tensors, refuse_meta
from danling_conf.parallel.initialize import materialize
from danling_conf.parallel.mesh import axes_of, axis, batch_mesh
from danling_conf.parallel.pipeline import Forward, Pipeline, rehearse
from danling_conf.parallel.trial import Trial
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import coordinates
from danling_conf.topology.violation import ABSENT, SettingError

_OWN_AXES = ("tensor", "context")
"""Axes that a model with a `parallelize(mesh)` of its own lays itself out over."""


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A model made ready for training, and what a pass through it needs to know (see `build.passes`)."""

    parts: tuple[nn.Module, ...]
    """The model; in a pipeline, the models of this rank's stages, each with the names of the whole."""
    whole: nn.Module
    """The whole model, not for computing: in a pipeline it may be on the meta device."""
    pipeline: Pipeline | None = None
    context: ContextParallel | None = None
    sharded_logits: bool = False
    """Whether logits stay sharded over the tensor axis for a loss that takes them so."""
    batch: DeviceMesh | None = None
    """The ranks that see different tokens; None where all see the same."""
    check_attention: Callable[[Forward, Any], None] | None = None
    """To be called once with the first batch, whole, where no example was given: raises SettingError on every rank
    where a block's attention does not reach over the context axis."""

    @property
    def module(self) -> nn.Module:
        """The model. Raises ValueError in a pipeline, where no rank has it whole."""
        if self.pipeline is not None:
            raise ValueError("parallel.axes.pipeline: no rank has the whole model: use parts, or set the degree to 1")
        return self.parts[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank, each once."""
        for part in self.parts:
            yield from part.named_parameters()

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)


def assemble(
    model: nn.Module | Callable[[], nn.Module],
    *,
    layout: Layout,
    mesh: DeviceMesh | None,
    device: torch.device,
    seed: int,
    fsdp: FsdpConfig,
    compile: CompileConfig,
    activation_checkpointing: ActivationCheckpointingConfig,
    parallel: ParallelConfig | None = None,
    expert_mesh: DeviceMesh | None = None,
    precision: str | None = None,
    example: Callable[[], Any] | None = None,
    forward: Forward | None = None,
) -> Assembled:
    """The model on its device, laid out, wrapped, compiled and with values, as the layout and the sections say.

    `model` is a factory without arguments, or a module, which is taken over with rank 0's weights. A factory's weights
    are, bit for bit, those that it gives when it is called under `seed` on the CPU, whatever the layout; no rank holds
    the whole model for it (see `init_plan`).

    The order: cut into pipeline stages, plans of the tensor, expert and context axes, activation checkpointing, compile
    per block, FSDP2 or data parallelism, values, compile of a whole model. (DDP takes values before it wraps.)
    `precision` reaches FSDP's policy; elsewhere it is the caller's autocast.

    With `example`, which returns a small batch, a pipeline tries `forward(model, batch)` before the model is cut, and
    puts modules where they are used. Without it they are put where they are defined, and the first step tries whether
    that is right.

    Raises ValueError where the layout asks for what nothing implements, or shards without FSDP.
    """
    parallel = parallel or ParallelConfig()
    _check(layout, mesh, fsdp)
    source: Source | None = None
    if isinstance(model, nn.Module):
        refuse_meta(model)
        built = model
    else:
        built, source = build(model, seed, device)
    hugging_face.prepare(built)
    plain = ddp.is_plain(mesh) and not fsdp.enabled
    if source is None and not plain:
        _share_weights(built, device)
    context = context_axis.make(parallel, mesh)
    plan = tensor_axis.plan_for(built, parallel, layout.tensor) if _planned(built, layout, "tensor") else None
    check_attention: Callable[[Forward, Any], None] | None = None
    if _planned(built, layout, "context"):
        context_axis.check(built, layout.context)
        check_attention = partial(_check_attention, meta_copy(built), layout.context)
        if example is not None and forward is not None:
            check_attention(forward, example())
            check_attention = None
    if expert_mesh is not None:
        expert_axis.check(built, layout)
    recomputed = recomputation.chosen(built, activation_checkpointing)
    if fsdp.enabled and fsdp.module_classes is not None:
        repeated_blocks(built, fsdp.module_classes)  # names are checked before stages have a part of the classes each
    cut = _cut(built, layout, parallel, example, forward)
    stages = None if cut is None else cut.parts
    parts = stages or {0: built}
    offloaded = torch.device("cpu") if sharding.offloads(fsdp) else None
    sharded_logits = False
    per_block = False
    for part in parts.values():
        experts, sharded = _lay_out(part, layout, mesh, expert_mesh, parallel, plan, context)
        sharded_logits = sharded_logits or sharded
        if context is not None and not stages and _own_method(part) is None:
            context_axis.give_positions(part, context)
        recomputation.apply(part, activation_checkpointing, recomputed)
        per_block = compilation.is_per_block(part, compile)
        compilation.configure(compile)
        if per_block:
            compilation.apply(part, compile, inside_recomputation=layout.tensor > 1)
        if fsdp.enabled:
            sharding.shard(
                part, fsdp, mesh, precision=precision, experts=experts, expert_mesh=expert_mesh, pipelined=bool(stages)
            )
        elif not plain:
            ddp.replicate_blocks(part, mesh, experts=experts, expert_mesh=expert_mesh)
        if source is None and not fsdp.enabled:
            part.to(device)
    if source is not None:
        materialize(list(parts.values()), device=device, source=source, parameter_device=offloaded)
    for index, part in parts.items():
        wrapped = ddp.replicate(part, mesh) if plain else part
        # The schedule works inside of a stage's forward: there is no compiling a stage as a whole.
        parts[index] = wrapped if per_block or stages else compilation.apply(wrapped, compile)
    pipeline = None
    if cut is not None:
        # Only what is sent between stages may be a part of a sequence: else the model numbers the tokens itself.
        positions = _positions if parallel.sequence_parallel else None
        if context is not None:
            positions = context.positions
        pipeline = Pipeline(
            parts,
            cut.placement,
            parallel,
            mesh["pipeline"],  # type: ignore[index]
            device,
            names=cut.names,
            blocks=cut.blocks,
            trial=cut.trial,
            prove=None if cut.trial is not None else cut.prove,
            several_data_ranks=layout.data_degree > 1,
            positions=positions,
            policy=sharding.mixed_precision_policy(fsdp, precision) if fsdp.enabled else None,
        )
    return Assembled(
        parts=tuple(part for _, part in sorted(parts.items())),
        whole=source.model if source is not None else built,
        pipeline=pipeline,
        context=context,
        sharded_logits=sharded_logits,
        batch=batch_mesh(mesh),
        check_attention=check_attention,
    )


def _check_attention(model: nn.Module, degree: int, forward: Forward, batch: Any) -> None:
    trials.together(lambda: context_axis.check_attention(model, degree, forward, batch))


def _planned(model: nn.Module, layout: Layout, axis: str) -> bool:
    """Whether an axis needs a plan: its degree is above 1, and the model does not lay itself out."""
    return getattr(layout, axis) > 1 and _own_method(model) is None


def _own_method(model: nn.Module) -> Callable[[DeviceMesh], object] | None:
    """A model's own `parallelize(mesh)`. (Older models of transformers have a method of this name that takes a map of
    devices.)"""
    method = getattr(model, "parallelize", None)
    return method if callable(method) and "mesh" in inspect.signature(method).parameters else None


@dataclass(frozen=True)
class _Cut:
    """A model cut into stages."""

    parts: dict[int, nn.Module]
    """The stages of this rank, by index."""
    placement: list[int]
    names: stages_of.Names
    blocks: list[str]
    trial: Trial | None
    prove: Callable[[Forward, Any], None]


def _cut(
    model: nn.Module,
    layout: Layout,
    parallel: ParallelConfig,
    example: Callable[[], Any] | None,
    forward: Forward | None,
) -> _Cut | None:
    """The stages of a model; None for no pipeline. Collective with an example: the whole model is tried before it is
    cut, so that its modules go where they are used."""
    degree = layout.pipeline
    if degree == 1:
        return None
    names = parallel.module_fqns_per_model_part
    if names is None:
        blocks = stages_of.blocks_of(model)
    else:
        stages_of.check(model, names)
        found = [name for name, _ in repeated_blocks(model)]
        blocks = found if len({name.rpartition(".")[0] for name in found}) == 1 else []

    def tried(forward: Forward, batch: Any) -> Trial:
        chain = blocks or stages_of.called(model, names or [])
        around = [name for side in stages_of.around(model, blocks) for name in side] if blocks else []
        return trials.run(model, chain, around, forward, batch, alone=not blocks)

    def proven(names: stages_of.Names, trial: Trial, forward: Forward, batch: Any) -> None:
        stages_of.check(model, names)
        stages_of.check_used(model, names, trial)
        rehearse(trial, names, blocks, forward, batch)

    trial = None
    if example is not None and forward is not None:
        batch = example()
        trial = trials.together(partial(tried, forward, batch))
    if names is None:
        names = stages_of.deal_out(model, degree * stages_of.stages_per_rank(parallel.pipeline_schedule), trial)
    stages_of.check(model, names)
    if trial is not None and forward is not None:
        trials.together(partial(proven, names, trial, forward, batch))

    def prove(forward: Forward, batch: Any) -> None:
        def check() -> None:
            found = tried(forward, batch)
            for block, length in zip(found.blocks, found.returns, strict=True):
                if length:
                    raise SettingError(
                        trials.PATH, ABSENT, f"{block} returns a tuple of {length}", "pass example= to assemble"
                    )
            proven(names, found, forward, batch)

        trials.together(check)

    placement = stages_of.placement(parallel.pipeline_schedule, degree, len(names))
    own = coordinates(layout, dist.get_rank())["pipeline"]
    mine = [index for index, rank in enumerate(placement) if rank == own]
    parts = {index: stages_of.stage_model(model, names, index, trial) for index in mine}
    return _Cut(parts, placement, names, blocks, trial, prove)


def _lay_out(
    part: nn.Module,
    layout: Layout,
    mesh: DeviceMesh | None,
    expert_mesh: DeviceMesh | None,
    parallel: ParallelConfig,
    plan: dict[str, str] | None,
    context: ContextParallel | None,
) -> tuple[list[str], bool]:
    """Apply the plans of the tensor, expert and context axes: gives the names of the modules that hold experts, and
    whether logits may stay sharded."""
    own = _own_method(part)
    if own is not None and mesh is not None and any(getattr(layout, name) > 1 for name in _OWN_AXES):
        own(mesh)
    sharded = False
    if plan is not None:
        tensor = mesh["tensor"]  # type: ignore[index]
        sharded = tensor_axis.parallelize(part, plan, tensor, loss_parallel=parallel.loss_parallel)
    experts: list[str] = []
    if expert_mesh is not None:
        experts = expert_axis.parallelize(part, layout, expert_mesh, axis(mesh, "tensor"))
    if context is not None and own is None:
        context_axis.parallelize(part, context)
    return experts, sharded


def _positions(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device)


def _check(layout: Layout, mesh: DeviceMesh | None, fsdp: FsdpConfig) -> None:
    if layout.shard > 1 and not fsdp.enabled:
        raise ValueError(
            f"fsdp.enabled=false: a layout with parallel.axes.shard={layout.shard} shards by FSDP; choose it by name "
            f"(parallel=fsdp{layout.shard}), or use the replicate axis for DDP"
        )
    absent = [name for name in WORLD_AXES if getattr(layout, name) > 1 and name not in axes_of(mesh)]
    if absent == ["replicate"] and mesh is None and dist.is_initialized():
        return  # parallel.use_device_mesh=false
    if absent:
        raise ValueError(
            f"parallel.axes.{absent[0]}={getattr(layout, absent[0])}: the mesh has no {absent[0]} axis; make it from "
            f"the same layout (build.mesh.make)"
        )


def _share_weights(model: nn.Module, device: torch.device) -> None:
    """Give every rank rank 0's values: FSDP2 cuts out of each rank's own, which need not be the same."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    with torch.no_grad():
        for tensor in {id(tensor): tensor for _, tensor in named_tensors(model)}.values():
            shared = tensor.detach().to(device, copy=True)
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)
