"""A job of a sweep, frozen when it was submitted: all that is needed to start it, today or tomorrow.

`SWEEP/jobs/<key>/job.json` has the configuration, the run that the job owns, and how its script is started. What its
processes have to say beside the ledger is written next to it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.config.job import Job
from danling_conf.records.frozen import frozen_job
from danling_conf.records.ledger import Ledger
from danling_conf.records.run_directory import Binding, write_whole

JOB_FILE = "job.json"
_GONE = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|remote process exit|ncclRemoteError|"
    r"communicator was aborted|socket.{0,20}(reset|closed)",
    re.IGNORECASE,
)
JOB_VARIABLE = "DANLING_CONF_JOB"
"""Environment variable that names the job file which a process is started for."""
CLUSTER_VARIABLE = "DANLING_CONF_CLUSTER"
"""Environment variable that says where the job runs: `slurm` for one rank of it; otherwise the whole of it here."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """How an app is started."""

    words: tuple[str, ...]
    """A script, or `-m` and a module."""
    directory: Path
    """Working directory."""
    code_id: str
    """State of its code when the sweep was submitted."""

    def to_json(self) -> dict[str, Any]:
        return {"words": list(self.words), "directory": str(self.directory), "code_id": self.code_id}


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """What `job.json` holds."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def write(
        cls, sweep: Path, key: str, job: Job, binding: Binding, program: Program, shape: Mapping[str, Any] | None
    ) -> JobFile:
        """Freeze a job. `shape` is what it takes of a cluster."""
        path = sweep / "jobs" / key / JOB_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "key": key,
            "job": job.number,
            "overrides": list(job.overrides),
            "program": program.to_json(),
            "binding": binding.to_json(),
            "world_size": job.layout.world_size,
            "launcher": job.launcher,
            "shape": shape,
            **frozen_job(job.config, job.hydra),
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        return cls(path=path, content=content)

    @classmethod
    def read(cls, path: Path) -> JobFile:
        """Raises ValueError when the file is broken."""
        try:
            return cls(path=path, content=json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: the job cannot be read: {error}") from error

    @property
    def key(self) -> str:
        return str(self.content["key"])

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.path.parents[2])

    @property
    def binding(self) -> Binding:
        return Binding.from_json(self.content["binding"])

    @property
    def overrides(self) -> list[str]:
        return list(self.content["overrides"])

    @property
    def words(self) -> list[str]:
        """Script, or `-m` and a module, and the overrides."""
        return [*self.content["program"]["words"], *self.overrides]

    @property
    def directory(self) -> str:
        return str(self.content["program"]["directory"])

    @property
    def world_size(self) -> int:
        return int(self.content["world_size"])


def write_error(folder: Path, rank: int, message: str, trace: str) -> None:
    """Leave word of why a rank failed, for whoever looks after the job."""
    content = {"rank": rank, "raised_at": time.time(), "message": message, "traceback": trace}
    write_whole(folder / f"error-{rank}.json", json.dumps(content) + "\n")


def first_error(folder: Path, since: float = 0.0) -> dict[str, Any] | None:
    """What the rank that failed first said; None where no rank said anything since a time.

    What only says that another rank has gone comes after what says why.
    """
    errors = [json.loads(path.read_text()) for path in folder.glob("error-*.json")]
    recent = [item for item in errors if item["raised_at"] >= since]
    return min(recent, key=lambda item: (is_consequence(item["message"]), item["raised_at"]), default=None)


def is_consequence(message: str) -> bool:
    """Whether an error only says that another rank has gone."""
    return _GONE.search(message) is not None
