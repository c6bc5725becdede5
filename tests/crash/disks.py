"""Runs on a disk that becomes full or read-only: `unshare -rm python -m tests.crash.disks FOLDER` prints JSON.

In a mount namespace of its own, where a small tmpfs can be mounted over a run's folder of checkpoints.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

import danling_conf
from danling_conf.checkpoint import manifest
from danling_conf.checkpoint.background import SaveFailed
from danling_conf.checkpoint.folder import Folder
from danling_conf.groups.source import layout_settings
from tests.crash.killing import Layers
from tests.support.processes import fork_ranks, import_once
from tests.support.small import Pairs, loss

SIZE = 2_200_000
"""Bytes of the disk: two checkpoints of 0.8 MB, and not three."""


def outcome(root: str, layout: str, backend: str, mode: str, fault: str) -> dict[str, Any]:
    """Train until saving fails; what was said, and what is left. Then mend the fault and go on."""
    settings = {
        "workspace_root": root, "seed": 1, "steps": 6, "auto_resume": True, "dataloader": {"batch_size": 4},
        "checkpoint": {"interval": 1, "backend": backend, "async_mode": mode},
    }  # fmt: skip
    merged = OmegaConf.to_container(OmegaConf.merge(settings, layout_settings(layout)))
    found: dict[str, Any] = {"step": None, "error": None}
    runner = danling_conf.Runner(danling_conf.resolve(merged))
    folder = runner.world.attempt.run_directory / "checkpoints"
    main = runner.world.ranks.main
    if main:
        folder.mkdir()
        options = f"size={SIZE}" if fault == "full" else "size=100m"
        mount("-t", "tmpfs", "-o", options, "tmpfs", str(folder))
    torch.distributed.barrier() if runner.world.ranks.world_size > 1 else None
    try:
        runner.prepare(Layers, {"train": Pairs(64)}, loss=loss)
        for batch in runner.batches("train"):
            runner.step(batch)
            if fault == "read-only" and main and runner.global_step == 2:
                runner.checkpoints.drain()
                mount("-o", "remount,ro", str(folder))
        runner.finish()
    except SaveFailed as error:
        found |= {"step": runner.global_step, "error": str(error)}
    finally:
        runner.close()
    # Rank 0 removes what was not finished, while the others raise at once.
    torch.distributed.barrier() if runner.world.ranks.world_size > 1 else None
    entries = Folder(folder).entries()
    for entry in entries:
        assert entry.manifest is not None, entry.fault
        manifest.verify(entry.path, entry.manifest)
    found["steps"] = sorted(entry.step for entry in entries)
    found["left"] = [path.name for path in Folder(folder).unfinished()]
    torch.distributed.barrier() if runner.world.ranks.world_size > 1 else None
    if main:
        mount("-o", "remount,rw,size=100m", str(folder))
    torch.distributed.barrier() if runner.world.ranks.world_size > 1 else None
    again = danling_conf.Runner(danling_conf.resolve(merged))
    again.fit(Layers, {"train": Pairs(64)}, loss=loss)
    found["again"] = [again.state.first_step - 1, again.global_step]
    return found


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def main(root: Path) -> None:
    cases = [("single", 1, "file", "disabled"), ("single", 1, "file", "async"), ("fsdp2", 2, "dcp", "disabled"),
             ("fsdp2", 2, "dcp", "async")]  # fmt: skip
    import_once()
    for layout, ranks, backend, mode in cases:
        for fault in ("full", "read-only"):
            folder = root / f"{layout}-{backend}-{mode}-{fault}"
            found = fork_ranks(outcome, ranks, (str(folder), layout, backend, mode, fault))
            print(json.dumps({"case": [layout, backend, mode, fault], "ranks": found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
