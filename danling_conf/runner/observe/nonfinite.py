"""Watch for losses and gradients that are not finite; what happens then, `nonfinite` decides.

On an accelerator, each micro-batch adds one subtraction, `x - x`, which is zero for a finite number and not a number
else; the result is read with the next log line, which waits for the device anyway. Only `skip` must know before each
optimizer step, and waits for it. On the CPU numbers are there at once, and only those that are not finite are kept.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from danling_conf.parallel.process_group import is_distributed

_log = logging.getLogger(__name__)
COUNT, SKIP, FAIL = "count", "skip", "fail"
_KEPT = 1000
"""Tensors of one number that are kept before they are joined."""


class NotFinite(RuntimeError):
    """The loss or a gradient was not finite, and `nonfinite=fail`."""


class NonFinite:
    """Notices, counts and skips optimizer steps whose loss or gradients are not finite.

    Args:
        mode: of the setting `nonfinite`.
        indices: returns the samples of a micro-batch of this rank, from epoch and number in it; None where unknown.
        record: file that batches of this rank are written to.
    """

    def __init__(
        self,
        mode: str,
        *,
        device: torch.device,
        indices: Callable[[int, int], list[int] | None],
        record: Path,
    ) -> None:
        self.mode = mode
        self.steps = 0
        """Optimizer steps of this attempt that were not finite."""
        self.measures_gradients = mode != COUNT
        """Whether the gradients' norm is wanted also where nothing is clipped."""
        self._device, self._indices, self.record = device, indices, record
        self._joined: list[Tensor] = []
        self._seen: list[Tensor] = []
        self._of_step: list[Tensor] = []
        """Of the step under way."""
        self._places: list[tuple[int, int, int]] = []
        self._read_at = 0

    def begin(self, step: int) -> None:
        """Count from here."""
        self._read_at = step

    def look(self, value: Tensor | float, step: int, epoch: int, micro_batch: int) -> None:
        """Take a loss, or the norm of gradients (`micro_batch` -1), of the step that is under way."""
        if not isinstance(value, Tensor):
            if math.isfinite(value):
                return
            value = torch.tensor(value)
        zero = value - value
        self._seen.append(zero)
        if self.mode == SKIP:
            self._of_step.append(zero)
        self._places.append((step, epoch, micro_batch))
        if len(self._seen) >= _KEPT:
            self._joined.append(torch.stack(self._seen))
            self._seen = []

    def skips(self) -> bool:
        """Whether the optimizer must leave out the step that is under way, the same on every rank. Collective and
        waiting for the device where `nonfinite=skip`; else it is never left out."""
        if self.mode != SKIP:
            return False
        of_step, self._of_step = self._of_step, []
        bad = torch.stack(of_step).isnan().any().float() if of_step else torch.zeros((), device=self._device)
        if is_distributed():
            distributed.all_reduce(bad, op=distributed.ReduceOp.MAX)
        return bool(bad.item())

    def drop(self) -> None:
        """The step under way does not take place: what was seen in it decides about no other one."""
        self._of_step = []

    def unread(self, step: int) -> bool:
        """Whether there are steps up to this one whose flags were not read."""
        return step > self._read_at

    def flags(self, step: int) -> Tensor:
        """For each step since the last reading, how much in it was not finite on this rank: (steps,)."""
        flags = torch.zeros(max(0, step - self._read_at), dtype=torch.float64, device=self._device)
        values = self._values()
        if values is not None:
            places = torch.tensor([place[0] - self._read_at - 1 for place in self._places], device=self._device)
            flags.index_add_(0, places, values.isnan().double())
        return flags

    def read(self, step: int, flags: list[float]) -> list[int]:
        """The steps that were not finite, from the flags of all ranks together; this rank's batches are written
        down."""
        bad = [self._read_at + 1 + number for number, flag in enumerate(flags) if flag]
        if bad:
            self.steps += len(bad)
            self._write()
        self._read_at = step
        self._joined, self._seen, self._places = [], [], []
        return bad

    def _values(self) -> Tensor | None:
        if self._seen:
            self._joined.append(torch.stack(self._seen))
            self._seen = []
        return torch.cat(self._joined) if self._joined else None

    def _write(self) -> None:
        values = self._values()
        if values is None:
            return
        lines: list[dict[str, Any]] = []
        for place, bad in zip(self._places, values.isnan().tolist(), strict=True):
            if bad:
                lines.append(self._line(*place))
        if not lines:
            return
        try:
            with open(self.record, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        except OSError as error:
            _log.warning("what was not finite could not be written down: %s: %s", error, lines)

    def _line(self, step: int, epoch: int, micro_batch: int) -> dict[str, Any]:
        line: dict[str, Any] = {"step": step, "epoch": epoch}
        if micro_batch < 0:
            return {**line, "what": "gradients"}
        return {**line, "what": "loss", "micro_batch": micro_batch, "indices": self._indices(epoch, micro_batch)}


def warning_of(bad: list[int], record: Path, mode: str) -> str:
    """What is shown to the user of steps that were not finite."""
    shown = ", ".join(map(str, bad[:5])) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    steps = f"step {shown}" if len(bad) == 1 else f"steps {shown}"
    done = {
        COUNT: "nonfinite=skip leaves such steps out, nonfinite=fail ends the run",
        SKIP: "the optimizer left them out",
        FAIL: "nonfinite=fail ends the run",
    }[mode]
    where = f"{record.parent}/nonfinite-rank-*.jsonl"
    return f"{steps}: the loss or the gradients are not finite; batches are in {where}; {done}"
