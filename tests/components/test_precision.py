from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from danling_conf.components.precision import DTYPES, autocast, dtype, scaler
from danling_conf.schema.fsdp import DTYPES as NAMES


def test_every_name_of_the_configuration_is_a_dtype() -> None:
    assert set(DTYPES) == set(NAMES)
    assert dtype("bf16") is torch.bfloat16
    assert dtype(None) is None


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_full_precision_needs_no_context(precision: str | None) -> None:
    assert isinstance(autocast(precision, "cpu"), nullcontext)
    assert scaler(precision, "cpu") is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_matrix_products_run_in_the_precision_and_weights_keep_theirs(precision: str) -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(precision, "cpu"):
        assert layer(torch.ones(2, 4)).dtype is DTYPES[precision]
    assert layer.weight.dtype is torch.float32


def test_only_fp16_scales_the_loss() -> None:
    assert scaler("bf16", "cpu") is None
    found = scaler("fp16", "cpu")
    assert found is not None
    assert found.is_enabled()
