"""Byte-level language modelling of Python's own reference, which every Python has with it (`pydoc_data.topics`)."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor
from torch.utils.data import Dataset

VOCAB_SIZE = 256


def corpus() -> Tensor:
    """All topics of `help()`, in the order of their names, as bytes: (size,) uint8."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def split(tokens: Tensor, val_fraction: float) -> tuple[Tensor, Tensor]:
    """Cut off the tail of (size,) for validation: train, val. Nothing is in both."""
    cut = tokens.numel() - round(tokens.numel() * val_fraction)
    return tokens[:cut], tokens[cut:]


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a sequence of tokens: inputs and targets, each (context,) int64, where a target is the next token.

    Args:
        tokens: (size,) integers.
        context: inputs in a window.
        stride: tokens between the starts of two windows; `context` predicts each token once.

    Raises:
        ValueError: when not one window fits.
    """

    def __init__(self, tokens: Tensor, context: int, stride: int) -> None:
        if tokens.numel() <= context:
            raise ValueError(
                f"a window of {context} inputs needs {context + 1} tokens, the split has {tokens.numel()}; lower"
                " model.context, or give the split more of data.val_fraction"
            )
        self.windows = tokens.long().unfold(0, context + 1, stride)

    def __len__(self) -> int:
        return self.windows.shape[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.windows[index]
        return window[:-1], window[1:]


def unigram_loss(train: Tensor, val: Tensor) -> float:
    """Cross-entropy of val (size,) uint8 in nats a byte, under the bytes' frequencies in train plus one each."""
    counts = torch.bincount(train.long(), minlength=VOCAB_SIZE).double() + 1
    return -(counts / counts.sum()).log()[val.long()].mean().item()


def bigram_loss(train: Tensor, val: Tensor, prior: float = 5.0) -> float:
    """Cross-entropy of val (size,) uint8 in nats a byte, each byte predicted from the one before by counts in train.

    Counts are smoothed towards the unigram frequencies, by `prior` imaginary observations after each byte (MacKay and
    Peto, "A hierarchical Dirichlet language model", 1995): far better than adding one to each of 256 counts.
    """
    unigram = torch.bincount(train.long(), minlength=VOCAB_SIZE).double() + 1
    unigram /= unigram.sum()
    pairs = train[:-1].long() * VOCAB_SIZE + train[1:].long()
    counts = torch.bincount(pairs, minlength=VOCAB_SIZE**2).double().view(VOCAB_SIZE, VOCAB_SIZE) + prior * unigram
    log_probabilities = (counts / counts.sum(dim=1, keepdim=True)).log()
    return -log_probabilities[val[:-1].long(), val[1:].long()].mean().item()
