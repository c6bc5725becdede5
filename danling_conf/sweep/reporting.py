"""What is said on the terminal while a sweep runs: a line for each change, and why a job failed."""

from __future__ import annotations

import sys
from pathlib import Path

from danling_conf.records.job_file import JobFile, first_error, is_consequence
from danling_conf.records.ledger import Record
from danling_conf.records.logs import rank_log
from danling_conf.records.status import Status
from danling_conf.sweep.local_backend import OUTPUT


def say(record: Record, job: JobFile) -> None:
    """One line about a job that has changed; a failed one's traceback goes to standard error."""
    number, status = f"#{record.number}", record.status
    if status == Status.QUEUED and "why" in record.history[-1]:
        print(f"{number} queued again ({record.history[-1]['why']})", flush=True)
    elif status == Status.QUEUED:
        where = f" as Slurm job {record.facts['slurm']}" if "slurm" in record.history[-1] else ""
        print(f"{number} queued{where}: {' '.join(record.facts['overrides'])}".rstrip(": "), flush=True)
    elif status == Status.RUNNING:
        there = record.facts.get("nodes") or record.facts.get("host")
        again = f", attempt {record.attempts}" if record.attempts > 1 else ""
        print(f"{number} running on {there}{again}", flush=True)
    elif status == Status.COMPLETED:
        score = f" score={record.score:.6g}" if record.score is not None else ""
        print(f"{number} completed{score}", flush=True)
    else:
        error = record.facts.get("error")
        print(f"{number} {status}" + (f": {error}".partition("\n")[0] if error else ""), flush=True)
        if status not in (Status.CANCELLED,):
            print(reason(record, job), file=sys.stderr, flush=True)


def reason(record: Record, job: JobFile) -> str:
    """Why a job did not complete: the traceback of the rank that failed first, and where to read on."""
    since = record.since_queued()[0]["time"]
    found = first_error(job.folder, since - 1)
    lines = [f"job #{record.number} {record.status}"]
    if record.status == Status.REFUSED:
        lines.append(str(record.facts.get("error")))
    elif found is not None and is_consequence(found["message"]) and record.facts.get("error"):
        lines += [str(record.facts["error"]), f"rank {found['rank']}, which has missed it: {found['message']}"]
        lines += tail(job, since)
    elif found is not None:
        lines.append(f"rank {found['rank']} failed: {found['message']}\n{found['traceback'].rstrip()}")
    elif record.facts.get("error"):
        lines.append(str(record.facts["error"]))
        lines += tail(job, since)
    lines.append(f"logs: {logs_of(record, job, rank=0 if found is None else found['rank'])}")
    return "\n".join(lines)


def logs_of(record: Record, job: JobFile, rank: int) -> Path:
    """The log of a rank in the newest attempt of a job; what its processes printed before there was one."""
    if record.run is not None and "attempt" in record.facts:
        found = rank_log(record.run / "attempts" / record.facts["attempt"], rank)
        if found.is_file():
            return found
    printed = printed_by(job)
    return printed[-1] if printed else job.folder


def printed_by(job: JobFile) -> list[Path]:
    """What a job's processes have printed, oldest first."""
    slurm = job.path.parents[2] / "slurm"
    ids = {line["slurm"] for line in job.ledger.records()[job.key].history if "slurm" in line}
    found = [job.folder / OUTPUT, *(path for name in ids for path in slurm.glob(f"{name}_*_log.*"))]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime)


def tail(job: JobFile, since: float, count: int = 15) -> list[str]:
    """The last lines that a job which left no word has printed since a time."""
    lines: list[str] = []
    for path in printed_by(job):
        if path.suffix != ".out" and path.stat().st_mtime >= since:
            lines += [line for line in path.read_text(errors="replace").splitlines() if line.strip()][-count:]
    return lines[-count:]
