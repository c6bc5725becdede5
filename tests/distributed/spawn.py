"""Real gloo ranks for a test: forked from a server that has imported torch once, ended by handle whatever happens."""

from __future__ import annotations

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

from danling_conf.build import process_group
from danling_conf.schema.process import CommConfig

_PRELOADED = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", __name__]


class RankFailed(AssertionError):
    """A rank raised, died or did not finish."""


def run(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """Call `function(*arguments)` on `world_size` gloo ranks of one process group; returns their results by rank.

    `function` and what it returns must pickle. Raises RankFailed with the traceback of the rank that failed first.
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
                target=_rank, args=(theirs, store.port, rank, world_size, function, arguments), daemon=True
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
    pending = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(pending.values())} did not finish in time")
        for connection in ready:
            rank = pending.pop(connection)  # type: ignore[index]
            try:
                error, result = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                ranks[rank][0].join(timeout=5)
                raise RankFailed(f"rank {rank} died with exit code {ranks[rank][0].exitcode}") from None
            if error is not None:
                raise RankFailed(f"rank {rank} failed:\n{error}")
            results[rank] = torch.load(io.BytesIO(result), weights_only=False)
    return [results[rank] for rank in range(len(ranks))]


def _rank(
    connection: Connection,
    port: int,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
        process_group.start(CommConfig(init_timeout_seconds=60), "cpu", store=store, rank=rank, world_size=world_size)
        result = io.BytesIO()
        # Plain pickling would send handles of shared memory, which ends with this process.
        torch.save(function(*arguments), result)
        process_group.stop()
        connection.send((None, result.getvalue()))
    except BaseException:
        connection.send((traceback.format_exc(), None))
        # No orderly end: the other ranks may be waiting for this one.
        connection.close()
        os._exit(1)
