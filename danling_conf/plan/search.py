"""Search for layouts: traces a few shapes of a model, derives thousands of layouts, and traces the best ones.

The traces of one process follow each other, and a machine has several cores: they run in copies of this process, which
have the model already.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from danling_conf.config.resolve import resolve
from danling_conf.plan import engine
from danling_conf.plan.candidates import CHECKPOINTING, Candidate, candidates, configured, layouts, refuse_batch
from danling_conf.plan.depth import Run, runs_of, shortened
from danling_conf.plan.derive import FEW, MORE, Costs, between, costs_of, crossed, derived
from danling_conf.plan.figures import LayoutFigures
from danling_conf.plan.forked import Failed, Forked
from danling_conf.plan.proposals import SHOWN, Proposal, Proposals, proposal_of, ranked
from danling_conf.runner.planning import Recipe
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import Layout
from danling_conf.topology.hardware import Cluster
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context
from danling_conf.topology.violation import ConfigRefused, SettingError

SECONDS = 27.0
"""Within which proposals are made; traces of the best ones go on until then."""
_ENDS = ("none", "full")
"""Modes of activation checkpointing with the most and the least memory."""
_TRACE_SECONDS = 4.0
"""That a trace of a deep model takes at most, about: none is begun later than this before the end."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """What a model is traced under, to derive others from."""

    tensor: int = 1
    context: int = 1
    expert: int = 1
    checkpointing: str = "none"


_recipe: Recipe | None = None
"""Of this process: set before it is copied, since what a script passes cannot always be pickled."""


def propose(recipe: Recipe, gpus: int, cluster: Cluster, samples: int, *, end: float | None = None) -> Proposals:
    """Find the best layouts of a number of GPUs.

    Args:
        recipe: what a script has passed to its runner; its layout does not matter.
        samples: samples of an optimizer step.
        end: when to be done, on the clock of `time.monotonic`.

    Raises:
        ConfigRefused: no layout takes so many samples.
    """
    global _recipe
    end = time.monotonic() + SECONDS if end is None else end
    config = recipe.config
    subject = engine.subject_of(recipe)
    dims = engine.dims_of(subject)
    possible = list(layouts(gpus, cluster, dims, samples))
    if not possible:
        raise refuse_batch(samples, gpus)
    _recipe = replace(recipe, model=subject.model)
    notes: list[str] = []
    with Forked() as tasks:
        costs, like = _costs(tasks, _shapes(config, possible), gpus, cluster, notes)
        found, looked_at = [], 0
        for candidate in candidates(config, gpus, cluster, dims, samples):
            looked_at += 1
            cost = _cost(candidate, costs)
            if cost is not None:
                figures = derived(candidate, cost, like, blocks=dims.get("blocks", 0), samples=samples)
                found.append(proposal_of(config, candidate, figures, cluster, traced=False))
        best = _verified(tasks, ranked(found), config, gpus, cluster, end, notes)
    return Proposals(gpus=gpus, samples=samples, looked_at=looked_at, ranked=best, notes=tuple(notes))


def _shapes(config: RunnerConfig, possible: Sequence[Layout]) -> list[_Shape]:
    """What to trace: every mode without further axes; the ends of the tensor degrees, the smallest context degree and
    the ends of the expert degrees with the modes that differ most."""
    modes = dict.fromkeys([*CHECKPOINTING, config.activation_checkpointing.mode])
    found = [_Shape(checkpointing=mode) for mode in modes]
    for axis in ("tensor", "expert"):
        degrees = sorted({getattr(layout, axis) for layout in possible} - {1})
        for degree in dict.fromkeys([*degrees[:1], *degrees[-1:]]):
            found += [_Shape(**{axis: degree}, checkpointing=mode) for mode in _ENDS]
    context = sorted({layout.context for layout in possible} - {1})
    return found + [_Shape(context=degree) for degree in context[:1]]


def _costs(
    tasks: Forked, shapes: Sequence[_Shape], gpus: int, cluster: Cluster, notes: list[str]
) -> tuple[dict[_Shape, Costs], LayoutFigures]:
    """The costs of each shape that can be traced, and the figures of one."""
    plain = _Shape()
    # The first trace imports much, and fills caches: in this process, so that its copies have that already.
    results: dict[tuple[_Shape, int], LayoutFigures | Failed] = {(plain, FEW): _traced_shape(plain, FEW, gpus, cluster)}
    for shape in shapes:
        for blocks in (FEW, MORE):
            if (shape, blocks) not in results:
                tasks.submit((shape, blocks), _traced_shape, shape, blocks, gpus, cluster)
    while (done := tasks.next()) is not None:
        results[done[0]] = done[1]
    found: dict[_Shape, Costs] = {}
    like: LayoutFigures | None = None
    for shape in shapes:
        few, more = results[shape, FEW], results[shape, MORE]
        if isinstance(few, Failed) or isinstance(more, Failed):
            failed = few if isinstance(few, Failed) else more
            assert isinstance(failed, Failed)
            if shape == plain:
                raise failed.error
            note = f"no layouts with {_named(shape)}: {_reason(failed)}"
            notes += [note] if note not in notes else []
            continue
        like = like or more
        found[shape] = costs_of(few, more)
    assert like is not None
    return found, like


def _reason(failed: Failed) -> str:
    """Why there are no figures of a layout. Raises what is not a refusal."""
    error = failed.error
    if isinstance(error, SettingError):
        return error.violation.rule
    if isinstance(error, ConfigRefused) and error.violations:
        return error.violations[0].rule
    return f"it cannot be traced ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _named(shape: _Shape) -> str:
    for axis in ("tensor", "context", "expert"):
        if getattr(shape, axis) > 1:
            return f"{axis} degree {getattr(shape, axis)}"
    return f"activation_checkpointing.mode={shape.checkpointing}"


def _cost(candidate: Candidate, costs: Mapping[_Shape, Costs]) -> Costs | None:
    """The costs of a candidate's layout; None where nothing like it could be traced."""
    layout, mode = candidate.layout, candidate.checkpointing
    plain, of_mode = costs.get(_Shape()), costs.get(_Shape(checkpointing=mode))
    if plain is None or of_mode is None:
        return None
    found: Costs | None = of_mode
    if layout.expert > 1:
        # Experts take over what tensor and context ranks would share; these axes together are left out.
        alone = layout.tensor == layout.context == 1
        return _of_degree("expert", layout.expert, mode, costs) if alone else None
    if layout.tensor > 1:
        found = _of_degree("tensor", layout.tensor, mode, costs)
    if layout.context > 1 and found is not None:
        traced = next((shape for shape in costs if shape.context > 1), None)
        if traced is None:
            return None
        along = between(plain, costs[traced], (1, traced.context), layout.context)
        return crossed(found, along, plain, layout.tensor)
    return found


def _of_degree(axis: str, degree: int, mode: str, costs: Mapping[_Shape, Costs]) -> Costs | None:
    """The costs under a degree of one axis, itself traced or between two that were."""
    if mode not in _ENDS:
        plain, of_mode, other = costs.get(_Shape()), costs.get(_Shape(checkpointing=mode)), "none"
        found = _of_degree(axis, degree, other, costs)
        return None if found is None or plain is None or of_mode is None else crossed(found, of_mode, plain, 1)
    traced = {getattr(shape, axis): each for shape, each in costs.items() if shape.checkpointing == mode}
    if degree in traced:
        return traced[degree]
    known = sorted(each for each in traced if each > 1)
    if not known or (axis == "expert" and len(known) < 2):
        return None
    low, high = (known[0], known[-1]) if len(known) > 1 else (1, known[0])
    return between(traced[low], traced[high], (low, high), degree)


def _verified(
    tasks: Forked,
    best: list[Proposal],
    config: RunnerConfig,
    gpus: int,
    cluster: Cluster,
    end: float,
    notes: list[str],
) -> list[Proposal]:
    """Trace the proposals that would be shown, from the first one on, while there is time."""
    known: dict[str, Proposal] = {}
    begun: set[str] = set()
    dropped: set[str] = set()
    while time.monotonic() < end:
        for item in _ordered(best, known, dropped)[:SHOWN]:
            if item.name not in begun and tasks.idle and time.monotonic() < end - _TRACE_SECONDS:
                begun.add(item.name)
                tasks.submit(item, _traced_candidate, item.candidate, gpus, cluster)
        done = tasks.next(end)
        if done is None:
            break
        item, figures = done
        if isinstance(figures, Failed):
            dropped.add(item.name)
            notes.append(f"{item.name} is left out: {_reason(figures)}")
        else:
            known[item.name] = proposal_of(config, item.candidate, figures, cluster, traced=True)
    return _ordered(best, known, dropped)


def _ordered(best: Sequence[Proposal], known: Mapping[str, Proposal], dropped: Collection[str]) -> list[Proposal]:
    found = [known.get(item.name, item) for item in best if item.name not in dropped]
    return sorted(found, key=lambda item: item.key)


def _traced_shape(shape: _Shape, units: int, gpus: int, cluster: Cluster) -> LayoutFigures:
    """Trace a shape with few blocks of each kind, one sample and as many data ranks as there can be."""
    assert _recipe is not None
    data = max(1, gpus // (shape.tensor * shape.context))
    layout = Layout(fsdp=True, shard=data, tensor=shape.tensor, context=shape.context, expert=shape.expert)
    candidate = Candidate(
        layout=layout,
        batch_size=1,
        accumulation=1,
        microbatch_size=1,
        schedule=_recipe.config.parallel.pipeline_schedule,
        checkpointing=shape.checkpointing,
    )
    subject = engine.subject_of(replace(_recipe, config=_resolved(candidate, layout.world_size, cluster)))
    runs = [_Cut(run.blocks, run.period) for run in runs_of(subject.model)]
    return engine.figures_of(replace(subject, model=shortened(subject.model, runs, [units] * len(runs))))


class _Cut(Run):
    """A run that is cut even where it is short: the difference of two models is what is looked for."""

    @property
    def long(self) -> bool:
        return True


def _traced_candidate(candidate: Candidate, gpus: int, cluster: Cluster) -> LayoutFigures:
    """Trace a candidate."""
    assert _recipe is not None
    return engine.figures_of(
        engine.subject_of(replace(_recipe, config=_resolved(candidate, gpus, cluster)), accelerated=True)
    )


def _resolved(candidate: Candidate, gpus: int, cluster: Cluster) -> RunnerConfig:
    assert _recipe is not None
    machine = Machine(devices=cluster.gpus_per_node, cluster_world_size=gpus)
    made: RunnerConfig = resolve(configured(_recipe.config, candidate), context=Context(machine=machine))
    return made
