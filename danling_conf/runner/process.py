"""Process-wide settings of a run: random number generators, deterministic mode, garbage collection; and a record of
what the process runs on."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from danling_conf.components.samplers import seed_of
from danling_conf.schema.files import ENVIRONMENT, write_whole
from danling_conf.schema.process import GcConfig


def seed_rank(seed: int, stream: int) -> None:
    """Seed every generator, differently for each stream (`topology.layout.random_stream`)."""
    own = seed_of(seed, stream, 0)
    random.seed(own)
    torch.manual_seed(own)
    # A program that has not imported numpy draws nothing from it; importing it here would only slow the start.
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(own % 2**32)


def generator_state(device: torch.device) -> dict[str, Any]:
    """The state of this rank's generators, of plain values and tensors only."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        # As a tensor: a checkpoint is loaded without constructing numpy's objects.
        state["numpy"] = [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss]
    return state


def restore_generators(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state of `generator_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"])
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])
    if "numpy" in state:
        import numpy

        name, keys, position, has_gauss, gauss = state["numpy"]
        numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, gauss))


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Only deterministic operators while it lasts; an operator that has no such variant raises."""
    if not enabled:
        yield
        return
    # cuBLAS reads it when it makes its first handle.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def paced_collection(section: GcConfig) -> Iterator[None]:
    """Switch automatic garbage collection off for the time of a run, where the section asks for it.

    Every rank then collects at the same step, so that none makes the others wait.
    """
    pause = section.interval is not None and section.disable_automatic and gc.isenabled()
    if pause:
        gc.collect()
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def collect(section: GcConfig) -> None:
    """One paced collection."""
    gc.collect(section.generation)


def record_environment(attempt: Path) -> None:
    """Write `environment.json` into an attempt's folder: versions, devices and host that it runs on."""
    content = {
        "python": sys.version,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "accelerators": [torch.get_device_module().get_device_name(index) for index in range(_accelerators())],
        "packages": dict(sorted(map(_name_and_version, importlib.metadata.distributions()))),
    }
    write_whole(attempt / ENVIRONMENT, json.dumps(content, indent=1) + "\n")


def _name_and_version(found: importlib.metadata.Distribution) -> tuple[str, str]:
    # `found.metadata` parses the whole text, description included: a tenth of a second for a few hundred packages.
    text = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
    fields = dict(line.partition(": ")[::2] for line in reversed(text.partition("\n\n")[0].splitlines()))
    return fields.get("Name", "?"), fields.get("Version", "?")


def _accelerators() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
