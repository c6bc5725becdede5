"""Gradients over the data axes: what DDP and FSDP leave open.

Both take for granted that every trainable parameter gets a gradient on every rank, and FSDP shards only what has a
dimension to shard and one dtype. A model that is otherwise is trained as in one process, or refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from danling_conf._torch_private.attributes import saved_buffers
from danling_conf._torch_private.data_parallel import watch_gradients, whole_parameters
from danling_conf._torch_private.dispatch import real_tensors
from danling_conf.components.optimizer import cleaned
from danling_conf.parallel.batch_norm import BATCH_NORMS
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

_log = logging.getLogger(__name__)

ALLOW, REFUSE = "allow", "refuse"
_SETTING = "parallel.unused_parameters"
_SHOWN = 20
_SOMETIMES = "get a gradient in some steps and none in others"
_PIECE = 2**24
_HIDING = "CheckpointFunction"
"""Nodes that run a graph of their own in the backward pass (reentrant checkpointing): what it uses cannot be seen."""


class DataGradients:
    """Completes the gradients of a model over its data ranks, and finds the parameters that have none.

    Args:
        model: wrapped by DDP or FSDP.
        unused: `parallel.unused_parameters`.
        replicated: parameters that every rank holds whole beside sharded ones, and that no wrapper reduces.
        mesh: the ranks whose gradients are averaged; None for DDP without a mesh.
        reached: whether a micro-batch of the step has reached a parameter, under an engine that reduces gradients as
            DDP does, of every parameter on every rank, and need not keep them beside it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unused: str,
        replicated: Sequence[nn.Parameter] = (),
        mesh: DeviceMesh | None,
        reached: Callable[[nn.Parameter], bool] | None = None,
    ) -> None:
        self.model = model
        self.allowed = unused == ALLOW
        self.by_ddp = isinstance(model, DistributedDataParallel) or reached is not None
        self._reached = reached or _has_gradient
        self._may_allow = reached is None
        self.named = [(name, item) for name, item in cleaned(model) if item.requires_grad]
        identities = {id(item) for item in replicated}
        self.replicated = [item for _, item in self.named if id(item) in identities]
        self.group = None if mesh is None else mesh.get_group()
        self.device = self.named[0][1].device if self.named else torch.device("cpu")
        if isinstance(model, FSDPModule) and self.allowed:
            model.set_reduce_scatter_unused_params(True)
        elif isinstance(model, FSDPModule):
            watch_gradients(model, self._look)
        self._used = torch.zeros(len(self.named), dtype=torch.int32)
        """Which parameters the micro-batches of this step have used so far, where that is looked for."""
        self._parameters = [item for _, item in self.named]
        self._all_had_one = False
        self._without: set[str] | None = None
        """Parameters that had no gradient in the first step; None before it."""
        self._reduced: dict[int, list[set[int]]] = {}
        """Which parameters had none whenever FSDP reduced the gradients of a group in this step, by group."""
        self._reduced_first: dict[int, list[set[int]]] = {}
        """Likewise of the first step."""

    def before_backward(self, loss: Tensor, *, last: bool) -> None:
        """Look for parameters that the loss does not depend on, before a wrapper would wait for their gradients.
        Collective in the first step; later only where they are allowed.

        Args:
            last: whether this is the last micro-batch of its step.

        Raises:
            ConfigRefused: a parameter gets no gradient, and that is not allowed; or the first forward has changed a
                parameter otherwise on other ranks. On all ranks.
        """
        if self._without is not None and (self.by_ddp or not self.allowed):
            return
        with real_tensors():
            mine = self._mask(loss)
            # DDP waits for what the last micro-batch uses; FSDP reduces what all of them have used.
            self._used = mine if self.by_ddp else torch.maximum(self._used, mine)
            if self._without is None and last and not self.allowed:
                self._compare_ranks()
                self._refuse_unused()

    def finish(self) -> None:
        """Complete the gradients of a step, after its last backward pass. Collective.

        Raises:
            ConfigRefused: a parameter has no gradient that had one in the first step, and that is not allowed. On the
                ranks where it is so.
        """
        self._reduced.clear()
        if self.replicated:
            self._average_replicated()
        if self.allowed:
            if not self.by_ddp:
                self._drop_unused()
            self._without = set()
            return
        if self._all_had_one and self._all_reached():
            return
        without = {name for name, item in self.named if not self._reached(item)}
        if self._without is not None and without != self._without:
            raise self._refusal(sorted(without ^ self._without), _SOMETIMES)
        self._without, self._all_had_one = without, not without

    def _all_reached(self) -> bool:
        if self._reached is not _has_gradient:
            return all(map(self._reached, self._parameters))
        for item in self._parameters:  # noqa: SIM110  no call for each parameter, at each step
            if item.grad is None:
                return False
        return True

    def forget(self) -> None:
        """Start the step under way again: its micro-batches do not count."""
        self._used = torch.zeros_like(self._used)
        self._reduced.clear()
        if self._without is None:
            self._reduced_first.clear()

    def _mask(self, loss: Tensor) -> Tensor:
        reached = _leaves(loss)
        whole = whole_parameters(self.model)
        found = [int(reached is None or id(whole.get(id(item), item)) in reached) for _, item in self.named]
        return torch.tensor(found, dtype=torch.int32)

    def _compare_ranks(self) -> None:
        """Refuse a forward that changes parameters by a rank's own samples, which DDP does not notice; warn of one that
        changes buffers so."""
        if self.by_ddp and (parted := self._parted(cleaned(self.model))):
            raise ConfigRefused(
                [
                    Violation(
                        "model",
                        ABSENT,
                        f"after one forward, ranks have other values of {parted[0]}: it is changed by each rank's own "
                        f"samples",
                        "change parameters between steps, in a callback, or let it be a buffer",
                    )
                ]
            )
        # Batch normalisation has a warning of its own.
        known = {
            id(item) for module in self.model.modules() if isinstance(module, BATCH_NORMS) for item in module.buffers()
        }
        saved = {id(item) for module in self.model.modules() for item in saved_buffers(module)} - known
        if parted := self._parted([(name, item) for name, item in self.model.named_buffers() if id(item) in saved]):
            more = f" and {len(parted) - 1} more" if len(parted) > 1 else ""
            _log.warning(
                "forward changes the buffer %s%s by the samples of each rank, not of the whole batch as one process "
                "does; the first rank's is kept",
                parted[0].removeprefix("module."),
                more,
            )

    def _parted(self, named: Sequence[tuple[str, Tensor]]) -> list[str]:
        """Names of the plain tensors whose values differ between ranks. Collective."""
        named = [(name, item) for name, item in named if type(item.data) is Tensor and item.layout is torch.strided]
        if not named:
            return []
        sums = torch.stack([_sum_of_bytes(item).to(self.device) for _, item in named])
        both = torch.cat([sums, -sums])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        most, least = both.chunk(2)
        return [name for (name, _), parted in zip(named, (most != -least).tolist(), strict=True) if parted]

    def _refuse_unused(self) -> None:
        least, most = self._over_ranks(self._used, dist.ReduceOp.MIN), self._over_ranks(self._used, dist.ReduceOp.MAX)
        self._used = torch.zeros_like(self._used)
        # One process trains around a parameter that nothing uses, and FSDP does so too.
        wrong = least == 0 if self.by_ddp else least != most
        names = [name for (name, _), faulty in zip(self.named, wrong.tolist(), strict=True) if faulty]
        if names:
            where = "get no gradient" if bool((most == 0)[wrong].all()) else "get a gradient on some ranks only"
            raise self._refusal(names, where)

    def _look(self, group: Sequence[Tensor], without: Sequence[Tensor]) -> None:
        """Refuse other gradients than those of the first step before FSDP communicates, on the ranks where it is so."""
        missing = {id(item) for item in without}
        reduced, first = (found.setdefault(id(group[0]), []) for found in (self._reduced, self._reduced_first))
        reduced.append(missing)  # a group of several forwards is reduced in several parts
        if self._without is None:
            first.append(missing)
        elif len(reduced) <= len(first) and (changed := missing ^ first[len(reduced) - 1]):
            raise self._refusal([name for name, item in self.named if id(item) in changed], _SOMETIMES)

    def _average_replicated(self) -> None:
        with real_tensors():
            mask = torch.tensor([int(item.grad is not None) for item in self.replicated], dtype=torch.int32)
            used = self._over_ranks(mask, dist.ReduceOp.MAX).tolist()
        for item, anywhere in zip(self.replicated, used, strict=True):
            if not anywhere:
                continue
            if item.grad is None:
                item.grad = torch.zeros_like(item)
            dist.all_reduce(torch.view_as_real(item.grad) if item.grad.is_complex() else item.grad, group=self.group)
            item.grad.div_(dist.get_world_size(self.group))

    def _drop_unused(self) -> None:
        """Leave parameters without a gradient that no rank has used: FSDP has reduced zeros for them, and an optimizer
        would move them by momentum and weight decay."""
        with real_tensors():
            used = self._over_ranks(self._used, dist.ReduceOp.MAX).tolist()
            self._used = torch.zeros_like(self._used)
        for (_, item), anywhere in zip(self.named, used, strict=True):
            if not anywhere:
                item.grad = None

    def _refusal(self, names: Sequence[str], what: str) -> ConfigRefused:
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        rule = f"these trainable parameters {what}: {shown}"
        fix = "freeze them (requires_grad_(False)) or remove them"
        fix += f"; or train around them: {_SETTING}={ALLOW}" if self._may_allow else "; or stack=auto"
        return ConfigRefused([Violation(_SETTING, REFUSE, rule, fix)])

    def _over_ranks(self, mask: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reduced = mask.to(self.device, copy=True)  # on the CPU it would be the mask itself
        dist.all_reduce(reduced, op=operation, group=self.group)
        return reduced.cpu()


def _sum_of_bytes(item: Tensor) -> Tensor:
    """A number that is the same in any order of summation."""
    found = item.detach().contiguous().reshape(-1).view(torch.uint8)
    # In pieces: on the CPU, torch makes a copy of eight bytes for each.
    return torch.stack([piece.sum(dtype=torch.int64) for piece in found.split(_PIECE)]).sum()


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None


def _leaves(loss: Tensor) -> set[int] | None:
    """Identities of the parameters that a loss depends on; None where its graph hides some."""
    found: set[int] = set()
    seen: set[object] = set()
    waiting = [] if loss.grad_fn is None else [loss.grad_fn]
    if loss.grad_fn is None and loss.requires_grad:
        found.add(id(loss))
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name().startswith(_HIDING):
            return None
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found.add(id(variable))
        waiting.extend(following for following, _ in node.next_functions if following is not None)
    return found
