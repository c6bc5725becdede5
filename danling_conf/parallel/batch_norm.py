"""Batch normalisation over the data ranks: statistics of the whole batch, or a warning that they are not."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from danling_conf._torch_private.distributed import sum_over_ranks
from danling_conf.parallel.mesh import batch_mesh
from danling_conf.parallel.process_group import is_distributed
from danling_conf.topology.violation import SettingError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_log = logging.getLogger(__name__)

_PATH = "parallel.sync_batch_norm"


class SumOfRanks(nn.BatchNorm1d):
    """Batch normalisation of any number of dimensions by two differentiable sums over the ranks.

    For the CPU, where torch has none; DDP takes no module of torch's class there.
    """

    process_group: Any
    """None where no other rank has other samples."""

    def forward(self, input: Tensor) -> Tensor:
        together = self.process_group is not None and self.training and not input.is_meta
        return self._over_ranks(input) if together else super().forward(input)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs at least two dimensions, and got {list(input.shape)}")

    @torch.compiler.disable  # a graph with collectives need not be cut alike on all ranks
    def _over_ranks(self, input: Tensor) -> Tensor:
        group = self.process_group
        self._check_input_dim(input)
        wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
        dims = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        count = wide.new_tensor([input.numel() // input.shape[1]])
        sums = sum_over_ranks(torch.cat([wide.sum(dims), count]), group)
        total = sums[-1].item()
        if total <= 1:
            raise ValueError(f"batch normalisation needs more than one value per channel, and got {list(input.shape)}")
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        variance = sum_over_ranks(centred.square().sum(dims), group) / total
        self._track(mean.detach(), variance.detach() * (total / (total - 1)))
        normal = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if not self.track_running_stats:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, new in ((self.running_mean, mean), (self.running_var, variance)):
            assert running is not None
            running.lerp_(new.to(running.dtype), share)


SYNCHRONISED = (SumOfRanks, nn.SyncBatchNorm)


def apply(model: nn.Module, mesh: DeviceMesh | None, device: torch.device, *, synchronise: bool) -> None:
    """Let the batch normalisation of `model` use the samples of all ranks that see other tokens, in place.

    Modules keep their names, parameters and buffers. A model's own `SyncBatchNorm` does so whatever `synchronise` says,
    on the CPU too.

    Without `synchronise`, a warning names the first module whose statistics will not be those of one process.

    Raises:
        SettingError: a module is of a class of its own, which may do more than batch normalisation.
    """
    if not is_distributed():
        return
    batch = batch_mesh(mesh)
    group: Any = dist.group.WORLD if mesh is None else None if batch is None else batch.get_group()
    if group is not None and dist.get_world_size(group) == 1:
        group = None
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    for name, module in found:
        if type(module) is nn.SyncBatchNorm or (synchronise and group is not None):
            _convert(name, module, device, group)
    if synchronise and not found:
        _log.warning("%s=true: the model has no batch normalisation", _PATH)
    local = [name for name, module in found if not isinstance(module, SYNCHRONISED)]
    if local and group is not None:
        _log.warning(
            "batch normalisation %s uses the samples of its own rank, not of the whole batch as one process does; "
            "%s=true uses those of all ranks",
            local[0],
            _PATH,
        )


def _convert(name: str, module: nn.Module, device: torch.device, group: Any) -> None:
    if type(module) not in BATCH_NORMS:
        raise SettingError(
            _PATH,
            True,
            f"{name} is a {type(module).__name__}, a class of its own, which may do more than batch normalisation",
            "use torch's BatchNorm1d, 2d or 3d in its place, or set it to false",
        )
    # The class alone is exchanged: the module keeps its parameters, its hooks and the places that refer to it.
    module.__class__ = SumOfRanks if group is None or device.type == "cpu" else nn.SyncBatchNorm
    module.process_group = group
