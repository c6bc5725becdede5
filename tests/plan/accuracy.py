"""Accuracy of plans: peaks as planned, and as torch's allocator handed them out to real ranks.

`make plan-accuracy` runs every cell and writes the table in docs/plan_accuracy.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile, record_function

import danling_conf
from danling_conf.groups.layout_names import parse_layout
from danling_conf.plan.engine import figures_of, subject_of
from danling_conf.plan.figures import LayoutFigures
from danling_conf.runner.planning import Recipe
from danling_conf.schema import RunnerConfig
from danling_conf.topology.layout import coordinates
from models.decoder import Decoder, DecoderConfig
from tests.support import spawn

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "plan_accuracy.md"
TOLERANCE = 0.03
LENGTH, BATCH, VOCABULARY = 64, 4, 256


@dataclass(frozen=True)
class Cell:
    """A run to plan and to measure."""

    family: str
    """`decoder`, `experts` (a mixture of experts) or `llama` (of transformers)."""
    layout: str
    settings: tuple[str, ...] = ()
    """Overrides."""
    model: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.family, self.layout, *self.settings])

    @property
    def world_size(self) -> int:
        return parse_layout(self.layout).world_size


FULL, SELECTIVE = "activation_checkpointing.mode=full", "activation_checkpointing.mode=selective"
SGD = "optim.type=sgd"
ONCE = ("parallel.pipeline_schedule=GPipe", "parallel.pipeline_n_microbatches=1")
# Without generated code, whose buffers are inductor's own on a CPU.
COMPILED = ("compile.enable=true", "compile.backend=aot_eager")

CELLS = [
    Cell("decoder", "single"),
    Cell("decoder", "single", (FULL,)),
    Cell("decoder", "single", (SELECTIVE,)),
    Cell("decoder", "single", ("activation_checkpointing.mode=every_n",)),
    Cell("decoder", "single", ("precision=bf16",)),
    Cell("decoder", "single", ("accum_steps=3",)),
    Cell("decoder", "single", ("max_grad_norm=1",)),
    Cell("decoder", "single", (SGD,)),
    Cell("decoder", "single", ("optim.type=muon",)),
    Cell("decoder", "single", ("optim.fused=true",)),
    Cell("decoder", "ddp2"),
    Cell("decoder", "ddp2", ("accum_steps=2",)),
    Cell("decoder", "ddp4", (FULL,)),
    Cell("decoder", "fsdp2"),
    Cell("decoder", "fsdp2", (FULL,)),
    Cell("decoder", "fsdp2", (SELECTIVE,)),
    Cell("decoder", "fsdp2", ("precision=bf16",)),
    Cell("decoder", "fsdp2", ("precision=bf16", FULL, "accum_steps=2", "max_grad_norm=1")),
    Cell("decoder", "fsdp2", ("accum_steps=3",)),
    Cell("decoder", "fsdp2", ("fsdp.reshard_after_forward=false",)),
    Cell("decoder", "fsdp2", (SGD, "precision=bf16")),
    Cell("decoder", "fsdp4"),
    Cell("decoder", "fsdp8", ("precision=bf16",)),
    Cell("decoder", "hsdp2x2"),
    Cell("decoder", "hsdp2x2", (SELECTIVE, "accum_steps=2")),
    Cell("decoder", "tp2"),
    Cell("decoder", "tp2", (FULL,)),
    Cell("decoder", "tp2", ("parallel.sequence_parallel=true",)),
    Cell("decoder", "fsdp2_tp2", ("precision=bf16",)),
    Cell("decoder", "fsdp2_tp2", ("max_grad_norm=1", FULL)),
    Cell("decoder", "fsdp2_cp2"),
    Cell("decoder", "fsdp2_cp2", ("parallel.context_method=ulysses", "precision=bf16")),
    Cell("decoder", "pp2"),
    Cell("decoder", "pp2", ("parallel.pipeline_schedule=GPipe",)),
    Cell("decoder", "pp2", ("parallel.pipeline_schedule=Interleaved1F1B",)),
    Cell("decoder", "pp2", ("parallel.pipeline_schedule=LoopedBFS", FULL)),
    Cell("decoder", "pp2", ("parallel.pipeline_schedule=InterleavedZeroBubble",)),
    Cell("decoder", "pp2", ("parallel.pipeline_schedule=ZBVZeroBubble",)),
    Cell("decoder", "pp2", ("parallel.pipeline_schedule=DualPipeV",)),
    Cell("decoder", "pp2", (FULL, "accum_steps=2")),
    Cell("decoder", "pp4", ("parallel.pipeline_schedule=1F1B",)),
    Cell("decoder", "fsdp2_pp2", ("precision=bf16", *ONCE)),
    Cell("decoder", "fsdp2_pp2", ("precision=bf16",)),
    Cell("decoder", "fsdp2_pp2", ("parallel.pipeline_schedule=Interleaved1F1B",)),
    Cell("decoder", "fsdp2_tp2_pp2", ONCE),
    Cell("experts", "single"),
    Cell("experts", "fsdp2", ("precision=bf16",)),
    Cell("experts", "fsdp2_ep2"),
    Cell("experts", "fsdp4_ep2", (FULL,)),
    Cell("experts", "fsdp4_ep4", ("accum_steps=2",)),
    Cell("decoder", "single", COMPILED),
    Cell("decoder", "single", (*COMPILED, "compile.memory_policy=budget:0.3")),
    Cell("decoder", "fsdp2", (*COMPILED, SELECTIVE)),
    Cell("decoder", "tp2", COMPILED),
    Cell("decoder", "pp2", COMPILED),
    Cell("decoder", "fsdp2_tp2", (*COMPILED, "precision=bf16")),
    Cell("decoder", "fsdp2_pp2", (*COMPILED, "precision=bf16")),
    Cell("llama", "ddp2", COMPILED),
    Cell("llama", "single"),
    Cell("llama", "single", (FULL,)),
    Cell("llama", "fsdp2"),
    Cell("llama", "fsdp2", ("precision=bf16", SELECTIVE)),
    Cell("llama", "fsdp2_tp2"),
    Cell("llama", "pp2"),
]  # fmt: skip


def config_of(cell: Cell, root: str) -> RunnerConfig:
    """The configuration of a cell's run."""
    overrides = [
        "steps=100000", "seed=1", "log_interval=100000", f"dataloader.batch_size={BATCH}", f"workspace_root={root}",
        f"parallel={cell.layout}", "checkpoint.interval=90000",
    ]  # fmt: skip
    config: RunnerConfig = danling_conf.compose([*overrides, *cell.settings])
    return config


def build(family: str) -> nn.Module:
    """A model whose activations outweigh what a runner needs for itself."""
    if family == "llama":
        import transformers

        return transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=6,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
                tie_word_embeddings=False, use_cache=False,
            )
        )  # fmt: skip
    # All experts for each token: how a router deals them out is no matter of the plan then.
    experts = {"experts": 4, "experts_per_token": 4, "hidden": 96} if family == "experts" else {}
    return Decoder(
        DecoderConfig(width=128, depth=8, heads=4, kv_heads=4, context=LENGTH, vocab_size=VOCABULARY, **experts)
    )


def loss(output: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    logits = getattr(output, "logits", output)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def data() -> list[tuple[Tensor, Tensor]]:
    """Enough samples for a few steps of eight ranks."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (512, LENGTH + 1), generator=generator)
    return [(row[:-1].clone(), row[1:].clone()) for row in tokens]


def planned(cell: Cell) -> LayoutFigures:
    """The plan of a cell."""
    recipe = Recipe(
        config=config_of(cell, "nowhere"), model=partial(build, cell.family), datasets={"train": data()}, loss=loss
    )
    return figures_of(subject_of(recipe))


def measured(cell: Cell, root: str) -> tuple[int, int]:
    """Most bytes that this rank's tensors took at once: in the third optimizer step, by torch's allocator; and in the
    fourth one, by torch's memory tracker.

    The allocator counts while the profiler runs, so that the profiler has to see the model being built.
    """
    samples = data()
    gc.collect()  # what earlier cells have left on these ranks would be freed while this one is measured
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner = danling_conf.Runner(config_of(cell, root))
        try:
            runner.prepare(partial(build, cell.family), {"train": samples}, loss=loss)
            batches, count = runner.batches("train"), runner.config.accum_steps
            for _ in range(2 * count):
                runner.step(next(batches))
            step = [next(batches) for _ in range(count)]
            with record_function("measured"):
                for batch in step:
                    runner.step(batch)
            tracked = 0 if by_allocator(cell) else _tracked(runner, [next(batches) for _ in range(count)])
        finally:
            runner.close()
    events = list(_events(profiler.profiler.kineto_results.experimental_event_tree()))
    span = next(event for event in events if event.name == "measured")
    allocations = sorted(
        (event for event in events if event.tag == torch._C._profiler._EventType.Allocation),
        key=lambda event: event.start_time_ns,
    )
    first = allocations[0].extra_fields
    before = first.total_allocated - first.alloc_size
    inside = (item for item in allocations if span.start_time_ns <= item.start_time_ns <= span.end_time_ns)
    return max(item.extra_fields.total_allocated for item in inside) - before, tracked


class _Tracker(MemTracker):
    """torch's tracker takes one pass through a module only, and a pipeline has several under way."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether torch runs compiled code while this is on, instead of the eager one."""
        return True

    def _pre_fw_hook(self, module: nn.Module, inputs: Any) -> None:
        if not self._mod_tracker.is_bw:
            self.memory_tracking.pop(module, None)
        super()._pre_fw_hook(module, inputs)


def _tracked(runner: danling_conf.Runner, step: list[Any]) -> int:
    tracker, assembled = _Tracker(), runner.setup.assembled
    held = [item for batch in step for item in batch]
    if assembled.pipeline is not None:  # what is received goes to buffers that the steps before have made
        for index in assembled.pipeline.parts:
            stage = assembled.pipeline.alone(index)
            infos = (*stage.args_recv_info.values(), *stage.grad_recv_info.values())
            held += [info.buffer for of_chunk in infos for info in of_chunk if info.buffer is not None]
    tracker.track_external(*assembled.parts, runner.optimizer, *held)
    with tracker:
        for batch in step:
            runner.step(batch)
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def by_allocator(cell: Cell) -> bool:
    """Whether a cell is compared with the allocator. gloo takes buffers of its own to gather and reduce, which NCCL
    does not; the tracker does not see them. Nor does it see DDP's buckets, which are no tensors of Python's."""
    layout = parse_layout(cell.layout)
    return not layout.fsdp and layout.tensor * layout.context == 1


def _events(nodes: list[Any]) -> Iterator[Any]:
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(node.children)


@dataclass(frozen=True)
class Outcome:
    """What was planned for each rank, and what it took."""

    planned: tuple[int, ...]
    measured: tuple[int, ...]
    seconds: float
    """Of the plan."""

    @property
    def errors(self) -> list[float]:
        """By rank, relative to what was measured."""
        return [plan / real - 1 for plan, real in zip(self.planned, self.measured, strict=True)]

    @property
    def worst(self) -> float:
        """The largest error of a rank."""
        return max(self.errors, key=abs)


def compare(cell: Cell, *, together: bool = True) -> Outcome:
    """Plan a cell, then run it."""
    began = time.perf_counter()
    figures = planned(cell)
    took = time.perf_counter() - began
    by_stage = {rank.coordinates["pipeline"]: rank.peak_bytes for rank in figures.ranks}
    layout = parse_layout(cell.layout)
    expected = tuple(by_stage[coordinates(layout, rank)["pipeline"]] for rank in range(cell.world_size))
    with tempfile.TemporaryDirectory() as root:
        call = spawn.shared if together else spawn.run
        found = call(measured, cell.world_size, cell, root)
    return Outcome(expected, tuple(item[0 if by_allocator(cell) else 1] for item in found), took)


_HEAD = f"""# Accuracy of plans

Peak memory of tensors as planned, and as real ranks (gloo, on a CPU) took it in one of their optimizer steps. Each rank
is compared; the table shows the one that is furthest off. The goal is {TOLERANCE:.0%}. One rank, DDP and pipelines are
measured by torch's allocator. Where ranks gather and reduce, gloo takes buffers of its own from it, which
NCCL does not; there, torch's `MemTracker` measures. `make plan-accuracy` writes this table.

| model | layout | settings | ranks | planned MiB | measured MiB | error |
|---|---|---|---|---|---|---|
"""


def main() -> int:
    """Run the cells, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="words that a cell must have")
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    given = parser.parse_args()
    cells = [cell for cell in CELLS if all(word in str(cell) for word in given.only)]
    rows: list[str] = []
    outcomes: list[Outcome] = []
    failed: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: cell.world_size):
        try:
            outcome = compare(cell)
        except Exception as error:  # the other cells are still to be shown
            print(f"FAILED {cell}: {type(error).__name__}: {str(error)[-600:]}", flush=True)
            failed.append(cell)
            continue
        outcomes.append(outcome)
        rows.append(_row(cell, outcome))
        print(rows[-1], f"{outcome.seconds:.1f} s", flush=True)
        if given.write:
            DOCUMENT.write_text(_HEAD + "\n".join(rows) + "\n\n" + _summary(outcomes) + "\n")
    spawn.close_shared()
    print(_summary(outcomes))
    return int(bool(failed) or max(abs(outcome.worst) for outcome in outcomes) > TOLERANCE)


def _row(cell: Cell, outcome: Outcome) -> str:
    worst = outcome.errors.index(outcome.worst)
    plan, real = (value[worst] / 2**20 for value in (outcome.planned, outcome.measured))
    settings = " ".join(f"`{item}`" for item in cell.settings)
    return (
        f"| {cell.family} | {cell.layout} | {settings} | {cell.world_size} | {plan:.2f} | {real:.2f} | "
        f"{100 * outcome.worst:+.2f} % |"
    )


def _summary(outcomes: list[Outcome]) -> str:
    errors = [abs(outcome.worst) for outcome in outcomes]
    beyond = sum(error > TOLERANCE for error in errors)
    return (
        f"{len(errors)} cells; the largest error is {100 * max(errors):.2f} %, the median "
        f"{100 * statistics.median(errors):.2f} %; {beyond} beyond {TOLERANCE:.0%}."
    )


if __name__ == "__main__":
    sys.exit(main())
