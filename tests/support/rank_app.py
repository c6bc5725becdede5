"""An app whose ranks do what `data.do` says, after they have written down who they are."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import danling_conf
from danling_conf.records.current import current


def join_group() -> Any:
    """The process group of this run's ranks."""
    import torch.distributed as distributed

    from danling_conf.parallel import process_group
    from danling_conf.schema.process import CommConfig

    start = current()
    assert start is not None
    given = {"store": start.store, "rank": start.ranks.rank, "world_size": start.ranks.world_size}
    process_group.start(CommConfig(), "cpu", **(given if start.store is not None else {}))
    return distributed


def write_facts(config: Any, **more: Any) -> None:
    start = current()
    assert start is not None
    folder = Path(config.data["ranks"])
    facts = {
        "rank": start.ranks.rank,
        "world_size": start.ranks.world_size,
        "launcher": start.ranks.launcher,
        "pid": os.getpid(),
        "parent": os.getppid(),
        "stack": config.stack,
        "lr": config.optim.lr,
        "attempt": str(start.attempt.directory),
        "job": hydra_job(),
        "cwd": os.getcwd(),
        **more,
    }
    written = folder / f".{start.ranks.rank}"
    written.write_text(json.dumps(facts))
    written.rename(folder / f"rank-{start.ranks.rank}.json")


def hydra_job() -> str:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().job.name if HydraConfig.initialized() else ""


def train_small(config: Any) -> float:
    """A real run of a tiny model, which writes down the time limits of its process groups."""
    import torch

    from danling_conf._torch_private.distributed import process_groups
    from tests.support.small import Net, Pairs, loss

    torch.set_num_threads(1)
    known: list[Any] = []
    limits = []

    def look() -> None:
        """The time limits of the groups that there were at first, and of those made since."""
        known.extend(process_groups() if not known else [])
        of_group = {
            group: group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
            for group in process_groups()
        }
        made = [seconds for group, seconds in of_group.items() if group not in known]
        limits.append([sorted({of_group[group] for group in known}), made])

    runner = danling_conf.Runner(config)
    runner.prepare(Net, {"train": Pairs(), "val": Pairs(7, seed=1)}, loss=loss)
    losses = []
    for batch in runner.batches("train"):
        look()
        losses.append(runner.step(batch).item())
    score = runner.finish()
    write_facts(config, limits=limits, losses=losses, score=score)
    return score


@danling_conf.main()
def app(config: Any) -> Any:
    do = config.data.get("do", "nothing")
    if do == "train":
        return train_small(config)
    start = current()
    assert start is not None
    rank = start.ranks.rank
    print(f"rank {rank} prints")
    print(f"rank {rank} complains", file=sys.stderr)
    if do == "sum":
        import torch

        distributed = join_group()
        total = torch.tensor(float(rank + 1))
        distributed.all_reduce(total)
        write_facts(config, total=total.item())
        return total.item()
    if do in ("fail in a collective", "wait in a collective", "refuse in a collective"):
        distributed = join_group()
        write_facts(config)
        if rank == 0 or do == "wait in a collective":
            if rank == start.ranks.world_size - 1:
                time.sleep(600)
            distributed.barrier()
        if do == "refuse in a collective":
            from danling_conf.topology.violation import ConfigRefused, Violation

            raise ConfigRefused([Violation("data.do", do, "it is refused here", "do something else")])
        raise KeyError("this rank is broken")
    if "ranks" in config.data:
        write_facts(config)
    if do == "wait":
        time.sleep(600)
    if do == "record devices":
        began = time.time()
        time.sleep(1)
        facts = {
            "devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": began, "ended": time.time(),
            "run": start.attempt.run_directory.name,
        }  # fmt: skip
        name = f"devices-{start.attempt.run_directory.name}-{rank}.json"
        Path(config.data["folder"], name).write_text(json.dumps(facts))
    if do == "fail once" and not Path(config.data["folder"], "failed").exists():
        Path(config.data["folder"], "failed").touch()
        raise RuntimeError("this job is broken, once")
    if do == "fail":
        raise RuntimeError("this job is broken")
    if do == "exit well":
        sys.exit(0)
    if do == "exit":
        sys.exit(7)
    if do == "return a mapping":
        return {"loss": 1.0}
    if do == "return nan":
        return float("nan")
    return config.optim.lr


if __name__ == "__main__":
    app()
