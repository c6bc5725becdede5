"""Assembly of a model: laid out, wrapped, compiled and initialised for a layout.

The order of the steps matters, and is written down in `assemble`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy

from danling_conf import _torch_private
from danling_conf.parallel import activation_checkpointing as recomputation
from danling_conf.parallel import compile as compilation
from danling_conf.parallel import context as context_axis
from danling_conf.parallel import data_gradients, ddp, hugging_face
from danling_conf.parallel import expert as expert_axis
from danling_conf.parallel import fsdp as sharding
from danling_conf.parallel import stages as stages_of
from danling_conf.parallel import tensor as tensor_axis
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.context import ContextParallel
from danling_conf.parallel.data_gradients import DataGradients
from danling_conf.parallel.init_plan import Blueprint, blueprint_of, draw, made_by, named_tensors, shortened
from danling_conf.parallel.initialize import materialize, seeded
from danling_conf.parallel.mesh import axes_of, axis, batch_mesh
from danling_conf.parallel.pipeline import Pipeline
from danling_conf.parallel.process_group import is_distributed
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import coordinates
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
    policy: MixedPrecisionPolicy | None = None
    """Of FSDP; None without it."""
    gradients: DataGradients | None = None
    """Completes gradients over the data ranks; None in a pipeline, and without DDP and FSDP."""

    def run(self, function: Callable[[nn.Module], torch.Tensor | None], *, training: bool) -> torch.Tensor | None:
        """What `function` returns for the model: a loss, or nothing. It runs inside of the wrapped model's forward, so
        that it may use any method or parameter of the model, and its own outputs may be of any type. Collective."""
        module = self.module
        if isinstance(module, _torch_private.Replicated):
            # In evaluation DDP's forward would synchronise buffers, which it does not change.
            return module.run_inside(function) if training else function(module.module)
        if isinstance(module, FSDPModule):
            return _torch_private.run_inside_fsdp(module, lambda: function(module))
        return function(module)

    def inputs(self, batch: object) -> object:
        """A batch as the model takes it."""
        return sharding.cast_inputs(batch, self.policy)

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
) -> Assembled:
    """The model on its device, laid out, wrapped, compiled and with values, as the layout and the sections say.

    A factory's weights depend on `seed` alone. Where the modules' own initialisers cannot repeat what the constructor
    did, the model is built in full on the CPU of every rank, under one seed and with rank 0's weights, and the log
    names the modules that prevent a build on the meta device.

    Args:
        model: a factory without arguments, which is called on the meta device so that no rank holds the whole model; or
            a module, which is taken over, with rank 0's weights.
        layout: the degrees of the run, without one to be filled.
        mesh: the mesh of the layout (`parallel.mesh.make`); None in a single process and for DDP without a mesh.
        device: of this rank.
        seed: of the weights.
        fsdp: the section `fsdp`; likewise `compile`, `activation_checkpointing` and `parallel`.
        expert_mesh: the mesh of the experts (`parallel.mesh.make_expert`), where the layout has expert axes.
        precision: dtype of the computation, for FSDP's policy; without FSDP it is the caller's autocast.

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
    whole, blueprint = _whole_model(model, seed)
    hugging_face.prepare(whole)
    by_ddp = ddp.is_plain(mesh) and not fsdp.enabled
    if blueprint is None and not by_ddp:
        _share_weights(whole, device)

    context = context_axis.make(parallel, mesh)
    plan = _checked_plan(whole, layout, parallel, has_experts=expert_mesh is not None)
    recomputed = recomputation.chosen(whole, activation_checkpointing)
    _check_classes(whole, fsdp)

    stages = _cut(whole, layout, parallel)
    parts = {0: whole} if stages is None else dict(stages.parts)
    pipelined = stages is not None

    unused = parallel.unused_parameters == data_gradients.ALLOW
    compilation.configure(compile)  # before DDP wraps: `python_reducer` changes what it sets up
    sharded_logits = False
    for index, part in parts.items():
        experts, sharded = _lay_out(part, layout, mesh, expert_mesh, parallel, plan, context, pipelined=pipelined)
        sharded_logits = sharded_logits or sharded
        recomputation.apply(part, activation_checkpointing, recomputed)
        per_block = _compile_blocks(part, compile, layout)
        if not by_ddp:
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
        _give_values(part, blueprint, fsdp, device, seed)
        # The schedule works inside of a stage's forward: there is no compiling a stage as a whole.
        compiled = part if per_block or pipelined else compilation.apply(part, compile)
        parts[index] = ddp.replicate(compiled, mesh, find_unused=unused) if by_ddp else compiled
    return Assembled(
        parts=tuple(part for _, part in sorted(parts.items())),
        whole=whole if blueprint is None else blueprint.model,
        pipeline=None
        if stages is None
        else _pipeline(whole, stages, parts, layout, mesh, device, parallel, context, _policy(fsdp, precision)),
        context=context,
        sharded_logits=sharded_logits,
        batch=batch_mesh(mesh),
        policy=_policy(fsdp, precision),
        gradients=None if pipelined else _gradients(parts[0], parallel, fsdp, mesh),
    )


@dataclass(frozen=True)
class _Stages:
    """A model cut into the stages of a pipeline."""

    parts: dict[int, nn.Module]
    """The stages of this rank, by index."""
    placement: list[int]
    """The pipeline rank of every stage."""
    names: stages_of.Names
    """The names of the modules of every stage."""


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


def _whole_model(model: nn.Module | Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Blueprint | None]:
    """The model before anything is done to it, and its blueprint where it is on the meta device."""
    if not isinstance(model, nn.Module):
        return _build(model, seed)
    on_meta = any(tensor.device.type == "meta" for _, tensor in named_tensors(model))
    return model, blueprint_of(model) if on_meta else None


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


def _cut(model: nn.Module, layout: Layout, parallel: ParallelConfig) -> _Stages | None:
    """The stages of the model, as the section names them or by its blocks; None without a pipeline."""
    degree = layout.pipeline
    if degree == 1:
        return None
    names = parallel.module_fqns_per_model_part
    if names is None:
        names = stages_of.deal_out(model, degree * stages_of.stages_per_rank(parallel.pipeline_schedule))
    stages_of.check(model, names)
    placement = stages_of.placement(parallel.pipeline_schedule, degree, len(names))
    own = coordinates(layout, dist.get_rank())["pipeline"]
    mine = [index for index, rank in enumerate(placement) if rank == own]
    return _Stages({index: stages_of.stage_model(model, names, index) for index in mine}, placement, names)


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


def _give_values(
    part: nn.Module, blueprint: Blueprint | None, fsdp: FsdpConfig, device: torch.device, seed: int
) -> None:
    """Values for what is on the meta device; else, the move to the device, which FSDP2 has done already."""
    if blueprint is not None:
        offloaded = torch.device("cpu") if sharding.offloads(fsdp) else None
        materialize(part, device=device, seed=seed, blueprint=blueprint, parameter_device=offloaded)
    elif not fsdp.enabled:
        part.to(device)


def _gradients(
    model: nn.Module, parallel: ParallelConfig, fsdp: FsdpConfig, mesh: DeviceMesh | None
) -> DataGradients | None:
    """What completes the gradients of a model under DDP or FSDP2."""
    if not fsdp.enabled and not isinstance(model, _torch_private.Replicated):
        return None
    whole = sharding.whole_parameters(model) if fsdp.enabled else []
    return DataGradients(model, unused=parallel.unused_parameters, replicated=whole, mesh=batch_mesh(mesh))


def _pipeline(
    whole: nn.Module,
    stages: _Stages,
    parts: dict[int, nn.Module],
    layout: Layout,
    mesh: DeviceMesh | None,
    device: torch.device,
    parallel: ParallelConfig,
    context: ContextParallel | None,
    policy: MixedPrecisionPolicy | None,
) -> Pipeline:
    """The schedule over the stages, once these are wrapped and have values."""
    blocks = [name for name, _ in repeated_blocks(whole)]
    in_one_container = len({name.rpartition(".")[0] for name in blocks}) == 1
    return Pipeline(
        parts,
        stages.placement,
        parallel,
        mesh["pipeline"],  # type: ignore[index]
        device,
        names=stages.names,
        blocks=blocks if in_one_container else [],
        several_data_ranks=layout.data_degree > 1,
        positions=_positions if context is None else context.positions,
        policy=policy,
    )


def _policy(fsdp: FsdpConfig, precision: str | None) -> MixedPrecisionPolicy | None:
    return sharding.mixed_precision_policy(fsdp, precision) if fsdp.enabled else None


def _positions(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device)


def _build(factory: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, Blueprint | None]:
    """The model of a factory: on the meta device with its blueprint, or else in full on the CPU."""
    try:
        with seeded(seed):  # what it draws outside torch is drawn on meta too
            model, blueprint = draw(factory)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        # The constructor needs values (`.item()`, `.numpy()`), which meta tensors lack. If something else is wrong, the
        # build on the CPU raises it.
        _log.info("model: built in full on the CPU of every rank, since it cannot be built on meta: %s", error)
    else:
        if not blueprint.missing:
            return model, blueprint
        _log.info(
            "model: built in full on the CPU of every rank. For a build on the meta device, give these modules a "
            "reset_parameters() that sets the tensor and that the constructor calls last: %s",
            shortened(blueprint.missing),
        )
    with torch.device("cpu"), seeded(seed):
        return made_by(factory), None


def _share_weights(model: nn.Module, device: torch.device) -> None:
    """Give every rank the values of rank 0: FSDP2 shards each rank's own, which need not be the same."""
    if not is_distributed():
        return
    with torch.no_grad():
        for tensor in {id(tensor): tensor for _, tensor in named_tensors(model)}.values():
            shared = tensor.detach().to(device, copy=True)
            dist.broadcast(shared, src=0)
            tensor.copy_(shared)
