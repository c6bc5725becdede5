"""Microseconds of an optimizer step: the runner compared with a bare loop, on a model so small that the overhead shows.

Run it as `python benchmarks/step_overhead.py`. See benchmarks/README.md for what is compared, and how.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import chain, islice, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import danling_conf
from benchmarks.ratios import HEADER, Times, table
from danling_conf.components import dataloader

GOAL = 1.05
SAMPLES = 32 * 500
Run = Callable[[Iterator[list[Tensor]]], None]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 64, generator=generator)
    return TensorDataset(images, torch.randint(10, (SAMPLES,), generator=generator))


def cross_entropy(output: Tensor, batch: list[Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


class Bare:
    """The loop written by hand, on the same data loader and the same optimizer."""

    def __init__(self, config: danling_conf.RunnerConfig, data: TensorDataset) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.loader = dataloader.make(data, config.dataloader, "train")

    def batches(self) -> Iterator[list[Tensor]]:
        return chain.from_iterable(repeat(self.loader))

    def run(self, batches: Iterator[list[Tensor]]) -> None:
        model, optimizer = self.model, self.optimizer
        for batch in batches:
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def blocks_of(run: Run, batches: Iterator[list[Tensor]], steps: int) -> Iterator[Times]:
    """Wall-clock and CPU seconds of each block of so many steps."""
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        run(islice(batches, steps))
        yield time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=100, help="blocks of each loop")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps in a block")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads would only wait for each other on a model this small
    blocks, steps = arguments.blocks, arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        total = (blocks + 2) * steps
        overrides = [f"workspace_root={folder}", f"steps={total}", "dataloader.batch_size=32", "seed=0"]
        # A log line in each block, twice as many as a run has by default; evaluation and checkpoints come at the end.
        overrides += [f"log_interval={steps}", f"eval_interval={total}", "optim.weight_decay=0.01"]
        config = danling_conf.compose([*overrides, "optim.betas=[0.9,0.999]"])
        data = make_data()
        bare = Bare(config, data)
        # As `python train.py > run.txt`: the lines are formatted, written and logged.
        with open(os.path.join(folder, "output.txt"), "w") as output, redirect_stdout(output):
            runner = danling_conf.Runner(config)
            runner.prepare(make_model(), {"train": data}, loss=cross_entropy)

            def run_runner(batches: Iterator[list[Tensor]]) -> None:
                for batch in batches:
                    runner.step(batch)

            bare_blocks = blocks_of(bare.run, bare.batches(), steps)
            our_blocks = blocks_of(run_runner, runner.batches("train"), steps)
            next(bare_blocks), next(our_blocks)
            pairs = []
            for number in range(blocks):
                # Alternate the order, so that drift of the machine hits both.
                if number % 2:
                    first = next(bare_blocks)
                    pairs.append((first, next(our_blocks)))
                else:
                    first = next(our_blocks)
                    pairs.append((next(bare_blocks), first))
        lines = sum(line.startswith("step ") for line in Path(folder, "output.txt").read_text().splitlines())
        if lines < blocks or runner.global_step != (blocks + 1) * steps:
            raise RuntimeError(f"{lines} progress lines and {runner.global_step} steps: not what was to be measured")
        runner.display.stop()
        runner.close()
    print(f"microseconds per step; medians of {blocks} alternating blocks of {steps} steps")
    print(HEADER, *table(pairs, 1e6 / steps), sep="\n")
    print(f"goal: at most {GOAL}")


if __name__ == "__main__":
    main()
