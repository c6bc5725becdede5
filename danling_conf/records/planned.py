"""Plan of a run, as it stands in the run's file: peaks of memory and the time of a step, before they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from danling_conf.records.reading import Fields, is_number, read_fields, read_json
from danling_conf.schema.files import RUN_FILE, write_whole

KEY = "plan"
"""In a run's file."""
TOLERANCE = 0.10
"""Share of a planned value that a run may go beyond it without a word."""
_LEAST = 0.001
"""Share of the peak below which a category is not shown."""


@dataclass(frozen=True, kw_only=True)
class PlannedRank:
    """What was planned for the ranks of a pipeline's stage; without a pipeline, for all."""

    pipeline: int
    """Coordinate on the pipeline axis."""
    peak_bytes: int
    """Of tensors."""
    peak_moment: str
    memory: Mapping[str, int]
    """Bytes by category at that moment."""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """The plan of a run."""

    layout: str
    gpu: str | None
    """None where only memory was planned."""
    step_seconds: float | None
    mfu: float | None
    ranks: Sequence[PlannedRank]
    ways: Sequence[str]
    """What would need less memory, the cheapest first, each with what it saves."""

    @property
    def peak_bytes(self) -> int:
        """Of the fullest rank."""
        return self.of_fullest.peak_bytes

    def rank_at(self, pipeline: int) -> PlannedRank:
        """The plan of a rank by its coordinate on the pipeline axis."""
        return next((rank for rank in self.ranks if rank.pipeline == pipeline), self.ranks[0])

    @property
    def of_fullest(self) -> PlannedRank:
        """Of the rank with the highest peak."""
        return max(self.ranks, key=lambda rank: rank.peak_bytes)


def breakdown_of(rank: PlannedRank) -> list[str]:
    """Lines that say what was planned to hold a rank's memory; what is next to nothing is left out."""
    held = sorted(rank.memory.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} {memory_text(value)}" for name, value in held if value >= _LEAST * rank.peak_bytes)
    return [f"planned: {memory_text(rank.peak_bytes)} at {rank.peak_moment}: {shown}"]


def write_plan(run: Path, plan: PlannedRun) -> None:
    """Add a plan to a run's file. Raises OSError."""
    content = read_json(run / RUN_FILE)
    if content:
        write_whole(run / RUN_FILE, json.dumps({**content, KEY: asdict(plan)}, indent=1) + "\n")


def read_plan(run: Path) -> PlannedRun | None:
    """The plan in a run's file; None where there is none, or it is damaged."""
    found = read_fields(run / RUN_FILE).table(KEY)
    ranks = found.values.get("ranks")
    given = ranks if isinstance(ranks, list) else []
    known = [_rank(Fields(found.path, item)) for item in given if isinstance(item, dict)]
    if not known:
        return None
    return PlannedRun(
        layout=found.text("layout") or "?",
        gpu=found.text("gpu"),
        step_seconds=found.number("step_seconds"),
        mfu=found.number("mfu"),
        ranks=known,
        ways=found.texts("ways"),
    )


def _rank(found: Fields) -> PlannedRank:
    memory = found.table("memory").values
    return PlannedRank(
        pipeline=found.integer("pipeline") or 0,
        peak_bytes=found.integer("peak_bytes") or 0,
        peak_moment=found.text("peak_moment") or "?",
        memory={name: int(value) for name, value in memory.items() if is_number(value)},
    )


def plan_of_json(content: Mapping[str, Any]) -> PlannedRun:
    """The part of `danling-conf plan --json` that is kept with a run. Raises KeyError or TypeError for other JSON."""
    figures, time = content["figures"], content.get("time")
    gpu = content.get("gpu")
    return PlannedRun(
        layout=figures["layout"],
        gpu=None if gpu is None else gpu["name"],
        step_seconds=None if time is None else time["seconds"],
        mfu=None if time is None else time["mfu"],
        ranks=[
            PlannedRank(
                pipeline=rank["coordinates"].get("pipeline", 0),
                peak_bytes=sum(rank["peak"].values()),
                peak_moment=rank["peak_moment"],
                memory=dict(rank["peak"]),
            )
            for rank in figures["ranks"]
        ],
        ways=[str(way) for way in content.get("ways", ())],
    )


def memory_text(count: float) -> str:
    """Bytes in the unit that a device's memory is told in: 1.5 GiB; MiB below one tenth of it."""
    gib = count / (1 << 30)
    return f"{gib:.3g} GiB" if gib >= 0.1 else f"{1024 * gib:.3g} MiB"
