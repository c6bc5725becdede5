"""Trial: one forward pass of a whole model on fake tensors, which shows how it uses its repeated blocks.

A pipeline calls the user's model in every stage, with the modules of other stages passing their input through. That is
what the whole model computes if each block is called once, in order, with the output of the one before, and if nothing
else crosses from one stage to another. The order in which modules are declared says nothing of it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from danling_conf import _torch_private
from danling_conf._torch_private import tree_leaves, tree_map
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.init_plan import named_tensors
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

    def __init__(self, model: nn.Module) -> None:
        self.fake = _torch_private.fake_tensors()
        with self.fake, _torch_private.quiet_fake_tensors():
            self.model = _fake_copy(model)
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
            with torch.no_grad(), self.fake, _torch_private.quiet_fake_tensors(), recording:
                start()
                return forward(self.model, batch)
        except SettingError:
            raise
        except Exception as error:  # of the user's model, which may fail on fake tensors in any way
            raise SettingError(
                path,
                ABSENT,
                f"{type(self.model).__name__} does not run on tensors without values, by which it is shown that it can "
                f"be laid out so ({type(error).__name__}: {error})",
                "set the degree to 1",
            ) from error


@dataclass(frozen=True)
class Trial:
    """How a model used its blocks.

    Attributes:
        blocks: their names, in the order in which they were called.
        returns: by block, 0 where it returns a tensor, else the length of the tuple whose first item goes on.
        shapes: by block, of what goes on.
        before, after: names of the parameters that were used before the first block, and after the last one.
        direct: whether the first block reads nothing of what is before it but its first input.
        twin: the model on fake tensors.
    """

    blocks: tuple[str, ...]
    returns: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    before: frozenset[str]
    after: frozenset[str]
    direct: bool
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
    try:
        twin.call(forward, batch, path=PATH, recording=watch.recording, start=watch.start)
    finally:
        watch.stop()
    watch.finish()
    return Trial(
        tuple(blocks),
        tuple(watch.returns),
        tuple(watch.shapes),
        watch.used_before(),
        watch.used_after(),
        watch.direct,
        twin,
    )


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


def _fake_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for _, tensor in named_tensors(model):
        if id(tensor) not in memo:
            made: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                made = nn.Parameter(made, requires_grad=tensor.requires_grad)
            memo[id(tensor)] = made
    return copy.deepcopy(model, memo)


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
        self._regions: defaultdict[int, set[int]] = defaultdict(set)
        self._made: dict[int, tuple[int, str]] = {}
        """By storage that depends on parameters: the region in which it was made, and by which module."""
        self._passed: int | None = None
        """The storage that goes from one block to the next."""
        self._output: Any = None

    def start(self) -> None:
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            self._parameters.setdefault(self.recording.ref(parameter).storage, []).append(name)
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

    def finish(self) -> None:
        if self._region != self._end:
            called = self._region // 2
            raise self._fault(f"its block {self._blocks[called]} is not called")
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
        if not written or function.overloadpacket.__name__ in _BY_SHAPE:
            return
        # What a module with parameters makes is not there in stages that do not hold it.
        depends = bool(self._region % 2 or self._inside)
        for number in read:
            if number in self._parameters:
                self._regions[number].add(self._region)
                depends = True
            elif number in self._made:
                self._check_read(number)
                depends = True
        if depends:
            if self._alone and not self._region % 2:
                raise self._fault(f"it computes {self._place(self._region)}, which every stage would do")
            made_by = self._inside[-1] if self._inside else f"the model {self._place(self._region)}"
            self._made |= {number: (self._region, made_by) for number in written - self._parameters.keys()}

    def _check_read(self, number: int) -> None:
        origin, made_by = self._made[number]
        if origin == self._region or (number == self._passed and (self._region % 2 or self._region == self._end)):
            return
        if self._region == 1 and origin == 0:
            self.direct = False  # before the blocks and in the first: one stage has both, as a rule
            return
        if self._region % 2 == 0 and 0 < self._region < self._end:
            raise self._fault(f"it computes {self._place(self._region)} with what {made_by} made")
        raise self._fault(
            f"what {made_by} made is used {self._place(self._region)}, beside the output of the block before"
        )

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
