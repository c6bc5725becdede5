"""The whole test suite, in parts that share two cores; times and counts of the parts are printed at the end.

python tests/run.py --hydra-14 .venv-hydra-1.4/bin/python --optuna .venv-optuna/bin/python
python tests/run.py slurm tests -- -k resume     # two parts, with arguments for pytest

Parts of one lane run one after another, lanes side by side. A part that fails stops no other; the exit code is 1 then.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

REPOSITORY = Path(__file__).parents[1]
TOOLS = (("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",))
SITE = ("mkdocs", "build", "--strict")  # not --quiet, by which a warning is no error
REST = "not slurm and not composition"
POLITE_VARIABLE = "DANLING_CONF_TESTS_POLITE"
"""Environment variable of processes that take what processors others leave."""
_SESSION = 3
"""Place of the session's number in /proc/PID/stat, after the name of the command."""
_LOOK_SECONDS = 0.25

Lanes = tuple[tuple["Part", ...], ...]
_running: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Part:
    """Commands of one name, of which every one runs; pytest's also write a report to count from."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    counts: bool = True
    polite: bool = False
    """Whether the other lane goes first."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part."""

    part: Part
    seconds: float
    codes: tuple[int, ...]
    tests: Counter[str]

    @property
    def good(self) -> bool:
        return not any(self.codes) and not self.tests["failed"] + self.tests["errors"]


def parts(here: str, hydra_14: str, optuna: str, workers: int, rest: Sequence[str]) -> Lanes:
    """The lanes.

    Args:
        here: the Python of the environment with everything.
        hydra_14: the Python of the environment with the newer Hydra and no torch.
        optuna: the Python of the environment with sweepers that consume scores.
        workers: how many processes run tests that do not depend on each other.
        rest: further arguments for every pytest.
    """

    def pytest(python: str, *arguments: str, parallel: bool = True) -> tuple[str, ...]:
        # A file stays in one process: its tests share what fixtures and worlds of ranks have made.
        # The order is that of tests/conftest.py, which knows what takes long.
        spread = ("-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder") if parallel else ()
        return (python, "-m", "pytest", *spread, *arguments, *rest)

    # Slurm's tests wait for most of their time, and their jobs start too late beside others of the same priority.
    slurm = Part("slurm", (pytest(here, "-m", "slurm", "--durations", "10", parallel=False),))
    others = (
        Part("lint", tuple((here, "-m", *tool) for tool in TOOLS), counts=False, polite=True),
        Part("docs", ((here, "-m", *SITE),), counts=False, polite=True),
        Part("hydra-1.4", (pytest(hydra_14, "-m", "composition"),), polite=True),
        Part("hydra-1.3", (pytest(here, "-m", "composition"),), polite=True),
        Part("sweepers", (pytest(optuna, "-m", "sweeper", parallel=False),), polite=True),
        Part("tests", (pytest(here, "-m", REST, "--durations", "25"),), polite=True),
    )
    return (slurm,), others


def run(part: Part, show: Callable[[str], None]) -> Outcome:
    """Run the commands of a part, and show their output line by line."""
    began, codes, tests = time.monotonic(), [], Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for number, command in enumerate(part.commands):
            report = Path(folder, f"{number}.xml")
            argv = [*command, f"--junit-xml={report}"] if part.counts else command
            show(f"$ {' '.join(command)}\n")
            codes.append(code := exit_code(argv, show, polite=part.polite))
            found = counted(report) if part.counts else Counter[str]()
            # An exit code without a failed test (no tests, a crash, a linter) is an error, and so is no report: a test
            # may have ended its process, with any code.
            if (code or (part.counts and not report.is_file())) and not found["failed"] + found["errors"]:
                found["errors"] += 1
            tests += found
    return Outcome(part, time.monotonic() - began, tuple(codes), tests)


def exit_code(argv: Sequence[str], show: Callable[[str], None], *, polite: bool = False) -> int:
    """Run a command; its exit code, or a shell's for a command that does not start."""
    environment = {**os.environ, POLITE_VARIABLE: "1"} if polite else None
    try:
        process = subprocess.Popen(
            argv, cwd=REPOSITORY, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env=environment,
        )  # fmt: skip
    except OSError as error:
        show(f"{error}\n")
        return 127
    _running.add(process)
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            show(line)
    _running.discard(process)
    return process.returncode


def keep_polite(alone: Callable[[], bool]) -> None:
    """Give sessions of polite parts the lowest share of the processors, also those that tests and runs begin.

    Linux shares processors among sessions first, so that a process's own niceness says nothing to other sessions. Once
    polite parts are `alone`, they have the usual share.
    """
    mark = f"{POLITE_VARIABLE}=1".encode()
    known: set[str] = set()
    while not alone():
        known = _give_share("19", mark, known)
        time.sleep(_LOOK_SECONDS)
    _give_share("0", mark, set())


def _give_share(niceness: str, mark: bytes, known: set[str]) -> set[str]:
    """Set the share of sessions whose leader has `mark` in its environment and is not known; all leaders there are."""
    leaders = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "stat").read_text().rpartition(")")[2].split()[_SESSION] != process.name:
                continue
            leaders.add(process.name)
            if process.name not in known and mark in (process / "environ").read_bytes().split(b"\0"):
                (process / "autogroup").write_text(niceness)
        except OSError:
            continue  # it has ended, is somebody else's, or this Linux has no such groups
    return leaders


def interrupt() -> None:
    """Pass Ctrl-C on: what runs is in sessions of its own."""
    for process in list(_running):
        os.killpg(process.pid, signal.SIGINT)


def counted(report: Path) -> Counter[str]:
    """Tests by outcome, of pytest's report; none where it has written none."""
    if not report.is_file():
        return Counter()
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed, errors, skipped = counts["failures"], counts["errors"], counts["skipped"]
    return Counter(failed=failed, errors=errors, skipped=skipped, passed=counts["tests"] - failed - errors - skipped)


def side_by_side(lanes: Sequence[Sequence[Part]]) -> list[Outcome]:
    """Run lanes at the same time. The last shows its output as it comes, others a part at a time."""
    shown = threading.Lock()

    def write(text: str) -> None:
        with shown:
            sys.stdout.write(text)
            sys.stdout.flush()

    def follow(lane: Sequence[Part], live: bool) -> list[Outcome]:
        outcomes = []
        for part in lane:
            write(f"\n--- {part.name}: started\n")
            kept: list[str] = []
            outcome = run(part, write if live else kept.append)
            verdict = "passed" if outcome.good else f"FAILED, exit codes {outcome.codes}"
            write(f"{''.join(kept)}--- {part.name}: {verdict} in {outcome.seconds:.0f} s\n")
            outcomes.append(outcome)
        return outcomes

    with ThreadPoolExecutor(len(lanes) + 1) as pool:
        running = [pool.submit(follow, lane, index == len(lanes) - 1) for index, lane in enumerate(lanes)]
        first = [future for future, lane in zip(running, lanes, strict=True) if not any(part.polite for part in lane)]
        pool.submit(keep_polite, lambda: all(future.done() for future in first))
        try:
            return [outcome for lane in running for outcome in lane.result()]
        except KeyboardInterrupt:
            interrupt()
            raise


def closing(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The times of the parts, and the sum of their tests as pytest's last line has it."""
    lines = [f"{'part':<12} {'seconds':>8} {'passed':>7} {'failed':>7} {'errors':>7} {'skipped':>8}"]
    total = Counter[str]()
    for outcome in outcomes:
        tests = outcome.tests
        total += tests
        lines.append(
            f"{outcome.part.name:<12} {outcome.seconds:8.0f} {tests['passed']:7} {tests['failed']:7}"
            f" {tests['errors']:7} {tests['skipped']:8}"
        )
    counts = [(total["failed"], "failed"), (total["passed"], "passed"), (total["skipped"], "skipped")]
    counts.append((total["errors"], "error" if total["errors"] == 1 else "errors"))
    shown = ", ".join(f"{count} {name}" for count, name in counts if count) or "no tests ran"
    minutes, rest = divmod(int(seconds), 60)
    text = f" {shown} in {seconds:.2f}s ({minutes // 60}:{minutes % 60:02}:{rest:02}) "
    return "\n".join(["", *lines, f"{text:=^80}"])


def main(arguments: Sequence[str]) -> int:
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    own, rest = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(prog="tests/run.py", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PART", help="only these parts: lint, composition, ...")
    parser.add_argument("--hydra-14", default=".venv-hydra-1.4/bin/python", help="Python with the newer Hydra")
    parser.add_argument("--optuna", default=".venv-optuna/bin/python", help="Python with Optuna's sweeper")
    parser.add_argument("--workers", type=int, default=2, help="processes for tests that run side by side")
    given = parser.parse_args(own)
    lanes = parts(sys.executable, given.hydra_14, given.optuna, given.workers, rest)
    unknown = set(given.names) - {part.name for lane in lanes for part in lane}
    if unknown:
        parser.error(f"no part is named {', '.join(sorted(unknown))}")
    chosen = [[part for part in lane if not given.names or part.name in given.names] for lane in lanes]
    began = time.monotonic()
    outcomes = side_by_side([lane for lane in chosen if lane])
    print(closing(outcomes, time.monotonic() - began), flush=True)
    return 0 if all(outcome.good for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
