"""Checkpoints as files: what is kept, what the names point to, and what happens to broken ones."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf import ConfigRefused
from danling_conf.checkpoint import durable, manifest
from tests.runner.test_scheduler import Scripted
from tests.support.resumed_runs import checkpoints, pointed, splits, start, train
from tests.support.small import DropoutNet, Net, Pairs, loss

pytestmark = pytest.mark.slow

SAVED = {"steps": 4, "checkpoint": {"interval": 2}, "eval_interval": 4}


def scored(root: Path, values: list[float], settings: dict[str, Any]) -> Path:
    """A run whose evaluations have these scores; its directory."""
    runner = start(root, {"score_name": "scripted", "score_mode": "min", **settings})
    runner.fit(Net, splits(), loss=loss, metrics={"scripted": Scripted(*values)})
    return runner.world.attempt.run_directory


def names(*steps: int) -> list[str]:
    return [*(f"ckpt-s{step:08d}" for step in steps)]


def test_an_improved_score_and_the_end_are_saved(tmp_path: Path) -> None:
    run = scored(tmp_path, [3.0, 1.0, 2.0, 2.5], {"steps": 8, "eval_interval": 2})
    assert checkpoints(run) == ["best", *names(4, 8), "latest"]
    assert pointed(run) == {"latest": "ckpt-s00000008", "best": "ckpt-s00000004"}


def test_what_no_name_points_to_is_removed(tmp_path: Path) -> None:
    run = scored(tmp_path, [3.0, 2.0, 1.0], {"steps": 6, "eval_interval": 2})
    assert checkpoints(run) == ["best", *names(6), "latest"]


def test_an_interval_makes_a_history(tmp_path: Path) -> None:
    run = scored(tmp_path, [3.0, 1.0, 2.0], {"steps": 9, "eval_interval": 3, "checkpoint": {"interval": 2}})
    assert checkpoints(run) == ["best", *names(2, 4, 6, 8, 9), "latest"]
    assert pointed(run) == {"latest": "ckpt-s00000009", "best": "ckpt-s00000006"}
    kept = {
        name: json.loads((run / "checkpoints" / name / "checkpoint.json").read_text())["history"]
        for name in names(2, 4, 6, 8, 9)
    }
    assert list(kept.values()) == [True, True, True, True, False]


def test_an_interval_of_epochs(tmp_path: Path) -> None:
    run = scored(tmp_path, [1.0, 2.0, 3.0], {"epochs": 3, "checkpoint": {"interval": 2}})
    kept = ["ckpt-e00000001", "ckpt-e00000002", "ckpt-e00000003"]  # the first is the best
    assert checkpoints(run) == ["best", *kept, "latest"]
    assert pointed(run) == {"latest": "ckpt-e00000003", "best": "ckpt-e00000001"}


def test_a_checkpoint_holds_what_it_says(tmp_path: Path) -> None:
    done = train(tmp_path, SAVED)
    folder = done["run"] / "checkpoints" / "latest"
    facts = json.loads((folder / "checkpoint.json").read_text())
    assert (facts["step"], facts["epoch"], facts["backend"], facts["layout"]) == (4, 0, "file", "single")
    assert (facts["history"], facts["optimizer"]) == (True, "AdamW")
    assert sorted(facts["files"]) == ["rank-0.pt", "shared.pt", "state.pt"]
    assert sorted(item.name for item in folder.iterdir()) == ["checkpoint.json", *sorted(facts["files"])]
    state = torch.load(folder / "state.pt", weights_only=True)
    assert all(torch.equal(state[f"model.{name}"], value) for name, value in done["weights"].items())
    assert {name.rpartition(".")[2] for name in state if name.startswith("optimizer.")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    shared = torch.load(folder / "shared.pt", weights_only=True)
    assert sorted(shared) == ["callbacks", "optimizer", "runner", "scaler", "scheduler", "settings"]
    assert shared["runner"]["global_step"] == 4


def test_another_folder_of_checkpoints(tmp_path: Path) -> None:
    done = train(tmp_path, {**SAVED, "checkpoint": {"dir_name": "saved"}})
    assert not (done["run"] / "checkpoints").exists()
    assert (done["run"] / "saved" / "latest" / "state.pt").is_file()
    again = train(tmp_path, {**SAVED, "steps": 5, "checkpoint": {"dir_name": "saved"}, "resume": str(done["run"])})
    assert again["began"] == 4


def test_without_checkpoints_none_is_written_and_others_are_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(tmp_path, SAVED)
    assert "to resume: " in capsys.readouterr().out
    before = checkpoints(done["run"])
    loaded = train(tmp_path, {"steps": 6, "checkpoint": {"load_only": True}, "resume": str(done["run"])})
    assert (loaded["began"], loaded["step"]) == (4, 6)
    assert checkpoints(done["run"]) == before
    fresh = train(tmp_path, {"steps": 2, "checkpoint": {"load_only": True}})
    assert not (fresh["run"] / "checkpoints").exists()
    assert "to resume: " not in capsys.readouterr().out


def test_a_crash_while_saving_leaves_the_checkpoint_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every point of a save, `latest` is a whole checkpoint that a run goes on from."""
    real, calls = os.replace, []

    def replace(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == crash_at and Path(target).parent.name == "checkpoints":
            raise KeyboardInterrupt
        real(source, target)

    interrupted = 0
    for crash_at in range(1, 40):
        calls.clear()
        monkeypatch.setattr(os, "replace", replace)
        saving = {"interval": 1, "async_mode": "disabled"}
        runner = start(tmp_path, {**SAVED, "checkpoint": saving, "seed": crash_at})
        try:
            runner.fit(DropoutNet, {"train": Pairs()}, loss=loss)
            ended = True
        except KeyboardInterrupt:
            ended = False
            interrupted += 1
        monkeypatch.undo()
        if ended and len(calls) < crash_at:
            break
        settings = {"checkpoint": {"interval": 1}, "seed": crash_at, "auto_resume": True}
        again = train(tmp_path, {**SAVED, **settings})
        assert again["step"] == 4
        assert again["began"] >= runner.global_step - 1
    assert interrupted >= 4


Spoil = Callable[[Path], object]


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def garble(path: Path) -> None:
    path.write_text("not what was saved\n")


def flip(path: Path) -> None:
    """One bit, in the middle: torch loads such a file without a word."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_content(path: Path) -> None:
    torch.save([1, 2, 3], path)


BROKEN: list[tuple[str, Spoil]] = [
    *(("state.pt", spoil) for spoil in (truncate, empty, remove, garble, other_content)),
    *(("rank-0.pt", spoil) for spoil in (truncate, empty, remove, other_content)),
    *(("checkpoint.json", spoil) for spoil in (truncate, empty, remove, garble)),
    *((file, flip) for file in ("state.pt", "rank-0.pt", "shared.pt", "checkpoint.json")),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    return train(tmp_path_factory.mktemp("saved"), SAVED)["run"]


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil, in its own root."""
    run = tmp_path / "lin" / "exp" / saved.name
    shutil.copytree(saved, run, symlinks=True)
    return run


@pytest.mark.parametrize(("file", "spoil"), BROKEN)
def test_a_broken_checkpoint_is_refused_with_the_file_and_another_one(
    run: Path, tmp_path: Path, file: str, spoil: Spoil
) -> None:
    spoil(run / "checkpoints" / "latest" / file)
    before = checkpoints(run)
    with pytest.raises(ConfigRefused) as refusal:
        train(tmp_path, {**SAVED, "steps": 6, "resume": str(run)})
    text = str(refusal.value)
    assert text.splitlines()[1] == f"  resume={run}"
    assert f"checkpoints/ckpt-s00000004/{file}: it " in text or f"{file}: there is no such file" in text
    assert f"{run}/checkpoints/ckpt-s00000002" in text.splitlines()[-1]
    assert checkpoints(run) == before
    # What it advises works.
    again = train(tmp_path, {**SAVED, "resume": str(run / "checkpoints" / "ckpt-s00000002")})
    assert (again["began"], again["step"]) == (2, 4)


@pytest.mark.parametrize(("file", "spoil"), BROKEN)
def test_where_the_choice_is_ours_the_newest_whole_one_is_taken_and_the_broken_one_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, spoil: Spoil
) -> None:
    spoil(run / "checkpoints" / "ckpt-s00000004" / file)
    again = train(tmp_path, {**SAVED, "steps": 6, "auto_resume": True})
    assert (again["began"], again["step"], again["run"]) == (2, 6, run)
    assert f"passed over a broken checkpoint: {run}/checkpoints/ckpt-s00000004/{file}: " in capsys.readouterr().out


def test_where_all_are_broken_nothing_is_started(run: Path, tmp_path: Path) -> None:
    for step in (2, 4):
        flip(run / "checkpoints" / f"ckpt-s{step:08d}" / "state.pt")
    before = checkpoints(run)
    with pytest.raises(ConfigRefused, match=r"auto_resume=true\n.*ckpt-s00000004/state.pt.*ckpt-s00000002/state.pt"):
        train(tmp_path, {**SAVED, "steps": 6, "auto_resume": True})
    assert checkpoints(run) == before


def test_no_checkpoint_at_all(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigRefused, match="there is no whole checkpoint in it, nor as its checkpoints/latest"):
        train(tmp_path, {**SAVED, "resume": str(run)})
    with pytest.raises(ConfigRefused, match=f"pretrained={run}"):
        train(tmp_path, {**SAVED, "pretrained": str(run)})


@pytest.mark.parametrize("key", ["resume", "pretrained"])
def test_a_path_that_is_not_there(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigRefused, match=f"{key}=/no/such/run\n.*there is no such file or directory"):
        start(tmp_path, {**SAVED, key: "/no/such/run"})


class Wider(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = torch.nn.Linear(8, 4)


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.third = torch.nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wider, r"of another shape second.weight \(3, 8\) for \(4, 8\), second.bias \(3,\) for \(4,\)"),
        (Deeper, "it lacks third.weight, third.bias"),
        (
            torch.nn.Identity,
            "it lacks own.weight, own.bias; the model lacks first.weight, first.bias, second.weight, second.bias",
        ),
    ],
)
@pytest.mark.parametrize("key", ["resume", "pretrained"])
def test_weights_of_another_model_are_refused(run: Path, tmp_path: Path, model: Any, message: str, key: str) -> None:
    with pytest.raises(ConfigRefused, match=f"its weights do not fit the model: .*{message}") as refusal:
        train(tmp_path, {**SAVED, "steps": 6, key: str(run)}, model=model if model is not torch.nn.Identity else Other)
    assert str(refusal.value).splitlines()[1] == f"  {key}={run}"


class Other(torch.nn.Module):
    """Shares no name with the model that was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.own = torch.nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.own(x)


def test_state_of_another_optimizer_is_refused(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "latest"
    settings = {"steps": 6, "optim": {"type": "sgd", "lr": 0.1}, "resume": str(checkpoint)}
    with pytest.raises(ConfigRefused, match="it was made with the optimizer AdamW, and this run's is SGD"):
        train(tmp_path, settings)


class Bomb:
    """Pickled, it is a call of `os.mkdir`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def sign(folder: Path) -> None:
    """Make the checksums fit, as somebody who crafts a checkpoint would."""
    facts = manifest.read(folder)
    files = {name: durable.sum_of(folder / name) for name in facts.files}
    manifest.write(folder, dataclasses.replace(facts, files=files))


@pytest.mark.parametrize(
    ("key", "file"),
    [("resume", "state.pt"), ("resume", "shared.pt"), ("resume", "rank-0.pt"), ("pretrained", "state.pt")],
)
@pytest.mark.parametrize("plain", [True, False])
def test_code_in_a_checkpoint_does_not_run(run: Path, tmp_path: Path, file: str, key: str, plain: bool) -> None:
    path, trap = run / "checkpoints" / "latest" / file, tmp_path / "trap"
    if plain:
        path.write_bytes(pickle.dumps({"model": Bomb(trap)}))
    else:
        torch.save({"model": Bomb(trap)}, path)
        assert zipfile.is_zipfile(path)
    sign(path.parent)
    with pytest.raises(ConfigRefused, match="it cannot be read as a checkpoint"):
        train(tmp_path, {**SAVED, "steps": 6, key: str(run)})
    assert not trap.exists()
    # As somebody careless would: the trap is real.
    pickle.loads(path.read_bytes()) if plain else torch.load(path, weights_only=False)
    assert trap.is_dir()


def test_a_save_reads_no_manifest_but_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of ranks a manifest is large, and there may be hundreds of them."""
    train(tmp_path, {**SAVED, "steps": 6}, model=Net)
    read: list[str] = []
    read_one = manifest.read
    monkeypatch.setattr(manifest, "read", lambda folder, *name: read.append(folder.name) or read_one(folder, *name))
    runner = start(tmp_path, {**SAVED, "steps": 14, "auto_resume": True})
    runner.prepare(Net, splits(), loss=loss)
    batches = runner.batches("train")
    seen = []
    for _ in range(8):
        runner.step(next(batches))
        runner.checkpoints.drain()
        seen.append(sorted(read))
        read.clear()
    runner.close()
    # The first save learns of what the earlier attempt left; those after it know.
    assert seen[1] == names(2, 4, 6)
    assert seen[2:] == [[]] * 6
    assert {*names(2, 4, 8, 10, 12, 14)} <= {*checkpoints(runner.world.attempt.run_directory)}
