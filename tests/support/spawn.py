"""Gloo ranks for tests: forked from a server that has imported torch once, and killed by handle whatever happens.

`run` starts ranks for one call. `shared` keeps them for the next call of the same world size, which then pays for no
start, no import and no cold cache; each call still has a process group of its own.
"""

from __future__ import annotations

import faulthandler
import gc
import io
import multiprocessing
import os
import pickle
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from danling_conf._torch_private.distributed import forget_meshes
from danling_conf.parallel import process_group
from danling_conf.schema.process import CommConfig

_PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.pipelining",
    "torch._dynamo",
    # What compiling imports, and context parallelism.
    "torch._dynamo.repro.after_dynamo",
    "torch._functorch.partitioners",
    "torch._inductor.compile_fx",
    "torch.distributed.tensor.experimental._attention",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    # What modules of tests import: a rank imports the one that its function stands in.
    "danling_conf.runner.training",
    "hypothesis",
    "models.decoder",
    "pytest",
    "rich.live",
    "torchdata.stateful_dataloader",
    "torchmetrics.classification",
    __name__,
]


_MOST_CALLS = 16
"""Of one world: torch's caches keep groups of some calls, and gloo has a thread for each, which wakes a hundred times a
second."""
_GRACE = 3.0
"""Seconds in which ranks notice that another has failed."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish."""


class World:
    """Ranks that wait for calls. The first call that fails ends them: what it left behind is unknown."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls = 0
        # A fork of this process could inherit locked threads (autograd, OpenMP); the server has none.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        # The server of the store lives here, so that it outlives any rank.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._ranks: list[tuple[Any, Connection]] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self._store.port, rank, size), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def call(self, function: Callable[..., Any], *arguments: Any, timeout: float, collectives: float) -> list[Any]:
        """Call a function on every rank, in a new process group.

        Args:
            function: what every rank calls; it, its arguments and its result must pickle.
            *arguments: of `function`.
            timeout: seconds until ranks that have not returned are taken to hang.
            collectives: seconds after which a collective fails that waits for another rank.

        Returns:
            The results by rank.

        Raises:
            RankFailed: with the traceback of the rank that failed first, and with the ranks that hang.
        """
        call = pickle.dumps((self.calls, collectives, function, arguments))
        self.calls += 1
        try:
            for _, connection in self._ranks:
                connection.send_bytes(call)
            return _collect(self._ranks, time.monotonic() + timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the ranks; those that do not end by themselves are killed."""
        for _, connection in self._ranks:
            connection.close()
        for process, _ in self._ranks:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
        self._ranks.clear()


_shared: World | None = None
"""The world that `shared` uses: one at a time, since every rank holds some hundred megabytes."""


def run(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120, collectives: float = 60
) -> list[Any]:
    """`World.call` in a world for this call alone."""
    world = World(world_size)
    try:
        return world.call(function, *arguments, timeout=timeout, collectives=collectives)
    finally:
        world.close()


def shared(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,
    check: Callable[[list[Any]], Any] = lambda results: results,
    timeout: float = 120,
    collectives: float = 60,
) -> Any:
    """`World.call` in the world that the previous calls of this size have used, and what `check` makes of its results.

    A call that fails there, or whose results `check` rejects by an AssertionError, is repeated in a world of its own:
    an earlier call may have left the cause behind. It fails only where it fails there as well; a warning shows every
    call that did not.
    """
    global _shared
    if _shared is None or _shared.size != world_size or _shared.calls >= _MOST_CALLS:
        close_shared()
        _shared = World(world_size)
    try:
        return check(_shared.call(function, *arguments, timeout=timeout, collectives=collectives))
    except AssertionError as failure:
        close_shared()
        results = check(run(function, world_size, *arguments, timeout=timeout, collectives=collectives))
        warnings.warn(f"passed in a world of its own only; in the shared one: {failure}", stacklevel=2)
        return results


def close_shared() -> None:
    """End the ranks that wait for the next call of `shared`."""
    global _shared
    if _shared is not None:
        _shared.close()
        _shared = None


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    pending: dict[Any, int] = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = pending.pop(connection)
            try:
                failure, result = connection.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                ranks[rank][0].join(timeout=5)
                failures.append((time.monotonic(), rank, f"it died with exit code {ranks[rank][0].exitcode}"))
                continue
            if failure is not None:
                failures.append((failure[0], rank, failure[1]))
            else:
                results[rank] = torch.load(io.BytesIO(result), weights_only=False)
        if failures:
            # Ranks that wait for a failed one fail as well, at once; one that has stopped says nothing.
            deadline = min(deadline, time.monotonic() + _GRACE)
    stopped = sorted(pending.values())
    if failures:
        _, rank, error = min(failures)
        if stopped and ("timed out" in error.lower() or "timeout" in error.lower()):
            raise RankFailed(f"ranks {stopped} have stopped; rank {rank}, which waited for them, says:\n{error}")
        raise RankFailed(f"rank {rank} failed:\n{error}")
    if stopped:
        raise RankFailed(f"ranks {stopped} did not finish in time")
    return [results[rank] for rank in range(len(ranks))]


def _serve(connection: Connection, port: int, rank: int, world_size: int) -> None:
    """Be a rank: answer calls until the connection ends."""
    faulthandler.enable()  # a rank that crashes in C++ says where it was
    torch.set_num_threads(1)
    # What the server has imported stays. The collector, which `stop` calls, would copy all of it into this process.
    gc.freeze()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dynamo, environment = torch._dynamo.config.save_config(), dict(os.environ)
    server = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    while True:
        try:
            call = connection.recv_bytes()
        except EOFError:
            # Nothing is left to tidy up, and torch takes its time over an orderly exit.
            os._exit(0)
        try:
            number, collectives, function, arguments = pickle.loads(call)
            limit = CommConfig(init_timeout_seconds=int(collectives))
            store = dist.PrefixStore(f"call-{number}", server)
            store.set_timeout(timedelta(seconds=collectives))
            process_group.start(limit, "cpu", store=store, rank=rank, world_size=world_size)
            result = io.BytesIO()
            # Plain pickling would send handles of shared memory, which ends with this process.
            torch.save(function(*arguments), result)
            process_group.stop()
            _forget(dynamo, environment)
            connection.send((None, result.getvalue()))
        except BaseException:
            connection.send(((time.monotonic(), traceback.format_exc()), None))
            # No orderly end: the other ranks may be waiting for this one.
            connection.close()
            os._exit(1)


def _forget(dynamo: bytes, environment: dict[str, str]) -> None:
    """Undo what a call has left in this process: what it compiled, settings, and caches."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch saves settings that it deprecates
        torch._dynamo.config.load_config(dynamo)
    os.environ.clear()
    os.environ.update(environment)
    forget_meshes()
