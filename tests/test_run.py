"""What `make test` reports of its parts: no failure is lost, whatever form it takes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import run

TESTS = {
    "passes": "def test_it(): pass",
    "fails": "def test_it(): assert False",
    "skips": "import pytest\ndef test_it(): pytest.skip('no reason')",
    "breaks": "import nowhere_to_be_found",
    "is empty": "",
    "dies": "import os\ndef test_it(): os._exit(0)",
}


def outcome(folder: Path, text: str) -> run.Outcome:
    file = folder / "test_case.py"
    file.write_text(text)
    pytest_alone = (sys.executable, "-m", "pytest", "-q", "-c", str(folder / "none.ini"), "-p", "no:cacheprovider")
    (folder / "none.ini").write_text("[pytest]\n")
    (found,) = run.side_by_side([[run.Part("case", ((*pytest_alone, str(file)),))]])
    return found


@pytest.mark.parametrize(
    ("name", "good", "closing"),
    [
        ("passes", True, " 1 passed in "),
        ("fails", False, " 1 failed in "),
        ("skips", True, " 1 skipped in "),
        ("breaks", False, " 1 error in "),
        ("is empty", False, " 1 error in "),
        ("dies", False, " 1 error in "),
    ],
)
def test_a_part_is_what_its_tests_are(tmp_path: Path, name: str, good: bool, closing: str) -> None:
    found = outcome(tmp_path, TESTS[name])
    assert found.good == good
    last = run.closing([found], 1.0).splitlines()[-1]
    assert closing in last
    assert last.startswith("=====")


def test_commands_that_fail_or_do_not_start_fail_their_part_and_no_other() -> None:
    bad = run.Part("bad", ((sys.executable, "-c", "raise SystemExit(3)"), ("/nowhere/python",)), counts=False)
    fine = run.Part("fine", ((sys.executable, "-c", ""),), counts=False)
    first, second, third = run.side_by_side([[bad, fine], [fine]])
    assert first.codes == (3, 127)
    assert [first.good, second.good, third.good] == [False, True, True]
    assert " 2 errors in " in run.closing([first, second, third], 1.0)


def test_no_test_is_in_no_part() -> None:
    """What has no mark of a part of its own is in `tests`."""
    lanes = run.parts("here", "hydra-1.4", "optuna", 2, ["-x"])
    words = {part.name: part.commands[0] for lane in lanes for part in lane if part.counts}
    assert all(argv[-1] == "-x" for argv in words.values())
    chosen = {name: argv[argv.index("-m", 2) + 1] for name, argv in words.items()}
    assert chosen == {
        "slurm": "slurm", "hydra-1.4": "composition", "hydra-1.3": "composition", "sweepers": "sweeper",
        "tests": run.REST,
    }  # fmt: skip
    assert (words["hydra-1.4"][0], words["hydra-1.3"][0]) == ("hydra-1.4", "here")
