"""Milliseconds of a training step under `fsdp4`, `tp4` and `fsdp2_tp2`: ours, and the same written by hand with torch.

Run it as `python benchmarks/layouts.py`. See benchmarks/README.md for what is compared, and how.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module

from benchmarks.ratios import HEADER, Times, table
from danling_conf.groups.layout_names import parse_layout
from danling_conf.parallel import mesh, process_group
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.model import assemble
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.process import CommConfig
from models.decoder import Decoder, DecoderConfig

GOAL = 1.03
LAYOUTS = ("fsdp4", "tp4", "fsdp2_tp2")
RANKS, BATCH, LENGTH = 4, 8, 128
CPU = torch.device("cpu")
Step = Callable[[Tensor, Tensor], None]

make_model = functools.partial(Decoder, DecoderConfig(width=128, depth=4, heads=4, context=LENGTH))


def loss_of(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


def by_hand(name: str) -> Step:
    """The layout by torch's own functions, as in its tutorials."""
    layout = parse_layout(name)
    made = init_device_mesh("cpu", (layout.shard, layout.tensor), mesh_dim_names=("shard", "tensor"))
    torch.manual_seed(0)
    model = make_model()
    if layout.tensor > 1:
        plan = {"embedding": RowwiseParallel(input_layouts=Replicate())}
        plan["head"] = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, made["tensor"], plan)
        for block in model.layers:
            colwise = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3")
            rowwise = ("attention.wo", "feed_forward.w2")
            styles = {**{key: ColwiseParallel() for key in colwise}, **{key: RowwiseParallel() for key in rowwise}}
            parallelize_module(block, made["tensor"], styles)
    if layout.fsdp:
        for block in model.layers:
            fully_shard(block, mesh=made["shard"])
        fully_shard(model, mesh=made["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def forward_backward(tokens: Tensor, targets: Tensor) -> None:
        loss_of(model(tokens), (tokens, targets)).backward()

    def step(tokens: Tensor, targets: Tensor) -> None:
        if layout.tensor > 1:
            with loss_parallel():
                forward_backward(tokens, targets)
        else:
            forward_backward(tokens, targets)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(name: str) -> Step:
    """The layout by its name."""
    layout = parse_layout(name)
    assembled = assemble(
        make_model,
        layout=layout,
        mesh=mesh.make(layout, "cpu"),
        device=CPU,
        seed=0,
        fsdp=FsdpConfig(enabled=layout.fsdp),
        compile=CompileConfig(),
        activation_checkpointing=ActivationCheckpointingConfig(),
    )
    passes = Passes(assembled, lambda model, batch: model(batch[0]), loss_of, layout, CPU)
    parameters: list[nn.Parameter] = [parameter for _, parameter in assembled.named_parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)

    def step(tokens: Tensor, targets: Tensor) -> None:
        passes.train((tokens, targets))
        passes.finish(parameters)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(step: Step, batch: tuple[Tensor, Tensor], steps: int) -> Times:
    """Wall-clock and CPU seconds of a step, of all ranks together."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step(*batch)
    dist.barrier()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(rank: int, port: int, blocks: int, steps: int) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, RANKS, is_master=False)
    process_group.start(CommConfig(), "cpu", store=store, rank=rank, world_size=RANKS)
    for name in LAYOUTS:
        layout = parse_layout(name)
        tokens = torch.randint(256, (BATCH // layout.data_degree, LENGTH + 1))
        dist.broadcast(tokens, src=0)
        batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        steppers = by_hand(name), ours(name)
        for stepper in steppers:
            measured(stepper, batch, 2)
        pairs: list[tuple[Times, Times]] = []
        for number in range(blocks):
            # Alternate the order, so that drift of the machine hits both.
            order = (0, 1) if number % 2 else (1, 0)
            times = {which: measured(steppers[which], batch, steps) for which in order}
            pairs.append((times[0], times[1]))
        if rank == 0:
            print(f"{name}: milliseconds per step on rank 0; medians of {blocks} alternating blocks of {steps} steps")
            print(HEADER, *table(pairs, 1e3 / steps), sep="\n", flush=True)
    process_group.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=12, help="blocks of each of the two")
    parser.add_argument("--steps", type=int, default=4, help="training steps in a block")
    arguments = parser.parse_args()
    store = dist.TCPStore("127.0.0.1", 0, RANKS, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(compare, (store.port, arguments.blocks, arguments.steps), nprocs=RANKS)
    print(f"goal: at most {GOAL}")


if __name__ == "__main__":
    main()
