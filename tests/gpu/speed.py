"""Speed of a step: ours beside a bare loop and Lightning Fabric, alternating in one process, as ratios."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import nn

import danling_conf
from danling_conf.components import dataloader
from models.decoder import Decoder, DecoderConfig
from tests.gpu.place import Figures, NotRun, Place, Sequences, loss_of

GOAL = 1.01
"""Ours over the bare loop, on a GPU."""
SHAPES = {
    "125M": DecoderConfig(width=768, depth=12, heads=12, context=1024, vocab_size=32768),
    "1B": DecoderConfig(width=2048, depth=18, heads=16, context=1024, vocab_size=32768),
}
Run = Callable[[Iterator[Any]], None]


def against_a_bare_loop(size: str, place: Place) -> Figures:
    """Step time in bf16, eager and compiled, beside a loop written by hand with the same optimizer and loader."""
    figures: Figures = {}
    for compile in (False, True) if place.cuda else (False,):
        ratio, bare = compare(size, place, compile=compile, other=bare_loop)
        kind = "compiled" if compile else "eager"
        figures[kind] = {"ratio": round(ratio, 4), "bare_ms": round(1e3 * bare, 3)}
        assert not place.cuda or ratio <= GOAL, f"{kind}: ours takes {ratio:.4f} of the bare loop, the goal is {GOAL}"
    return figures


def against_fabric(place: Place) -> Figures:
    """Step time in bf16 beside Lightning Fabric."""
    if importlib.util.find_spec("lightning") is None:
        raise NotRun("needs the package lightning")
    ratio, theirs = compare("125M", place, compile=False, other=fabric_loop)
    return {"ratio": round(ratio, 4), "fabric_ms": round(1e3 * theirs, 3)}


def compare(size: str, place: Place, *, compile: bool, other: Callable[..., Run]) -> tuple[float, float]:
    """The median ratio of ours to the other loop, and the other's seconds a step."""
    shape = place.model if place.tiny else SHAPES[size]
    blocks, steps = (3, 4) if place.tiny else (12, 10)
    data = Sequences(shape.context)
    total = (blocks + 1) * steps + 1
    batch = 4 if size == "1B" or place.tiny else 8
    settings = [f"steps={total}", f"dataloader.batch_size={batch}", "precision=bf16", f"log_interval={steps}"]
    config = danling_conf.compose(place.overrides(*settings, "compile=default" if compile else "compile=none"))
    runner = danling_conf.Runner(config)
    try:
        runner.prepare(partial(Decoder, shape), {"train": data}, loss=loss_of)

        def ours(batches: Iterator[Any]) -> None:
            for item in batches:
                runner.step(item)

        model = Decoder(shape).to(place.device)
        loops = {
            "theirs": (other(model, place, compile), endless(data, config)),
            "ours": (ours, runner.batches("train")),
        }
        for run, batches in loops.values():
            run(islice(batches, steps))
        pairs: list[dict[str, float]] = []
        for number in range(blocks):
            # Alternate the order, so that drift of the machine hits both.
            order = ("theirs", "ours") if number % 2 else ("ours", "theirs")
            pairs.append({name: seconds(place, *loops[name], steps) for name in order})
        runner.display.stop()
    finally:
        runner.close()
    ratio = statistics.median(pair["ours"] / pair["theirs"] for pair in pairs)
    return ratio, statistics.median(pair["theirs"] for pair in pairs)


def seconds(place: Place, run: Run, batches: Iterator[Any], steps: int) -> float:
    place.synchronize()
    began = time.perf_counter()
    run(islice(batches, steps))
    place.synchronize()
    return (time.perf_counter() - began) / steps


def endless(data: Sequences, config: danling_conf.RunnerConfig) -> Iterator[Any]:
    """Batches of our loader on the CPU, epoch after epoch."""
    return chain.from_iterable(repeat(dataloader.make(data, config.dataloader, "train")))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def bare_loop(model: nn.Module, place: Place, compile: bool) -> Run:
    optimizer = adamw(model)
    if compile:
        for block in model.layers:  # type: ignore[union-attr]
            block.compile()

    def run(batches: Iterator[Any]) -> None:
        for batch in batches:
            tokens, targets = (item.to(place.device, non_blocking=True) for item in batch)
            with torch.autocast(place.device, dtype=torch.bfloat16):
                loss = loss_of(model(tokens), (tokens, targets))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def fabric_loop(model: nn.Module, place: Place, compile: bool) -> Run:
    from lightning.fabric import Fabric  # type: ignore[import-not-found, unused-ignore]

    fabric = Fabric(accelerator=place.device, devices=1, precision="bf16-mixed")
    wrapped, optimizer = fabric.setup(model, adamw(model))

    def run(batches: Iterator[Any]) -> None:
        for batch in batches:
            tokens, targets = (item.to(place.device, non_blocking=True) for item in batch)
            fabric.backward(loss_of(wrapped(tokens), (tokens, targets)))
            optimizer.step()
            optimizer.zero_grad()

    return run
