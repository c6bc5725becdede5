"""Rules of the tensor, context and expert axes: what they need of each other and of other settings."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import Layout, RunnerConfig
from danling_conf.schema.parallel import TENSOR_STYLES
from danling_conf.schema.torch_options import nearest
from danling_conf.topology.layout import fill, layout_of, mesh_axes
from danling_conf.topology.rules.rule import Context
from danling_conf.topology.rules.world import known_layout
from danling_conf.topology.violation import Violation


def experts_borrow(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Expert degrees borrow ranks from shard x context x tensor, as in torchtitan and Megatron.

    They take complete groups of ranks that share sequences, so that each token has exactly one route to its expert.
    """
    layout = _filled(config, context)
    if layout is None or layout.expert * layout.expert_tensor == 1:
        return
    borrowed, wanted = layout.shard * layout.context * layout.tensor, layout.expert * layout.expert_tensor
    if borrowed % wanted:
        yield Violation(
            "parallel.axes.expert",
            layout.expert,
            f"expert x expert_tensor = {wanted} must divide shard x context x tensor = {borrowed}",
            f"choose a divisor of {borrowed}",
        )
    if layout.expert_tensor not in (1, layout.tensor):
        yield Violation(
            "parallel.axes.expert_tensor",
            layout.expert_tensor,
            f"it is 1 or the tensor degree, {layout.tensor}",
            f"parallel.axes.expert_tensor={layout.tensor}",
        )
        return
    shared = layout.context if layout.expert_tensor > 1 else layout.context * layout.tensor
    if layout.expert % shared:
        what = "context" if layout.expert_tensor > 1 or layout.tensor == 1 else "context x tensor"
        yield Violation(
            "parallel.axes.expert",
            layout.expert,
            f"with expert_tensor={layout.expert_tensor} it is a multiple of {what}, {shared}",
            f"parallel.axes.expert={shared}",
        )


def known_styles(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Every style of a tensor plan is known."""
    for name, style in (config.parallel.tensor_plan or {}).items():
        if style not in TENSOR_STYLES:
            yield Violation(
                f"parallel.tensor_plan.{name}", style, "there is no such style", nearest(str(style), TENSOR_STYLES)
            )


def ring_on_cuda(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """torch's ring attention has no CPU version."""
    if config.parallel.axes.context > 1 and config.parallel.context_method == "ring" and context.on_cpu(config):
        yield Violation(
            "parallel.context_method",
            "ring",
            "torch's ring attention needs CUDA, and ranks run on the CPU here",
            "parallel.context_method=gather, or ulysses",
        )


def selection_with_gather(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """On an accelerator, attention to gathered keys has a mask that cannot be built inside selective checkpointing."""
    gathers = config.parallel.axes.context > 1 and config.parallel.context_method == "gather"
    if gathers and config.activation_checkpointing.mode == "selective" and not context.on_cpu(config):
        yield Violation(
            "activation_checkpointing.mode",
            "selective",
            "torch's causal mask of parts of sequences (context_method=gather) does not go with selected operators",
            "activation_checkpointing.mode=full, or parallel.context_method=ulysses",
        )


def mesh_for_axes(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Without a device mesh there is only the default process group, which is enough to replicate."""
    axes = [axis for axis in mesh_axes(_degrees(config)) if axis != "replicate"]
    if not config.parallel.use_device_mesh and axes:
        yield Violation(
            "parallel.use_device_mesh",
            False,
            f"{' and '.join(axes)} need a device mesh; the default process group is enough for DDP only",
            "parallel.use_device_mesh=true, or parallel=ddpN",
        )


def whole_graphs(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """How many rows go to which expert is known in the middle of a block, outside of compiled code."""
    axes = config.parallel.axes
    if config.compile.enable and config.compile.fullgraph and axes.expert * axes.expert_tensor > 1:
        yield Violation(
            "compile.fullgraph",
            True,
            "the exchange of tokens between experts breaks the graph of each block",
            "compile.fullgraph=null",
        )


def whole_statistics(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Sums over the ranks inside of batch normalisation are outside of compiled code."""
    if config.compile.enable and config.compile.fullgraph and config.parallel.sync_batch_norm:
        yield Violation(
            "compile.fullgraph",
            True,
            "synchronised batch normalisation breaks the graph of each block",
            "compile.fullgraph=null",
        )


def _degrees(config: RunnerConfig) -> Layout:
    return layout_of(config)


def _filled(config: RunnerConfig, context: Context) -> Layout | None:
    layout = known_layout(config)
    if layout is None:
        return None
    try:
        return fill(layout, context.machine.fill_world_size)
    except ValueError:
        return None  # reported by `world_size`
