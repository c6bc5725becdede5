"""Parts of the GPU script by name and importance, each in a process of its own that is killed at its time limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.gpu import parts, ranks, speed
from tests.gpu.place import Figures, NotRun, Place

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "danling_conf", __name__]


@dataclass(frozen=True)
class Part:
    """A part of the script."""

    name: str
    function: Callable[[Place], Figures]
    seconds: int = 60
    """Time limit."""


PARTS = (
    Part("main", parts.main_job, 120),
    Part("compile_default", partial(parts.compiled, "default"), 90),
    Part("two_ranks", ranks.against_one_process, 150),
    Part("fsdp1", parts.fsdp_of_one),
    Part("speed_125m", partial(speed.against_a_bare_loop, "125M"), 120),
    Part("checkpoints", parts.checkpoints, 120),
    Part("precision", parts.precisions),
    Part("recompute", parts.recomputation),
    Part("out_of_memory", parts.out_of_memory),
    Part("nonfinite", parts.not_finite),
    Part("offload", parts.offloaded),
    Part("compile_reduce_overhead", partial(parts.compiled, "reduce_overhead"), 90),
    Part("traces", parts.traces),
    Part("utilisation", parts.utilisation, 90),
    Part("pinned_loader", parts.pinned_loader),
    Part("transformers", parts.transformers_model),
    Part("collective_timeout", ranks.collective_timeout, 90),
    Part("devices_of_jobs", ranks.devices_of_jobs, 90),
    Part("speed_1b", partial(speed.against_a_bare_loop, "1B"), 120),
    Part("speed_fabric", speed.against_fabric, 90),
    Part("compile_max", partial(parts.compiled, "max"), 180),
)


def in_process(part: Part, device: str, tiny: bool, log: Path, limit: float) -> tuple[str, Figures]:
    """Outcome and figures of a part; its process, and all that it has started, are killed at the limit."""
    # Forked from a server without a CUDA context, which cannot be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=be_part, args=(theirs, part.name, device, tiny, str(log)))
    process.start()
    theirs.close()
    try:
        if not ours.poll(limit):
            return FAILED, {"why": f"it took longer than {limit:.0f} s; see {log}"}
        found: tuple[str, Figures] = ours.recv()
        return found
    except EOFError:
        process.join()
        return FAILED, {"why": f"its process ended with exit code {process.exitcode}; see {log}"}
    finally:
        if process.is_alive():
            process.join(timeout=5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        process.join()


def be_part(connection: Connection, name: str, device: str, tiny: bool, log: str) -> None:
    """Be the process of a part."""
    os.setsid()  # so that everything that it starts can be killed with it
    part = next(part for part in PARTS if part.name == name)
    with (
        open(log, "w", buffering=1) as file,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        redirect_stdout(file),
        redirect_stderr(file),
    ):
        try:
            if device == "cpu":
                torch.set_num_threads(1)
            result = PASSED, part.function(Place(device, tiny, Path(folder)))
        except NotRun as reason:
            result = NOT_RUN, {"why": str(reason)}
        except BaseException as error:
            traceback.print_exc()
            result = FAILED, {"why": f"{type(error).__name__}: {error}"[:500]}
        connection.send(result)
