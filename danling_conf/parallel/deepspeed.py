"""Engine of DeepSpeed: ZeRO over the data ranks, under the loop that trains everything else.

The engine communicates gradients and, from ZeRO 1 on, clips them and steps the optimizer. What it may not decide is
decided here: which micro-batch is the last, what a gradient is divided by, and that nothing is clipped unasked.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from danling_conf.schema.deepspeed import DeepspeedConfig, passed_on
from danling_conf.topology.violation import ABSENT, SettingError

_LOCAL_RANK = "LOCAL_RANK"
_group: dist.ProcessGroup | None = None
"""The default process group that DeepSpeed has taken over."""


class ZeroEngine:
    """A model and its optimizer in DeepSpeed's hands. Collective.

    Args:
        module: the user's model, on its device and with values, the same on all ranks.
        optimizer: of its parameters; its groups stay the ones that schedules change.
        section: `deepspeed` of the configuration.
        batch_size: samples of a micro-batch of this rank.
        max_norm: `max_grad_norm`.
        device: of this rank.
        local_rank: of this process on its node.

    Attributes:
        stage: of ZeRO.
        partitions: whether ZeRO holds the optimizer's states, so that the engine makes the optimizer's step.
        zero: DeepSpeed's optimizer, for `parallel.zero_state`; None in stage 0.

    Raises SettingError where DeepSpeed refuses its configuration.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        section: DeepspeedConfig,
        *,
        batch_size: int,
        max_norm: float | None,
        device: torch.device,
        local_rank: int,
    ) -> None:
        self.module, self.optimizer = module, optimizer
        self.stage = section.zero_optimization.stage
        self.partitions = self.stage > 0
        package = _start(device)
        settings = configuration(section, batch_size=batch_size, max_norm=max_norm if self.partitions else None)
        with _local_rank(local_rank), _errors_only():
            try:
                self._engine = package.initialize(model=_Inside(module), optimizer=optimizer, config=settings)[0]
            except (ValueError, TypeError) as error:
                reason = " ".join(str(error).split())
                fix = "correct the key that it names, or remove it"
                raise SettingError("deepspeed", ABSENT, f"DeepSpeed refuses it: {reason}", fix) from error
        self.zero: Any = self._engine.optimizer if self.partitions else None
        self._broken = False
        """Whether a pass did not come to its end."""
        self._complete = True
        """Whether the last micro-batch ended its step."""
        self._reached: set[int] = set()
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._reach)

    def run(self, function: Callable[[nn.Module], Any], *, training: bool) -> Any:
        """What `function` returns for the model, inside of the engine's forward."""
        if not training:
            return self._engine.module(function)
        if self._broken:
            raise RuntimeError("a step under DeepSpeed has failed, and what it left cannot be dropped: resume the run")
        self._broken = True
        return self._engine(function)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch; after the `last` of a step, gradients are complete over all ranks."""
        if self._complete:
            self._reached.clear()
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        self._complete, self._broken = last, False

    def has_gradient(self, parameter: nn.Parameter) -> bool:
        """Whether a micro-batch of this step has reached a parameter: ZeRO keeps no gradient beside it."""
        return id(parameter) in self._reached

    def scale(self, factor: float | Tensor) -> None:
        """Multiply the gradients of the step under way, before they are clipped. Waits for a factor on a device."""
        # The engine divides by the loss scale, after the sum over ranks and before the norm.
        self.zero.override_loss_scale(1.0 / float(factor))

    def step(self) -> bool:
        """Clip, and step the optimizer. Returns whether it has stepped: not where a gradient is not finite."""
        self._engine.step()
        self.zero.override_loss_scale(1.0)
        return bool(self._engine.was_step_applied())

    @property
    def norm(self) -> Tensor:
        """Norm of the gradients of the last step, before clipping; infinite where it was not finite."""
        return torch.as_tensor(self._engine.get_global_grad_norm(), device=self._engine.device)

    def forget(self) -> None:
        """Drop the micro-batches of the step under way."""
        self._complete = True
        if self.zero is None:
            return
        self.zero.zero_grad(set_to_none=True)
        if self.stage < 3:
            # As its own step does after an overflow.
            self.zero.micro_step_id = -1
            for kept in (self.zero.averaged_gradients, self.zero.all_grad_tensors):
                kept.update(dict.fromkeys(kept))
        if getattr(self.zero, "cpu_offload", False) or getattr(self.zero, "offload_optimizer", False):
            self.zero.reset_cpu_buffers()
        self.zero.override_loss_scale(1.0)

    def whole_weights(self) -> AbstractContextManager[object]:
        """A context in which every rank has all weights: for what reads them itself. Changes are lost. Collective."""
        return gathered(list(self.module.parameters())) if self.stage == 3 else nullcontext()

    def _reach(self, parameter: Tensor) -> None:
        self._reached.add(id(parameter))


class _Inside(nn.Module):
    """Runs a function on the model inside of a forward of the engine's, which hooks that and nothing else."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[[nn.Module], Any]) -> Any:
        return function(self.module)


def configuration(section: DeepspeedConfig, *, batch_size: int, max_norm: float | None) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's keys of it, and what follows from other settings.

    Args:
        batch_size: samples of a micro-batch of one rank.
        max_norm: norm that ZeRO clips gradients to; None for no clipping.
    """
    given = passed_on(section)
    zero = given.pop("zero_optimization")
    if zero["stage"] == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch's function in the whole process
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        # The loop counts micro-batches, and says which is the last.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm or 0.0,  # DeepSpeed's default is 1.0
        "steps_per_print": sys.maxsize,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        **given,
    }


def gathered(parameters: Sequence[nn.Parameter], *, modified: bool = False) -> AbstractContextManager[object]:
    """A context in which parameters that ZeRO 3 partitions are whole. Collective.

    Args:
        modified: whether rank 0's values are kept afterwards, on all ranks.
    """
    import deepspeed

    found: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(
        list(parameters), modifier_rank=0 if modified else None
    )
    return found


def _start(device: torch.device) -> Any:
    """The package, at work on the process group of this run."""
    global _group
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.utils import groups, logger

    # It writes to standard output, where a run's last line belongs.
    logger.handlers.clear()
    logger.propagate = True
    # It calls collectives by names that torch has deprecated; no user can act on that.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # On the CPU it would compile an operator for shared memory when ranks meet: a minute or more, and a rank that is
    # killed meanwhile leaves a lock for which every later run waits, for ever and without a word.
    deepspeed.ops.__compatible_ops__ = {}
    if _group is not dist.group.WORLD:
        comm.cdb = None
        groups._release_process_group_references()
        backend = dist.get_backend()
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        _group = dist.group.WORLD
    return deepspeed


@contextmanager
def _local_rank(rank: int) -> Iterator[None]:
    """The environment as DeepSpeed reads it. Not for longer: `LOCAL_RANK` is how a launcher tells its ranks."""
    if _LOCAL_RANK in os.environ:
        yield
        return
    os.environ[_LOCAL_RANK] = str(rank)
    try:
        yield
    finally:
        os.environ.pop(_LOCAL_RANK, None)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without its warnings of what the rules have settled, such as optimizers that it has not tried."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
