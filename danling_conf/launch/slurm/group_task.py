"""Task of a replica group on Slurm: starts the group's ranks on this node, and ends them all when one dies.

`python -m danling_conf.launch.slurm.group_task JSON`. It imports no torch. Signals come from Slurm, and as numbers, a
line each, from the job's own process through standard input.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from danling_conf.launch.groups import share_of_devices
from danling_conf.launch.rank import REPEATED_VARIABLE
from danling_conf.launch.rank_error import WorkersFailed, WorkersInterrupted
from danling_conf.launch.slurm import queries, requeue
from danling_conf.launch.workers import POLL_SECONDS, Workers, signals_noted
from danling_conf.records.status import Status, outcome_of
from danling_conf.schema.files import write_whole
from danling_conf.topology.rendezvous import ADDRESS_VARIABLE, address_of_node

_NOTICED_SECONDS = 400.0
"""Longer than Slurm takes to declare a node down (SlurmdTimeout, 300 s by default)."""


def main() -> int:
    """Run the group that the command line describes. Returns the exit code."""
    task = json.loads(sys.argv[1])
    with signals_noted() as received:
        threading.Thread(target=_listen, args=(received,), daemon=True).start()
        environment = {**task["environment"], REPEATED_VARIABLE: "1", **_address(alone=task["alone"])}
        environment |= share_of_devices(task["place"], task["groups_here"], task["world_size"])
        workers = Workers(
            task["command"],
            task["world_size"],
            Path(task["attempt"]),
            environment,
            numbered_from=task["numbered_from"],
        )
        passed = 0
        try:
            while workers.running():
                for number in received[passed:]:
                    workers.pass_on(number)
                    passed += 1
                if workers.died or signal.SIGKILL in received:
                    workers.kill()
                time.sleep(POLL_SECONDS)
        finally:
            workers.kill()
    failure = workers.failure()
    write_whole(Path(task["report"]), json.dumps(_report(failure)) + "\n")
    if failure is not None and os.environ.get("SLURMD_NODENAME") != task["first_host"]:
        _requeue_without(task["first_host"])
    return outcome_of(failure).exit_code


def _requeue_without(host: str) -> None:
    """Put the job back into the queue where the node of its own process is lost: nobody else is left who could, and
    Slurm keeps a job that may lose nodes."""
    deadline = time.monotonic() + _NOTICED_SECONDS
    while time.monotonic() < deadline:
        try:
            state = queries.node_state(host)
            if "DOWN" in state:
                requeue.requeue(queries.own_job(), int(os.environ.get("SLURM_RESTART_COUNT", "0")))
                return
        except queries.SlurmUnavailable as error:
            print(error, file=sys.stderr, flush=True)
            return
        if "NOT_RESPONDING" not in state and not state.endswith("*"):  # it answers
            return
        time.sleep(1.0)


def _listen(received: list[int]) -> None:
    """Take orders; without the process that gives them, save and leave."""
    for line in sys.stdin:
        received.append(int(line))
    received.append(signal.SIGTERM)


def _address(*, alone: bool) -> dict[str, str]:
    """The address at which groups on other nodes reach this one: that by which Slurm itself does."""
    node = os.environ.get("SLURMD_NODENAME")
    return {} if alone or node is None else {ADDRESS_VARIABLE: socket.gethostbyname(address_of_node(node))}


def _report(failure: WorkersFailed | WorkersInterrupted | None) -> dict[str, Any]:
    if failure is None:
        return {"status": Status.COMPLETED}
    if isinstance(failure, WorkersInterrupted):
        return {"status": Status.INTERRUPTED, "signal": failure.number}
    found = {"rank": failure.rank, "exit_code": failure.exit_code, "message": str(failure)}
    return {"status": failure.status, **found}


if __name__ == "__main__":
    sys.exit(main())
