"""Ledger of a step: every storage that is made and freed, every collective and the arithmetic, by what ran.

`torch.distributed._tools.MemTracker` does the same for memory. It takes a `DTensor` operator for one step, so that what
is gathered inside of it is not seen, books optimizer states under other names, and follows every module and parameter
by hooks, which takes longer than the step. The tests compare the two.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from danling_conf._torch_private.data_parallel import watched_resizes
from danling_conf._torch_private.dispatch import (
    TorchDispatchMode,
    argument_names,
    identity_of,
    is_view,
    is_wrapper,
    storage_identity,
    tree_leaves,
)
from danling_conf._torch_private.distributed import collective_of
from danling_conf._torch_private.fakes import around_shapes, is_fake
from danling_conf.plan.allocator import unused
from danling_conf.plan.figures import ACTIVATIONS, ATTENTION, GATHERED, GRADIENTS, MASKED, TEMPORARIES

_KINDS = (
    ("allgather", "all_gather"),
    ("all_gather", "all_gather"),
    ("reduce_scatter", "reduce_scatter"),
    ("allreduce", "all_reduce"),
    ("all_reduce", "all_reduce"),
    ("alltoall", "all_to_all"),
    ("all_to_all", "all_to_all"),
    ("broadcast", "broadcast"),
    ("send", "send_recv"),
    ("recv", "send_recv"),
)
"""Beginnings of operators' names, and the kind of collective that they are."""


_GATHERING = 1
"""Stream on which FSDP gathers weights."""


_HIDING_FLOPS = 200
"""FLOPs in which a byte is read or written beside them, so that a large product takes the time of its arithmetic only:
what accelerators can do of the one in the time of the other (120 to 350 of those in `topology.hardware`)."""


@dataclass
class _Storage:
    """One storage, from the moment it was made to the moment it was freed."""

    category: str | None
    """Known from the start (parameters), or None: found by how long it lived."""
    origin: str
    """What made it: `forward`, `recompute`, `backward`, `optimizer`, or `resize`."""
    born: int
    """Position in the ledger."""
    freed: int | None = None
    communicated: bool = False
    """Whether FSDP gathered or reduced it."""
    stream: int = 0
    """Of the device, on which it was made; torch's allocator keeps apart what is made on several."""


@dataclass
class Region:
    """A part of a step with a name of its own, such as the forward of a block."""

    name: str
    start: int
    """Position of its first entry in the ledger."""
    action: str = ""
    """What of a pipeline's schedule it is a part of."""
    flops: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    recomputed: int = 0
    hbm_bytes: int = 0
    collectives: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = field(default_factory=dict)
    """By kind and ranks: calls and bytes."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches what runs inside of it, with real or fake tensors.

    Attributes:
        regions: in their order. A name may come several times.
        phase: `forward`, `backward` or `optimizer`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.regions: list[Region] = [Region("start", 0)]
        self.phase = "forward"
        self.active = False
        self._paused = False
        self._recomputing = False
        self._counts_traffic = True
        self.action = ""
        self._entries: list[tuple[int, int]] = []
        """Number of the storage, and bytes added or given back."""
        self._storages: list[_Storage] = []
        self._alive: dict[int, tuple[int, Any, int]] = {}
        """By identity: number, weak reference and bytes of a storage."""
        self._held = 0
        """Entries of what was there before the step."""
        self._boundaries: list[int] = []
        """Positions at which a micro-batch had ended."""

    @contextmanager
    def watching(self) -> Iterator[Ledger]:
        """The context in which everything is recorded."""
        self.active = True
        try:
            with watched_resizes(self._resized), around_shapes(self.unseen), self:
                yield self
        finally:
            self.active = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch may compile where this is on: what is compiled is watched as it runs."""
        return True

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Nothing inside is memory or work of this rank."""
        self._paused, before = True, self._paused
        try:
            yield
        finally:
            self._paused = before

    @contextmanager
    def recomputing(self, value: bool) -> Iterator[None]:
        """What runs inside is computed again, as compiled code does without autograd's knowledge."""
        self._recomputing, before = value, self._recomputing
        try:
            yield
        finally:
            self._recomputing = before

    @contextmanager
    def without_traffic(self) -> Iterator[None]:
        """What operators inside read and write is told by `moves` instead."""
        self._counts_traffic, before = False, self._counts_traffic
        try:
            yield
        finally:
            self._counts_traffic = before

    def moves(self, size: int) -> None:
        """So many bytes are read or written."""
        self.regions[-1].hbm_bytes += size

    def enter(self, name: str) -> None:
        """What runs from now on belongs to this region."""
        if not self.active:
            return
        if self.regions[-1].start == len(self._entries) and not self.regions[-1].flops:
            self.regions.pop()
        self.regions.append(Region(name, len(self._entries), self.action))

    def turn(self, name: str) -> None:
        """A part of the backward pass begins, with this region."""
        self.phase = "backward"
        self.enter(name)

    def restart(self, category: str) -> None:
        """Forget what has happened. What is alive, and nobody has said what it is, is of this category."""
        alive = list(self._alive.values())
        self._entries = [(number, size) for number, _, size in alive if size]
        for number, _, _ in alive:
            self._storages[number].category = self._storages[number].category or category
        self._held = len(self._entries)
        self.regions, self._boundaries = [Region("start", 0)], []

    def begin(self, name: str) -> None:
        """A forward pass begins, with this region."""
        self.phase = "forward"
        self.enter(name)

    def hold(self, tensors: Iterable[Tensor], category: str) -> None:
        """Book tensors that exist already, or say what they are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            number = self._book(storage, category)
            self._storages[number].category = category

    def lend(self, tensor: Tensor) -> Tensor:
        """A tensor whose memory is counted by somebody else. Made inside of `unseen`."""
        if self.active:
            storage = tensor.untyped_storage()
            identity = identity_of(storage)
            self._alive[identity] = (len(self._storages), weakref.ref(storage, lambda _: self._freed(identity)), 0)
            self._storages.append(_Storage(TEMPORARIES, self._origin(), len(self._entries)))
        return tensor

    def boundary(self) -> None:
        """A micro-batch has ended: what its backward pass made and is there still are gradients."""
        if self.active:
            self._boundaries.append(len(self._entries))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(_stands_for_another(kind) for kind in types):
            return NotImplemented  # it comes again with the tensors of this rank
        if func.overloadpacket.__name__ == "wait_tensor" and is_fake(args[0]):
            return args[0]  # as a real one does; the fake one makes another tensor
        result = func(*args, **(kwargs or {}))
        if self._paused:
            return result
        self._see(func, args, kwargs or {}, result)
        return result

    def _see(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        leaves = tree_leaves(result)
        made = [item for item in leaves if isinstance(item, Tensor) and not _stands_for_another(type(item))]
        region = self.regions[-1]
        namespace = func.namespace
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._communicated(func, args, made, region)
        for item in made:
            self._book(item.untyped_storage(), None)
        if namespace == "fsdp":
            self._mark(made)
            if func.overloadpacket.__name__ == "all_gather_copy_in":
                for item in made:
                    self._storages[self._book(item.untyped_storage(), None)].stream = _GATHERING
        if namespace in ("prim", "c10d", "_c10d_functional") or is_view(func):
            return
        given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, Tensor)]
        flops = _flops(func, args, kwargs, result)
        if self._counts_traffic:
            moved = sum(item.numel() * item.element_size() for item in (*given, *made))
            region.hbm_bytes += max(0, moved - flops // _HIDING_FLOPS)
        if flops:
            kind = str(given[0].dtype).removeprefix("torch.")
            masked = _masked_share(func, args, kwargs)
            if masked is None:
                region.flops[kind] += flops
            else:
                region.flops[f"{kind} {ATTENTION}"] += flops - round(masked * flops)
                region.flops[f"{kind} {MASKED}"] += round(masked * flops)
            if self._origin() == "recompute":
                region.recomputed += flops

    def _communicated(self, func: Any, args: Any, made: list[Tensor], region: Region) -> None:
        found = collective_of(func, args)
        if found is None:
            return
        name, ranks = found
        kind = next((kind for start, kind in _KINDS if name.startswith(start)), None)
        if kind is None or len(ranks) < 2 or name.startswith("recv"):
            return
        tensors = [item for item in tree_leaves(args) if isinstance(item, Tensor)]
        size = max((item.numel() * item.element_size() for item in (*tensors, *made)), default=0)
        if kind == "all_gather" and name.startswith("all_gather_into_tensor"):
            size = max(size, sum(item.numel() * item.element_size() for item in made))
        count, total = region.collectives.get((kind, tuple(ranks)), (0, 0))
        region.collectives[kind, tuple(ranks)] = (count + 1, total + size)
        if func.namespace == "c10d" and kind in ("all_gather", "reduce_scatter"):
            self._mark(tensors)

    def _mark(self, tensors: Iterable[Tensor]) -> None:
        for item in tensors:
            known = self._alive.get(storage_identity(item))
            if known is not None:
                self._storages[known[0]].communicated = True

    def _origin(self) -> str:
        # Only what is recomputed is differentiated while a backward pass runs.
        again = self.phase == "backward" and (torch.is_grad_enabled() or self._recomputing)
        return "recompute" if again else self.phase

    def _book(self, storage: torch.UntypedStorage, category: str | None, origin: str | None = None) -> int:
        identity = identity_of(storage)
        known = self._alive.get(identity)
        if known is not None:
            return known[0]
        number, size = len(self._storages), storage.nbytes()
        self._storages.append(_Storage(category, origin or self._origin(), len(self._entries)))
        self._alive[identity] = (number, weakref.ref(storage, lambda _: self._freed(identity)), size)
        if size:
            self._entries.append((number, size))
        return number

    def _freed(self, identity: int) -> None:
        if identity not in self._alive:
            return
        number, _, size = self._alive.pop(identity)
        self._storages[number].freed = len(self._entries)
        if size:
            self._entries.append((number, -size))

    def _resized(self, storage: torch.UntypedStorage, before: int) -> None:
        identity, after = identity_of(storage), storage.nbytes()
        if identity not in self._alive:
            self._book(storage, GATHERED, "resize")
            return
        number, reference, size = self._alive[identity]
        self._alive[identity] = (number, reference, after)
        if self._storages[number].category is None:
            self._storages[number].category = GATHERED
        if after != size:
            self._entries.append((number, after - size))

    def category(self, number: int) -> str:
        """What a storage was, once the step is over."""
        storage = self._storages[number]
        if storage.category is not None:
            return storage.category
        if storage.origin == "recompute":
            return ACTIVATIONS
        end = storage.freed if storage.freed is not None else len(self._entries)
        if storage.origin == "backward" and any(storage.born <= place < end for place in self._boundaries):
            return GRADIENTS
        if storage.communicated:
            return GATHERED
        if storage.origin == "forward" and any(storage.born < place <= end for place in self._turns()):
            return ACTIVATIONS
        return TEMPORARIES

    def _turns(self) -> list[int]:
        """Positions at which a backward pass begins."""
        found = [region.start for region in self.regions if region.name.startswith("backward")]
        return found or [len(self._entries)]

    def forget(self) -> None:
        """Let go of the storages that are alive: they are freed later, when nobody counts any more."""
        self._alive.clear()

    def unused(self) -> int:
        """Bytes that torch's allocator would reserve beyond what is allocated at the peak."""
        streams = {number: storage.stream for number, storage in enumerate(self._storages) if storage.stream}
        return unused(self._entries[: self._held], self._entries[self._held :], streams)

    def memory(self) -> list[tuple[dict[str, int], dict[str, int]]]:
        """By region: bytes by category at the moment with the most bytes, and at its end."""
        categories = [self.category(number) for number in range(len(self._storages))]
        ends = [region.start for region in self.regions[1:]] + [len(self._entries)]
        held: dict[str, int] = defaultdict(int)
        total, position = 0, 0
        peaks: list[tuple[dict[str, int], dict[str, int]]] = []
        for end in ends:
            most, best = total, dict(held)
            while position < end:
                number, size = self._entries[position]
                held[categories[number]] += size
                total += size
                if total > most:
                    most, best = total, dict(held)
                position += 1
            peaks.append(({name: value for name, value in best.items() if value}, dict(held)))
        return peaks


@cache
def _stands_for_another(kind: type) -> bool:
    return is_wrapper(kind)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func.overloadpacket
    formula = flop_registry.get(packet)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result))
    name = packet.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return int(sdpa_flop_count(*(item.shape for item in args[:3])))  # type: ignore[no-untyped-call]
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return int(sdpa_backward_flop_count(*(item.shape for item in args[:4])))  # type: ignore[no-untyped-call]
    if "grouped_mm" in name or "grouped_outer" in name:
        if name == "_grouped_mm" and args[0].dim() == args[1].dim() == 2:  # (outputs, rows) and (rows, inputs)
            return int(2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1])
        return _grouped_flops(args, result)
    return 0


def _masked_share(func: Any, args: Any, kwargs: Any) -> float | None:
    """The share of all pairs of an attention that its causal mask leaves out; None of any other operator."""
    if not func.overloadpacket.__name__.startswith("_scaled_dot_product_"):
        return None
    named = {**dict(zip(argument_names(func), args, strict=False)), **kwargs}
    if not named.get("is_causal"):
        return 0.0
    queries, keys = named["query"].shape[-2], named["key"].shape[-2]
    least = min(queries, keys)
    seen = least * (least + 1) // 2 + (queries - least) * keys
    return 1.0 - float(seen / (queries * keys))


def _grouped_flops(args: Any, result: Any) -> int:
    """Of a product of rows with the matrix of their group: each row is multiplied once."""
    first, out = args[0], result if isinstance(result, Tensor) else result[0]
    if out.dim() == 2:  # (rows, inputs) and one matrix a group
        return int(2 * first.shape[0] * first.shape[1] * out.shape[1])
    # (rows, inputs) and (rows, outputs): the gradients of the matrices
    rows = max(first.shape) if first.dim() == 2 else first.shape[0]
    rows = first.shape[0] if first.shape[0] not in out.shape[1:] else rows
    return int(2 * rows * out.shape[-1] * out.shape[-2])
