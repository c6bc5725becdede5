"""When and how a run saves: cadence, retention, the background, and what happens when a save fails."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from danling_conf.checkpoint import durable, folder, manifest
from danling_conf.checkpoint.background import Background, SaveFailed
from danling_conf.checkpoint.folder import Folder
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.checkpoint.writing import Writer
from danling_conf.records.run_lock import LostRun
from danling_conf.runner.cadence import cadence_of
from danling_conf.schema import Layout
from danling_conf.schema.checkpoint import CheckpointConfig
from danling_conf.schema.files import RUN_LOCK
from tests.support.resumed_runs import checkpoints, pointed, settings_of, splits, start, train
from tests.support.small import DropoutNet, loss

pytestmark = pytest.mark.slow


def names(*steps: int) -> list[str]:
    return [f"ckpt-s{step:08d}" for step in steps]


def test_the_newest_of_the_history_are_kept(tmp_path: Path) -> None:
    done = train(tmp_path, {"steps": 9, "eval_interval": 100, "checkpoint": {"interval": 2, "keep_latest_k": 2}})
    assert checkpoints(done["run"]) == ["best", *names(8, 9), "latest"]
    assert pointed(done["run"])["latest"] == "ckpt-s00000009"


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_that_another_attempt_has_taken_is_no_fault_of_the_disk(tmp_path: Path, mode: str) -> None:
    """The attempt that lost it ends by saying so, and leaves the checkpoints as they are."""
    runner = start(tmp_path, {"steps": 50, "checkpoint": {"interval": 2, "async_mode": mode}})
    run = runner.world.attempt.run_directory
    before: list[str] = []

    def trained() -> None:
        try:
            runner.prepare(DropoutNet, splits(), loss=loss)
            for batch in runner.batches("train"):
                runner.step(batch)
                if runner.global_step == 3:
                    runner.checkpoints.drain()
                    before.extend(checkpoints(run))
                    (run / RUN_LOCK).write_text("process 2 on elsewhere\ntoken 0123456789abcdef\n")
        finally:
            runner.close()

    with pytest.raises(LostRun, match="another attempt has taken over the run"):
        trained()
    assert checkpoints(run) == before


def test_what_a_name_points_to_is_kept_however_old(tmp_path: Path) -> None:
    settings = {"steps": 8, "eval_interval": 2, "optim": {"lr": 0.0}, "checkpoint": {"interval": 1, "keep_latest_k": 1}}
    done = train(tmp_path, settings)  # nothing improves after the first evaluation
    assert pointed(done["run"]) == {"best": "ckpt-s00000002", "latest": "ckpt-s00000008"}
    assert checkpoints(done["run"]) == ["best", *names(2, 8), "latest"]


@pytest.mark.parametrize(
    ("settings", "per_epoch", "expected"),
    [
        ({"steps": 100}, 7, (10, None, False)),
        ({"steps": 19}, 7, (None, None, False)),  # one at each step
        ({"steps": 20}, None, (2, None, False)),
        ({"steps": 19, "checkpoint": {"interval": 1}}, 7, (1, None, True)),
        ({"epochs": 3}, 7, (None, 1, False)),
        ({"epochs": 3}, 1, (None, None, False)),  # an epoch is a step
        ({"epochs": 30}, 1, (None, 3, False)),
        ({"epochs": 30}, None, (None, 3, False)),
        ({"epochs": 30, "checkpoint": {"interval": 2}}, 1, (None, 2, True)),
    ],
)
def test_the_cadence_when_it_is_unset(
    tmp_path: Path, settings: dict[str, Any], per_epoch: int | None, expected: tuple[Any, ...]
) -> None:
    cadence = cadence_of(settings_of(tmp_path, settings), per_epoch)
    assert (cadence.save_every, cadence.save_epochs, cadence.keeps_history) == expected


def test_unasked_checkpoints_are_not_kept(tmp_path: Path) -> None:
    done = train(tmp_path, {"steps": 23, "eval_interval": 100}, kill_at=21)
    assert checkpoints(done["run"]) == [*names(20), "latest"]


class Slow(Writer):
    """Takes its time, and notes how many write at once."""

    writing, most, seconds = 0, 0, 0.15

    def write_checkpoint(self, snapshot: Any) -> None:
        Slow.writing += 1
        Slow.most = max(Slow.most, Slow.writing)
        time.sleep(self.seconds)
        super().write_checkpoint(snapshot)
        Slow.writing -= 1


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[Slow]:
    Slow.writing = Slow.most = 0
    monkeypatch.setattr("danling_conf.checkpoint.manager.Writer", Slow)
    return Slow


def test_saves_wait_for_each_other_and_say_so(tmp_path: Path, slow: type[Slow]) -> None:
    done = train(tmp_path, {"steps": 4, "eval_interval": 100, "checkpoint": {"interval": 1}})
    assert slow.most == 1
    log = (done["attempt"] / "run.log").read_text()
    assert "ckpt-s00000003 waits for the checkpoint ckpt-s00000002, which is still being written" in log
    assert checkpoints(done["run"]) == ["best", *names(1, 2, 3, 4), "latest"]


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, slow: type[Slow]) -> None:
    for mode, goes_on in (("async", True), ("disabled", False)):
        runner = start(tmp_path, {"steps": 2, "eval_interval": 9, "checkpoint": {"interval": 1, "async_mode": mode}})
        try:
            runner.prepare(DropoutNet, splits(), loss=loss)
            batches = runner.batches("train")
            runner.step(next(batches))
            folder = runner.world.attempt.run_directory / "checkpoints"
            assert (not (folder / "latest").exists()) is goes_on
            runner.checkpoints.drain()
            assert pointed(folder.parent)["latest"] == "ckpt-s00000001"
        finally:
            runner.close()


def test_a_checkpoint_is_what_it_was_when_it_was_asked_for(tmp_path: Path, slow: type[Slow]) -> None:
    """Written late, while training changes everything, it is the one that is written at once."""
    ends = []
    for mode in ("async", "disabled"):
        part = train(
            tmp_path / mode, {"steps": 8, "eval_interval": 9, "checkpoint": {"interval": 2, "async_mode": mode}}
        )
        early = part["run"] / "checkpoints" / "ckpt-s00000002"
        again = train(tmp_path / mode, {"steps": 8, "eval_interval": 9, "resume": str(early)})
        assert again["losses"] == part["losses"][2:]
        ends.append((part["losses"], (early / "state.pt").read_bytes(), (early / "rank-0.pt").read_bytes()))
    assert ends[0] == ends[1]


def test_a_save_that_fails_in_the_background_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = durable.write_file

    def write(path: Path, content: bytes) -> Any:
        if "ckpt-s00000002" in str(path):
            raise OSError(5, "Input/output error", str(path))
        return real(path, content)

    monkeypatch.setattr(durable, "write_file", write)
    runner = start(tmp_path, {"steps": 50, "checkpoint": {"interval": 1}})
    with pytest.raises(SaveFailed, match=r"ckpt-s00000002: the checkpoint could not be written: Input/output error: /"):
        runner.fit(DropoutNet, splits(), loss=loss)
    run = runner.world.attempt.run_directory
    assert checkpoints(run) == [*names(1), "latest"]  # what was begun is gone
    monkeypatch.undo()
    again = train(tmp_path, {"steps": 4, "auto_resume": True, "checkpoint": {"interval": 1}})
    assert (again["began"], again["step"]) == (1, 4)


def test_the_end_waits_no_longer_than_it_may(tmp_path: Path, slow: type[Slow], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow, "seconds", 5.0)
    runner = start(tmp_path, {"steps": 1, "checkpoint": {"wait_timeout": 0.1}})
    with pytest.raises(SaveFailed, match=r"was not written within checkpoint.wait_timeout=0.1 seconds"):
        runner.fit(DropoutNet, splits(), loss=loss)
    patient = start(tmp_path, {"steps": 1, "seed": 9, "checkpoint": {"wait_timeout": 60.0}})
    monkeypatch.setattr(slow, "seconds", 0.2)
    patient.fit(DropoutNet, splits(), loss=loss)
    assert pointed(patient.world.attempt.run_directory)["latest"] == "ckpt-s00000001"


def test_one_job_at_a_time_and_failures_are_told_once() -> None:
    background, gate = Background(), threading.Event()
    background.start("the first", gate.wait)  # type: ignore[arg-type]
    assert background.busy
    with pytest.raises(RuntimeError, match="the first is still being written"):
        background.start("the second", lambda: None)
    gate.set()
    background.wait(float("inf"))

    def fail() -> None:
        raise SaveFailed("no")

    background.start("the third", fail)
    with pytest.raises(SaveFailed):
        background.wait()
    background.check()


@pytest.mark.parametrize(
    ("settings", "ranks", "mode"),
    [
        ({}, 1, "async"),
        ({"async_enabled": False}, 1, "disabled"),
        ({"async_enabled": False, "async_mode": "async_with_pinned_mem"}, 1, "async_with_pinned_mem"),
        ({"async_mode": "disabled"}, 2, "disabled"),
        ({}, 2, "async"),
        ({"dedicated_async_process_group": False}, 2, "disabled"),
        ({"dedicated_async_process_group": False}, 1, "async"),
    ],
)
def test_how_it_is_written(tmp_path: Path, settings: dict[str, Any], ranks: int, mode: str) -> None:
    section = CheckpointConfig(**settings)
    manager = CheckpointManager(section, tmp_path, rank=0, layout=Layout(replicate=ranks), layout_name="")
    assert manager.mode == mode
    assert manager.backend == ("file" if ranks == 1 else "dcp")


def test_the_group_of_saving_has_the_backend_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("danling_conf.parallel.process_group.separate", asked.append)
    settings = {"steps": 2, "checkpoint": {"async_process_group_backend": "mpi"}}
    train(tmp_path, settings)
    assert asked == ["mpi"]


def test_a_checkpoint_that_is_being_read_is_not_removed(tmp_path: Path) -> None:
    settings = {"eval_interval": 100, "checkpoint": {"interval": 1, "keep_latest_k": 1}}
    part = train(tmp_path, {**settings, "steps": 2}, kill_at=2)
    read = part["run"] / "checkpoints" / "ckpt-s00000002"
    with folder.reading(read):
        train(tmp_path, {**settings, "steps": 5, "resume": str(part["run"])}, kill_at=5)
        assert checkpoints(part["run"]) == [*names(2, 5), "latest"]
        manifest.verify(read, manifest.read(read))
    train(tmp_path, {**settings, "steps": 6, "resume": str(part["run"])}, kill_at=6)
    assert checkpoints(part["run"]) == [*names(6), "latest"]


def test_a_checkpoint_that_is_gone_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(manifest.Broken, match="there is no such file"), folder.reading(tmp_path / "ckpt-s00000001"):
        pass


def test_what_a_killed_process_left_is_put_right(tmp_path: Path) -> None:
    """Between the two renames of a replacement; while something was removed; while something was written."""
    part = train(tmp_path, {"steps": 4, "eval_interval": 100, "checkpoint": {"interval": 2}})
    place = part["run"] / "checkpoints"
    os.rename(place / "ckpt-s00000004", place / ".ckpt-s00000004.old")
    for left in (".ckpt-s00000001.gone", ".ckpt-s00000006.tmp"):
        (place / left).mkdir()
    assert Folder(place).pointed("latest") is None
    again = train(tmp_path, {"steps": 4, "eval_interval": 100, "checkpoint": {"interval": 2}, "auto_resume": True})
    assert (again["began"], again["losses"]) == (4, [])
    assert checkpoints(part["run"]) == ["best", *names(2, 4), "latest"]
    manifest.verify(place / "latest", manifest.read(place / "latest"))


def test_an_unfinished_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = train(tmp_path, {"steps": 2, "checkpoint": {"interval": 1}})
    (part["run"] / "checkpoints" / ".ckpt-s00000009.tmp").mkdir()
    train(tmp_path, {"steps": 3, "checkpoint": {"interval": 1}, "auto_resume": True})
    assert "ckpt-s00000009 was not finished" in capsys.readouterr().out
    assert ".ckpt-s00000009.tmp" not in checkpoints(part["run"])
