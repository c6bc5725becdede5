"""Time of a step: computation by a roofline, communication that nothing hides, and the pipeline's bubble.

What is assumed stands in the parts that are returned, so that a reader can replace any of them. A plan ranks layouts;
its seconds have the error band of `BAND`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from danling_conf.plan import links
from danling_conf.plan.figures import ATTENTION, MASKED, Collective, LayoutFigures, RankFigures
from danling_conf.schema.parallel import MULTI_STAGE_SCHEDULES, SPLIT_BACKWARD_SCHEDULES, V_SCHEDULES
from danling_conf.topology.hardware import Cluster

BAND = 0.25
"""Share by which a step's time may be off, either way."""
HIDING = 0.85
"""Share of the computation that can hide communication beside it: kernels take turns, and share the memory."""
_BACKWARD = 2 / 3
"""Share of the computation that is backward, beside which gradients are reduced."""
_PREFETCHED = ("all_gather", "reduce_scatter", "all_reduce")
_DATA = frozenset(("replicate", "shard", "context", "expert_shard"))
"""Axes of weights and gradients. Tensor, context and expert axes pass activations, which the next operation needs."""


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What a kind of collective over an axis costs in a step."""

    kind: str
    axis: str
    count: int
    bytes: int
    group_size: int
    crosses_nodes: bool
    seconds: float
    exposed: float
    """Of these seconds, how many the device waits."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """An optimizer step of a layout, by the rank that takes longest."""

    seconds: float
    matmul: float
    """Seconds of matrix products."""
    attention: float
    """Seconds of attention, between the pairs that see each other."""
    memory: float
    """Seconds of operations that are limited by memory: norms, activations, the optimizer."""
    exposed: float
    """Seconds that the device waits for communication."""
    bubble: float
    """Seconds that a pipeline's rank waits for its first and last microbatches."""
    mfu: float
    """Model FLOPs utilisation: FLOPs that the model itself needs, of what the devices could do in that time."""
    tokens_per_second: float
    """Of all devices; 0 where the model reads no tokens."""
    samples_per_second: float
    passed: tuple[Passed, ...]
    band: float = BAND

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def step_time(figures: LayoutFigures, cluster: Cluster) -> StepTime:
    """Estimate an optimizer step of a layout on a cluster."""
    busy = max((_of_rank(rank, figures, cluster) for rank in figures.ranks), key=lambda work: work.total)
    ranks, waits = figures.degrees.get("pipeline", 1), 0.0
    if ranks > 1:
        stages = max(len(rank.stages) for rank in figures.ranks)
        waits = bubble_share(figures.settings["pipeline_schedule"], ranks, figures.microbatches, stages)
    # Weights and gradients are passed once a step, outside of the pipeline's turns.
    turns = busy.computing + sum(item.exposed for item in busy.passed if not _of_weights(item.axis))
    bubble = waits * turns
    total = busy.total + bubble
    devices = sum(rank.ranks for rank in figures.ranks)
    needed = sum(rank.ranks * _model_share(rank, cluster, figures.settings) for rank in figures.ranks)
    return StepTime(
        seconds=total,
        matmul=busy.matmul,
        attention=busy.attention,
        memory=busy.memory,
        exposed=busy.exposed,
        bubble=bubble,
        mfu=needed / (devices * total) if total else 0.0,
        tokens_per_second=figures.tokens / total if total else 0.0,
        samples_per_second=figures.samples / total if total else 0.0,
        passed=busy.passed,
    )


@dataclass(frozen=True)
class _Work:
    """What a rank does in a step, in seconds."""

    matmul: float
    attention: float
    memory: float
    passed: tuple[Passed, ...]

    @property
    def computing(self) -> float:
        return self.matmul + self.attention + self.memory

    @property
    def exposed(self) -> float:
        return sum(item.exposed for item in self.passed)

    @property
    def total(self) -> float:
        return self.computing + self.exposed


def bubble_share(schedule: str, ranks: int, microbatches: int, stages: int) -> float:
    """Time that a rank of a pipeline waits, as a share of the time that it works.

    (p - 1) / m of p ranks and m microbatches for GPipe and 1F1B, and with v stages a rank 1 / v of that (Narayanan et
    al., https://arxiv.org/abs/2104.04473, section 2.2). A schedule that computes the gradients of weights by themselves
    fills two thirds of it with them (Qi et al., https://arxiv.org/abs/2401.10241), and in a V nearly all: a tenth is
    left for stages that are not equal.
    """
    if ranks <= 1:
        return 0.0
    share = (ranks - 1) / max(1, microbatches)
    if schedule in V_SCHEDULES:
        return share / 10
    if schedule in MULTI_STAGE_SCHEDULES:
        share /= max(1, stages)
    return share / 3 if schedule in SPLIT_BACKWARD_SCHEDULES else share


def _of_rank(rank: RankFigures, figures: LayoutFigures, cluster: Cluster) -> _Work:
    gpu = cluster.gpu
    matmul = attention = 0.0
    for kind, flops in rank.flops.items():
        dtype, _, what = kind.partition(" ")
        if what == ATTENTION:
            attention += flops / (gpu.peak(dtype) * gpu.attention_efficiency)
        elif what != MASKED:
            matmul += flops / (gpu.peak(dtype) * gpu.matmul_efficiency)
    memory = rank.hbm_bytes / (gpu.hbm * gpu.hbm_efficiency)
    passed = _passed(rank.collectives, matmul + attention + memory, figures, cluster)
    return _Work(matmul, attention, memory, passed)


def _passed(
    collectives: tuple[Collective, ...], computing: float, figures: LayoutFigures, cluster: Cluster
) -> tuple[Passed, ...]:
    times = [links.seconds(item, cluster) for item in collectives]
    exposed = list(times)
    hidden = [place for place, item in enumerate(collectives) if _is_prefetched(item)]
    among = sum(times[place] for place in hidden)
    if among:
        gathers = any(collectives[place].kind == "all_gather" for place in hidden)
        beside = HIDING * computing * (1.0 if gathers else _BACKWARD)
        # The first block's weights and the last block's gradients have nothing beside them.
        ends = sum(times[place] / collectives[place].count * figures.accumulation for place in hidden)
        share = min(1.0, max(0.0, among - beside, ends) / among)
        for place in hidden:
            exposed[place] = times[place] * share
    return tuple(
        Passed(
            kind=item.kind,
            axis=item.axis,
            count=item.count,
            bytes=item.bytes,
            group_size=item.group_size,
            crosses_nodes=cluster.crosses(item.group_size, item.stride),
            seconds=time,
            exposed=waited,
        )
        for item, time, waited in zip(collectives, times, exposed, strict=True)
    )


def _is_prefetched(item: Collective) -> bool:
    return item.kind in _PREFETCHED and _of_weights(item.axis)


def _of_weights(axis: str) -> bool:
    """Whether weights and gradients are passed over an axis. The context axis alone passes keys and values."""
    names = set(axis.split("+"))
    return names <= _DATA and names != {"context"}


def _model_share(rank: RankFigures, cluster: Cluster, settings: Mapping[str, Any]) -> float:
    """Seconds that a rank's own FLOPs would take at the device's peak, without what is computed again."""
    total = sum(rank.flops.values())
    needed = 1.0 - rank.recomputed_flops / total if total else 0.0
    return needed * sum(flops / cluster.gpu.peak(kind.partition(" ")[0]) for kind, flops in rank.flops.items())
