"""The commands that look after sweeps and runs: `runs`, `resume`, `cancel`, `logs`."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

COMMANDS = ("runs", "resume", "cancel", "logs")
_DIRECTORY = "a sweep's directory, a run's, or one above them"


def add_commands(commands: Any) -> None:
    """Declare the commands to a parser."""
    runs = commands.add_parser(
        "runs", help="the jobs of a sweep, or all runs below a directory: settings, state, progress, score"
    )
    runs.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    form = runs.add_mutually_exclusive_group()
    form.add_argument("--watch", action="store_true", help="follow the sweep to its end; exits as the sweep does")
    form.add_argument("--html", metavar="FILE", help="write a page: the table, loss curves, score against each setting")
    form.add_argument("--csv", action="store_true", help="as CSV")
    form.add_argument("--json", action="store_true", help="as JSON")
    resume = commands.add_parser(
        "resume", help="start what is missing or has failed, in the same runs, from their newest checkpoints"
    )
    resume.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    cancel = commands.add_parser("cancel", help="end jobs: those that wait do not start, those that run save and leave")
    cancel.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    cancel.add_argument("jobs", metavar="JOB", nargs="*", help="number, key or run id (all that have not ended)")
    cancel.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="for them to end (120)")
    logs = commands.add_parser("logs", help="the log of a rank in a job's newest attempt")
    logs.add_argument("directory", metavar="DIR", help=_DIRECTORY)
    logs.add_argument("job", metavar="JOB", nargs="?", help="number, key or run id; none for a run")
    logs.add_argument("--rank", type=int, default=0, metavar="N", help="which rank (0)")
    logs.add_argument("--attempt", metavar="NAME", help="an earlier attempt, by its name")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends, or Ctrl-C")


def run_command(parsed: argparse.Namespace) -> int:
    """Run one of the commands; gives its exit code. Raises ConfigRefused."""
    try:
        code = _run(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(parsed: argparse.Namespace) -> int:
    if parsed.command == "resume":
        from danling_conf.cli.resume import resume

        return resume(parsed.directory)
    if parsed.command == "cancel":
        from danling_conf.cli.cancel import cancel

        return cancel(parsed.directory, parsed.jobs, wait_seconds=parsed.wait)
    if parsed.command == "logs":
        from danling_conf.cli.logs import show_logs

        return show_logs(
            parsed.directory, parsed.job, rank=parsed.rank, attempt=parsed.attempt, follow=parsed.follow
        )  # fmt: skip
    if parsed.watch:
        from danling_conf.cli.runs_watch import watch_runs

        return watch_runs(parsed.directory)
    if parsed.html:
        from danling_conf.cli.runs_page import write_page

        print(write_page(parsed.directory, parsed.html))
        return 0
    from danling_conf.cli import runs

    if parsed.csv or parsed.json:
        sys.stdout.write(runs.as_csv(parsed.directory) if parsed.csv else runs.as_json(parsed.directory) + "\n")
    else:
        print("\n".join(runs.show_runs(parsed.directory)).rstrip())
    return 0
