"""Tasks: a model, data, a loss and metrics under one name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from models.decoder import Decoder, DecoderConfig
from models.mlp import MLP, MLPConfig
from tasks.digits import CLASSES, PIXELS, digits
from tasks.text import VOCAB_SIZE, Windows, bigram_loss, corpus, split, unigram_loss

Batch = tuple[Tensor, Tensor]
Section = TypeVar("Section")


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


@dataclass(kw_only=True)
class LmData:
    """`data` of the task `lm`."""

    val_fraction: float = 0.1
    """Share of the corpus, at its end, that is for validation."""
    stride: int | None = None
    """Bytes between the starts of two training windows. None: a quarter of the context. Validation windows never
    overlap."""
    context: int | None = None
    """Bytes in a window. None: as many as the model takes, by `model.context` or
    `model.config.max_position_embeddings`."""

    def __post_init__(self) -> None:
        _check_val_fraction(self.val_fraction)
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"data.stride={self.stride}: must be at least 1")
        if self.context is not None and self.context < 1:
            raise ValueError(f"data.context={self.context}: must be at least 1")


@dataclass(kw_only=True)
class DigitsData:
    """`data` of the task `digits`."""

    val_fraction: float = 0.2
    """Share of the images, of each digit alike, that is for validation."""

    def __post_init__(self) -> None:
        _check_val_fraction(self.val_fraction)


def build_task(name: str, model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    """The task called `name`: `lm` (bytes of Python's reference) or `digits`.

    Args:
        model: settings of the task's model, by the names of `DecoderConfig` or `MLPConfig`.
        data: settings of its data, by the names of `LmData` or `DigitsData`.

    Raises:
        ValueError: for an unknown name or key, with the nearest known one; for a missing setting or a bad value.
        TypeError: for a value of another type.
    """
    if name not in _TASKS:
        raise ValueError(f"task {name!r}: no such task{_nearest(name, _TASKS)}")
    return _TASKS[name](model, data)


def _lm(model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    settings = _section(LmData, "data", data)
    factory, longest, vocab_size = _named_model(model) if "_target_" in model else _decoder(model)
    if vocab_size is not None and vocab_size < VOCAB_SIZE:
        raise ValueError(f"model.vocab_size={vocab_size}: bytes need at least {VOCAB_SIZE}")
    context = settings.context or longest
    if context is None:
        raise ValueError("data.context: the model has no longest sequence; set it")
    if longest is not None and context > longest:
        raise ValueError(f"data.context={context}: longer than the model takes, {longest}")
    train, val = split(corpus(), settings.val_fraction)
    stride = max(1, context // 4) if settings.stride is None else settings.stride
    return Task(
        name="lm",
        model=factory,
        datasets={"train": Windows(train, context, stride), "val": Windows(val, context, context)},
        loss=_lm_loss,
        tokens_per_sample=context,
        report=partial(_lm_report, train, val),
    )


def _decoder(model: Mapping[str, Any]) -> tuple[Callable[[], nn.Module], int, int]:
    """The decoder of the examples, the longest sequence it takes, and its vocabulary."""
    config = _section(DecoderConfig, "model", model)
    return partial(Decoder, config), config.context, config.vocab_size


def _named_model(model: Mapping[str, Any]) -> tuple[None, int | None, int | None]:
    """The same of a model that the configuration names, as far as its own configuration has them."""
    config = model.get("config")
    config = config if isinstance(config, Mapping) else {}
    return None, config.get("max_position_embeddings"), config.get("vocab_size")


def _lm_loss(output: Any, batch: Batch) -> Tensor:
    logits = getattr(output, "logits", output)  # models of libraries return more than logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def _lm_report(train: Tensor, val: Tensor, model: nn.Module | None, results: Mapping[str, float]) -> list[str]:
    lines = [f"val.loss in nats a byte: unigram {unigram_loss(train, val):.3f}, bigram {bigram_loss(train, val):.3f}"]
    if "val.loss" in results:
        lines[0] += f", this model {results['val.loss']:.3f}"
    if isinstance(model, Decoder):
        prompt = 'The "with" statement'
        device = next(model.parameters()).device
        tokens = torch.tensor([list(prompt.encode())], device=device)
        sample = model.generate(tokens, 240, temperature=0.7, generator=torch.Generator().manual_seed(0))
        lines += ["a sample:", bytes(sample[0].tolist()).decode(errors="replace")]
    return lines


def _digits(model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    config = _section(MLPConfig, "model", model)
    settings = _section(DigitsData, "data", data)
    for key, needed in (("inputs", PIXELS), ("classes", CLASSES)):
        if getattr(config, key) != needed:
            raise ValueError(f"model.{key}={getattr(config, key)}: the task digits has {needed}; leave the key out")
    return Task(
        name="digits",
        model=partial(MLP, config),
        datasets=digits(settings.val_fraction),
        loss=_digits_loss,
        metrics={"accuracy": partial(MulticlassAccuracy, num_classes=CLASSES, average="micro")},
        report=_digits_report,
    )


def _digits_loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.float(), batch[1])


def _digits_report(model: nn.Module | None, results: Mapping[str, float]) -> list[str]:
    if "val.accuracy" not in results:
        return []
    return [f"val.accuracy {results['val.accuracy']:.1%}, by chance {1 / CLASSES:.0%}"]


_TASKS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], Task]] = {"lm": _lm, "digits": _digits}


def _section(section: type[Section], path: str, values: Mapping[str, Any]) -> Section:
    """Build the dataclass `section` from the values at `path` of a configuration."""
    declared = {entry.name: entry for entry in fields(section)}
    types = get_type_hints(section)
    for key, value in values.items():
        if key not in declared:
            raise ValueError(f"{path}.{key}={value!r}: no such setting{_nearest(str(key), declared)}")
        allowed = get_args(types[key]) or (types[key],)
        # By exact type: True is an int, but never meant as a size. A whole number may stand for a float.
        if type(value) not in ((*allowed, int) if float in allowed else allowed):
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in allowed)
            raise TypeError(f"{path}.{key}={value!r}: must be {names}, not {type(value).__name__}")
    required = [name for name, entry in declared.items() if entry.default is MISSING]
    if missing := [f"{path}.{name}" for name in required if name not in values]:
        raise ValueError(f"{', '.join(missing)}: missing, and there is no default; set it")
    return section(**values)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _check_val_fraction(value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(
            f"data.val_fraction={value}: must be larger than 0 and smaller than 1, so that both splits hold data"
        )
