"""Sweep directory: the request, a file for every job, and the ledger. It has all that later commands need to resume.

sweep.json           the command, how its app is started, the launcher's settings
git.diff             the code's difference from its commit, when there was one
jobs.jsonl           the ledger
jobs/<key>/job.json  one frozen job
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.config.identity import layout_name
from danling_conf.config.job import Job
from danling_conf.records.code import CodeIdentity
from danling_conf.records.job_file import JobFile, Program
from danling_conf.records.ledger import Ledger, Record
from danling_conf.records.reading import Fields, read_fields
from danling_conf.records.run_directory import bind
from danling_conf.records.status import Status
from danling_conf.schema.files import DIFF, JOB_FILE, SWEEP_FILE, write_whole
from danling_conf.topology.violation import ConfigRefused, Violation


@dataclass(frozen=True, kw_only=True)
class SweepDirectory:
    """An existing directory of a sweep."""

    path: Path

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.path)

    @property
    def request(self) -> Fields:
        """The request: created, command, program, cluster, launcher; empty where it cannot be read."""
        return read_fields(self.path / SWEEP_FILE, "cluster", "launcher")

    def jobs(self) -> dict[str, JobFile]:
        """The frozen jobs by key, in the sweep's order."""
        return {key: self.job(key) for key in self.ledger.records()}

    def job(self, key: str) -> JobFile:
        return JobFile.read(self.path / "jobs" / key / JOB_FILE)

    def write_request(
        self, *, command: Sequence[str], program: Program, code: CodeIdentity, cluster: str, launcher: Mapping[str, Any]
    ) -> None:
        """Write the request, once: a sweeper that learns from scores submits several batches to one directory."""
        if (self.path / SWEEP_FILE).exists():
            return
        content = {
            "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": list(command),
            "program": program.to_json(),
            "cluster": cluster,
            "launcher": dict(launcher),
        }
        write_whole(self.path / SWEEP_FILE, json.dumps(content, indent=1) + "\n")
        if code.diff:
            write_whole(self.path / DIFF, code.diff)

    def plan(
        self, jobs: Sequence[Job], program: Program, shapes: Mapping[int, Mapping[str, Any]] | None = None
    ) -> dict[str, JobFile]:
        """Bind every job to a run of its own, freeze it, and add it to the ledger.

        Args:
            shapes: nodes, tasks and GPUs that each job takes of a cluster, by the job's number.

        Returns:
            The job files by key.

        Raises:
            ConfigRefused: two jobs would resume the same run.
        """
        ledger = self.ledger
        files: dict[str, JobFile] = {}
        lines: list[tuple[str, dict[str, Any]]] = []
        known = ledger.records()
        owners = {record.run: record.number for record in known.values() if not record.ended}
        for job in jobs:
            binding = bind(job.config)
            owner = owners.setdefault(binding.run_directory, job.number)
            if owner != job.number:
                rule = f"job #{owner} and job #{job.number} would resume the same run, {binding.run_directory}"
                raise ConfigRefused([Violation("sweep", " ".join(job.overrides), rule, "let them differ in a setting")])
            key = _free_key(job.job_id, files, known)
            shape = None if shapes is None else shapes[job.number]
            files[key] = JobFile.write(self.path, key, job, binding, program, shape)
            facts = {
                "job": job.number,
                "job_id": job.job_id,
                "config_id": job.config_id,
                "status": Status.PLANNED,
                "overrides": list(job.overrides),
                "run": str(binding.run_directory),
                "layout": layout_name(job.layout),
                "steps": job.config.steps,
                "epochs": job.config.epochs,
            }
            lines.append((key, facts))
        # One write for all: a crash before it leaves job files that no ledger names, and so no job that nobody starts.
        ledger.add_all(lines)
        return files


def _free_key(job_id: str, taken: Mapping[str, Any], known: Mapping[str, Record]) -> str:
    """The job's id; with a number appended where the sweep already has the same job."""
    number = 1
    while (key := job_id if number == 1 else f"{job_id}.{number}") in taken or key in known:
        number += 1
    return key
