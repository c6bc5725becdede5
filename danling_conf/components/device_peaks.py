"""Peak FLOP/s of the devices of a run, as their makers state them."""

from __future__ import annotations

import torch

from danling_conf.topology.hardware import gpu_reported_as


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
