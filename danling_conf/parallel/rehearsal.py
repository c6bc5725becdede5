"""Rehearsal: a small cut of the model, laid out over the tensor and context axes, against the same cut in one piece.

A plan that cuts heads in the wrong place (a fused `qkv` as `colwise`), leaves out the sum of a norm's gradients, or a
forward that mixes tokens outside of attention computes something else, with shapes that fit and a loss that falls.
Values show it: those of a few tokens through one block of each kind, before the model has its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.random import fork_rng

from danling_conf.components.batch import map_tensors, tensors, to_device
from danling_conf.parallel import inside_step, trial
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.context import ContextParallel, sequence_length
from danling_conf.parallel.init_plan import deep_copy, named_tensors, seeded
from danling_conf.parallel.plan import matches, plan_of
from danling_conf.parallel.process_group import gathered
from danling_conf.topology.violation import SettingError

_log = logging.getLogger(__name__)

Forward = Callable[[Any, Any], Any]
Loss = Callable[[Any, Any], Any]

TOLERANCE = 1e-3
"""Largest relative difference, in float32: orders of sums differ by a thousandth of it, wrong plans by much more."""

_FLOOR = 1e-2
"""Of the norm of all gradients: a smaller gradient is compared with this share of it. Some are 0 but for rounding."""

_SMALL, _SAMPLES, _TOKENS, _SEED = 64 << 20, 2, 128, 0
"""Bytes of a model that is tried whole; samples and tokens that it is tried on; seed of values and draws."""

_ON_CPU = 2 << 30
"""Bytes of parameters that are tried in the host's memory, by each of its ranks."""

_SHOWN = 4
"""Entries of a plan in a refusal."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is rehearsed.

    Attributes:
        apply: lays a whole model out over the axes, in place.
        plan: of the tensor axis, which a refusal names; None where the model lays itself out.
        path, value: of the setting that asks for it.
        lengths: what a sequence must be a multiple of.
        context: the context axis; None without.
        device: of this rank.
    """

    apply: Callable[[nn.Module], None]
    plan: Mapping[str, str] | None
    path: str
    value: object
    lengths: int
    context: ContextParallel | None
    device: torch.device


def rehearse(model: nn.Module, layout: Layout, forward: Forward, batch: Any, loss: Loss | None = None) -> None:
    """Refuse a layout in which a cut of the model, or its loss, gives something else than in one piece. Collective.

    The cut has values of its own, since a model's first ones hide faults where they are 0, and does not drop out. Where
    it cannot be tried (it is too large, or does not run in fp32 on a batch of few tokens), a warning says so.

    Args:
        model: the whole model before anything is done to it; on the meta device or with values, which stay.
        forward: runs it on the batch.
        loss: of its output and the batch; looked at over the context axis, where it is that of parts of sequences.

    Raises:
        SettingError: on all ranks alike; on one alone where the model fails there inside of a forward or backward pass,
            in which the others may wait for it: the launcher stops them.
    """
    found = trial.together(lambda: _reference(model, layout, forward, batch))
    reason = _first_of_ranks(found if isinstance(found, str) else None)
    if isinstance(found, str) or reason is not None:
        _log.warning("%s was not tried against one process before training: %s", layout.path, reason)
        return
    _compare(found, layout, forward, loss)


class _Skipped(nn.Module):
    """Stands for a block like one that is kept: returns what that one did, with its own first input in front."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        output = self.seen.output
        return first if isinstance(output, Tensor) else type(output)((first, *output[1:]))


class _Seen:
    """A hook that keeps the last output of a block. An object, so that a copy of the model has a copy of it."""

    output: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output


@dataclass
class _Passed:
    """A forward pass.

    Attributes:
        outputs: the tensors of floats that it returned.
        output: what it returned.
        of_modules: by name, the output of each module that returned a tensor, in the order of their ends.
    """

    outputs: list[Tensor]
    output: Any = None
    of_modules: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Cut:
    """A cut of the model in one piece, and the same with the same values that is to be laid out."""

    model: nn.Module
    laid_out: nn.Module
    batch: Any
    passed: _Passed
    again: Callable[[], nn.Module]
    """Makes it once more."""
    blocks: list[str]
    """Names of the blocks of the whole model, of which a cut does not show that they repeat."""


def _reference(model: nn.Module, layout: Layout, forward: Forward, batch: Any) -> _Cut | str:
    """The cut in one piece, after a forward pass; else why there is none."""
    kind, room = type(model).__name__, _room(layout.device)
    nothing: dict[str, str] = {}
    blocks = [name for name, _ in repeated_blocks(model)]
    choices = [nothing] if _bytes(model, nothing) <= _SMALL else [_like_others(model, layout.plan or {}), nothing]
    reason = ""
    for skipped in choices:
        if (size := _bytes(model, skipped)) > room:
            reason = reason or f"{size >> 20} MiB of parameters are too many to try"
            continue
        for whole in (False, True):
            try:
                given = map_tensors(_widened, batch)
                given = to_device(given if whole else _few(given, layout.lengths), layout.device)
                made = _with_values(model, skipped, layout.device)
                laid_out = deep_copy(made)
                passed = _pass(made, forward, given)
            except Exception as error:  # of the user's model, which may ask for other inputs or other modules
                reason = f"{kind} does not run in fp32 on a part of a batch ({type(error).__name__}: {error})"
                continue
            if not passed.outputs or not all(bool(item.isfinite().all()) for item in passed.outputs):
                reason = f"{kind} returns no finite numbers for random weights"
                continue
            return _Cut(made, laid_out, given, passed, partial(_with_values, model, skipped, layout.device), blocks)
    return " ".join(reason.split())


def _compare(cut: _Cut, layout: Layout, forward: Forward, loss: Loss | None) -> None:
    context, length = layout.context, sequence_length(cut.batch)
    trial.together(lambda: layout.apply(cut.laid_out))
    batch = cut.batch if context is None else context.part(cut.batch)
    try:
        with nullcontext() if context is None else inside_step.step(sharded_logits=False):
            found = _pass(cut.laid_out, forward, batch)
    except SettingError:
        raise
    except Exception as error:  # of the user's model, whose shapes may not fit any more
        raise _refused(cut, layout, None, f"fails ({type(error).__name__}: {' '.join(str(error).split())})") from error

    def part(item: Tensor) -> Tensor:
        """Of a whole tensor, what this rank computes."""
        return context.part(item) if context is not None and _has_sequence(item, length) else item

    wanted = cut.passed.outputs
    same = [index for index, mine in enumerate(found.outputs) if mine.shape == part(wanted[index]).shape]
    shape: str | None = None
    if not same:
        shapes = [" and ".join(str(tuple(item.shape)) for item in items) for items in (found.outputs, wanted)]
        shape = f"returns the shape {shapes[0]} in place of {shapes[1]}"
    # Ranks agree before the next pass: one that refused alone would leave the others waiting in its collectives.
    if (shape := _first_of_ranks(shape)) is not None:
        raise _refused(cut, layout, None, shape)
    if context is not None and len(same) > 1:
        # Such as a loss beside the outputs that it is made of: of a part of the tokens.
        same = [index for index in same if wanted[index].ndim]
    differing: tuple[str | None, str] | None = None
    for index in same:
        mine, theirs = found.outputs[index].detach(), part(wanted[index]).detach()
        if context is not None and not mine.ndim:
            mine = _sum(mine, context) / context.degree
        if differing is None and _differ(mine, theirs, theirs.norm()):
            differing = _first_difference(found, cut.passed, part)
    if (differing := _first_of_ranks(differing)) is not None:
        _refuse_unless_it_draws(cut, layout, forward, differing)
        return
    if context is not None:
        _refuse_attention_in_training(cut, context, forward)
        if loss is not None:
            _refuse_loss(cut.passed, cut.batch, found, batch, loss, context)
    generator = torch.Generator(layout.device).manual_seed(_SEED)
    weights = [torch.randn(item.shape, generator=generator, device=item.device) for item in wanted]
    _backward(wanted[index] * weights[index] for index in same)
    shares = [1.0 if context is None or _has_sequence(item, length) else 1 / context.degree for item in wanted]
    _backward(found.outputs[index] * part(weights[index]) * shares[index] for index in same)
    if (name := _first_of_ranks(_differing_gradient(cut, context))) is not None:
        _refuse_unless_it_draws(cut, layout, forward, (name, f"gives {name} another gradient"))


Found = TypeVar("Found")


def _first_of_ranks(found: Found | None) -> Found | None:
    """What the first rank found that found something. Collective."""
    return next((item for item in gathered(found) if item is not None), None)


def _backward(terms: Iterable[Tensor]) -> None:
    total = torch.stack([term.float().sum() for term in terms]).sum()
    if total.requires_grad:
        total.backward()


def _differing_gradient(cut: _Cut, context: ContextParallel | None) -> str | None:
    """The name of a parameter whose gradient is not that of the cut in one piece. Collective."""
    expected = {name: item.grad for name, item in cut.model.named_parameters() if item.grad is not None}
    if not expected:
        return None
    floor = _FLOOR * torch.stack([item.norm() for item in expected.values()]).norm()
    differing = None
    for name, parameter in cut.laid_out.named_parameters():
        mine, theirs = parameter.grad, expected.get(name)
        if theirs is None:
            continue
        mine = torch.zeros_like(theirs) if mine is None else _full(mine)
        if context is not None:
            mine = _sum(mine, context)
        if differing is None and mine.shape == theirs.shape and _differ(mine, theirs, floor):
            differing = name
    return differing


def _refuse_attention_in_training(cut: _Cut, context: ContextParallel, forward: Forward) -> None:
    """Refuse attention that is replaced over the context axis, and that drops something out. Collective."""
    names = [name for name, _, _ in matches(cut.model, plan_of(cut.model, "cp_plan") or {})]
    if not names:
        return
    found = _pass(cut.again(), forward, cut.batch, training=names).outputs
    differs = any(
        _differ(mine.detach(), theirs.detach(), theirs.detach().norm())
        for mine, theirs in zip(found, cut.passed.outputs, strict=True)
    )
    if any(gathered(differs)):
        raise SettingError(
            "parallel.axes.context",
            context.degree,
            f"{names[0]} of {type(cut.model).__name__} computes something else in training than in evaluation, as "
            f"dropout does, and context parallelism does not",
            "switch it off, or set the degree to 1",
        )


def _refuse_loss(
    whole: _Passed, batch: Any, found: _Passed, part_of_batch: Any, loss: Loss, context: ContextParallel
) -> None:
    """Refuse a loss whose gradients by the outputs, of the parts of sequences together, are not those of whole ones: it
    shifts labels, weighs tokens by their place, or is a mean of unequally many. Collective."""
    length = sequence_length(batch)
    first, again = (_gradients_of_loss(loss, whole, batch, seed) for seed in (_SEED, _SEED + 1))
    mine = _gradients_of_loss(loss, found, part_of_batch, _SEED)
    finite = first is not None and all(bool(item.isfinite().all()) for item in first[0])
    if not all(gathered(finite and again is not None and mine is not None)) or not (first and again and mine):
        return
    (gradients, count), (parts, own_count) = first, mine
    counted = None if count is None or own_count is None else _sum(own_count, context).clamp(min=1)
    differs = draws = False
    for own, theirs, other in zip(parts, gradients, again[0], strict=True):
        own = own / (context.degree if counted is None else counted)
        theirs, other = (item if count is None else item / count.clamp(min=1) for item in (theirs, other))
        draws = draws or _differ(other, theirs, theirs.norm())
        if _has_sequence(theirs, length):
            theirs = context.part(theirs)
        else:
            own = _sum(own, context)
        differs = differs or own.shape != theirs.shape or _differ(own, theirs, theirs.norm())
    if any(gathered(differs and not draws)):
        raise SettingError(
            "parallel.axes.context",
            context.degree,
            "the loss over the parts of a sequence, one on each rank, is not that over the whole",
            "shift labels in the data, and where tokens are left out, return the pair of a sum and its count; or set "
            "the degree to 1",
        )


def _gradients_of_loss(loss: Loss, passed: _Passed, batch: Any, seed: int) -> tuple[list[Tensor], Tensor | None] | None:
    """Gradients of a loss by the outputs, and its count where it returns one; None where there are none to compare:
    what a loss may not be is refused at the first step."""
    outputs = [item for item in tensors(passed.output) if item.is_floating_point() and item.requires_grad]
    devices = [item.device for item in outputs if item.device.type == "cuda"][:1]
    try:
        with seeded(seed), fork_rng(devices), torch.enable_grad():
            torch.manual_seed(seed)
            value = loss(passed.output, batch)
        total, count = value if isinstance(value, tuple) else (value, None)
        found = torch.autograd.grad(total.sum(), outputs, retain_graph=True, allow_unused=True)
        counted = None if count is None else torch.as_tensor(count, device=total.device).sum()
    except Exception:  # of the user's loss, which may ask for the whole model's outputs
        return None
    gradients = [torch.zeros_like(item) if grad is None else grad for item, grad in zip(outputs, found, strict=True)]
    return None if any(isinstance(item, DTensor) for item in gradients) else (gradients, counted)


def _refuse_unless_it_draws(cut: _Cut, layout: Layout, forward: Forward, what: tuple[str | None, str]) -> None:
    """Refuse; but a model that draws numbers where it does not train gives others in one process as well."""
    other = _pass(cut.again(), forward, cut.batch, seed=_SEED + 1).outputs
    draws = any(
        mine.shape != theirs.shape or _differ(mine.detach(), theirs.detach(), theirs.detach().norm())
        for mine, theirs in zip(other, cut.passed.outputs, strict=False)
    )
    if not any(gathered(draws)):
        raise _refused(cut, layout, *what)
    rule = "its outputs differ from call to call"
    _log.warning("%s was not compared with one process before training: %s", layout.path, rule)


def _refused(cut: _Cut, layout: Layout, name: str | None, what: str) -> SettingError:
    plan = layout.plan or {}
    inside = next((block for block in cut.blocks if f"{name}.".startswith(f"{block}.")), name)
    entries = {
        f"{pattern}: {style}": None
        for pattern, style in plan.items()
        for found, _, _ in matches(cut.model, {pattern: style})
        if inside is None or found == inside or found.startswith(f"{inside}.")
    } or dict.fromkeys(f"{pattern}: {style}" for pattern, style in plan.items())
    shown = "; ".join([*entries][:_SHOWN]) + (f"; and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else "")
    by = f" by the plan ({shown})" if plan else ""
    fix = "set the degree to 1"
    if plan:
        fix = (
            "let each rank have whole heads (a fused layer split up), and sum gradients of what stays whole between "
            "sharded layers (replicated_with_grad_allreduce); or set the degree to 1"
        )
    elif layout.context is not None:
        fix = "let tokens meet in the attention of the cp_plan alone, or set the degree to 1"
    rule = f"{type(cut.model).__name__} laid out{by} {what}, and one process does not"
    return SettingError(layout.path, layout.value, rule, fix)


def _first_difference(found: _Passed, expected: _Passed, part: Callable[[Tensor], Tensor]) -> tuple[str | None, str]:
    """The first module whose output differs, of those that are not sharded; else the model."""
    for name, mine in found.of_modules.items():
        theirs = expected.of_modules.get(name)
        if name and theirs is not None and mine.shape == part(theirs).shape:
            theirs = part(theirs)
            if _differ(mine, theirs, theirs.norm()):
                return name, f"computes something else in {name}"
    return None, "returns something else"


def _pass(model: nn.Module, forward: Forward, batch: Any, seed: int = _SEED, training: Iterable[str] = ()) -> _Passed:
    """Forward in evaluation, which drops nothing out; but in training of the modules named."""
    found = _Passed([])
    handles = [
        module.register_forward_hook(partial(_keep, name, found.of_modules)) for name, module in model.named_modules()
    ]
    device = next((item.device for item in model.parameters()), torch.device("cpu"))
    precise = torch.get_float32_matmul_precision()
    model.eval()
    for name in training:
        model.get_submodule(name).train()
    try:
        torch.set_float32_matmul_precision("highest")
        with seeded(seed), fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            torch.manual_seed(seed)
            output = forward(model, batch)
    finally:
        torch.set_float32_matmul_precision(precise)
        for handle in handles:
            handle.remove()
    found.output = output
    found.outputs = [_full(item) for item in tensors(output) if item.is_floating_point()]
    return found


def _keep(name: str, of_modules: dict[str, Tensor], module: nn.Module, args: Any, output: Any) -> None:
    first = next(tensors(output), None)
    if first is not None and not isinstance(first, DTensor) and first.is_floating_point():
        of_modules.setdefault(name, first.detach())


def _with_values(model: nn.Module, skipped: Mapping[str, str], device: torch.device) -> nn.Module:
    """A copy with random parameters and buffers, the same on all ranks, without the blocks that others stand for."""
    generator = torch.Generator(device).manual_seed(_SEED)
    seen = {kept: _Seen() for kept in skipped.values()}
    memo: dict[int, Any] = {id(model.get_submodule(name)): _Skipped(seen[kept]) for name, kept in skipped.items()}
    for name, tensor in named_tensors(model):
        if id(tensor) in memo or any(name.startswith(f"{block}.") for block in skipped):
            continue
        made: Tensor = _value(name, tensor, device, generator)
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = made
    copied = deep_copy(model, memo)
    for kept, hook in seen.items():
        copied.get_submodule(kept).register_forward_hook(hook)
    return copied


def _value(name: str, tensor: Tensor, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random values of a usual size: 1 for what scales, and no 0, behind which a fault would not show."""
    if tensor.device.type != "meta" and not isinstance(tensor, nn.Parameter):
        return _widened(tensor).to(device, copy=True)  # an index or a mask is none at random
    if not (tensor.is_floating_point() or tensor.is_complex()):
        if tensor.dtype == torch.bool:
            return torch.ones(tensor.shape, dtype=tensor.dtype, device=device)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    dtype = _WIDE.get(tensor.dtype, tensor.dtype)
    made = torch.randn(tensor.shape, dtype=dtype, device=device, generator=generator)
    if tensor.ndim < 2:
        return made * 0.1 + (0 if name.endswith("bias") else 1)
    fan_in = max(tensor.shape[1:]) if tensor.ndim == 3 else tensor.numel() // max(tensor.shape[0], 1)
    return made / max(fan_in, 1) ** 0.5


_WIDE = {torch.float16: torch.float32, torch.bfloat16: torch.float32}


def _widened(item: Tensor) -> Tensor:
    return item.detach().to(_WIDE.get(item.dtype, item.dtype))


def _few(batch: Any, multiple: int) -> Any:
    """A few samples of a batch, and of each a few tokens."""
    samples = next((len(item) for item in tensors(batch) if item.ndim), 0)
    length = sequence_length(batch)
    tokens = max(_TOKENS // multiple, 1) * multiple

    def few(item: Tensor) -> Tensor:
        item = item[:_SAMPLES] if item.ndim and len(item) == samples else item
        return item[:, :tokens] if _has_sequence(item, length) else item

    return map_tensors(few, batch)


def _has_sequence(item: Tensor, length: int | None) -> bool:
    return item.ndim > 1 and item.shape[1] == length


def _like_others(model: nn.Module, plan: Mapping[str, str]) -> dict[str, str]:
    """Names of the blocks that are like an earlier one in one container, and of that one."""
    styles = [(name, style) for name, style, _ in matches(model, plan)]
    first: dict[Any, str] = {}
    found: dict[str, str] = {}
    for name, block in repeated_blocks(model):
        shapes = tuple((inner, item.shape, item.dtype) for inner, item in named_tensors(block))
        own = tuple((other[len(name) :], style) for other, style in styles if other.startswith(f"{name}."))
        kept = first.setdefault((name.rpartition(".")[0], type(block), shapes, own), name)
        if kept != name:
            found[name] = kept
    return found


def _bytes(model: nn.Module, skipped: Mapping[str, str]) -> int:
    """Of the parameters of a cut, in fp32."""
    left_out = {id(item) for name in skipped for item in model.get_submodule(name).parameters()}
    return sum(4 * item.numel() for item in model.parameters() if id(item) not in left_out)


def _room(device: torch.device) -> int:
    """Bytes of parameters that can be tried: twice with their gradients, and something to compute in."""
    return torch.cuda.mem_get_info(device)[0] // 6 if device.type == "cuda" else _ON_CPU


def _differ(mine: Tensor, theirs: Tensor, size: Tensor) -> bool:
    """Whether a tensor is another one, relative to its norm or to a size where that is larger."""
    return not bool((mine - theirs).norm() <= TOLERANCE * torch.maximum(theirs.norm(), size) + 1e-12)


def _full(item: Tensor) -> Tensor:
    return item.full_tensor() if isinstance(item, DTensor) else item


def _sum(item: Tensor, context: ContextParallel) -> Tensor:
    total = item.detach().clone()
    dist.all_reduce(total, group=context.mesh.get_group())
    return total
