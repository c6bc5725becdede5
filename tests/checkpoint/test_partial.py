"""Parts of a checkpoint that are not loaded, insisting on other settings, and loader states of replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf import ConfigRefused
from danling_conf.records.run_directory import claim
from tests.support.resumed_runs import checkpoints, settings_of, splits, start, train
from tests.support.small import DropoutNet, Net, equal, loss

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"steps": 8, "eval_interval": 100, "checkpoint": {"interval": 4}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was lost after step 4, in the middle of an epoch of six steps."""
    return train(tmp_path, SETTINGS, kill_at=4)["run"]


def prepared(root: Path, excluded: Any, **changes: Any) -> Any:
    """A runner as it begins, with parts left out."""
    saving = {"interval": 4, "exclude_from_loading": excluded}
    runner = start(root, {**SETTINGS, "checkpoint": saving, **changes})
    try:
        runner.prepare(DropoutNet, splits(), loss=loss)
        runner.first = next(runner.batches("train"))
    finally:
        runner.close()
    return runner


@pytest.fixture
def whole(tmp_path: Path, run: Path) -> Any:
    return prepared(tmp_path, None, resume=str(run))


def test_all_is_loaded_where_nothing_is_excluded(whole: Any) -> None:
    assert (whole.global_step, whole.state.epoch_step) == (4, 4)
    assert whole.scheduler.last_epoch == 4
    assert all(state["step"] == 4 for state in whole.optimizer.state.values())


@pytest.mark.parametrize("key", ["optimizer", ["optimizer"]])
def test_without_the_optimizer(tmp_path: Path, run: Path, whole: Any, key: Any) -> None:
    found = prepared(tmp_path, key, resume=str(run))
    assert not found.optimizer.state
    assert equal(found.model.state_dict(), whole.model.state_dict())
    assert (found.global_step, found.scheduler.last_epoch) == (4, 4)


@pytest.mark.parametrize("key", ["scheduler", "lr_scheduler"])
def test_without_the_scheduler(tmp_path: Path, run: Path, key: str) -> None:
    found = prepared(tmp_path, key, resume=str(run))
    assert found.scheduler.last_epoch == 0
    assert all(state["step"] == 4 for state in found.optimizer.state.values())


@pytest.mark.parametrize("key", ["dataloaders", "dataloader", "data_loader"])
def test_without_the_loaders(tmp_path: Path, run: Path, whole: Any, key: str) -> None:
    """The epoch begins anew."""
    found = prepared(tmp_path, key, resume=str(run))
    begun = prepared(tmp_path / "other", None)
    assert (found.global_step, found.state.epoch_step) == (4, 0)
    assert torch.equal(found.first[0], begun.first[0])
    assert not torch.equal(found.first[0], whole.first[0])


def test_without_the_generators(tmp_path: Path, run: Path) -> None:
    """Dropout draws other numbers, which the first loss tells."""
    losses, source = [], str(run / "checkpoints" / "ckpt-s00000004")
    for excluded in (None, "generators"):
        saving = {"interval": 4, "exclude_from_loading": excluded}
        losses.append(train(tmp_path, {**SETTINGS, "checkpoint": saving, "resume": source})["losses"])
    assert losses[0][0] != losses[1][0]


def test_without_a_part_of_the_model(tmp_path: Path, run: Path, whole: Any) -> None:
    found = prepared(tmp_path, ["model.second", "optimizer.second.weight"], resume=str(run))
    fresh = prepared(tmp_path / "other", None)
    mine, theirs, new = (runner.model.state_dict() for runner in (found, whole, fresh))
    assert torch.equal(mine["first.weight"], theirs["first.weight"])
    assert torch.equal(mine["second.weight"], new["second.weight"])
    assert torch.equal(mine["second.bias"], new["second.bias"])
    with_state = {id(parameter) for parameter in found.optimizer.state}
    named = dict(found.model.named_parameters())
    assert {name for name, item in named.items() if id(item) not in with_state} == {"second.weight"}


class OtherHead(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = torch.nn.Linear(8, 7)


def test_what_does_not_fit_may_be_left_out(tmp_path: Path, run: Path) -> None:
    settings = {"steps": 1, "pretrained": str(run)}
    with pytest.raises(ConfigRefused, match=r"of another shape second\.weight"):
        train(tmp_path, settings, model=OtherHead)
    done = train(tmp_path, {**settings, "checkpoint": {"exclude_from_loading": ["model.second"]}}, model=OtherHead)
    assert done["weights"]["second.weight"].shape == (7, 8)


def test_the_counts_may_begin_anew(tmp_path: Path, run: Path) -> None:
    found = prepared(tmp_path, ["runner", "scheduler", "dataloaders"], resume=str(run))
    assert (found.global_step, found.epoch, found.scheduler.last_epoch) == (0, 0, 0)
    kept = prepared(tmp_path, "runner.score", resume=str(run))
    assert kept.global_step == 4


def test_a_name_that_the_checkpoint_does_not_have(tmp_path: Path, run: Path) -> None:
    message = r"(?s)exclude_from_loading=model\.secnd\.weight.*did you mean model\.second\.weight"
    with pytest.raises(ConfigRefused, match=message):
        prepared(tmp_path, "model.secnd.weight", resume=str(run))


def test_other_settings_are_refused_with_a_list_and_may_be_insisted_on(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {**SETTINGS, "optim": {"lr": 0.5}, "accum_steps": 2, "resume": str(run)}
    with pytest.raises(ConfigRefused) as refusal:
        start(tmp_path, other)
    assert [item.path for item in refusal.value.violations] == ["accum_steps", "optim.lr"]
    assert all("force_resume=true" in item.fix for item in refusal.value.violations)
    done = train(tmp_path, {**other, "force_resume": True, "scheduler": {"type": "constant"}})
    assert (done["run"], done["began"], done["step"]) == (run, 4, 8)
    assert set(done["rates"]) == {0.5}
    said = capsys.readouterr().err
    assert "optim.lr=0.5" in said
    assert "force_resume=true insists" in said


def test_another_layout_is_not_insisted_on(tmp_path: Path, run: Path) -> None:
    ddp2 = {"parallel": {"axes": {"replicate": 2}}}
    config = settings_of(tmp_path, {**SETTINGS, **ddp2, "resume": str(run), "force_resume": True})
    with pytest.raises(ConfigRefused) as refusal:
        claim(config)
    (violation,) = refusal.value.violations
    assert (violation.path, violation.value, violation.rule) == (
        "parallel", "ddp2", "the run was made under the layout single",
    )  # fmt: skip


def test_what_a_run_was_started_from_says_nothing_when_it_goes_on(tmp_path: Path, run: Path) -> None:
    part = train(tmp_path, {**SETTINGS, "pretrained": str(run)}, kill_at=4)
    assert train(tmp_path, {**SETTINGS, "resume": str(part["run"])})["began"] == 4


def test_workers_may_be_others_when_a_run_goes_on(tmp_path: Path, run: Path) -> None:
    """The place in the data does not depend on how many processes load it."""
    plain = train(tmp_path / "whole", SETTINGS)
    again = train(tmp_path, {**SETTINGS, "dataloader": {"num_workers": 2}, "resume": str(run)})
    assert again["losses"] == plain["losses"][4:]


REPLICAS = {"interval": 2, "enable_ft_dataloader_checkpoints": True}


@pytest.mark.parametrize(
    ("settings", "environment", "folder"),
    [
        ({}, {}, "ft-replica-0"),
        ({}, {"FT_REPLICA_ID": "east"}, "ft-replica-east"),
        ({"ft_replica_id": "7"}, {"FT_REPLICA_ID": "east"}, "ft-replica-7"),
        ({"ft_dataloader_checkpoint_prefix": "loader", "ft_replica_id": "7"}, {}, "loader-7"),
    ],
)
def test_a_replica_writes_its_loader_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any, environment: dict[str, str], folder: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = train(tmp_path, {"steps": 4, "eval_interval": 9, "checkpoint": {**REPLICAS, **settings}}, kill_at=4)
    assert folder in checkpoints(done["run"])
    files = sorted(path.name for path in (done["run"] / "checkpoints" / folder).iterdir())
    assert files == [f"ckpt-s0000000{step}.rank-0.{kind}" for step in (2, 4) for kind in ("json", "pt")]


def test_a_replica_goes_on_from_its_own_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told by giving it the state of an earlier checkpoint."""
    settings = {"steps": 6, "eval_interval": 9, "checkpoint": REPLICAS}
    part = train(tmp_path, settings, kill_at=4)
    folder = part["run"] / "checkpoints" / "ft-replica-0"
    for kind in ("pt", "json"):
        (folder / f"ckpt-s00000004.rank-0.{kind}").write_bytes((folder / f"ckpt-s00000002.rank-0.{kind}").read_bytes())
    runner = start(tmp_path, {**settings, "resume": str(part["run"])})
    runner.prepare(DropoutNet, splits(), loss=loss)
    mine = next(runner.batches("train"))
    runner.close()
    third = start(tmp_path / "other", settings)
    third.prepare(DropoutNet, splits(), loss=loss)
    batches = third.batches("train")
    first_three = [next(batches) for _ in range(3)]
    third.close()
    assert torch.equal(mine[0], first_three[2][0])
    (folder / "ckpt-s00000004.rank-0.pt").write_bytes(b"")
    capsys.readouterr()
    again = train(tmp_path, {**settings, "resume": str(part["run"])})
    assert again["began"] == 4
    assert (
        "the loader continues from the checkpoint, since the replica has no state of its own" in capsys.readouterr().out
    )


def test_states_of_replicas_go_with_their_checkpoints(tmp_path: Path) -> None:
    saving = {**REPLICAS, "interval": 1, "keep_latest_k": 2}
    done = train(tmp_path, {"steps": 5, "eval_interval": 9, "checkpoint": saving}, kill_at=5)
    folder = done["run"] / "checkpoints" / "ft-replica-0"
    assert sorted(path.name[:13] for path in folder.glob("*.pt")) == ["ckpt-s0000000"] * 2
    facts = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    assert all(item["size"] for item in facts)
