"""A small training script, run as a user runs it, where importing torch is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]

OURS = """
from __future__ import annotations
import json
import danling_conf

@danling_conf.main(config_path={config_path!r}, config_name={config_name!r})
def train(config):
    print("steps", config.steps, "epochs", config.epochs, "replicate", config.parallel.axes.replicate)
    return 0.5

if __name__ == "__main__":
    train()
"""

PLAIN = """
import hydra

@hydra.main(config_path="conf", config_name="train", {version_base})
def train(config):
    axes = config.parallel.axes
    print("axes", axes.replicate, axes.shard, axes.context, axes.pipeline, axes.tensor, config.fsdp.enabled)

if __name__ == "__main__":
    train()
"""

_MARKERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES", "COMP_LINE",
    "COMP_POINT",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_app(folder: Path, text: str = OURS, *, config_path: str | None = None, config_name: str = "danling") -> Path:
    """`app.py` in a folder, and beside it a `torch` that cannot be imported."""
    import hydra

    version_base = "version_base=None" if hydra.__version__.startswith("1.3") else ""
    app = folder / "app.py"
    values = {"config_path": config_path, "config_name": config_name, "version_base": version_base}
    app.write_text(text.format(**values))
    poisoned_torch(folder)
    return app


def poisoned_torch(folder: Path) -> Path:
    """A folder for PYTHONPATH whose `torch` raises when it is imported."""
    package = folder / "poison" / "torch"
    package.mkdir(parents=True, exist_ok=True)
    (package / "__init__.py").write_text("raise RuntimeError('torch was imported')\n")
    return package.parent


def write_configs(folder: Path, files: dict[str, str]) -> None:
    """YAML files below `conf`."""
    for name, text in files.items():
        path = folder / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def fake_nvidia_smi(folder: Path, devices: int, code: int = 0) -> Path:
    """A folder for PATH with an `nvidia-smi` that lists devices."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    lines = "".join(f"echo 'GPU {index}: NVIDIA A100 (UUID: GPU-{index})'\n" for index in range(devices))
    tool = tools / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{lines}exit {code}\n")
    tool.chmod(0o755)
    return tools


def run(
    app: Path, *arguments: str, tools: Path | None = None, command: tuple[str, ...] = (), **environment: str
) -> Outcome:
    """Run a script, or `command` with it, in its own folder; `tools` comes first on PATH."""
    inherited = {name: value for name, value in os.environ.items() if name not in _MARKERS and "SLURM" not in name}
    # Without a fake nvidia-smi these tests see a machine without devices, whatever it really has.
    path = str(tools) + os.pathsep + os.environ["PATH"] if tools else os.environ["PATH"]
    environment = {
        **inherited,
        "PYTHONPATH": os.pathsep.join([str(app.parent / "poison"), str(REPOSITORY)]),
        "PATH": path,
        **({} if tools else {"CUDA_VISIBLE_DEVICES": ""}),
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *command, str(app), *arguments],
        cwd=app.parent, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)
