"""Damaged records: every file of a run and of a sweep, in every way, under every command that shows or continues one.

No command shows a stack trace or hangs. A command that reads the file names it, and shows the rest.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from tests.support.records import ATTEMPT, write_run, write_sweep_of

pytestmark = pytest.mark.slow

COMPLETED = {"status": "completed", "score": 1.5, "error": None}
FAILED = {"status": "failed", "score": None, "error": "broken"}
_HANGS_SECONDS = 60


@pytest.fixture(autouse=True)
def _never_hangs() -> Iterator[None]:
    """A FIFO that somebody opens to read from would hold the whole suite up."""

    def hangs(number: int, frame: Any) -> None:
        raise TimeoutError("a command hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(_HANGS_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


def other_types(path: Path) -> None:
    """Every value is of a type that nobody expects there."""
    lines = [
        {name: [[value]] if name != "key" else value for name, value in json.loads(line).items()}
        for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def huge(path: Path) -> None:
    """Every value is a number that no float, no clock and no array index takes."""
    lines = [{name: "@" if name != "key" else value for name, value in json.loads(line).items()}
             for line in path.read_text().splitlines()]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text.replace('"@"', "9" * 400))


def torn(path: Path) -> None:
    """The first half of the file, and what a later writer added."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\n{}\n")


def truncated(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def unreadable(path: Path) -> None:
    """Whoever opens it is refused, root as well."""
    path.chmod(0)


def refuse_to_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a file without permissions be one for root as well."""

    def refusing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(name: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(name, int) and os.path.lexists(name) and not os.lstat(name).st_mode & 0o777:
                raise PermissionError(13, "Permission denied", str(name))
            return real(name, *arguments, **options)

        return call

    monkeypatch.setattr(os, "open", refusing(os.open))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", refusing(io.open))


def flipped(path: Path) -> None:
    """One bit of each sixteenth byte is another: text that is still JSON, or is not."""
    content = bytearray(path.read_bytes())
    for place in range(7, len(content), 16):
        content[place] ^= 1
    path.write_bytes(content)


SILENT = ("deleted", "flipped")
"""Damage that cannot be told from a file that was never there, or was written so."""
SPECIAL = {
    "deleted": Path.unlink,
    "a link to itself": replaced(lambda path: path.symlink_to(path)),
    "a FIFO": replaced(os.mkfifo),
    "a directory": replaced(Path.mkdir),
    "a device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": replaced(lambda path: path.symlink_to("nowhere/at/all")),
    "unreadable": unreadable,
}
OF_TEXT = {**SPECIAL, "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00\xd8\n")}
OF_JSON = {
    **OF_TEXT,
    "flipped": flipped,
    "truncated": truncated,
    "empty": lambda path: path.write_text("\n"),
    "torn": torn,
    "no object": lambda path: path.write_text("[1, 2]\n"),
    "no keys": lambda path: path.write_text("{}\n"),
    "other types": other_types,
    "huge numbers": huge,
    "very huge numbers": lambda path: path.write_text('{"status": ' + "9" * 10000 + "}\n"),
    "deep": lambda path: path.write_text('{"a":' * 500 + "1" + "}" * 500 + "\n"),
    "very deep": lambda path: path.write_text("[" * 200_000 + "\n"),
    "half a surrogate": lambda path: path.write_text('{"status": "\\ud800", "config": {"\\ud800": "\\ud800"}}\n'),
}
SHOW = ("runs", "runs --json", "runs --csv", "runs --html", "watch --once", "watch --once --json", "report", "logs",
        "checkpoints", "resume", "cancel")  # fmt: skip
"""No process starts: what would be resumed has completed, or its script is gone."""
OF_LINES = {kind: damage for kind, damage in OF_JSON.items() if kind != "empty"}
"""A run that has just started has no line yet."""
EVENTS = [{"time": 1767225600.0 + number, "group": number % 2, "event": event, "step": number, "why": ""}
          for number, event in enumerate(["started", "started", "joined", "joined", "died"])]  # fmt: skip
BESIDE = {
    "ranks.lock": "",
    "metrics.index": "{}\n",
    "texts.jsonl": '{"time": 1767225600.0, "step": 1, "text": "a"}\n',
    f"attempts/{ATTEMPT}/groups.jsonl": "".join(json.dumps(event) + "\n" for event in EVENTS),
    f"attempts/{ATTEMPT}/error-0.json": '{"message": "broken", "trace": "", "time": 1767225600.0}\n',
    f"attempts/{ATTEMPT}/plan.json": '{"figures": {}}\n',
    f"attempts/{ATTEMPT}/config.yaml": "steps: 10\n",
    f"attempts/{ATTEMPT}/canonical.json": "{}\n",
    f"attempts/{ATTEMPT}/.hydra/config.yaml": "steps: 10\n",
}
"""Files that only some runs have, or that no command needs."""
OF_RUN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "run.json": (OF_JSON, ("runs", "runs --json", "report")),
    "run.lock": (OF_TEXT, ()),
    "metrics.jsonl": (OF_LINES, ("report", "runs --html")),
    f"attempts/{ATTEMPT}/frozen.json": (OF_JSON, ("runs", "watch --once", "report", "checkpoints")),
    f"attempts/{ATTEMPT}/result.json": (OF_JSON, ("runs", "runs --json", "watch --once", "report", "resume", "cancel")),
    f"attempts/{ATTEMPT}/environment.json": (OF_JSON, ("report",)),
    f"attempts/{ATTEMPT}/difference.yaml": (SPECIAL, ("report",)),
    f"attempts/{ATTEMPT}/git.diff": (SPECIAL, ("report",)),
    f"attempts/{ATTEMPT}/rank-0.log": (SPECIAL, ()),
    f"attempts/{ATTEMPT}/groups.jsonl": (OF_LINES, ("watch --once", "report")),
    f"attempts/{ATTEMPT}/error-0.json": (OF_JSON, ()),
    **dict.fromkeys(
        [name for name in BESIDE if name.rpartition("/")[2] not in ("groups.jsonl", "error-0.json")], (SPECIAL, ())
    ),
    "heartbeats/rank-0.json": (OF_JSON, ("runs", "watch --once", "report")),
    "checkpoints/ckpt-s00000005/checkpoint.json": (OF_JSON, ("checkpoints",)),
}
"""Every file of a run; how it is damaged; the commands that must name it."""
OF_SWEEP: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sweep.json": (OF_JSON, ("runs --json", "runs --html", "resume", "cancel")),
    "jobs.jsonl": (OF_JSON, ("runs", "runs --json", "watch --once", "resume", "cancel", "logs", "checkpoints")),
    "following.lock": (OF_TEXT, ()),
    "git.diff": (SPECIAL, ()),
    "multirun.yaml": (SPECIAL, ()),
    "jobs/000000000000/job.json": (OF_JSON, ("runs", "runs --json", "runs --html")),
    "jobs/000000000000/error-0.json": (OF_JSON, ()),
    "jobs/000000000000/output.log": (SPECIAL, ()),
}


def command(words: str, directory: Path, page: Path) -> tuple[int, str]:
    """Run a command; its exit code and all that it printed."""
    name, *flags = words.split()
    argv = [name, str(directory), *flags, *([str(page)] if "--html" in flags else [])]
    if name == "report":
        argv += ["--html", str(page)]
    if name == "logs" and directory.name == "one":
        argv.append("0")
    return main(argv), " ".join(argv)


def check(directory: Path, file: Path, damages: dict[str, Any], names: tuple[str, ...], remake: Callable[[], None],
          capsys: Any) -> None:  # fmt: skip
    for kind, damage in damages.items():
        remake()
        damage(file)
        for words in SHOW:
            if words == "report" and directory.name == "one":
                continue
            code, argv = command(words, directory, directory.parent / "page.html")
            out, err = capsys.readouterr()
            what = f"{argv} with {file.name} as {kind}: {code}\n{out}{err}"
            assert code in (0, 1, 2), what
            assert "Traceback" not in out + err, what
            if words.endswith("--json") and code != 2:
                json.loads(out)
            # Text that is not UTF-8 is shown with replacement characters, which is no damage of a text file.
            silent = (*SILENT, "truncated") if file.suffix == ".jsonl" else SILENT  # the last line is being written
            if words in names and kind not in silent and not (kind == "no keys" and file.name == "environment.json"):
                assert file.name in out + err, what


@pytest.mark.parametrize("name", OF_RUN)
def test_a_file_of_a_run(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuse_to_root(monkeypatch)
    made = 0
    run = tmp_path / "run"

    def remake() -> None:
        nonlocal made
        if run.exists():
            run.rename(tmp_path.parent / f"{tmp_path.name}-{made}")
        made += 1
        write_run(run, result=COMPLETED)
        for beside, content in BESIDE.items():
            (run / beside).parent.mkdir(exist_ok=True)
            (run / beside).write_text(content)

    damages, names = OF_RUN[name]
    check(run, run / name, damages, names, remake, capsys)


@pytest.mark.parametrize("name", OF_SWEEP)
def test_a_file_of_a_sweep(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    refuse_to_root(monkeypatch)
    made = 0
    root = tmp_path / "root"

    def remake() -> None:
        nonlocal made
        if root.exists():
            root.rename(tmp_path.parent / f"{tmp_path.name}-{made}")
        made += 1
        sweep = write_sweep_of(root, COMPLETED, COMPLETED)
        for beside in ("following.lock", "git.diff", "multirun.yaml"):
            (sweep.path / beside).touch()

    damages, names = OF_SWEEP[name]
    check(root / "exp" / "sweeps" / "one", root / "exp" / "sweeps" / "one" / name, damages, names, remake, capsys)


@pytest.mark.parametrize("kind", [kind for kind in OF_JSON if kind != "flipped"])
def test_a_damaged_job_is_not_started(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    refuse_to_root(monkeypatch)
    sweep = write_sweep_of(tmp_path, COMPLETED, FAILED)
    file = sweep.path / "jobs" / ("1" * 12) / "job.json"
    OF_JSON[kind](file)
    assert main(["resume", str(sweep.path)]) == 2
    err = capsys.readouterr().err
    assert str(file) in err
    assert "Traceback" not in err


def test_the_rest_is_shown(tmp_path: Path, capsys: Any) -> None:
    sweep = write_sweep_of(tmp_path, COMPLETED, FAILED)
    torn(sweep.path / "jobs" / ("0" * 12) / "job.json")
    (tmp_path / "exp" / ("0" * 12) / "run.json").write_text("[")
    assert main(["runs", str(sweep.path)]) == 0
    out, err = capsys.readouterr()
    assert "2 jobs: 1 completed, 1 failed" in out
    assert err.count("job.json") == 1  # once, though it is read for every column
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert [job["state"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["completed", "failed"]
    assert main(["runs", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    assert "failed" in (tmp_path / "page.html").read_text()


def test_a_configuration_without_content_is_reported(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run", result=COMPLETED)
    file = run / "attempts" / ATTEMPT / "frozen.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "config": {}}))
    assert main(["report", str(run), "--html", str(tmp_path / "page.html")]) == 0
    assert "completed" in (tmp_path / "page.html").read_text()


def test_a_sweep_whose_program_was_moved_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep_of(tmp_path, {"status": "failed", "score": None, "error": "broken"})
    (record,) = sweep.ledger.records().values()
    assert main(["resume", str(sweep.path)]) == 2
    shown = capsys.readouterr().err
    assert f"there is no {tmp_path / 'gone.py'} any more" in shown
    assert f"python TRAIN.py steps=10 resume={record.run}" in shown
