"""Exponential moving average of the weights, as a callback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from danling_conf.checkpoint.state import MODEL, model_tensors, named_parameters
from danling_conf.runner.callbacks import Callback, TrainingRun
from danling_conf.topology.violation import SettingError


class EMA(Callback):
    """Averages the trained weights after each optimizer step, by `torch.optim.swa_utils`.

    Evaluations use the average, and so do the score and the export; training goes on with the weights themselves, which
    are what a checkpoint holds as its model. The average is in the checkpoint too, sharded as the weights are, and
    fits another layout as they do.

    Args:
        decay: share of the average that a step keeps, from 0 to 1.
        start_step: the first optimizer step whose weights are averaged; until then evaluations use the weights.
        every: optimizer steps between two updates.
        evaluate: whether evaluations use the average.
        export: whether the export of the model alone holds the average.
        use_buffers: whether saved buffers of floating point (running statistics of batch normalisation) are averaged
            and used with the weights, as in torch's `AveragedModel`. Otherwise the model's own are used.
        name: key in the checkpoint. None: `EMA`.

    Attributes:
        averaged: updates done.

    Raises:
        ValueError: `decay` is not between 0 and 1, or `start_step` or `every` is below 1.
    """

    def __init__(
        self,
        decay: float = 0.999,
        *,
        start_step: int = 1,
        every: int = 1,
        evaluate: bool = True,
        export: bool = True,
        use_buffers: bool = False,
        name: str | None = None,
    ) -> None:
        if start_step < 1 or every < 1:
            raise ValueError(f"start_step and every must be at least 1, not {start_step} and {every}")
        self.name = name
        self.decay, self.start_step, self.every = decay, start_step, every
        self.evaluate, self.export, self.use_buffers = evaluate, export, use_buffers
        self.averaged = 0
        self._update: Any = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        self._weights: dict[str, Tensor] = {}
        self._average: dict[str, Tensor] = {}
        self._groups: list[list[str]] = []
        self._swapped = False

    def setup(self, runner: TrainingRun) -> None:
        zero = runner.setup.zero
        if zero is not None and zero.stage == 3:
            rule = "ZeRO 3 holds no weights between two steps that could be averaged"
            raise SettingError("callbacks", self.name or "EMA", rule, "deepspeed=zero2, or stack=auto parallel=fsdpN")
        self._find(runner)
        self._average = {name: item.detach().clone() for name, item in self._weights.items()}
        # torch's update takes lists of plain tensors of one kind. Average and weight are sharded alike, so that each
        # rank can update what it holds.
        groups: dict[Any, list[str]] = {}
        for name, weight in self._weights.items():
            groups.setdefault((weight.dtype, weight.device), []).append(name)
        self._groups = list(groups.values())

    def _find(self, runner: TrainingRun) -> None:
        self._weights = {name: item for name, item in named_parameters(runner.parts) if item.requires_grad}
        if self.use_buffers:
            parameters = {name for name, _ in named_parameters(runner.parts)}
            self._weights |= {
                name: item
                for full_name, item in model_tensors(runner.parts).items()
                if (name := full_name.removeprefix(MODEL)) not in parameters and item.is_floating_point()
            }

    @torch.no_grad()
    def on_step_end(self, runner: TrainingRun) -> None:
        step = runner.global_step
        if step < self.start_step or (step - self.start_step) % self.every:
            return
        if self.use_buffers:  # a forward may have put others in their place
            self._find(runner)
        for averages, weights in self._held():
            if self.averaged:
                self._update(averages, weights, self.averaged)
            else:
                for average, weight in zip(averages, weights, strict=True):
                    average.copy_(weight)
        self.averaged += 1

    def on_evaluation_start(self, runner: TrainingRun, split: str) -> None:
        if self.evaluate:
            self._swap(runner, True)

    def on_evaluation_end(self, runner: TrainingRun, split: str, results: Mapping[str, float]) -> None:
        self._swap(runner, False)

    def on_export_start(self, runner: TrainingRun) -> None:
        if self.export:
            self._swap(runner, True)

    def on_export_end(self, runner: TrainingRun) -> None:
        self._swap(runner, False)

    def state_dict(self) -> dict[str, Any]:
        return {"averaged": self.averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.averaged = state["averaged"]

    def tensors(self) -> Mapping[str, Tensor]:
        return self._average

    @torch.no_grad()
    def _swap(self, runner: TrainingRun, average: bool) -> None:
        """Exchange weights and average, where they are not as wanted; one tensor more is held meanwhile."""
        if self._swapped == average or not self.averaged:
            return
        for averages, weights in self._held():
            for held, weight in zip(averages, weights, strict=True):
                before = weight.clone()
                weight.copy_(held)
                held.copy_(before)
        # FSDP2 may keep the whole weights of an evaluation's forward, and would go on to train with those.
        for part in runner.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        self._swapped = average

    def _held(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """What this rank holds of averages and weights, in lists of one dtype and device."""
        # Looked up each time: FSDP2 replaces the memory of padded shards at its first forward.
        for names in self._groups:
            yield [_local(self._average[name]) for name in names], [_local(self._weights[name]) for name in names]


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, in the same memory."""
    plain = tensor.detach()
    return plain.to_local() if isinstance(plain, DTensor) else plain
