"""Engine of a plan: figures of a layout from what a script passes to its runner."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from danling_conf import _torch_private
from danling_conf.components import dataloader as loaders
from danling_conf.components.batch import count_samples as count_by_rule
from danling_conf.components.instantiate import model_factory
from danling_conf.groups.layout_names import name_of
from danling_conf.parallel import context as sequences
from danling_conf.parallel.init_plan import made_by, meta_copy, to_meta
from danling_conf.plan.depth import FEW, Run, names_in, runs_of, shortened
from danling_conf.plan.extend import Trace, added, calls_added, extended, trace_of
from danling_conf.plan.figures import Collective, LayoutFigures, Moment, RankFigures
from danling_conf.plan.trace import OneRank, Subject
from danling_conf.runner.batch import forward_of, loss_of_output
from danling_conf.runner.planning import Recipe
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.topology.layout import coordinates, layout_of


def subject_of(recipe: Recipe) -> Subject:
    """What is planned, of what a script has passed to its runner: its model without values, and a batch of its data.

    Raises:
        SettingError: the model cannot be built without values, or the data has no sample.
    """
    config = recipe.config
    given = model_factory(config.model) if recipe.model is None else recipe.model
    return Subject(
        config=config,
        model=_on_meta(given),
        forward=recipe.forward or forward_of(config.batch),
        loss=recipe.loss or loss_of_output,
        batch=_batch(recipe, loaders.settings_for(config.dataloader, "train").batch_size or 1),
        example=_batch(recipe, 2),
        count_samples=recipe.count_samples or count_by_rule,
    )


def figures_of(subject: Subject) -> LayoutFigures:
    """One optimizer step of a layout, by kind of rank."""
    layout = layout_of(subject.config)
    config = subject.config
    ranks = (_rank_figures(subject, layout, 0),)
    samples = subject.count_samples(subject.batch) * layout.data_degree * config.accum_steps
    length = sequences.sequence_length(subject.batch)
    return LayoutFigures(
        layout=name_of(layout),
        degrees=layout.degrees(),
        ranks=ranks,
        microbatches=1,
        accumulation=config.accum_steps,
        samples=samples,
        tokens=0 if length is None else samples * length,
        parameters=sum(item.numel() for item in subject.model.parameters()),
        settings=settings_of(config),
        notes=(),
    )


def settings_of(config: RunnerConfig) -> dict[str, Any]:
    """The settings that memory and time depend on, and that a plan may propose to change."""
    return {
        "activation_checkpointing": config.activation_checkpointing.mode,
        "precision": config.precision or "fp32",
        "compile": config.compile.enable,
        "batch_size": loaders.settings_for(config.dataloader, "train").batch_size or 1,
        "accum_steps": config.accum_steps,
        "optimizer": config.optim.type,
        "schedule": config.parallel.pipeline_schedule,
        "reshard_after_forward": config.fsdp.reshard_after_forward,
    }


def _rank_figures(subject: Subject, layout: Layout, rank: int) -> RankFigures:
    config = subject.config
    recomputation = config.activation_checkpointing
    every = recomputation.every_n if recomputation.mode == "every_n" else 1
    runs = runs_of(subject.model, every=every)
    whole = whole_trace(subject, runs, rank)
    return summarised(whole, layout, rank, ranks=layout.world_size, config=config)


def whole_trace(subject: Subject, runs: Sequence[Run], rank: int) -> Trace:
    """The regions of a step of a rank at the model's real depth."""
    counts = [[FEW] * len(runs)]
    for index, run in enumerate(runs):
        if run.long:
            counts.append([FEW + (other == index) for other in range(len(runs))])
    traces, names = [], []
    for units in counts:
        of_runs = names_in(runs, units)
        model = shortened(subject.model, runs, units)
        with OneRank(subject, model, [name for names in of_runs for name in names], rank) as one:
            one.step()
            traces.append(trace_of(one.ledger))
        names.append(of_runs)
    return extended(runs, names, traces)


def summarised(trace: Trace, layout: Layout, rank: int, *, ranks: int, config: RunnerConfig) -> RankFigures:
    """A step's figures, all accumulated micro-batches counted."""
    moments = [Moment(_title(place, config), seen.memory) for place, seen in trace.items() if seen.memory]
    peak = max(moments, key=lambda moment: moment.total)
    flops: dict[str, int] = {}
    recomputed = hbm = 0
    collectives: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for place, seen in trace.items():
        times = _times(place, config)
        flops = added(flops, seen.flops, times)
        recomputed += times * seen.recomputed
        hbm += times * seen.hbm_bytes
        collectives = calls_added(collectives, seen.collectives, times)
    return RankFigures(
        coordinates=coordinates(layout, rank),
        rank=rank,
        ranks=ranks,
        stages=(0,),
        peak=dict(peak.memory),
        peak_moment=peak.name,
        moments=tuple(moments),
        collectives=tuple(
            Collective(kind, axis_of(layout, members), count, size, len(members), members[1] - members[0])
            for (kind, members), (count, size) in sorted(collectives.items())
        ),
        flops=flops,
        recomputed_flops=recomputed,
        hbm_bytes=hbm,
    )


def axis_of(layout: Layout, members: Sequence[int]) -> str:
    """The axes along which the ranks of a group differ, joined by `+`."""
    places = [coordinates(layout, rank) for rank in (*members[:2], members[-1])]
    differ = [axis for axis in WORLD_AXES if len({place.get(axis, 0) for place in places}) > 1]
    if len(members) == layout.world_size and len(differ) > 1:
        return "world"
    return "+".join(differ) or "world"


def _times(place: tuple[str, int], config: RunnerConfig) -> int:
    """How often a region of the trace is run in a step: the first of two accumulated micro-batches stands for all but
    the last one."""
    passes = place[0].startswith(("forward", "backward"))
    return config.accum_steps - 1 if passes and config.accum_steps > 1 and place[1] == 0 else 1


def _title(place: tuple[str, int], config: RunnerConfig) -> str:
    name, number = place
    passes = name.startswith(("forward", "backward"))
    if not passes or config.accum_steps == 1:
        return name
    return f"{name} ({'last' if number else 'an earlier'} micro-batch)"


def _on_meta(given: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return meta_copy(given)
    with _torch_private.fake_tensors(), _torch_private.quiet_fake_tensors():
        model = made_by(given)
    to_meta(model)
    return model


def _batch(recipe: Recipe, size: int) -> Any:
    """A batch of the first samples of the training split."""
    dataset = recipe.datasets["train"]
    if hasattr(dataset, "__getitem__") and not isinstance(dataset, torch.utils.data.IterableDataset):
        samples = [dataset[index % len(dataset)] for index in range(size)]
    else:
        samples = list(itertools.islice(itertools.cycle(dataset), size))
    return (recipe.collate_fn or torch.utils.data.default_collate)(samples)
