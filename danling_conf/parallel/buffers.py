"""Buffers over the data ranks: running statistics and other state that follows each rank's own samples.

DDP gives rank 0's to all ranks before each forward. FSDP and data parallelism of sharded weights leave each rank its
own: what is saved (rank 0's) would then not be what the other ranks train with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from danling_conf.parallel.batch_norm import SYNCHRONISED


class SharedBuffers:
    """Gives the buffers of the first data rank to the others at the end of each optimizer step.

    Those that are saved and that the first step changes on any rank are shared; most models have none, and pay nothing
    after it. What is not saved, such as a count of the last forward, is each rank's own.

    Args:
        parts: the model, or this rank's stages of it.
        mesh: the ranks that see other tokens.
    """

    def __init__(self, parts: Sequence[nn.Module], mesh: DeviceMesh) -> None:
        self.parts, self.group = parts, mesh.get_group()
        self._saved = [part.state_dict().keys() for part in parts]
        self._before: list[Tensor] | None = None
        self._shared: list[int] | None = None
        """Positions of the buffers that are shared; None before the end of the first step."""

    def begin(self) -> None:
        """Remember the buffers before the first forward."""
        if self._shared is None and self._before is None:
            self._before = [buffer.detach().clone() for buffer in self._buffers()]

    @torch.no_grad()
    def finish(self) -> None:
        """Share the buffers that training changes. Collective."""
        if self._shared == []:
            return
        found = list(self._buffers())
        if self._shared is None:
            self._shared = self._changed(found)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for position in self._shared:
            by_dtype.setdefault(found[position].dtype, []).append(found[position])
        for buffers in by_dtype.values():
            joined = torch.cat([buffer.reshape(-1) for buffer in buffers])
            # Not every backend sends every dtype; all of them send bytes.
            dist.broadcast(joined.view(torch.uint8), group=self.group, group_src=0)
            for buffer, part in zip(buffers, joined.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def _changed(self, found: Sequence[Tensor]) -> list[int]:
        before, self._before = self._before or [], None
        same = [old.shape == new.shape and torch.equal(old, new) for old, new in zip(before, found, strict=True)]
        changed = torch.tensor([not item for item in same], dtype=torch.int32, device=_device(found))
        if found:
            dist.all_reduce(changed, op=dist.ReduceOp.MAX, group=self.group)
        return [position for position, item in enumerate(changed.tolist()) if item]

    def _buffers(self) -> Iterator[Tensor]:
        """Looked up each time: a forward may put another tensor in a buffer's place."""
        for part, saved in zip(self.parts, self._saved, strict=True):
            synchronised = {name for name, module in part.named_modules() if isinstance(module, SYNCHRONISED)}
            for name, buffer in part.named_buffers():
                if name in saved and name.rpartition(".")[0] not in synchronised and not isinstance(buffer, DTensor):
                    yield buffer


def _device(buffers: Sequence[Tensor]) -> torch.device:
    return buffers[0].device if buffers else torch.device("cpu")
