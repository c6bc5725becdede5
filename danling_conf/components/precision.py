"""Precision: dtypes by name, and mixed precision where FSDP's policy does not provide it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
"""The dtypes that the configuration names."""


def dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name, None for None."""
    return None if name is None else DTYPES[name]


def autocast(precision: str | None, device_type: str) -> AbstractContextManager[object]:
    """A context for forward and loss that computes in `precision` where that is safe. Nothing for None and fp32.

    Not for a model under FSDP with the same precision: there FSDP casts (see `parallel.fsdp`).
    """
    if precision in (None, "fp32"):
        return nullcontext()
    return torch.autocast(device_type, dtype=DTYPES[precision])


def scaler(precision: str | None, device_type: str) -> torch.amp.GradScaler | None:
    """The loss scaler that fp16's narrow range of exponents needs; None for every other precision."""
    return torch.amp.GradScaler(device_type) if precision == "fp16" else None
