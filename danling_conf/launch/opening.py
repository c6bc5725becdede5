"""A job's process opens the attempt that it makes: claims its run, freezes it, and says in the ledger that it runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from danling_conf.config.hydra_adapter import settings_in
from danling_conf.records.code import code_identity
from danling_conf.records.frozen import freeze_attempt, thaw_job
from danling_conf.records.job_file import JobFile
from danling_conf.records.run_directory import Attempt, begin
from danling_conf.records.run_lock import RunLock
from danling_conf.records.status import Status
from danling_conf.records.warn import warn
from danling_conf.schema import RunnerConfig


def open_job(
    job: JobFile, script: Path, *, fence: tuple[str, int] | None = None, **facts: Any
) -> tuple[RunnerConfig, Attempt, RunLock]:
    """The job's configuration, as it was when the job was submitted, and a new attempt of its run.

    Args:
        script: file of the user's function.
        fence: see `RunLock`.
        facts: what the ledger is to say of the attempt beside where it runs.

    Raises ConfigRefused when the run is live or cannot be written, ValueError when the user's class has changed.
    """
    config = thaw_job(job.content)
    again = job.ledger.records()[job.key].attempts > 0
    attempt, lock = begin(job.binding, config, [str(script), *job.overrides], again=again, fence=fence)
    submitted, now = job.content["program"]["code_id"], code_identity(script.parent).code_id
    if submitted != now:
        note = f"the code was {submitted} when this job was submitted, and is {now}"
        attempt = replace(attempt, notes=(*attempt.notes, note))
    freeze_attempt(config, attempt, script, settings_in(job.content["hydra"], attempt.directory))
    host = os.uname().nodename
    job.ledger.add(job.key, status=Status.RUNNING, attempt=attempt.directory.name, host=host, pid=os.getpid(), **facts)
    warn(attempt, config)
    return config, attempt, lock
