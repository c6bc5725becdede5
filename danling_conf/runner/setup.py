"""Setup of a run: the objects that training needs, built once, before the first step.

Every rank builds the same, in the same order, since building communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from danling_conf.components import dataloader as loaders
from danling_conf.components import optimizer as optimizers
from danling_conf.components import precision
from danling_conf.components.batch import CountSamples
from danling_conf.components.batch import count_samples as count_by_rule
from danling_conf.components.instantiate import model_factory
from danling_conf.parallel import artifacts, zero_state
from danling_conf.parallel.artifacts import Artifact
from danling_conf.parallel.deepspeed import ZeroEngine
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.graph import compiled_update
from danling_conf.parallel.measured import Loss
from danling_conf.parallel.model import Assembled, assemble, with_engine
from danling_conf.runner.batch import Forward, MetricInputs, forward_of, loss_of_output, metric_inputs_of
from danling_conf.runner.cadence import Cadence, cadence_of
from danling_conf.runner.data import batches_per_epoch, check_sequences, evaluated_splits, example_of, make_loaders
from danling_conf.runner.observe.flops import Utilisation
from danling_conf.runner.schedule import Schedule
from danling_conf.runner.score import Score, make_score
from danling_conf.runner.world import World
from danling_conf.schema import RunnerConfig
from danling_conf.schema.nearest import nearest
from danling_conf.schema.setting import open_keys
from danling_conf.topology.violation import ABSENT, SettingError, Violation, refuse


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run trains with."""

    loaders: dict[str, Any]
    """By split."""
    cadence: Cadence
    utilisation: Utilisation
    assembled: Assembled
    model: nn.Module
    """The model; in a pipeline, a list of this rank's stages."""
    parameters: list[nn.Parameter]
    """Those of this rank that are trained."""
    optimizer: Optimizer
    compiled_update: Callable[[], object] | None
    """The optimizer's step as a graph; None where it is not compiled."""
    metrics: dict[str, Any]
    metric_inputs: MetricInputs
    """Makes the arguments of a metric's update."""
    score: Score
    schedule: Schedule
    passes: Passes
    autocast: Callable[[], AbstractContextManager[object]]
    """Makes the context of forward and loss."""
    scaler: torch.amp.GradScaler | None
    """Of the loss, for fp16."""
    artifact: Artifact | None
    """What the run has compiled, where it is kept for others."""
    samples_per_step: int
    """Samples of one optimizer step, over all ranks."""
    tokens_per_sample: int | None

    @property
    def pipeline_group(self) -> ProcessGroup | None:
        """The ranks that hold the other stages' parameters; None without a pipeline."""
        return None if self.assembled.pipeline is None else self.assembled.pipeline.group

    @property
    def zero(self) -> ZeroEngine | None:
        """The engine that clips and makes the optimizer's step; None where the loop does both."""
        engine = self.assembled.engine
        return engine if engine is not None and engine.partitions else None

    def whole(self, *, loading: bool = False) -> AbstractContextManager[tuple[Sequence[nn.Module], Optimizer]]:
        """Model and optimizer as a checkpoint knows them: by parameter. Collective.

        Args:
            loading: whether they are loaded inside, and not saved.
        """
        if self.zero is None:
            return nullcontext((self.assembled.parts, self.optimizer))
        return zero_state.whole(self.zero, loading=loading)


def set_up(
    config: RunnerConfig,
    world: World,
    model: nn.Module | Callable[[], nn.Module] | None,
    datasets: Mapping[str, Any],
    *,
    loss: Loss | None,
    metrics: Mapping[str, Any] | None,
    metric_inputs: MetricInputs | None,
    forward: Forward | None,
    collate_fn: Callable[[list[Any]], Any] | None,
    count_samples: CountSamples | None,
    tokens_per_sample: int | None,
) -> Setup:
    """Build everything that training needs. Collective. See `Runner.prepare` for the arguments.

    Raises:
        SettingError: the configuration does not fit the model or the data.
    """
    _check_splits(config, datasets)
    split_loaders = make_loaders(
        datasets,
        config.dataloader,
        data_rank=world.data_rank,
        data_degree=world.data_degree,
        seed=world.attempt.seed,
        collate_fn=collate_fn,
        evaluating=(world.rank_in_group, world.layout.data_degree),
    )
    cadence = cadence_of(config, batches_per_epoch(split_loaders["train"]))
    model = model_factory(config.model) if model is None else model
    run_model, objective = forward or forward_of(config.batch), loss or loss_of_output
    count = count_samples or count_by_rule
    utilisation = _utilisation(config, world, model, run_model, objective, count)
    example = example_of(split_loaders["train"], world.attempt.seed)
    assembled = _assembled(config, world, model, example, run_model, loss)
    samples = loaders.settings_for(config.dataloader, "train").batch_size or 1
    artifact = artifacts.begin(
        config.compile,
        assembled.parts,
        layout=world.layout,
        rank=world.ranks.rank,
        device=world.device,
        precision=config.precision,
        batch_size=samples,
    )
    check_sequences(split_loaders, assembled, world.layout, config.parallel)
    _check_loss(loss, assembled, world)
    trained = nn.ModuleList(assembled.parts) if assembled.pipeline is not None else assembled.module
    optimizer = _optimizer(config, assembled, trained)
    measures = {name: _metric(given, world.device) for name, given in (metrics or {}).items()}
    score = make_score(
        split=config.score_split,
        name=config.score_name,
        mode=config.score_mode,
        patience=config.patience,
        splits=datasets,
        metrics=measures,
    )
    schedule = _schedule(config, optimizer, cadence, score, datasets, measures)
    if config.stack == "deepspeed":
        # Behind the schedule: of the stages of ZeRO, only the groups themselves stay as they are.
        assembled = with_engine(assembled, _engine(config, world, trained, optimizer, samples), world.mesh)
    assembled.train()
    # FSDP casts by its own policy; autocast on top of it would cast twice.
    cast = None if config.fsdp.enabled else config.precision
    autocast = nullcontext if cast in (None, "fp32") else partial(precision.autocast, cast, world.device.type)
    scaler = precision.scaler(cast, world.device.type)
    return Setup(
        loaders=split_loaders,
        cadence=cadence,
        utilisation=utilisation,
        assembled=assembled,
        model=trained,
        parameters=[item for _, item in assembled.named_parameters() if item.requires_grad],
        optimizer=optimizer,
        compiled_update=compiled_update(optimizer, config.compile) if config.stack == "graph" else None,
        metrics=measures,
        metric_inputs=metric_inputs or metric_inputs_of(config.batch),
        score=score,
        schedule=schedule,
        passes=Passes(
            assembled,
            run_model,
            objective,
            world.layout,
            world.device,
            autocast=autocast,
            scaler=scaler,
            count=count,
            graph=config.compile if config.stack == "graph" else None,
        ),
        autocast=autocast,
        scaler=scaler,
        artifact=artifact,
        samples_per_step=samples * world.data_degree * config.accum_steps,
        tokens_per_sample=tokens_per_sample,
    )


def _check_splits(config: RunnerConfig, datasets: Mapping[str, Any]) -> None:
    """Refuse settings for a split that there is no data set of, which would change nothing, and undeclared splits."""
    if not isinstance(datasets, Mapping):  # which is refused as such
        return
    section, known = config.dataloader, ", ".join(datasets)
    if config.score_split is not None and config.score_split not in datasets:
        near = nearest(config.score_split, datasets)
        fix = f"did you mean score_split={near}?" if near else "name one of them, or leave it unset"
        rule = f"there is no data set of that name; there are {known}"
        raise SettingError("score_split", config.score_split, rule, fix)
    refuse(
        Violation("dataloader.splits", section.splits, f"there is a data set {split}", "add its name")
        for split in datasets
        if section.splits is not None and split not in section.splits
    )
    refuse(
        Violation(
            f"dataloader.{split}",
            ABSENT,
            f"there is no data set of that name; there are {known}",
            f"did you mean dataloader.{near}?" if (near := nearest(split, datasets)) else "remove it",
        )
        for split in open_keys(section)
        if split not in datasets
    )


def _utilisation(
    config: RunnerConfig,
    world: World,
    model: nn.Module | Callable[[], nn.Module],
    forward: Forward,
    loss: Loss,
    count: CountSamples,
) -> Utilisation:
    # Before the model is assembled, which changes a module in place: its FLOPs are counted on a copy.
    return Utilisation(
        model,
        forward,
        loss,
        count=count,
        device=world.device,
        precision=config.precision,
        devices=world.ranks.world_size * world.groups,
    )


def _assembled(
    config: RunnerConfig,
    world: World,
    model: nn.Module | Callable[[], nn.Module],
    example: Callable[[], Any] | None,
    forward: Forward,
    loss: Loss | None,
) -> Assembled:
    return assemble(
        model,
        layout=world.layout,
        mesh=world.mesh,
        device=world.device,
        seed=world.attempt.seed,
        fsdp=config.fsdp,
        compile=config.compile,
        activation_checkpointing=config.activation_checkpointing,
        parallel=config.parallel,
        expert_mesh=world.expert_mesh,
        precision=config.precision,
        example=example,
        forward=forward,
        loss=loss,
        for_engine=config.stack == "deepspeed",
    )


def _check_loss(loss: Loss | None, assembled: Assembled, world: World) -> None:
    if loss is None and assembled.context is not None:
        raise SettingError(
            "parallel.axes.context",
            world.layout.context,
            "the model's own loss shifts labels inside of each part of a sequence",
            "pass a loss, and data whose targets are shifted already",
        )


def _optimizer(config: RunnerConfig, assembled: Assembled, model: nn.Module) -> Optimizer:
    if assembled.pipeline is None:
        return optimizers.make(model, config.optim)
    return optimizers.make(assembled.named_parameters(), config.optim, whole=assembled.whole)


def _engine(config: RunnerConfig, world: World, model: nn.Module, optimizer: Optimizer, batch_size: int) -> ZeroEngine:
    return ZeroEngine(
        model,
        optimizer,
        config.deepspeed,
        batch_size=batch_size,
        max_norm=config.max_grad_norm,
        device=world.device,
        local_rank=world.ranks.local_rank,
    )


def _metric(given: Any, device: torch.device) -> Any:
    metric = given if hasattr(given, "update") and not isinstance(given, type) else given()
    return metric.to(device) if hasattr(metric, "to") else metric


def _schedule(
    config: RunnerConfig,
    optimizer: Optimizer,
    cadence: Cadence,
    score: Score,
    datasets: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> Schedule:
    measured = evaluated_splits(datasets, score.split, final=False)
    return Schedule(
        config.scheduler,
        optimizer,
        cadence,
        score=score,
        measured=[f"{split}.{name}" for split in measured for name in ("loss", *metrics)],
        metrics=metrics,
    )
