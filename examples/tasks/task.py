"""Task: a model, data, a loss and metrics under one name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from tasks.section import nearest

if TYPE_CHECKING:
    from torchmetrics import Metric

Batch = tuple[Tensor, Tensor]

TASKS = ("digits", "lm")
"""Names of the tasks, and of the modules that have them."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Everything that a training loop needs; batches are (inputs, targets)."""

    name: str
    model: Callable[[], nn.Module] | None
    """Builds the model, on the device of the context it is called in (`torch.device("meta")`). None: the configuration
    names it by `model._target_`."""
    datasets: Mapping[str, Dataset[Batch]]
    """By split: `train` and `val`."""
    loss: Callable[[Any, Batch], Tensor]
    """Mean loss of the model's output on a batch: a scalar."""
    metrics: Mapping[str, Callable[[], Metric]] = field(default_factory=dict)
    """Builders of further metrics, which are updated with the model's output and the targets."""
    tokens_per_sample: int = 1
    """Predictions in one sample, for reports of speed."""
    report: Callable[[nn.Module | None, Mapping[str, float]], list[str]]
    """Lines to print after training, from the model and the final results (`{"val.loss": 1.6}`).

    Called on every rank, since a sharded model needs them all in a forward pass; printed by one. The model is None
    where no rank can run it whole (a pipeline), which leaves out what has to be generated.
    """


def build_task(name: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    """The task called `name`: `lm` (bytes of Python's reference) or `digits`.

    Args:
        model: settings of the task's model, by the names of `DecoderConfig` or `MLPConfig`.
        data: settings of its data, by the names of `LmData` or `DigitsData`.

    Raises:
        ValueError: for an unknown name or key, with the nearest known one; for a missing setting or a bad value.
        TypeError: for a value of another type.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r}: no such task{nearest(name, TASKS)}")
    # Imported here: a task need not wait for the libraries of another.
    task: Task = import_module(f"tasks.{name}").task(model, data)
    return task
