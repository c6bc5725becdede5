"""Switch of a training step: whether a model works on parts of sequences and may return sharded logits.

Inside of a step it takes this rank's part of each sequence. Outside it takes whole sequences and returns whole outputs,
the same on all ranks that share samples, so that it can be called like any model: to sample text, to export.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch.distributed.tensor.parallel import loss_parallel


@dataclass
class _Flags:
    # Plain attributes, no context variables: on an accelerator, the backward pass recomputes activations in a thread of
    # its own, which does not inherit those.
    sequence_parts: bool = False
    sharded_logits: bool = False


_flags = _Flags()


@contextmanager
def step(*, sharded_logits: bool) -> Iterator[None]:
    """Context of forward, loss and backward. With `sharded_logits`, outputs may stay sharded over the vocabulary, which
    torch's cross-entropy accepts; without, they are gathered."""
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
