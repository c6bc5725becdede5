"""How much memory a rank uses: of its accelerator, or of the process where there is none."""

from __future__ import annotations

import resource
import sys

import torch


def peak_bytes() -> int:
    """The most that this rank has used so far: allocated on the accelerator, or resident in the process."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_bytes() -> int:
    """What this rank uses now: allocated on the accelerator, or resident in the process (its peak where the system does
    not tell)."""
    if torch.accelerator.is_available():
        return int(torch.accelerator.memory_allocated())
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes()
