"""Pipeline parallelism: the stages of a model that this rank holds, trained by one of torch's schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from danling_conf.components.batch import CountSamples, count_samples, rows, tensors
from danling_conf.parallel.stage_forward import Forward, Objective, Positions, Work, make_stage
from danling_conf.parallel.trial import Trial
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.rules.pipeline import divisor_of_batch
from danling_conf.topology.violation import ABSENT, SettingError

_ACTIONS = {"F": "F", "B": "B", "I": "I", "W": "W", "REDUCE_GRAD": "R"}
"""What is computed, by torch's names."""


class Pipeline:
    """The stages on this rank.

    A batch is whole on every rank of the pipeline, so that a stage has all of its microbatch beside what the stage
    before sends: masks, positions, labels. The user's `forward` is called in every stage; what was sent takes the place
    of the first block's input, and what is sent on is the output of the last block held. What a model computes around
    its blocks (scaled embeddings, scaled logits) thus counts where it belongs, and nowhere else. The loss is computed
    inside the last stage.

    Args:
        parts: the models of this rank's stages (`build.stages.stage_model`), wrapped and with values, by stage.
        placement: the pipeline rank of each stage.
        mesh: the pipeline axis.
        names: names of the modules of each stage.
        blocks: names of the model's blocks, in their order; none where it has no such: what was sent is then the first
            input of a stage's model, and its output is sent on.
        trial: how the whole model used its blocks, where there was one before it was cut.
        prove: called with `forward` and the first microbatch where there was none; raises SettingError on every rank
            where the stages together are not the whole model.
        positions: where the tokens of a sequence of some length stand, for a model that takes positions.
        policy: FSDP's, which itself sees what is sent between stages only: inputs and the last output are cast here.
    """

    def __init__(
        self,
        parts: dict[int, nn.Module],
        placement: Sequence[int],
        section: ParallelConfig,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        names: Sequence[Sequence[str]],
        blocks: Sequence[str],
        trial: Trial | None = None,
        prove: Callable[[Forward, Any], None] | None = None,
        several_data_ranks: bool = False,
        positions: Positions | None = None,
        policy: MixedPrecisionPolicy | None = None,
    ) -> None:
        self.parts, self.placement, self.section = parts, list(placement), section
        self.group, self.rank, self.device = mesh.get_group(), mesh.get_local_rank(), device
        self.count: CountSamples = count_samples
        """Samples in a batch; set by who has a function of the user's."""
        self.last = len(self.placement) - 1
        self.has_last = self.last in parts
        self._several_data_ranks = several_data_ranks
        self._work = Work()
        self._schedules: dict[Any, Any] = {}
        self._metadata: dict[Any, list[tuple[torch.Size, torch.dtype]]] = {}
        self._prove = prove
        for index, part in parts.items():
            changed = () if trial is None else trial.changed
            tuples = trial is not None
            make_stage(part, index, names, blocks, self._work, positions, policy, tuples=tuples, changed=changed)

    def microbatches(self, batch: Any) -> list[Any]:
        """A batch cut along its first dim into microbatches, as many as the section says.

        Raises SettingError where that does not divide the batch.
        """
        size = self.count(batch)
        path, divisor = divisor_of_batch(self.section)
        if size % divisor:
            raise SettingError(
                path,
                divisor,
                f"a batch of {size} samples cannot be cut evenly",
                "choose a divisor, or set dataloader.train.drop_last=true, which leaves out an incomplete batch",
            )
        count = self.section.pipeline_n_microbatches or size // divisor
        return [rows(batch, slice(start, start + size // count), size) for start in range(0, size, size // count)]

    def train(
        self,
        batch: Any,
        forward: Forward,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Forward and backward of a batch. `objective` is called on the rank of the last stage, once a microbatch;
        what it gives is what gradients are of. Collective over the pipeline."""
        microbatches = self.microbatches(batch)
        self._prove_once(forward, microbatches[0])
        self.begin(microbatches, forward, objective, autocast)
        schedule = self._schedule(batch, len(microbatches))
        # Stages take their microbatch by its number; torch wants tensors to deal out all the same.
        numbers = torch.zeros(len(microbatches), device=self.device)
        inputs = (numbers,) if 0 in self.parts else ()
        schedule.step(*inputs, target=numbers if self.has_last else None, return_outputs=False)
        self._work.current = 0

    def begin(
        self,
        microbatches: list[Any],
        forward: Forward,
        objective: Objective,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Say what the stages work on; the arguments are those of `train`."""
        self._work.microbatches, self._work.current = microbatches, 0
        self._work.forward, self._work.objective, self._work.autocast = forward, objective, autocast

    def alone(self, index: int) -> PipelineStage:
        """torch's stage for one of this rank's parts, to be run by hand: of a plan, which has no other stages. Its
        forward works on the first microbatch."""
        return PipelineStage(self.parts[index], index, len(self.placement), self.device, group=self.group)

    def actions(self, count: int) -> dict[int, list[tuple[int, str, int | None]]]:
        """By pipeline rank, what it does in a step of so many microbatches, in order: stage, what (`F`, `B`; `I` and
        `W` where a backward pass is split into inputs and weights; `R`, which reduces gradients) and microbatch."""
        kind = get_schedule_class(self.section.pipeline_schedule)
        stages = [self.alone(index) for index in sorted(self.parts)]
        single = issubclass(kind, PipelineScheduleSingle)
        schedule = kind(stages[0] if single else stages, count, loss_fn=lambda output, _: output, scale_grads=False)
        # The order that is run has `B` where `I` and `W` of a microbatch would follow each other.
        orders = schedule.pipeline_order if single else schedule.pipeline_order_with_comms
        return {
            rank: [
                (item.stage_index, _ACTIONS[item.computation_type.value], item.microbatch_index)
                for action in order
                if action is not None
                for item in action.sub_actions or (action,)
                if item.computation_type.value in _ACTIONS
            ]
            for rank, order in (orders or {}).items()
        }

    @torch.no_grad()
    def evaluate(
        self,
        batch: Any,
        count: int,
        forward: Forward,
        use: Callable[[Any, Any], None],
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Forward passes over the stages, under any schedule and of any number of samples; `use(output, microbatch)` is
        called on the rank of the last stage. Collective.

        Some of torch's schedules cannot evaluate, and none takes another number of samples than in training. So each
        microbatch goes through the stages in their order; where a rank has one stage, ranks work on different ones at a
        time.

        Args:
            count: passes, at least as many as the batch has microbatches: as many on all ranks that share stages'
                weights. Surplus ones repeat the last microbatch and are not used.
        """
        size = self.section.pipeline_microbatch_size
        if self.section.pipeline_n_microbatches is not None:
            size = -(-self.count(batch) // self.section.pipeline_n_microbatches)
        samples = self.count(batch)
        cut = [rows(batch, slice(start, start + size), samples) for start in range(0, samples, size)]
        self._prove_once(forward, cut[0])
        self._work.forward, self._work.objective, self._work.autocast = forward, None, autocast
        sent: list[tuple[dist.Work | None, Tensor]] = []
        for number in range(count):
            microbatch = cut[min(number, len(cut) - 1)]
            self._work.microbatches, self._work.current = [microbatch], 0
            output: Any = None
            for index in sorted(self.parts):
                if index and self.placement[index - 1] != self.rank:
                    output = self._receive(index, microbatch)
                output = self.parts[index](output)
                if index == self.last:
                    if number < len(cut):
                        use(output, microbatch)
                elif self.placement[index + 1] != self.rank:
                    sent.append(self._send(index, output, microbatch))
        for work, _ in sent:
            if work is not None:  # this rank is part of the group
                work.wait()

    def _prove_once(self, forward: Forward, microbatch: Any) -> None:
        if self._prove is not None:
            self._prove(forward, microbatch)
            self._prove = None

    def _schedule(self, batch: Any, count: int) -> Any:
        """The schedule for batches of these shapes: buffers between stages are made for them."""
        key = (count, _signature(batch))
        if key not in self._schedules:
            if self._schedules and self._several_data_ranks:
                raise SettingError(
                    "parallel.axes.pipeline",
                    ABSENT,
                    f"a batch has other shapes than the ones before, {_signature(batch)}; torch would find out anew "
                    f"what stages send, and data ranks would not do so together",
                    "pad batches to one shape, or set the degree to 1",
                )
            kind = get_schedule_class(self.section.pipeline_schedule)
            stages = [
                _NumberedStage(part, index, len(self.placement), self.device, group=self.group)
                for index, part in sorted(self.parts.items())
            ]
            single = issubclass(kind, PipelineScheduleSingle)
            self._schedules[key] = kind(
                stages[0] if single else stages, count, loss_fn=lambda output, _: output, scale_grads=False
            )
        return self._schedules[key]

    def _send(self, index: int, output: Tensor, microbatch: Any) -> tuple[dist.Work | None, Tensor]:
        target = self.placement[index + 1]
        key = (index, _signature(microbatch))
        if key not in self._metadata:
            self._metadata[key] = [(output.shape, output.dtype)]
            dist.send_object_list(list(self._metadata[key]), group_dst=target, group=self.group, device=self.device)
        output = output.contiguous()
        return dist.isend(output, group=self.group, group_dst=target), output

    def _receive(self, index: int, microbatch: Any) -> Tensor:
        source = self.placement[index - 1]
        key = (index - 1, _signature(microbatch))
        if key not in self._metadata:
            found: list[Any] = [None]
            dist.recv_object_list(found, group_src=source, group=self.group, device=self.device)
            self._metadata[key] = found
        ((shape, dtype),) = self._metadata[key]
        received = torch.empty(shape, dtype=dtype, device=self.device)
        dist.recv(received, group=self.group, group_src=source)
        return received


class _NumberedStage(PipelineStage):
    """A stage that tells which microbatch it works on.

    Before the first one, torch passes something of its shape through the stage: buffers (running statistics) and what
    modules count or keep are then put back.
    """

    def __init__(self, submodule: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(submodule, *args, **kwargs)
        self._before: dict[str, Tensor] | None = {
            name: buffer.detach().clone() for name, buffer in submodule.named_buffers()
        }
        self._attributes = [(module, _state(module)) for module in submodule.modules()]
        submodule._stage.learning = True  # type: ignore[union-attr]

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        if self._before is not None:
            with torch.no_grad():
                for name, buffer in self.submod.named_buffers():
                    buffer.copy_(self._before[name])
            for module, state in self._attributes:
                for name in _state(module).keys() - state.keys():
                    delattr(module, name)
                vars(module).update(state)
            self._before = None
            self._attributes.clear()
            self.submod._stage.learning = False  # type: ignore[union-attr]
        self.submod._stage.work.current = fwd_chunk_id  # type: ignore[union-attr]
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


def _state(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are no modules, parameters or hooks; containers are copied."""
    return {
        name: copy.copy(value) if isinstance(value, (list, dict, set)) else value
        for name, value in vars(module).items()
        if not name.startswith("_")
    }


def passes(section: ParallelConfig, samples: int, largest: int) -> int:
    """Microbatches that `Pipeline.evaluate` makes of the largest batch among ranks, this rank having `samples`."""
    if section.pipeline_n_microbatches is not None:
        return section.pipeline_n_microbatches
    return -(-max(samples, largest) // section.pipeline_microbatch_size)


def _signature(batch: Any) -> tuple[Any, ...]:
    return tuple((item.shape, item.dtype) for item in tensors(batch))
