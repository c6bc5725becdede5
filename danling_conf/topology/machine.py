"""Facts about this machine and the launcher of this process, found without torch, for the rules to check against."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from danling_conf.schema.fault_tolerance import LIGHTHOUSE_VARIABLE
from danling_conf.topology.rank_environment import started_rank

TRACKERS = ("tensorboard", "wandb", "mlflow")
"""Packages of trackers that metrics can be sent to."""

_ACCELERATOR_FILES = (
    "nvidia[0-9]*", "nvidiactl", "kfd", "dxg", "dri/renderD*", "accel*", "hl[0-9]*", "davinci*", "neuron*",
    "vfio/[0-9]*",
)  # fmt: skip
"""Device files of NVIDIA, AMD, WSL, Intel, Gaudi, Ascend, Trainium and TPU, below /dev."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine on which a run would start, as far as the rules need it."""

    devices: int = 0
    """Accelerators present; 0 means that ranks run on the CPU."""
    started_world_size: int | None = None
    """World size from the launcher of this process (torchrun, srun, submitit); None without one."""
    launcher: str | None = None
    """Name of that launcher, for messages."""
    compiler: bool | None = True
    """Whether a C++ compiler and Python's headers are present; None: this machine's, once `can_compile` is asked."""
    safetensors: bool = True
    """Whether the package safetensors is installed, which writes exports."""
    deepspeed: bool = True
    """Whether the package deepspeed is installed."""
    trackers: frozenset[str] = frozenset(TRACKERS)
    """Which of the packages of trackers are installed."""
    torchft: bool = True
    """Whether the package torchft is installed, which manages replica groups."""
    lighthouse: str | None = None
    """Address of the lighthouse that the environment names; None where it names none."""

    cluster_world_size: int | None = None
    """World size that fills a degree of -1 of a job on a cluster, whose ranks may be on several nodes; `devices` are
    then those of one node. None for a run on this machine."""

    @property
    def fill_world_size(self) -> int:
        """World size that fills a degree of -1."""
        return self.cluster_world_size or self.started_world_size or max(1, self.devices)

    def can_compile(self) -> bool:
        """Whether torch.compile, which generates C++ for the CPU, has what it needs."""
        return _has_compiler() if self.compiler is None else self.compiler


def this_machine(environment: Mapping[str, str] = os.environ) -> Machine:
    """The machine of this process."""
    rank = started_rank(environment)
    if rank is not None and rank.world_size == 1 and rank.launcher != "torchrun":
        # A shell inside an allocation, or a child of another launcher, inherits such variables and is not a rank.
        rank = None
    return Machine(
        devices=count_devices(environment.get("CUDA_VISIBLE_DEVICES")),
        started_world_size=rank.world_size if rank else None,
        launcher=rank.launcher if rank else None,
        compiler=None,
        safetensors=find_spec("safetensors") is not None,
        deepspeed=find_spec("deepspeed") is not None,
        trackers=frozenset(name for name in TRACKERS if find_spec(name) is not None),
        torchft=find_spec("torchft") is not None,
        lighthouse=environment.get(LIGHTHOUSE_VARIABLE) or None,
    )


def _has_compiler() -> bool:
    import sysconfig  # which reads how Python was built

    # inductor's generated C++ includes Python.h, which many distributions ship in a package of its own.
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compilers = (os.environ.get("CXX") or "g++", "clang++", "c++")
    return headers.is_file() and any(shutil.which(name) for name in compilers)


def accelerator_files(folder: Path = Path("/dev")) -> list[Path]:
    """Device files of accelerators: where there are none, no library of this machine can open one."""
    return [path for pattern in _ACCELERATOR_FILES for path in folder.glob(pattern)]


@cache
def count_devices(visible: str | None) -> int:
    """NVIDIA devices that this process may use, by CUDA_VISIBLE_DEVICES and nvidia-smi; 0 without them."""
    # CUDA_VISIBLE_DEVICES="" hides all devices: then do not even start nvidia-smi.
    if visible is not None and not _named_devices(visible, sys.maxsize):
        return 0
    # Not torch.cuda.device_count(): importing torch would take longer than the whole check.
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=60, check=False)
    present = sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0
    return present if visible is None else min(present, _named_devices(visible, present))


def _named_devices(visible: str, present: int) -> int:
    """Number of devices in a list, as CUDA reads it: up to the first entry that names none; 0 if one is repeated."""
    names: list[str] = []
    for name in (item.strip() for item in visible.split(",")):
        if not name or (name.removeprefix("-").isdecimal() and not 0 <= int(name) < present):
            break
        if name in names:
            return 0
        names.append(name)
    return len(names)
