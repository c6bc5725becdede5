"""Parts of the GPU script that train in one process. Each asserts something and returns figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import danling_conf
from danling_conf.runner.observe.flops import model_flops, peak_flops
from danling_conf.runner.observe.nonfinite import NotFinite
from danling_conf.runner.observe.out_of_memory import OutOfMemory
from models.decoder import Decoder
from tests.gpu.place import Figures, NotRun, Place, Sequences, loss_of, train
from tests.support.commands import REPOSITORY, run

FLOAT_TOLERANCE = 2e-3
"""Of losses after some steps in fp32: kernels sum in different orders, and AdamW's first steps enlarge that."""


def main_job(place: Place) -> Figures:
    """The command of the README, in eager mode."""
    sizes = [f"model.{name}={getattr(place.model, name)}" for name in ("width", "depth", "heads", "context")]
    command = [
        REPOSITORY / "examples" / "train.py", "task=lm", "parallel=single", *sizes, f"steps={4 * place.steps}",
        f"parallel.mesh_device_type={place.device}", f"workspace_root={place.folder}", "log_interval=2",
        "data.val_fraction=0.02" if not place.tiny else "data.stride=4096",
    ]  # fmt: skip
    done = run(command, cwd=place.folder, limit=150)
    assert done.code == 0, done.text[-2000:]
    (directory,) = [path.parent for path in place.folder.rglob("metrics.jsonl")]
    losses = scalars(directory, "train.loss")
    assert losses[-1] < 0.99 * losses[0], f"the loss fell from {losses[0]:.4f} to {losses[-1]:.4f} only"
    (environment,) = directory.rglob("environment.json")
    devices = json.loads(environment.read_text())["accelerators"]
    assert bool(devices) == place.cuda, f"the run has seen the devices {devices}"
    return {"loss": losses[-1], "tokens_per_second": round(scalars(directory, "train.tokens_per_second")[-1])}


def compiled(choice: str, place: Place) -> Figures:
    """Compiled blocks train as eager ones do."""
    # Code generation for the CPU takes longer than everything else here, and other tests have it.
    settings = [f"compile={choice}"] if place.cuda else [f"compile={choice}", "compile.backend=aot_eager"]
    settings += [] if place.cuda else ["compile.mode=null"]
    eager, ours = train(place), train(place, *settings)
    ours.learned()
    return {**ours.figures, "difference": compare(ours.losses, eager.losses), "eager_ms": eager.figures["step_ms"]}


def compare(found: list[float], expected: list[float], tolerance: float = FLOAT_TOLERANCE) -> float:
    """The largest relative difference of losses. Raises AssertionError where it is beyond the tolerance."""
    error = max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(found, expected, strict=True))
    assert error <= tolerance, f"losses differ by {error:.1e}, the tolerance is {tolerance:.0e}"
    return float(f"{error:.1e}")


def fsdp_of_one(place: Place) -> Figures:
    """FSDP2 in a world of one, over NCCL on a GPU."""
    alone, ours = train(place), train(place, "parallel=fsdp1")
    backend = torch.distributed.get_backend_config(torch.distributed.group.WORLD)
    torch.distributed.destroy_process_group()
    assert ("nccl" in backend) == place.cuda, f"the backend is {backend}"
    return {**ours.figures, "backend": backend, "difference": compare(ours.losses, alone.losses)}


def precisions(place: Place) -> Figures:
    """bf16 and fp16 with loss scaling train as fp32 does, within what rounding does to a loss."""
    full = train(place, "precision=fp32")
    figures: Figures = {"fp32": full.figures}
    for name in ("bf16", "fp16"):
        ours = train(place, f"precision={name}")
        ours.learned()
        difference = compare(ours.losses, full.losses, 0.1)
        figures[name] = {**ours.figures, "difference": difference}
        if name == "fp16":
            scaler = ours.runner.setup.scaler
            assert scaler is not None
            assert scaler.get_scale() > 0
            figures[name]["scale"] = scaler.get_scale()
    return figures


def recomputation(place: Place) -> Figures:
    """Activation checkpointing changes memory, not numbers."""
    plain = train(place)
    figures: Figures = {"none": plain.figures}
    for mode in ("full", "selective"):
        ours = train(place, f"activation_checkpointing.mode={mode}")
        compare(ours.losses, plain.losses)
        figures[mode] = ours.figures
        assert not place.cuda or ours.peak_bytes < plain.peak_bytes, f"{mode} needs no less memory"
    return figures


def offloaded(place: Place) -> Figures:
    """`fsdp=offload` keeps parameters in host memory and trains the same."""
    sharded = train(place, "parallel=fsdp1")
    torch.distributed.destroy_process_group()
    ours = train(place, "parallel=fsdp1", "fsdp=offload")
    devices = {parameter.device.type for parameter in ours.runner.model.parameters()}
    torch.distributed.destroy_process_group()
    assert devices == {"cpu"}, f"parameters are on {devices}"
    assert not place.cuda or ours.peak_bytes < sharded.peak_bytes
    return {**ours.figures, "resident_mib": sharded.figures["peak_mib"], "difference": compare(
        ours.losses, sharded.losses)}  # fmt: skip


def checkpoints(place: Place) -> Figures:
    """Pause of background saves as a share of a synchronous one; a run that ended in the middle resumes bitwise."""
    figures: Figures = {}
    every = max(2, place.steps // 3)
    for choice in ("dcp", "async", "pinned"):
        ours = train(place, f"checkpoint={choice}", f"checkpoint.interval={every}")
        figures[choice] = {"pause_seconds": round(sum(scalars(ours.run, "checkpoint.seconds")), 4)}
    for choice in ("async", "pinned"):
        figures[choice]["share"] = round(figures[choice]["pause_seconds"] / figures["dcp"]["pause_seconds"], 3)
    for choice in ("file", "pinned"):
        settings = [
            "deterministic=true",
            f"checkpoint={choice}",
            f"checkpoint.interval={every}",
            f"experiment={choice}",
        ]
        straight = train(place, *settings, "seed=4")
        train(place, *settings, "auto_resume=true", until=every)
        resumed = train(place, *settings, "auto_resume=true")
        expected = train(place, *settings, "lineage=whole")
        assert len(resumed.losses) == place.steps - every, "it did not resume"
        assert resumed.losses == expected.losses[every:], f"{choice}: losses after the resume differ"
        differing = [name for name, value in expected.weights.items() if not torch.equal(value, resumed.weights[name])]
        assert not differing, f"{choice}: weights after the resume differ: {differing[:3]}"
        assert straight.losses != expected.losses, "another seed trains the same: the comparison sees nothing"
    return {**figures, "resume": "bitwise"}


def pinned_loader(place: Place) -> Figures:
    """Loader workers and page-locked memory give the same batches."""
    more = ["dataloader.num_workers=2"] if place.cuda else ["dataloader.num_workers=2", "dataloader.pin_memory=false"]
    plain, ours = train(place), train(place, "dataloader=pinned", *more)
    assert bool(ours.runner.loaders["train"].pin_memory) == place.cuda
    return {**ours.figures, "plain_ms": plain.figures["step_ms"], "difference": compare(ours.losses, plain.losses)}


def traces(place: Place) -> Figures:
    """A trace has the device's kernels; with allocations the allocator's snapshot stands beside it."""
    ours = train(place, "profiling=trace")
    events = trace_of(ours.run)
    kernels = [event for event in events if event.get("cat") == "kernel"]
    assert bool(kernels) == place.cuda, f"the trace has {len(kernels)} kernels"
    ours = train(place, "profiling=memory", "experiment=memory")
    snapshots = [path.stat().st_size for path in ours.run.rglob("*.memory.pickle")]
    assert bool(snapshots) == place.cuda
    assert any(event.get("name") == "[memory]" for event in trace_of(ours.run))
    return {"events": len(events), "kernels": len(kernels), "snapshot_bytes": sum(snapshots)}


def utilisation(place: Place) -> Figures:
    """FLOPs beside a count by hand; MFU in the metrics beside speed times FLOPs over the peak."""
    shape = place.model
    with torch.device("meta"):
        model = Decoder(shape)
    matrices = sum(
        item.numel() for name, item in model.named_parameters() if item.ndim == 2 and "embedding" not in name
    )
    # Six for each weight and token (two forward, four backward); attention's two products of every pair of tokens.
    by_hand = shape.context * (6 * matrices + 12 * shape.depth * shape.width * shape.context)
    batch = [item.unsqueeze(0) for item in Sequences(shape.context)[0]]
    counted = model_flops(model, lambda module, given: module(given[0]), loss_of, batch)
    assert abs(counted - by_hand) < 0.02 * by_hand, f"counted {counted:.3e}, by hand {by_hand:.3e}"
    figures: Figures = {"flops_per_sample": counted, "by_hand": by_hand}
    if not place.cuda:
        return figures
    peak = peak_flops(torch.device("cuda"), "bf16")
    if peak is None:
        raise NotRun(f"no peak is known for {torch.cuda.get_device_name()}")
    ours = train(place, "precision=bf16", "compile=default")
    mfu, speed = scalars(ours.run, "train.mfu")[-1], scalars(ours.run, "train.samples_per_second")[-1]
    assert math.isclose(mfu, speed * counted / peak, rel_tol=1e-3)
    return {**figures, "mfu": round(mfu, 4)}


class Spoilt(Decoder):
    """Its third forward in training returns NaN."""

    calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(tokens) * (math.nan if self.calls == 3 else 1.0)


def not_finite(place: Place) -> Figures:
    """`nonfinite` counts, skips and fails by what it reads from the device."""
    counted = {}
    for mode in ("count", "skip"):
        ours = train(place, f"nonfinite={mode}", f"experiment={mode}", model=partial(Spoilt, place.model))
        counted[mode] = int(scalars(ours.run, "train.nonfinite_steps")[-1])
        finite = all(bool(value.isfinite().all()) for value in ours.weights.values())
        assert finite == (mode == "skip"), f"{mode}: weights are {'' if finite else 'not '}finite"
    assert counted["skip"] == 1
    assert counted["count"] == place.steps - 2, "weights that are not finite stay so"
    try:
        train(place, "nonfinite=fail", "experiment=fail", model=partial(Spoilt, place.model))
    except NotFinite as error:
        return {**counted, "fail": str(error).splitlines()[0][:60]}
    raise AssertionError("nonfinite=fail did not end the run")


class Greedy(Decoder):
    """Its second forward needs more memory than any device has."""

    calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            if tokens.device.type == "cpu":  # which would take it from the whole machine
                raise torch.OutOfMemoryError("Tried to allocate 64 TiB")
            torch.empty(1 << 46, dtype=torch.uint8, device=tokens.device)
        return super().forward(tokens)


def out_of_memory(place: Place) -> Figures:
    """The error says what held memory and what to change; a loop that skips the batch goes on."""
    runner = danling_conf.Runner(danling_conf.compose(place.overrides()))
    caught: list[OutOfMemory] = []
    try:
        runner.prepare(partial(Greedy, place.model), {"train": Sequences(place.model.context)}, loss=loss_of)
        for batch in runner.batches("train"):
            try:
                runner.step(batch)
            except OutOfMemory as error:
                caught.append(error)
        runner.finish()
    finally:
        runner.close()
    (error,) = caught
    lines = str(error).splitlines()
    assert "in step 2" in lines[0]
    assert not place.cuda or "the allocator" in lines[1]
    assert any("activation_checkpointing" in line for line in lines)
    assert runner.global_step == place.steps
    return {"message": lines[: 2 if place.cuda else 1]}


def transformers_model(place: Place) -> Figures:
    """A model of transformers in bf16."""
    import transformers

    shape = place.model
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=shape.width, intermediate_size=2 * shape.width, num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.context,
    )  # fmt: skip
    model: Callable[[], nn.Module] = partial(transformers.AutoModelForCausalLM.from_config, config)

    def loss(output: Any, batch: Any) -> Tensor:
        return loss_of(output.logits, batch)

    ours = train(place, "precision=bf16", model=model, loss=loss)
    ours.learned()
    return ours.figures


def scalars(run: Path, name: str) -> list[float]:
    """The values of a metric, in their order."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if line.get(name) is not None]


def trace_of(run: Path) -> list[dict[str, Any]]:
    path = next((run / "profiles").glob("*.json"))
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events
