"""Parent of a process: a rank, or a job of a local sweep, saves and leaves when the command that started it is gone.

A parent killed by SIGKILL cannot stop its children, and orphans would keep their GPUs and the run's lock. The kernel's
own signal of a parent's death (prctl) is of no use: it is that of a thread, and is sent again for each thread of a
parent that ends, so that a child takes the second one for the order to leave without saving.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping

from danling_conf.records.status import exit_code_of_signal
from danling_conf.records.stopped import stop_is_noted

_VARIABLE = "DANLING_CONF_PARENT"
"""Environment variable that holds the process id of the parent."""
_SECONDS = 0.2


def as_parent() -> Mapping[str, str]:
    """Environment variables for the children of this process."""
    return {_VARIABLE: str(os.getpid())}


def end_with_parent() -> None:
    """Watch the parent from now on: SIGTERM to this process when it is gone, once, and not where a signal has already
    asked it to stop. Leaves at once where the parent is gone by now.

    Nothing where no process of ours started this one.
    """
    # Removed: what this process starts, such as a script of the user's, is watched by nobody.
    parent = os.environ.pop(_VARIABLE, "")
    if not parent.isdigit():
        return
    if os.getppid() != int(parent):
        print("not started: the command that started this process is gone", file=sys.stderr, flush=True)
        sys.exit(exit_code_of_signal(signal.SIGTERM))
    threading.Thread(target=_watch, args=(int(parent),), name="danling-conf-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    if not stop_is_noted():
        os.kill(os.getpid(), signal.SIGTERM)
