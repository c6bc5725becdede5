"""Command line of `danling-conf`: its arguments, and the function for each subcommand."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from danling_conf.records.logs import is_full
from danling_conf.records.reading import shown_damage
from danling_conf.records.status import EXIT_FAILED, EXIT_REFUSED
from danling_conf.schema.fsdp import DTYPES
from danling_conf.schema.printable import printable_lines
from danling_conf.topology.violation import ConfigRefused

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

TASKS = ("classification", "lm", "hf")
"""Projects that `init` can write."""
_DIRECTORY = "a sweep's directory, a run's, or one above them"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns:
        The exit code: 2 for a refusal; 1 where a checkpoint is broken, a job did not complete, or a watched run is
        stuck or did not complete; else 0.
    """
    parsed = _parser().parse_args(arguments)
    try:
        with shown_damage():
            code = _COMMANDS[parsed.command](parsed)
        sys.stdout.flush()
        return code
    except ConfigRefused as refusal:
        print(refusal.report(), file=sys.stderr)
        return EXIT_REFUSED
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if not is_full(error) and error.errno != errno.ELOOP:
            raise
        print(f"{error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        return EXIT_FAILED


def _print(lines: Sequence[str]) -> None:
    print(printable_lines("\n".join(lines)))


# Each command imports what it needs when it runs, so that `explain` does not pay for the imports of `report`.
def _explain(parsed: argparse.Namespace) -> int:
    from danling_conf.cli import explain

    if parsed.search is not None:
        _print(explain.search(parsed.search))
    elif parsed.key is None:
        _print(explain.overview())
    else:
        _print(explain.explain(parsed.key, parsed.script, parsed.overrides))
    return 0


def _check(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.check import check_app

    _print(check_app(parsed.script, parsed.overrides))
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.plan import plan_app

    _print(plan_app(parsed.script, parsed.overrides))
    return 0


def _schema(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.json_schema import print_schema

    print(print_schema(parsed.script, parsed.section))
    return 0


def _init(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.init import write_project

    _print(write_project(parsed.directory, parsed.task))
    return 0


def _import(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.import_danling import import_file

    return import_file(parsed.file, parsed.output)


def _checkpoints(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.checkpoints import list_checkpoints

    lines, whole = list_checkpoints(parsed.directory, check=parsed.verify)
    _print(lines)
    return 0 if whole else EXIT_FAILED


def _export(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.export import export

    return export(parsed.source, parsed.directory, best=parsed.best, dtype=parsed.dtype)


def _report(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.report import write_report

    _print(write_report(parsed.directory, parsed.html))
    return 0


def _watch(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.watch import watch

    return watch(parsed.directory, once=parsed.once, as_json=parsed.json, interval=parsed.interval)


def _runs(parsed: argparse.Namespace) -> int:
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


def _resume(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.resume import resume

    return resume(parsed.directory)


def _cancel(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.cancel import cancel

    return cancel(parsed.directory, parsed.jobs, wait_seconds=parsed.wait)


def _logs(parsed: argparse.Namespace) -> int:
    from danling_conf.cli.logs import show_logs

    return show_logs(parsed.directory, parsed.job, rank=parsed.rank, attempt=parsed.attempt, follow=parsed.follow)


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "explain": _explain,
    "check": _check,
    "plan": _plan,
    "schema": _schema,
    "init": _init,
    "import": _import,
    "checkpoints": _checkpoints,
    "export": _export,
    "watch": _watch,
    "runs": _runs,
    "resume": _resume,
    "cancel": _cancel,
    "logs": _logs,
    "report": _report,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danling-conf", description="Explain and check training configurations; show what runs do and have saved."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser(
        "explain",
        help="what a setting, section, group or preset means; with a script, its value there and where that came from",
        description="danling-conf explain | fsdp.reshard_after_forward | parallel | compile=max | --search WORD "
        "| KEY SCRIPT [OVERRIDES]",
    )
    explain.add_argument(
        "key", nargs="?", help="fsdp.enabled, fsdp, parallel, compile=max (all groups, and all settings by section)"
    )
    explain.add_argument("script", nargs="?", help="a training script")
    explain.add_argument("overrides", nargs=argparse.REMAINDER, help="its overrides, as on its own command line")
    # Before the positional ones on the command line, which take the rest of it.
    explain.add_argument("--search", metavar="WORD", help="settings and presets whose name or meaning has the word")
    check = commands.add_parser(
        "check", help="compose and check a script's configuration without running it; exits with 2 when it is refused"
    )
    check.add_argument("script", help="a training script")
    check.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="its overrides, as on its own command line; among them -m for a sweep, --gpus-per-node N and "
        "--cpus-per-node N for what the nodes of a cluster have, and --gpu NAME to refuse what does not fit its memory",
    )
    plan = commands.add_parser(
        "plan", help="memory, communication and time of a layout of any size, planned on this machine (docs/plan.md)"
    )
    plan.add_argument("script", help="a training script")
    plan.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="its overrides, as on its own command line; among them --gpu NAME (h100), --gpus-per-node N (8), and "
        "--json",
    )
    _add_new_app_commands(commands)
    checkpoints = commands.add_parser(
        "checkpoints", help="list what a run has saved: step, when, size, layout, whole or broken, latest and best"
    )
    checkpoints.add_argument("directory", metavar="RUN", help="a run's directory, a sweep's, or one above them")
    checkpoints.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    export = commands.add_parser(
        "export",
        help="write the weights of a run or a checkpoint as safetensors, in one process, whatever layout saved them",
        description="Writes safetensors and their checksums. For a model of transformers the folder is one that "
        "from_pretrained loads; its class comes from the recorded model._target_, or from the export at the end of the "
        "run. Exits with 2 for what is refused, with 1 for a broken checkpoint or a failed write.",
    )
    export.add_argument(
        "source", metavar="SOURCE", help="a run's directory (its newest whole checkpoint), a checkpoint"
    )
    export.add_argument("directory", metavar="DIR", help="the folder to write; nothing is overwritten")
    export.add_argument("--best", action="store_true", help="the run's best checkpoint in place of its newest")
    export.add_argument("--dtype", choices=DTYPES, help="cast floating-point tensors (as trained)")
    watch = commands.add_parser(
        "watch", help="a live view of the ranks of a run or sweep: where each is, who is slowest, who is stuck"
    )
    watch.add_argument("directory", metavar="RUN", help="a run's directory, a sweep's, or one above them")
    watch.add_argument(
        "--once",
        action="store_true",
        help="show it once; exits with 1 where a rank is stuck, or a run ended without having completed",
    )
    watch.add_argument("--json", action="store_true", help="as JSON, for scripts; with --once")
    watch.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (1)")
    _add_sweep_commands(commands)
    report = commands.add_parser("report", help="a run as one HTML page: curves, speed, attempts, configuration")
    report.add_argument("directory", metavar="RUN", help="a run's directory")
    report.add_argument("--html", required=True, metavar="FILE", help="the page to write")
    return parser


def _add_new_app_commands(commands: Commands) -> None:
    schema = commands.add_parser(
        "schema", help="JSON Schema of a configuration, by which editors complete and check YAML (docs/editor.md)"
    )
    schema.add_argument("script", nargs="?", help="a training script, for its own settings, groups and files too")
    schema.add_argument(
        "--section", metavar="NAME", help="of one section, for the files of its group: optim for conf/optim/*.yaml"
    )
    init = commands.add_parser(
        "init", help="write a small project that trains at once: train.py, conf/, model, data, a test, a Slurm profile"
    )
    init.add_argument("directory", metavar="DIR", help="where; nothing is overwritten")
    init.add_argument(
        "--task", choices=TASKS, default=TASKS[0], help=f"what it trains ({TASKS[0]}); hf: a model of transformers"
    )
    importing = commands.add_parser(
        "import", help="read a DanLing 0.4 configuration (YAML or JSON) into one of ours (docs/danling.md)"
    )
    importing.add_argument("file", metavar="FILE", help="as RunnerConfig writes it, nested or dotted")
    importing.add_argument("-o", "--output", metavar="OUT", help="file to write; nothing is overwritten (stdout)")


def _add_sweep_commands(commands: Commands) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
