"""`danling-conf init`: writes a small project that trains at once, as the start of one's own.

Its files lie in `projects/`. Those of Python end in `.txt` there, so that no tool takes them for modules of ours.
"""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from danling_conf.groups.layout_names import parse_layout
from danling_conf.schema.printable import shell_line
from danling_conf.topology.violation import ConfigRefused, Violation

_SUFFIX = ".txt"
_NEEDS: dict[str, dict[str, str]] = {
    "classification": {"sklearn": "scikit-learn", "torchmetrics": "torchmetrics"},
    "lm": {},
    "hf": {"transformers": "transformers"},
}
"""What each project imports beside our own dependencies: module, and the package that has it."""
_LAYOUTS = {"classification": "fsdp2", "lm": "fsdp2_tp2", "hf": "fsdp2_tp2"}


def write_project(directory: str, task: str) -> list[str]:
    """Write the project of a task. Returns what to tell the user.

    Raises:
        ConfigRefused: one of its files exists already, or cannot be written. In the first case nothing is written.
    """
    folder = Path(directory).expanduser()
    content = project_files(task)
    taken = [name for name in content if (folder / name).exists() or (folder / name).is_symlink()]
    if taken:
        rule = f"it has {', '.join(taken)} already, and nothing is overwritten"
        raise ConfigRefused([Violation("DIR", directory, rule, "name another directory, or move them away")])
    try:
        for name, text in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not "w": another process may have made the file since we looked.
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        rule = f"{error.filename or directory} cannot be written: {error.strerror}"
        raise ConfigRefused([Violation("DIR", directory, rule, "name a directory that you may write")]) from error
    missing = [package for module, package in _NEEDS[task].items() if importlib.util.find_spec(module) is None]
    layout = _LAYOUTS[task]
    commands = {
        "python train.py": "one process",
        f"python train.py parallel={layout}": f"{parse_layout(layout).world_size} processes on this machine",
        "python -m pytest": "its test",
        "danling-conf check train.py parallel=fsdp8 compile=max": "accepted or refused, nothing started",
        "python train.py +profile=slurm parallel=fsdp8": "on a cluster: conf/profile/slurm.yaml",
    }
    width = max(map(len, commands))
    return [
        f"{folder}: {', '.join(content)}",
        *([f"  pip install {' '.join(missing)}"] if missing else []),
        *([f"  {shell_line('cd', folder)}"] if folder.resolve() != Path.cwd() else []),
        *(f"  {command:<{width}}  # {what}" for command, what in commands.items()),
    ]


def project_files(task: str) -> dict[str, str]:
    """Content of a project's files, by their paths in it."""
    root = files("danling_conf.cli") / "projects"
    found = {**_below(root / task, ""), **_below(root / "common", "")}
    return dict(sorted(found.items()))


def _below(folder: Traversable, prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in folder.iterdir():
        if item.is_dir():
            found |= _below(item, f"{prefix}{item.name}/")
        else:
            found[f"{prefix}{item.name.removesuffix(_SUFFIX)}"] = item.read_text(encoding="utf-8")
    return found
