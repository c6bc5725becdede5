"""Peak FLOP/s of devices, as their makers state them: dense matrix products, without sparsity."""

from __future__ import annotations

import torch

# TFLOP/s in bf16 (and fp16), TF32 and fp32. The first name that is part of a device's name counts, so that a longer
# name must stand before a shorter one.
_PEAKS: tuple[tuple[str, float, float, float], ...] = (
    ("B200", 2250, 1125, 75),
    ("H200", 989, 494, 67),
    ("H100 PCIe", 756, 378, 51),
    ("H100 NVL", 835, 417, 60),
    ("H100", 989, 494, 67),
    ("H800", 989, 494, 67),
    ("A100", 312, 156, 19.5),
    ("A800", 312, 156, 19.5),
    ("L40S", 362, 183, 91.6),
    ("L4", 121, 60, 30.3),
    ("A10G", 70, 35, 35),
    ("A10", 125, 62.5, 31.2),
    ("RTX 4090", 165, 82.6, 82.6),
    ("V100", 125, 15.7, 15.7),
    ("T4", 65, 8.1, 8.1),
    ("MI300X", 1307, 654, 163),
    ("MI250X", 192, 47.9, 47.9),
)


def peak_flops(device: torch.device, precision: str | None) -> float | None:
    """Most FLOP/s that a device can do in a precision (`bf16`, `fp16`, else fp32, or TF32 where torch may use it);
    None for CPUs, and for devices that are not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return peak_of_name(name, precision, tf32=torch.get_float32_matmul_precision() != "highest")


def peak_of_name(name: str, precision: str | None, *, tf32: bool) -> float | None:
    """The peak of a device by its name, in FLOP/s."""
    for known, half, middle, full in _PEAKS:
        if known in name:
            return 1e12 * (half if precision in ("bf16", "fp16") else middle if tf32 else full)
    return None
