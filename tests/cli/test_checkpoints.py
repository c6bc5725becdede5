"""`danling-conf checkpoints`: listed without torch, broken ones named, exit codes true."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from danling_conf.checkpoint import durable, manifest
from danling_conf.checkpoint.manifest import EXPORTED, Manifest
from danling_conf.cli.main import main
from danling_conf.schema import Layout
from tests.packaging.test_layers import in_fresh_interpreter

SINGLE = Layout()


def save(
    folder: Path, step: int, *, layout: Layout = SINGLE, named: str = "single", facts: str = manifest.FACTS
) -> Path:
    """A checkpoint as far as a listing reads it."""
    folder.mkdir(parents=True)
    sums = {name: durable.write_file(folder / name, bytes(5000 * (index + 1))) for index, name in enumerate(("a", "b"))}
    content = Manifest(
        step=step, epoch=step // 10, saved="2025-03-01T12:00:00+00:00", backend="dcp", layout=named,
        degrees=layout.degrees(), fsdp=layout.fsdp, history=True, optimizer="AdamW", files=sums,
    )  # fmt: skip
    manifest.write(folder, content, facts)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "lin" / "exp" / "0123456789ab"
    place = run / "checkpoints"
    save(place / "ckpt-s00000010", 10)
    save(place / "ckpt-s00000020", 20, layout=Layout(shard=8, fsdp=True), named="fsdp8")
    save(place / "export", 20, facts=EXPORTED)
    (place / "best").symlink_to("ckpt-s00000010")
    (place / "latest").symlink_to("ckpt-s00000020")
    (run / "run.json").write_text("{}")
    return run


def listed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, list[list[str]], str]:
    code = main(["checkpoints", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, [line.split() for line in captured.out.splitlines()], captured.out + captured.err


def test_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = listed(capsys, run)
    assert code == 0
    assert lines[0] == [f"{run}:", "2", "checkpoints", "in", "checkpoints/"]
    assert lines[1] == ["checkpoint", "step", "epoch", "saved", "size", "layout", "backend", "state"]
    when = ["2025-03-01", "12:00:00"]
    assert lines[2] == ["ckpt-s00000010", "10", "1", *when, "15", "kB", "single", "dcp", "whole", "best"]
    assert lines[3] == ["ckpt-s00000020", "20", "2", *when, "15", "kB", "fsdp8", "dcp", "whole", "latest"]
    assert lines[4][0] == "export"
    assert lines[4][-3:] == ["the", "model", "alone"]


def test_verifying(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints" / "ckpt-s00000020" / "a"
    path.write_bytes(bytes([1]) + bytes(4999))
    code, lines, _ = listed(capsys, run)
    assert (code, lines[3][-2]) == (0, "whole")  # sizes are right
    code, lines, text = listed(capsys, run, "--verify")
    assert code == 1
    assert (lines[2][-2], lines[3][-2]) == ("verified", "broken")
    assert f"broken: {path}: it cannot be read: its checksum differs" in text


@pytest.mark.parametrize("how", ["short", "lost", "facts", "export"])
def test_what_is_broken_is_named(run: Path, capsys: pytest.CaptureFixture[str], how: str) -> None:
    place = run / "checkpoints"
    path = {"facts": place / "ckpt-s00000020" / "checkpoint.json", "export": place / "export" / "b"}.get(
        how, place / "ckpt-s00000020" / "b"
    )
    path.unlink() if how == "lost" else path.write_bytes(b"{")
    code, lines, text = listed(capsys, run)
    assert code == 1
    assert f"broken: {path}: " in text
    assert sum("broken" in line for line in lines[2:5]) == 1


def test_what_is_unfinished_and_what_points_to_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run / "checkpoints" / ".ckpt-s00000030.tmp"
    left.mkdir()
    (run / "checkpoints" / "best").unlink()
    (run / "checkpoints" / "best").symlink_to("ckpt-s00000005")
    code, _, text = listed(capsys, run)
    assert code == 0
    assert f"unfinished: {left}" in text
    assert "best points to nothing" in text


def test_directories_above_a_run_and_sweeps(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run.with_name("ba9876543210")
    other.mkdir()
    (other / "run.json").write_text("{}")
    code, _, text = listed(capsys, run.parents[1])
    assert code == 0
    assert text.count(" in checkpoints/") == 2
    assert f"{other}: 0 checkpoints in checkpoints/" in text
    sweep = run.parent / "sweeps" / "first"
    sweep.mkdir(parents=True)
    (sweep / "jobs.jsonl").write_text(
        "".join(json.dumps({"key": "k", "job": 0, "run": str(run)}) + "\n" for _ in range(2))
    )
    _, _, text = listed(capsys, sweep)
    assert text.count(" in checkpoints/") == 1


def test_another_folder_of_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(run / "checkpoints", run / "saved")
    attempt = run / "attempts" / "20250301-120000"
    attempt.mkdir(parents=True)
    settings: Mapping[str, Any] = {"config": {"checkpoint": {"dir_name": "saved"}}}
    (attempt / "frozen.json").write_text(json.dumps(settings))
    _, lines, _ = listed(capsys, run)
    assert lines[0][-1] == "saved/"
    assert len(lines) == 5


@pytest.mark.parametrize("place", ["nowhere", "."])
def test_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    code, _, text = listed(capsys, tmp_path / place)
    assert code == 2
    assert f"RUN={tmp_path / place}" in text
    assert "fix: name a run's directory" in text


def test_torch_is_not_needed(run: Path, tmp_path: Path) -> None:
    in_fresh_interpreter(
        tmp_path,
        f"from danling_conf.cli.main import main; raise SystemExit(main(['checkpoints', {str(run)!r}, '--verify']))",
    )
