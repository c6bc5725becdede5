"""The short form of the crash test; `make crash` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.killing import CASES, PHASES, Case, kill_while_saving
from tests.support.processes import call

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_survives_being_killed_in_every_phase_of_a_save(tmp_path: Path, case: Case) -> None:
    report = call(kill_while_saving, str(tmp_path), case, len(PHASES), 1)
    print(report.line())
    assert all(report.kills[phase] for phase in PHASES)
    assert report.resumed >= len(PHASES) - 2
    assert report.verified
