"""Trial: one forward pass of a whole model on fake tensors, which shows how it uses its repeated blocks.

A pipeline calls the user's model in every stage, with the modules of other stages passing their input through. That is
what the whole model computes if each block is called once, in order, with the output of the one before, and if nothing
else crosses from one stage to another. The order in which modules are declared says nothing of it.
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danling_conf._torch_private import attributes, fakes
from danling_conf._torch_private.dispatch import tree_leaves, tree_map
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.function_caches import cached_tensors, fake_values_forgotten
from danling_conf.parallel.init_plan import deep_copy, named_tensors
from danling_conf.parallel.program import Recording
from danling_conf.topology.violation import ABSENT, SettingError

PATH = "parallel.axes.pipeline"

_BY_SHAPE = frozenset(
    form.format(kind)
    for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")
    for form in ("{}_like", "new_{}", "new_{}_strided")
)
"""Operators that look at the shape of their argument only."""


class Twin:
    """A copy of a model on fake tensors.

    Attributes:
        model: the copy.
        fake: the context in which it can be called.
    """

    model: nn.Module
    fake: AbstractContextManager[object]

    def __init__(self, model: nn.Module) -> None:
        self.fake = fakes.fake_tensors()
        self.model = _fake_copy(model, self.fake)
        for _, block in repeated_blocks(self.model):
            block.forward = MethodType(_or_alike, block)

    def call(
        self,
        forward: Callable[[Any, Any], Any],
        batch: Any,
        *,
        path: str,
        recording: Recording | None = None,
        start: Callable[[], None] = lambda: None,
    ) -> Any:
        """`forward(model, batch)`. Raises SettingError with this path where the model does not run."""
        batch = to_cpu(batch)
        recording = recording or Recording(draws=True)
        try:
            with (
                fake_values_forgotten(),
                torch.no_grad(),
                self.fake,
                fakes.quiet_fake_tensors(),
                recording,
            ):
                start()
                return forward(self.model, batch)
        except SettingError:
            raise
        except Exception as error:  # of the user's model, which may fail on fake tensors in any way
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, fakes.fake_errors()):
                reason = f"a value decides what it computes next: {error}"
            raise SettingError(
                path,
                ABSENT,
                f"{type(self.model).__name__} does not run on tensors without values, by which it is shown that it can "
                f"be laid out so ({reason})",
                "set the degree to 1",
            ) from error

    def discard(self, path: str) -> None:
        """Let go of the copy, which has done its service. Raises SettingError where something outside of the model has
        kept one of its tensors, with which real ones would be computed."""
        kind, mode = type(self.model).__name__, weakref.ref(self.fake)
        del self.model, self.fake
        gc.collect()
        if mode() is not None:
            raise SettingError(
                path,
                ABSENT,
                f"what {kind} computes is kept outside of its modules, in a global variable, a class or the like, and "
                f"would have no value there after the model was tried",
                "keep it in an attribute of the module, or by functools.lru_cache",
            )


@dataclass(frozen=True)
class Trial:
    """How a model used its blocks.

    Attributes:
        blocks: their names, in the order in which they were called.
        returns: by block, 0 where it returns a tensor, else the length of the tuple whose first item goes on.
        shapes: by block, of what goes on.
        before, after: names of the parameters that were used before the first block, and after the last one.
        direct: whether the first block reads nothing of what is before it but its first input.
        changed: names of the buffers that forward writes to or replaces, with the region in which it did so (see
            `_Watch`); None where their values depend on nothing that one stage alone has.
        twin: the model on fake tensors.
    """

    blocks: tuple[str, ...]
    returns: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    before: frozenset[str]
    after: frozenset[str]
    direct: bool
    changed: Mapping[str, int | None]
    twin: Twin


def run(
    model: nn.Module,
    blocks: Sequence[str],
    around: Sequence[str],
    forward: Callable[[Any, Any], Any],
    batch: Any,
    *,
    alone: bool = False,
) -> Trial:
    """Run `forward(model, batch)` on fake tensors and watch its blocks.

    Args:
        model: whole, on any device; it is not changed.
        blocks: names of its blocks, or of the modules that the stages are made of.
        around: names of the other outermost modules with parameters.
        alone: whether nothing may be computed around the blocks either.

    Raises SettingError where a pipeline would not compute what the model does.
    """
    twin = Twin(model)
    watch = _Watch(twin.model, blocks, around, alone=alone)
    with attributes.reentrant_checkpoints(watch.refuse_reentrant):
        _pass(twin, watch, forward, batch)
        if watch.keeps_values():
            # What was kept of one pass may be used in the next, in another place.
            _pass(twin, watch, forward, batch)
    return Trial(
        tuple(blocks),
        tuple(watch.returns),
        tuple(watch.shapes),
        watch.used_before(),
        watch.used_after(),
        watch.direct,
        watch.changed(),
        twin,
    )


def _pass(twin: Twin, watch: _Watch, forward: Callable[[Any, Any], Any], batch: Any) -> None:
    try:
        twin.call(forward, batch, path=PATH, recording=watch.recording, start=watch.start)
    finally:
        watch.stop()
    watch.finish()


def to_cpu(batch: Any) -> Any:
    """A batch with its tensors on the CPU."""
    return tree_map(lambda item: item.detach().cpu() if isinstance(item, Tensor) else item, batch)


T = TypeVar("T")


def together(check: Callable[[], T]) -> T:
    """What a check returns; its SettingError on every rank where any rank has one. Collective."""
    found: T | None = None
    failure: SettingError | None = None
    try:
        found = check()
    except SettingError as error:
        failure = error
    agree(failure)
    return cast(T, found)


def agree(failure: SettingError | None) -> None:
    """Raise the first rank's failure on every rank, so that none waits for one that has left. Collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        failures: list[SettingError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure)
        failure = next((item for item in failures if item is not None), None)
    if failure is not None:
        raise failure


def _fake_copy(model: nn.Module, fake: AbstractContextManager[object]) -> nn.Module:
    """A copy with fake parameters and buffers; other tensors that modules keep have their values."""
    memo: dict[int, Any] = {}
    with fake:
        for _, tensor in named_tensors(model):
            if id(tensor) not in memo:
                made: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = made
    # Not in the mode, which can copy no tensor that has a value.
    return deep_copy(model, memo)


class _Watch:
    """Follows a forward pass through its regions: before the blocks (0), in block k (2k + 1), behind it (2k + 2)."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], around: Sequence[str], *, alone: bool) -> None:
        self.recording = Recording(draws=True, on_step=self._step)
        self.returns: list[int] = []
        self.shapes: list[torch.Size] = []
        self.direct = True
        self._model, self._blocks, self._around, self._alone = model, list(blocks), list(around), alone
        self._region = 0
        self._end = 2 * len(self._blocks)
        self._inside: list[str] = []
        self._handles: list[Any] = []
        self._parameters: dict[int, list[str]] = {}
        self._buffers: dict[int, str] = {}
        self._written: dict[str, int | None] = {}
        self._late: SettingError | None = None
        """What is computed between two blocks, which is a fault if the later one is called at all."""
        self._regions: defaultdict[int, set[int]] = defaultdict(set)
        self._made: dict[int, tuple[int, str]] = {}
        """By storage that depends on parameters, or that a block made: the region in which it was made, and by which
        module."""
        self._constant: set[int] = set()
        """Those that depend on nothing but numbers and the batch, such as masks."""
        self._passed: int | None = None
        """The storage that goes from one block to the next."""
        self._output: Any = None

    def start(self) -> None:
        self._region, self._late = 0, None
        self.returns.clear()
        self.shapes.clear()
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            names = self._parameters.setdefault(self.recording.ref(parameter).storage, [])
            names += [name] * (name not in names)
        self._buffers = self._buffers or {
            self.recording.ref(buffer).storage: name for name, buffer in self._model.named_buffers()
        }
        for place, name in enumerate(self._blocks):
            block = self._model.get_submodule(name)
            enter = self._handle(block.register_forward_pre_hook)
            enter(lambda _, args, kwargs, place=place: self._enter(place, args, kwargs), with_kwargs=True)
            self._handle(block.register_forward_hook)(lambda _, args, output, place=place: self._leave(place, output))
        for name in self._around:
            module = self._model.get_submodule(name)
            self._handle(module.register_forward_pre_hook)(lambda _, args, name=name: self._inside.append(name))
            self._handle(module.register_forward_hook)(lambda *_: self._inside.pop() and None)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self) -> None:
        if self._region != self._end:
            called = self._region // 2
            raise self._fault(f"its block {self._blocks[called]} is not called")
        if self._late is not None:
            raise self._late
        for number, regions in self._regions.items():
            outside = {region for region in regions if region % 2 == 0}
            between = outside - {0, self._end}
            name = self._parameters[number][0]
            if between:
                raise self._fault(f"{name} is used between {self._blocks[min(between) // 2 - 1]} and the next block")
            inside = {region for region in regions if region % 2}
            if len(self._parameters[number]) == 1 and (len(outside) + len(inside)) > 1:
                places = " and ".join(self._place(region) for region in sorted(regions))
                raise self._fault(f"the parameter {name} is used {places}")

    def changed(self) -> dict[str, int | None]:
        """Names of the buffers that were written to or replaced, with the region; None where any stage can do it."""
        found = dict(self._written)
        for name, buffer in self._model.named_buffers():
            number = self.recording.ref(buffer).storage
            if self._buffers.get(number) != name:
                found[name] = self._made[number][0] if number in self._made else None
        return found

    def keeps_values(self) -> bool:
        """Whether a buffer or an attribute of a module has what a part of the model computed."""
        if any(region is not None for region in self.changed().values()):
            return True
        kept = (item for module in self._model.modules() for item in tree_leaves(list(vars(module).values())))
        return any(
            isinstance(item, Tensor) and fakes.is_fake(item) and self.recording.ref(item).storage in self._made
            for item in kept
        )

    def refuse_reentrant(self) -> None:
        raise SettingError(
            PATH,
            ABSENT,
            f"{type(self._model).__name__} recomputes {self._place(self._region)} by torch.utils.checkpoint with "
            f"use_reentrant=True, which torch's pipelines cannot differentiate",
            "pass use_reentrant=False, or leave it to activation_checkpointing.mode",
        )

    def used_before(self) -> frozenset[str]:
        return self._used(0)

    def used_after(self) -> frozenset[str]:
        return self._used(self._end)

    def _used(self, region: int) -> frozenset[str]:
        found = (self._parameters[number] for number, regions in self._regions.items() if region in regions)
        return frozenset(name for names in found for name in names)

    def _handle(self, register: Callable[..., Any]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._handles.append(register(*args, **kwargs))

    def _enter(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = self._blocks[place]
        if self._region % 2:
            raise self._fault(f"{name} is called inside of {self._blocks[self._region // 2]}")
        expected = self._region // 2
        if place < expected:
            raise self._fault(f"its block {name} is called twice, or after a later one")
        if place > expected:
            raise self._fault(f"its block {name} is called before {self._blocks[expected]}")
        first = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(first, Tensor):
            raise self._fault(f"the first input of {name} is a {type(first).__name__} and no tensor")
        if place and first is not self._output:
            if self._late is not None:
                raise self._late
            raise self._fault(
                f"{name} is not given the output of {self._blocks[place - 1]} as its first input, but something else"
            )
        self._region = 2 * place + 1
        self._passed = self.recording.ref(first).storage

    def _leave(self, place: int, output: Any) -> None:
        name = self._blocks[place]
        several = type(output) in (tuple, list) and len(output) > 0
        first = output[0] if several else output
        if not isinstance(first, Tensor):
            raise self._fault(f"{name} returns a {type(output).__name__} that does not begin with a tensor")
        self.returns.append(len(output) if several else 0)
        self.shapes.append(first.shape)
        self._output, self._passed = first, self.recording.ref(first).storage
        for item in tree_leaves(output):
            if isinstance(item, Tensor):
                self._made[self.recording.ref(item).storage] = (self._region, name)
        self._region += 1

    def _step(self, function: Any, read: frozenset[int], written: frozenset[int]) -> None:
        if "batch_norm" in function.overloadpacket.__name__:  # torch does not say that it changes running statistics
            written = written | {number for number in read if self._is_tracking(number)}
        if not written or function.overloadpacket.__name__ in _BY_SHAPE:
            return
        # What a module with parameters makes is not there in stages that do not hold it.
        depends = False
        for number in read:
            if number in self._parameters:
                self._regions[number].add(self._region)
                depends = True
            elif number in self._made:
                self._check_read(number)
                depends = depends or number not in self._constant
        if not depends and (self._region % 2 or self._inside):
            self._constant |= written
            depends = True
        if changed := written & self._parameters.keys():
            raise SettingError(
                PATH,
                ABSENT,
                f"forward changes the parameter {self._parameters[min(changed)][0]} of {type(self._model).__name__}, "
                f"and runs for several microbatches before the first one's backward pass",
                "change it between steps, in a callback, or set the degree to 1",
            )
        for number in written & self._buffers.keys():
            self._written[self._buffers[number]] = self._region if depends else None
        if depends:
            if self._alone and not self._region % 2:
                raise self._fault(f"it computes {self._place(self._region)}, which every stage would do")
            made_by = self._inside[-1] if self._inside else f"the model {self._place(self._region)}"
            self._made |= {number: (self._region, made_by) for number in written - self._parameters.keys()}

    def _is_tracking(self, number: int) -> bool:
        name = self._buffers.get(number)
        return name is not None and self._model.get_submodule(name.rpartition(".")[0]).training

    def _check_read(self, number: int) -> None:
        origin, made_by = self._made[number]
        if origin == self._region or (number == self._passed and (self._region % 2 or self._region == self._end)):
            return
        if number in self._constant and number in self._cached():
            return  # by a function, which each stage calls by itself
        if self._region == 1 and origin == 0:
            self.direct = False  # before the blocks and in the first: one stage has both, as a rule
            return
        if self._region % 2 == 0 and 0 < self._region < self._end:
            late = self._fault(f"it computes {self._place(self._region)} with what {made_by} made")
            self._late = self._late or late
            return
        if self._region == 0:
            raise self._fault(f"what {made_by} made is used before the blocks, the next time")
        raise self._fault(
            f"what {made_by} made is used {self._place(self._region)}, beside the output of the block before"
        )

    def _cached(self) -> frozenset[int]:
        """Storages that caches of functions keep."""
        return frozenset(self.recording.ref(item).storage for item in cached_tensors() if fakes.is_fake(item))

    def _place(self, region: int) -> str:
        if region == 0:
            return "before the blocks"
        if region % 2:
            return f"in {self._blocks[region // 2]}"
        return "after the blocks" if region == self._end else f"behind {self._blocks[region // 2 - 1]}"

    def _fault(self, what: str) -> SettingError:
        return SettingError(
            PATH,
            ABSENT,
            f"a pipeline passes the output of each block to the next and nothing else, and of "
            f"{type(self._model).__name__}, {what}",
            "change the model's forward, or set the degree to 1",
        )


def _or_alike(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A block's output; where it does not run without values (a router's decide what it computes), something like its
    first input. What it does inside is no matter of the cut."""
    try:
        return type(block).forward(block, *args, **kwargs)
    except SettingError:
        raise
    except Exception:  # of the user's block, or of an operator that has no rule for fake tensors
        return torch.empty_like(args[0] if args else next(iter(kwargs.values())))
