"""Rows of `growth.py`: a cost at three sizes, beside what it is compared with, and the exponent fitted to it."""

from __future__ import annotations

import math
import multiprocessing
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Times = tuple[float, float | None]
"""CPU seconds of ours, and of what it is compared with."""


@dataclass(frozen=True)
class Row:
    """One measurement at several sizes."""

    measure: Callable[[int, Path], Times]
    sizes: tuple[int, ...]
    unit: str
    """What a size counts."""
    other: str
    """What it is compared with; "" for nothing."""
    wanted: str
    rounds: int
    memory: bool
    """Whether it also says by how much the peak of memory grows."""


ROWS: dict[str, Row] = {}


def row(
    name: str, sizes: tuple[int, ...], unit: str, *, wanted: str, other: str = "", rounds: int = 3, memory: bool = False
) -> Callable[[Any], Any]:
    """Adds a function of a size and an empty folder to the rows."""

    def add(measure: Callable[[int, Path], Times]) -> Callable[[int, Path], Times]:
        ROWS[name] = Row(measure, sizes, unit, other, wanted, rounds, memory)
        return measure

    return add


def cpu(do: Callable[[], object]) -> float:
    """CPU seconds of all threads of this process, and of the children that it has waited for."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
    resident = _memory("VmRSS")
    began = _used()
    do()
    seconds = _used() - began
    _grown[0] = _memory("VmHWM") - resident
    return seconds


_grown = [0.0]
"""MiB by which the last `cpu` raised the peak of memory."""


def _memory(name: str) -> float:
    """MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def _measured(name: str, size: int, folder: str) -> tuple[Times, float]:
    return ROWS[name].measure(size, Path(folder)), _grown[0]


def _in_a_fresh_process(name: str, size: int, folder: str) -> tuple[Times, float]:
    """Where nothing was freed before that would be used again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, name, size, folder).result()


def _used() -> float:
    # Not `os.times`, which counts in ticks of 10 ms: a start takes 20 of them.
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """The slope of a straight line through the logarithms: 1 is linear, 2 quadratic, 0 flat."""
    x, y = [math.log(size) for size in sizes], [math.log(max(value, 1e-6)) for value in seconds]
    return statistics.linear_regression(x, y).slope


def show(name: str, each: Row) -> None:
    """Measure a row and print it. Each size is measured a few times, in turns, and the least counts: what disturbs a
    measurement adds to it."""
    measured: dict[int, list[Times]] = {size: [] for size in each.sizes}
    grown = dict.fromkeys(each.sizes, 0.0)
    for _ in range(each.rounds):
        for size in each.sizes:
            folder = tempfile.mkdtemp()
            try:
                times, more = (_in_a_fresh_process if each.memory else _measured)(name, size, folder)
            finally:
                shutil.rmtree(folder)
            measured[size].append(times)
            grown[size] = max(grown[size], more)
    seconds = [min(mine for mine, _ in measured[size]) for size in each.sizes]
    print(f"{name}: CPU seconds by {each.unit}" + (f", and of {each.other}" if each.other else ""))
    for size, mine in zip(each.sizes, seconds, strict=True):
        others = [other for _, other in measured[size] if other is not None]
        ratio = f"{min(others):12.4f}   ratio {mine / min(others):.2f}" if others else ""
        memory = f"   {grown[size]:.0f} MiB" if each.memory else ""
        print(f"{size:12,}{mine:12.4f}{ratio}{memory}")
    print(f"    exponent {exponent(each.sizes, seconds):.2f}; wanted: {each.wanted}\n", flush=True)
