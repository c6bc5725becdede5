"""Microseconds of an optimizer step with all observers of a run, compared with the same runner without any.

Run it as `python benchmarks/observers.py`. See benchmarks/README.md for what is compared, and how.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import danling_conf
from benchmarks.ratios import HEADER, Times, table
from benchmarks.step_overhead import blocks_of, cross_entropy, make_data, make_model
from danling_conf.records.metrics import read_metrics

GOAL = 1.03
EVERYTHING = ("heartbeat.enabled=true", "tensorboard=true", "gc.interval=50")
"""Observers that are off by default and run to the end (`profiling` does not: a trace ends by itself)."""


class Nothing:
    """Stands in for `NonFinite`, and checks nothing."""

    measures_gradients = False
    steps = 0

    def look(self, *arguments: Any) -> None: ...

    def skips(self) -> bool:
        return False


def silence(runner: danling_conf.Runner) -> None:
    """Leave the log line as it was without all this: the mean of the loss, formatted, printed and logged."""

    def log_line() -> None:
        mean = runner.state.training_loss.mean()
        runner.state.training_loss.reset()
        observers.pace.logged(runner.global_step, None)
        runner.display.step(mean, runner.optimizer.param_groups[0]["lr"])

    observers = runner.observers
    changed: Any = observers
    changed.nonfinite, changed.log_line = Nothing(), log_line
    changed.stepped = changed.check = lambda *arguments: None
    changed.stopwatch.waited = lambda batches: batches


def started(folder: str, total: int, steps: int, *overrides: str, silent: bool = False) -> tuple[Any, Iterator[Times]]:
    """A runner and its blocks of so many steps."""
    words = [f"workspace_root={folder}", f"steps={total}", "dataloader.batch_size=32", "seed=0", *overrides]
    words += [f"log_interval={steps}", f"eval_interval={total}", "checkpoint=none"]
    runner = danling_conf.Runner(danling_conf.compose(words))
    runner.prepare(make_model(), {"train": make_data()}, loss=cross_entropy)
    if silent:
        silence(runner)

    def run(batches: Iterator[Any]) -> None:
        for batch in batches:
            runner.step(batch)

    return runner, blocks_of(run, runner.batches("train"), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=100, help="blocks of each runner")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in a block")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads would only wait for each other on a model this small
    blocks, steps = arguments.blocks, arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "output.txt"), "w") as output, redirect_stdout(output):
            total = (blocks + 2) * steps
            runs = [
                started(folder, total, steps, silent=True),
                started(folder, total, steps),
                started(folder, total, steps, *EVERYTHING),
            ]
            for _, times in runs:
                next(times)
            found: list[list[Times]] = [[], [], []]
            for number in range(blocks):
                # Alternate the order, so that drift of the machine hits both.
                for index in sorted(range(3), key=lambda which: (which + number) % 3):
                    found[index].append(next(runs[index][1]))
        lines = [len(read_metrics(runner.world.attempt.run_directory)) for runner, _ in runs]
        if lines[0] != 0 or min(lines[1:]) < blocks:
            raise RuntimeError(f"{lines} lines of metrics: not what was to be measured")
        for runner, _ in reversed(runs):  # each restores the state that it found
            runner.display.stop()
            runner.close()
    print(
        f"microseconds per step; medians of {blocks} alternating blocks of {steps} steps; `bare` is without observers"
    )
    for what, ours in (("by default", found[1]), (" ".join(EVERYTHING), found[2])):
        print(what)
        print(HEADER, *table(list(zip(found[0], ours, strict=True)), 1e6 / steps), sep="\n")
    print(f"goal: at most {GOAL}")


if __name__ == "__main__":
    main()
