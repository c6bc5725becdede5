"""Commands as a user types them: run to their end, or started, watched and signalled."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
APP = Path(__file__).with_name("rank_app.py")
PLAIN_APP = Path(__file__).with_name("plain_app.py")
LIMIT_SECONDS = 100
"""After so long a command hangs, which is a failure."""
_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str
    cwd: Path

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def last(self) -> dict[str, str]:
        """The last line of the output as its `name=value` pairs."""
        return dict(pair.split("=", 1) for pair in self.out.strip().splitlines()[-1].split())

    @property
    def run(self) -> Path:
        return self.cwd / self.last["run"]


def torchrun(*arguments: str, ranks: int = 2) -> list[str]:
    """The beginning of a command line: as many ranks on this machine, at a port of their own."""
    standalone = ["--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *standalone, *arguments]


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without what a launcher might have put there."""
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
    kept = {name: value for name, value in kept.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    # One thread a rank: what torchrun says about that is no concern here.
    return {**kept, "OMP_NUM_THREADS": "1", **(changes or {})}


def run(
    command: list[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None, limit: float = LIMIT_SECONDS
) -> Result:
    """Run a command to its end; a script is run by this Python."""
    with started(command, cwd=cwd, env=env) as process:
        out, err = process.communicate(timeout=limit)
        return Result(process.returncode, out, err, cwd)


@contextmanager
def started(
    command: list[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A running command; killed at the end of the block if it still runs."""
    words = [str(word) for word in command]
    if words[0].endswith(".py"):
        words = [sys.executable, *words]
    process = subprocess.Popen(
        words,
        cwd=cwd,
        env=environment(env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Tests that run in the background of a shell inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def wait_for(condition: Any, what: str, limit: float = LIMIT_SECONDS) -> Any:
    """The first true value of `condition()`; fails when it does not come."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(f"waited in vain for {what}")


class Ranks:
    """The ranks of an app, which write down who they are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def facts(self) -> dict[int, dict[str, Any]]:
        """What each rank wrote, by rank."""
        found = [json.loads(path.read_text()) for path in sorted(self.folder.glob("rank-*.json"))]
        return {facts["rank"]: facts for facts in found}

    def wait(self, count: int, process: subprocess.Popen[str]) -> dict[int, int]:
        """The processes of all ranks, once they have come so far."""

        def arrived() -> bool:
            if process.poll() is not None:
                raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
            return len(self.facts()) == count

        wait_for(arrived, f"{count} ranks in {self.folder}")
        return {rank: facts["pid"] for rank, facts in self.facts().items()}


def alive(pid: int) -> bool:
    """Whether a process still runs; one that has ended and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def all_gone(pids: dict[int, int]) -> bool:
    """Whether all processes end within the limit; those that do not are killed."""
    try:
        wait_for(lambda: not any(map(alive, pids.values())), "all ranks to end", limit=40)
    except AssertionError:
        for pid in filter(alive, pids.values()):
            os.kill(pid, signal.SIGKILL)
        return False
    return True


def runs(root: Path) -> list[Path]:
    """All run directories below a workspace root."""
    return sorted(path.parent for path in root.rglob("run.json"))


def attempts(run: Path) -> list[Path]:
    return sorted((run / "attempts").iterdir())
