"""Initial values of a model that a factory builds: those that a plain call gives, without each rank holding them all.

A factory is run on fake tensors and its operators are recorded. Every rank replays them under the run's seed and keeps
its own part of each tensor, so that the values are those of a plain call, bit for bit, under any layout. What cannot be
replayed is built on the CPU, by one rank of a host at a time, and rank 0's values are sent to the others.
"""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import random
import socket
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from danling_conf._torch_private import attributes, dispatch, fakes
from danling_conf.parallel.function_caches import forget_fake_values
from danling_conf.parallel.program import NotReplayable, Program, Recording, Ref
from danling_conf.schema.imports import uncollected
from danling_conf.topology.violation import ABSENT, SettingError

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Where the values of a model on the meta device come from."""

    @property
    def model(self) -> nn.Module:
        """The model on the meta device, unsharded and unwrapped."""

    def values(self, wanted: Set[str]) -> Iterator[tuple[str, Tensor]]:
        """Names of parameters and buffers, each with its full value; at least those that are wanted."""


@dataclass(frozen=True)
class Recorded:
    """A model whose construction every rank replays by itself."""

    model: nn.Module
    program: Program
    refs: dict[str, Ref]
    """What each parameter and buffer is in the program."""
    seed: int

    def values(self, wanted: Set[str]) -> Iterator[tuple[str, Tensor]]:
        names: defaultdict[int, list[str]] = defaultdict(list)
        for name in sorted(wanted & self.refs.keys()):
            names[self.refs[name].storage].append(name)
        with seeded(self.seed):
            for number, storage in self.program.replay(frozenset(names)):
                for name in names[number]:
                    yield name, self.refs[name].on(storage)


@dataclass(frozen=True)
class FromRankZero:
    """A model whose values rank 0 has. Iterating is collective."""

    model: nn.Module
    held: dict[str, Tensor] | None
    """The values, on rank 0."""
    device: torch.device

    def values(self, wanted: Set[str]) -> Iterator[tuple[str, Tensor]]:
        names_of: defaultdict[int, list[str]] = defaultdict(list)
        tensors = dict(named_tensors(self.model))
        for name, tensor in tensors.items():
            names_of[id(tensor)].append(name)
        for names in names_of.values():
            like = tensors[names[0]]
            value = torch.empty_like(like, device=self.device)
            if self.held is not None:
                value.copy_(self.held[names[0]])
            dist.broadcast(value, src=0)
            for name in names:
                yield name, value


def build(factory: Callable[[], nn.Module], seed: int, device: torch.device) -> tuple[nn.Module, Source | None]:
    """The model of a factory: in a single process whole, on the CPU, without a source; else on the meta device, with
    the source of its values. Collective.

    The log says why a model is built on the CPU where there are several ranks. Raises SettingError where the
    factory returns no module.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return _whole(factory, seed), None
    source, why = None, ""
    try:
        source = record(factory, seed)
    except Exception as error:  # of the factory, on fake tensors; if it is wrong otherwise too, the CPU build says so
        why = str(error) if isinstance(error, NotReplayable) else f"{type(error).__name__} on fake tensors: {error}"
    digest = -1 if source is None else source.program.digest()
    alike = _alike(digest, device)
    if source is not None and alike:
        # A deep copy of a parameter has not the marks that were set on it: the copy is the one that is put aside.
        return source.model, replace(source, model=deep_copy(source.model))
    _log.info(
        "model: built on the CPU, by one rank of a host at a time, and sent out by rank 0, since its construction "
        "cannot be replayed by every rank: %s",
        why or "it is not the same on all ranks",
    )
    return _in_turn(factory, seed, device)


@dataclass(frozen=True)
class WithoutValues:
    """A model on the meta device that gets memory and no values: that of a plan."""

    model: nn.Module

    def values(self, wanted: Set[str]) -> Iterator[tuple[str, Tensor]]:
        return iter(())


@uncollected()  # what is made for thousands of tensors stays: to look through it took a fifth of the time
def record(factory: Callable[[], nn.Module], seed: int) -> Recorded:
    """The model of a factory on the meta device, and how to replay its construction.

    Raises NotReplayable, and what the factory raises on fake tensors.
    """
    try:
        return _record(factory, seed)
    except BaseException:
        forget_fake_values()
        raise


def _record(factory: Callable[[], nn.Module], seed: int) -> Recorded:
    mode = fakes.fake_tensors()
    with seeded(seed), fakes.quiet_fake_tensors():
        recording = Recording()
        with mode, recording, attributes.truncated_normal(recording.call):
            model = made_by(factory)
            refuse_for_ranks(model)
            refs = {name: recording.ref(tensor) for name, tensor in named_tensors(model)}
        program = recording.program()
    if shared := _sharing(model):
        raise NotReplayable(f"{shared[0]} and {shared[1]} are two tensors on one memory")
    to_meta(model)
    alive = weakref.ref(mode)
    del mode, recording
    # Each fake tensor holds the mode: where that is gone, no cache of a function keeps one. Torch leaves cycles behind,
    # all of them new; to look through all objects takes ten times as long.
    if alive() is not None:
        gc.collect(0)
    if alive() is not None:  # held by the cache of a function, by an older cycle, or by the model
        forget_fake_values()
        gc.collect()
    if alive() is not None:
        raise NotReplayable(_kept(model))
    return Recorded(model=model, program=program, refs=refs, seed=seed)


def made_by(factory: Callable[[], nn.Module]) -> nn.Module:
    """The model of a factory. Raises SettingError where it returns something else."""
    if (fault := _uncallable(factory)) is not None:
        raise SettingError("model", ABSENT, fault, "pass a factory without arguments: model=lambda: Net(width=8)")
    model = factory()
    if not isinstance(model, nn.Module):
        raise SettingError(
            "model",
            factory,
            f"it returned a {type(model).__name__}, and a model factory returns an nn.Module",
            "return the model from it",
        )
    for name, tensor in named_tensors(model):
        if is_lazy(tensor):
            raise SettingError(
                "model",
                ABSENT,
                f"{name} of {type(model).__name__} has no shape: a lazy module learns it from its first input",
                "call the model once in the function that builds it, or give the module its sizes",
            )
    return model


def _uncallable(factory: Any) -> str | None:
    """Why something is no factory without arguments; None where it is one."""
    if not callable(factory):
        return f"a {type(factory).__name__} is neither a module nor a function that returns one"
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        return f"the factory {getattr(factory, '__name__', type(factory).__name__)} needs arguments: {error}"
    except ValueError:  # a builtin without a signature
        return None
    return None


def refuse_for_ranks(model: nn.Module) -> None:
    """Refuse what several ranks would do otherwise than one process. A layout puts other parameters in the place of
    those that a function waits for, or completes their gradients later; and rows that a rank renormalises are those of
    its own samples. Raises SettingError."""
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if attributes.has_hooks(parameter):
            raise SettingError(
                "model",
                ABSENT,
                f"the parameter {name} of {kind} has a hook on its gradient, which would be lost, or be called with "
                f"the gradient of one rank",
                "change gradients in a callback (on_before_optimizer_step), or by a hook of the module "
                "(register_full_backward_hook)",
            )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise SettingError(
                "model",
                ABSENT,
                f"{name} of {kind} changes its weight in the forward (max_norm={module.max_norm:g}), on each rank the "
                f"rows of its own samples",
                "renormalise it between steps, in a callback, or train in one process (parallel=single)",
            )


def refuse_meta(model: nn.Module) -> None:
    """Refuse a module on the meta device: what its constructor would have set is not known. Raises SettingError."""
    for name, tensor in named_tensors(model):
        if tensor.device.type == "meta":
            raise SettingError(
                "model",
                ABSENT,
                f"{name} of {type(model).__name__} is on the meta device, where it has no value",
                "pass the function that builds the model, without calling it",
            )


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by fully qualified name; a tied one under each of its names."""
    # In one walk: `named_parameters` and `named_buffers` take one each, which is most of what they cost.
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for held in (owner._parameters, owner._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, tensor


def to_meta(model: nn.Module) -> None:
    """Let every parameter and buffer of a model be on the meta device, in place."""
    replace_tensors(model, lambda item: torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device="meta"))


def make_contiguous(model: nn.Module) -> None:
    """Lay out every parameter of a model on the meta device in the order of its dims, in place: FSDP2 takes no other,
    and some constructors (`torch.linalg.qr`) return one."""

    def contiguous(tensor: Tensor) -> Tensor:
        return tensor if tensor.is_contiguous() else torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    replace_tensors(model, contiguous)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model with its parameters and buffers on the meta device, without a copy of their values."""
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(model):
        if id(tensor) not in memo:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            memo[id(tensor)] = _like(tensor, made, isinstance(tensor, nn.Parameter))
    return deep_copy(model, memo)


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model, also of one that keeps a tensor computed of its parameters, as those that
    `torch.nn.utils.weight_norm` has changed do: torch copies no tensor that has a history.

    Args:
        memo: what takes the place of which object, by its identity.
    """
    known = dict(memo or {})
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                known.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(model, known)


def replace_tensors(model: nn.Module, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Replace each parameter and buffer by `function` of it, tied ones once (`nn.Module.to_empty` would untie them).
    Returns those that took another one's place."""
    # The old tensor stays in the pair: were it freed, a new one could take over its identity.
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    for owner in model.modules():
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in pairs:
                pairs[id(tensor)] = (tensor, _like(tensor, function(tensor), name in owner._parameters))
            # By attribute: modules such as nn.LSTM follow what is set on them.
            setattr(owner, name, pairs[id(tensor)][1])
    return [new for old, new in pairs.values() if new is not old]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random generators of torch's CPU, Python and numpy start from `seed` inside, and go on as if nothing had
    happened after."""
    state, python = torch.get_rng_state(), random.getstate()
    # Only where it is in use.
    numpy = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpys = None if numpy is None else numpy.get_state()
    # Not `torch.manual_seed`, which would seed the accelerators too.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy is not None:
        numpy.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy is not None:
            numpy.set_state(numpys)


def _whole(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.device("cpu"), seeded(seed):
        return made_by(factory)


def _in_turn(factory: Callable[[], nn.Module], seed: int, device: torch.device) -> tuple[nn.Module, Source]:
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    own = dist.get_rank()
    turns = [hosts[:rank].count(host) for rank, host in enumerate(hosts)]
    model: nn.Module | None = None
    failure: Exception | None = None
    held: dict[str, Tensor] | None = None
    for turn in range(max(turns) + 1):
        if turn == turns[own]:
            try:
                model = _whole(factory, seed)
                refuse_for_ranks(model)
                _refuse_fake(model)
                if own == 0:
                    held = {name: tensor.detach() for name, tensor in named_tensors(model)}
                if shared := _sharing(model):
                    raise SettingError(
                        "model",
                        ABSENT,
                        f"{shared[0]} and {shared[1]} are two tensors on one memory, which a layout would part",
                        "let both be one parameter, such as head.weight = embedding.weight",
                    )
                to_meta(model)
            except Exception as error:  # of the factory; raised when the others have had their turn
                failure = error
        dist.barrier()
    if failure is not None:
        raise failure
    assert model is not None
    return model, FromRankZero(deep_copy(model), held, device)


def _refuse_fake(model: nn.Module) -> None:
    for name, tensor in named_tensors(model):
        if fakes.is_fake(tensor):
            raise SettingError(
                "model",
                ABSENT,
                f"{name} of {type(model).__name__} comes from a global variable, a class or the like, that its "
                f"construction had filled, and has no value there when it is built a second time",
                "compute it in the constructor, or keep it by functools.lru_cache",
            )


def _alike(number: int, device: torch.device) -> bool:
    """Whether every rank has this number, and it is not negative. Collective."""
    bounds = torch.tensor([number, -number], device=device)
    dist.all_reduce(bounds, op=dist.ReduceOp.MIN)
    least, most = bounds[0].item(), -bounds[1].item()
    return least == most and least >= 0


def _sharing(model: nn.Module) -> tuple[str, str] | None:
    """The names of two tensors that have one storage and are not one tensor."""
    seen: dict[int, tuple[str, int]] = {}
    for name, tensor in named_tensors(model):
        if not tensor.numel():
            continue
        first, identity = seen.setdefault(dispatch.storage_identity(tensor), (name, id(tensor)))
        if identity != id(tensor):
            return first, name
    return None


def _kept(model: nn.Module) -> str:
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            items = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(item, Tensor) and fakes.is_fake(item) for item in items):
                where = f"{name}.{attribute}" if name else attribute
                return f"{where} holds a tensor that is neither a parameter nor a buffer"
    return "something keeps a tensor that is neither a parameter nor a buffer"


def _like(old: Tensor, new: Tensor, is_parameter: bool) -> Tensor:
    if new is old or not is_parameter:
        return new
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    # Marks that the model's author set on the parameter.
    parameter.__dict__.update(fakes.own_attributes(old))
    return parameter
