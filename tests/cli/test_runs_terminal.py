"""What a terminal shows of a sweep, and that nothing of it needs torch."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.support.command_line import poisoned_torch
from tests.support.commands import LIMIT_SECONDS, REPOSITORY, environment
from tests.support.sweeps import command, run_sweep, states

pytestmark = pytest.mark.slow

WIDTH = 70


class Terminal:
    """A command at a terminal of 70 columns."""

    def __init__(self, words: list[str | Path], cwd: Path) -> None:
        self._here, there = pty.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
        kept = {name: value for name, value in environment().items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)], cwd=cwd, env={**kept, "TERM": "xterm-256color"},
            stdin=there, stdout=there, stderr=there, start_new_session=True,
        )  # fmt: skip
        os.close(there)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def read(self, until: str | None = None) -> str:
        """What was shown so far, without colours: up to some words, or to the end."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < deadline and (until is None or until not in self.shown):
            if select.select([self._here], [], [], 0.2)[0]:
                try:
                    found = os.read(self._here, 1 << 16)
                except OSError:  # it has ended
                    break
                self.shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", found.decode(errors="replace"))
        if until is None:
            self.process.wait(LIMIT_SECONDS)
            os.close(self._here)
        return self.shown.replace("\r\n", "\n")


def test_a_sweep_is_a_live_table(tmp_path: Path) -> None:
    with Terminal(command(tmp_path, "data.do=nothing,fail,wait"), tmp_path) as terminal:
        terminal.read(until="1 completed, 1 failed, 1 running")
        (tmp_path / "gate").touch()
        shown = terminal.read()
    assert terminal.process.returncode == 1
    assert "job  data.do  state" in shown
    assert "#0 queued" not in shown  # that is for files
    assert "RuntimeError: the gate is shut" in shown
    assert re.search(r"#2 +wait +completed +0.001 ", shown)
    # A path is not torn where the line is wider than the terminal.
    logs = re.search(r"logs: (\S+)", shown)
    assert logs is not None
    assert Path(logs[1]).is_file()


def test_a_sweep_that_is_interrupted(tmp_path: Path) -> None:
    with Terminal(command(tmp_path, "data.do=wait,nothing", "hydra.launcher.parallel_jobs=1"), tmp_path) as terminal:
        terminal.read(until="1 running, 1 queued")
        terminal.process.send_signal(signal.SIGINT)
        shown = terminal.read()
    assert terminal.process.returncode == 130
    assert "waiting for the jobs to save and exit" in shown
    assert f"to resume: danling-conf resume {tmp_path}" in shown
    assert states(tmp_path) == ["interrupted", "cancelled"]


def test_the_table_fits_the_terminal_and_has_colours(tmp_path: Path) -> None:
    assert run_sweep(tmp_path, "data.do=nothing,fail", "accum_steps=1,2").code == 1
    words: list[str | Path] = ["-m", "danling_conf.cli.main", "runs", tmp_path]
    shown = Terminal(words, tmp_path).read()
    table = [line for line in shown.splitlines() if re.match(r"job|#\d", line)]
    assert len([line for line in table if "completed" in line]) == 2
    assert all(len(line) <= WIDTH for line in table)
    watched = Terminal([*words, "--watch"], tmp_path)
    assert "4 jobs: 2 completed, 2 failed" in watched.read()
    assert watched.process.returncode == 1


def test_nothing_needs_torch(tmp_path: Path) -> None:
    assert run_sweep(tmp_path, "data.do=nothing,fail").code == 1
    code = f"""
from danling_conf.cli.main import main
root = {str(tmp_path)!r}
assert [main(["runs", root, *form]) for form in ([], ["--csv"], ["--json"], ["--html", root + "/page.html"])] == [0] * 4
assert main(["runs", root, "--watch"]) == 1
assert main(["logs", root, "0"]) == 0
assert main(["cancel", root]) == 0
(__import__("pathlib").Path(root) / "gate").touch()
assert main(["resume", root]) == 0
"""
    path = os.pathsep.join([str(poisoned_torch(tmp_path)), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
