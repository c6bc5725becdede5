"""Expert parallelism: each rank holds some experts of a mixture, and tokens travel to them and back.

With expert_tensor, the width of each expert is sharded over the tensor ranks as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from danling_conf._torch_private.distributed import all_to_all
from danling_conf._torch_private.fakes import is_fake
from danling_conf.parallel.plan import matches, owner, plan_of
from danling_conf.parallel.process_group import is_distributed
from danling_conf.schema.layout import Layout
from danling_conf.topology.violation import SettingError, Violation, refuse

GROUPED = "grouped_experts"
"""Style of a module whose forward takes rows (rows, width) sorted by expert, and how many of them each expert has
(experts,), and returns (rows, width); its parameters have a first dim for the experts."""

_WIDTH = {"colwise": 1, "rowwise": 2}
"""Styles of its parameters: the dim along which expert-tensor ranks share them."""

ROUTER = "router"
"""Style of a module with a buffer `load`: how many rows each expert was sent in the last forward pass (experts,)."""


def parallelize(model: nn.Module, layout: Layout, mesh: DeviceMesh, tensor: DeviceMesh | None) -> list[str]:
    """Shard the experts of `model` over the expert axes, in place. Returns the names of the modules that hold them.

    The plan is the model's `ep_plan`: names to `grouped_experts`, `router`, and for parameters `colwise` or `rowwise`.

    Args:
        mesh: the mesh of the experts (`parallel.mesh.make_expert`).
        tensor: the tensor axis. With expert_tensor 1, its ranks, which have the same tokens, take a share of them each.

    Raises:
        SettingError: a degree does not divide a number of the model; ConfigRefused where several are wrong.
    """
    plan = plan_of(model, "ep_plan") or {}
    found = list(matches(model, plan))
    names = [name for name, style, is_parameter in found if style == GROUPED and not is_parameter]
    styles = {name: style for name, style, is_parameter in found if is_parameter}
    refuse(_unfit(model, names, styles, layout))
    for name in names:
        experts = model.get_submodule(name)
        for last, parameter in list(experts.named_parameters()):
            _shard(model, f"{name}.{last}", parameter, styles.get(f"{name}.{last}"), layout, mesh)
        split = tensor is not None and layout.expert_tensor == 1 and layout.expert > 1
        experts._exchange = Exchange(layout, mesh, tensor if split else None)  # type: ignore[assignment]
        experts.forward = MethodType(_forward, experts)
    return names


def check(model: nn.Module, layout: Layout) -> None:
    """Refuse a whole model without experts that its `ep_plan` names. Raises SettingError."""
    plan = {name: style for name, style in (plan_of(model, "ep_plan") or {}).items() if style == GROUPED}
    if next(matches(model, plan), None) is None:
        axis = "expert" if layout.expert > 1 else "expert_tensor"
        raise SettingError(
            f"parallel.axes.{axis}",
            getattr(layout, axis),
            f"nothing lays {type(model).__name__} out over the {axis} axis",
            f"give the model experts and an ep_plan (their names to {GROUPED}), or set the degree to 1",
        )


def busiest(parts: Sequence[nn.Module], batch: DeviceMesh | None, device: torch.device) -> float | None:
    """Load of the busiest expert relative to the mean load in the last forward pass, averaged over layers: 1 is even.
    None for a model without routers in its `ep_plan`. Collective over all ranks; waits for the device.

    `batch` is the ranks with tokens of their own (`parallel.mesh.batch_mesh`).
    """
    if not any(ROUTER in (plan_of(part, "ep_plan") or {}).values() for part in parts):
        return None
    loads = [load for part in parts for load in _loads(part)]
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    if loads:
        counts = torch.stack(loads)
        if batch is not None:
            dist.all_reduce(counts, group=batch.get_group())
        sums = torch.stack([(counts.amax(1) / counts.mean(1)).sum(), counts.new_tensor(len(loads))])
    if is_distributed():
        dist.all_reduce(sums)  # other stages of a pipeline have other layers
    total, layers = sums.tolist()
    return total / layers if layers else None


def _loads(part: nn.Module) -> Iterator[Tensor]:
    """How many rows each router of a part sent to each expert."""
    plan = {name: style for name, style in (plan_of(part, "ep_plan") or {}).items() if style == ROUTER}
    for name, _, is_parameter in matches(part, plan):
        load = None if is_parameter else getattr(part.get_submodule(name), "load", None)
        if load is not None:
            yield cast(Tensor, load).double()


class Exchange:
    """Sends tokens to their experts and their outputs back. Each rank holds `experts / expert` of the experts.

    Args:
        layout: its degrees.
        mesh: the mesh of the experts.
        split: the tensor axis, where each of its ranks takes a share of the tokens that they all have.
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
        per_rank = [len(counts) // self.degree] * self.degree
        received = all_to_all(counts, per_rank, per_rank, self.group)
        by_rank = received.view(self.degree, -1)
        if is_fake(counts):
            sent_sizes, received_sizes = _planned_sizes(len(rows), self.degree)
        else:
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


_load = [1.0]
"""Of a plan: what this rank's experts are sent, relative to the mean."""


@contextmanager
def planned_load(load: float) -> Iterator[None]:
    """Within it, a plan's ranks are sent so many times the mean of the tokens; else just the mean."""
    _load.append(load)
    try:
        yield
    finally:
        _load.pop()


def _planned_sizes(rows: int, degree: int) -> tuple[list[int], list[int]]:
    """Rows that are sent to each rank, and received of each, where a router's choices are not known."""
    sent = [rows * (rank + 1) // degree - rows * rank // degree for rank in range(degree)]
    return sent, [round(size * _load[-1]) for size in sent]


def layout_share(layout: Layout) -> float:
    """Factor of an expert's gradient between a sum over the ranks that its tokens come from and a mean over all of
    shard x context, where expert_shard is averaged over by FSDP."""
    expert_shard = layout.shard * layout.context * layout.tensor // (layout.expert * layout.expert_tensor)
    return expert_shard / (layout.shard * layout.context)


def _unfit(model: nn.Module, names: Sequence[str], styles: Mapping[str, str], layout: Layout) -> Iterator[Violation]:
    """What keeps the modules of experts from being sharded: a violation for each reason, not for each parameter."""
    indivisible, unnamed, odd = list[str](), list[str](), list[str]()
    for name in names:
        for last, parameter in model.get_submodule(name).named_parameters():
            full, dim = f"{name}.{last}", _WIDTH.get(styles.get(f"{name}.{last}", ""))
            if parameter.shape[0] % layout.expert:
                indivisible.append(f"{parameter.shape[0]} experts of {full}")
            if layout.expert_tensor > 1 and dim is None:
                unnamed.append(full)
            elif dim is not None and parameter.shape[dim] % layout.expert_tensor:
                odd.append(f"width {parameter.shape[dim]} of {full}")
    path = "parallel.axes.expert"
    if indivisible:
        rule, fix = f"it must divide the {_listed(indivisible)}", "choose a divisor, or another number of experts"
        yield Violation(path, layout.expert, rule, fix)
    if unnamed:
        rule = f"the ep_plan of {type(model).__name__} does not say how to shard {_listed(unnamed)}"
        fix = "give these colwise or rowwise, or set the degree to 1"
        yield Violation(f"{path}_tensor", layout.expert_tensor, rule, fix)
    if odd:
        rule, fix = f"it must divide the {_listed(odd)}", "choose a divisor, or another width"
        yield Violation(f"{path}_tensor", layout.expert_tensor, rule, fix)


def _listed(items: Sequence[str]) -> str:
    """The items as part of a sentence; of many, the first ones: layers are all alike."""
    more = [f"{len(items) - 3} more"] if len(items) > 4 else []
    return " and ".join([*items[:3], *more] if more else items)


def _shard(
    model: nn.Module, name: str, parameter: nn.Parameter, style: str | None, layout: Layout, mesh: DeviceMesh
) -> None:
    placements = [Shard(0)]
    if layout.expert_tensor > 1:
        placements.append(Shard(_WIDTH[style or ""]))
        axes = mesh["expert", "expert_tensor"]
    else:
        axes = mesh["expert"]
    module, last = owner(model, name)
    # Every rank has the whole value, or none has (on the meta device), so that nothing needs to be sent.
    part = distribute_tensor(parameter.detach(), axes, placements, src_data_rank=None)
    setattr(module, last, nn.Parameter(part, requires_grad=parameter.requires_grad))


def _forward(self: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    return self._exchange(partial(type(self).forward, self), rows, counts)  # type: ignore[operator]


class _Scale(torch.autograd.Function):
    """The identity, whose gradients are multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


class _SumOfGradients(torch.autograd.Function):
    """The identity, whose gradients are summed over a group: each of its ranks uses the tensor for something else."""

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
    """The sum over a group. Its ranks all continue with the sum, so that gradients pass through unchanged."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
