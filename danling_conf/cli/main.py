"""The `danling-conf` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from danling_conf.cli.sweep_commands import COMMANDS, add_commands, run_command
from danling_conf.topology.violation import ConfigRefused

REFUSED = 2
BROKEN = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; gives its exit code: 2 for what is refused, 1 where a checkpoint is broken."""
    parsed = _parser().parse_args(arguments)
    code = 0
    try:
        if parsed.command == "explain":
            from danling_conf.cli.explain import explain

            lines = explain(parsed.key, parsed.script, parsed.overrides)
        elif parsed.command == "checkpoints":
            from danling_conf.cli.checkpoints import list_checkpoints

            lines, whole = list_checkpoints(parsed.directory, check=parsed.verify)
            code = 0 if whole else BROKEN
        elif parsed.command == "report":
            from danling_conf.cli.report import write_report

            lines = write_report(parsed.directory, parsed.html)
        elif parsed.command == "watch":
            from danling_conf.cli.watch import watch

            return watch(parsed.directory, once=parsed.once, as_json=parsed.json, interval=parsed.interval)
        elif parsed.command in COMMANDS:
            return run_command(parsed)
        else:
            from danling_conf.cli.check import check_app

            lines = check_app(parsed.script, parsed.overrides)
    except ConfigRefused as refusal:
        print(refusal.report(), file=sys.stderr)
        return REFUSED
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danling-conf", description="Explain and check training configurations; show what runs do and have saved."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser(
        "explain",
        help="what a setting, section, group or preset means; with a script, its value there and where that came from",
        description="danling-conf explain fsdp.reshard_after_forward | parallel | compile=max | KEY SCRIPT [OVERRIDES]",
    )
    explain.add_argument("key", help="fsdp.enabled, fsdp, parallel, compile=max")
    explain.add_argument("script", nargs="?", help="a training script")
    explain.add_argument("overrides", nargs=argparse.REMAINDER, help="its overrides, as on its own command line")
    check = commands.add_parser(
        "check", help="compose and check a script's configuration without running it; exits with 2 when it is refused"
    )
    check.add_argument("script", help="a training script")
    check.add_argument(
        "overrides",
        nargs=argparse.REMAINDER,
        help="its overrides, as on its own command line; among them -m for a sweep, and --gpus-per-node N and "
        "--cpus-per-node N for what the nodes of a cluster have",
    )
    checkpoints = commands.add_parser(
        "checkpoints", help="list what a run has saved: step, when, size, layout, whole or broken, latest and best"
    )
    checkpoints.add_argument("directory", metavar="RUN", help="a run's directory, a sweep's, or one above them")
    checkpoints.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    watch = commands.add_parser(
        "watch", help="a live view of the ranks of a run or sweep: where each is, who is slowest, who is stuck"
    )
    watch.add_argument("directory", metavar="RUN", help="a run's directory, a sweep's, or one above them")
    watch.add_argument("--once", action="store_true", help="show it once; exits with 1 where a rank is stuck")
    watch.add_argument("--json", action="store_true", help="as JSON, for scripts; with --once")
    watch.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (1)")
    add_commands(commands)
    report = commands.add_parser("report", help="a run as one HTML page: curves, speed, attempts, configuration")
    report.add_argument("directory", metavar="RUN", help="a run's directory")
    report.add_argument("--html", required=True, metavar="FILE", help="the page to write")
    return parser


if __name__ == "__main__":
    sys.exit(main())
