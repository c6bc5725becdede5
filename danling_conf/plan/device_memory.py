"""Memory of a device beside a run's tensors, and whether a layout fits.

What the driver, the collectives, cuBLAS and torch's allocator take cannot be traced. Each is a term of its own, with
its band, so that a reader can see how much of a verdict is traced and how much is experience.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from danling_conf.plan.figures import LayoutFigures, RankFigures
from danling_conf.topology.hardware import MIB, Cluster

TRACED_BAND = 0.03
"""Share by which a traced peak may be off."""
_CONTEXT_BAND = 0.4
_COMMUNICATOR = 320 * MIB
"""Of a group of ranks within a node: NCCL's buffers, 4 MiB (NCCL_BUFFSIZE) for each channel, neighbour and protocol."""
_COMMUNICATOR_OVER_NODES = 480 * MIB
_COMMUNICATOR_BAND = 0.6
_ALLOCATOR = 0.15
"""Of what is allocated, where a rank was not traced: blocks of the allocator that no tensor fits into."""
_ALLOCATOR_BAND = 0.5


@dataclass(frozen=True, kw_only=True)
class Term:
    """Something that takes memory."""

    name: str
    bytes: int
    band: int
    """Bytes by which it may be off, either way."""
    outside: bool
    """Whether it is outside of torch's allocator, so that neither `max_memory_allocated` nor `..._reserved` has it."""
    why: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the fullest rank of a layout fits its device."""

    word: str
    """`fits`, `does not fit` or `too close to call`."""
    traced: int
    """Bytes of tensors at the fullest rank's peak."""
    terms: tuple[Term, ...]
    """What the device takes besides."""
    total: int
    """Bytes of all together."""
    band: int
    """Bytes by which the total may be off, either way."""
    memory: int
    """Bytes that the device has."""

    @property
    def reserved(self) -> int:
        """Bytes that torch's allocator takes from the device."""
        return self.traced + sum(term.bytes for term in self.terms if not term.outside)

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**asdict(self), "reserved": self.reserved}


def device_terms(rank: RankFigures, cluster: Cluster) -> tuple[Term, ...]:
    """What a device takes besides the tensors of a rank."""
    gpu = cluster.gpu
    groups = {
        (item.axis, item.group_size): cluster.crosses(item.group_size, item.stride)
        for item in rank.collectives
        if item.group_size > 1
    }
    passing = sum(_COMMUNICATOR_OVER_NODES if crosses else _COMMUNICATOR for crosses in groups.values())
    held = int(_ALLOCATOR * rank.peak_bytes) if rank.unused is None else rank.unused
    # Before torch is out of memory, it gives back the blocks that are free.
    held = min(held, max(0, gpu.memory - gpu.context - passing - gpu.workspace - rank.peak_bytes))
    terms = [
        Term(
            name="context",
            bytes=gpu.context,
            band=int(_CONTEXT_BAND * gpu.context),
            outside=True,
            why="the driver's context and loaded kernels",
        ),
        Term(name="workspaces", bytes=gpu.workspace, band=gpu.workspace, outside=False, why="of cuBLAS"),
        Term(
            name="allocator",
            bytes=held,
            band=int(_ALLOCATOR_BAND * held),
            outside=False,
            why="blocks that are free and that no tensor fits into",
        ),
    ]
    if groups:
        why = f"NCCL's buffers for {len(groups)} group{'' if len(groups) == 1 else 's'} of ranks"
        band = int(_COMMUNICATOR_BAND * passing)
        terms.insert(1, Term(name="communicators", bytes=passing, band=band, outside=True, why=why))
    return tuple(terms)


def verdict_of(figures: LayoutFigures, cluster: Cluster) -> Verdict:
    """Whether the fullest rank of a layout fits."""
    rank = figures.worst
    terms = device_terms(rank, cluster)
    total = rank.peak_bytes + sum(term.bytes for term in terms)
    # Independent of each other: their bands are not all used up at once.
    bands = [TRACED_BAND * rank.peak_bytes, *(term.band for term in terms)]
    band = int(sum(each * each for each in bands) ** 0.5)
    if total + band <= cluster.gpu.memory:
        word = "fits"
    else:
        word = "does not fit" if total - band > cluster.gpu.memory else "too close to call"
    return Verdict(word=word, traced=rank.peak_bytes, terms=terms, total=total, band=band, memory=cluster.gpu.memory)


def stack_of(rank: RankFigures, cluster: Cluster) -> Mapping[str, int]:
    """Bytes of a rank's peak by category, and of what its device takes besides."""
    return {**rank.peak, **{term.name: term.bytes for term in device_terms(rank, cluster)}}
