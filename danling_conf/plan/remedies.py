"""Remedies: settings that would need less memory, each planned anew, with what it saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from danling_conf.components import dataloader as loaders
from danling_conf.plan.engine import figures_of
from danling_conf.plan.figures import LayoutFigures
from danling_conf.plan.trace import Subject
from danling_conf.schema import RunnerConfig
from danling_conf.schema.fsdp import OffloadPolicyConfig
from danling_conf.topology.layout import layout_of
from danling_conf.topology.violation import ConfigRefused, SettingError

_BF16 = "bf16 arithmetic, twice as fast"
_CHEAP_TWICE = "cheap operators run twice"
_SMALLER = "smaller matrix products"
_GATHERED = "weights are gathered more often"
_FORWARD_TWICE = "forward runs twice"
_COPIES = "copies from and to the host in each step"
_BY_PRICE = (_BF16, _CHEAP_TWICE, _SMALLER, _GATHERED, _FORWARD_TWICE, _COPIES)
_WORTH = 0.05
"""Share of the peak below which a way out is none."""


@dataclass(frozen=True)
class Remedy:
    """Overrides to add to a command line, and what they save."""

    overrides: str
    saves: int
    """Bytes of the fullest rank's peak."""
    costs: str
    """What they cost in return."""


def remedies_of(subject: Subject, figures: LayoutFigures) -> list[Remedy]:
    """What would need less memory, in the order of what it saves. What the layout refuses is left out."""
    found = []
    peak, place = figures.worst.peak_bytes, figures.worst.coordinates["pipeline"]
    for overrides, config, batch, costs in _candidates(subject):
        try:
            other = figures_of(replace(subject, config=config, batch=batch), places=[place])
        except (SettingError, ConfigRefused):  # this layout does not take it
            continue
        saved = peak - next(rank for rank in other.ranks if rank.coordinates["pipeline"] == place).peak_bytes
        if saved > peak // 200:
            found.append(Remedy(overrides, saved, costs))
    return sorted(found, key=lambda remedy: -remedy.saves)


def cheapest_first(remedies: Sequence[Remedy], peak: int) -> list[Remedy]:
    """Remedies in the order of what they cost; those that save next to nothing of a peak come last."""
    return sorted(remedies, key=lambda item: (item.saves < _WORTH * peak, _BY_PRICE.index(item.costs)))


def _candidates(subject: Subject) -> Iterator[tuple[str, RunnerConfig, Any, str]]:
    config = subject.config
    mode = config.activation_checkpointing.mode

    def with_mode(name: str) -> RunnerConfig:
        return replace(config, activation_checkpointing=replace(config.activation_checkpointing, mode=name))

    if mode == "none":
        yield (
            "activation_checkpointing.mode=selective",
            with_mode("selective"),
            subject.batch,
            _CHEAP_TWICE,
        )
    if mode != "full":
        yield "activation_checkpointing.mode=full", with_mode("full"), subject.batch, _FORWARD_TWICE
    if config.precision in (None, "fp32") and config.fsdp.mp_policy is None:
        yield "precision=bf16", replace(config, precision="bf16"), subject.batch, _BF16
    yield from _of_fsdp(subject)
    yield from _of_batch(subject)


def _of_fsdp(subject: Subject) -> Iterator[tuple[str, RunnerConfig, Any, str]]:
    config = subject.config
    layout = layout_of(config)
    if not config.fsdp.enabled:
        return
    kept = config.fsdp.reshard_after_forward is False
    if kept or (config.fsdp.reshard_after_forward is None and layout.pipeline > 1):
        fsdp = replace(config.fsdp, reshard_after_forward=True)
        yield (
            "fsdp.reshard_after_forward=true",
            replace(config, fsdp=fsdp),
            subject.batch,
            _GATHERED,
        )
    if config.fsdp.offload_policy is None:
        fsdp = replace(config.fsdp, offload_policy=OffloadPolicyConfig(enabled=True))
        yield (
            "fsdp.offload_policy.enabled=true",
            replace(config, fsdp=fsdp),
            subject.batch,
            _COPIES,
        )


def _of_batch(subject: Subject) -> Iterator[tuple[str, RunnerConfig, Any, str]]:
    """The same samples a step, fewer of them at a time."""
    config, size = subject.config, loaders.settings_for(subject.config.dataloader, "train").batch_size or 1
    section = config.parallel
    if layout_of(config).pipeline > 1:
        smaller = section.pipeline_microbatch_size // 2
        if section.pipeline_n_microbatches is None and smaller:
            parallel = replace(section, pipeline_microbatch_size=smaller)
            changed = replace(config, parallel=parallel)
            yield f"parallel.pipeline_microbatch_size={smaller}", changed, subject.batch, _SMALLER
        return
    if size < 2 or size % 2:
        return
    half = size // 2
    # The section is open: a split may have its own size, which is what is replaced for the plan.
    changed = replace(config, accum_steps=2 * config.accum_steps)
    overrides = f"dataloader.batch_size={half} accum_steps={2 * config.accum_steps}"
    yield overrides, changed, subject.cut(half), _SMALLER
