"""A run that is killed while it saves, again and again, and goes on each time: what the crash test counts.

Every attempt is a real run of a `Runner`, under `auto_resume`, in processes that get SIGKILL when rank 0 is in the
phase of a save that is to be hit. The phase in which it died is read from memory that outlives it. After every kill
each visible checkpoint is compared with its checksums; the next attempt must go on from the newest, and whatever step
is trained again must end with the same weights as before.
"""

from __future__ import annotations

import importlib
import json
import logging
import mmap
import os
import random
import signal
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import danling_conf
from danling_conf.checkpoint import manifest
from danling_conf.checkpoint.durable import IDLE, MAKING_DURABLE, PRUNING, RENAMING, STAGING, WRITING
from danling_conf.checkpoint.folder import Folder
from danling_conf.checkpoint.manifest import Broken
from danling_conf.groups.source import layout_settings
from tests.support.processes import as_rank, fork, wait
from tests.support.small import Pairs

PHASES = (STAGING, WRITING, MAKING_DURABLE, RENAMING, PRUNING)
_STEPS_BEFORE = 2
"""Steps that an attempt makes before it may be killed."""
_ALL = (IDLE, *PHASES)
_LONGEST_SECONDS = {STAGING: 0.004, WRITING: 0.02, MAKING_DURABLE: 0.01, RENAMING: 0.002, PRUNING: 0.002}
_LIMIT_SECONDS = 60.0


@dataclass(frozen=True)
class Case:
    """What is killed."""

    layout: str
    ranks: int
    backend: str
    mode: str
    zero: int | None = None
    """Stage of ZeRO, on `stack=deepspeed`."""

    def __str__(self) -> str:
        zero = "" if self.zero is None else f", ZeRO {self.zero}"
        return f"{self.layout}, {self.backend}, {self.mode}{zero}"


CASES = (
    Case("single", 1, "file", "disabled"),
    Case("single", 1, "file", "async"),
    Case("ddp2", 2, "file", "async"),
    Case("fsdp2", 2, "file", "disabled"),
    Case("fsdp2", 2, "dcp", "disabled"),
    Case("fsdp2", 2, "dcp", "async"),
    Case("ddp2", 2, "file", "async", zero=2),
)


@dataclass
class Report:
    """What became of the kills of one case."""

    case: Case
    kills: Counter[str] = field(default_factory=Counter)
    """By the phase in which rank 0 died."""
    resumed: int = 0
    """Attempts that went on from the newest whole checkpoint."""
    verified: int = 0
    """Visible checkpoints that were compared with their checksums, all of them whole."""
    unfinished: int = 0
    """Saves of which the kill left something that no name shows."""

    def line(self) -> str:
        counts = ", ".join(f"{phase} {self.kills[phase]}" for phase in PHASES)
        return (
            f"{self.case}: {sum(self.kills[phase] for phase in PHASES)} kills in saves ({counts}), "
            f"{self.kills[IDLE]} between; {self.resumed} resumed, {self.verified} checkpoints verified, 0 broken, "
            f"{self.unfinished} left unfinished"
        )


class Layers(nn.Module):
    """Megabytes of weights, so that every phase of a save takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 256)
        self.middle = nn.Linear(256, 256)
        self.last = nn.Linear(256, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


class _Mark(logging.Handler):
    """Writes the phase that rank 0 is in into shared memory, one byte."""

    def __init__(self, memory: mmap.mmap) -> None:
        super().__init__(logging.DEBUG)
        self._memory = memory

    def emit(self, record: logging.LogRecord) -> None:
        self._memory[0] = _ALL.index(record.getMessage())


def kill_while_saving(root: str, case: Case, kills: int, seed: int) -> Report:
    """Kill until `kills` hits fell into saves and each phase was hit. Raises AssertionError if one does not survive."""
    if case.zero is not None:
        # Once, and not in every rank that is forked.
        os.environ["DS_ACCELERATOR"] = "cpu"
        importlib.import_module("deepspeed")
    report, chance = Report(case), random.Random(f"{case} {seed}")
    memory = mmap.mmap(-1, 4096)
    weights: dict[int, int] = {}
    """Checksum of the weights after each step, by whichever attempt came to it first."""
    newest = 0
    while sum(report.kills[phase] for phase in PHASES) < kills or not all(report.kills[phase] for phase in PHASES):
        missing = [phase for phase in PHASES if not report.kills[phase]] or list(PHASES)
        assert sum(report.kills.values()) < 20 * kills + 100, f"{missing} cannot be hit: {report.line()}"
        with tempfile.TemporaryDirectory() as folder:
            memory[0] = memory[1] = 0
            pids = [
                fork(as_rank, folder, rank, case.ranks, attempt, (root, case, memory if rank == 0 else None, folder))
                for rank in range(case.ranks)
            ]
            _kill_in(chance.choice(missing), pids, memory, chance)
            report.kills[_ALL[memory[0]]] += 1
            began = _compare(Path(folder, "steps"), weights)
            assert began is not None, Path(folder, "log-0").read_text()
        assert began == newest, f"{case}: the newest whole checkpoint is of step {newest}, and the run began at {began}"
        report.resumed += began > 0
        newest = _verify(Path(root), report)
    return report


def attempt(root: str, case: Case, memory: mmap.mmap | None, folder: str) -> None:
    """Train until killed. Rank 0 says which phase it is in, and writes down every step with its weights' checksum."""
    if memory is not None:
        phases = logging.getLogger("danling_conf.checkpoint.phase")
        phases.setLevel(logging.DEBUG)
        phases.propagate = False
        phases.addHandler(_Mark(memory))
    runner = danling_conf.Runner(_settings(root, case))
    runner.prepare(
        Layers, {"train": Pairs(64)}, loss=lambda output, batch: nn.functional.cross_entropy(output, batch[1])
    )
    began = runner.global_step
    with open(Path(folder, "steps") if memory is not None else os.devnull, "w") as steps:

        def note() -> None:
            local = {name: getattr(item, "_local_tensor", item) for name, item in runner.model.state_dict().items()}
            crc = 0
            for item in local.values():
                crc = zlib.crc32(item.detach().contiguous().numpy().tobytes(), crc)
            steps.write(json.dumps([runner.global_step, crc]) + "\n")
            steps.flush()

        note()
        for batch in runner.batches("train"):
            runner.step(batch)
            note()
            if memory is not None and runner.global_step >= began + _STEPS_BEFORE:
                memory[1] = 1  # from now on it may be killed


def _settings(root: str, case: Case) -> danling_conf.RunnerConfig:
    settings: Mapping[str, Any] = {
        "workspace_root": root, "seed": 1, "steps": 100_000, "auto_resume": True, "log_interval": 1000,
        "eval_interval": 100_000, "dataloader": {"batch_size": 4}, "optim": {"type": "adamw", "lr": 0.001},
        "checkpoint": {"interval": 1, "keep_latest_k": 2, "backend": case.backend, "async_mode": case.mode},
    }  # fmt: skip
    zero = {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": case.zero}}}
    parts = settings, layout_settings(case.layout), {} if case.zero is None else zero
    return danling_conf.resolve(OmegaConf.to_container(OmegaConf.merge(*parts)))


def _kill_in(phase: str, pids: list[int], memory: mmap.mmap, chance: random.Random) -> None:
    """SIGKILL to all ranks in any order, at a random moment of a phase."""
    target, deadline = _ALL.index(phase), time.monotonic() + _LIMIT_SECONDS
    while not memory[1] and time.monotonic() < deadline and not _one_ended(pids):
        time.sleep(0.001)
    while memory[0] != target and time.monotonic() < deadline:
        pass  # phases are shorter than the shortest sleep
    delay = time.perf_counter() + chance.random() * _LONGEST_SECONDS[phase]
    while time.perf_counter() < delay:
        pass
    for pid in chance.sample(pids, len(pids)):
        os.kill(pid, signal.SIGKILL)
        if chance.random() < 0.3:
            time.sleep(chance.random() * 0.02)
    wait(pids)


def _one_ended(pids: list[int]) -> bool:
    return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None for pid in pids)


def _compare(path: Path, weights: dict[int, int]) -> int | None:
    """The step at which an attempt began, None if it did not come so far; its weights are those of others before it."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    steps = [json.loads(line) for line in lines if line.endswith("\n")]
    for step, crc in steps:
        assert weights.setdefault(step, crc) == crc, f"step {step} ended with other weights than before"
    return steps[0][0] if steps else None


def _verify(root: Path, report: Report) -> int:
    """Every visible checkpoint is whole; gives the newest one's step, 0 where there is none."""
    (run,) = (path.parent for path in root.rglob("run.json"))
    folder, newest = Folder(run / "checkpoints"), 0
    report.unfinished += len(folder.unfinished())
    for entry in folder.entries():
        if entry.manifest is None:
            raise Broken(entry.fault)
        manifest.verify(entry.path, entry.manifest)
        report.verified += 1
        newest = max(newest, entry.step)
    return newest
