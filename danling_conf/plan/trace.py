"""Trace of one rank: the real build of a model for its layout, and one optimizer step, on tensors without memory.

Whatever `Runner` would do on that rank is done by the same code (`parallel`, `components`), inside of a process group
of which only this rank exists. What is left out are values: weights are not drawn, and what depends on a tensor's value
(where a router sends its tokens) is taken at balance.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from danling_conf._torch_private import compiling, dispatch, distributed, fakes
from danling_conf.components import gradients, precision
from danling_conf.components import optimizer as optimizers
from danling_conf.components.batch import count_samples as count_by_rule
from danling_conf.components.batch import map_tensors, tensors
from danling_conf.parallel import compile as compilation
from danling_conf.parallel import hugging_face
from danling_conf.parallel import mesh as meshes
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.measured import Loss
from danling_conf.parallel.model import Assembled, assemble
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.parallel.pipeline import Pipeline
from danling_conf.plan import compiled
from danling_conf.plan.figures import BATCH, BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS
from danling_conf.plan.ledger import Ledger
from danling_conf.runner.batch import Forward
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import SPLIT_BACKWARD_SCHEDULES
from danling_conf.topology.layout import layout_of
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError

CPU = torch.device("cpu")
TRACED_MICROBATCHES = 2
"""Of a pipeline: the first one gathers weights and makes gradients, all others are like the second."""

Sent = tuple[torch.Size, torch.dtype]
"""Shape and dtype of what one stage sends to the next."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is planned: a run's configuration and what its script passes to it.

    Attributes:
        model: on the meta device; each trace is given a copy of it, or of one with fewer blocks.
        batch: of one micro-batch, with the sizes of a rank's.
        example: of two samples.
    """

    config: RunnerConfig
    model: nn.Module
    forward: Forward
    loss: Loss
    batch: Any
    example: Any
    cut: Callable[[int], Any]
    """Makes a batch of so many samples."""
    count_samples: Callable[[Any], int] = count_by_rule
    accelerated: bool = False
    """Whether it is planned for an accelerator, where torch's optimizers take all plain tensors at once."""


class OneRank:
    """One rank of a layout with its model, built; a context, which holds the process group.

    Args:
        model: a copy of the subject's, or of a part of its blocks. It is taken over.
        blocks: names of the blocks whose passes are told apart.
    """

    def __init__(self, subject: Subject, model: nn.Module, blocks: Sequence[str], rank: int) -> None:
        self.subject, self.config, self.rank = subject, subject.config, rank
        self.layout: Layout = layout_of(self.config)
        self.fake: Any = fakes.fake_tensors()
        self.ledger = Ledger()
        section = self.config.compile
        self._compile = compiled.planned_section(section) if section.enable else section
        # A whole model in one graph: a look at its blocks would cut it.
        whole = self._compile.enable and not compilation.is_per_block(model, self._compile)
        self._model, self._blocks = model, () if whole else blocks
        self._stack = ExitStack()
        self.sent: Sent | None = None
        """What the last stage that was traced here sends, or what is received."""
        self.microbatches = 1

    def __enter__(self) -> OneRank:
        if self._compile.enable:
            compiling.forget_graphs()
        with ExitStack() as stack:
            if self.layout.world_size > 1 or self.layout.fsdp:
                stack.enter_context(distributed.fake_world(self.rank, self.layout.world_size))
            stack.enter_context(fakes.quiet_fake_tensors())
            stack.enter_context(compilation.restored())
            if self._compile.enable:
                stack.enter_context(compiling.quiet_compilation())
            stack.enter_context(hugging_face.one_sequence_a_row())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            self.assembled = self._assembled()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self.ledger.forget()
        self._stack.close()

    def _assembled(self) -> Assembled:
        config, subject = self.config, self.subject
        mesh = meshes.make(self.layout, "cpu", use_device_mesh=config.parallel.use_device_mesh)
        built = assemble(
            self._model,
            layout=self.layout,
            mesh=mesh,
            device=CPU,
            seed=0,
            fsdp=config.fsdp,
            compile=self._compile,
            activation_checkpointing=config.activation_checkpointing,
            parallel=config.parallel,
            expert_mesh=meshes.make_expert(self.layout, mesh),
            precision=config.precision,
            example=None if subject.example is None else lambda: subject.example,
            forward=subject.forward,
            fake=self._making(),
        )
        built.train()
        for part in built.parts:
            if isinstance(part, DistributedDataParallel):
                # A lambda, since DDP reads annotations and takes no text for them.
                part.register_comm_hook(None, lambda _, bucket: _reduced(bucket))
        # Ranks compare values to share buffers, and try attention with real ones.
        return replace(built, buffers=None)

    @contextmanager
    def _making(self) -> Iterator[None]:
        # What a wrapper allocates for itself, as DDP does its buckets, is in the ledger too.
        with self.fake, self.ledger.watching():
            yield

    def step(self, received: Sent | None = None) -> None:
        """One optimizer step, with everything in the ledger. The optimizer has its states before it.

        In a pipeline, each stage of this rank alone: two microbatches forward, then backward, then the reduction of
        gradients. What a schedule's own order makes of these is put together later (`plan.schedule`).

        Args:
            received: in a pipeline, what a stage receives. None where this rank holds the first one, of which it is
                learned.
        """
        try:
            self._observed(received)
        except (SettingError, ConfigRefused):
            raise
        except Exception as error:  # of the user's model, which may ask for values that are not there
            raise self._untraceable(error) from error

    def _untraceable(self, error: Exception) -> SettingError:
        """The refusal of a model that does not run without values, with the line of it that does not."""
        where = line_of(error)
        place = f" at {where}" if where else ""
        kind = type(self.subject.model).__name__
        if isinstance(error, fakes.fake_errors()):
            what = f"{kind} asks for the value of a tensor{place}, and a plan has none"
            fix = "leave .item(), .tolist(), nonzero() and branches on tensors out of it"
        else:
            what = f"{kind} does not run on tensors without values{place} ({type(error).__name__}: {error})"
            fix = "where it needs values, leave those out; anything else ends a training in this layout as well"
        return SettingError("model", ABSENT, what, fix)

    def _observed(self, received: Sent | None) -> None:
        config = self.config
        cast = None if config.fsdp.enabled else config.precision
        with self.fake:
            optimizer = self._optimizer()
            parameters = [item for _, item in self.assembled.named_parameters() if item.requires_grad]
            batch = map_tensors(self.fake.from_tensor, self.subject.batch)
            passes = Passes(
                self.assembled,
                self.subject.forward,
                self._loss,
                self.layout,
                CPU,
                autocast=partial(precision.autocast, cast, CPU.type),
                count=self.subject.count_samples,
            )
            run = partial(self._step, passes, optimizer, parameters, batch)
            if self.assembled.pipeline is not None:
                self.sent = received
                run = partial(self._stages, self.assembled.pipeline, passes, optimizer, parameters, batch)
            pipeline = self.assembled.pipeline
            for index, part in {0: self.assembled.parts[0]}.items() if pipeline is None else pipeline.parts.items():
                _Regions(self.ledger, part, self._blocks, "" if pipeline is None else of_stage(index))
            # The first step is another one than those that follow: optimizers make their states, and DTensor tries each
            # operator on whole shapes before it remembers the outcome. DDP has no second step here: it would arrange
            # its buckets anew, by numbers that ranks agree about.
            if any(isinstance(part, DistributedDataParallel) for part in self.assembled.parts):
                self._make_states(optimizer, parameters)
            else:
                run()
            self._hold(optimizer, batch)
            self.ledger.restart(GRADIENTS)
            with self.ledger.watching():
                run()

    def _step(self, passes: Passes, optimizer: Optimizer, parameters: Sequence[nn.Parameter], batch: Any) -> None:
        config, ledger = self.config, self.ledger
        for number in range(self.traced_micro_batches):
            ledger.begin(f"forward {BEFORE}")
            last = number == self.traced_micro_batches - 1
            passes.train(batch, micro_batches=config.accum_steps, last=last)
            ledger.boundary()
        ledger.phase = "optimizer"
        ledger.enter("gradients")
        self._update(passes, optimizer, parameters)

    def _update(self, passes: Passes, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        pipeline = self.assembled.pipeline
        self.ledger.phase, self.ledger.action = "optimizer", ""
        self.ledger.enter("gradients")
        if pipeline is None:  # stages were not run by `passes`
            passes.finish(parameters)
        if self.config.max_grad_norm is not None:
            gradients.clip(parameters, self.config.max_grad_norm, pipeline=None if pipeline is None else pipeline.group)
        self.ledger.enter("optimizer")
        optimizer.step()
        optimizer.zero_grad()

    def _stages(
        self,
        pipeline: Pipeline,
        passes: Passes,
        optimizer: Optimizer,
        parameters: Sequence[nn.Parameter],
        batch: Any,
    ) -> None:
        microbatches = pipeline.microbatches(passes.part(batch))
        self.microbatches = len(microbatches)
        cut = len(microbatches) * self.config.accum_steps

        def objective(output: Any, microbatch: Any) -> Tensor:
            found = self._loss(output, microbatch)
            total: Tensor = found[0] if isinstance(found, tuple) else found / cut
            return total

        pipeline.begin(microbatches, self.subject.forward, objective, passes.autocast)
        with passes.inside(self.assembled.sharded_logits):
            for index in sorted(pipeline.parts):
                split = pipeline.section.pipeline_schedule in SPLIT_BACKWARD_SCHEDULES and index > 0
                self._stage(pipeline, index, split=split)
                if split and self.ledger.active:
                    # torch runs both parts at once where a schedule has them behind each other.
                    self.ledger.action = f"{index} {AGAIN}"
                    self.ledger.enter(AGAIN)
                    for parameter in pipeline.parts[index].parameters():
                        parameter.grad = None
                    self._stage(pipeline, index, split=False, suffix=f" {AGAIN}")
        self._update(passes, optimizer, parameters)

    def _stage(self, pipeline: Pipeline, index: int, *, split: bool, suffix: str = "") -> None:
        """The passes of a stage.

        Args:
            split: whether backward passes are run in two parts.
            suffix: of the names of actions that were traced before.
        """
        ledger, stage = self.ledger, pipeline.alone(index)
        place = of_stage(index)
        kept: list[tuple[Any, tuple[Tensor, ...]]] = []
        for number in range(TRACED_MICROBATCHES if ledger.active else 1):
            ledger.action = f"{index}F{number}{suffix}"
            ledger.begin(f"forward {BEFORE}{place}")
            inputs: tuple[Tensor, ...] = ()
            if index:
                assert self.sent is not None  # ranks are traced from the first stage on
                inputs = (self._received(*self.sent, f"backward {BEFORE}{place}"),)
            output: Any = stage.forward_maybe_with_nosync(*(inputs or (None,)))  # type: ignore[no-untyped-call]
            if index < pipeline.last:
                self.sent = (output.shape, output.dtype)
            kept.append((output, inputs))
        later: list[dict[str, Any]] = []
        for number in range(TRACED_MICROBATCHES if ledger.active else 1):
            output, inputs = kept.pop(0)
            ledger.action = f"{index}{'I' if split else 'B'}{number}"
            ledger.turn(f"backward {AFTER}{place}")
            given: dict[str, Any] = {"stage_output": (output,), "output_grads": None, "input_values": list(inputs)}
            if index < pipeline.last:
                given["output_grads"] = (self._received(output.shape, output.dtype),)
            elif not split:
                given["stage_output"] = output
            del output, inputs
            # What goes back to the stage before is let go of: the schedule says how long it is kept.
            groups = stage.backward_maybe_with_nosync("input" if split else "full", given)[1]
            ledger.boundary()
            if split:
                later.append({"stage_output": given["stage_output"], "param_groups": groups})
            del given
        for number, given in enumerate(later):
            ledger.action = f"{index}W{number}"
            ledger.turn(f"weights{place}")
            stage.backward_maybe_with_nosync("weight", given)
            ledger.boundary()
        later.clear()
        ledger.action = f"{index}R{suffix}"
        ledger.turn(f"reduction{place}")
        stage.perform_reduce_grad(1)

    def _received(self, shape: torch.Size, kind: torch.dtype, region: str | None = None) -> Tensor:
        """What comes from another stage: in a buffer of the schedule's. With the region that its gradient begins."""
        with self.ledger.unseen():
            tensor = self.ledger.lend(torch.empty(shape, dtype=kind))
        if region is not None and kind.is_floating_point:
            tensor.requires_grad_()
            tensor.register_hook(lambda _: self.ledger.turn(region))  # type: ignore[no-untyped-call]
        return tensor

    def _loss(self, output: Any, batch: Any) -> Any:
        found = self.subject.loss(output, batch)
        total = found[0] if isinstance(found, tuple) else found
        if isinstance(total, Tensor) and total.requires_grad:
            pipeline = self.assembled.pipeline
            place = "" if pipeline is None else of_stage(pipeline.last)
            total.register_hook(lambda _: self.ledger.turn(f"backward {AFTER}{place}"))  # type: ignore[no-untyped-call]
        return found

    def _optimizer(self) -> Optimizer:
        assembled, section = self.assembled, self.config.optim
        if assembled.pipeline is None:
            made = optimizers.make(assembled.module, section)
        else:
            made = optimizers.make(assembled.named_parameters(), section, whole=assembled.whole)
        for group in made.param_groups if self.subject.accelerated else ():
            plain = not any(isinstance(item, DTensor) for item in group["params"])
            if "foreach" in group and group["foreach"] is None and not group.get("fused") and plain:
                group["foreach"] = True
        return made

    def _make_states(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    @property
    def traced_micro_batches(self) -> int:
        """Of the accumulated ones: all but the last are alike."""
        return min(self.config.accum_steps, 2) if self.ledger.active else 1

    def _hold(self, optimizer: Optimizer, batch: Any) -> None:
        hold = self.ledger.hold
        for part in self.assembled.parts:
            hold((local(item) for item in part.parameters()), PARAMETERS)
            hold((local(item) for item in part.buffers()), BUFFERS)
        states = dispatch.tree_leaves([list(state.values()) for state in optimizer.state.values()])
        hold((local(item) for item in states if isinstance(item, Tensor)), OPTIMIZER)
        hold(tensors(batch), BATCH)


AGAIN = "again"
"""Ends the names of actions that no schedule has: they lead to others."""
BEFORE = "before the blocks"
AFTER = "behind the blocks"


def of_stage(index: int) -> str:
    """What the names of regions end in that belong to a stage of a pipeline."""
    return f" of stage {index}"


class _Regions:
    """Tells a ledger which block runs."""

    def __init__(self, ledger: Ledger, part: nn.Module, blocks: Sequence[str], place: str) -> None:
        self.ledger, self.place = ledger, place
        modules = {name: module for name, module in part.named_modules() if not isinstance(module, PassThrough)}
        held = [(name, modules[found]) for name in blocks if (found := _found(modules, name)) is not None]
        for index, (name, block) in enumerate(held):
            last = index == len(held) - 1
            hidden = compiling.uncompiled
            enter = hidden(partial(self._enter, name, index == 0))
            block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            block.register_forward_hook(hidden(partial(self._backward_of, name)), prepend=True)
            if last:
                block.register_forward_hook(hidden(self._behind))

    def _enter(self, name: str, first: bool, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.ledger.enter(f"forward {name}")
        given = args[0] if args else next(iter(kwargs.values()), None)
        if first and isinstance(given, Tensor) and given.requires_grad:
            given.register_hook(lambda _: self.ledger.turn(f"backward {BEFORE}{self.place}"))  # type: ignore[no-untyped-call]

    def _backward_of(self, name: str, block: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda _: self.ledger.turn(f"backward {name}"))  # type: ignore[no-untyped-call]

    def _behind(self, block: nn.Module, args: Any, output: Any) -> None:
        self.ledger.enter(f"forward {AFTER}{self.place}")


def _reduced(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket; the work of a fake group has no result, which DDP's own hook waits for."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def line_of(error: Exception) -> str:
    """The last line of the user's, or of another package, that an error passed through; empty where there is none."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_ours(frame.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}, `{frames[-1].line}`" if frames else ""


def _is_ours(filename: str) -> bool:
    return any(part in filename for part in ("/torch/", "/danling_conf/", "<"))


def _found(modules: dict[str, nn.Module], name: str) -> str | None:
    return next((item for item in (name, f"module.{name}") if item in modules), None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
