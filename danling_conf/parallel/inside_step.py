"""Whether a step under the layout is running. Inside, a model takes this rank's part of each sequence and may leave its
logits sharded; outside it takes whole sequences and gives whole outputs, alike on all ranks that share samples, so that
anybody may call it: for samples of text, for an export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch.distributed.tensor.parallel import loss_parallel


@dataclass
class _Flags:
    # Plain attributes: on an accelerator, the backward pass recomputes activations in a thread of its own.
    sequence_parts: bool = False
    sharded_logits: bool = False


_flags = _Flags()


@contextmanager
def step(*, sharded_logits: bool) -> Iterator[None]:
    """Forward, loss and backward go inside. `sharded_logits`: outputs may stay sharded over the vocabulary, and torch's
    cross-entropy takes them so; without, they are gathered."""
    before = _flags.sequence_parts, _flags.sharded_logits
    _flags.sequence_parts, _flags.sharded_logits = True, sharded_logits
    try:
        with loss_parallel() if sharded_logits else nullcontext():
            yield
    finally:
        _flags.sequence_parts, _flags.sharded_logits = before


def sequence_parts() -> bool:
    """Whether models take parts of sequences."""
    return _flags.sequence_parts


def sharded_logits() -> bool:
    """Whether models may leave their logits sharded."""
    return _flags.sharded_logits
