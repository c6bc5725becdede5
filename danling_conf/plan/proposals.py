"""Proposals: the layouts of a number of GPUs that fit, ranked by the time of a step, and why the first is before the
second."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from danling_conf.config.identity import layout_name
from danling_conf.plan.assessment import assess, gib, seconds
from danling_conf.plan.candidates import Candidate, local_batch, reshards_by_default
from danling_conf.plan.device_memory import Verdict
from danling_conf.plan.figures import LayoutFigures, RankFigures
from danling_conf.plan.time import StepTime
from danling_conf.schema import RunnerConfig
from danling_conf.topology.hardware import Cluster

SHOWN = 10
"""Proposals that are shown."""
_PER_AXIS = 0.01
"""Share of a step's time that a layout must gain for each further axis: what is simpler wins where they are alike."""
_ORDER = ("fits", "too close to call", "does not fit")


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A layout with its settings, and what it takes."""

    candidate: Candidate
    overrides: tuple[str, ...]
    """Of the command line; they replace the configured layout and batch."""
    verdict: Verdict
    time: StepTime
    fullest: RankFigures
    cluster: Cluster
    traced: bool
    """Whether its own layout was traced; else it was derived from the traces of others."""

    @property
    def name(self) -> str:
        return layout_name(self.candidate.layout)

    @property
    def settings_text(self) -> str:
        return " ".join(self.overrides[1:])

    @property
    def key(self) -> tuple[int, float]:
        """Sort key: what fits comes first, then what is fast."""
        degrees = self.candidate.layout.degrees().values()
        axes = sum(degree > 1 for degree in degrees)
        return _ORDER.index(self.verdict.word), self.time.seconds * (1.0 + _PER_AXIS * axes)

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "layout": self.name,
            "overrides": list(self.overrides),
            "traced": self.traced,
            "verdict": self.verdict.as_json(),
            "time": self.time.as_json(),
            "memory": dict(self.fullest.peak),
        }


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """What was found for a number of GPUs."""

    gpus: int
    samples: int
    """Of an optimizer step: the same for all."""
    looked_at: int
    """Candidates, layouts with their settings."""
    ranked: Sequence[Proposal]
    """The best settings of each layout, the best layout first."""
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> Sequence[Proposal]:
        return self.ranked[:SHOWN]

    @property
    def reasons(self) -> list[str]:
        """Why the first is before the second."""
        return [] if len(self.ranked) < 2 else why(self.ranked[0], self.ranked[1])

    def as_json(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "gpus": self.gpus,
            "samples": self.samples,
            "looked_at": self.looked_at,
            "proposals": [item.as_json() for item in self.shown],
            "reasons": self.reasons,
            "notes": list(self.notes),
        }


def proposal_of(
    config: RunnerConfig, candidate: Candidate, figures: LayoutFigures, cluster: Cluster, *, traced: bool
) -> Proposal:
    """A candidate with its figures as a proposal."""
    found = assess(figures, cluster)
    return Proposal(
        candidate=candidate,
        overrides=tuple(overrides_of(config, candidate)),
        verdict=found.verdict,
        time=found.time,
        fullest=figures.worst,
        cluster=cluster,
        traced=traced,
    )


def ranked(proposals: Iterable[Proposal]) -> list[Proposal]:
    """The best settings of each layout, the best layout first."""
    best: dict[str, Proposal] = {}
    for item in proposals:
        known = best.get(item.name)
        if known is None or item.key < known.key:
            best[item.name] = item
    return sorted(best.values(), key=lambda item: item.key)


def overrides_of(config: RunnerConfig, candidate: Candidate) -> list[str]:
    """The overrides of a candidate: its layout, and what differs from the configuration."""
    layout = candidate.layout
    train: Any = vars(config.dataloader).get("train")
    own = (isinstance(train, Mapping) and train.get("batch_size")) or getattr(train, "batch_size", None)
    found = [f"parallel={layout_name(layout)}"]
    if candidate.batch_size != local_batch(config):
        found.append(f"dataloader.{'train.' if own else ''}batch_size={candidate.batch_size}")
    if candidate.accumulation != config.accum_steps:
        found.append(f"accum_steps={candidate.accumulation}")
    if layout.pipeline > 1:
        if candidate.schedule != config.parallel.pipeline_schedule:
            found.append(f"parallel.pipeline_schedule={candidate.schedule}")
        if config.parallel.pipeline_n_microbatches is not None or (
            candidate.microbatch_size != config.parallel.pipeline_microbatch_size
        ):
            found.append(f"parallel.pipeline_n_microbatches={candidate.microbatches}")
    if candidate.checkpointing != config.activation_checkpointing.mode:
        found.append(f"activation_checkpointing.mode={candidate.checkpointing}")
    if config.fsdp.reshard_after_forward is None and layout.fsdp and candidate.reshard != reshards_by_default(layout):
        found.append(f"fsdp.reshard_after_forward={str(candidate.reshard).lower()}")
    return found


def why(first: Proposal, second: Proposal) -> list[str]:
    """Why a proposal is before another one, by the parts of a step's time."""
    if first.verdict.word != second.verdict.word:
        return [f"{first.name}: {first.verdict.word}; {second.name}: {second.verdict.word}"]
    gain = second.time.seconds - first.time.seconds
    parts = {
        "arithmetic": second.time.matmul - first.time.matmul,
        "attention": second.time.attention - first.time.attention,
        "memory-bound operations": second.time.memory - first.time.memory,
        "the pipeline's bubble": second.time.bubble - first.time.bubble,
        **_by_axis(first.time, second.time),
    }
    ordered = sorted(parts.items(), key=lambda item: -abs(item[1]))
    said = [
        f"{seconds(abs(value))} {'less' if value > 0 else 'more'} {name}"
        for name, value in ordered[:3]
        if abs(value) > 0.05 * abs(gain) and value
    ]
    share = gain / second.time.seconds if second.time.seconds else 0.0
    if gain < 0:
        head = f"{first.name} is {-100 * share:.1f} % slower than {second.name}, and has fewer axes"
    else:
        head = f"{first.name} is {100 * share:.1f} % faster than {second.name}"
    if abs(share) < min(first.time.band, second.time.band) / 5:
        head += ", less than such an estimate can tell: run both"
    memory = first.verdict.total - second.verdict.total
    lines = [head + (": " + ", ".join(said) if said else "")]
    if memory:
        lines.append(f"it takes {gib(abs(memory))} GiB {'more' if memory > 0 else 'less'} of the fullest device")
    return lines


def _by_axis(first: StepTime, second: StepTime) -> dict[str, float]:
    """Exposed communication by axis that the second has more than the first."""
    found: dict[str, float] = {}
    for time, sign in ((second, 1.0), (first, -1.0)):
        for item in time.passed:
            name = f"communication over {item.axis}"
            found[name] = found.get(name, 0.0) + sign * item.exposed
    return found
