"""What stands in a pipeline stage for a module of another stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, str, torch.dtype)


class PassThrough(nn.Module):
    """Returns its first input: the place of a module that another stage holds. Names of the modules around it stay.

    Args:
        length: of the tuple that the module returns, of which only the first item is used; 0 for a module that returns
            a tensor.
        like: the module in whose place it stands: a model may read its numbers and words, such as the kind of a layer.
    """

    def __init__(self, length: int = 0, like: nn.Module | None = None) -> None:
        super().__init__()
        self._length = length
        for name, value in ({} if like is None else vars(like)).items():
            if isinstance(value, _PLAIN) and not name.startswith("_") and name != "training":
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        return (first, *[None] * (self._length - 1)) if self._length else first
