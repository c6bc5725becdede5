"""A full and a read-only disk: the run fails and says why, and what was saved before stays usable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import REPOSITORY

pytestmark = pytest.mark.slow


def _can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    tried = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="no mount namespaces here, so no small disk can be made")
def test_a_disk_that_takes_no_more(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "tests.crash.disks", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
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


@pytest.mark.skipif(not _can_mount(), reason="no mount namespaces here, so no small disk can be made")
def test_a_disk_that_is_full_while_a_run_trains(tmp_path: Path) -> None:
    """One line says so. Training goes on, or fails by the word of what it cannot do without; its end is recorded."""
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "tests.crash.full", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    goes_on, fails = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"case"')]
    for found in (goes_on, fails):
        assert "Logging error" not in found["err"]
        assert found["err"].count("records miss what cannot be written") == 1, found
    assert (goes_on["code"], goes_on["state"]["status"]) == (0, "completed"), goes_on
    assert "Traceback" not in goes_on["err"]
    assert "step=60 " in goes_on["out"]
    assert (fails["code"], fails["state"]["status"]) == (1, "failed")
    assert "the checkpoint could not be written: No space left on device" in fails["state"]["error"]
    assert "Traceback" not in fails["err"]
    assert fails["err"].count("the checkpoint could not be written") == 1
