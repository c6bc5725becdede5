"""Preflight: one batch of each split that is evaluated goes through model, loss and metrics before the first step.

What is wrong with a held-out split, or with what metrics make of it, would otherwise end the run after its first epoch.
The training split needs no such look: its first batch is the first step's, and is refused there (`Passes.train`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from danling_conf._torch_private.compiling import dynamo_is_loaded
from danling_conf.components import dataloader
from danling_conf.components.batch import described, to_device
from danling_conf.components.samplers import ShardedSampler
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.process_group import gathered, is_distributed, refuse_together
from danling_conf.runner import process
from danling_conf.runner.batch import MetricInputs
from danling_conf.runner.data import no_batch
from danling_conf.runner.evaluation import exchange
from danling_conf.topology.violation import ABSENT, SettingError, Violation


def preflight(
    passes: Passes,
    loaders: Mapping[str, Any],
    *,
    metrics: Mapping[str, Any],
    metric_inputs: MetricInputs,
    device: torch.device,
) -> None:
    """Evaluate one batch of each split that is not trained on. Collective.

    The run that follows is not changed by it: generators, loaders, metrics and the model's mode are put back.

    Raises:
        ConfigRefused: on all ranks alike: a split has no batch, its samples cannot be counted, the model cannot be
            called with it, the loss is none, or a metric cannot take it or is not one number.
    """
    model = passes.model
    training, generators = model.parts[0].training, process.generator_state(device)
    tried = {name: copy.deepcopy(metric) for name, metric in metrics.items()}  # they may count, or keep what they saw
    model.train(False)
    try:
        with _eagerly():
            for split, loader in loaders.items():
                if not dataloader.is_training(split):
                    _try(passes, loader, split, tried, metric_inputs, device)
    finally:
        model.train(training)
        process.restore_generators(generators, device)


def _eagerly() -> AbstractContextManager[object]:
    """A context in which nothing is compiled: it would be for the shapes of a held-out split, and again, for shapes of
    any size, once training has others."""
    # torch.compiler imports dynamo, which takes seconds and is not needed where nothing is compiled.
    return torch.compiler.set_stance("force_eager") if dynamo_is_loaded() else nullcontext()


def _try(
    passes: Passes,
    loader: Any,
    split: str,
    metrics: Mapping[str, Any],
    metric_inputs: MetricInputs,
    device: torch.device,
) -> None:
    batch = _first(loader)
    has = batch is not None
    faults: list[Violation] = []
    samples = 0
    if has:
        try:
            samples = _count(passes, loader, batch, split)
        except SettingError as error:
            faults.append(error.violation)
    of_ranks = gathered(has)
    if not any(of_ranks):
        faults.append(no_batch(split).violation)
    refuse_together(faults)
    if is_distributed():
        found = exchange(batch, has, samples)
        assert found is not None  # some rank has one
        batch, samples, _ = found
    if device.type != "cpu":
        batch = to_device(batch, device)
    for metric in metrics.values():
        metric.reset()

    def update(output: Any, part: Any) -> None:
        inputs = metric_inputs(output, part)
        for name, metric in metrics.items():
            _update(name, metric, inputs)

    try:
        passes.evaluate(
            batch,
            largest=samples,
            counts=has,
            use=update if metrics else None,
            faults=faults,
            first=split,
            even=_is_even(loader) and all(of_ranks),
        )
    except SettingError as error:
        faults.append(error.violation)
    refuse_together(faults)
    passes.communicates = any(gathered(passes.communicates))
    refuse_together([fault for name, metric in metrics.items() if (fault := _no_number(name, metric)) is not None])


def _first(loader: Any) -> Any:
    """The first batch of a loader as an evaluation gets it; None where it has none.

    By the loader itself: its workers open files that must not be opened before they are forked.
    """
    drawn = None if loader.generator is None else loader.generator.get_state()
    batch = next(iter(loader), None)
    dataloader.stop_workers(loader)
    if drawn is not None:
        loader.generator.set_state(drawn)
    return batch


def _is_even(loader: Any) -> bool:
    """Whether all ranks evaluate equally many samples; of iterable data that is not known before. Collective."""
    sampler = loader.sampler
    return len(set(gathered(len(sampler) if isinstance(sampler, ShardedSampler) else None))) == 1


def _count(passes: Passes, loader: Any, batch: Any, split: str) -> int:
    """Samples of a first batch, by the rule or the user's function, where the sampler does not know better."""
    samples = passes.count(batch)
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise SettingError("count_samples", ABSENT, f"it returned a {type(samples).__name__}", "return an int")
    sampler = loader.sampler
    drawn = min(loader.batch_size or 1, len(sampler)) if isinstance(sampler, ShardedSampler) else samples
    if samples != drawn and passes.counts_by_rule:
        raise SettingError(
            "count_samples",
            ABSENT,
            f"split {split}: by the first dim of its first tensor, {described(batch)} has {samples} samples, and "
            f"{drawn} were drawn",
            "put a tensor with a dim for the samples first, or pass count_samples=, a function of a batch",
        )
    return samples


def _update(name: str, metric: Any, inputs: tuple[Any, ...]) -> None:
    try:
        metric.update(*inputs)
    except SettingError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError, AttributeError) as error:
        shown = ", ".join(_shown(item) for item in inputs)
        raise SettingError(
            f"metrics.{name}",
            ABSENT,
            f"its update cannot take ({shown}): {' '.join(str(error).split())}",
            "name the targets (batch.targets), or pass metric_inputs=, a function of output and batch",
        ) from error


def _no_number(name: str, metric: Any) -> Violation | None:
    """Why a metric's value is none that can be logged; None where it is one. Collective where the metric is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a rank without a batch has not updated it
            value = metric.compute()
    except Exception:
        return None  # of one batch: some metrics need more samples than that
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        rule = f"its compute returned {_shown(value)}, and a metric is one number"
        return Violation(f"metrics.{name}", ABSENT, rule, "reduce it, such as by average=macro, or wrap it")
    return None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    return f"a {type(value).__name__}"
