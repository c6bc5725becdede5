"""Classification of scikit-learn's handwritten digits, the task `digits`: 1,797 images of 8 x 8 pixels, which come with
the package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from models.mlp import MLP, MLPConfig
from tasks.section import check_val_fraction, section_of
from tasks.task import Batch, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

PIXELS = 64
CLASSES = 10


def digits(val_fraction: float) -> dict[str, TensorDataset]:
    """Data sets `train` and `val` of (pixels (64,) float32, digit () int64), the same at each call.

    Both have the digits in equal shares. Pixels are standardised by the mean and deviation they have in train.
    """
    images, labels = load_digits(return_X_y=True)
    train_x, val_x, train_y, val_y = train_test_split(
        images, labels, test_size=val_fraction, stratify=labels, random_state=0
    )
    # Some pixels are blank in every image of train; the scaler divides those by 1, not by a deviation of 0.
    scaler = StandardScaler().fit(train_x)
    return {
        split: TensorDataset(torch.from_numpy(scaler.transform(x)).float(), torch.from_numpy(y).long())
        for split, x, y in (("train", train_x, train_y), ("val", val_x, val_y))
    }


@dataclass(kw_only=True)
class DigitsData:
    """`data` of the task `digits`."""

    val_fraction: float = 0.2
    """Share of the images, of each digit alike, that is for validation."""

    def __post_init__(self) -> None:
        check_val_fraction(self.val_fraction)


def task(model: Mapping[str, Any], data: Mapping[str, Any]) -> Task:
    """See `build_task`."""
    config = section_of(MLPConfig, "model", model)
    settings = section_of(DigitsData, "data", data)
    for key, needed in (("inputs", PIXELS), ("classes", CLASSES)):
        if getattr(config, key) != needed:
            raise ValueError(f"model.{key}={getattr(config, key)}: the task digits has {needed}; leave the key out")
    return Task(
        name="digits",
        model=partial(MLP, config),
        datasets=digits(settings.val_fraction),
        loss=_loss,
        metrics={"accuracy": _accuracy},
        report=_report,
    )


def _accuracy() -> Metric:
    # Imported on use: torchmetrics brings scipy, and transformers where that is installed.
    from torchmetrics.classification import MulticlassAccuracy

    return MulticlassAccuracy(num_classes=CLASSES, average="micro")


def _loss(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.float(), batch[1])


def _report(model: nn.Module | None, results: Mapping[str, float]) -> list[str]:
    if "val.accuracy" not in results:
        return []
    return [f"val.accuracy {results['val.accuracy']:.1%}, by chance {1 / CLASSES:.0%}"]
