"""Forward and backward passes of an assembled model, under any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from danling_conf.components import gradients
from danling_conf.parallel import inside_step
from danling_conf.parallel.model import Assembled
from danling_conf.parallel.pipeline import batch_size, passes
from danling_conf.parallel.process_group import is_distributed
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.topology.layout import rank_at
from danling_conf.topology.violation import ABSENT, SettingError

Forward = Callable[[Any, Any], Any]
"""Runs a model on a batch: `forward(model, batch)`."""

Loss = Callable[[Any, Any], "Tensor | tuple[Tensor, Tensor | int]"]
"""`loss(output, batch)`: a mean; or a sum and its count, such as the number of tokens that are not masked."""

_NOTE = (
    "The logits are sharded over the vocabulary (parallel.loss_parallel=true), which torch's cross-entropy can take; "
    "for another loss, gather them: parallel.loss_parallel=false"
)


@dataclass(frozen=True)
class Measured:
    """A loss of this rank: a total and its weight, whose ratio is the mean. Both are 0 where another stage has it."""

    total: Tensor
    weight: Tensor | float

    @property
    def mean(self) -> Tensor:
        """The mean; not a number on ranks that do not have the loss."""
        is_mean = isinstance(self.weight, float) and self.weight == 1.0
        return self.total if is_mean else self.total / self.weight


class Passes:
    """Trains and evaluates an assembled model with a loss.

    A loss that returns a mean is averaged over micro-batches, microbatches and ranks, so that batches weigh the same.
    One that returns a sum and a count is divided by the total count, so that tokens weigh the same however unevenly
    ranks have them; a mean of means would be another number.

    Args:
        forward, loss: see `Forward` and `Loss`; called with this rank's part of the batch.
        layout: of the run.
        autocast: makes the context of forward and loss.
        scaler: of the loss, for fp16.
    """

    def __init__(
        self,
        model: Assembled,
        forward: Forward,
        loss: Loss,
        layout: Layout,
        device: torch.device,
        *,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.forward, self.loss = model, forward, loss
        self.device, self.autocast, self.scaler = device, autocast, scaler
        self._ranks_of_batch = layout.data_degree * layout.context
        self._copies = layout.tensor
        last = 0 if model.pipeline is None else model.pipeline.placement[-1]
        self.rank_with_outputs = rank_at(layout, {**dict.fromkeys(WORLD_AXES, 0), "pipeline": last})
        """A rank that sees outputs: the first one of the last stage."""
        self._weighted: bool | None = None
        self._counted: Tensor | None = None

    def train(self, batch: Any, *, micro_batches: int = 1, last: bool = True) -> Measured:
        """Forward and backward of one micro-batch of an optimizer step; gradients are communicated at the `last`.
        Returns its loss, detached and not waited for. Collective."""
        batch = self.part(batch)
        with self._inside(self.model.sharded_logits):
            if self.model.pipeline is not None:
                return self._train_pipeline(batch, micro_batches)
            if micro_batches == 1:
                return self._train_whole(batch, 1, last=True)
            with gradients.accumulate(self.model.module, last=last):
                return self._train_whole(batch, micro_batches, last=last)

    def finish(self, parameters: Iterable[nn.Parameter]) -> None:
        """Complete the gradients over the data ranks, and divide them by the count where the loss returns one; call it
        after the last micro-batch of a step. Collective. Raises ConfigRefused where a parameter has no gradient, and
        `parallel.unused_parameters` does not allow it."""
        if self.model.gradients is not None:
            self.model.gradients.finish()
        if self._weighted is None:
            self._weighted = self._agreed(self._counted is not None)
        if not self._weighted:
            return
        counted = torch.zeros((), device=self.device) if self._counted is None else self._counted
        self._counted = None
        if is_distributed():
            dist.all_reduce(counted)
        # Gradients are means over the ranks with tokens of their own, of sums; tensor ranks counted the same tokens.
        factor = self._ranks_of_batch * self._copies / counted.clamp(min=1)
        for grad in (parameter.grad for parameter in parameters if parameter.grad is not None):
            (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)

    def evaluate(
        self, batch: Any, *, largest: int, counts: bool, use: Callable[[Any, Any], None] | None = None
    ) -> Measured:
        """Forward and loss of a batch, without gradients. Collective.

        Args:
            largest: samples of the largest batch that a rank evaluates now.
            counts: whether the outcome is used. A rank that has run out of batches takes part with any other one, since
                the collectives inside need every rank.
            use: called with each output and its (micro)batch, on ranks that have them. Outputs are whole then.
        """
        batch = self.part(batch)
        found = [Measured(torch.zeros((), device=self.device), 0.0)]

        def take(output: Any, part: Any) -> None:
            if counts:
                value = self._measured(output, part)
                weight = value.weight if self._has_count(value) else batch_size(part)
                total = value.total if self._has_count(value) else value.total * weight
                found.append(Measured(total.double(), weight))
                if use is not None:
                    use(output, part)

        def evaluated(module: nn.Module) -> None:
            with self.autocast():
                take(self.forward(module, self.model.inputs(batch)), batch)

        with self._inside(self.model.sharded_logits and use is None), torch.no_grad():
            pipeline = self.model.pipeline
            if pipeline is None:
                self.model.run(evaluated, training=False)
            else:
                count = passes(pipeline.section, batch_size(batch), largest)
                pipeline.evaluate(batch, count, self.forward, take, self.autocast)
        return Measured(sum(item.total for item in found), sum(item.weight for item in found))  # type: ignore[arg-type]

    def part(self, batch: Any) -> Any:
        """This rank's part of the sequences of a batch."""
        return batch if self.model.context is None else self.model.context.part(batch)

    def _inside(self, sharded_logits: bool) -> AbstractContextManager[None]:
        """The context of a step, where the model looks at whether there is one."""
        if self.model.context is None and not sharded_logits:
            return nullcontext()
        return inside_step.step(sharded_logits=sharded_logits)

    def _measured(self, output: Any, batch: Any) -> Measured:
        try:
            return _measured(self.loss(output, batch))
        except (RuntimeError, NotImplementedError) as error:
            if inside_step.sharded_logits() and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(_NOTE)
            raise

    def _train_whole(self, batch: Any, micro_batches: int, *, last: bool) -> Measured:
        found: list[Measured] = []

        def objective(module: nn.Module) -> Tensor:
            with self.autocast():
                found.append(self._measured(self.forward(module, self.model.inputs(batch)), batch))
            return found[0].total

        # The loss is what comes out of the wrapped model: its wrapper sees a tensor, whatever the model returns.
        total = self.model.run(objective, training=True)
        assert total is not None
        measured = Measured(total, found[0].weight)
        if self.model.gradients is not None:
            self.model.gradients.before_backward(total, last=last)
        self._scaled(measured, micro_batches).backward()
        return Measured(total.detach(), measured.weight)

    def _train_pipeline(self, batch: Any, micro_batches: int) -> Measured:
        pipeline = self.model.pipeline
        assert pipeline is not None
        cut = micro_batches * len(pipeline.microbatches(batch))
        found: list[Measured] = []

        def objective(output: Any, microbatch: Any) -> Tensor:
            measured = self._measured(output, microbatch)
            found.append(Measured(measured.total.detach(), measured.weight))
            return self._scaled(measured, cut, count=False)

        pipeline.train(batch, self.forward, objective, self.autocast)
        # The first pass of all runs one microbatch more: torch learns from it the shapes that stages send.
        found = found[-(cut // micro_batches) :]
        if not found:
            return Measured(torch.zeros((), device=self.device), 0.0)
        if not self._has_count(found[0]):
            return Measured(torch.stack([item.total for item in found]).mean(), 1.0)
        for item in found:
            self._count(item)
        return Measured(sum(item.total for item in found), sum(item.weight for item in found))  # type: ignore[arg-type]

    def _scaled(self, measured: Measured, cut: int, *, count: bool = True) -> Tensor:
        """The scalar to call `backward` on."""
        if self._has_count(measured):
            if count:
                self._count(measured)
            value = measured.total
        else:
            value = measured.total if cut == 1 else measured.total / cut
        return value if self.scaler is None else self.scaler.scale(value)

    def _count(self, measured: Measured) -> None:
        weight = torch.as_tensor(measured.weight, dtype=torch.float32, device=self.device)
        self._counted = weight.clone() if self._counted is None else self._counted + weight

    @staticmethod
    def _has_count(measured: Measured) -> bool:
        return not isinstance(measured.weight, float)

    def _agreed(self, mine: bool) -> bool:
        """Whether any rank's loss returns a count: in a pipeline, only the rank of the last stage knows."""
        if self.model.pipeline is None:
            return mine
        flag = torch.tensor(int(mine), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _measured(value: Any) -> Measured:
    """A loss as total and weight: a mean has the weight 1.0, a count is a tensor."""
    is_pair = isinstance(value, tuple)
    total, weight = value if is_pair else (value, 1.0)
    if not isinstance(total, Tensor):
        raise SettingError(
            "loss",
            ABSENT,
            f"it returned a {type(total).__name__}",
            "return a scalar tensor, or a pair of a sum and its count",
        )
    if isinstance(total, DTensor):
        total = total.redistribute(placements=[Replicate()] * total.device_mesh.ndim).to_local()
    if is_pair:
        weight = torch.as_tensor(weight, device=total.device)
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
    return Measured(total, weight)
