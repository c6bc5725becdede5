"""Callbacks that record: learning rates and momenta, and sample predictions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from danling_conf.components.batch import to_device
from danling_conf.components.dataloader import is_training
from danling_conf.parallel.waiting import waiting
from danling_conf.runner.batch import MetricInputs
from danling_conf.runner.callbacks import Callback, TrainingRun
from danling_conf.runner.data import is_iterable
from danling_conf.topology.violation import SettingError

Describe = Callable[[Any, Any], Sequence[str]]
"""`describe(output, batch)` returns a line for each sample."""


class LearningRateMonitor(Callback):
    """Logs the learning rate of each parameter group at log lines, as `lr.GROUP`, and its momentum as `momentum.GROUP`.

    GROUP is the group's place and name (`0-default`). The momentum is `momentum`, or the first of `betas`.

    Args:
        momentum: whether momenta are logged.
    """

    def __init__(self, *, momentum: bool = True) -> None:
        self.momentum = momentum

    def on_log(self, runner: TrainingRun) -> None:
        for index, group in enumerate(runner.optimizer.param_groups):
            name = re.sub(r"[^\w.-]+", "_", f"{index}-{group.get('name', 'group')}")
            runner.log(f"lr.{name}", group["lr"])
            momentum = group["betas"][0] if "betas" in group else group.get("momentum")
            if self.momentum and momentum is not None:
                runner.log(f"momentum.{name}", momentum)


class SamplePredictions(Callback):
    """After each evaluation of a split, writes the model's predictions of its first samples to the trackers, as text.

    They are the same samples each time, and predictions of the weights that were evaluated where `EMA` comes first.

    Args:
        samples: how many.
        split: which split. None: the first that is evaluated.
        describe: returns a line for each sample, from output and batch. None: `target -> prediction`, where the
            prediction is the index of the largest value of the last dimension.

    Raises:
        ValueError: `samples` is below 1.
    """

    def __init__(self, samples: int = 4, *, split: str | None = None, describe: Describe | None = None) -> None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        self.samples, self.split, self.describe = samples, split, describe
        self._batch: Any = None

    def setup(self, runner: TrainingRun) -> None:
        splits = [name for name in runner.loaders if not is_training(name)]
        if self.split is not None and self.split not in splits:
            known = ", ".join(splits) or "none"
            raise SettingError("callbacks", self.split, f"no such split is evaluated among {known}", "name one of them")
        for name, loader in runner.loaders.items():
            if name in splits and self.split in (None, name) and is_iterable(loader.dataset):
                rule = f"the data set of {name} has no random access, which SamplePredictions needs"
                raise SettingError("callbacks", name, rule, "name another split, or pass a map-style data set")

    def on_evaluation_end(self, runner: TrainingRun, split: str, results: Mapping[str, float]) -> None:
        if self.split is None:
            self.split = split
        if split != self.split or not results:
            return
        batch = self._first_samples(runner, split)
        lines: list[str] = []
        describe = self.describe or partial(predictions, metric_inputs=runner.setup.metric_inputs)
        assembled, passes = runner.setup.assembled, runner.setup.passes
        training = assembled.parts[0].training
        assembled.train(False)
        try:
            # In a pipeline, outputs and their microbatches are on the last stage.
            passes.evaluate(
                batch,
                largest=self.samples,
                counts=True,
                use=lambda output, part: lines.extend(describe(output, part)),
            )
        finally:
            assembled.train(training)
        if passes.rank_with_outputs:
            shared: list[Any] = [lines]
            with waiting("the sample predictions"):
                distributed.broadcast_object_list(shared, src=passes.rank_with_outputs)
            lines = shared[0]
        runner.log_text(f"{split}.predictions", "\n".join(lines[: self.samples]))

    def _first_samples(self, runner: TrainingRun, split: str) -> Any:
        if self._batch is None:
            loader = runner.loaders[split]
            collate = loader.collate_fn or torch.utils.data.default_collate
            count = min(self.samples, len(loader.dataset))
            self._batch = to_device(collate([loader.dataset[index] for index in range(count)]), runner.device)
        return self._batch


def predictions(output: Any, batch: Any, *, metric_inputs: MetricInputs) -> list[str]:
    """`target -> prediction` for each sample of a batch; the run's `metric_inputs` says which they are."""
    found, targets = metric_inputs(output, batch)[:2]
    if not isinstance(found, Tensor):
        raise TypeError(f"an output of type {type(found).__name__} has no predictions to show: pass describe=")
    if found.is_floating_point() and found.dim() > targets.dim():
        found = found.argmax(-1)
    return [f"{target.tolist()} -> {each.tolist()}" for target, each in zip(targets, found, strict=False)]
