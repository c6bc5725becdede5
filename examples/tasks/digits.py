"""Classification of scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels, which come with the package."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch.utils.data import TensorDataset

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
