"""What srun says of its tasks: which one went first, where no rank could say it itself."""

from __future__ import annotations

import re
from pathlib import Path

_TASK = re.compile(r"^srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,\-]+): (?P<how>.+)$", re.MULTILINE)


def first_death(log: Path, since: int = 0) -> str | None:
    """The first task of a step that ended badly, and how; None where srun tells of none.

    Args:
        log: what the batch script has printed to standard error, over all starts of the job.
        since: bytes that were there when the newest start began.
    """
    try:
        text = log.read_bytes()[since:].decode(errors="replace")
    except OSError:
        return None
    found = _TASK.search(text)
    if found is None:
        return None
    hint = ": memory may have run out" if found["how"] in ("Killed", "Out Of Memory") else ""
    how = "killed (SIGKILL)" if found["how"] == "Killed" else found["how"]
    several = "ranks" if re.search(r"[,\-]", found["ranks"]) else "rank"
    return f"{several} {found['ranks']} on {found['node']}: {how}{hint}"
