"""A process that is one rank of several: under our own local workers, torchrun or srun."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from danling_conf.launch.rank import run_rank
from danling_conf.launch.workers import RAISED_AT
from danling_conf.records.current import Current
from danling_conf.records.frozen import take_part_in, thaw
from danling_conf.records.logs import configure_job_logging, rank_log, redirect_output
from danling_conf.topology.rank_environment import RankEnvironment
from danling_conf.topology.violation import ConfigRefused


def run_local_worker(function: Callable[[Any], Any], frozen: Path, ranks: RankEnvironment, job_name: str) -> Any:
    """Run as a rank that `local_workers.run_workers` started. Exits with 1 after an error, which the parent shows."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    end_with_parent()
    handler = get_error_handler()
    handler.initialize()
    try:
        content = frozen.read_text()
        config, attempt = thaw(content)
        if not ranks.main:
            redirect_output(rank_log(attempt.directory, ranks.rank))
        hydra = take_part_in(content)
        if ranks.main and hydra is not None:
            configure_job_logging(hydra)
        ranks = replace(ranks, launcher="local workers")
        return run_rank(function, config, Current(attempt=attempt, ranks=ranks), job_name)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        raised_at = time.time()
        handler.record_exception(error)
        record = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
        record.write_text(json.dumps({**json.loads(record.read_text()), RAISED_AT: raised_at}))
        # Other ranks may be waiting for this one in a collective: leave without the clean-up that would wait for them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, ConfigRefused) else 1)


def end_with_parent() -> None:
    """Ask Linux to end this process when its parent dies, even by SIGKILL: no rank outlives its run."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
