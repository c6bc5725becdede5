"""Forward and backward passes of an assembled model, under any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danling_conf._torch_private.compiling import is_compiled
from danling_conf._torch_private.data_parallel import Replicated
from danling_conf.components import gradients
from danling_conf.components.batch import CountSamples, count_samples, tensors
from danling_conf.parallel import inside_step, second_derivatives
from danling_conf.parallel.first_batch import watched_loss, watched_model
from danling_conf.parallel.gathering_loss import Collectives
from danling_conf.parallel.graph import WholeStep
from danling_conf.parallel.measured import Loss, Measured, measured_of
from danling_conf.parallel.model import Assembled
from danling_conf.parallel.pipeline import passes
from danling_conf.parallel.process_group import is_distributed, refuse_together
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.layout import WORLD_AXES, Layout
from danling_conf.topology.layout import rank_at
from danling_conf.topology.violation import SettingError, Violation

Forward = Callable[[Any, Any], Any]
"""Runs a model on a batch: `forward(model, batch)`."""

_NOTE = (
    "The logits are sharded over the vocabulary (parallel.loss_parallel=true), which torch's cross-entropy can take; "
    "for another loss, gather them: parallel.loss_parallel=false"
)


class Passes:
    """Trains and evaluates an assembled model with a loss.

    A loss that returns a mean is averaged over micro-batches, microbatches and ranks, so that batches weigh the same.
    One that returns a sum and a count is divided by the total count, so that tokens weigh the same however unevenly
    ranks have them; a mean of means would be another number.

    What a loss may not be (a vector, an integer, detached, no tensor) is refused at the first batch, before anything
    is made of its gradients, and on all ranks alike.

    Args:
        forward: see `Forward`; called with this rank's part of the batch.
        loss: see `Loss`; likewise.
        layout: of the run.
        autocast: makes the context of forward and loss.
        scaler: of the loss, for fp16.
        count: samples in a batch.
        graph: compiles forward, loss and backward into one graph by this section; one process only.
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
        count: CountSamples = count_samples,
        graph: CompileConfig | None = None,
    ) -> None:
        self.model, self.forward, self.loss, self.layout = model, forward, loss, layout
        self.device, self.autocast, self.scaler, self.count = device, autocast, scaler, count
        if model.pipeline is not None:
            model.pipeline.count = count
        self._ranks_of_batch = layout.data_degree * layout.context
        self._copies = layout.tensor
        last = 0 if model.pipeline is None else model.pipeline.placement[-1]
        self.rank_with_outputs = rank_at(layout, {**dict.fromkeys(WORLD_AXES, 0), "pipeline": last})
        """A rank that sees outputs: the first one of the last stage."""
        self._prove_layout = model.prove_layout
        self._in_parts = model.context is not None or model.sharded_logits
        """Whether the model looks at whether it is inside of a step."""
        self._unwrapped = model.direct
        by_ddp = isinstance(model.parts[0], Replicated) and model.pipeline is None and model.engine is None
        self._plain = (
            (self._unwrapped or (by_ddp and not model.compiled))
            and not self._in_parts
            and model.policy is None
            and model.buffers is None
            and autocast is nullcontext
            and graph is None
        )
        """Whether at most DDP stands between a batch, the model and its loss: no cast, no part to cut out, no graph."""
        self._pass = self._train_whole if model.pipeline is None else self._train_pipeline
        self._whole_step: WholeStep | None = None
        if graph is not None:
            self._whole_step = WholeStep(self._objective, graph)
            self._pass = self._train_graph
        self._weighted: bool | None = None
        self.completes = True
        """Whether `finish` has something to complete in a step of as many micro-batches as planned. Known after the
        first."""
        self._counted: Tensor | None = None
        self._proven = False
        """Whether a whole pass was without fault on all ranks."""
        self._broken = False
        """Whether a pass through a pipeline did not come to its end."""
        self.communicates = False
        """Whether a loss that was tried on the first batch of a split communicates over the ranks."""
        self._even = True
        self._first: str | None = None
        """The split whose first batch is under way; None for later batches."""
        self._compiled = model.compiled or any(map(is_compiled, model.parts))
        self.counts_by_rule = count is count_samples
        """Whether samples are counted by the rule of `components.batch`, and not by a function of the user's."""

    def train(self, batch: Any, *, micro_batches: int = 1, last: bool = True) -> Measured:
        """Forward and backward of one micro-batch of an optimizer step; gradients are communicated at the `last`.
        Returns its loss, detached and not waited for. Collective.

        Raises:
            ConfigRefused: at the first batch, on all ranks: the batch or the loss is not what it must be.
            SettingError: the same at a later batch, on the ranks where it is so.
        """
        if self._plain and self._proven and (micro_batches == 1 or self._unwrapped):
            return self._train_plain(batch, micro_batches, last)
        if self._prove_layout is not None:
            self._prove_layout(self.forward, batch, self.loss)
            self._prove_layout = None
        if self.model.buffers is not None:
            self.model.buffers.begin()
        if not self._proven:
            self._first = "train" if self._whole_step is None else None
        if micro_batches == 1 and not self._in_parts:
            measured = self._pass(batch, 1, last)
        else:
            with self._inside(accumulates=micro_batches > 1, last=last):
                measured = self._pass(batch, micro_batches, last)
        self._proven, self._first = True, None
        return measured

    def _train_plain(self, batch: Any, micro_batches: int, last: bool) -> Measured:
        """A pass of a model that at most DDP wraps, after one that was without fault. All in one function: after a pass
        none of this code is in the processor's cache, and each function that a step calls costs about a microsecond."""
        module, completion = self.model.parts[0], self.model.gradients
        if isinstance(module, Replicated):
            module.begin()
            measured = measured_of(self.loss(self.forward(module.module, batch), batch))
            measured.total = module.end(measured.total)
        else:
            measured = measured_of(self.loss(self.forward(module, batch), batch))
        total = measured.total
        if completion is not None:
            completion.before_backward(total, last=last)
        usual = micro_batches == 1 and self.scaler is None and type(measured.weight) is float
        (total if usual else self._scaled(measured, micro_batches)).backward()
        measured.total = total.detach()
        measured.graph = total if total.is_cpu else None
        return measured

    @contextmanager
    def _inside(self, *, accumulates: bool, last: bool) -> Iterator[None]:
        """The context of a pass that works on parts of sequences, or is one of several of its optimizer step."""
        accumulates = accumulates and self.model.pipeline is None and self._whole_step is None
        with (
            self.inside(self.model.sharded_logits),
            gradients.accumulate(self.model.module, last=last) if accumulates else nullcontext(),
        ):
            yield

    def finish(self, parameters: Iterable[nn.Parameter], *, rescale: float = 1.0) -> Tensor | None:
        """Complete the gradients over the data ranks, and divide them by the count where the loss returns one; call it
        after the last micro-batch of a step. Collective.

        Args:
            rescale: planned over actual micro-batches of a step, which a mean is multiplied by.

        Returns:
            The count, of all ranks together; None where the loss is a mean.

        Raises:
            ConfigRefused: a parameter has no gradient, which `parallel.unused_parameters` does not allow.
        """
        if self.model.gradients is not None:
            self.model.gradients.finish()
        if self.model.buffers is not None:
            self.model.buffers.finish()
        if self._weighted is None:
            self._weighted = self._agreed(self._counted is not None)
            self.completes = self._weighted or self.model.gradients is not None or self.model.buffers is not None
        if not self._weighted:
            if rescale != 1.0:
                self._multiply(parameters, rescale)
            return None
        counted = torch.zeros((), device=self.device) if self._counted is None else self._counted
        self._counted = None
        if is_distributed():
            dist.all_reduce(counted)
        # Gradients are means over the ranks with tokens of their own, of sums; tensor ranks counted the same tokens.
        factor = self._ranks_of_batch * self._copies / counted.clamp(min=1)
        self._multiply(parameters, factor)
        return counted

    def forget(self) -> None:
        """Drop the micro-batches of the step under way: it does not take place."""
        self._counted = None
        for part in self.model.parts:
            gradients.forget(part)
        if self.model.engine is not None:
            self.model.engine.forget()
        if self.model.gradients is not None:
            self.model.gradients.forget()

    def evaluate(
        self,
        batch: Any,
        *,
        largest: int,
        counts: bool,
        use: Callable[[Any, Any], None] | None = None,
        faults: list[Violation] | None = None,
        first: str | None = None,
        even: bool = True,
    ) -> Measured:
        """Forward and loss of a batch, without gradients. Collective.

        Args:
            largest: samples of the largest batch that a rank evaluates now.
            counts: whether the outcome is used. A rank that has run out of batches takes part with any other one, since
                the collectives inside need every rank.
            use: called with each output and its (micro)batch, on ranks that have them. Outputs are whole then.
            faults: takes what loss and `use` refuse, which is raised without. A rank of a pipeline that raised alone
                would leave the others waiting.
            first: the split whose first batch this is.
            even: whether ranks have equally many samples of that split, without which a loss may not communicate.
        """
        self._first, self._even = first, even
        batch = self.part(batch)
        found = [Measured(torch.zeros((), device=self.device), 0.0)]

        def look(output: Any, part: Any) -> None:
            value = self._measured(output, part)
            weight = value.weight if self._has_count(value) else self.count(part)
            total = value.total if self._has_count(value) else value.total * weight
            found.append(Measured(total.double(), weight))
            if use is not None:
                use(output, part)

        def take(output: Any, part: Any) -> None:
            if not counts:
                return
            try:
                look(output, part)
            except SettingError as error:
                if faults is None:
                    raise
                faults.append(error.violation)

        def evaluated(module: nn.Module) -> None:
            with self.autocast():
                take(self._output(module, batch), batch)

        with self.inside(self.model.sharded_logits and use is None), torch.no_grad():
            pipeline = self.model.pipeline
            if pipeline is None:
                self.model.run(evaluated, training=False)
            else:
                count = passes(pipeline.section, self.count(batch), largest)
                pipeline.evaluate(batch, count, self._forward, take, self.autocast)
        self._first = None
        return Measured(sum(item.total for item in found), sum(item.weight for item in found))  # type: ignore[arg-type]

    def part(self, batch: Any) -> Any:
        """This rank's part of the sequences of a batch."""
        return batch if self.model.context is None else self.model.context.part(batch)

    def inside(self, sharded_logits: bool) -> AbstractContextManager[None]:
        """The context of a step, where the model looks at whether there is one."""
        if self.model.context is None and not sharded_logits:
            return nullcontext()
        return inside_step.step(sharded_logits=sharded_logits)

    @contextmanager
    def _refused_at_first(self) -> Iterator[None]:
        """Refuse a fault on all ranks alike while no pass has come to its end."""
        try:
            yield
        except SettingError as error:
            if self._proven:
                raise
            refuse_together([error.violation])
        else:
            if not self._proven:
                refuse_together([])

    def _watched(self) -> AbstractContextManager[object]:
        """The context of a whole pass; compiled code cannot be watched."""
        watched = not self._proven and not self.model.compiled and second_derivatives.are_missing(self.layout)
        return second_derivatives.NoSecondDerivatives(self.layout) if watched else nullcontext()

    def _output(self, module: nn.Module, batch: Any) -> Any:
        if self.model.policy is None:
            return self._forward(module, batch)
        inputs = self.model.inputs(batch)
        with self.model.explaining(inputs):
            return self._forward(module, inputs)

    def _forward(self, module: Any, batch: Any) -> Any:
        if self._first is None:
            return self.forward(module, batch)
        if self._compiled and torch.is_grad_enabled():
            return self._forward_compiled(self._first, module, batch)
        with watched_model(self._first, module, batch, alone=self.model.pipeline is not None):
            return self.forward(module, batch)

    def _forward_compiled(self, first: str, module: Any, batch: Any) -> Any:
        """Compiled under watch, code would be compiled again without: it is watched where it has failed, once more."""
        try:
            return self.forward(module, batch)
        except SettingError:
            raise
        except Exception:
            layout = self.layout
            if not (layout.fsdp or max(layout.tensor, layout.context, layout.pipeline) > 1):  # else it communicates
                with torch.compiler.set_stance("force_eager"), torch.no_grad(), watched_model(first, module, batch):
                    self.forward(module, batch)
            raise

    def _loss(self, output: Any, batch: Any) -> Any:
        assert self._first is not None
        with watched_loss(self._first, self.loss, output, batch):
            if torch.is_grad_enabled() or inside_step.sharded_logits() or not is_distributed():
                return self.loss(output, batch)
            with Collectives(self._first, even=self._even) as collectives:
                value = self.loss(output, batch)
            self.communicates = self.communicates or collectives.found
            return value

    def _measured(self, output: Any, batch: Any) -> Measured:
        try:
            return measured_of(self.loss(output, batch) if self._first is None else self._loss(output, batch))
        except (RuntimeError, NotImplementedError) as error:
            if inside_step.sharded_logits() and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(_NOTE)
            raise

    def _train_whole(self, batch: Any, micro_batches: int, last: bool) -> Measured:
        model = self.model
        if not self._proven:
            with self._refused_at_first(), self._watched():
                measured = self._run(batch)
        else:
            measured = self._run(batch)
        total = measured.total
        if model.gradients is not None:
            model.gradients.before_backward(total, last=last)
        scaled = self._scaled(measured, micro_batches)
        if model.engine is None:
            scaled.backward()
        else:
            model.engine.backward(scaled, last=last)
        measured.total = total.detach()
        return measured

    def _run(self, batch: Any) -> Measured:
        """The loss of this rank's part of a batch, by way of the model's wrapper."""
        part = self.part(batch)
        found: list[Measured] = []

        def objective(module: nn.Module) -> Tensor:
            found.append(self._loss_of(module, part))
            return found[0].total

        # The loss is what comes out of the wrapped model: its wrapper sees a tensor, whatever the model returns.
        total = self.model.run(objective, training=True)
        assert total is not None
        found[0].total = total
        return found[0]

    def _loss_of(self, module: nn.Module, part: Any) -> Measured:
        if self.autocast is nullcontext:
            return self._measured(self._output(module, part), part)
        with self.autocast():
            return self._measured(self._output(module, part), part)

    def _train_graph(self, batch: Any, micro_batches: int, last: bool) -> Measured:
        assert self._whole_step is not None
        with self._refused_at_first():
            measured = Measured(*self._whole_step(batch, micro_batches))
        if self._has_count(measured):
            self._count(measured)
        return measured

    def _objective(self, batch: Any) -> tuple[Tensor, Tensor | float]:
        with self.autocast():
            measured = self._measured(self.forward(self.model.module, batch), batch)
        return measured.total, measured.weight

    def _train_pipeline(self, batch: Any, micro_batches: int, last: bool) -> Measured:
        pipeline = self.model.pipeline
        assert pipeline is not None
        with self._refused_at_first():
            batch = self.part(batch)
            pipeline.microbatches(batch)  # what cannot be cut is refused before ranks depend on it
        cut = micro_batches * len(pipeline.microbatches(batch))
        found: list[Measured] = []
        faults: list[Violation] = []

        def objective(output: Any, microbatch: Any) -> Tensor:
            try:
                measured = self._measured(output, microbatch)
            except SettingError as error:
                if self._proven:
                    raise
                # The other stages wait for this one's gradients: the pass goes on to its end, and is refused there.
                faults.append(error.violation)
                return _connected_zero(output)
            found.append(Measured(measured.total.detach(), measured.weight))
            return self._scaled(measured, cut, count=False)

        if self._broken:
            raise RuntimeError(
                "a step of this pipeline has failed, and its stages may wait for it still: resume the run"
            )
        self._broken = True
        pipeline.train(batch, self._forward, objective, self.autocast)
        self._broken = False
        if not self._proven:
            refuse_together(faults)
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
        value = measured.total
        if not isinstance(measured.weight, float):
            if count:
                self._count(measured)
        elif cut != 1:
            value = value / cut
        return value if self.scaler is None else self.scaler.scale(value)

    def _multiply(self, parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
        """Multiply the gradients of a step; those that ZeRO holds, when it steps."""
        engine = self.model.engine
        if engine is not None and engine.partitions:
            engine.scale(factor)
        else:
            _multiply(parameters, factor)

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


def _connected_zero(output: Any) -> Tensor:
    """A loss of 0 that sends gradients of 0 back through an output."""
    parts = [item.float().sum() * 0 for item in tensors(output) if item.is_floating_point()]
    return torch.stack(parts).sum()


def _multiply(parameters: Iterable[nn.Parameter], factor: Tensor | float) -> None:
    for grad in (parameter.grad for parameter in parameters if parameter.grad is not None):
        (grad.to_local() if isinstance(grad, DTensor) else grad).mul_(factor)
