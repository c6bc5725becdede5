"""Trace of one rank: the real build of a model for its layout, and one optimizer step, on tensors without memory.

Whatever `Runner` would do on that rank is done by the same code (`parallel`, `components`), inside of a process group of
which only this rank exists. What is left out are values: weights are not drawn, and what depends on a tensor's value
(where a router sends its tokens) is taken at balance.
"""

from __future__ import annotations

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

from danling_conf import _torch_private
from danling_conf.components import gradients, precision
from danling_conf.components import optimizer as optimizers
from danling_conf.components.batch import count_samples as count_by_rule
from danling_conf.components.batch import map_tensors, tensors
from danling_conf.parallel import mesh as meshes
from danling_conf.parallel.forward_backward import Loss, Passes
from danling_conf.parallel.model import Assembled, assemble
from danling_conf.plan.figures import BATCH, BUFFERS, GRADIENTS, OPTIMIZER, PARAMETERS
from danling_conf.plan.ledger import Ledger
from danling_conf.runner.batch import Forward
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import Layout
from danling_conf.topology.layout import layout_of

CPU = torch.device("cpu")


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
    count_samples: Callable[[Any], int] = count_by_rule


class OneRank:
    """One rank of a layout with its model, built; a context, which holds the process group.

    Args:
        model: a copy of the subject's, or of a part of its blocks. It is taken over.
        blocks: names of the blocks whose passes are told apart.
    """

    def __init__(self, subject: Subject, model: nn.Module, blocks: Sequence[str], rank: int) -> None:
        self.subject, self.config, self.rank = subject, subject.config, rank
        self.layout: Layout = layout_of(self.config)
        self.ledger = Ledger()
        self._model, self._blocks = model, blocks
        self._stack = ExitStack()
        self.fake: Any = _torch_private.fake_tensors()

    def __enter__(self) -> OneRank:
        with ExitStack() as stack:
            if self.layout.world_size > 1 or self.layout.fsdp:
                stack.enter_context(_torch_private.fake_world(self.rank, self.layout.world_size))
            stack.enter_context(_torch_private.quiet_fake_tensors())
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
            compile=replace(config.compile, enable=False),
            activation_checkpointing=config.activation_checkpointing,
            parallel=config.parallel,
            expert_mesh=meshes.make_expert(self.layout, mesh),
            precision=config.precision,
            example=lambda: subject.example,
            forward=subject.forward,
            fake=self._making(),
        )
        built.train()
        for part in built.parts:
            if isinstance(part, DistributedDataParallel):
                # A lambda, since DDP reads annotations and takes no text for them.
                part.register_comm_hook(None, lambda _, bucket: _reduced(bucket))
        # Ranks share buffers after a step by comparing values.
        return replace(built, buffers=None)

    @contextmanager
    def _making(self) -> Iterator[None]:
        # What a wrapper allocates for itself, as DDP does its buckets, is in the ledger too.
        with self.fake, self.ledger.watching():
            yield

    def step(self) -> None:
        """One optimizer step, with everything in the ledger. The optimizer has its states before it."""
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
            # The first step is another one than those that follow: optimizers make their states, and DTensor tries each
            # operator on whole shapes before it remembers the outcome. DDP has no second step here: it would arrange
            # its buckets anew, by numbers that ranks agree about.
            if any(isinstance(part, DistributedDataParallel) for part in self.assembled.parts):
                self._make_states(optimizer, parameters)
            else:
                self._step(passes, optimizer, parameters, batch)
            self._hold(optimizer, batch)
            self.ledger.restart(GRADIENTS)
            for part in self.assembled.parts:
                _Regions(self.ledger, part, self._blocks)
            with self.ledger.watching():
                self._step(passes, optimizer, parameters, batch)

    def _step(self, passes: Passes, optimizer: Optimizer, parameters: Sequence[nn.Parameter], batch: Any) -> None:
        config, ledger = self.config, self.ledger
        for number in range(self.traced_micro_batches):
            ledger.begin(f"forward {BEFORE}")
            last = number == self.traced_micro_batches - 1
            passes.train(batch, micro_batches=config.accum_steps, last=last)
            ledger.boundary()
        ledger.phase = "optimizer"
        ledger.enter("gradients")
        passes.finish(parameters)
        if config.max_grad_norm is not None:
            gradients.clip(parameters, config.max_grad_norm)
        ledger.enter("optimizer")
        optimizer.step()
        optimizer.zero_grad()

    def _loss(self, output: Any, batch: Any) -> Any:
        found = self.subject.loss(output, batch)
        total = found[0] if isinstance(found, tuple) else found
        if isinstance(total, Tensor) and total.requires_grad:
            total.register_hook(lambda _: self.ledger.turn(f"backward {AFTER}"))
        return found

    def _optimizer(self) -> Optimizer:
        assembled, section = self.assembled, self.config.optim
        if assembled.pipeline is None:
            return optimizers.make(assembled.module, section)
        return optimizers.make(assembled.named_parameters(), section, whole=assembled.whole)

    def _make_states(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    @property
    def traced_micro_batches(self) -> int:
        """Of the accumulated ones: all but the last are alike."""
        return min(self.config.accum_steps, 2)

    def _hold(self, optimizer: Optimizer, batch: Any) -> None:
        hold = self.ledger.hold
        for part in self.assembled.parts:
            hold((local(item) for item in part.parameters()), PARAMETERS)
            hold((local(item) for item in part.buffers()), BUFFERS)
        states = _torch_private.tree_leaves([list(state.values()) for state in optimizer.state.values()])
        hold((local(item) for item in states if isinstance(item, Tensor)), OPTIMIZER)
        hold(tensors(batch), BATCH)


BEFORE = "before the blocks"
AFTER = "behind the blocks"


class _Regions:
    """Tells a ledger which block runs."""

    def __init__(self, ledger: Ledger, part: nn.Module, blocks: Sequence[str]) -> None:
        self.ledger = ledger
        modules = dict(part.named_modules())
        held = [(name, modules[found]) for name in blocks if (found := _found(modules, name)) is not None]
        for index, (name, block) in enumerate(held):
            last = index == len(held) - 1
            block.register_forward_pre_hook(partial(self._enter, name, index == 0), prepend=True, with_kwargs=True)
            block.register_forward_hook(partial(self._backward_of, name), prepend=True)
            if last:
                block.register_forward_hook(self._behind)

    def _enter(self, name: str, first: bool, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.ledger.enter(f"forward {name}")
        given = args[0] if args else next(iter(kwargs.values()), None)
        if first and isinstance(given, Tensor) and given.requires_grad:
            given.register_hook(lambda _: self.ledger.turn(f"backward {BEFORE}"))

    def _backward_of(self, name: str, block: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, (tuple, list)) else output
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(lambda _: self.ledger.turn(f"backward {name}"))

    def _behind(self, block: nn.Module, args: Any, output: Any) -> None:
        self.ledger.enter(f"forward {AFTER}")


def _reduced(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does with a bucket; the work of a fake group has no result, which DDP's own hook waits for."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _found(modules: dict[str, nn.Module], name: str) -> str | None:
    return next((item for item in (name, f"module.{name}") if item in modules), None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
