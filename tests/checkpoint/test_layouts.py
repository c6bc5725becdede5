"""A checkpoint fits any layout: saved under one, resumed under another; the same numbers, and every sample once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf import ConfigRefused
from danling_conf.checkpoint.gather import gather
from danling_conf.checkpoint.state import MODEL, model_tensors, optimizer_tensors
from tests.support.decoder_runs import Texts, loss, model, settings_of, train
from tests.support.processes import run

pytestmark = pytest.mark.slow

SAVED_AT = 2
CHANGED = {"parallel": {"allow_degree_change": True}}
WRITTEN = {"fsdp4": 4, "fsdp8": 8, "ddp2": 2, "single": 1, "fsdp2_pp2": 4}
"""Layouts that write, and their ranks."""
READ = {"fsdp8": 8, "fsdp2": 2, "ddp2": 2, "hsdp2x2": 4, "single": 1, "fsdp2_tp2": 4, "fsdp2_pp2": 4}
"""Layouts that read, and their ranks."""
PAIRS = [
    *((source, target) for source in ("fsdp8", "single") for target in READ if source != target),
    ("fsdp4", "ddp2"), ("ddp2", "fsdp2"), ("ddp2", "fsdp2_pp2"), ("fsdp2_pp2", "single"), ("fsdp2_pp2", "fsdp2_tp2"),
]  # fmt: skip
BACKENDS = {"fsdp4": "dcp", "fsdp8": "dcp", "ddp2": "file", "single": "file", "fsdp2_pp2": "file"}
EPOCH = 48


def state_after_loading(root: str, layout: str, source: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The whole state of model and optimizer as a run under a layout begins with it, on rank 0."""
    import danling_conf

    runner = danling_conf.Runner(settings_of(root, layout, {**changes, "resume": source}))
    try:
        runner.prepare(model, {"train": Texts()}, loss=loss)
        mine = model_tensors(runner.parts) | optimizer_tensors(runner.parts, runner.optimizer)
        whole = {name: tensor.clone() for name, tensor in gather(mine, runner.world.layout, runner.world.ranks.rank)}
        return {"state": whole, "step": runner.global_step, "rates": _rates(runner)}
    finally:
        runner.close()


def stopped(root: str, layout: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Train to `SAVED_AT` of a longer run, and leave without its end."""
    import danling_conf

    runner = danling_conf.Runner(settings_of(root, layout, changes))
    samples = []
    try:
        runner.prepare(model, {"train": Texts()}, loss=loss)
        for batch in runner.batches("train"):
            samples += batch[2].tolist()
            runner.step(batch)
            if runner.global_step == SAVED_AT:
                break
        mine = model_tensors(runner.parts) | optimizer_tensors(runner.parts, runner.optimizer)
        whole = {name: tensor.clone() for name, tensor in gather(mine, runner.world.layout, runner.world.ranks.rank)}
        rates = _rates(runner)
    finally:
        runner.close()
    return {"state": whole, "run": runner.world.attempt.run_directory, "samples": samples, "rates": rates}


def _rates(runner: Any) -> list[float]:
    return [group["lr"] for group in runner.optimizer.param_groups]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run under a layout that was left at step 2, once for all tests."""
    found: dict[str, list[dict[str, Any]]] = {}

    def under(layout: str) -> list[dict[str, Any]]:
        if layout not in found:
            changes = {"checkpoint": {"backend": BACKENDS[layout], "interval": 1}, "steps": 30}
            found[layout] = run(stopped, WRITTEN[layout], str(tmp_path_factory.mktemp(layout)), layout, changes)
        return found[layout]

    return under


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_the_state_is_the_same_under_another_layout(written: Any, tmp_path: Path, source: str, target: str) -> None:
    """From a checkpoint, into a run of its own: what was saved is left as it is."""
    saved = written(source)[0]
    checkpoint = saved["run"] / "checkpoints" / f"ckpt-s{SAVED_AT:08d}"
    ranks = run(state_after_loading, READ[target], str(tmp_path), target, str(checkpoint), {**CHANGED, "steps": 30})
    assert {rank["step"] for rank in ranks} == {SAVED_AT}
    assert ranks[0]["state"].keys() == saved["state"].keys()
    assert {name.partition(".")[0] for name in saved["state"]} == {"model", "optimizer"}
    for name, tensor in saved["state"].items():
        assert torch.equal(ranks[0]["state"][name], tensor), name
    assert any(name.startswith(MODEL) for name in saved["state"])


REDEALT = [("fsdp4", "fsdp2"), ("ddp2", "single"), ("fsdp4", "single"), ("single", "ddp2")]
GROUPED = {
    "muon": {"type": "muon", "lr": 0.01},
    "groups": {"type": "adamw", "lr": 0.01, "param_groups": [{"pattern": "norm", "weight_decay": 0.0, "lr": 0.02}]},
    "sgd": {"type": "sgd", "lr": 0.1, "momentum": 0.9},
}


@pytest.mark.parametrize("optim", GROUPED)
def test_the_state_of_other_optimizers_and_of_groups(tmp_path: Path, optim: str) -> None:
    changes = {"optim": GROUPED[optim], "steps": 30}
    saved = run(stopped, 2, str(tmp_path), "fsdp2", changes)[0]
    checkpoint = str(saved["run"] / "checkpoints" / "latest")
    found = run(state_after_loading, 1, str(tmp_path / "other"), "single", checkpoint, {**CHANGED, **changes})[0]
    assert found["state"].keys() == saved["state"].keys()
    assert all(torch.equal(found["state"][name], tensor) for name, tensor in saved["state"].items())
    assert len(found["rates"]) == len(saved["rates"])
    assert found["rates"] == saved["rates"]
    assert optim != "groups" or len(set(found["rates"])) == 2


@pytest.mark.parametrize(("source", "target"), REDEALT)
def test_no_sample_is_seen_twice_or_never(written: Any, tmp_path: Path, source: str, target: str) -> None:
    """Another number of data ranks: the rest of the epoch is dealt out to those that there are now."""
    before = [index for rank in written(source) for index in rank["samples"]]
    checkpoint = written(source)[0]["run"] / "checkpoints" / f"ckpt-s{SAVED_AT:08d}"
    assert len(before) == len(set(before)) < EPOCH
    # 48 samples divide into whole steps under all of these: micro-batches of 2, two of them a step.
    changes = {**CHANGED, "resume": str(checkpoint), "steps": 30, "checkpoint": {"load_only": True, "interval": None}}
    ranks = run(train, READ[target], str(tmp_path), target, changes)
    steps = zip(*(rank["samples"] for rank in ranks), strict=True)
    after = [index for batches in steps for batch in batches for index in batch]
    left = EPOCH - len(before)
    assert sorted(before + after[:left]) == list(range(EPOCH))
    # The epochs after it are whole ones again.
    whole = after[left : left + EPOCH * ((len(after) - left) // EPOCH)]
    assert set(Counter(whole).values()) <= {(len(after) - left) // EPOCH}
    assert ranks[0]["began"] == SAVED_AT


def test_as_many_data_ranks_go_on_exactly(written: Any, tmp_path: Path) -> None:
    """The order of samples and dropout are those of the layout that saved; sums are rounded in another order."""
    checkpoint = written("ddp2")[0]["run"] / "checkpoints" / f"ckpt-s{SAVED_AT:08d}"
    changes = {"steps": 30, "resume": str(checkpoint), "checkpoint": {"load_only": True, "interval": None}}
    same = run(train, 2, str(tmp_path), "ddp2", changes)
    other = run(train, 2, str(tmp_path), "fsdp2", {**changes, **CHANGED})
    for mine, theirs in zip(other, same, strict=True):
        assert mine["samples"] == theirs["samples"]
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-4)


def refusal(root: str, layout: str, changes: dict[str, Any]) -> str:
    try:
        train(root, layout, changes)
    except ConfigRefused as error:
        return str(error)
    return "accepted"


def test_another_layout_is_refused_unless_it_is_allowed(written: Any, tmp_path: Path) -> None:
    directory = written("ddp2")[0]["run"]
    checkpoint = directory / "checkpoints" / "latest"
    for source in (directory, checkpoint):
        (text,) = set(run(refusal, 1, str(tmp_path), "single", {"steps": 30, "resume": str(source)}))
        assert text.splitlines()[1].startswith("  parallel")
        assert "ddp2" in text
        assert "single" in text
        assert "parallel.allow_degree_change=true" in text
    two = set(run(refusal, 2, str(tmp_path), "fsdp2", {"steps": 30, "resume": str(checkpoint)}))
    assert len(two) == 1
    assert "was written under the layout ddp2, and this run's is fsdp2" in two.pop()


def test_a_run_goes_on_in_its_directory_under_another_layout(tmp_path: Path) -> None:
    changes = {"steps": 30, "checkpoint": {"interval": 1}}
    saved = run(stopped, 2, str(tmp_path), "fsdp2", changes)[0]
    resumed = run(train, 1, str(tmp_path), "single", {**changes, **CHANGED, "steps": 4, "resume": str(saved["run"])})
    assert (resumed[0]["began"], resumed[0]["run"]) == (SAVED_AT, saved["run"])
    # And back, from what a single process wrote as one file.
    again = run(train, 2, str(tmp_path), "fsdp2", {**changes, **CHANGED, "steps": 5, "resume": str(saved["run"])})
    assert (again[0]["began"], again[0]["run"]) == (4, saved["run"])


def breaking(root: str) -> dict[str, Any]:
    """A run on two ranks; then one file after another is broken, and what each rank says of it."""
    import torch.distributed as distributed

    changes: dict[str, Any] = {"steps": 2, "checkpoint": {"interval": 1, "async_mode": "disabled"}}
    directory = train(root, "fsdp2", changes)["run"]
    found: dict[str, Any] = {}
    for path in sorted((directory / "checkpoints" / "ckpt-s00000002").iterdir()):
        content = path.read_bytes()
        distributed.barrier()
        if distributed.get_rank() == 0:
            path.write_bytes(content[: len(content) // 2])
        distributed.barrier()
        found[path.name] = refusal(root, "fsdp2", {**changes, "steps": 4, "resume": str(directory)})
        distributed.barrier()
        if distributed.get_rank() == 0:
            path.write_bytes(content)
        distributed.barrier()
    found["whole again"] = train(root, "fsdp2", {**changes, "steps": 4, "resume": str(directory)})["began"]
    return found


def test_a_file_that_one_rank_finds_broken_is_refused_by_all(tmp_path: Path) -> None:
    first, second = run(breaking, 2, str(tmp_path))
    assert first == second
    assert first.pop("whole again") == 2
    files = [".metadata", "__0_0.distcp", "__1_0.distcp", "checkpoint.json", "rank-0.pt", "rank-1.pt", "shared.pt"]
    assert list(first) == files
    for file, text in first.items():
        assert text.splitlines()[1].startswith("  resume=")
        assert f"ckpt-s00000002/{file}: it cannot be read" in text
        assert "ckpt-s00000001" in text.splitlines()[-1]
