"""Pipeline parallelism: the stages of a model that this rank holds, trained by one of torch's schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from danling_conf._torch_private import as_no_view, quiet_fake_tensors, storage_identity, tree_map
from danling_conf.components.batch import CountSamples, count_samples, rows, tensors
from danling_conf.parallel.context import positions_argument, positions_for
from danling_conf.parallel.fsdp import explaining_uncast
from danling_conf.parallel.function_caches import fake_values_forgotten
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.parallel.program import Recording
from danling_conf.parallel.stages import stage_model
from danling_conf.parallel.trial import Trial, to_cpu
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.rules.pipeline import divisor_of_batch
from danling_conf.topology.violation import ABSENT, SettingError

_ACTIONS = {"F": "F", "B": "B", "I": "I", "W": "W", "REDUCE_GRAD": "R"}
"""What is computed, by torch's names."""

Forward = Callable[[Any, Any], Any]
"""Runs a model on a (micro)batch: `forward(model, batch)`."""

Objective = Callable[[Any, Any], Tensor]
"""What the last stage makes of an output and its (micro)batch: a scalar."""

Positions = Callable[[int, torch.device], Tensor]


@dataclass
class _Work:
    """What the stages of this rank work on; set before each pass."""

    microbatches: list[Any] = field(default_factory=list)
    current: int = 0
    forward: Forward | None = None
    objective: Objective | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


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
        self._work = _Work()
        self._schedules: dict[Any, Any] = {}
        self._metadata: dict[Any, list[tuple[torch.Size, torch.dtype]]] = {}
        self._prove = prove
        for index, part in parts.items():
            changed = () if trial is None else trial.changed
            tuples = trial is not None
            _make_stage(part, index, names, blocks, self._work, positions, policy, tuples=tuples, changed=changed)

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


@dataclass
class _Stage:
    """What a stage's forward needs beside its model."""

    compute: Callable[..., Any]
    """The model's own forward."""
    index: int
    last: bool
    work: _Work
    positions: Positions | None
    policy: MixedPrecisionPolicy | None
    through_blocks: bool
    """Whether what is sent goes in and out at blocks."""
    changed: Sequence[str]
    """Names of the buffers that forward changes."""
    learning: bool = False
    """Whether torch passes something through it to learn the shapes that it sends."""
    sent: Tensor | None = None
    passed_on: Any = None


def rehearse(trial: Trial, names: Sequence[Sequence[str]], blocks: Sequence[str], forward: Forward, batch: Any) -> None:
    """Run the stages of a tried model one after another on fake tensors: what they lack of the whole model shows.

    Raises SettingError.
    """
    work = _Work(microbatches=[to_cpu(batch)], forward=forward)
    kind = type(trial.twin.model).__name__
    sent: Any = None
    with torch.no_grad(), quiet_fake_tensors():
        parts = [stage_model(trial.twin.model, names, index, trial) for index in range(len(names))]
    with (
        fake_values_forgotten(),
        torch.no_grad(),
        trial.twin.fake,
        quiet_fake_tensors(),
        Recording(draws=True),
    ):
        for index, part in enumerate(parts):
            _make_stage(part, index, names, blocks, work, None, None, tuples=True)
            try:
                sent = part(sent)
            except Exception as error:  # of the user's model, which may ask anything of a module that is not there
                raise SettingError(
                    "parallel.axes.pipeline",
                    ABSENT,
                    f"stage {index} of {kind} does not run without the modules of the others ({type(error).__name__}: "
                    f"{error})",
                    "let the model only call its modules, or set the degree to 1",
                ) from error
            held = [place for place, name in enumerate(trial.blocks) if _within(name, names[index])]
            if index < len(names) - 1 and held and sent.shape != trial.shapes[held[-1]]:
                raise SettingError(
                    "parallel.axes.pipeline",
                    ABSENT,
                    f"stage {index} of {kind} sends {tuple(sent.shape)} on, and {trial.blocks[held[-1]]} returns "
                    f"{tuple(trial.shapes[held[-1]])} in the whole model",
                    "set the degree to 1",
                )


def _within(name: str, names: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in names)


def _make_stage(
    part: nn.Module,
    index: int,
    names: Sequence[Sequence[str]],
    blocks: Sequence[str],
    work: _Work,
    positions: Positions | None,
    policy: MixedPrecisionPolicy | None,
    *,
    tuples: bool,
    changed: Collection[str] = (),
) -> None:
    last = index == len(names) - 1
    own = [name for name, _ in part.named_buffers() if name in changed]
    stage = _Stage(part.forward, index, last, work, positions, policy, bool(blocks), own)
    part._stage = stage  # type: ignore[assignment]
    part.forward = MethodType(_stage_forward, part)
    earlier = [name for of_stage in names[:index] for name in of_stage if name not in blocks]
    _connect(part, stage, blocks, earlier, tuples=tuples)


def _connect(part: nn.Module, stage: _Stage, blocks: Sequence[str], earlier: Sequence[str], *, tuples: bool) -> None:
    """Let what was sent enter a stage at the first block, and what is sent on be taken behind its last one.

    Blocks of other stages pass their input through; hooks are on these, which are not compiled. `earlier` are modules
    of earlier stages that are no blocks: what they give has the right shape and is not used. `tuples` says whether a
    block may return a tuple, whose first item is sent on.
    """
    if not blocks:
        return

    def receive(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (stage.sent, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): stage.sent}

    def take_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stage.passed_on = args[0] if args else next(iter(kwargs.values()))

    def take_output(_: nn.Module, args: Any, output: Any) -> None:
        stage.passed_on = output[0] if isinstance(output, (tuple, list)) else output

    held = [place for place, name in enumerate(blocks) if not isinstance(part.get_submodule(name), PassThrough)]
    for place in held if not tuples else ():
        part.get_submodule(blocks[place]).register_forward_hook(_refuse_tuples)
    if not stage.last:
        behind = held[-1] + 1 if held else 0
        if behind < len(blocks):
            part.get_submodule(blocks[behind]).register_forward_pre_hook(take_input, with_kwargs=True)
        else:
            part.get_submodule(blocks[-1]).register_forward_hook(take_output)
    if stage.index:
        for name in earlier:
            part.get_submodule(name).register_forward_hook(lambda _, args, output: stage.sent)
        # First of all hooks: those of FSDP cast what enters.
        part.get_submodule(blocks[0]).register_forward_pre_hook(receive, with_kwargs=True, prepend=True)


def _refuse_tuples(block: nn.Module, args: Any, output: Any) -> None:
    if not isinstance(output, Tensor):
        raise SettingError(
            "parallel.axes.pipeline",
            ABSENT,
            f"{type(block).__name__} returns a {type(output).__name__}, and a pipeline is cut between blocks that "
            f"return one tensor",
            "let it return one, or set the degree to 1",
        )


def _stage_forward(self: nn.Module, sent: Tensor | None) -> Any:
    stage: _Stage = self._stage  # type: ignore[assignment]
    work = stage.work
    microbatch = work.microbatches[work.current]
    assert work.forward is not None  # set before each pass
    stage.sent = sent
    if stage.learning and sent is not None:
        sent.data.zero_()  # whatever was in that memory is no number, as a rule
    if sent is not None and sent.requires_grad:
        sent.register_hook(torch.Tensor.contiguous)  # its gradient is sent back, and gloo sends nothing permuted
        stage.sent = as_no_view(sent)  # a block may change its input in place, which torch refuses of a leaf
    with work.autocast(), _kept_for_backward(self, stage):
        output = work.forward(_StandIn(self, stage), microbatch)
        stage.sent = None
        if not stage.last:
            passed_on, stage.passed_on = stage.passed_on, None
            # Blocks of images may return a permuted tensor, which gloo does not send.
            return (passed_on if stage.through_blocks else _hidden(output)).contiguous()
        if stage.policy is not None:
            output = _cast(output, stage.policy.output_dtype)
        return output if work.objective is None else work.objective(output, microbatch)


@contextmanager
def _kept_for_backward(part: nn.Module, stage: _Stage) -> Iterator[None]:
    """What a backward pass needs of buffers that the next microbatch's forward will change is copied inside."""
    if not stage.changed:
        yield
        return
    changing = {storage_identity(part.get_buffer(name)) for name in stage.changed}

    def pack(tensor: Tensor) -> tuple[Tensor, int]:
        kept = tensor.detach().clone() if storage_identity(tensor) in changing else tensor
        return kept, kept._version

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:  # torch does not look where there are hooks
            raise RuntimeError(f"a tensor {list(tensor.shape)} that the backward pass needs was changed in place")
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _StandIn:
    """The model of a stage, as `forward(model, batch)` calls it: with the inputs of the whole model."""

    def __init__(self, part: nn.Module, stage: _Stage) -> None:
        self._part, self._stage = part, stage

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        part, stage = self._part, self._stage
        if not stage.last:
            kwargs.pop("labels", None)  # the loss is the last stage's
        name = positions_argument(part)
        first = args[0] if args else next(iter(kwargs.values()))
        if name is not None and stage.positions is not None and kwargs.get(name) is None and len(args) < 2:
            # Told by the inputs of the whole model; what was sent may be a part of the sequence.
            kwargs[name] = positions_for(name, stage.positions(first.shape[1], first.device))
        if stage.index and not stage.through_blocks:
            if args:
                args = (stage.sent, *args[1:])
            else:
                kwargs[next(iter(kwargs))] = stage.sent
        elif stage.policy is not None and stage.policy.cast_forward_inputs:
            args, kwargs = _cast((args, kwargs), stage.policy.param_dtype)
        with explaining_uncast((args, kwargs), stage.policy):
            return stage.compute(*args, **kwargs)


def passes(section: ParallelConfig, samples: int, largest: int) -> int:
    """Microbatches that `Pipeline.evaluate` makes of the largest batch among ranks, this rank having `samples`."""
    if section.pipeline_n_microbatches is not None:
        return section.pipeline_n_microbatches
    return -(-max(samples, largest) // section.pipeline_microbatch_size)


def _hidden(output: Any) -> Tensor:
    """The tensor to send on, of what a stage's model gives."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    found = logits if logits is not None else output[0]
    if not isinstance(found, Tensor):
        raise SettingError(
            "parallel.axes.pipeline",
            ABSENT,
            f"a stage's model returns a {type(output).__name__}, of which no tensor can be sent to the next stage",
            "let the model return a tensor, or one as its first item, or set the degree to 1",
        )
    return found


def _cast(value: Any, dtype: torch.dtype | None) -> Any:
    if dtype is None:
        return value
    return tree_map(
        lambda item: item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item, value
    )


def _signature(batch: Any) -> tuple[Any, ...]:
    return tuple((item.shape, item.dtype) for item in tensors(batch))
