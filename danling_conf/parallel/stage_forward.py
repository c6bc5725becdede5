"""A stage's forward: the user's `forward`, with what was sent in the place of the model's own inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from danling_conf._torch_private.dispatch import storage_identity, tree_map
from danling_conf._torch_private.distributed import as_no_view
from danling_conf._torch_private.fakes import quiet_fake_tensors
from danling_conf.parallel.context import positions_argument, positions_for
from danling_conf.parallel.fsdp import explaining_uncast
from danling_conf.parallel.function_caches import fake_values_forgotten
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.parallel.program import Recording
from danling_conf.parallel.stages import stage_model
from danling_conf.parallel.trial import Trial, to_cpu
from danling_conf.topology.violation import ABSENT, SettingError

Forward = Callable[[Any, Any], Any]
"""Runs a model on a (micro)batch: `forward(model, batch)`."""

Objective = Callable[[Any, Any], Tensor]
"""What the last stage makes of an output and its (micro)batch: a scalar."""

Positions = Callable[[int, torch.device], Tensor]


@dataclass
class Work:
    """What the stages of this rank work on; set before each pass."""

    microbatches: list[Any] = field(default_factory=list)
    current: int = 0
    forward: Forward | None = None
    objective: Objective | None = None
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass
class _Stage:
    """What a stage's forward needs beside its model."""

    compute: Callable[..., Any]
    """The model's own forward."""
    index: int
    last: bool
    work: Work
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
    work = Work(microbatches=[to_cpu(batch)], forward=forward)
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
            make_stage(part, index, names, blocks, work, None, None, tuples=True)
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


def make_stage(
    part: nn.Module,
    index: int,
    names: Sequence[Sequence[str]],
    blocks: Sequence[str],
    work: Work,
    positions: Positions | None,
    policy: MixedPrecisionPolicy | None,
    *,
    tuples: bool,
    changed: Collection[str] = (),
) -> None:
    """Let the model of a stage take what was sent to it, and return what is sent on; in the last one, the objective.

    Args:
        index: of the stage; `names` holds the modules of every one.
        blocks: where the model is cut, see `_connect`.
        changed: names of the buffers that forward changes.
    """
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
