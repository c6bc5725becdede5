"""Rows of `growth.py` that start processes: a step on several ranks, the first step of a command, a command's start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.growing import Times, cpu, row

REPOSITORY = str(Path(__file__).resolve().parents[1])
PAIRS, STEPS = 30, 100

OUR_APP = """
import danling_conf

@danling_conf.main()
def train(config):
    import torch
    from torch import nn
    data = [(torch.ones(8), torch.ones(1))] * 64
    loss = lambda output, batch: nn.functional.mse_loss(output, batch[1])
    danling_conf.Runner(config).fit(lambda: nn.Linear(8, 1), {"train": data}, loss=loss)

train()
"""
BARE_SCRIPT = """
import os
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

model = nn.Linear(8, 1)
if int(os.environ["WORLD_SIZE"]) > 1:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters())
nn.functional.mse_loss(model(torch.ones(8, 8)), torch.ones(8, 1)).backward()
optimizer.step()
if dist.is_initialized():
    dist.barrier()  # a rank that left while gloo still connects would abort the others
    dist.destroy_process_group()
"""
OUR_START = """
import os
import danling_conf

@danling_conf.main()
def train(config):
    os._exit(0)

train()
"""
SMALLEST_HYDRA_APP = """
import os
from dataclasses import dataclass
import hydra
from hydra.core.config_store import ConfigStore

@dataclass
class Config:
    steps: int = 1

ConfigStore.instance().store("app", Config)
version = {"version_base": None} if hydra.__version__.startswith("1.3") else {}

@hydra.main(config_path=None, config_name="app", **version)
def train(config):
    os._exit(0)

train()
"""


@row("step", (1, 2, 4), "ranks", other="a bare loop under DDP", wanted="1.02 on each")
def step(ranks: int, folder: Path) -> Times:
    import torch
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_steps, (ranks, store.port, str(folder)), nprocs=ranks)
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    # Of each pair of blocks the CPU seconds of all ranks; the middle pair by its ratio.
    pairs = [tuple(map(sum, zip(*of_ranks, strict=True))) for of_ranks in zip(*found, strict=True)]
    ours, other = sorted(pairs, key=lambda pair: pair[0] / pair[1])[len(pairs) // 2]
    return ours / STEPS, other / STEPS


def _steps(rank: int, ranks: int, port: int, folder: str) -> None:
    """Blocks of steps of both loops, in turns, on one rank."""
    import torch
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    import danling_conf
    from benchmarks.step_overhead import cross_entropy, make_data, make_model
    from danling_conf.components import dataloader

    torch.set_num_threads(1)
    sys.stdout = open(Path(folder, f"{rank}.txt"), "w")  # noqa: SIM115  of this process, to its end
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                       "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
                       "TORCHELASTIC_RUN_ID": "growth", "TORCHELASTIC_RESTART_COUNT": "0"}  # fmt: skip
    overrides = [f"workspace_root={folder}", f"steps={(PAIRS + 2) * STEPS}", "dataloader.batch_size=32", "seed=0"]
    config = danling_conf.compose([*overrides, "optim.weight_decay=0.01", f"parallel=ddp{ranks}"])
    data = make_data()
    runner = danling_conf.Runner(config)
    runner.prepare(make_model(), {"train": data}, loss=cross_entropy)
    model: nn.Module = make_model()
    if ranks > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = dataloader.make(data, config.dataloader, "train", data_rank=rank, data_degree=ranks)

    def endless() -> Iterator[list[Tensor]]:
        while True:
            yield from loader

    def bare(batches: Iterator[Any]) -> None:
        for batch in batches:
            cross_entropy(model(batch[0]), batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    def ours(batches: Iterator[Any]) -> None:
        for batch in batches:
            runner.step(batch)

    def timed(run: Callable[[Iterator[Any]], None], batches: Iterator[Any]) -> float:
        if ranks > 1:
            torch.distributed.barrier()
        began = time.process_time()
        run(islice(batches, STEPS))
        return time.process_time() - began

    our_batches, bare_batches = runner.batches("train"), endless()
    timed(ours, our_batches), timed(bare, bare_batches)
    pairs = []
    for number in range(PAIRS):
        first = timed(ours, our_batches) if number % 2 else timed(bare, bare_batches)
        second = timed(bare, bare_batches) if number % 2 else timed(ours, our_batches)
        pairs.append((first, second) if number % 2 else (second, first))
    Path(folder, f"{rank}.json").write_text(json.dumps(pairs))
    runner.display.stop()
    runner.close()


@row("first_step", (1, 2, 8), "ranks", other="torchrun with a bare script", wanted="within 1.1x")
def first_step(ranks: int, folder: Path) -> Times:
    app, bare = folder / "app.py", folder / "bare.py"
    app.write_text(OUR_APP)
    bare.write_text(BARE_SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    other = cpu(lambda: _run([*torchrun, str(bare)], folder, 0))
    given = ["steps=1", "dataloader.batch_size=8", f"parallel=ddp{ranks}", "parallel.mesh_device_type=cpu"]
    return cpu(lambda: _run([str(app), *given], folder, 0)), other


@row("accepted", (1, 5, 25), "overrides", other="the smallest Hydra app", wanted="1.15 on both Hydras", rounds=5)
def accepted(count: int, folder: Path) -> Times:
    given = ["steps=1", *(f"+data.x{number}=1" for number in range(1, count))]
    return _starts(folder, given, [item.replace("data.", "") for item in given], (0, 0))


@row("refused", (1, 5, 25), "overrides", other="the smallest Hydra app", wanted="1.15 on both Hydras", rounds=5)
def refused(count: int, folder: Path) -> Times:
    given = [f"+data.x{number}=1" for number in range(1, count)]
    return _starts(folder, [*given, "stepz=1"], [*(item.replace("data.", "") for item in given), "stepz=1"], (2, 1))


@row("help", (1, 5, 25), "overrides", other="the smallest Hydra app", wanted="1.15 on both Hydras", rounds=5)
def help_page(count: int, folder: Path) -> Times:
    given = [f"+data.x{number}=1" for number in range(1, count)]
    return _starts(folder, [*given, "--help"], [*(item.replace("data.", "") for item in given), "--help"], (0, 0))


def _starts(folder: Path, given: list[str], theirs: list[str], codes: tuple[int, int]) -> Times:
    ours, smallest = folder / "ours.py", folder / "smallest.py"
    ours.write_text(OUR_START)
    smallest.write_text(SMALLEST_HYDRA_APP)
    other = cpu(lambda: _run([str(smallest), *theirs], folder, codes[1]))
    return cpu(lambda: _run([str(ours), *given], folder, codes[0])), other


def _run(command: list[str], folder: Path, code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode != code:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-2000:]}")
