"""A full and a read-only disk: the run fails and says why, and what was saved before stays usable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import REPOSITORY


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _can_mount(), reason="no mount namespaces here, so no small disk can be made"),
]


def _in_namespace(module: str, folder: Path) -> list[dict[str, Any]]:
    """What a module prints of its cases, run where it may mount."""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", module, str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]


def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    found = _in_namespace("tests.crash.disks", tmp_path)
    assert len(found) == 8
    for line in found:
        fault = line["case"][-1]
        reason = "No space left on device" if fault == "full" else "Read-only file system"
        for rank in line["ranks"]:
            assert reason in rank["error"], line
            assert "the checkpoint could not be written" in rank["error"]
            assert "earlier checkpoints are complete" in rank["error"]
            assert ("bytes are free" in rank["error"]) == (fault == "full")
            assert rank["steps"] == [1, 2]
            assert rank["left"] == []
            # In the background it is noticed a step or two later.
            assert rank["step"] >= 3
            assert rank["again"] == [2, 6]


def test_a_disk_that_is_full_or_read_only_while_a_run_trains(tmp_path: Path) -> None:
    """One line says so. Training goes on, or fails by the word of what it cannot do without; its end is recorded where
    that can be written."""
    *runs, sweep, full_sweep = _in_namespace("tests.crash.full", tmp_path)
    for found in runs:
        assert "Logging error" not in found["err"]
        assert "Traceback" not in found["err"]
        # A save that does not fit gives its bytes back, which may be in time for all lines. On a disk that is read-only
        # for what is opened anew, the open logs and the room for the result take all there is to say.
        least = 1 if found["case"] == "full" else 0
        assert least <= found["err"].count("records miss what cannot be written") <= 1, found
    full, full_saving, full_saving_ranks, closed, closed_saving = runs
    for goes_on in (full, closed):
        assert (goes_on["code"], goes_on["state"]["status"]) == (0, "completed"), goes_on
        assert "step=60 " in goes_on["out"]
        assert goes_on["step"] == 60  # which no record of metrics says
    no_space = "No space left on device"
    for fails, reason in (
        (full_saving, no_space),
        (full_saving_ranks, no_space),
        (closed_saving, "Read-only file system"),
    ):
        assert (fails["code"], fails["state"]["status"]) == (1, "failed"), fails
        assert re.search(f"the checkpoint could not be written: (rank [01]: )?{reason}", fails["state"]["error"]), fails
        assert fails["err"].count("the checkpoint could not be written") == 1
    # The sweep waits for its ledger, and stops in order.
    assert (sweep["code"], "Traceback" in sweep["err"]) == (130, False), sweep
    assert "Read-only file system: the sweep goes on when it can be written again" in sweep["err"]
    assert "SIGINT; waiting for the jobs to save and exit" in sweep["err"]
    # Each job of a sweep says why it failed, in a line; what it prints is a file on that disk, too.
    (failed, why), (refused, rule) = full_sweep["jobs"]
    assert (full_sweep["code"], failed, refused) == (1, "failed", "refused"), full_sweep
    assert "the checkpoint could not be written: No space left on device" in why
    assert "cannot be written: No space left on device" in rule
    assert "Traceback" not in full_sweep["err"]
    assert len(full_sweep["err"].partition("job #1")[0].splitlines()) <= 4
    assert "sweep done: 2 of 2 jobs completed" in full_sweep["again"], full_sweep
