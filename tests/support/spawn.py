"""Real gloo ranks for a test: forked from a server that has imported torch once, ended by handle whatever happens."""

from __future__ import annotations

import faulthandler
import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from danling_conf.parallel import process_group
from danling_conf.schema.process import CommConfig

_PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint",
    "torch.distributed.pipelining", "torch._dynamo", "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama", __name__,
]  # fmt: skip


_GRACE = 3.0
"""Seconds in which ranks notice that another has failed."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish."""


def run(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120, collectives: float = 60
) -> list[Any]:
    """Call `function(*arguments)` on `world_size` gloo ranks of one process group; returns their results by rank.

    `function` and what it returns must pickle. Raises RankFailed with the traceback of the rank that failed first;
    where that waited `collectives` seconds for a rank that has stopped, with its name.
    """
    # A fork of this process could inherit locked threads (autograd, OpenMP); the server has none.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # The server of the store lives here, so that it outlives any rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[tuple[Any, Connection]] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank,
                args=(theirs, store.port, rank, world_size, collectives, function, arguments),
                daemon=True,
            )
            process.start()
            theirs.close()
            ranks.append((process, ours))
        return _collect(ranks, time.monotonic() + timeout)
    finally:
        for process, connection in ranks:
            process.join(timeout=1)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()


def _collect(ranks: list[tuple[Any, Connection]], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, str]] = []
    pending = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            rank = pending.pop(connection)  # type: ignore[index]
            try:
                failure, result = connection.recv()  # type: ignore[union-attr]
            except EOFError:
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


def _rank(
    connection: Connection,
    port: int,
    rank: int,
    world_size: int,
    collectives: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    faulthandler.enable()  # a rank that crashes in C++ says where it was
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        limit = CommConfig(init_timeout_seconds=int(collectives))
        process_group.start(limit, "cpu", store=store, rank=rank, world_size=world_size)
        result = io.BytesIO()
        # Plain pickling would send handles of shared memory, which ends with this process.
        torch.save(function(*arguments), result)
        process_group.stop()
        connection.send((None, result.getvalue()))
    except BaseException:
        connection.send(((time.monotonic(), traceback.format_exc()), None))
        # No orderly end: the other ranks may be waiting for this one.
        connection.close()
        os._exit(1)
