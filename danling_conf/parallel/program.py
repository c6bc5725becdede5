"""Program: the tensor operators that a function ran on fake tensors, which can run again on real ones.

Recording needs no memory for values and draws no random number. A replay runs the same operators with the same
arguments in the same order, so it draws from the generator what the function itself would have drawn, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from danling_conf._torch_private import dispatch, fakes
from danling_conf._torch_private.dispatch import (
    TorchDispatchMode,
    is_operator,
    is_view,
    storage_identity,
    takes_random_numbers,
    tree_leaves,
    tree_map,
    written_arguments,
)

LARGEST_CONSTANTS = 2**26
"""Bytes of values from outside of torch (numpy, Python lists) that a program keeps; more is a set of weights."""

_OVERWRITES = (
    *("zero_", "fill_", "copy_", "normal_", "uniform_", "random_"),
    *("exponential_", "log_normal_", "cauchy_", "geometric_"),
)
"""Operators that set every element of their first argument, whatever its value was."""

_PLAIN = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
"""What most arguments of operators are that hold no tensor."""
_NO_STORAGES: frozenset[int] = frozenset()


class NotReplayable(RuntimeError):
    """A replay would not do what the function did; `str()` says why."""


# Not frozen, as the next: an instance is made for each tensor of each operator, and takes twice as long if it is.
@dataclass(slots=True)
class Ref:
    """A tensor, by its storage and its place there: views and `.data` of one storage need no operator."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        """The tensor on a real storage."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)

    @property
    def bytes(self) -> int:
        """Of a storage that ends with this tensor."""
        elements = sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True)) + 1
        return (self.offset + (elements if all(self.size) else 0)) * self.dtype.itemsize

    @property
    def dense(self) -> bool:
        """Whether it is all of the memory from the storage's begin to its own end, each element once."""
        expected = 1
        for stride, size in sorted(zip(self.stride, self.size, strict=True)):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return self.offset == 0


@dataclass(slots=True)
class Step:
    """One operator. Tensors among its arguments and results are `Ref`s."""

    function: Any
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    results: tuple[Ref | None, ...]
    uses: frozenset[int]
    """Storages that it reads, changes or makes."""
    writes: frozenset[int]
    """Those that it changes or makes."""
    overwrites: Ref | None
    """What it sets whole, whatever was there before, where that is all of a storage."""
    draws: bool
    """Whether it takes numbers from torch's generator."""


class Recording(TorchDispatchMode):
    """Records, while active inside of `fakes.fake_tensors`, what operators do to storages.

    Where a value decides what is run next (`.item()`), it is computed, from what was recorded.

    Args:
        draws: what to do where that value was drawn (`if torch.rand(()) < p`): with True, draws count as 0; with False,
            NotReplayable is raised.
        on_step: called with every operator and its storages: those it reads, and those it makes or changes.

    Attributes:
        failure: why there can be no replay, also where the function survived the exception.
    """

    def __init__(
        self, *, draws: bool = False, on_step: Callable[[Any, frozenset[int], frozenset[int]], None] | None = None
    ) -> None:
        super().__init__()
        self.failure: NotReplayable | None = None
        self._steps: list[Step] = []
        self._constants: dict[int, torch.UntypedStorage] = {}
        self._draws, self._on_step = draws, on_step
        self._numbers: dict[int, int] = {}
        # Identities are addresses: a storage that was freed would lend its own to the next.
        self._alive: list[torch.UntypedStorage] = []
        self._aliased: set[int] = set()
        self._state = torch.get_rng_state()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        try:
            return self._run(func, args, kwargs)
        except NotReplayable as error:
            self.failure = self.failure or error
            raise

    def call(self, function: Callable[..., Tensor], tensor: Tensor, *args: Any, generator: Any = None) -> Tensor:
        """Record a Python function that draws values for a tensor as if it were one operator."""
        if not fakes.is_fake(tensor):
            return function(tensor, *args, generator=generator)
        with dispatch.real_tensors():
            ref = self.ref(tensor)
            self._check_draw(generator)
        whole = ref if ref.storage not in self._aliased and self._is_whole(ref) else None
        storage = frozenset((ref.storage,))
        self._steps.append(Step(function, (ref, *args), {}, (None,), storage, storage, whole, True))
        return tensor

    def ref(self, tensor: Tensor) -> Ref:
        """The reference of a tensor. One that no recorded operator made is a constant, of the value that it has now."""
        if tensor.layout is not torch.strided:
            raise NotReplayable(f"it uses a tensor of layout {tensor.layout}")
        identity = storage_identity(tensor)
        if identity not in self._numbers:
            if tensor.device.type != "cpu":
                raise NotReplayable(f"it uses a tensor on {tensor.device}")
            if not fakes.is_fake(tensor):
                with dispatch.real_tensors():
                    self._constants[len(self._alive)] = tensor.detach().untyped_storage().clone()
                given = sum(storage.nbytes() for storage in self._constants.values())
                if given > LARGEST_CONSTANTS and not self._draws:
                    raise NotReplayable(f"it takes over more than {LARGEST_CONSTANTS >> 20} MiB of given values")
            self._add(tensor)
        return _ref(self._numbers[identity], tensor)

    def program(self) -> Program:
        """What was recorded. Raises NotReplayable."""
        if self.failure is not None:
            raise self.failure
        self._check_generator()
        return Program(tuple(self._steps), dict(self._constants))

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if not is_operator(func):
            raise NotReplayable(f"it calls {func}, which is no plain operator")
        given: list[Ref] = []

        def ref(tensor: Tensor) -> Ref:
            given.append(self.ref(tensor))
            return given[-1]

        arguments, keywords = _mapped(Tensor, ref, args), _mapped(Tensor, ref, kwargs)
        draws = takes_random_numbers(func)
        if draws:
            self._check_draw(kwargs.get("generator"))
        try:
            result = func(*args, **kwargs)
        except fakes.fake_errors() as error:
            return self._computed(error, func, arguments, keywords)
        read = frozenset([item.storage for item in given])
        written = _written(func, arguments, keywords)
        results, made = self._results(result)
        if self._on_step is not None:
            self._on_step(func, read, written | made)
        if made or written:  # else it is a view, or has nothing to do with tensors
            if made and is_view(func):
                self._aliased |= made | read
            keywords = keywords if given else _with_dtype(func, arguments, keywords, results)
            overwrites = self._overwritten(func, given)
            uses = read | written | made
            self._steps.append(Step(func, arguments, keywords, results, uses, written | made, overwrites, draws))
        return result

    def _results(self, result: Any) -> tuple[tuple[Ref | None, ...], frozenset[int]]:
        """The references of an operator's results, and the storages that are new."""
        made: list[int] = []
        results: list[Ref | None] = []
        for item in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if not isinstance(item, Tensor):
                results.append(None)
                continue
            if storage_identity(item) not in self._numbers:
                made.append(self._add(item))
            results.append(self.ref(item))
        return tuple(results), frozenset(made) if made else _NO_STORAGES

    def _add(self, tensor: Tensor) -> int:
        self._numbers[storage_identity(tensor)] = number = len(self._alive)
        self._alive.append(tensor.untyped_storage())
        return number

    def _check_draw(self, generator: torch.Generator | None) -> None:
        if generator is not None:
            raise NotReplayable("it draws from a generator of its own")
        self._check_generator()

    def _check_generator(self) -> None:
        """Whether torch's generator is as it was: what is recorded does not draw."""
        if not self._draws and not dispatch.equal_values(torch.get_rng_state(), self._state):
            raise NotReplayable("it seeds torch's generator, or draws from it out of sight")

    def _overwritten(self, func: Any, given: list[Ref]) -> Ref | None:
        if func.overloadpacket.__name__ not in _OVERWRITES:
            return None
        target, *others = given
        if target.storage in self._aliased or any(item.storage == target.storage for item in others):
            return None
        return target if self._is_whole(target) else None

    def _is_whole(self, ref: Ref) -> bool:
        return ref.dense and ref.bytes == self._alive[ref.storage].nbytes()

    def _computed(self, error: Exception, func: Any, arguments: Any, keywords: Any) -> Any:
        needed = {item.storage for item in _refs(arguments, keywords)}
        chosen: list[Step] = []
        for step in reversed(self._steps):
            if step.writes & needed:
                if step.draws and not self._draws:
                    raise NotReplayable(f"what it draws decides what it does next ({func})") from error
                needed |= step.uses
                chosen.append(step)
        made = {number for step in chosen for number in step.writes}
        if needed - made - self._constants.keys():
            raise error  # a value that was never here, such as a weight of the model
        with dispatch.real_tensors(), torch.no_grad():
            values = _Values(self._constants)
            for step in reversed(chosen):
                values.run(step, draw=False)
            return values.call(func, arguments, keywords)


@dataclass(frozen=True)
class Program:
    """Operators in their order, and the values of the storages that they do not make."""

    steps: tuple[Step, ...]
    constants: Mapping[int, torch.UntypedStorage]

    def replay(self, wanted: frozenset[int]) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Run everything on the CPU, drawing from torch's generator as it stands. Yields each wanted storage with its
        final value, and keeps none longer than operators need it."""
        values = _Values(self.constants)
        last = {number: index for index, step in enumerate(self.steps) for number in step.uses}
        for number in sorted(wanted - last.keys()):
            yield number, values.storage(number)
        steps = enumerate(self.steps)
        complete: list[tuple[int, torch.UntypedStorage]] | None = None
        while complete is None or complete:
            complete = []
            # As far as there is something to yield: to enter the contexts takes as long as an operator.
            with dispatch.real_tensors(), torch.no_grad():
                for index, step in steps:
                    values.run(step, draw=True)
                    for number in self._dead_after[index]:
                        if number in wanted and last[number] == index:
                            complete.append((number, values.storage(number)))
                        values.drop(number)
                    if complete:
                        break
            yield from complete

    def digest(self) -> int:
        """63 bits, which differ where programs do."""
        found = hashlib.sha256()
        for step in self.steps:
            keywords = sorted(step.keywords.items())
            found.update(repr((str(step.function), step.arguments, keywords, step.results)).encode())
        for number, storage in sorted(self.constants.items()):
            found.update(f"{number}:".encode() + bytes(storage))
        return int.from_bytes(found.digest()[:8], "big") >> 1

    @cached_property
    def _dead_after(self) -> list[list[int]]:
        """By operator, the storages whose value nobody reads after it."""
        dead: list[list[int]] = []
        live: set[int] = set()
        for step in reversed(self.steps):
            dead.append(sorted(step.uses - live))
            live |= step.uses
            if step.overwrites is not None:
                live.discard(step.overwrites.storage)
        return dead[::-1]


class _Values:
    """Real storages, by number."""

    def __init__(self, constants: Mapping[int, torch.UntypedStorage]) -> None:
        self._constants = constants
        self._storages: dict[int, torch.UntypedStorage] = {}

    def storage(self, number: int) -> torch.UntypedStorage:
        if number not in self._storages:
            self._storages[number] = self._constants[number].clone()  # operators may change it
        return self._storages[number]

    def drop(self, number: int) -> None:
        self._storages.pop(number, None)

    def run(self, step: Step, *, draw: bool) -> None:
        target = step.overwrites
        if target is not None and target.storage not in self._storages:
            self._storages[target.storage] = torch.UntypedStorage(target.bytes)
        found = self.call(step.function, step.arguments, step.keywords)
        for ref, item in zip(step.results, (found,) if isinstance(found, Tensor) else tree_leaves(found), strict=True):
            if ref is not None and ref.storage not in self._storages:
                if _ref(ref.storage, item) != ref:  # on fake tensors, an operator may lay out its result otherwise
                    item = ref.on(torch.UntypedStorage(ref.bytes)).copy_(item)
                self._storages[ref.storage] = item.untyped_storage()
            if ref is not None and step.draws and not draw:
                ref.on(self.storage(ref.storage)).zero_()

    def call(self, function: Any, arguments: Any, keywords: Any) -> Any:
        return function(*self._real(arguments), **self._real(keywords))

    def _real(self, value: Any) -> Any:
        return _mapped(Ref, lambda item: item.on(self.storage(item.storage)), value)


def _written(func: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> frozenset[int]:
    """The storages that an operator changes."""
    places = written_arguments(func)
    if not places:
        return _NO_STORAGES
    values = [arguments[place] if place < len(arguments) else keywords.get(name) for place, name in places]
    return frozenset([item.storage for item in _refs(values)])


def _ref(number: int, tensor: Tensor) -> Ref:
    return Ref(number, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def _refs(*values: Any) -> list[Ref]:
    found: list[Ref] = []
    _mapped(Ref, found.append, values)
    return found


def _mapped(kind: type[Any], function: Callable[[Any], Any], value: Any) -> Any:
    """A value with `function` of what is of a kind in it. What operators are called with, is nested by tuples, lists
    and dicts; torch's pytrees, which know more, take ten times as long for it."""
    if isinstance(value, kind):
        return function(value)
    found = type(value)
    if found is tuple or found is list:
        return found([item if type(item) in _PLAIN else _mapped(kind, function, item) for item in value])
    if found is dict:
        return {name: _mapped(kind, function, item) for name, item in value.items()}
    if isinstance(value, (tuple, list, dict)):
        return tree_map(lambda item: function(item) if isinstance(item, kind) else item, value)
    return value


def _with_dtype(func: Any, arguments: Any, keywords: Mapping[str, Any], results: tuple[Ref | None, ...]) -> Any:
    """The keywords of an operator that makes a tensor of no other, with the dtype that was the default then."""
    names = dispatch.argument_names(func)[len(arguments) :]
    made = results[0] if results else None
    if "dtype" not in names or keywords.get("dtype") is not None or made is None:
        return keywords
    return {**keywords, "dtype": made.dtype}
