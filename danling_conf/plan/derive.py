"""Figures of a layout derived from a few traces, for the thousands of layouts that nobody has time to trace.

A model is traced with two and with four blocks, under a few tensor degrees and modes of activation checkpointing. The
difference is what two blocks take, the rest is what the model takes around its blocks. Weights, gradients and optimizer
states are divided by the ranks that share them, activations and arithmetic multiplied by samples, and a pipeline's
stages have their share of the blocks.

What is shown in the end is traced again (`proposals`), so that a shortcut here costs a rank in the list, not its truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from danling_conf.groups.layout_names import name_of
from danling_conf.plan.candidates import Candidate
from danling_conf.plan.figures import (
    ACTIVATIONS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    TEMPORARIES,
    Collective,
    LayoutFigures,
    RankFigures,
)
from danling_conf.schema.parallel import V_SCHEDULES

FEW, MORE = 2, 3
"""Blocks of the two models that are traced."""
_OPTIMIZER_PASSES = 8
"""Times that an optimizer reads or writes each of a parameter, its gradient and its states, in all."""
_ACTIVATION_AXES = ("tensor", "context", "expert", "expert_tensor")


@dataclass(frozen=True)
class Share:
    """What a part of a model takes: one block, or all that is around the blocks. For one sample, where it depends."""

    parameters: float = 0.0
    """Bytes of weights before they are sharded over data ranks, in the dtype that they are kept in."""
    optimizer: float = 0.0
    """Bytes of optimizer states, likewise."""
    gathered: float = 0.0
    """Bytes of weights as they are gathered for computation."""
    activations: float = 0.0
    temporaries: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict)
    recomputed: float = 0.0
    traffic: float = 0.0
    """Bytes that operations read and write."""
    passed: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """By kind and axis of collectives of activations: calls, which do not depend on samples, and bytes."""


@dataclass(frozen=True)
class Costs:
    """What a model takes under one tensor degree, context degree and mode of activation checkpointing."""

    block: Share
    around: Share
    boundary: float
    """Bytes of a sample that a block passes to the next."""


def costs_of(few: LayoutFigures, more: LayoutFigures) -> Costs:
    """Costs by the figures of a model with `FEW` and with `MORE` blocks, on one pipeline stage. A model that has not so
    many is the same both times, and all of it counts as what is around its blocks."""
    less, full = _share(few), _share(more)
    had = few.dims.get("blocks", FEW)
    more_of_them = more.dims.get("blocks", MORE) - had
    block = _scaled(_minus(full, less), 1.0 / more_of_them) if more_of_them else Share()
    around = _minus(less, _scaled(block, had))
    boundary = max(
        (size / max(1.0, calls) for (kind, axis), (calls, size) in less.passed.items() if axis == "tensor"), default=0.0
    )
    return Costs(block=block, around=around, boundary=boundary)


def _share(figures: LayoutFigures) -> Share:
    rank = figures.worst
    data = math.prod(figures.degrees.get(axis, 1) for axis in ("shard", "context"))
    samples = figures.samples / figures.degrees.get("replicate", 1) / figures.degrees.get("shard", 1)
    passed: dict[tuple[str, str], tuple[float, float]] = {}
    gathered = 0.0
    for item in rank.collectives:
        if set(item.axis.split("+")) <= set(_ACTIVATION_AXES) and not _of_weights(item, figures):
            calls, size = passed.get((item.kind, item.axis), (0.0, 0.0))
            passed[item.kind, item.axis] = (calls + item.count, size + item.bytes / samples)
        elif item.kind == "all_gather":
            gathered += item.bytes
    parameters = float(rank.peak.get(PARAMETERS, 0) * data)
    # Blocks are gathered for forward and again for backward, what is around them once.
    return Share(
        parameters=parameters,
        optimizer=float(rank.peak.get(OPTIMIZER, 0) * data),
        gathered=gathered,
        activations=rank.peak.get(ACTIVATIONS, 0) / samples,
        temporaries=rank.peak.get(TEMPORARIES, 0) / samples,
        flops={dtype: flops / samples for dtype, flops in rank.flops.items()},
        recomputed=rank.recomputed_flops / samples,
        traffic=rank.hbm_bytes / samples,
        passed=passed,
    )


def _of_weights(item: Collective, figures: LayoutFigures) -> bool:
    return item.axis == "context" and figures.degrees.get("shard", 1) == 1 and item.kind == "reduce_scatter"


def _joined(first: Share, second: Share, combine: Callable[[float, float], float]) -> Share:
    return Share(
        parameters=combine(first.parameters, second.parameters),
        optimizer=combine(first.optimizer, second.optimizer),
        gathered=combine(first.gathered, second.gathered),
        activations=combine(first.activations, second.activations),
        temporaries=combine(first.temporaries, second.temporaries),
        flops={
            dtype: combine(first.flops.get(dtype, 0.0), second.flops.get(dtype, 0.0))
            for dtype in dict.fromkeys([*first.flops, *second.flops])
        },
        recomputed=combine(first.recomputed, second.recomputed),
        traffic=combine(first.traffic, second.traffic),
        passed={
            key: (
                combine(first.passed.get(key, (0.0, 0.0))[0], second.passed.get(key, (0.0, 0.0))[0]),
                combine(first.passed.get(key, (0.0, 0.0))[1], second.passed.get(key, (0.0, 0.0))[1]),
            )
            for key in dict.fromkeys([*first.passed, *second.passed])
        },
    )


def _minus(first: Share, second: Share) -> Share:
    return _joined(first, second, lambda a, b: max(0.0, a - b))


def _scaled(share: Share, factor: float) -> Share:
    return _joined(share, Share(), lambda a, _: a * factor)


def between(low: Costs, high: Costs, degrees: tuple[int, int], degree: int) -> Costs:
    """Costs under a tensor degree between or beyond two that were traced: what is split over it is proportional to
    1 / degree, and the rest constant. Where that would make the rest negative, all is proportional."""
    first, second = degrees
    weight = (1 / degree - 1 / second) / (1 / first - 1 / second)

    def mix(a: float, b: float) -> float:
        if a > b * second / first:
            return b * second / degree
        return max(0.0, weight * a + (1.0 - weight) * b)

    return Costs(
        block=_joined(low.block, high.block, mix),
        around=_joined(low.around, high.around, mix),
        boundary=mix(low.boundary, high.boundary),
    )


def crossed(first: Costs, second: Costs, neither: Costs, degree: int) -> Costs:
    """Costs under two changes at once (a tensor degree; a context degree or a mode of activation checkpointing), from
    those under either alone: each changes what the other leaves by the same factor.

    Args:
        degree: the tensor degree of the first, which divides what context ranks pass to each other.
    """

    def join(split: Share, along: Share, whole: Share) -> Share:
        def ratio(a: float, b: float, c: float) -> float:
            return a * b / c if c else a

        passed = {key: value for key, value in along.passed.items() if key not in split.passed}
        share = ratio(1.0, along.activations, whole.activations)
        return Share(
            parameters=split.parameters,
            optimizer=split.optimizer,
            gathered=split.gathered,
            activations=split.activations * share,
            temporaries=ratio(split.temporaries, along.temporaries, whole.temporaries),
            flops={
                dtype: ratio(value, along.flops.get(dtype, 0.0), whole.flops.get(dtype, 0.0))
                for dtype, value in split.flops.items()
            },
            recomputed=ratio(split.recomputed, along.recomputed, whole.recomputed),
            traffic=ratio(split.traffic, along.traffic, whole.traffic),
            passed={
                **{key: (calls, size * share) for key, (calls, size) in split.passed.items()},
                **{key: (calls, size / degree) for key, (calls, size) in passed.items()},
            },
        )

    return Costs(
        block=join(first.block, second.block, neither.block),
        around=join(first.around, second.around, neither.around),
        boundary=first.boundary,
    )


def derived(candidate: Candidate, costs: Costs, like: LayoutFigures, *, blocks: int, samples: int) -> LayoutFigures:
    """Figures of a candidate.

    Args:
        costs: under its tensor and context degrees and its mode of activation checkpointing.
        like: of a trace, for what all layouts have in common.
        blocks: of the whole model.
        samples: of an optimizer step.
    """
    layout = candidate.layout
    stages = [0] if layout.pipeline == 1 else [0, layout.pipeline - 1]
    return LayoutFigures(
        layout=name_of(layout),
        degrees=layout.degrees(),
        ranks=tuple(_rank(candidate, costs, stage, blocks, len(stages)) for stage in stages),
        microbatches=candidate.microbatches if layout.pipeline > 1 else 1,
        accumulation=candidate.accumulation,
        samples=samples,
        tokens=like.tokens // max(1, like.samples) * samples,
        parameters=like.parameters,
        settings={
            **like.settings,
            "activation_checkpointing": candidate.checkpointing,
            "pipeline_schedule": candidate.schedule,
        },
        dims=like.dims,
    )


def _rank(candidate: Candidate, costs: Costs, stage: int, blocks: int, kinds: int) -> RankFigures:
    layout = candidate.layout
    held = math.ceil(blocks / layout.pipeline)
    # Embedding and head are on the outer stages; alone they are about half of what is around the blocks each.
    share = 1.0 if layout.pipeline == 1 else 0.5
    sharing = layout.shard * layout.context if layout.fsdp else 1
    kept = costs.block.parameters * held + costs.around.parameters * share
    states = costs.block.optimizer * held + costs.around.optimizer * share
    # Blocks are gathered for forward and again for backward.
    computed = costs.block.gathered / 2
    weights = computed * held + costs.around.gathered * share
    passes = candidate.batch_size * candidate.accumulation  # samples of this rank a step
    turns = candidate.microbatches * candidate.accumulation if layout.pipeline > 1 else candidate.accumulation
    size = candidate.microbatch_size
    memory = {
        PARAMETERS: int(kept / sharing),
        OPTIMIZER: int(states / sharing),
        ACTIVATIONS: int(size * _in_flight(candidate, stage, held) * costs.block.activations)
        + int(size * costs.around.activations * (1.0 if stage == layout.pipeline - 1 else 0.1)),
        TEMPORARIES: int(size * (costs.around.temporaries if stage == layout.pipeline - 1 else 0.0))
        + int(size * costs.block.temporaries * (0.0 if costs.around.temporaries else 1.0)),
        GATHERED: int(weights if not candidate.reshard else 2 * computed + costs.around.gathered * share)
        if layout.fsdp
        else 0,
        # Of several batches or microbatches, gradients stay whole until the last one.
        GRADIENTS: int(weights * 2 if turns > 1 and layout.fsdp else kept / sharing if turns > 1 else 0.0),
    }
    if not layout.fsdp:
        memory[GRADIENTS] = int(kept)
    collectives = [
        *_of_data(candidate, weights, computed, held, turns),
        *_of_activations(candidate, costs, held, share),
    ]
    flops: dict[str, int] = {}
    for dtype in dict.fromkeys([*costs.block.flops, *costs.around.flops]):
        each = costs.block.flops.get(dtype, 0.0) * held + costs.around.flops.get(dtype, 0.0) * (
            1.0 if stage == layout.pipeline - 1 else 0.0
        )
        flops[dtype] = int(each * passes)
    traffic = (costs.block.traffic * held + costs.around.traffic * share) * passes
    traffic += _OPTIMIZER_PASSES * kept / sharing
    return RankFigures(
        coordinates={"pipeline": stage},
        rank=0,
        ranks=layout.world_size // kinds,
        stages=tuple(range(candidate.stages_per_rank)) if layout.pipeline > 1 else (0,),
        peak=memory,
        peak_moment="derived",
        moments=(),
        collectives=tuple(collectives),
        flops=flops,
        recomputed_flops=int(costs.block.recomputed * held * passes),
        hbm_bytes=int(traffic),
    )


def _in_flight(candidate: Candidate, stage: int, held: int) -> float:
    """Blocks whose activations a rank holds at once, of a microbatch each."""
    layout, count = candidate.layout, candidate.microbatches
    if layout.pipeline == 1:
        return held
    ranks = layout.pipeline
    if candidate.schedule == "GPipe":
        return held * count
    if candidate.schedule == "1F1B":
        return held * min(count, ranks - stage)
    if candidate.schedule in V_SCHEDULES:
        return held * min(count, ranks + 0.5)
    chunks = candidate.stages_per_rank
    if candidate.schedule == "LoopedBFS":
        return held * count
    warm = 2 * (ranks - stage - 1) + (chunks - 1) * ranks + 1
    return held / chunks * min(count * chunks, warm)


def _of_data(candidate: Candidate, weights: float, block: float, held: int, turns: int) -> Iterable[Collective]:
    """Collectives of weights and gradients."""
    layout = candidate.layout
    inner = layout.tensor
    sharing = layout.shard * layout.context
    names = [axis for axis in ("shard", "context") if getattr(layout, axis) > 1]
    if layout.fsdp and sharing > 1:
        axis = "+".join(names)
        again = 2 if candidate.reshard else 1
        times = turns if candidate.reshard else 1
        yield Collective("all_gather", axis, (held * again + 1) * times, int(weights * again * times), sharing, inner)
        yield Collective("reduce_scatter", axis, held + 1, int(2 * weights), sharing, inner)
    if layout.replicate > 1:
        share = sharing if layout.fsdp else 1
        yield Collective(
            "all_reduce", "replicate", held + 1, int(2 * weights / share), layout.replicate, inner * sharing
        )


def _of_activations(candidate: Candidate, costs: Costs, held: int, share: float) -> Iterable[Collective]:
    layout = candidate.layout
    samples = candidate.batch_size * candidate.accumulation
    turns = samples // candidate.microbatch_size
    strides = {"tensor": 1, "context": layout.tensor, "expert": 1, "expert_tensor": 1}
    for key in dict.fromkeys([*costs.block.passed, *costs.around.passed]):
        kind, axis = key
        calls = costs.block.passed.get(key, (0.0, 0.0))[0] * held + costs.around.passed.get(key, (0.0, 0.0))[0] * share
        size = costs.block.passed.get(key, (0.0, 0.0))[1] * held + costs.around.passed.get(key, (0.0, 0.0))[1] * share
        degree = getattr(layout, axis, 1)
        if degree > 1:
            yield Collective(kind, axis, int(calls * turns), int(size * samples), degree, strides.get(axis, 1))
    if layout.pipeline > 1:
        stride = layout.world_size // layout.pipeline
        chunks = candidate.stages_per_rank
        # An activation forth and a gradient back for each microbatch and stage.
        yield Collective(
            "send_recv",
            "pipeline",
            2 * turns * chunks,
            int(2 * samples * chunks * costs.boundary),
            layout.pipeline,
            stride,
        )
