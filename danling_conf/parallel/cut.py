"""Cutting of a model into the stages of a pipeline.

With an example the whole model is tried first, so that its modules go where they are used; without one, the first batch
proves the stages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from danling_conf._torch_private import attributes
from danling_conf.parallel import batch_norm
from danling_conf.parallel import stages as stages_of
from danling_conf.parallel import trial as trials
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.context import ContextParallel
from danling_conf.parallel.pipeline import Pipeline
from danling_conf.parallel.stage_forward import Forward, rehearse
from danling_conf.parallel.trial import Trial
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.layout import coordinates
from danling_conf.topology.violation import ABSENT, SettingError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stages:
    """A model cut into the stages of a pipeline."""

    parts: dict[int, nn.Module]
    """The stages of this rank, by index."""
    placement: list[int]
    """The pipeline rank of every stage."""
    names: stages_of.Names
    """The names of the modules of every stage."""
    blocks: list[str]
    """The names of the blocks that it is cut between; none where stages are of other modules."""
    trial: Trial | None
    prove: Callable[[Forward, Any], None]
    """Raises SettingError on every rank where the stages are not the whole model, by a batch."""

    def pipeline(
        self,
        parts: dict[int, nn.Module],
        layout: Layout,
        mesh: DeviceMesh | None,
        device: torch.device,
        parallel: ParallelConfig,
        context: ContextParallel | None,
        policy: MixedPrecisionPolicy | None,
    ) -> Pipeline:
        """The schedule over the stages; `parts` are these, wrapped and with values."""
        # Only what is sent between stages may be a part of a sequence: else the model numbers the tokens itself.
        positions = _positions if parallel.sequence_parallel else None
        if context is not None:
            positions = context.positions
        return Pipeline(
            parts,
            self.placement,
            parallel,
            mesh["pipeline"],  # type: ignore[index]
            device,
            names=self.names,
            blocks=self.blocks,
            trial=self.trial,
            prove=None if self.trial is not None else self.prove,
            several_data_ranks=layout.data_degree > 1,
            positions=positions,
            policy=policy,
        )


def cut(
    model: nn.Module,
    layout: Layout,
    parallel: ParallelConfig,
    example: Callable[[], Any] | None,
    forward: Forward | None,
) -> Stages | None:
    """The stages of a model; None for no pipeline. Collective with an example: the whole model is tried before it is
    cut, so that its modules go where they are used."""
    degree = layout.pipeline
    if degree == 1:
        return None
    _refuse_own_hooks(model)
    names = parallel.module_fqns_per_model_part
    if names is None:
        blocks = stages_of.blocks_of(model)
    else:
        stages_of.check(model, names)
        found = [name for name, _ in repeated_blocks(model)]
        blocks = found if len({name.rpartition(".")[0] for name in found}) == 1 else []

    def tried(forward: Forward, batch: Any) -> Trial:
        chain = blocks or stages_of.called(model, names or [])
        around = [name for side in stages_of.around(model, blocks) for name in side] if blocks else []
        return trials.run(model, chain, around, forward, batch, alone=not blocks)

    def proven(names: stages_of.Names, trial: Trial, forward: Forward, batch: Any) -> None:
        stages_of.check(model, names)
        stages_of.check_used(model, names, trial)
        rehearse(trial, names, blocks, forward, batch)
        trial.twin.discard(trials.PATH)

    normalised = [name for name, module in model.named_modules() if isinstance(module, batch_norm.BATCH_NORMS)]
    if normalised:
        _log.warning(
            "pipeline: %s normalises over the samples of a microbatch, as in one process with accum_steps, not of a "
            "batch",
            normalised[0],
        )
    trial = None
    if example is not None and forward is not None:
        batch = example()
        trial = trials.together(partial(tried, forward, batch))
        _warn_of_buffers(trial, normalised)
    if names is None:
        names = stages_of.deal_out(model, degree * stages_of.stages_per_rank(parallel.pipeline_schedule), trial)
    stages_of.check(model, names)
    if trial is not None and forward is not None:
        trials.together(partial(proven, names, trial, forward, batch))

    def prove(forward: Forward, batch: Any) -> None:
        def check() -> None:
            found = tried(forward, batch)
            for block, length in zip(found.blocks, found.returns, strict=True):
                if length:
                    raise SettingError(
                        trials.PATH, ABSENT, f"{block} returns a tuple of {length}", "pass example= to assemble"
                    )
            proven(names, found, forward, batch)

        trials.together(check)

    placement = stages_of.placement(parallel.pipeline_schedule, degree, len(names))
    own = coordinates(layout, dist.get_rank())["pipeline"]
    mine = [index for index, rank in enumerate(placement) if rank == own]
    parts = {index: stages_of.stage_model(model, names, index, trial) for index in mine}
    return Stages(parts, placement, names, blocks, trial, prove)


def _warn_of_buffers(trial: Trial, normalised: Sequence[str]) -> None:
    """A warning for buffers that forward changes: it is called once a microbatch. Batch normalisation has its own."""
    if changed := sorted(name for name in trial.changed if name.rpartition(".")[0] not in normalised):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        _log.warning(
            "pipeline: forward runs once a microbatch, as in one process with accum_steps, and each time changes the "
            "buffer %s%s",
            changed[0],
            more,
        )


def _refuse_own_hooks(model: nn.Module) -> None:
    """Refuse hooks on the model itself: each stage would call them, with what it was sent. Raises SettingError."""
    if attributes.hooks_of(model):
        raise SettingError(
            "parallel.axes.pipeline",
            ABSENT,
            f"{type(model).__name__} itself has a hook, which each stage would call with what it is sent",
            "register it on a module inside, or set the degree to 1",
        )


def _positions(length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device)
