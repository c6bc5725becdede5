"""An app whose disk becomes full or read-only while it trains: in its third step, that of its workspace."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path
from typing import Any

import danling_conf


def fill(folder: Path) -> None:
    """Write until the disk takes no more."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                continue


def close(folder: Path) -> None:
    """Make the folder read-only for what is opened from now on: a disk with open files cannot be remounted."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


@danling_conf.main()
def app(config: Any) -> float:
    import torch

    from tests.support.small import Net, Pairs, loss

    torch.set_num_threads(1)
    runner = danling_conf.Runner(config)
    runner.prepare(Net, {"train": Pairs()}, loss=loss)
    for batch in runner.batches("train"):
        runner.step(batch)
        logging.getLogger("mine").warning("a line at step %d, %s", runner.global_step, "x" * 500)
        print("y" * 300)
        if runner.global_step == 3 and not (Path(config.workspace_root) / "ballast").exists():
            spoil = close if config.data.get("read_only") else fill
            spoil(Path(config.workspace_root))
    return runner.finish()


if __name__ == "__main__":
    app()
