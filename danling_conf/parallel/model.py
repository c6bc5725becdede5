"""Assembly of a model: laid out, wrapped, compiled and initialised for a layout.

The order of the steps matters, and is written down in `assemble`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from danling_conf._torch_private import data_parallel
from danling_conf.parallel import activation_checkpointing as recomputation
from danling_conf.parallel import batch_norm, data_gradients, ddp, hugging_face, rehearsal
from danling_conf.parallel import compile as compilation
from danling_conf.parallel import context as context_axis
from danling_conf.parallel import expert as expert_axis
from danling_conf.parallel import fsdp as sharding
from danling_conf.parallel import tensor as tensor_axis
from danling_conf.parallel import trial as trials
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.buffers import SharedBuffers
from danling_conf.parallel.context import ContextParallel
from danling_conf.parallel.cut import cut
from danling_conf.parallel.data_gradients import DataGradients
from danling_conf.parallel.deepspeed import ZeroEngine
from danling_conf.parallel.gathered_blocks import GatheredBlocks
from danling_conf.parallel.init_plan import (
    Source,
    WithoutValues,
    build,
    make_contiguous,
    meta_copy,
    named_tensors,
    refuse_for_ranks,
    refuse_meta,
)
from danling_conf.parallel.initialize import materialize
from danling_conf.parallel.mesh import axes_of, axis, batch_mesh
from danling_conf.parallel.pipeline import Pipeline
from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.stage_forward import Forward
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.imports import uncollected
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import ABSENT, SettingError, Violation, refuse

_log = logging.getLogger(__name__)

_OWN_AXES = ("tensor", "context")
"""Axes that a model with a `parallelize(mesh)` of its own lays itself out over."""


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A model made ready for training, and what a pass through it needs to know (see
    `parallel.forward_backward`)."""

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
    prove_layout: Callable[[Forward, Any, rehearsal.Loss | None], None] | None = None
    """To be called once with the first batch, whole, where no example was given: raises SettingError on every rank
    where the model laid out over the tensor and context axes, or its loss, is not the whole one."""
    policy: MixedPrecisionPolicy | None = None
    """Of FSDP; None without it."""
    gradients: DataGradients | None = None
    """Completes gradients over the data ranks; None in a pipeline, and without DDP and FSDP."""
    blocks: GatheredBlocks | None = None
    """Blocks that FSDP gathers one by one; None in a pipeline, whose schedule passes each."""
    compiled: bool = False
    engine: ZeroEngine | None = None
    """Of DeepSpeed; None without it."""
    buffers: SharedBuffers | None = None
    """Shares buffers over the data ranks; None where there is one, and under DDP, which does that itself."""

    def run(self, function: Callable[[nn.Module], torch.Tensor | None], *, training: bool) -> torch.Tensor | None:
        """What `function` returns for the model: a loss, or nothing. It runs inside of the wrapped model's forward, so
        that it may use any method or parameter of the model, and its own outputs may be of any type. Collective."""
        module = self.module
        if self.engine is not None:
            found: torch.Tensor | None = self.engine.run(function, training=training)
            return found
        if isinstance(module, data_parallel.Replicated):
            # In evaluation DDP's forward would synchronise buffers, which it does not change.
            return module.run_inside(function) if training else function(module.module)
        if isinstance(module, FSDPModule):
            with nullcontext() if self.blocks is None or not training else self.blocks.forward():
                return data_parallel.run_inside_fsdp(module, lambda: function(module))
        return function(module)

    @property
    def direct(self) -> bool:
        """Whether `run` does no more than call its function with the model."""
        wrapped = self.engine is not None or self.pipeline is not None
        return not wrapped and not isinstance(self.parts[0], (data_parallel.Replicated, FSDPModule))

    def inputs(self, batch: object) -> object:
        """A batch as the model takes it."""
        return sharding.cast_inputs(batch, self.policy)

    def explaining(self, inputs: object) -> AbstractContextManager[None]:
        """Explains a failure of a forward on `inputs`, as `inputs()` returned them, where they are not its dtype's."""
        casts = self.policy is None or self.policy.cast_forward_inputs
        return nullcontext() if casts else sharding.explaining_uncast(inputs, self.policy)

    @property
    def module(self) -> nn.Module:
        """The model. Raises SettingError in a pipeline, where no rank has it whole."""
        if self.pipeline is not None:
            raise SettingError(
                "parallel.axes.pipeline", ABSENT, "no rank has the whole model", "use its parts, or set the degree to 1"
            )
        return self.parts[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank, each once."""
        for part in self.parts:
            yield from part.named_parameters()

    def train(self, mode: bool = True) -> None:
        for part in self.parts:
            part.train(mode)


@uncollected()  # what is made for each tensor stays
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
    loss: rehearsal.Loss | None = None,
    for_engine: bool = False,
    fake: AbstractContextManager[object] | None = None,
) -> Assembled:
    """The model on its device, laid out, wrapped, compiled and with values, as the layout and the sections say.

    A factory's weights are, bit for bit, those that it returns when it is called under `seed` on the CPU, whatever the
    layout; no rank holds the whole model for it (see `parallel.init_plan`).

    Args:
        model: a factory without arguments; or a module, which is taken over, with rank 0's weights.
        layout: the degrees of the run, without one to be filled.
        mesh: the mesh of the layout (`parallel.mesh.make`); None in a single process and for DDP without a mesh.
        device: of this rank.
        seed: of the weights.
        fsdp: the section `fsdp`; likewise `compile`, `activation_checkpointing` and `parallel`.
        expert_mesh: the mesh of the experts (`parallel.mesh.make_expert`), where the layout has expert axes.
        precision: dtype of the computation, for FSDP's policy; without FSDP it is the caller's autocast.
        example: returns a small batch. With it, a pipeline tries the model before it is cut and puts modules where they
            are used, and attention is checked for the context axis. Without it, modules are put where they are defined,
            and the first step checks both.
        forward: runs the model on the example.
        loss: of the output and the example, which the context axis takes of parts of sequences.
        for_engine: leave the gradients of a layout that only replicates to an engine, see `with_engine`.
        fake: of a plan: the context in which the tensors of this rank are made. `model` is then a module on the meta
            device, and gets no values.

    Raises:
        SettingError: the layout asks for what the model does not implement, or shards without FSDP.
        ConfigRefused: the same, with several faults.
    """
    # The order, and what breaks in another one:
    #  1. Check layout and mesh, build the whole model, share rank 0's weights (DDP does that itself).
    #  2. Check the plans and choose the blocks on the whole model: a stage has a part of the names only.
    #  3. Cut into stages. Each following step works on what this rank holds.
    #  4. Plans of the tensor, expert and context axes: they replace parameters by DTensors, which FSDP2 then shards
    #     again. The other way round, they would find parameters that are sharded already.
    #  5. Recompute activations, then compile each block: the recomputation is compiled with the block.
    #  6. FSDP2 or data parallelism, whose hooks must stay outside of the compiled code.
    #  7. Values: after sharding, so that no rank allocates a whole parameter that it only keeps a part of.
    #  8. Compilation of a whole model, then DDP, which broadcasts values. The compiled forward runs inside of DDP's,
    #     where dynamo finds its buckets.
    parallel = parallel or ParallelConfig()
    _check_layout(layout, mesh, fsdp)
    whole, source = _whole_model(model, seed, device, without_values=fake is not None)
    hugging_face.prepare(whole)
    by_ddp = ddp.is_plain(mesh) and not fsdp.enabled and not for_engine
    if source is not None and fsdp.enabled:
        make_contiguous(whole)
    if source is None and not by_ddp:
        _share_weights(whole, device)

    context = context_axis.make(parallel, mesh)
    plan = _checked_plan(whole, layout, parallel, has_experts=expert_mesh is not None)
    prove_layout = None
    if max(layout.tensor, layout.context) > 1:
        if example is not None and forward is not None:
            prove = _proof(whole, layout, mesh, parallel, plan, context, device, rehearse=fake is None)
            prove(forward, example(), loss)
        elif fake is None:
            prove_layout = _proof(meta_copy(whole), layout, mesh, parallel, plan, context, device)
    recomputed = recomputation.chosen(whole, activation_checkpointing)
    _check_classes(whole, fsdp)

    stages = cut(whole, layout, parallel, example, forward)
    parts = {0: whole} if stages is None else dict(stages.parts)
    pipelined = stages is not None

    unused = parallel.unused_parameters == data_gradients.ALLOW
    compilation.configure(compile)  # before DDP wraps: `python_reducer` changes what it sets up
    sharded_logits = per_block = False
    for part in parts.values():
        batch_norm.apply(part, mesh, device, synchronise=parallel.sync_batch_norm)
        experts, sharded = _lay_out(part, layout, mesh, expert_mesh, parallel, plan, context, pipelined=pipelined)
        sharded_logits = sharded_logits or sharded
        recomputation.apply(part, activation_checkpointing, recomputed)
        per_block = _compile_blocks(part, compile, layout)
        if not by_ddp and not for_engine:
            _wrap_blocks(
                part,
                fsdp,
                mesh,
                expert_mesh,
                experts,
                precision=precision,
                pipelined=pipelined,
                one_group=unused and not pipelined,
            )
    with fake or nullcontext():
        _give_values(list(parts.values()), source, fsdp, device)
        for index, part in parts.items():
            # The schedule works inside of a stage's forward: there is no compiling a stage as a whole.
            compiled = part if per_block or pipelined else compilation.apply(part, compile)
            if by_ddp:
                compiled = ddp.replicate(compiled, mesh, find_unused=unused, fake=fake is not None)
            parts[index] = compiled
    return Assembled(
        parts=tuple(part for _, part in sorted(parts.items())),
        whole=whole if source is None else source.model,
        pipeline=None
        if stages is None
        else stages.pipeline(parts, layout, mesh, device, parallel, context, _policy(fsdp, precision)),
        context=context,
        sharded_logits=sharded_logits,
        batch=batch_mesh(mesh),
        prove_layout=prove_layout,
        policy=_policy(fsdp, precision),
        gradients=None if pipelined else _gradients(parts[0], parallel, fsdp, mesh),
        blocks=None if pipelined else _blocks(parts[0], fsdp, batch_mesh(mesh), compiled=compile.enable),
        compiled=compile.enable,
        buffers=_buffers(list(parts.values()), batch_mesh(mesh), by_ddp=by_ddp),
    )


def with_engine(assembled: Assembled, engine: ZeroEngine, mesh: DeviceMesh | None) -> Assembled:
    """A model that was assembled `for_engine`, in the hands of one, which was made with its optimizer."""
    gradients = DataGradients(
        assembled.module, unused=data_gradients.REFUSE, mesh=batch_mesh(mesh), reached=engine.has_gradient
    )
    return replace(assembled, engine=engine, gradients=gradients)


def _check_layout(layout: Layout, mesh: DeviceMesh | None, fsdp: FsdpConfig) -> None:
    """Refuse a layout that shards without FSDP, or that the mesh was not made for."""
    if layout.shard > 1 and not fsdp.enabled:
        raise SettingError(
            "fsdp.enabled",
            False,
            f"a layout with parallel.axes.shard={layout.shard} shards by FSDP",
            f"choose it by name (parallel=fsdp{layout.shard}), or use the replicate axis for DDP",
        )
    absent = [name for name in WORLD_AXES if getattr(layout, name) > 1 and name not in axes_of(mesh)]
    if absent == ["replicate"] and mesh is None and dist.is_initialized():
        return  # parallel.use_device_mesh=false
    refuse(
        Violation(
            f"parallel.axes.{name}",
            getattr(layout, name),
            f"the mesh has no {name} axis",
            "make it from the same layout (danling_conf.builders.make_mesh), after the process group is started",
        )
        for name in absent
    )


def _whole_model(
    model: nn.Module | Callable[[], nn.Module], seed: int, device: torch.device, *, without_values: bool
) -> tuple[nn.Module, Source | None]:
    """The model before anything is done to it, and the source of its values where it is on the meta device."""
    if without_values:
        assert isinstance(model, nn.Module)
        return model, WithoutValues(model)
    if not isinstance(model, nn.Module):
        return build(model, seed, device)
    refuse_meta(model)
    if is_distributed():
        refuse_for_ranks(model)
    return model, None


def _proof(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh | None,
    parallel: ParallelConfig,
    plan: dict[str, str] | None,
    context: ContextParallel | None,
    device: torch.device,
    *,
    rehearse: bool = True,
) -> Callable[[Forward, Any, rehearsal.Loss | None], None]:
    """Shows, by a batch, that a model can be laid out over the tensor and context axes; without `rehearse`, by what it
    calls alone."""

    def apply(small: nn.Module) -> None:
        _lay_out(small, layout, mesh, None, parallel, plan, context, pipelined=False)

    by_plan = _planned(model, layout, "context")
    axis, by_user = "tensor" if layout.tensor > 1 else "context", plan is not None and parallel.tensor_plan is not None
    rehearsed = rehearsal.Layout(
        apply=apply,
        plan=plan,
        path="parallel.tensor_plan" if by_user else f"parallel.axes.{axis}",
        value=ABSENT if by_user else getattr(layout, axis),
        lengths=2 * layout.tensor * layout.context,
        context=context if by_plan else None,
        device=device,
    )

    def prove(forward: Forward, batch: Any, loss: rehearsal.Loss | None) -> None:
        if by_plan:
            trials.together(lambda: context_axis.check_attention(model, layout.context, forward, batch))
        if rehearse and (by_plan or layout.context == 1):  # else it lays itself out over parts of sequences
            rehearsal.rehearse(model, rehearsed, forward, batch, loss)

    return prove


def _checked_plan(
    model: nn.Module, layout: Layout, parallel: ParallelConfig, *, has_experts: bool
) -> dict[str, str] | None:
    """The plan of the tensor axis, if it needs one. Refuses a model that does not say how other axes lay it out."""
    plan = None
    if _planned(model, layout, "tensor"):
        plan = tensor_axis.plan_for(model, parallel, layout.tensor)
    if _planned(model, layout, "context"):
        context_axis.check(model, layout.context)
    if has_experts:
        expert_axis.check(model, layout)
    return plan


def _check_classes(model: nn.Module, fsdp: FsdpConfig) -> None:
    """Refuse a name in `fsdp.module_classes` that the whole model has no module of; a stage need not have each."""
    if fsdp.enabled and fsdp.module_classes is not None:
        repeated_blocks(model, fsdp.module_classes)


def _planned(model: nn.Module, layout: Layout, axis: str) -> bool:
    """Whether an axis needs a plan: its degree is above 1, and the model does not lay itself out."""
    return getattr(layout, axis) > 1 and _own_method(model) is None


def _own_method(model: nn.Module) -> Callable[[DeviceMesh], object] | None:
    """A model's own `parallelize(mesh)`."""
    method = getattr(model, "parallelize", None)
    # Older models of transformers have a method of this name that takes a map of devices.
    return method if callable(method) and "mesh" in inspect.signature(method).parameters else None


def _lay_out(
    part: nn.Module,
    layout: Layout,
    mesh: DeviceMesh | None,
    expert_mesh: DeviceMesh | None,
    parallel: ParallelConfig,
    plan: dict[str, str] | None,
    context: ContextParallel | None,
    *,
    pipelined: bool,
) -> tuple[list[str], bool]:
    """Apply the plans of the tensor, expert and context axes. Returns the names of the modules that hold experts, and
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
        if not pipelined:  # a pipeline passes positions to its stages itself
            context_axis.give_positions(part, context)
    return experts, sharded


def _compile_blocks(part: nn.Module, compile: CompileConfig, layout: Layout) -> bool:
    """Compile a part block by block where the section says so. Returns whether that is how it is compiled."""
    per_block = compilation.is_per_block(part, compile)
    if per_block:
        compilation.apply(part, compile, inside_recomputation=layout.tensor > 1)
    return per_block


def _wrap_blocks(
    part: nn.Module,
    fsdp: FsdpConfig,
    mesh: DeviceMesh | None,
    expert_mesh: DeviceMesh | None,
    experts: Sequence[str],
    *,
    precision: str | None,
    pipelined: bool,
    one_group: bool,
) -> None:
    """FSDP2, or data parallelism of weights that other axes shard."""
    if fsdp.enabled:
        sharding.shard(
            part,
            fsdp,
            mesh,
            precision=precision,
            experts=experts,
            expert_mesh=expert_mesh,
            pipelined=pipelined,
            one_group=one_group,
        )
    else:
        ddp.replicate_blocks(part, mesh, experts=experts, expert_mesh=expert_mesh)


def _give_values(parts: Sequence[nn.Module], source: Source | None, fsdp: FsdpConfig, device: torch.device) -> None:
    """Values for what is on the meta device; else, the move to the device, which FSDP2 has done already."""
    if source is not None:
        offloaded = torch.device("cpu") if sharding.offloads(fsdp) else None
        materialize(parts, device=device, source=source, parameter_device=offloaded)
    elif not fsdp.enabled:
        for part in parts:
            part.to(device)


def _gradients(
    model: nn.Module, parallel: ParallelConfig, fsdp: FsdpConfig, mesh: DeviceMesh | None
) -> DataGradients | None:
    """What completes the gradients of a model under DDP or FSDP2."""
    if not fsdp.enabled and not isinstance(model, data_parallel.Replicated):
        return None
    whole = sharding.whole_parameters(model) if fsdp.enabled else []
    return DataGradients(model, unused=parallel.unused_parameters, replicated=whole, mesh=batch_mesh(mesh))


def _blocks(model: nn.Module, fsdp: FsdpConfig, batch: DeviceMesh | None, *, compiled: bool) -> GatheredBlocks | None:
    return GatheredBlocks(model, batch, compiled=compiled) if fsdp.enabled and batch is not None else None


def _buffers(parts: Sequence[nn.Module], batch: DeviceMesh | None, *, by_ddp: bool) -> SharedBuffers | None:
    return None if by_ddp or batch is None or batch.size() == 1 else SharedBuffers(parts, batch)


def _policy(fsdp: FsdpConfig, precision: str | None) -> MixedPrecisionPolicy | None:
    return sharding.mixed_precision_policy(fsdp, precision) if fsdp.enabled else None


def _share_weights(model: nn.Module, device: torch.device) -> None:
    """Give every rank the values of rank 0: FSDP2 shards each rank's own, which need not be the same."""
    if not is_distributed():
        return
    with torch.no_grad():
        for tensor in {id(tensor): tensor for _, tensor in named_tensors(model)}.values():
            shared = tensor.detach().to(device, copy=True)
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)
