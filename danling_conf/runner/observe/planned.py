"""Plan of a run, made beside it: a process of its own traces the layout, and what is measured is compared with it."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from danling_conf.records.current import current
from danling_conf.records.planned import TOLERANCE, PlannedRun, memory_text, plan_of_json, read_plan, write_plan
from danling_conf.records.run_directory import Attempt
from danling_conf.schema.files import PLAN_FILE, PLAN_LOG
from danling_conf.schema.observability import PlanConfig
from danling_conf.topology.hardware import gpu_reported_as
from danling_conf.topology.rank_environment import RankEnvironment

_log = logging.getLogger(__name__)
_OF_THIS_PROCESS = re.compile(
    r"(MASTER_|LOCAL_|SUBMITIT_|DANLING_CONF_|TORCHELASTIC_|SLURM_(?!CONF$|CLUSTERS$)|TORCH_NCCL_)"
    r"|(RANK|WORLD_SIZE|GROUP_RANK)$"
)
"""Variables that would make the planning process take itself for a rank."""
_MOST_SECONDS = 120.0
"""That a run which has ended waits for its plan."""
_LONGEST = 400
"""Characters of an error that are shown."""


class Planned:
    """The plan of a run, on the main rank.

    Args:
        attempt: started by a script and its overrides, which the planning process runs up to where training begins.
        say: shows a line to the user.
    """

    def __init__(
        self,
        section: PlanConfig,
        attempt: Attempt,
        ranks: RankEnvironment,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._run, self._say, self._device = attempt.run_directory, say, device
        self._output, self._errors = attempt.directory / PLAN_FILE, attempt.directory / PLAN_LOG
        self.plan: PlannedRun | None = None
        self._warned: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._watch: threading.Thread | None = None
        self._start(plan_command(section, attempt.command, ranks, device))

    def _start(self, command: Sequence[str]) -> None:
        try:
            with open(self._output, "wb") as out, open(self._errors, "wb") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=plan_environment()
                )
            # Whatever this rank waits for: others may wait for the plan of a run that is out of memory.
            self._watch = threading.Thread(target=self._give_up_if_failed, args=(self._process,), daemon=True)
            self._watch.start()
        except OSError as error:  # a run must not fail for its plan
            self._say(f"warning: the run is not planned: {error}")

    def _give_up_if_failed(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() != 0:
            self._output.unlink(missing_ok=True)

    def compare(self, peaks: Sequence[float], pipelines: Sequence[int], step_seconds: float | None) -> None:
        """Say where the run goes beyond its plan, each kind once.

        Args:
            peaks: bytes by rank, as measured.
            pipelines: coordinate of each rank on the pipeline axis.
            step_seconds: of a step, on the rank that took longest.
        """
        plan = self._take()
        if plan is None:
            return
        # A process on a CPU has its libraries in its memory, too, of which a plan of tensors knows nothing.
        if self._device.type != "cpu":
            over = [
                (peak / planned - 1.0, rank, peak, planned)
                for rank, (peak, pipeline) in enumerate(zip(peaks, pipelines, strict=True))
                if (planned := plan.rank_at(pipeline).peak_bytes) and peak > (1.0 + TOLERANCE) * planned
            ]
            if over:
                share, rank, peak, planned = max(over)
                what = f"rank {rank} has held {memory_text(peak)}, {memory_text(planned)} were planned"
                self._beyond("memory", what, share)
        if step_seconds and plan.step_seconds and step_seconds > (1.0 + TOLERANCE) * plan.step_seconds:
            share = step_seconds / plan.step_seconds - 1.0
            self._beyond("time", f"a step takes {step_seconds:.3g} s, {plan.step_seconds:.3g} were planned", share)

    def close(self, *, wait: bool) -> None:
        """Stop planning. `wait`: the run was shorter than its planning, and its plan is still wanted."""
        if self._process is None:
            return
        try:
            self._process.wait(_MOST_SECONDS if wait else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            self._process = None
            if wait:
                self._say("warning: the run is not planned: that took too long")
            return
        self._take()

    def _take(self) -> PlannedRun | None:
        """The plan once it is there; it is written into the run's file then."""
        if self._process is None or self._process.poll() is None:
            return self.plan
        code, self._process = self._process.returncode, None
        try:
            if code:
                lines = self._errors.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"]
                self._say(f"warning: the run is not planned: {' '.join(map(str.strip, lines))[:_LONGEST]}")
                return None
            self.plan = plan_of_json(json.loads(self._output.read_text()))
            write_plan(self._run, self.plan)
            self._errors.unlink(missing_ok=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say(f"warning: the run is not planned: {error}")
        return self.plan

    def _beyond(self, kind: str, what: str, share: float) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            text = f"beyond its plan by {100 * share:.0f} %: {what}"
            _log.warning("%s", text)
            self._say(f"warning: {text}")


def begun(
    section: PlanConfig, attempt: Attempt, ranks: RankEnvironment, device: torch.device, say: Callable[[str], None]
) -> Planned | None:
    """The plan of a run that asks for one, on its main rank; None anywhere else."""
    return Planned(section, attempt, ranks, device, say) if section.enabled and ranks.main else None


def plan_command(
    section: PlanConfig, started_by: Sequence[str], ranks: RankEnvironment, device: torch.device
) -> list[str]:
    """The command that plans a run."""
    gpu = section.gpu
    if gpu is None and device.type == "cuda":
        known = gpu_reported_as(torch.cuda.get_device_name(device))
        gpu = None if known is None else known.name
    options = [] if gpu is None else ["--gpu", gpu]
    per_node = section.gpus_per_node or ranks.local_world_size
    return [
        sys.executable, "-m", "danling_conf.cli.main", "plan", *started_by, *options, "--gpus-per-node", str(per_node),
        "--json",
    ]  # fmt: skip


def plan_environment() -> dict[str, str]:
    """The environment of a process that plans: no rank, and without devices, which it must not touch."""
    kept = {name: value for name, value in os.environ.items() if not _OF_THIS_PROCESS.match(name)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def plan_now(section: PlanConfig, attempt: Attempt, ranks: RankEnvironment, device: torch.device) -> PlannedRun | None:
    """The plan of a run that has just failed: the one that it has, or that is being made; else one that is made now, by
    one rank of it. None where none can be made."""
    known = read_plan(attempt.run_directory)
    # What our `main` did not start cannot be started again up to where training begins.
    if known is not None or current() is None or not Path(attempt.command[0]).is_file():
        return known
    output = attempt.directory / PLAN_FILE
    try:
        with open(output, "xb") as out:  # exclusively: all ranks of a run may fail at once
            subprocess.run(
                plan_command(section, attempt.command, ranks, device),
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, env=plan_environment(),
                timeout=_MOST_SECONDS, check=True,
            )  # fmt: skip
        return plan_of_json(json.loads(output.read_text()))
    except FileExistsError:
        return _awaited(output)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        output.unlink(missing_ok=True)
        _log.info("no plan of this run can be made: %s", error)
        return None


def _awaited(output: Path) -> PlannedRun | None:
    """The plan that another process is writing; None once it has given up, which it does by removing the file."""
    end = time.monotonic() + _MOST_SECONDS
    while time.monotonic() < end:
        try:
            return plan_of_json(json.loads(output.read_text()))
        except OSError:
            return None
        except (ValueError, KeyError, TypeError):  # not whole yet
            time.sleep(0.2)
    return None
