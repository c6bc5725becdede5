"""Context parallelism: each sequence shared out over the ranks of the context axis, which meet in attention only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention.bias import causal_lower_right

from danling_conf._torch_private import distributed
from danling_conf.components.batch import check_walkable, map_tensors, tensors
from danling_conf.parallel import hugging_face, inside_step, trial
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.parallel.plan import matches, plan_of, unmatched
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import ABSENT, SettingError

CAUSAL = "causal_attention"
"""The style of a plan: the module's forward takes queries, keys and values of (batch, heads, sequence, features), keys
and values with as many or fewer heads, and gives causal attention of the queries' shape."""

_POSITIONS = ("positions", "position_ids")
_TOKENS, _HEADS = Shard(2), Shard(1)


class ContextParallel:
    """The part of a sequence that this rank has, and attention from it to the whole.

    With balance, a sequence is cut into 2 x degree pieces, of which rank r has those at r and 2 x degree - 1 - r: one
    early and one late, so that ranks attend to equally many tokens; else into degree pieces.

    Args:
        mesh: the context axis.
        method: `gather`, `ulysses` or `ring`, see `parallel.context_method`.
        balance: see `parallel.context_balance`.
    """

    def __init__(self, mesh: DeviceMesh, *, method: str, balance: bool) -> None:
        self.mesh, self.method = mesh, method
        self.degree, self.rank = mesh.size(), mesh.get_local_rank()
        self.pieces = 2 * self.degree if balance and method != "ulysses" else self.degree
        if method == "ring":
            if mesh.device_type != "cuda":
                raise SettingError(
                    "parallel.context_method",
                    "ring",
                    f"torch's ring attention needs CUDA, and the mesh is of {mesh.device_type}",
                    "choose gather or ulysses",
                )
            distributed.enable_ring(balance)

    def held(self, rank: int | None = None) -> tuple[int, ...]:
        """The pieces that a rank has, this one unless given, in their order."""
        rank = self.rank if rank is None else rank
        return (rank,) if self.pieces == self.degree else (rank, self.pieces - 1 - rank)

    def part(self, batch: Any) -> Any:
        """This rank's part of a batch: of each tensor with a sequence (the second dim), its pieces.

        A sequence is the second dim of the first tensor that has two; tensors whose second dim is of another length,
        and those with one dim, stay whole. Raises SettingError where it cannot be cut evenly.
        """
        check_walkable(batch, f"parallel.axes.context={self.degree}", "be cut into parts of its sequences")
        length = sequence_length(batch)
        if length is None:
            return batch
        if length % self.pieces:
            how = f"{self.pieces} pieces, two for each rank" if self.pieces > self.degree else f"{self.pieces} pieces"
            raise SettingError(
                "parallel.axes.context",
                self.degree,
                f"a sequence of {length} tokens cannot be cut into {how}",
                f"make its length a multiple of {self.pieces}",
            )
        return map_tensors(partial(self._cut, length=length), batch)

    def positions(self, length: int, device: torch.device) -> Tensor:
        """Where the tokens of this rank's part of `length` stand in the whole sequence: (length,)."""
        size = length // len(self.held())
        return torch.cat([torch.arange(piece * size, (piece + 1) * size, device=device) for piece in self.held()])

    def anywhere(self, flag: Tensor) -> Tensor:
        """Whether a flag is set on any rank of the axis. Collective."""
        flags = flag.int()
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        return flags.bool()

    def check_positions(self, given: Tensor) -> None:
        """Refuse positions (..., length) of this rank's tokens that do not go on from one token of a row to the next.
        Collective."""
        offsets = given - self.positions(given.shape[-1], given.device)
        bounds = torch.stack([offsets.amax(-1), -offsets.amin(-1)])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.mesh.get_group())
        if bool(bounds.sum(0).any()):
            raise SettingError(
                "parallel.axes.context",
                self.degree,
                "the batch has several sequences in a row (positions that begin anew), and context parallelism attends "
                "to all that came before",
                "put one sequence into each row, or set the degree to 1",
            )

    def attention(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
        """Causal attention from this rank's part to the whole: (batch, heads, part of the sequence, features); keys and
        values may have fewer heads."""
        if self.method == "ulysses":
            return self._exchanged(queries, keys, values, scale)
        if self.method == "ring":
            return self._ring(queries, keys, values, scale)
        return self._gathered(queries, keys, values, scale)

    def _gathered(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        group = self.mesh.get_group()
        keys, values = (self._ordered(distributed.all_gather(item, 2, group)) for item in (keys, values))
        keys, values = _repeated(queries, keys, values)
        size = queries.shape[2] // len(self.held())
        outputs = []
        for piece, part in zip(self.held(), queries.split(size, dim=2), strict=True):
            # Only what is not later: the rest would be computed and masked.
            end = (piece + 1) * size
            seen = keys[:, :, :end], values[:, :, :end]
            mask = _lower_right(size, end, queries.device)
            outputs.append(F.scaled_dot_product_attention(part, *seen, attn_mask=mask, scale=scale))
        return torch.cat(outputs, dim=2)

    def _ordered(self, gathered: Tensor) -> Tensor:
        """A whole sequence in its order, from the parts of all ranks one after another."""
        if self.pieces == self.degree:
            return gathered
        parts = gathered.chunk(self.pieces, dim=2)
        order = [piece for rank in range(self.degree) for piece in self.held(rank)]
        return torch.cat([parts[order.index(piece)] for piece in range(self.pieces)], dim=2)

    def _exchanged(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Each rank gets the whole sequence for its share of the heads, attends, and gives the outputs back
        (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509)."""
        if queries.shape[1] % self.degree:
            raise SettingError(
                "parallel.context_method",
                "ulysses",
                f"the context degree, {self.degree}, must divide the {queries.shape[1]} query heads of a rank",
                "choose context_method=gather, or another degree",
            )
        if keys.shape[1] % self.degree:
            keys, values = _repeated(queries, keys, values)
        queries, keys, values = (self._redistributed(item, _TOKENS, _HEADS) for item in (queries, keys, values))
        grouped = queries.shape[1] != keys.shape[1]
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        return self._redistributed(mixed, _HEADS, _TOKENS)

    def _ring(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float | None) -> Tensor:
        """Keys and values pass around the ranks (https://arxiv.org/abs/2310.01889), by torch's own implementation."""
        parts = (queries, *_repeated(queries, keys, values))
        query, key, value = (
            DTensor.from_local(item.contiguous(), self.mesh, [_TOKENS], run_check=False) for item in parts
        )
        return cast(DTensor, F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)).to_local()

    def _redistributed(self, tensor: Tensor, source: Shard, target: Shard) -> Tensor:
        whole = DTensor.from_local(tensor.contiguous(), self.mesh, [source], run_check=False)
        return whole.redistribute(placements=[target]).to_local()

    def _cut(self, item: Tensor, length: int) -> Tensor:
        if item.ndim < 2 or item.shape[1] != length:
            return item
        pieces = item.chunk(self.pieces, dim=1)
        return torch.cat([pieces[piece] for piece in self.held()], dim=1)


def make(section: ParallelConfig, mesh: DeviceMesh | None) -> ContextParallel | None:
    """The context axis of a mesh as the section says; None where there is none."""
    if mesh is None or "context" not in (mesh.mesh_dim_names or ()):
        return None
    return ContextParallel(mesh["context"], method=section.context_method, balance=section.context_balance)


def check(model: nn.Module, degree: int) -> None:
    """Refuse a whole model that does not say how it is laid out over the context axis, or where its tokens stand: each
    rank would attend to its own part alone, or count its positions from 0. Raises SettingError."""
    kind, path = type(model).__name__, "parallel.axes.context"
    plan = plan_of(model, "cp_plan")
    if plan is None and not hugging_face.is_model(model):
        raise SettingError(
            path,
            degree,
            f"nothing lays {kind} out over the context axis",
            f"give the model a cp_plan (names of its attention to {CAUSAL}) and an argument positions, or set the "
            f"degree to 1",
        )
    if absent := list(unmatched(model, plan or {})):
        rule = f"the cp_plan of {kind} names what is no module of it: {', '.join(absent)}"
        raise SettingError(path, degree, rule, "correct the names")
    if positions_argument(model) is None:
        raise SettingError(
            path,
            degree,
            f"{kind} has no argument positions, by which it would learn where its tokens stand",
            "give its forward one (it may leave it unread), or set the degree to 1",
        )


def check_attention(model: nn.Module, degree: int, forward: Callable[[Any, Any], Any], batch: Any) -> None:
    """Run a whole model on fake tensors and count calls of attention: a block that computes it in code of its own would
    attend to this rank's tokens alone. The model is not changed. Raises SettingError."""
    kind = type(model).__name__
    called: set[nn.Module] = set()

    def attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float | None = None) -> Tensor:
        return queries.new_empty((*queries.shape[:-1], values.shape[-1]))

    def planned(self: nn.Module, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        called.add(self)
        return attention(queries, keys, values)

    twin = trial.Twin(model)
    with twin.fake:
        plan = plan_of(twin.model, "cp_plan")
        if plan is None:
            hugging_face.attend_to_parts(twin.model, attention, lambda: True, called.add)
        named = [name for name, _, _ in matches(twin.model, plan or {})]
        for name in named:
            module = twin.model.get_submodule(name)
            module.forward = MethodType(planned, module)
    path = f"parallel.axes.context={degree}"
    twin.call(forward, batch, path=path)
    wanted = [(name, twin.model.get_submodule(name)) for name in named] or repeated_blocks(twin.model)
    for name, module in wanted or [("the model", twin.model)]:
        if called.isdisjoint(module.modules()):
            raise SettingError(
                "parallel.axes.context",
                degree,
                f"{name} of {kind} does not call the attention that reaches over the context axis: it has its own, or "
                f"none, and would see this rank's tokens alone",
                "set the degree to 1",
            )
    called.clear()
    del wanted, name, module
    twin.discard(path)


def parallelize(model: nn.Module, context: ContextParallel) -> None:
    """Let the attention of `model`, or of a stage of it, reach over the context axis while a step runs
    (`build.inside_step`), in place.

    The modules are those of the model's `cp_plan` (names to `causal_attention`); models of transformers need none.
    See `check`.
    """
    plan = plan_of(model, "cp_plan")
    if plan is not None:
        for name, style, _ in matches(model, plan):
            if style != CAUSAL:
                raise SettingError(
                    "parallel.axes.context",
                    ABSENT,
                    f"the cp_plan of {type(model).__name__} gives {name} the style {style}, which does not exist",
                    f"use {CAUSAL}, the only style of a cp_plan",
                )
            module = model.get_submodule(name)
            if not isinstance(module, PassThrough):
                module._context_attention = context.attention  # type: ignore[assignment]
                module.forward = MethodType(_attend, module)
    else:
        hugging_face.attend_to_parts(model, context.attention, inside_step.sequence_parts, anywhere=context.anywhere)


def give_positions(model: nn.Module, context: ContextParallel) -> None:
    """Tell a whole model, while a step runs, where the tokens stand that it is given, as `positions` or
    `position_ids`."""
    name = positions_argument(model)
    if name is not None:
        # Models of transformers take positions that begin anew for another sequence, which their masks keep apart.
        check = context.check_positions if hugging_face.is_model(model) else None
        hook = partial(_give_positions, name=name, of=context.positions, check=check)
        model.register_forward_pre_hook(hook, with_kwargs=True)


def positions_argument(model: nn.Module) -> str | None:
    """The argument by which a model takes the positions of its tokens; None where it has none."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in _POSITIONS if name in parameters), None)


def positions_for(name: str, positions: Tensor) -> Tensor:
    """Positions (sequence,) as the argument `name` takes them: `position_ids` have a dim for the batch."""
    return positions[None] if name == "position_ids" else positions


def _attend(self: nn.Module, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    if not inside_step.sequence_parts():
        return type(self).forward(self, queries, keys, values)
    return self._context_attention(queries, keys, values)  # type: ignore[operator]


def _give_positions(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    name: str,
    of: Callable[..., Tensor],
    check: Callable[[Tensor], None] | None,
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    if not inside_step.sequence_parts():
        return None
    bound = inspect.signature(type(model).forward).bind_partial(model, *args)
    own = bound.arguments.get(name) if kwargs.get(name) is None else kwargs[name]
    if own is not None:
        if check is not None:
            check(own)
        return None
    tokens = next(item for item in (*args, *kwargs.values()) if isinstance(item, Tensor))
    given = positions_for(name, of(tokens.shape[1], tokens.device))
    if name in bound.arguments:  # an explicit None
        args = tuple(given if key == name else value for key, value in list(bound.arguments.items())[1:])
        return args, kwargs
    return args, {**kwargs, name: given}


def sequence_length(batch: Any) -> int | None:
    """The second dim of the first tensor of a batch that has two; None where there is none."""
    return next((item.shape[1] for item in tensors(batch) if item.ndim >= 2), None)


def _lower_right(size: int, end: int, device: torch.device) -> Tensor:
    """The mask of the last `size` of `end` tokens: each sees all up to itself. On an accelerator it is one that flash
    attention knows, without a value for each pair."""
    if device.type != "cpu":
        return causal_lower_right(size, end)
    return torch.ones(size, end, dtype=torch.bool, device=device).tril(end - size)


def _repeated(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with as many heads as the queries."""
    times = queries.shape[1] // keys.shape[1]
    if times == 1:
        return keys, values
    return keys.repeat_interleave(times, dim=1), values.repeat_interleave(times, dim=1)
