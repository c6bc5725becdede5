"""Job file: a job of a sweep, frozen when it was submitted, with everything needed to start it now or days later.

`SWEEP/jobs/<key>/job.json` holds the configuration, the run that the job owns, and the command that starts its script.
The errors of the job's ranks lie next to it, since a traceback does not fit into a line of the ledger.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danling_conf.config.job import Job
from danling_conf.records.frozen import frozen_job
from danling_conf.records.ledger import Ledger
from danling_conf.records.logs import show_unwritable
from danling_conf.records.reading import is_moment, read_fields
from danling_conf.records.run_directory import Binding, run_of_sweep
from danling_conf.records.status import is_consequence
from danling_conf.schema.files import JOB_FILE, Damaged, error_file, read_object, write_whole


@dataclass(frozen=True, kw_only=True)
class Program:
    """How an app is started."""

    argv: tuple[str, ...]
    """A script, or `-m` and a module."""
    directory: Path
    """Working directory."""
    code_id: str
    """State of its code when the sweep was submitted."""

    def to_json(self) -> dict[str, Any]:
        # The key on disk is "words": job files of earlier versions must stay readable.
        return {"words": list(self.argv), "directory": str(self.directory), "code_id": self.code_id}


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """What `job.json` holds."""

    path: Path
    content: Mapping[str, Any]

    @classmethod
    def write(
        cls, sweep: Path, key: str, job: Job, binding: Binding, program: Program, shape: Mapping[str, Any] | None
    ) -> JobFile:
        """Freeze a job.

        Args:
            shape: nodes, tasks and GPUs that it takes of a cluster; None for a job of this machine.
        """
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
        """Raises Damaged when the file is missing or broken."""
        try:
            content = read_object(path)
        except FileNotFoundError as error:
            raise Damaged(path, "the job cannot be read: there is no such file") from error
        except Damaged as damage:
            raise Damaged(path, f"the job cannot be read: {damage.reason}") from damage
        wrong = [name for name, kinds in _CONTENT.items() if name in content and not isinstance(content[name], kinds)]
        wrong += [] if "config" in content else ["config"]
        texts = {
            "overrides": content.get("overrides", ()),
            "program.words": _inside(content, "program", "words"),
            "binding.notes": _inside(content, "binding", "notes"),
        }
        wrong += [name for name, found in texts.items() if not all(isinstance(text, str) for text in found)]
        if wrong:
            raise Damaged(path, f"the job cannot be read: {', '.join(wrong)} missing or of another type")
        return cls(path=path, content=content)

    def require_startable(self) -> JobFile:
        """Returns this job if its file has everything needed to start it. Raises Damaged otherwise."""
        # Not part of `read`: listing and cancelling must work with job files that cannot be started any more.
        missing = [name for name in _CONTENT if name not in self.content]
        program, binding = self.content.get("program", {}), self.content.get("binding", {})
        missing += [f"program.{name}" for name in ("words", "directory", "code_id") if name not in program]
        missing += [f"binding.{name}" for name in ("run_directory", "restore", "notes") if name not in binding]
        parallel = self.content.get("config", {}).get("parallel")
        missing += [] if isinstance(parallel, dict) and "mesh_device_type" in parallel else ["config.parallel"]
        if missing:
            raise Damaged(self.path, f"the job cannot be read: {', '.join(missing)} missing")
        return self

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
        written = Binding.from_json(self.content["binding"])
        run, here = written.run_directory, run_of_sweep(self.path.parents[2], written.run_directory)
        restore = written.restore
        if restore is not None and restore.is_relative_to(run):
            restore = here / restore.relative_to(run)
        return replace(written, run_directory=here, restore=restore)

    @property
    def overrides(self) -> list[str]:
        return list(self.content["overrides"])

    @property
    def argv(self) -> list[str]:
        """Script, or `-m` and a module, and the overrides."""
        return [*self.content["program"]["words"], *self.overrides]

    @property
    def directory(self) -> str:
        return str(self.content["program"]["directory"])

    @property
    def world_size(self) -> int:
        return int(self.content["world_size"])


_CONTENT: dict[str, type | tuple[type, ...]] = {
    "key": str,
    "job": int,
    "overrides": list,
    "program": dict,
    "binding": dict,
    "world_size": int,
    "launcher": dict,
    "shape": (dict, type(None)),
    "job_id": str,
    "class": list,
    "config": dict,
    "hydra": (dict, type(None)),
}
"""The keys of a job file, and their types."""


def _inside(content: Mapping[str, Any], name: str, inner: str) -> list[Any]:
    found = content[name].get(inner, []) if isinstance(content.get(name), dict) else []
    return found if isinstance(found, list) else [found]


def write_error(folder: Path, rank: int, message: str, trace: str) -> None:
    """Write why a rank failed, for the sweep's monitor."""
    content = {"rank": rank, "raised_at": time.time(), "message": message, "traceback": trace}
    try:
        write_whole(error_file(folder, rank), json.dumps(content) + "\n")
    except OSError as failed:  # the job's end, which says the same in short, must not fail with it
        show_unwritable(error_file(folder, rank), failed)


def first_error(folder: Path, since: float = 0.0) -> dict[str, Any] | None:
    """The error of the rank that failed first; None where no rank wrote one.

    Errors that only report a lost peer rank last, whatever their time: clocks of nodes differ.

    Args:
        since: seconds since 1970; errors of earlier attempts are older, and are ignored.
    """
    found = [read_fields(path) for path in sorted(folder.glob("error-*.json"))]
    errors: list[dict[str, Any]] = [
        {
            "rank": item.integer("rank"),
            "raised_at": item.number("raised_at"),
            "message": item.text("message"),
            "traceback": item.text("traceback") or "",
        }
        for item in found
    ]
    complete = [item for item in errors if item["rank"] is not None and item["message"] is not None]
    recent = [item for item in complete if is_moment(item["raised_at"]) and item["raised_at"] >= since]
    return min(recent, key=lambda item: (is_consequence(item["message"]), item["raised_at"]), default=None)
