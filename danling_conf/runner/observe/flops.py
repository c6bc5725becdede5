"""Model FLOPs utilisation (MFU): the arithmetic of a model's step, and the share of the device's peak that a run
reaches."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from danling_conf.components.batch import CountSamples, count_samples, to_device
from danling_conf.topology.hardware import gpu_reported_as

_log = logging.getLogger(__name__)


class Utilisation:
    """Model FLOPs utilisation: the FLOPs that the model itself needs over those that the devices could do.

    The FLOPs are counted once, with the first batch, on a copy of the model on the meta device: forward and backward of
    the whole model, whatever the layout, without what activation checkpointing computes again. Where the device's peak
    is not known, as on a CPU, or the copy cannot run on the meta device, there is no utilisation.

    Args:
        model: the factory or module that the run trains.
        devices: how many there are.
        count: samples in a batch.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        forward: Callable[[Any, Any], Any],
        loss: Callable[[Any, Any], Any],
        *,
        device: torch.device,
        precision: str | None,
        devices: int,
        count: CountSamples = count_samples,
    ) -> None:
        self.peak = peak_flops(device, precision)
        self.flops_per_sample: float | None = None
        self._devices = devices
        self._forward, self._loss, self._count = forward, loss, count
        # A module is changed when it is laid out over ranks: the copy is made before that.
        self._meta_copy = None if self.peak is None else _meta_copy(model)

    def count(self, batch: Any) -> None:
        """Count with the first batch; later calls do nothing."""
        if self._meta_copy is None:
            return
        meta_copy, self._meta_copy = self._meta_copy, None
        try:
            flops = model_flops(meta_copy, self._forward, self._loss, batch)
            self.flops_per_sample = flops / self._count(batch)
        except Exception as error:  # of the user's model on a device that it was not written for
            _log.info("the model's FLOPs are not known, since it does not run on the meta device: %s", error)

    def of(self, samples_per_second: float) -> float | None:
        """The share of the peak at a speed of all ranks together; None where it is not known."""
        if self.peak is None or self.flops_per_sample is None:
            return None
        return samples_per_second * self.flops_per_sample / (self.peak * self._devices)


def model_flops(
    meta_copy: nn.Module, forward: Callable[[Any, Any], Any], loss: Callable[[Any, Any], Any], batch: Any
) -> int:
    """FLOPs of forward and backward of one batch, by a model on the meta device. Raises what the model raises there."""
    on_meta = to_device(batch, torch.device("meta"))
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        found = loss(forward(meta_copy, on_meta), on_meta)
        (found[0] if isinstance(found, tuple) else found).backward()
    return int(counter.get_total_flops())


def _meta_copy(model: nn.Module | Callable[[], nn.Module]) -> nn.Module | None:
    """The same model on the meta device, without its weights being copied; None where it cannot be made."""
    try:
        if isinstance(model, nn.Module):
            tensors = [*model.parameters(), *model.buffers()]
            memo: dict[int, Any] = {id(item): _like(item) for item in tensors}
            return copy.deepcopy(model, memo)
        with torch.device("meta"):
            return model()
    except Exception as error:  # of the user's model
        _log.info("the model's FLOPs are not known, since there can be no copy of it on the meta device: %s", error)
        return None


def _like(item: Tensor) -> Tensor:
    empty = torch.empty_like(item, device="meta")
    return nn.Parameter(empty, requires_grad=item.requires_grad) if isinstance(item, nn.Parameter) else empty


def peak_flops(device: torch.device, precision: str | None) -> float | None:
    """Most FLOP/s that a device can do in a precision (`bf16`, `fp16`, else fp32, or TF32 where torch may use it);
    None for CPUs, and for devices that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return peak_of_name(name, precision, tf32=torch.get_float32_matmul_precision() != "highest")


def peak_of_name(name: str, precision: str | None, *, tf32: bool) -> float | None:
    """The peak of a device by its name, in FLOP/s."""
    gpu = gpu_reported_as(name)
    return (
        None
        if gpu is None
        else gpu.peak({"bf16": "bfloat16", "fp16": "float16"}.get(precision or "", "float32"), tf32=tf32)
    )
