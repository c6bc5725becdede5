"""How the values of a model that was built on the meta device come about: which of its modules' own methods set which
tensors, and whether that is all that the model's constructor did."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from danling_conf._torch_private import TorchDispatchMode, is_operator, is_view, storage_identity, written_arguments
from danling_conf.topology.violation import SettingError

INITIALIZERS = ("reset_parameters", "_reset_parameters", "init_weights")
"""Methods, callable without arguments, by which a module sets its parameters and buffers; the first it has counts."""

_ALLOCATIONS = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided")
_OVERWRITES = ("fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_", "log_normal_")

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

Events = tuple[str, ...]
"""What was done to a tensor's storage: operators with their scalar arguments, oldest first."""

Steps = list[tuple[str, str, Events]]
"""What was done to one tensor: (name of the calling module, name of the tensor, events), in order."""


@dataclass(frozen=True)
class Unit:
    """Modules that are initialised together, since one of them also sets tensors of the others."""

    name: str
    """Fully qualified name of the outermost of them."""
    calls: tuple[tuple[str, str], ...]
    """(module name, method name), in order."""
    tensors: tuple[str, ...]
    """Fully qualified names of the parameters and buffers that the unit sets."""


@dataclass(frozen=True)
class Blueprint:
    """A model on the meta device, unsharded and unwrapped, and how to give it values."""

    model: nn.Module
    units: tuple[Unit, ...]
    missing: Mapping[str, str]
    """Tensors that no initialiser sets as the constructor did, by name, and why."""


class WriteRecord(TorchDispatchMode):
    """Records, while active, every operator that creates or changes a tensor's storage."""

    def __init__(self) -> None:
        super().__init__()
        self._events: defaultdict[int, list[str]] = defaultdict(list)
        self._allocated: set[int] = set()
        # Identities are addresses: a storage that was freed would lend its own to the next.
        self._alive: list[torch.UntypedStorage] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not is_operator(func):
            return result
        operator = str(func.overloadpacket)
        written = list(_written(func, args, kwargs))
        if not written and operator in _ALLOCATIONS:
            self._allocated.update(storage_identity(tensor) for tensor in _tensors(result))
            self._alive.extend(tensor.untyped_storage() for tensor in _tensors(result))
        elif not written and not _is_view(func):
            written = list(_tensors(result))
        for tensor in written:
            self._events[storage_identity(tensor)].append(f"{operator}{_scalars(args)}")
            self._alive.append(tensor.untyped_storage())
        return result

    def events(self, tensor: torch.Tensor) -> Events:
        """What was done to this tensor's storage while recording."""
        return tuple(self._events.get(storage_identity(tensor), ()))

    def history(self, tensor: torch.Tensor) -> Events:
        """All that was ever done to this tensor's storage; values that came from Python (`torch.tensor([3.0])`) do so
        without an operator."""
        unseen = storage_identity(tensor) not in self._allocated and storage_identity(tensor) not in self._events
        return ("values from Python",) if unseen else self.events(tensor)


def draw(factory: Callable[[], nn.Module]) -> tuple[nn.Module, Blueprint]:
    """Build a model on the meta device, and its blueprint. What the constructor did to each tensor is recorded, and
    initialisers count for a tensor only if they end with the same operators."""
    record = WriteRecord()
    with torch.device("meta"), record:
        model = made_by(factory)
    return model, blueprint_of(model, record)


def made_by(factory: Callable[[], nn.Module]) -> nn.Module:
    """The model of a factory. Raises SettingError where it returns something else."""
    model = factory()
    if not isinstance(model, nn.Module):
        raise SettingError(
            "model",
            factory,
            f"it returned a {type(model).__name__}, and a model factory returns an nn.Module",
            "return the model from it",
        )
    return model


def blueprint_of(model: nn.Module, record: WriteRecord | None = None) -> Blueprint:
    """The blueprint of a model whose parameters and buffers are on the meta device. `record` is what its constructor
    did; without it an initialiser is taken at its word."""
    names_of: defaultdict[int, list[str]] = defaultdict(list)
    tensors: dict[int, torch.Tensor] = {}
    for name, tensor in named_tensors(model):
        names_of[id(tensor)].append(name)
        tensors[id(tensor)] = tensor
    done, calls, failures = _rehearse(copy.deepcopy(model))
    unit_of = _unit_of(calls, done)

    missing: dict[str, str] = {}
    members: defaultdict[str, list[str]] = defaultdict(list)
    for identity, names in names_of.items():
        steps = [(caller, name, done[name][caller]) for caller in calls for name in names if caller in done[name]]
        constructed = None if record is None else record.history(tensors[identity])
        setters = _setters(steps, constructed, unit_of)
        if tensors[identity].device.type != "meta":
            missing[names[0]] = "its constructor puts it on a device of its own choice"
        elif not setters:
            missing[names[0]] = _reason(names[0], steps, constructed, failures)
        for caller, name in setters:
            if name not in members[unit_of[caller]]:
                members[unit_of[caller]].append(name)
    units = tuple(
        Unit(root, tuple((caller, calls[caller]) for caller in calls if unit_of[caller] == root), tuple(names))
        for root, names in members.items()
    )
    return Blueprint(model=copy.deepcopy(model), units=units, missing=missing)


def shortened(missing: Mapping[str, str], limit: int = 5) -> str:
    """The first of the tensors that no initialiser sets, with the reasons, for a message."""
    shown = "; ".join(f"{name} ({why})" for name, why in list(missing.items())[:limit])
    return f"{shown}; and {len(missing) - limit} more" if len(missing) > limit else shown


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers by fully qualified name; a tied one under each of its names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _rehearse(model: nn.Module) -> tuple[defaultdict[str, dict[str, Events]], dict[str, str], dict[str, str]]:
    """Call every initialiser once, inner modules first, as constructors do. Returns for each tensor what the
    initialiser of which module did to it; each module's method, in order; and the error of each method that cannot
    run on the meta device."""
    done: defaultdict[str, dict[str, Events]] = defaultdict(dict)
    calls: dict[str, str] = {}
    failures: dict[str, str] = {}
    for name, module in _inner_first(model, "", set()):
        method = _initializer(module)
        if method is None:
            continue
        record = WriteRecord()
        try:
            with torch.device("meta"), record, torch.no_grad():
                getattr(module, method)()
        except Exception as error:  # a method of the user's, which may fail on the meta device in any way
            failures[name] = f"{method} fails on the meta device ({type(error).__name__}: {error})"
            continue
        calls[name] = method
        for tensor_name, tensor in named_tensors(module):
            if events := record.events(tensor):
                done[f"{name}.{tensor_name}" if name else tensor_name][name] = events
    return done, calls, failures


def _inner_first(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    if module in seen:
        return
    seen.add(module)
    for child_name, child in module.named_children():
        yield from _inner_first(child, f"{name}.{child_name}" if name else child_name, seen)
    yield name, module


def _initializer(module: nn.Module) -> str | None:
    for name in INITIALIZERS:
        method = getattr(module, name, None)
        if callable(method):
            parameters = inspect.signature(method).parameters.values()
            required = [item for item in parameters if item.default is item.empty and item.kind not in _VARIADIC]
            if not required:
                return name
    return None


def _unit_of(calls: Mapping[str, str], done: Mapping[str, Mapping[str, Events]]) -> dict[str, str]:
    """For each module with an initialiser the module whose unit it belongs to: the outermost of its ancestors whose
    initialiser also sets tensors further in, else itself."""
    roots = {caller for name, callers in done.items() for caller in callers if name.rpartition(".")[0] != caller}
    return {caller: next((prefix for prefix in _prefixes(caller) if prefix in roots), caller) for caller in calls}


def _setters(steps: Steps, constructed: Events | None, unit_of: Mapping[str, str]) -> list[tuple[str, str]]:
    """The modules, with the name under which each knows the tensor, whose initialisers give it its constructor's
    value; none where they do not."""
    if len({unit_of[caller] for caller, _, _ in steps}) == 1:
        joined = tuple(event for _, _, events in _each_caller_once(steps) for event in events)
        return [(caller, name) for caller, name, _ in steps] if _equivalent(joined, constructed) else []
    # A tied tensor: of the modules it belongs to, the one whose value it had after construction.
    for caller, name, events in reversed(steps):
        if constructed and _equivalent(events, constructed):
            return [(caller, name)]
    return []


def _each_caller_once(steps: Steps) -> Steps:
    """One initialiser that reaches a tied tensor under two names did what it did once."""
    return list({caller: (caller, name, events) for caller, name, events in steps}.values())


def _equivalent(done: Events, constructed: Events | None) -> bool:
    """Whether the operators of the initialisers give the tensor the value that its constructor gave it."""
    if not done or not _sets_all(done[0]):
        return False
    # A constructor that never wrote left the memory as it found it: the initialiser is all there is.
    return not constructed or constructed[-len(done) :] == done


def _sets_all(event: str) -> bool:
    operator = event.partition("(")[0].removeprefix("aten.")
    return operator in _OVERWRITES or not operator.endswith("_")


def _reason(name: str, steps: Steps, constructed: Events | None, failures: Mapping[str, str]) -> str:
    for prefix in reversed(list(_prefixes(name.rpartition(".")[0]))):
        if prefix in failures:
            return failures[prefix]
    if not steps:
        return f"no {INITIALIZERS[0]} sets it"
    done = ", ".join(event for _, _, events in _each_caller_once(steps) for event in events)
    return f"its constructor does {', '.join(constructed or ()) or 'nothing'}, but {INITIALIZERS[0]} {done}"


def _prefixes(name: str) -> Iterator[str]:
    """The module's ancestors and itself, outermost first."""
    yield ""
    parts = name.split(".") if name else []
    for depth in range(1, len(parts) + 1):
        yield ".".join(parts[:depth])


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    for position, name in written_arguments(func):
        yield from _tensors(args[position] if position < len(args) else kwargs.get(name))


def _is_view(func: Any) -> bool:
    # `lift_fresh` is a view by its schema, but it is how a tensor made from Python numbers first appears.
    return is_view(func) and func is not torch.ops.aten.lift_fresh.default


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _scalars(args: tuple[Any, ...]) -> str:
    return str(tuple(tuple(item.shape) if isinstance(item, torch.Tensor) else item for item in args[1:]))
