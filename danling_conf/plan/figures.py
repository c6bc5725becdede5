"""Figures of a layout: what the engine measured, for those who show, time and compare it.

The engine traces with torch; whoever reads figures (the command line, a page, a sweep's check) does without. So they
are plain data, and go through JSON and back unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

PARAMETERS = "parameters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
ACTIVATIONS = "activations"
GATHERED = "gathered"
TEMPORARIES = "temporaries"
BUFFERS = "buffers"
BATCH = "batch"

CATEGORIES = {
    PARAMETERS: "the rank's share of the weights",
    GRADIENTS: "their gradients, as they are kept until the optimizer's step",
    OPTIMIZER: "what the optimizer keeps between steps",
    ACTIVATIONS: "what forward saved for backward",
    GATHERED: "weights gathered for a block, and gradients before they are reduced",
    TEMPORARIES: "what an operation needs while it runs",
    BUFFERS: "the model's buffers",
    BATCH: "inputs and labels of a step",
}
"""Categories of memory, each with what it holds."""

ATTENTION = "attention"
MASKED = "masked"
"""Work beside matrix products, behind a data type: `bfloat16 attention`. What is masked is counted as attention by MFU
and by torch's counter, and no kernel does it: the half of all pairs that a causal mask leaves out."""

COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "send_recv")
"""Kinds of collectives."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind over one axis, in one step of one rank."""

    kind: str
    """One of `COLLECTIVES`."""

    axis: str
    """Axis of the layout, or several joined by `+` (`replicate+shard`); `world` where it is all ranks."""

    count: int
    """Calls a step."""

    bytes: int
    """Bytes of the full, unsharded tensor, summed over the calls: of an all-gather's output, of the input of
    a reduce-scatter, an all-reduce, an all-to-all, a broadcast or a send."""

    group_size: int
    """Ranks that take part."""

    stride: int = 1
    """Distance of neighbours in the group, in ranks. A group lies within a node where `group_size * stride` is at
    most the GPUs of a node."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """Memory at one moment of a step."""

    name: str
    """What ran: `forward layers.0`, `backward layers.0`, `optimizer`."""

    memory: Mapping[str, int]
    """Bytes by category."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.memory.values())


@dataclasses.dataclass(frozen=True)
class RankFigures:
    """One step of one rank; it stands for all ranks that do the same."""

    coordinates: Mapping[str, int]
    """Place on each axis of the layout."""

    rank: int
    """Rank that was traced."""

    ranks: int
    """How many ranks it stands for."""

    stages: tuple[int, ...]
    """Pipeline stages that it holds; `(0,)` without a pipeline."""

    peak: Mapping[str, int]
    """Bytes by category at the moment with the most bytes in all."""

    peak_moment: str
    """Name of that moment."""

    moments: tuple[Moment, ...]
    """Time line of the step, in order."""

    collectives: tuple[Collective, ...]
    """Of a step: all microbatches and accumulated batches, and the optimizer's."""

    flops: Mapping[str, int]
    """Floating point operations a step, recomputation included: of matrix products by data type of the operands
    (`bfloat16`), and apart from them of attention (`bfloat16 attention`, `bfloat16 masked`)."""

    recomputed_flops: int
    """How many of them recompute what activation checkpointing did not keep: not counted by MFU."""

    hbm_bytes: int
    """Bytes that the step's operations read and write, each counted alone: for a roofline."""

    unused: int | None = None
    """Bytes that torch's allocator holds beyond the peak, in blocks that nothing fits into; None where not traced."""

    notes: tuple[str, ...] = ()
    """What could not be traced, and the fallback that was used."""

    @property
    def peak_bytes(self) -> int:
        """Bytes in all at the peak."""
        return sum(self.peak.values())


@dataclasses.dataclass(frozen=True)
class LayoutFigures:
    """One step of a layout."""

    layout: str
    """Its name: `fsdp64_tp8_pp2`."""

    degrees: Mapping[str, int]
    """Ranks on each axis, those of one rank included."""

    ranks: tuple[RankFigures, ...]
    """One for each kind of rank: by pipeline stage."""

    microbatches: int
    """Microbatches that a pipeline cuts a batch into; 1 without a pipeline."""

    accumulation: int
    """Batches whose gradients are summed for a step."""

    samples: int
    """Samples a step, of all ranks."""

    tokens: int
    """Tokens a step, of all ranks; 0 where the model reads no tokens."""

    parameters: int
    """Parameters of the whole model."""

    settings: Mapping[str, Any]
    """Settings that decide about memory and time and differ between plans: activation checkpointing, precision,
    schedule, compile."""

    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """What limits the degrees, as far as known: `blocks`, `experts`, `heads`, `key_value_heads`, `width`,
    `sequence`."""

    notes: tuple[str, ...] = ()
    """What holds for all ranks: what could not be traced, the worst case of a router."""

    @property
    def worst(self) -> RankFigures:
        """The rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> LayoutFigures:
        """What `as_json` returned, as an object again."""
        ranks = tuple(
            RankFigures(
                **{
                    **rank,
                    "stages": tuple(rank["stages"]),
                    "moments": tuple(Moment(**moment) for moment in rank["moments"]),
                    "collectives": tuple(Collective(**collective) for collective in rank["collectives"]),
                    "notes": tuple(rank["notes"]),
                }
            )
            for rank in values["ranks"]
        )
        return LayoutFigures(**{**values, "ranks": ranks, "notes": tuple(values["notes"])})
