"""Real processes for tests that kill: forked from one that has imported everything once, and from nothing with threads.

`run` is like `tests.support.spawn.run`, and its ranks may have children (loader workers) and be killed: what a rank
died of is its result then. `call` runs any function in a process of its own, which may fork ranks itself.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
LIMIT_SECONDS = 120.0


class Died:
    """Stands in for the result of a rank that a signal ended."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number).name

    def __repr__(self) -> str:
        return f"died of {self.signal}"


class Failed(AssertionError):
    """A process raised, or did not finish in time."""


_zygote: subprocess.Popen[bytes] | None = None


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """The value of a function called in a process of its own. Raises Failed with its traceback."""
    global _zygote
    if _zygote is None or _zygote.poll() is not None:
        _zygote = subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    with tempfile.TemporaryDirectory() as folder:
        # By name: the processes import what they need and not this test session.
        Path(folder, "call").write_bytes(pickle.dumps((function.__module__, function.__qualname__, arguments)))
        assert _zygote.stdin is not None
        assert _zygote.stdout is not None
        _zygote.stdin.write(folder.encode() + b"\n")
        _zygote.stdin.flush()
        if not _zygote.stdout.readline():
            raise Failed("the process that forks others has ended")
        return _result(Path(folder, "result"))


def run(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Call a function on ranks of one gloo group; their results by rank, `Died` for one that a signal ended.

    Raises Failed with the traceback of the first rank that raised.
    """
    return call(fork_ranks, function, world_size, arguments)


def fork_ranks(function: Callable[..., Any], world_size: int, arguments: Sequence[Any]) -> list[Any]:
    """`run`, in the process that forks."""
    with tempfile.TemporaryDirectory() as folder:
        pids = [fork(as_rank, folder, rank, world_size, function, arguments) for rank in range(world_size)]
        ended = wait(pids)
        found: list[Any] = []
        for rank, pid in enumerate(pids):
            status = ended[pid]
            found.append(Died(-status) if status < 0 else _result(Path(folder, f"result-{rank}")))
        return found


def fork(function: Callable[..., Any], *arguments: Any) -> int:
    """Call a function in a forked process, which ends with it; gives its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def wait(pids: Sequence[int]) -> dict[int, int]:
    """Wait for processes; their exit codes, negative for a signal. When one was killed, so are the others, soon."""
    ended: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_SECONDS
    while len(ended) < len(pids):
        for pid in pids:
            if pid in ended:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
                if ended[pid] < 0:
                    deadline = min(deadline, time.monotonic() + 0.5)
        if time.monotonic() > deadline:
            for pid in pids:
                if pid not in ended:
                    os.kill(pid, signal.SIGKILL)
            deadline += LIMIT_SECONDS
        time.sleep(0.005)
    return ended


def as_rank(folder: str, rank: int, world_size: int, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    """Be a rank that meets the others in a folder, and leave a result there."""

    def do() -> Any:
        import torch
        import torch.distributed as distributed

        from danling_conf.parallel import process_group
        from danling_conf.schema.process import CommConfig

        torch.set_num_threads(1)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        if world_size == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                os.environ.pop(name)
            return function(*arguments)
        store = distributed.FileStore(str(Path(folder, "store")), world_size)
        process_group.start(CommConfig(init_timeout_seconds=60), "cpu", store=store, rank=rank, world_size=world_size)
        value = function(*arguments)
        process_group.stop()
        return value

    with open(Path(folder, f"log-{rank}"), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        _write_result(Path(folder, f"result-{rank}"), do)


def _write_result(path: Path, do: Callable[[], Any]) -> None:
    try:
        outcome = None, do()
    except BaseException:
        outcome = traceback.format_exc(), None
    aside = path.with_suffix(".tmp")
    aside.write_bytes(pickle.dumps(outcome))
    aside.rename(path)


def _result(path: Path) -> Any:
    if not path.is_file():
        raise Failed(f"{path.name}: a process ended without a word")
    error, value = pickle.loads(path.read_bytes())
    if error is not None:
        raise Failed(error)
    return value


def import_once() -> None:
    """Import what forked processes would otherwise import one by one."""
    for name in (
        "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor", "torchdata",
        "torch._dynamo", "danling_conf.runner.training", "danling_conf.config.resolve", "models.decoder",
        "pytest", "tests.support.decoder_runs", "tests.support.processes",
    ):  # fmt: skip
        importlib.import_module(name)


def _serve() -> None:
    """Import what tests need, then fork one process a line, each for the call in the folder that the line names."""
    import_once()
    # What has been imported stays. Each collection in a forked process would look through it, and copy its pages.
    gc.freeze()
    answers = os.dup(1)
    os.dup2(2, 1)
    # Not by name: this module is `__main__` here, and what is pickled says tests.support.processes.
    module = sys.modules["tests.support.processes"]
    for line in sys.stdin:
        pid = module.fork(module.answer, line.strip())
        os.waitpid(pid, 0)
        os.write(answers, b"done\n")


def answer(folder: str) -> None:
    """Make the call that a folder holds, and leave its value there."""

    def do() -> Any:
        module, name, arguments = pickle.loads(Path(folder, "call").read_bytes())
        return getattr(importlib.import_module(module), name)(*arguments)

    _write_result(Path(folder, "result"), do)


if __name__ == "__main__":
    _serve()
