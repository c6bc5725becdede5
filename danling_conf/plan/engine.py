"""Engine of a plan: figures of a layout from what a script passes to its runner."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from danling_conf._torch_private import attributes, fakes
from danling_conf.components import dataloader as loaders
from danling_conf.components.batch import count_samples as count_by_rule
from danling_conf.components.batch import tensors
from danling_conf.components.instantiate import model_factory
from danling_conf.config.identity import layout_name as name_of
from danling_conf.parallel import context as sequences
from danling_conf.parallel import expert
from danling_conf.parallel import stages as stages_of
from danling_conf.parallel import trial as trials
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.fsdp import offloads
from danling_conf.parallel.init_plan import made_by, meta_copy, to_meta
from danling_conf.parallel.stage_forward import rehearse
from danling_conf.plan.depth import FEW, Run, names_in, runs_of, shortened, signature
from danling_conf.plan.extend import Place, Trace, added, calls_added, extended, trace_of
from danling_conf.plan.figures import GRADIENTS, OPTIMIZER, PARAMETERS, Collective, LayoutFigures, Moment, RankFigures
from danling_conf.plan.schedule import Action, Passed, in_order
from danling_conf.plan.trace import OneRank, Sent, Subject, line_of
from danling_conf.runner import data
from danling_conf.runner.batch import forward_of, loss_of_output
from danling_conf.runner.planning import Recipe
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.topology.layout import coordinates, layout_of, rank_at
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError


def subject_of(recipe: Recipe, *, accelerated: bool = False) -> Subject:
    """What is planned, of what a script has passed to its runner: its model without values, and a batch of its data.

    Args:
        accelerated: whether it is planned for an accelerator.

    Raises:
        SettingError: the model cannot be built.
        ConfigRefused: a data set is missing or has no sample.
    """
    config = recipe.config
    if wrong := data.faults(recipe.datasets):
        raise ConfigRefused(wrong)
    given = model_factory(config.model) if recipe.model is None else recipe.model
    return Subject(
        config=config,
        model=_on_meta(given),
        forward=recipe.forward or forward_of(config.batch),
        loss=recipe.loss or loss_of_output,
        batch=_batch(recipe, loaders.settings_for(config.dataloader, "train").batch_size or 1),
        example=_batch(recipe, 2),
        cut=partial(_batch, recipe),
        count_samples=recipe.count_samples or count_by_rule,
        accelerated=accelerated,
    )


def figures_of(subject: Subject, *, places: Sequence[int] | None = None, load: bool = True) -> LayoutFigures:
    """One optimizer step of a layout, by kind of rank.

    Args:
        places: on the pipeline axis, to look at alone; None for all.
        load: whether a busy rank is planned too, where experts are dealt out.
    """
    if not subject.config.compile.enable:
        return _figures_of(subject, places, load)
    try:
        return _figures_of(subject, places, load)
    except SettingError as error:
        # Whatever is wrong with the model itself is said of eager code too.
        eager = replace(subject.config, compile=replace(subject.config.compile, enable=False))
        found = _figures_of(replace(subject, config=eager), places, load)
        why = textwrap.shorten(error.violation.rule, 200, placeholder=" ...")
        note = f"compile: planned as eager code, which keeps at least as much for backward, since {why}"
        return replace(found, settings=settings_of(subject.config), notes=(*found.notes, note))


def _figures_of(subject: Subject, places: Sequence[int] | None, load: bool) -> LayoutFigures:
    layout, config = layout_of(subject.config), subject.config
    samples = subject.count_samples(subject.batch) * layout.data_degree * config.accum_steps
    length = sequences.sequence_length(subject.batch)
    tokens = 0 if length is None or not _of_tokens(subject.batch) else samples * length
    found = _pipeline_ranks(subject, layout, places) if layout.pipeline > 1 else [_only_rank(subject, layout)]
    return LayoutFigures(
        layout=name_of(layout),
        degrees=layout.degrees(),
        ranks=tuple(figures for figures, _ in found),
        microbatches=found[0][1],
        accumulation=config.accum_steps,
        samples=samples,
        tokens=tokens,
        parameters=sum(item.numel() for item in subject.model.parameters()),
        settings=settings_of(config),
        dims=_dims(subject, length),
        notes=tuple(_notes(subject, layout, [figures for figures, _ in found], load=load)),
    )


def _of_tokens(batch: Any) -> bool:
    """Whether the first tensor of a batch that has two dims is one of numbers of tokens: images have none."""
    first = next(item for item in tensors(batch) if item.ndim >= 2)
    return first.ndim == 2 and not first.is_floating_point()


def dims_of(subject: Subject) -> dict[str, int]:
    """What limits the degrees of a layout, as far as the model and its data say; see `LayoutFigures.dims`."""
    return _dims(subject, sequences.sequence_length(subject.batch))


def settings_of(config: RunnerConfig) -> dict[str, Any]:
    """The settings that memory and time depend on, and that a plan may propose to change."""
    return {
        "activation_checkpointing": config.activation_checkpointing.mode,
        "precision": config.precision or "fp32",
        "compile": config.compile.enable,
        "batch_size": loaders.settings_for(config.dataloader, "train").batch_size or 1,
        "accum_steps": config.accum_steps,
        "optimizer": config.optim.type,
        "pipeline_schedule": config.parallel.pipeline_schedule,
        "reshard_after_forward": config.fsdp.reshard_after_forward,
    }


def _only_rank(subject: Subject, layout: Layout) -> tuple[RankFigures, int]:
    """The figures that hold for every rank of a layout without a pipeline."""
    runs = runs_of(subject.model, every=_every(subject.config))
    found = whole_trace(subject, runs, 0)
    whole = found.trace
    moments = [Moment(_title(place, subject.config), seen.memory) for place, seen in whole.items() if seen.memory]
    times = [(place, _times(place, subject.config)) for place in whole]
    return summarised(
        whole,
        moments,
        times,
        layout,
        0,
        ranks=layout.world_size,
        stages=(0,),
        host=offloads(subject.config.fsdp),
        unused=found.unused,
    ), 1


def _every(config: RunnerConfig) -> int:
    recomputation = config.activation_checkpointing
    return recomputation.every_n if recomputation.mode == "every_n" else 1


@dataclass(frozen=True)
class Whole:
    """The regions of a step of a rank at the model's real depth, and what was learned on the way."""

    trace: Trace
    unused: int
    """Bytes that the device's allocator holds beyond the peak: of the traces with few blocks, since a block's tensors
    are as large as the next one's and take their places."""
    sent: Sent | None
    microbatches: int
    actions: Mapping[int, Sequence[Action]]
    """Of one pass through the schedule, by pipeline rank."""


def whole_trace(
    subject: Subject,
    runs: Sequence[Run],
    rank: int,
    *,
    own: Sequence[int] | None = None,
    stages: Sequence[Sequence[str]] | None = None,
    sent: Sent | None = None,
) -> Whole:
    """Trace a rank with few blocks, and extend.

    Args:
        runs: of the model's blocks.
        own: positions of the runs that this rank holds; None for all.
        stages: of a pipeline, names of the whole model's modules in each.
        sent: what the rank's first stage receives.
    """
    counts = [[FEW] * len(runs)]
    for index, run in enumerate(runs):
        if run.long and (own is None or index in own):
            counts.append([FEW + (other == index) for other in range(len(runs))])
    extra = [runs[index] for index in range(len(runs)) if own is None or index in own]
    traces, names = [], []
    unused = 0
    for units in counts:
        of_runs = names_in(runs, units)
        model = shortened(subject.model, runs, units)
        cut = subject if stages is None else _with_stages(subject, runs, of_runs, units, stages)
        with OneRank(cut, model, [name for names in of_runs for name in names], rank) as one:
            one.step(sent)
            traces.append(trace_of(one.ledger))
            unused = max(unused, one.ledger.unused())
            if len(traces) == 1:
                learned = _learned(one)
        names.append([item for index, item in enumerate(of_runs) if own is None or index in own])
    return Whole(extended(extra, names, traces), unused, *learned)


def _learned(one: OneRank) -> tuple[Any, ...]:
    pipeline = one.assembled.pipeline
    if pipeline is None or one.sent is None:
        return None, 1, {}
    return one.sent, one.microbatches, pipeline.actions(one.microbatches)


def _passed_on(
    whole: Whole, schedule: str, placement: Sequence[int], traced: Mapping[int, int]
) -> tuple[Passed, dict[int, tuple[int, int]]]:
    """What the stages of a pipeline rank pass on; and calls and bytes to and from each other one, in one pass.

    Args:
        placement: the pipeline rank of each stage.
        traced: for each stage of the rank, the one that was traced for it.
    """
    assert whole.sent is not None  # there are several stages
    size = math.prod(whole.sent[0]) * whole.sent[1].itemsize
    # torch keeps a buffer for every microbatch of what each stage receives, forward and backward.
    buffer = size * whole.microbatches
    buffers = 0
    traffic: dict[int, tuple[int, int]] = {}
    sent: dict[str, set[int]] = {"F": set(), "B": set()}
    handed: dict[str, set[int]] = {"F": set(), "B": set()}
    for stage in traced:
        for what, neighbour in (("F", stage + 1), ("B", stage - 1)):
            if not 0 <= neighbour < len(placement):
                continue
            buffers += buffer
            if neighbour in traced:
                handed[what].add(traced[stage])
                continue
            sent[what].add(traced[stage])
            count, total = traffic.get(placement[neighbour], (0, 0))
            traffic[placement[neighbour]] = (count + whole.microbatches, total + buffer)
    return Passed(
        size=size,
        buffers=buffers,
        forward=frozenset(sent["F"]),
        backward=frozenset(sent["B"]),
        handed_forward=frozenset(handed["F"]),
        handed_backward=frozenset(handed["B"]),
        waits={"1F1B": "sends", "GPipe": "outputs"}.get(schedule, ""),
    ), traffic


def _pipeline_ranks(subject: Subject, layout: Layout, places: Sequence[int] | None) -> list[tuple[RankFigures, int]]:
    """The figures of one rank of each place in a pipeline."""
    names, one_tensor = _stage_names(subject, layout)
    if one_tensor:  # the trial of the whole model is over; with an example each trace would try its own
        subject = replace(subject, example=None)
    stage_of = {block: index for index, of_stage in enumerate(names) for block in of_stage}
    runs = runs_of(subject.model, every=_every(subject.config), stage_of=stage_of)
    kinds = [signature(subject.model.get_submodule(run.blocks[0])) for run in runs]
    placement = stages_of.placement(subject.config.parallel.pipeline_schedule, layout.pipeline, len(names))
    found: list[tuple[RankFigures, int]] = []
    known: dict[object, tuple[Whole, list[int], list[int]]] = {}
    sent: Sent | None = None
    for place in range(layout.pipeline) if places is None else sorted({0, *places}):
        rank = _at(layout, place)
        held = [index for index, at in enumerate(placement) if at == place]
        own = [number for number, run in enumerate(runs) if stage_of.get(run.blocks[0]) in held]
        # Stages between the first and the last one do the same if they have as many blocks of the same kinds.
        key = (
            tuple((index in (0, len(names) - 1) and index, len(names[index])) for index in held),
            tuple((len(runs[number].blocks), runs[number].period, kinds[number]) for number in own),
        )
        if key not in known:
            known[key] = whole_trace(subject, runs, rank, own=own, stages=names, sent=sent), held, own
        whole, traced, blocks = known[key]
        sent = sent or whole.sent
        stage = dict(zip(held, traced, strict=True))
        actions = [(stage[index], what, number) for index, what, number in whole.actions[place]]
        passed, traffic = _passed_on(whole, subject.config.parallel.pipeline_schedule, placement, stage)
        steps = subject.config.accum_steps
        moments, times = in_order(whole.trace, actions, steps=steps, passed=passed)
        called = {
            old: new
            for other, number in zip(blocks, own, strict=True)
            for old, new in zip(runs[other].blocks, runs[number].blocks, strict=True)
        }
        moments = [replace(moment, name=_renamed(moment.name, called)) for moment in moments]
        figures = summarised(
            whole.trace,
            moments,
            times,
            layout,
            rank,
            ranks=layout.world_size // layout.pipeline,
            stages=tuple(held),
            host=offloads(subject.config.fsdp),
            unused=whole.unused,
            traffic={
                ("send_recv", tuple(sorted((rank, _at(layout, other))))): (count * steps, size * steps)
                for other, (count, size) in traffic.items()
            },
        )
        found.append((figures, whole.microbatches))
    return found


def _at(layout: Layout, place: int) -> int:
    """The first rank of a place in the pipeline."""
    return rank_at(layout, {**dict.fromkeys(WORLD_AXES, 0), "pipeline": place})


def _renamed(moment: str, called: Mapping[str, str]) -> str:
    """A moment's name with the name of another block."""
    return " ".join(
        called.get(word.rstrip(","), word.rstrip(",")) + "," * word.endswith(",") for word in moment.split(" ")
    )


def _stage_names(subject: Subject, layout: Layout) -> tuple[stages_of.Names, bool]:
    """Names of the modules of each stage of the whole model; and whether its blocks are known to return one tensor."""
    section = subject.config.parallel
    if section.module_fqns_per_model_part is not None:
        return [list(names) for names in section.module_fqns_per_model_part], False
    blocks = stages_of.blocks_of(subject.model)
    around = [name for side in stages_of.around(subject.model, blocks) for name in side]
    few = [FEW] * len(runs := runs_of(subject.model, every=_every(subject.config)))
    model = shortened(subject.model, runs, few)
    # The trial shows which module is used before the blocks and which behind them: few blocks are enough for that.
    chain = [name for names in names_in(runs, few) for name in names]
    trial = trials.run(model, chain, around, subject.forward, subject.example)
    count = layout.pipeline * stages_of.stages_per_rank(section.pipeline_schedule)
    found = stages_of.deal_out(subject.model, count, trial)
    if any(trial.returns):
        return found, False
    # What a stage lacks of the whole model, as a run would refuse it: it shows in two stages as well.
    rehearse(trial, stages_of.deal_out(model, 2, trial), chain, subject.forward, subject.example)
    return found, True


def _with_stages(
    subject: Subject,
    runs: Sequence[Run],
    names: Sequence[Sequence[str]],
    units: Sequence[int],
    stages: Sequence[Sequence[str]],
) -> Subject:
    """The same for a model with few blocks: its stages by the names that the blocks have there."""
    renamed: dict[str, str | None] = {}
    for run, of_run, count in zip(runs, names, units, strict=True):
        renamed |= dict.fromkeys(run.blocks)
        renamed |= dict(zip(run.kept(count), of_run, strict=True))
    parts = [[new for name in of_stage if (new := renamed.get(name, name)) is not None] for of_stage in stages]
    section = replace(subject.config.parallel, module_fqns_per_model_part=parts)
    return replace(subject, config=replace(subject.config, parallel=section))


def summarised(
    trace: Trace,
    moments: Sequence[Moment],
    times: Sequence[tuple[Place, int]],
    layout: Layout,
    rank: int,
    *,
    ranks: int,
    stages: tuple[int, ...],
    traffic: Mapping[tuple[str, tuple[int, ...]], tuple[int, int]] | None = None,
    host: bool = False,
    unused: int | None = None,
) -> RankFigures:
    """A step's figures.

    Args:
        times: how often each region is run.
        traffic: what is sent between stages.
        host: whether weights, gradients and the optimizer stay in host memory.
        unused: bytes that the allocator holds beyond the peak.
    """
    if host:
        on_device = [Moment(item.name, {k: v for k, v in item.memory.items() if k not in _ON_HOST}) for item in moments]
        moments = [item for item in on_device if item.name not in _OF_OPTIMIZER]
    peak = max(moments, key=lambda moment: moment.total)
    flops: dict[str, int] = {}
    recomputed = hbm = 0
    collectives = dict(traffic or {})
    for place, count in times:
        seen = trace[place]
        flops = added(flops, seen.flops, count)
        recomputed += count * seen.recomputed
        hbm += count * seen.hbm_bytes
        collectives = calls_added(collectives, seen.collectives, count)
    return RankFigures(
        coordinates=coordinates(layout, rank),
        rank=rank,
        ranks=ranks,
        stages=stages,
        peak=dict(peak.memory),
        peak_moment=peak.name,
        moments=tuple(moments),
        collectives=tuple(
            Collective(kind, axis_of(layout, members), count, size, len(members), members[1] - members[0])
            for (kind, members), (count, size) in sorted(collectives.items())
            if count
        ),
        flops=flops,
        recomputed_flops=recomputed,
        hbm_bytes=hbm,
        unused=unused,
    )


_ON_HOST = (PARAMETERS, GRADIENTS, OPTIMIZER)
_OF_OPTIMIZER = ("gradients", "optimizer")


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


def _dims(subject: Subject, length: int | None) -> dict[str, int]:
    """What limits the degrees of a layout, as far as the model says."""
    found = {"blocks": len(repeated_blocks(subject.model))}
    if length is not None:
        found["sequence"] = length
    config = getattr(subject.model, "config", None)
    for name, keys in _DIMS.items():
        value = next((item for key in keys if isinstance(item := getattr(config, key, None), int)), None)
        if value:
            found[name] = value
    return found


_DIMS = {
    "heads": ("num_attention_heads", "heads"),
    "key_value_heads": ("num_key_value_heads", "num_kv_heads"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "experts"),
    "width": ("hidden_size", "width"),
}
"""Names that models give to their dims in their `config`."""


def _notes(subject: Subject, layout: Layout, ranks: Sequence[RankFigures], *, load: bool) -> Iterator[str]:
    backend = subject.config.compile.backend
    if subject.config.compile.enable and backend not in (None, "inductor", "aot_eager"):
        yield f"compile: backend {backend} is planned as {'eager code' if backend == 'eager' else 'inductor'}"
    if layout.expert > 1 and load:
        worst = max(ranks, key=lambda rank: rank.peak_bytes)
        place = worst.coordinates["pipeline"]
        with expert.planned_load(BUSY):
            busy = figures_of(subject, places=[place], load=False)
        peak = next(rank for rank in busy.ranks if rank.coordinates["pipeline"] == place).peak_bytes
        yield (
            f"experts: tokens are routed evenly; a rank whose experts are sent {BUSY:g} times the mean needs "
            f"{(peak - worst.peak_bytes) / 2**30:.2g} GiB more"
        )


BUSY = 2.0
"""Load of a rank's experts, relative to the mean, that is planned as the worst case."""


def _on_meta(given: Any) -> nn.Module:
    if isinstance(given, nn.Module):
        return meta_copy(given)
    try:
        with (
            fakes.fake_tensors(),
            fakes.quiet_fake_tensors(),
            attributes.truncated_normal(lambda original, tensor, *rest: tensor),
        ):
            model = made_by(given)
    except SettingError:
        raise
    except Exception:  # it may only ask for values, which a model that is really built has
        model = _with_values(given)
    to_meta(model)
    return model


def _with_values(factory: Callable[[], nn.Module]) -> nn.Module:
    """The model of a factory that asks for values, as a list of rates from `torch.linspace` does."""
    try:
        return made_by(factory)
    except SettingError:
        raise
    except Exception as error:
        rule = f"its factory raised {type(error).__name__}: {textwrap.shorten(str(error), 300, placeholder=' ...')}"
        raise SettingError("model", ABSENT, rule, f"see {line_of(error) or 'the factory'}") from error


def _batch(recipe: Recipe, size: int) -> Any:
    """A batch of the first samples of the training split."""
    dataset = recipe.datasets["train"]
    if hasattr(dataset, "__getitem__") and not isinstance(dataset, torch.utils.data.IterableDataset):
        samples = [dataset[index % len(dataset)] for index in range(size)]
    else:
        samples = list(itertools.islice(itertools.cycle(dataset), size))
    return (recipe.collate_fn or torch.utils.data.default_collate)(samples)
