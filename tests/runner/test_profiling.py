"""Traces: valid Chrome traces with the promised events, on every rank, whatever the loop does meanwhile."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf.components import profiler
from danling_conf.components.profiler import exposed_communication
from danling_conf.groups.layout_names import parse_layout
from danling_conf.schema.observability import ProfilingConfig
from tests.distributed.test_runner import LENGTH, VOCABULARY, Tokens
from tests.distributed.test_runner import loss as token_loss
from tests.support.small import Net, Pairs, loss, runner
from tests.support.spawn import run

pytestmark = pytest.mark.slow


def fit(root: Path, profiling: dict[str, Any], settings: dict[str, Any] | None = None) -> Any:
    ours = runner(root, {"profiling": {"enabled": True, **profiling}, **(settings or {})})
    ours.fit(Net, {"train": Pairs(96), "val": Pairs(8)}, loss=loss)
    return ours


def names(ours: Any) -> list[str]:
    folder = ours.world.attempt.run_directory / "profiles"
    return sorted((path.name for path in folder.iterdir()), key=lambda name: int(re.findall(r"step-(\d+)", name)[0]))


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, each with what Chrome needs."""
    trace = json.loads(path.read_text())
    assert trace["traceEvents"]
    for event in trace["traceEvents"]:
        assert {"ph", "pid", "tid", "name"} <= event.keys() or event["ph"] in "fs"
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
    return trace["traceEvents"]


def test_no_traces_where_profiling_is_off(tmp_path: Path) -> None:
    ours = fit(tmp_path, {"enabled": False})
    assert not (ours.world.attempt.run_directory / "profiles").exists()


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ({}, 6, [5]),
        ({}, 10, [5, 10]),  # as many cycles as the run has
        ({"repeat": 1}, 10, [5]),
        ({"wait": 0, "warmup": 0, "active": 2, "repeat": 2}, 10, [2, 4]),
        ({"wait": 2, "warmup": 3, "active": 1, "repeat": 1}, 10, [6]),
        ({}, 4, [4]),  # the run ends within the traced steps
    ],
)
def test_the_schedule(tmp_path: Path, schedule: dict[str, Any], steps: int, expected: list[int]) -> None:
    ours = fit(tmp_path, schedule, {"steps": steps, "accum_steps": 2, "eval_interval": 3})
    assert names(ours) == [f"rank-0-step-{step}.json" for step in expected]
    folder = ours.world.attempt.run_directory / "profiles"
    first = events(folder / names(ours)[0])
    traced = [event for event in first if re.fullmatch(r"ProfilerStep#\d+", event["name"])]
    active = schedule.get("active", 3)
    assert len(traced) in ((active,) if expected != [4] else (active - 1, active))
    # Two micro-batches are in each of its steps; the optimizer's step is one.
    optimizer = [event for event in first if event["name"].startswith("Optimizer.step")]
    assert len(optimizer) == (active if expected != [4] else 2)


@pytest.mark.parametrize(("steps", "traced"), [(1, False), (2, False), (3, True)])
def test_a_run_shorter_than_the_schedule(
    tmp_path: Path, steps: int, traced: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = fit(tmp_path, {}, {"steps": steps})
    out = capsys.readouterr().out
    assert ours.global_step == steps
    assert (ours.world.attempt.run_directory / "profiles").exists() == traced
    assert ("no step was traced" in out) == (not traced)


@pytest.mark.parametrize("option", ["record_shapes", "profile_memory", "with_stack", "with_flops"])
def test_what_is_recorded(tmp_path: Path, option: str) -> None:
    shown = {}
    for value in (True, False):
        ours = fit(tmp_path, {option: value, "repeat": 1})
        folder = ours.world.attempt.run_directory / "profiles"
        found = events(folder / names(ours)[0])
        log = (ours.world.attempt.directory / "rank-0.log").read_text()
        shown[value] = {
            "record_shapes": any("Input Dims" in event.get("args", {}) for event in found),
            "profile_memory": any(event["name"] == "[memory]" for event in found),
            "with_stack": any(event.get("cat") == "python_function" for event in found),
            "with_flops": bool(re.search(r"Total [KMG]?FLOPs", log)),
        }[option]
    assert shown == {True: True, False: False}


def test_the_log_has_a_short_table(tmp_path: Path) -> None:
    ours = fit(tmp_path, {"repeat": 1})
    log = (ours.world.attempt.directory / "rank-0.log").read_text()
    table = log[log.index("steps 3 to 5") :]
    assert "Self CPU" in table
    assert "aten::addmm" in table or "aten::linear" in table
    assert table.partition("Self CPU time total")[0].count("\n") < 25


def test_traces_go_where_they_are_wanted(tmp_path: Path) -> None:
    there = tmp_path / "all traces"
    fit(tmp_path, {"trace_dir": str(there), "repeat": 1})
    fit(tmp_path, {"trace_dir": str(there), "repeat": 1})
    assert len(list(there.iterdir())) == 2  # one run does not write over another's
    named = fit(tmp_path, {"trace_dir": "mine", "repeat": 1})
    assert (named.world.attempt.run_directory / "mine" / "rank-0-step-5.json").is_file()


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    ours = fit(tmp_path, {"trace_dir": str(tmp_path / "file" / "below"), "repeat": 1})
    assert ours.global_step == 6
    assert "the trace of the steps up to 5 could not be written" in capsys.readouterr().out


def test_what_communication_nothing_hides() -> None:
    import tempfile

    def kernel(name: str, begin: float, length: float) -> dict[str, Any]:
        return {"cat": "kernel", "name": name, "ts": begin, "dur": length, "ph": "X"}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found = [kernel("gemm", 0, 40), kernel("ncclAllReduce", 30, 30), kernel("gemm", 80, 20), kernel("nccl", 85, 5)]
        path.write_text(json.dumps({"traceEvents": found}))
        assert exposed_communication(path) == pytest.approx(0.2)  # 40 to 60, of 100
        path.write_text(json.dumps({"traceEvents": [{"cat": "cpu_op", "name": "gloo:all_reduce", "ts": 0, "dur": 1}]}))
        assert exposed_communication(path) is None  # on a CPU nobody can tell


def traced(root: str, name: str) -> dict[str, Any]:
    from functools import partial

    from danling_conf.groups.source import layout_settings
    from models.decoder import Decoder, DecoderConfig

    settings = {
        "steps": 6, "accum_steps": 2, "eval_interval": 3, "max_grad_norm": 1.0, "dataloader": {"batch_size": 4},
        "profiling": {"enabled": True, "repeat": 1, "record_shapes": True}, **layout_settings(name),
    }  # fmt: skip
    assert parse_layout(name).world_size == 2
    ours = runner(root, settings)
    model = DecoderConfig(width=16, depth=2, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY)
    ours.fit(partial(Decoder, model), {"train": Tokens(96, 0), "val": Tokens(8, 1)}, loss=token_loss)
    rank = ours.world.ranks.rank
    path = ours.world.attempt.run_directory / "profiles" / f"rank-{rank}-step-5.json"
    return {"rank": rank, "names": sorted({event["name"] for event in events(path)})}


@pytest.mark.parametrize(("name", "collective"), [("ddp2", "gloo:all_reduce"), ("fsdp2", "gloo:"), ("pp2", "gloo:")])
def test_every_rank_has_its_trace(tmp_path: Path, name: str, collective: str) -> None:
    found = run(traced, 2, str(tmp_path), name)
    assert [each["rank"] for each in found] == [0, 1]
    for each in found:
        assert any(event.startswith(collective) for event in each["names"])
        assert any(event.startswith("Optimizer.step") for event in each["names"])
        assert "aten::mm" in each["names"]


def test_memory_on_cuda_comes_with_the_allocator_s_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is of CUDA is replaced: the allocator's history, and where tensors are."""
    recorded: list[bool] = []
    monkeypatch.setattr(profiler, "record_memory_history", recorded.append)
    monkeypatch.setattr(profiler, "dump_memory_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    for device, expected in (("cuda", [True, False]), ("cpu", [])):
        recorded.clear()
        section = ProfilingConfig(enabled=True, wait=0, warmup=1, active=1, repeat=1, profile_memory=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # there is no CUDA here
            made = profiler.make(section, tmp_path / device, device=torch.device(device), step=10)
            assert made is not None
            for _ in range(3):
                torch.ones(3).add(1)
                made.step()
            made.stop()
        assert recorded == expected
        found = {path.name for path in (tmp_path / device / "profiles").iterdir()}
        snapshot = {"rank-0-step-12.memory.pickle"} if device == "cuda" else set()
        assert found == {"rank-0-step-12.json"} | snapshot
