"""A small real training for Slurm jobs: it writes down its losses, takes its time, and fails where it is told to."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import danling_conf
from danling_conf.records.current import current


@danling_conf.main()
def app(config: Any) -> float:
    import torch

    from tests.support.small import Net, Pairs, loss

    torch.set_num_threads(1)
    data = {**config.data, **config.data.get("fault", {})}
    runner = danling_conf.Runner(config)
    start = current()
    assert start is not None
    rank = start.ranks.rank
    runner.prepare(Net, {"train": Pairs(64), "val": Pairs(7, seed=1)}, loss=loss)
    for batch in runner.batches("train"):
        step = runner.global_step
        fails = rank == data.get("fail_rank", -1) and step == data.get("fail_step", 2)
        if fails and data.get("how") != "late" and ("fail_while" not in data or Path(data["fail_while"]).exists()):
            if data.get("how") == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError(f"rank {rank} is broken at step {step}")
        found = runner.step(batch).item()
        if rank == 0:
            line = json.dumps({"step": runner.global_step, "loss": found, "attempt": start.attempt.directory.name})
            with open(start.attempt.run_directory / "losses.jsonl", "a") as file:
                file.write(line + "\n")
        time.sleep(float(data.get("pause", 0)))
    score = runner.finish()
    if rank == data.get("fail_rank", -1) and data.get("how") == "late":
        time.sleep(3)
        raise RuntimeError(f"rank {rank} is broken at the very end")
    return score


def losses(run: Path) -> dict[int, float]:
    """Loss by step, over all attempts; a step that was done twice must have given the same."""
    found: dict[int, float] = {}
    for line in (run / "losses.jsonl").read_text().splitlines():
        item = json.loads(line)
        assert found.setdefault(item["step"], item["loss"]) == item["loss"], item
    return found


if __name__ == "__main__":
    app()
