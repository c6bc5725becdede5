"""Assessment of a layout on a cluster: its figures, whether it fits, and how long a step takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from danling_conf.plan.device_memory import Verdict, verdict_of
from danling_conf.plan.figures import LayoutFigures
from danling_conf.plan.time import StepTime, step_time
from danling_conf.topology.hardware import GIB, Cluster


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """A layout on the devices of a cluster."""

    figures: LayoutFigures
    cluster: Cluster
    verdict: Verdict
    time: StepTime

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        gpu = self.cluster.gpu
        return {
            "gpu": {
                "name": gpu.name,
                "memory_bytes": gpu.memory,
                "peak_flops": dict(gpu.flops),
                "gpus_per_node": self.cluster.gpus_per_node,
                "sources": list(gpu.sources),
            },
            "figures": self.figures.as_json(),
            "verdict": self.verdict.as_json(),
            "time": self.time.as_json(),
        }


def assess(figures: LayoutFigures, cluster: Cluster) -> Assessment:
    """Judge the figures of a layout on a cluster."""
    return Assessment(
        figures=figures, cluster=cluster, verdict=verdict_of(figures, cluster), time=step_time(figures, cluster)
    )


def verdict_line(found: Assessment) -> str:
    """The verdict in one line: what the fullest rank takes, of what the device has."""
    verdict = found.verdict
    return (
        f"{verdict.word}: {gib(verdict.total)} of {gib(verdict.memory)} GiB of {found.cluster.gpu.name}, "
        f"give or take {gib(verdict.band)}"
    )


def memory_lines(found: Assessment) -> list[str]:
    """The verdict, and what the device takes beside a run's tensors: one line a term."""
    verdict = found.verdict
    lines = [verdict_line(found), f"  {'tensors':<14}{gib(verdict.traced):>8} GiB  traced, of the fullest rank"]
    for term in verdict.terms:
        lines.append(f"  {term.name:<14}{gib(term.bytes):>8} GiB  ± {gib(term.band)}, {term.why}")
    return lines


def time_lines(found: Assessment) -> list[str]:
    """A step's time with its parts, and each kind of communication."""
    time, gpu = found.time, found.cluster.gpu
    speed = f", {time.tokens_per_second / _devices(found):,.0f} tokens/s a GPU" if time.tokens_per_second else ""
    arithmetic = f"at {100 * gpu.matmul_efficiency:.0f} % of the peak of {gpu.name}"
    memory = f"at {100 * gpu.hbm_efficiency:.0f} % of the memory's bandwidth"
    lines = [
        f"step {seconds(time.seconds)} ± {100 * time.band:.0f} %, MFU {100 * time.mfu:.1f} %{speed}",
        f"  {'arithmetic':<14}{seconds(time.matmul):>10}  {arithmetic}",
        f"  {'attention':<14}{seconds(time.attention):>10}  at {100 * gpu.attention_efficiency:.0f} % of the peak",
        f"  {'memory-bound':<14}{seconds(time.memory):>10}  {memory}",
        f"  {'communication':<14}{seconds(time.exposed):>10}  that nothing hides",
        f"  {'bubble':<14}{seconds(time.bubble):>10}  of the pipeline",
    ]
    for item in time.passed:
        where = "between nodes" if item.crosses_nodes else "within a node"
        lines.append(
            f"    {item.kind} over {item.axis} ({item.group_size}): {item.count} x "
            f"{gib(item.bytes / max(1, item.count))} GiB, {where}, {seconds(item.seconds)}, exposed "
            f"{seconds(item.exposed)}"
        )
    return lines


def gib(count: float) -> str:
    """Bytes as GiB, without the unit."""
    value = count / GIB
    return f"{value:.1f}" if abs(value) >= 0.95 else f"{value:.2g}"


def seconds(value: float) -> str:
    """A time in a readable unit."""
    if value == 0:
        return "0 s"
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


def _devices(found: Assessment) -> int:
    return sum(rank.ranks for rank in found.figures.ranks)
