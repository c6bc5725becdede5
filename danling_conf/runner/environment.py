"""What an attempt ran on: versions, devices, host."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch

from danling_conf.records.run_directory import write_whole
from danling_conf.schema.files import ENVIRONMENT


def record_environment(attempt: Path) -> None:
    """Write `environment.json` into an attempt's folder."""
    content = {
        "python": sys.version,
        "platform": platform.platform(),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "accelerators": [torch.get_device_module().get_device_name(index) for index in range(_accelerators())],
        "packages": {
            found.metadata["Name"]: found.version
            for found in sorted(importlib.metadata.distributions(), key=lambda item: str(item.metadata["Name"]).lower())
        },
    }
    write_whole(attempt / ENVIRONMENT, json.dumps(content, indent=1) + "\n")


def _accelerators() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0
