"""A run that was interrupted goes on as if it had not been: bitwise the same losses and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from danling_conf import ConfigRefused
from danling_conf.records.run_directory import claim
from danling_conf.runner.score import Score
from danling_conf.schema.files import LAYOUTS_INDEX
from tests.support.resumed_runs import checkpoints, settings_of, start, train
from tests.support.small import equal
from tests.support.spawn import run as on_ranks

pytestmark = pytest.mark.slow

EPOCH = 6
"""Optimizer steps of an epoch: 24 samples in batches of four."""
STEPS = {"steps": 15, "eval_interval": 4, "checkpoint": {"interval": 1}}
EPOCHS = {"epochs": 3, "checkpoint": {"interval": 1}}


def check_resumed(whole: dict[str, Any], part: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Whether the resumed run is what the uninterrupted one did from there on."""
    assert resumed["run"] == part["run"]
    assert resumed["attempt"] != part["attempt"]
    began = resumed["began"]
    assert resumed["losses"] == whole["losses"][-len(resumed["losses"]) :]
    assert resumed["rates"] == whole["rates"][-len(resumed["rates"]) :]
    assert len(resumed["losses"]) * whole["step"] == len(whole["losses"]) * (whole["step"] - began)
    assert equal(resumed["weights"], whole["weights"])
    assert (resumed["step"], resumed["epoch"], resumed["best"]) == (whole["step"], whole["epoch"], whole["best"])
    assert resumed["results"]["val.loss"] == whole["results"]["val.loss"]


@pytest.mark.parametrize("kill_at", [2, EPOCH, 2 * EPOCH, 2 * EPOCH + 1])
def test_step_mode(tmp_path: Path, kill_at: int) -> None:
    whole = train(tmp_path, STEPS)
    part = train(tmp_path, STEPS, kill_at=kill_at)
    resumed = train(tmp_path, {**STEPS, "resume": str(part["run"])})
    assert resumed["began"] == kill_at
    check_resumed(whole, part, resumed)


@pytest.mark.parametrize("kill_at", [EPOCH + 2, 2 * EPOCH])
def test_epoch_mode(tmp_path: Path, kill_at: int) -> None:
    """A checkpoint is made between epochs: what came after it is done again."""
    whole = train(tmp_path, EPOCHS)
    part = train(tmp_path, EPOCHS, kill_at=kill_at)
    resumed = train(tmp_path, {**EPOCHS, "resume": str(part["run"])})
    assert resumed["began"] == EPOCH
    check_resumed(whole, part, resumed)


@pytest.mark.parametrize("kill_at", [2, EPOCH])
@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers_that_load(tmp_path: Path, kill_at: int, persistent: bool) -> None:
    loading = {"dataloader": {"num_workers": 2, "persistent_workers": persistent, "val": {"num_workers": 0}}}
    settings = {**STEPS, "steps": 8, **loading}
    part = train(tmp_path, settings, kill_at=kill_at)
    resumed = train(tmp_path, {**settings, "resume": str(part["run"])})
    assert resumed["began"] == kill_at
    check_resumed(train(tmp_path, {**STEPS, "steps": 8}), part, resumed)  # workers change nothing either


@pytest.mark.parametrize(
    "settings",
    [
        {"accum_steps": 2, "steps": 6},
        {"accum_steps": 4, "steps": 3},  # an epoch has one step, and leftover micro-batches
        {"max_grad_norm": 0.1, "precision": "fp16", "steps": 6},
        {
            "optim": {"type": "sgd", "momentum": 0.9, "lr": 0.1},
            "scheduler": {"type": "wsd", "warmup_steps": 2},
            "steps": 6,
        },
        {"scheduler": {"type": "OneCycleLR", "max_lr": 0.05}, "steps": 6},
        {"scheduler": {"type": "constant"}, "steps": 6},
    ],
)
def test_everything_that_has_state(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"checkpoint": {"interval": 1}, **settings}
    whole = train(tmp_path, settings)
    part = train(tmp_path, settings, kill_at=2)
    check_resumed(whole, part, train(tmp_path, {**settings, "resume": str(part["run"])}))


@pytest.mark.parametrize(
    "scheduler",
    [
        {"type": "plateau", "patience": 0, "threshold": 1.0, "factor": 0.5},  # divides the learning rate at once
        {"type": "StepLR", "step_size": 1, "gamma": 0.5, "interval": "epoch"},
    ],
)
@pytest.mark.parametrize(("budget", "kill_at"), [({"epochs": 4}, 15), ({"steps": 8, "eval_interval": 2}, 5)])
def test_the_best_checkpoint_has_the_schedule_of_its_evaluation(
    tmp_path: Path, scheduler: dict[str, Any], budget: dict[str, int], kill_at: int
) -> None:
    """Without an interval only evaluations save; what they advance is part of what they save."""
    settings = {**budget, "scheduler": scheduler, "optim": {"lr": 0.001}}
    whole = train(tmp_path, settings)
    part = train(tmp_path, settings, kill_at=kill_at)
    assert len(set(whole["rates"])) > 2
    check_resumed(whole, part, train(tmp_path, {**settings, "resume": str(part["run"])}))


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"steps": 4}, {"steps": 9}),
        ({"steps": EPOCH}, {"steps": 9}),
        ({"epochs": 1}, {"epochs": 3}),
    ],
)
@pytest.mark.parametrize("scheduler", [{"type": "constant"}, {"type": "plateau", "patience": 0, "threshold": 1.0}])
def test_a_longer_budget_continues_the_shorter_run(
    tmp_path: Path, short: dict[str, int], long: dict[str, int], scheduler: dict[str, Any]
) -> None:
    common = {"eval_interval": 1, "scheduler": scheduler}
    part = train(tmp_path, {**common, **short})
    whole = train(tmp_path, {**common, **long})
    assert whole["run"] != part["run"]
    resumed = train(tmp_path, {**common, **long, "resume": str(part["run"])})
    assert resumed["began"] == part["step"]
    check_resumed(whole, part, resumed)


@pytest.mark.parametrize("scheduler", ["cosine", "OneCycleLR", "CosineAnnealingLR", "LinearLR"])
def test_a_schedule_is_as_long_as_the_longer_run(tmp_path: Path, scheduler: str) -> None:
    options = {"max_lr": 0.05} if scheduler == "OneCycleLR" else {}
    common = {"scheduler": {"type": scheduler, **options}}
    part = train(tmp_path, {**common, "steps": 3})
    resumed = train(tmp_path, {**common, "steps": 6, "resume": str(part["run"])})
    whole = train(tmp_path, {**common, "steps": 6})
    assert resumed["step"] == 6
    assert part["run"] == resumed["run"]

    assert resumed["rates"] == pytest.approx(whole["rates"][3:])


def test_a_run_that_is_complete_has_nothing_to_do(tmp_path: Path) -> None:
    part = train(tmp_path, {"steps": 3})
    again = train(tmp_path, {"steps": 3, "resume": str(part["run"])})
    assert (again["began"], again["losses"], again["best"]) == (3, [], part["best"])
    assert equal(again["weights"], part["weights"])


def test_resume_from_an_older_checkpoint_of_the_run(tmp_path: Path) -> None:
    settings = {**STEPS, "steps": 6}
    whole = train(tmp_path, settings)
    older = whole["run"] / "checkpoints" / "ckpt-s00000002"
    before = sorted(item.name for item in (whole["run"] / "checkpoints").iterdir())
    again = train(tmp_path, {**settings, "resume": str(older)})
    assert again["began"] == 2
    # What the run did after that checkpoint stays: the attempt is a run of its own, with the same data order.
    assert again["run"].name == f"{whole['run'].name}.2"
    assert json.loads((again["run"] / "run.json").read_text())["parent"] == str(whole["run"])
    assert sorted(item.name for item in (whole["run"] / "checkpoints").iterdir()) == before
    check_resumed(whole, {**whole, "run": again["run"]}, again)


def test_a_run_from_a_checkpoint_of_another_has_its_own_settings(tmp_path: Path) -> None:
    settings = {**STEPS, "steps": 4}
    parent = train(tmp_path, settings)
    latest = str(parent["run"] / "checkpoints" / "latest")
    other = {
        **settings,
        "steps": 6,
        "optim": {**settings.get("optim", {}), "lr": 1e-4},
        "scheduler": {"type": "constant"},
    }
    again = train(tmp_path, {**other, "resume": latest})
    assert (again["began"], len(again["losses"])) == (4, 2)
    assert set(again["rates"]) == {1e-4}


def test_pretrained_is_the_start_of_a_run_that_was_lost_before_it_saved(tmp_path: Path) -> None:
    parent = train(tmp_path, {"steps": 3})
    settings = {"steps": 2, "auto_resume": True, "pretrained": str(parent["run"]), "optim": {"lr": 0.0}}
    for _ in range(2):  # lost before the first save, and started again
        again = train(tmp_path, {**settings, "eval_interval": 2}, kill_at=1)
        assert again["began"] == 0
        assert equal(again["weights"], parent["weights"])


def test_a_score_of_another_metric_is_not_taken_over() -> None:
    loss = Score(split="val", name="loss", mode="min")
    loss.update({"val.loss": 0.7}, 3)
    accuracy = Score(split="val", name="accuracy", mode="max")
    accuracy.load_state_dict(loss.state_dict())
    assert (accuracy.best, accuracy.worse) == (None, 0)


def test_auto_resume_starts_where_there_is_nothing_and_goes_on_where_there_is(tmp_path: Path) -> None:
    settings = {**STEPS, "steps": 6, "auto_resume": True}
    fresh = train(tmp_path, settings, kill_at=3)
    assert fresh["began"] == 0
    resumed = train(tmp_path, settings)
    assert (resumed["began"], resumed["run"]) == (3, fresh["run"])
    check_resumed(train(tmp_path / "other", {**STEPS, "steps": 6}), fresh, resumed)


def test_auto_resume_takes_the_newest_run(tmp_path: Path) -> None:
    settings = {**STEPS, "steps": 6}
    first, second = train(tmp_path, settings, kill_at=2), train(tmp_path, settings, kill_at=4)
    assert second["run"].name == f"{first['run'].name}.2"
    resumed = train(tmp_path, {**settings, "auto_resume": True})
    assert (resumed["run"], resumed["began"]) == (second["run"], 4)


def test_auto_resume_of_a_run_that_has_saved_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"steps": 2, "auto_resume": True}
    lost = start(tmp_path, settings)
    lost.close()
    again = train(tmp_path, settings)
    assert (again["began"], again["step"], again["run"]) == (0, 2, lost.world.attempt.run_directory)
    assert "nothing to resume yet" in capsys.readouterr().out


def test_auto_resume_says_when_only_another_layout_has_a_run(tmp_path: Path) -> None:
    made = start(tmp_path, {"steps": 2})
    made.close()
    run = made.world.attempt.run_directory
    notes = []
    for changes in (LAYOUTS["ddp2"], {**LAYOUTS["ddp2"], "accum_steps": 2}):
        attempt, lock = claim(settings_of(tmp_path, {"steps": 2, "auto_resume": True, **changes}))
        lock.release()
        assert attempt.run_directory != run
        assert attempt.restore is None
        notes.append(attempt.notes)
    assert len(notes[0]) == 1
    assert f"resume={run} parallel.allow_degree_change=true" in notes[0][0]
    assert notes[1] == ()


def test_a_drawn_seed_is_kept_when_resumed(tmp_path: Path) -> None:
    settings = {**STEPS, "steps": 6, "seed": None}
    part = train(tmp_path, settings, kill_at=2)
    resumed = train(tmp_path, {**settings, "resume": str(part["run"])})
    assert resumed["seed"] == part["seed"]
    whole = train(tmp_path / "other", {**settings, "seed": part["seed"]})
    assert resumed["losses"] == whole["losses"][2:]


def test_another_setting_is_no_resumption(tmp_path: Path) -> None:
    part = train(tmp_path, {"steps": 2})
    with pytest.raises(ConfigRefused) as refusal:
        start(tmp_path, {"steps": 4, "resume": str(part["run"]), "optim": {"lr": 0.5}, "accum_steps": 2})
    text = str(refusal.value)
    assert "optim.lr=0.5\n" in text
    assert f"the run {part['run'].name} was made with 0.01" in text
    assert "accum_steps=2\n" in text
    assert "start a new run from one of its checkpoints" in text
    assert sorted(item.name for item in part["run"].parent.iterdir()) == [LAYOUTS_INDEX, part["run"].name]


def test_a_checkpoint_of_a_run_with_other_settings_starts_a_new_run(tmp_path: Path) -> None:
    part = train(tmp_path, {"steps": 3})
    before = checkpoints(part["run"])
    resumed = train(
        tmp_path,
        {"steps": 6, "optim": {"lr": 0.5}, "resume": str(part["run"] / "checkpoints" / "latest")},
    )
    assert resumed["run"] != part["run"]
    assert json.loads((resumed["run"] / "run.json").read_text())["parent"] == str(part["run"])
    assert resumed["began"] == 3
    assert checkpoints(part["run"]) == before


def test_pretrained_takes_the_weights_and_nothing_else(tmp_path: Path) -> None:
    part = train(tmp_path, {"steps": 3})
    settings = {"steps": 2, "optim": {"type": "sgd", "lr": 0.0}, "scheduler": {"type": "constant"}}
    for source in (part["run"], part["run"] / "checkpoints" / "latest"):
        tuned = train(tmp_path, {**settings, "pretrained": str(source)})
        assert tuned["began"] == 0
        assert tuned["run"] != part["run"]
        assert equal(tuned["weights"], part["weights"])
    untouched = train(tmp_path, settings)
    assert not equal(untouched["weights"], part["weights"])


LAYOUTS = {
    "ddp2": {"parallel": {"axes": {"replicate": 2}}},
    "fsdp2": {"parallel": {"axes": {"shard": 2}}, "fsdp": {"enabled": True}},
}


def resume_on_ranks(root: str) -> dict[str, Any]:
    """Each layout uninterrupted, and interrupted in and between epochs; then under the other layout."""
    found: dict[str, Any] = {}
    settings = {"steps": 7, "eval_interval": 4, "checkpoint": {"interval": 1}, "dataloader": {"batch_size": 4}}
    for name, layout in LAYOUTS.items():
        found[name] = {"whole": train(root, {**settings, **layout})}
        for kill_at in (1, 3):  # 24 samples on two ranks: three steps an epoch
            part = train(root, {**settings, **layout}, kill_at=kill_at)
            found[name][kill_at] = part, train(root, {**settings, **layout, "resume": str(part["run"])})
    changed = {**settings, **LAYOUTS["ddp2"], "resume": str(found["fsdp2"][1][0]["run"])}
    changed["parallel"] = {**changed["parallel"], "allow_degree_change": True}
    found["changed"] = train(root, {**changed, "steps": 8})
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(resume_on_ranks, 2, str(tmp_path_factory.mktemp("resume")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kill_at", [1, 3])
def test_on_two_ranks(ranks: list[dict[str, Any]], layout: str, kill_at: int) -> None:
    for rank in ranks:
        part, resumed = rank[layout][kill_at]
        assert resumed["began"] == kill_at
        check_resumed(rank[layout]["whole"], part, resumed)
    assert ranks[0][layout]["whole"]["losses"] != ranks[1][layout]["whole"]["losses"]


def test_under_another_layout(ranks: list[dict[str, Any]]) -> None:
    """The sharded run was complete at step 7, as one of DDP: one more step."""
    for rank in ranks:
        assert (rank["changed"]["began"], rank["changed"]["step"]) == (7, 8)
        assert rank["changed"]["run"] == rank["fsdp2"][1][0]["run"]
