"""Parts of the GPU script with several processes. Two ranks share one card over gloo, since NCCL refuses to."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from danling_conf.records.run_directory import Attempt
from danling_conf.runner.observe.collective_timeout import CollectiveTimedOut, Place, explain
from danling_conf.schema import RunnerConfig
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rank_environment import RankEnvironment
from tests.distributed.cells import Cell, joined, largest_error, train
from tests.gpu import place as places
from tests.gpu.place import Figures
from tests.support.commands import APP, run
from tests.support.spawn import close_shared, shared
from tests.support.spawn import run as run_ranks

LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2", "cp2", "ep2")
TOLERANCE = {"cpu": 2e-5, "cuda": 2e-4}
"""Largest error relative to a tensor's norm: a GPU chooses kernels by shape, which sum in different orders."""


def against_one_process(place: places.Place) -> Figures:
    """Losses, gradients and weights after two steps of two ranks, beside one process on the same device."""
    figures: Figures = {}
    failed = []
    # In a process of its own: this one holds no CUDA context beside its ranks'.
    alone = {experts: shared(train, 1, Cell(layout="single", model=sizes(experts)), place.device)[0]
             for experts in (False, True)}  # fmt: skip
    for name in LAYOUTS:
        layout = "fsdp2_ep2" if name == "ep2" else name
        expected = alone[name == "ep2"]
        try:
            cell = Cell(layout=layout, model=sizes(name == "ep2"))
            error = largest_error(joined(shared(train, 2, cell, place.device), expected), expected)
        except AssertionError as failure:
            failed.append(name)
            figures[name] = str(failure).strip().splitlines()[-1]
            continue
        figures[name] = float(f"{error:.1e}")
        if error > TOLERANCE[place.device]:
            failed.append(name)
    close_shared()
    assert not failed, f"{', '.join(failed)} differ or fail: {json.dumps(figures)}"
    return figures


def sizes(experts: bool) -> dict[str, int]:
    return {"depth": 4, **({"experts": 4} if experts else {})}


def collective_timeout(place: places.Place) -> Figures:
    """A rank that does not come to a collective of the device's tensors is named."""
    messages = run_ranks(wait_for_the_other, 2, place.device, str(place.folder), collectives=4)
    named = [line.strip() for line in messages[0].splitlines() if "rank 1 did not come" in line]
    assert named, messages[0]
    return {"message": named[0]}


def wait_for_the_other(device: str, folder: str) -> str:
    rank = dist.get_rank()
    if rank == 1:
        time.sleep(9)  # past the limit of rank 0's collective, and what it waits for other ranks' notes
        return ""
    ranks = RankEnvironment(launcher="test", rank=0, world_size=2, local_rank=0, local_world_size=2)
    attempt = Attempt(run_directory=Path(folder), directory=Path(folder), seed=0)
    try:
        dist.all_reduce(torch.ones(4, device=device))
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        try:
            explain(error, attempt, ranks, RunnerConfig(steps=1), Place(step=3))
        except CollectiveTimedOut as explained:
            return str(explained)
        raise
    raise AssertionError("the collective did not time out")


def devices_of_jobs(place: places.Place) -> Figures:
    """Jobs of a local sweep get devices of their own, and wait for each other where there are fewer."""
    command = [
        APP, "-m", "steps=1", "optim.lr=1e-3,3e-4", "data.do=record devices", f"data.folder={place.folder}",
        f"workspace_root={place.folder / 'runs'}", "dataloader.batch_size=2", "hydra/launcher=danling_local",
    ]  # fmt: skip
    hidden = {} if place.cuda else {"CUDA_VISIBLE_DEVICES": ""}
    done = run(command, cwd=place.folder, env=hidden)
    assert done.code == 0, done.text[-2000:]
    seen = [json.loads(path.read_text()) for path in sorted(place.folder.glob("devices-*.json"))]
    assert len(seen) == 2, f"{len(seen)} of 2 jobs have run"
    if not place.cuda:
        return {"devices": [item["devices"] for item in seen]}
    present = this_machine(os.environ).devices
    assert all(item["devices"] and "," not in item["devices"] for item in seen), seen
    first, second = sorted(seen, key=lambda item: float(item["began"]))
    assert first["devices"] != second["devices"] or first["ended"] <= second["began"], "two jobs shared a device"
    return {"present": present, "devices": [item["devices"] for item in seen]}
