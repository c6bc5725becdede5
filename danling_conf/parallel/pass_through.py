"""What stands in a pipeline stage for a module of another stage."""

from __future__ import annotations

from typing import Any

from torch import nn


class PassThrough(nn.Module):
    """Returns its first input: the place of a module that another stage holds. Names of the modules around it stay.

    Args:
        length: of the tuple that the module returns, of which only the first item is used; 0 for a module that returns
            a tensor.
    """

    def __init__(self, length: int = 0) -> None:
        super().__init__()
        self.length = length

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        return (first, *[None] * (self.length - 1)) if self.length else first
