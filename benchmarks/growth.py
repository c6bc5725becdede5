"""Costs that grow with the work: CPU seconds at three sizes, and the exponent fitted to them.

Run it as `python benchmarks/growth.py [NAME...]`; without names, all rows. See benchmarks/README.md for what each
measures, and what is wanted of it. Where a row compares with something, both are measured in one run, taking turns.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import benchmarks.growth_processes  # noqa: F401  its rows
from benchmarks.growing import ROWS, Times, cpu, row, show

RUN = "20260101-000000"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@row("watch", (512, 2048, 4096), "ranks", wanted="linear, 4,096 ranks in 2 s")
def watch_once(count: int, folder: Path) -> Times:
    from danling_conf.cli.watch import watch
    from danling_conf.records.run_lock import RunLock

    now = time.time()
    write(folder / "run.json", {})
    write(folder / "attempts" / RUN / "frozen.json", {"config": {"heartbeat": {"enabled": True}}})
    for rank in range(count):
        beat = {"attempt": RUN, "rank": rank, "world_size": count, "host": "node", "pid": rank, "step": 7, "epoch": 0,
                "state": "waiting in a collective" if rank else "training", "state_since": now - 60, "written": now,
                "interval": 600.0, "memory_bytes": 1 << 30, "total_steps": 100, "last_step_time": now,
                "waiting_share": 0.1}  # fmt: skip
        write(folder / "heartbeats" / f"rank-{rank}.json", beat)
    lock = RunLock(folder)
    with redirect_stdout(io.StringIO()) as shown:
        found = cpu(lambda: watch(str(folder), once=True, as_json=False, interval=1.0))
    lock.release()
    assert shown.getvalue().count("waiting in a collective") == count - 1
    return found, None


def blocks(count: int) -> Any:
    """A model of so many blocks, of six tensors each."""
    from torch import nn

    made = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(count)]
    return nn.Sequential(nn.Linear(8, 8), nn.ModuleList(made))


@row("shard", (100, 300, 1000), "blocks", other="fully_shard by hand", wanted="within 1.2x")
def shard(count: int, folder: Path) -> Times:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from danling_conf.parallel import fsdp
    from danling_conf.schema.fsdp import FsdpConfig

    with one_rank():
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
        mine, theirs = blocks(count), blocks(count)

        def by_hand() -> None:
            for block in reversed(theirs[1]):
                fully_shard(block, mesh=mesh)
            fully_shard(theirs, mesh=mesh)

        other = cpu(by_hand)
        return cpu(lambda: fsdp.shard(mine, FsdpConfig(enabled=True), mesh)), other


@row("assemble", (100, 300, 1000), "blocks", other="construction and fully_shard by hand", wanted="within 1.2x")
def assembly(count: int, folder: Path) -> Times:
    import torch
    from torch.distributed.fsdp import fully_shard

    from danling_conf.parallel import mesh
    from danling_conf.parallel.model import assemble
    from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
    from danling_conf.schema.compile import CompileConfig
    from danling_conf.schema.fsdp import FsdpConfig
    from danling_conf.schema.layout import Layout

    with one_rank():
        layout = Layout(fsdp=True)
        made = mesh.make(layout, "cpu")
        assert made is not None

        def by_hand() -> None:
            model = blocks(count)
            for block in reversed(model[1]):
                fully_shard(block, mesh=made["shard"])
            fully_shard(model, mesh=made["shard"])

        def ours() -> None:
            assemble(
                lambda: blocks(count),
                layout=layout,
                mesh=made,
                device=torch.device("cpu"),
                seed=0,
                fsdp=FsdpConfig(enabled=True),
                compile=CompileConfig(),
                activation_checkpointing=ActivationCheckpointingConfig(),
            )

        other = cpu(by_hand)
        return cpu(ours), other


@row("initialise", (1020, 2040, 4080), "tensors", other="torch's fake construction and initialisation", wanted="1.5x")
def initialise(count: int, folder: Path) -> Times:
    import torch

    from danling_conf._torch_private import fakes
    from danling_conf.parallel import init_plan
    from danling_conf.parallel.initialize import materialize

    def ours() -> None:
        source = init_plan.record(lambda: blocks(count // 6), seed=0)
        source.program.digest()
        materialize([source.model], device=torch.device("cpu"), source=replace(source))

    def theirs() -> None:
        with fakes.fake_tensors():
            blocks(count // 6)
        with torch.device("meta"):
            model = blocks(count // 6)
        model.to_empty(device="cpu")
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    other = cpu(theirs)
    return cpu(ours), other


@contextmanager
def one_rank() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@row("bad_batches", (10**5, 10**6, 10**7), "samples", wanted="the permutation once an epoch, 200 steps")
def bad_batches(size: int, folder: Path) -> Times:
    from danling_conf.components.samplers import ShardedSampler

    sampler = ShardedSampler(size, shuffle=True, degree=8)
    return cpu(lambda: [sampler.samples(0, 32 * number, 32) for number in range(200)]), None


@row("resume_epoch", (10**6, 10**7, 10**9), "samples", wanted="10^7 in 1 s and 80 MiB", memory=True)
def resume_in_mid_epoch(size: int, folder: Path) -> Times:
    from danling_conf.components.samplers import ShardedSampler

    def resume() -> None:
        position: Any = iter(ShardedSampler(size, shuffle=True))
        position.load_state_dict({"epoch": 3, "taken_by_all": size // 2})
        next(position)

    return cpu(resume), None


@row("settle", (1000, 3000, 10_000), "jobs", wanted="linear, 10,000 jobs in 2 s")
def settle(count: int, folder: Path) -> Times:
    from danling_conf.records.ledger import Ledger
    from danling_conf.records.status import Status

    Ledger(folder).add_all([(f"k{job}", {"job": job, "status": Status.RUNNING}) for job in range(count)])
    ledger = Ledger(folder)
    return cpu(lambda: ledger.settle_all(dict.fromkeys(ledger.records(), (Status.LOST, None)))), None


@row("prune", (25, 50, 100), "checkpoints of 4,096 ranks", wanted="flat: reads names only, after an attempt's first")
def prune(count: int, folder: Path) -> Times:
    from danling_conf.checkpoint import manifest
    from danling_conf.checkpoint.durable import Sum
    from danling_conf.checkpoint.folder import Folder

    files = {f"__{rank}_{part}.distcp": Sum(1 << 20, rank) for rank in range(4096) for part in range(2)}
    facts = manifest.Manifest(step=0, epoch=0, saved="2026-01-01T00:00:00+00:00", backend="dcp", layout="fsdp4096",
                              degrees={"shard": 4096}, fsdp=True, history=True, optimizer="AdamW",
                              files=files)  # fmt: skip
    for step in range(count):
        checkpoint = folder / f"ckpt-s{step:08d}"
        checkpoint.mkdir()
        manifest.write(checkpoint, replace(facts, step=step))
    kept = Folder(folder)
    kept.prune(0)
    return cpu(lambda: kept.prune(0)), None


@row("bind", (100, 1000, 6000), "runs beside it", wanted="flat: names only")
def bind(count: int, folder: Path) -> Times:
    from danling_conf import compose
    from danling_conf.config.identity import semantic
    from danling_conf.records import layouts_index, run_directory

    given = ["steps=1", f"workspace_root={folder}", "auto_resume=true"]
    config, fresh = compose([*given, "seed=1"]), compose([*given, "seed=2"])
    run = run_directory.bind(config).run_directory
    made, settings = json.loads((run / "run.json").read_text()), semantic(config)
    for number in range(count):
        name = f"{number:012x}"
        write(run.parent / name / "run.json", made | {"run_id": name, "config_id": name})
        layouts_index.add(run.parent, [(name, name, settings | {"seed": 10 + number})])

    def twice() -> None:
        assert run_directory.bind(config).run_directory == run
        run_directory.bind(fresh)

    return cpu(twice), None


def write_metrics(run: Path, count: int) -> None:
    """Lines as a run writes them, with their index."""
    from danling_conf.records.metrics_index import IndexWriter

    index, end = IndexWriter(run, RUN), 0
    with open(run / "metrics.jsonl", "wb", buffering=0) as file:
        for step in range(count):
            line = {"time": 1e9 + step, "attempt": RUN, "step": step, "epoch": 0}
            line |= {"train.loss": 1 / (step + 1), "train.lr": 1e-3, "train.samples_per_second": 1e3 + step}
            line["train.productive_seconds"] = 0.9
            text = json.dumps(line).encode() + b"\n"
            file.write(text)
            end += len(text)
            index.add(text, end)


@row("end_of_run", (10**4, 10**5, 10**6), "lines of metrics", wanted="10^6 in 2 s, memory flat", memory=True)
def end_of_run(count: int, folder: Path) -> Times:
    from danling_conf.records.history import goodput

    write_metrics(folder, count)
    return cpu(lambda: goodput(folder)), None


@row("runs", (10**4, 10**5, 10**6), "lines of metrics", wanted="flat")
def runs(count: int, folder: Path) -> Times:
    from danling_conf.cli.runs import show_runs

    write(folder / "run.json", {"config_id": "c" * 12, "settings": {}})
    write(folder / "attempts" / RUN / "frozen.json", {"config": {"steps": count}})
    write_metrics(folder, count)
    return cpu(lambda: show_runs(str(folder))), None


@row("report", (10**4, 10**5, 10**6), "lines of metrics", wanted="10^6 in 2 s, memory flat", memory=True)
def report_page(count: int, folder: Path) -> Times:
    from danling_conf.cli.report import report

    write(folder / "run.json", {"config_id": "c" * 12, "settings": {}})
    write(folder / "attempts" / RUN / "frozen.json", {"config": {"steps": count}})
    write_metrics(folder, count)
    return cpu(lambda: report(folder)), None


@row("check_sweep", (50, 100, 200), "jobs", other="Hydra composes each tenth, x 10", wanted="linear")
def check_sweep(count: int, folder: Path) -> Times:
    from benchmarks.preflight import NODES, jobs_of
    from danling_conf.config.hydra_adapter import ConfigSearch, composer
    from danling_conf.sweep.preflight import Preflight
    from danling_conf.topology.machine import this_machine

    with composer(ConfigSearch(config_name="danling")) as composing:
        master = composing.compose(["hydra/launcher=danling_slurm"], multirun=True)
        jobs = jobs_of(count)
        other = 10 * cpu(lambda: [composing.sweep_config(master, job) for job in jobs[::10]])
        preflight = Preflight(composing, master, machine=this_machine(), capacity=NODES)
        return cpu(lambda: [preflight.check(job, number) for number, job in enumerate(jobs)]), other


@row("save_file", (24, 96, 384), "MiB", other="torch.save and fsync by hand", wanted="one checksum of every byte")
def save_file(size: int, folder: Path) -> Times:
    import torch

    from danling_conf.checkpoint import writing
    from danling_conf.checkpoint.folder import Folder
    from danling_conf.checkpoint.manifest import Manifest

    tensors = {f"{number}": torch.ones(1 << 20) for number in range(size // 4)}
    facts = Manifest(step=1, epoch=0, saved="2026-01-01T00:00:00+00:00", backend="file", layout="single", degrees={},
                     fsdp=False, history=True, optimizer="AdamW", files={})  # fmt: skip
    snapshot = writing.Snapshot(name="ckpt-s00000001", tensors=tensors, shared=b"", own=b"", facts=facts, best=False)
    writer = writing.Writer(Folder(folder), rank=0, world_size=1, group=None, keep=0)

    def ours() -> None:
        writer.write_checkpoint(snapshot)

    def by_hand() -> None:
        with open(folder / "theirs.pt", "wb") as file:
            torch.save(tensors, file)
            os.fsync(file.fileno())

    other = cpu(by_hand)
    return cpu(ours), other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"rows: {', '.join(ROWS)}")
    chosen = parser.parse_args().names or list(ROWS)
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        parser.error(f"there is no row {unknown[0]}; there are {', '.join(ROWS)}")
    for name in chosen:
        show(name, ROWS[name])


if __name__ == "__main__":
    main()
