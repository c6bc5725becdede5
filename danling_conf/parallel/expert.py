"""Expert parallelism: the experts of a mixture dealt out to ranks, tokens sent to them and back; each expert's width
shared out over the tensor ranks where the layout says so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from danling_conf._torch_private import all_to_all
from danling_conf.parallel.plan import matches, owner, plan_of
from danling_conf.schema.layout import Layout

GROUPED = "grouped_experts"
"""Style of a module whose forward takes rows (rows, width) sorted by expert, and how many of them each expert has
(experts,), and gives (rows, width); its parameters have a first dim for the experts."""

_WIDTH = {"colwise": 1, "rowwise": 2}
"""Styles of its parameters: the dim along which expert-tensor ranks share them."""

ROUTER = "router"
"""Style of a module with a buffer `load`: how many rows each expert was sent in the last forward pass (experts,)."""


def parallelize(model: nn.Module, layout: Layout, mesh: DeviceMesh, tensor: DeviceMesh | None) -> list[str]:
    """Deal the experts of `model` out over the expert axes of `mesh` (`build.mesh.make_expert`), in place; gives the
    names of the modules that hold them.

    The plan is the model's `ep_plan`: names to `grouped_experts`, `router`, and for parameters `colwise` or `rowwise`.
    `tensor` is the tensor axis: with expert_tensor 1, its ranks, which have the same tokens, take a share of them each.

    Raises ValueError for numbers that the degrees do not divide. See `check`.
    """
    plan = plan_of(model, "ep_plan") or {}
    found = list(matches(model, plan))
    names = [name for name, style, is_parameter in found if style == GROUPED and not is_parameter]
    styles = {name: style for name, style, is_parameter in found if is_parameter}
    for name in names:
        experts = model.get_submodule(name)
        for last, parameter in list(experts.named_parameters()):
            _shard(model, f"{name}.{last}", parameter, styles.get(f"{name}.{last}"), layout, mesh)
        split = tensor is not None and layout.expert_tensor == 1 and layout.expert > 1
        experts._exchange = Exchange(layout, mesh, tensor if split else None)  # type: ignore[assignment]
        experts.forward = MethodType(_forward, experts)
    return names


def check(model: nn.Module, layout: Layout) -> None:
    """Refuse a whole model without experts that its `ep_plan` names. Raises ValueError."""
    plan = {name: style for name, style in (plan_of(model, "ep_plan") or {}).items() if style == GROUPED}
    if next(matches(model, plan), None) is None:
        axis = "expert" if layout.expert > 1 else "expert_tensor"
        raise ValueError(
            f"parallel.axes.{axis}={getattr(layout, axis)}: nothing lays {type(model).__name__} out over the {axis} "
            f"axis: give the model experts and an ep_plan (their names to {GROUPED}), or set the degree to 1"
        )


def busiest(parts: Sequence[nn.Module], batch: DeviceMesh | None, device: torch.device) -> float | None:
    """How many times the mean the busiest expert was sent in the last forward pass, as a mean over layers: 1 is even.
    None for a model without routers in its `ep_plan`. Collective over all ranks; waits for the device.

    `batch` is the ranks with tokens of their own (`build.mesh.batch_mesh`).
    """
    loads: list[Tensor] = []
    for part in parts:
        plan = {name: style for name, style in (plan_of(part, "ep_plan") or {}).items() if style == ROUTER}
        found = (part.get_submodule(name) for name, _, is_parameter in matches(part, plan) if not is_parameter)
        loads += [cast(Tensor, router.load).double() for router in found if hasattr(router, "load")]
    if not any(ROUTER in (plan_of(part, "ep_plan") or {}).values() for part in parts):
        return None
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if loads:
        counts = torch.stack(loads)
        if batch is not None:
            dist.all_reduce(counts, group=batch.get_group())
        sums = torch.stack([(counts.amax(1) / counts.mean(1)).sum(), counts.new_tensor(len(loads))])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)  # other stages of a pipeline have other layers
    total, layers = sums.tolist()
    return total / layers if layers else None


class Exchange:
    """The way of tokens to their experts and back. Each rank holds `experts / expert` of the experts.

    Args:
        layout: its degrees.
        mesh: the mesh of the experts.
        split: the tensor axis, where its ranks share out the tokens that they all have.
    """

    def __init__(self, layout: Layout, mesh: DeviceMesh, split: DeviceMesh | None) -> None:
        self.group, self.degree = mesh["expert"].get_group(), layout.expert
        self.width = mesh["expert_tensor"].get_group() if layout.expert_tensor > 1 else None
        self.split = None if split is None else split.get_group()
        # Ranks with other tokens add up in an expert's gradient, here or in FSDP's reduction over expert_shard, which
        # divides by its own degree; the loss is a mean over shard x context (and replicate, which is divided by too).
        self.scale = layout_share(layout)

    @torch.compiler.disable  # how many rows go where is known on the device only
    def __call__(self, compute: Any, rows: Tensor, counts: Tensor) -> Tensor:
        """`compute(rows, counts)` for all experts, on whatever ranks they are."""
        if self.split is None:
            return self._everywhere(compute, rows, counts)
        # All tensor ranks have these rows. Each takes its share, and the outputs are put together by a sum.
        rank, degree = dist.get_rank(self.split), dist.get_world_size(self.split)
        start, end = len(rows) * rank // degree, len(rows) * (rank + 1) // degree
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).clamp(start, end)
        share = _SumOfGradients.apply(rows, self.split)[start:end]
        outputs = self._everywhere(compute, share, bounds.diff())
        filled = torch.zeros_like(rows, dtype=outputs.dtype)
        filled[start:end] = outputs
        return _Sum.apply(filled, self.split)

    def _everywhere(self, compute: Any, rows: Tensor, counts: Tensor) -> Tensor:
        rows = _Scale.apply(rows, 1 / self.scale)
        if self.degree == 1:
            return _Scale.apply(self._widths(compute, rows, counts), self.scale)
        received = all_to_all(counts, [len(counts) // self.degree] * self.degree,
                              [len(counts) // self.degree] * self.degree, self.group)  # fmt: skip
        by_rank = received.view(self.degree, -1)
        sent_sizes, received_sizes = torch.stack([counts.view(self.degree, -1).sum(1), by_rank.sum(1)]).tolist()
        rows = all_to_all(rows, received_sizes, sent_sizes, self.group)
        # From order of rank, then expert, to order of expert.
        experts = torch.arange(by_rank.shape[1], device=rows.device).repeat(self.degree)
        order = experts.repeat_interleave(received, output_size=len(rows)).argsort(stable=True)
        outputs = self._widths(compute, rows[order], by_rank.sum(0))
        outputs = torch.empty_like(outputs).index_copy(0, order, outputs)
        return _Scale.apply(all_to_all(outputs, sent_sizes, received_sizes, self.group), self.scale)

    def _widths(self, compute: Any, rows: Tensor, counts: Tensor) -> Tensor:
        if self.width is None:
            return compute(rows, counts)
        # Expert-tensor ranks have the same rows and a part of each expert's width.
        return _Sum.apply(compute(_SumOfGradients.apply(rows, self.width), counts), self.width)


def layout_share(layout: Layout) -> float:
    """Factor of an expert's gradient between a sum over the ranks that its tokens come from and a mean over all of
    shard x context, where expert_shard is averaged over by FSDP."""
    expert_shard = layout.shard * layout.context * layout.tensor // (layout.expert * layout.expert_tensor)
    return expert_shard / (layout.shard * layout.context)


def _shard(
    model: nn.Module, name: str, parameter: nn.Parameter, style: str | None, layout: Layout, mesh: DeviceMesh
) -> None:
    if parameter.shape[0] % layout.expert:
        raise ValueError(
            f"parallel.axes.expert={layout.expert}: must divide the {parameter.shape[0]} experts of {name}: choose a "
            f"divisor, or another number of experts"
        )
    placements = [Shard(0)]
    if layout.expert_tensor > 1:
        if style not in _WIDTH:
            raise ValueError(
                f"parallel.axes.expert_tensor={layout.expert_tensor}: the ep_plan of {type(model).__name__} does not "
                f"say how {name} is shared out: give it colwise or rowwise, or set the degree to 1"
            )
        dim = _WIDTH[style]
        if parameter.shape[dim] % layout.expert_tensor:
            raise ValueError(
                f"parallel.axes.expert_tensor={layout.expert_tensor}: must divide the width {parameter.shape[dim]} of "
                f"{name}: choose a divisor, or another width"
            )
        placements.append(Shard(dim))
        axes = mesh["expert", "expert_tensor"]
    else:
        axes = mesh["expert"]
    module, last = owner(model, name)
    # Every rank has the whole value, or nobody has (on the meta device): none sends.
    part = distribute_tensor(parameter.detach(), axes, placements, src_data_rank=None)
    setattr(module, last, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _forward(self: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    return self._exchange(partial(type(self).forward, self), rows, counts)  # type: ignore[operator]


class _Scale(torch.autograd.Function):
    """The same forwards; gradients are multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _SumOfGradients(torch.autograd.Function):
    """The same forwards; gradients are summed over a group whose ranks each use the tensor in their own way."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Sum(torch.autograd.Function):
    """Summed over a group whose ranks all go on with the sum; gradients are the same."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
