"""A training step of one process as one graph: forward, loss and backward; the optimizer's step is a second one.

A compiler that sees the whole step can place the first operators of backward behind the last ones of forward, and
chooses what to keep for both. torch 2.13 has no such graph for several processes: under DDP and FSDP2 the flag that it
needs loses every gradient without an error (see `topology.rules.world`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from danling_conf._torch_private.compiling import one_graph, place_of_break, untraceable
from danling_conf.parallel.compile import options_of
from danling_conf.schema.compile import CompileConfig
from danling_conf.topology.violation import SettingError

Objective = Callable[[Any], "tuple[Tensor, Tensor | float]"]
"""Total and weight of a batch's loss, as `parallel.forward_backward` measures them."""


class WholeStep:
    """Forward, loss and backward of a micro-batch in one graph. Gradients are added to those that are there.

    Args:
        objective: what is differentiated; without a wrapper around the model.
        section: `compile`, whose backend and options the graph is compiled with.
    """

    def __init__(self, objective: Objective, section: CompileConfig) -> None:
        def step(batch: Any, micro_batches: int) -> tuple[Tensor, Tensor | float]:
            total, weight = objective(batch)
            # A sum is divided by its count when the step is complete, a mean by the number of means.
            value = total if isinstance(weight, Tensor) or micro_batches == 1 else total / micro_batches
            value.backward()
            return total.detach(), weight

        options = {name: value for name, value in options_of(section).items() if name != "fullgraph"}
        self._objective, self._step = objective, one_graph(step, **options)

    def __call__(self, batch: Any, micro_batches: int) -> tuple[Tensor, Tensor | float]:
        """Total and weight of the loss, detached.

        Raises SettingError where the step is not one graph, with the line that breaks it, or the loss is none.
        """
        try:
            return self._step(batch, micro_batches)
        except untraceable() as error:
            # A fault of the loss ends tracing as well, and has a sentence of its own.
            with torch.compiler.set_stance("force_eager"):
                self._objective(batch)
            raise _not_one_graph(error) from error


def compiled_update(optimizer: Optimizer, section: CompileConfig) -> Callable[[], None]:
    """The optimizer's step as a graph of its own. One that torch cannot trace runs as it is.

    The learning rates are tensors while it runs: torch would compile it again for each value of a number.
    """
    options = {name: value for name, value in options_of(section).items() if name != "fullgraph"}
    # Not `optimizer.step` itself, which a scheduler replaces.
    step = torch.compile(lambda: optimizer.step(), **options)
    rates: dict[int, Tensor] = {}

    def update() -> None:
        # With `foreach` optimizers refuse a tensor; torch takes their numbers as variables.
        groups = [group for group in optimizer.param_groups if not group.get("foreach")]
        numbers = [(group, group["lr"]) for group in groups if isinstance(group.get("lr"), float)]
        for index, (group, number) in enumerate(numbers):
            group["lr"] = rates.setdefault(index, torch.tensor(number)).fill_(number)
        try:
            step()
        finally:
            for group, number in numbers:
                group["lr"] = number

    return update


def _not_one_graph(error: Exception) -> SettingError:
    place = place_of_break(error)
    where = "" if place is None else f" at {place[0]}:{place[1]}, `{place[2].strip()}`"
    reason = next(iter(str(error).splitlines()), "").rstrip(".")
    return SettingError(
        "stack",
        "graph",
        f"forward, loss and backward are not one graph: tracing ends{where} ({reason})",
        "move that out of the model's forward and the loss, or stack=auto compile=whole, which goes around it",
    )
