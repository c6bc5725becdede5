"""Profiler: traces of some steps by `torch.profiler`, one for each rank."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from danling_conf._torch_private.attributes import dump_memory_snapshot, record_memory_history
from danling_conf.schema.observability import ProfilingConfig

_log = logging.getLogger(__name__)
_ROWS = 12
"""Operators in the table of the log."""


def make(
    section: ProfilingConfig,
    run: Path,
    *,
    rank: int = 0,
    attempt: str = "",
    device: torch.device | None = None,
    step: int = 0,
    say: Callable[[str], None] = _log.info,
) -> StepProfiler | None:
    """A started profiler, whose `step` is called after each step; None where profiling is switched off.

    Args:
        run: directory that `profiling.trace_dir` is relative to.
        attempt: distinguishes traces of the same step.
        step: steps that were done before.
        say: called with the path of each trace, and with warnings.
    """
    if not section.enabled:
        return None
    return StepProfiler(section, run / section.trace_dir, rank, attempt, device or torch.device("cpu"), step, say)


class StepProfiler:
    """`torch.profiler.profile` with the schedule of the configuration, counted in optimizer steps.

    Each cycle leaves `rank-<n>-step-<s>.json` in the trace's folder, `s` its last step, which chrome://tracing and
    Perfetto open; and a table of the operators that took longest in the rank's log. With `profile_memory` on CUDA a
    snapshot of the allocator (`rank-<n>-step-<s>.memory.pickle`, for https://pytorch.org/memory_viz) stands beside it.
    """

    def __init__(
        self,
        section: ProfilingConfig,
        folder: Path,
        rank: int,
        attempt: str,
        device: torch.device,
        step: int,
        say: Callable[[str], None],
    ) -> None:
        self.section, self.folder, self.rank, self.attempt = section, folder, rank, attempt
        self.traces: list[Path] = []
        """Those made so far."""
        self._device, self._step, self._say = device, step, say
        self._steps = 0
        self._snapshots = section.profile_memory and device.type == "cuda"
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        elif device.type == "xpu":
            activities.append(ProfilerActivity.XPU)
        if self._snapshots:
            record_memory_history(True)
        # Each cycle is written before the next begins, which is what the warning is about.
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events at the end of each cycle")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it writes two lines a cycle to the terminal
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=section.wait, warmup=section.warmup, active=section.active, repeat=section.repeat or 0
            ),
            on_trace_ready=self._write,
            record_shapes=section.record_shapes,
            profile_memory=section.profile_memory,
            with_stack=section.with_stack,
            with_flops=section.with_flops,
        )
        self._profile.start()

    def step(self) -> None:
        """An optimizer step is done."""
        self._step += 1
        self._steps += 1
        self._profile.step()

    def stop(self) -> None:
        """End a trace that is being recorded, and report where none was."""
        self._profile.stop()
        if self._snapshots:
            record_memory_history(False)
        if not self.traces:
            first = self.section.wait + self.section.warmup
            self._say(
                f"profiling: no step was traced: the run had {self._steps}, and tracing begins after {first} "
                "(profiling.wait, profiling.warmup)"
            )

    def _write(self, finished: Any) -> None:
        before = self.section.wait + self.section.warmup
        recorded = (self._steps - 1) % (before + self.section.active) + 1 - before
        if recorded < 1:
            return  # the run ended before the first step to be traced had
        path = self._free(f"rank-{self.rank}-step-{self._step}")
        self.traces.append(path)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(path))
            if self._snapshots:
                dump_memory_snapshot(str(path.with_suffix(".memory.pickle")))
        except OSError as error:  # a full disk is no reason to end a run
            self._say(f"warning: the trace of the steps up to {self._step} could not be written: {error}")
            return
        on_device = self._device.type != "cpu"
        table = finished.key_averages().table(
            sort_by="self_device_time_total" if on_device else "self_cpu_time_total",
            row_limit=_ROWS,
            max_name_column_width=40,
        )
        _log.info("steps %d to %d\n%s", self._step - recorded + 1, self._step, table)
        exposed = exposed_communication(path) if on_device else None
        if exposed is not None:
            _log.info("communication that no computation hides: %.1f %% of the traced time", 100 * exposed)
        self._say(f"trace of rank {self.rank}: {path}")

    def _free(self, name: str) -> Path:
        """A file that no other attempt, and no other run, has written."""
        path = self.folder / f"{name}.json"
        return self.folder / f"{name}-{self.attempt}.json" if path.exists() else path


def exposed_communication(trace: Path) -> float | None:
    """Share of a trace's time in which a rank's device only communicates. None for a trace without device kernels: on a
    CPU the same threads do both."""
    events = json.loads(trace.read_text())["traceEvents"]
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return None
    communication = _spans(event for event in kernels if "nccl" in event["name"].lower())
    computation = _spans(event for event in kernels if "nccl" not in event["name"].lower())
    begin = min(event["ts"] for event in kernels)
    end = max(event["ts"] + event["dur"] for event in kernels)
    exposed = _length(communication + computation) - _length(computation)
    return exposed / (end - begin) if end > begin else None


def _spans(events: Any) -> list[tuple[float, float]]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events]


def _length(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans, which may overlap."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        if last > end:
            total += last - max(first, end)
            end = last
    return total
