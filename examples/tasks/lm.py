"""Language modelling of bytes: the task `lm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoder import Decoder, DecoderConfig
from tasks.section import check_val_fraction, section_of
from tasks.task import Batch, Task
from tasks.text import VOCAB_SIZE, Windows, bigram_loss, corpus, split, unigram_loss


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
        check_val_fraction(self.val_fraction)
        if self.stride is not None and self.stride < 1:
            raise ValueError(f"data.stride={self.stride}: must be at least 1")
        if self.context is not None and self.context < 1:
            raise ValueError(f"data.context={self.context}: must be at least 1")


def task(model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    """See `build_task`."""
    settings = section_of(LmData, "data", data)
    factory, longest, vocab_size = _named_model(model) if "_target_" in model else _own_model(model)
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
        loss=_loss,
        tokens_per_sample=context,
        report=partial(_report, train, val),
    )


def _own_model(model: Mapping[str, Any]) -> tuple[Callable[[], nn.Module], int, int]:
    """The decoder of the examples, the longest sequence it takes, and its vocabulary."""
    config = section_of(DecoderConfig, "model", model)
    return partial(Decoder, config), config.context, config.vocab_size


def _named_model(model: Mapping[str, Any]) -> tuple[None, int | None, int | None]:
    """The same of a model that the configuration names, as far as its own configuration has them."""
    config = model.get("config")
    config = config if isinstance(config, Mapping) else {}
    return None, config.get("max_position_embeddings"), config.get("vocab_size")


def _loss(output: Any, batch: Batch) -> Tensor:
    logits = getattr(output, "logits", output)  # models of libraries return more than logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def _report(train: Tensor, val: Tensor, model: nn.Module | None, results: Mapping[str, float]) -> list[str]:
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
