"""Milliseconds to check a job of a sweep, compared with Hydra's own composition of it, which checks less."""

from __future__ import annotations

import os
import sys
import time
from statistics import mean

import hydra

from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.sweep.preflight import Preflight, shapes_of
from danling_conf.topology.machine import this_machine
from danling_conf.topology.resources import Capacity

LAYOUTS = ("fsdp8", "fsdp4_tp2", "fsdp16", "ddp8")
BLOCK = 10
"""Jobs that Hydra composes between two parts of ours."""
NODES = Capacity(devices_per_node=8, cpus_per_node=64, nodes=16)


def jobs_of(count: int) -> list[list[str]]:
    """Jobs over four layouts, all with different values."""
    return [
        [
            "steps=100",
            f"parallel={LAYOUTS[number % len(LAYOUTS)]}",
            f"optim.lr={1e-5 * (number + 1):g}",
            f"seed={number}",
        ]
        for number in range(count)
    ]


def measure(count: int) -> None:
    """Print the two side by side for a sweep of so many jobs; blocks of Hydra's lie between tenths of ours."""
    with composer(ConfigSearch(config_name="danling")) as composing:
        master = composing.compose(["hydra/launcher=danling_slurm"], multirun=True)
        jobs, machine = jobs_of(count), this_machine()
        preflight = Preflight(composing, master, machine=machine, capacity=NODES)
        ours, theirs, seen = [], [], []
        for part in range(10):
            first, last = part * count // 10, (part + 1) * count // 10
            some = jobs[first:last]
            wall, cpu = time.perf_counter(), time.process_time()
            for job in some[:BLOCK]:
                composing.sweep_config(master, job)
            theirs.append(_each(wall, cpu, len(some[:BLOCK])))
            wall, cpu = time.perf_counter(), time.process_time()
            accepted = [preflight.check(job, number) for number, job in enumerate(some, first)]
            seen += [(job.job_id, job.config_id) for job in accepted]
            shapes_of(accepted, NODES)
            ours.append(_each(wall, cpu, len(some)))
    assert len(set(seen)) == count
    for clock, index in (("wall", 0), ("CPU", 1)):
        mine, other = mean(item[index] for item in ours), mean(item[index] for item in theirs)
        ratios = sorted(a[index] / b[index] for a, b in zip(ours, theirs, strict=True))
        print(
            f"{hydra.__version__} | {count} jobs | {clock} | {other:.1f} ms | {mine:.1f} ms | {mine / other:.2f} | "
            f"{ratios[2]:.2f}, {ratios[5]:.2f}, {ratios[7]:.2f}"
        )


def _each(wall: float, cpu: float, count: int) -> tuple[float, float]:
    return (time.perf_counter() - wall) / count * 1e3, (time.process_time() - cpu) / count * 1e3


if __name__ == "__main__":
    print("hydra-core | sweep | clock | Hydra composes | we check | ratio | quartiles of the pairs' ratios")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for size in map(int, sys.argv[1:] or ("100", "1000")):
        measure(size)
