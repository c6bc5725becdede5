"""Where metrics go: the run's file and the real trackers; none of them can stop training."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from danling_conf.records.metrics import metrics_file, read_lines, read_metrics, series
from danling_conf.records.result import write_result
from danling_conf.records.status import Outcome, Status
from danling_conf.runner.observe import meters, observers
from danling_conf.runner.observe.trackers import choose, guarded
from danling_conf.runner.observe.trackers.tracker import Record, RunFacts
from danling_conf.sweep.rows import progress
from tests.support.small import Net, Pairs, config, loss, runner

DATA = {"train": Pairs(), "val": Pairs(9, seed=1)}


def fit(root: Path, settings: dict[str, Any], **options: Any) -> Any:
    ours = runner(root, {"log_interval": 2, "eval_interval": 3, **settings})
    ours.fit(Net, DATA, loss=options.pop("loss", loss), **options)
    return ours


def test_the_run_s_file_holds_what_was_measured(tmp_path: Path) -> None:
    ours = fit(tmp_path, {"max_grad_norm": 1.0}, tokens_per_sample=3)
    run, attempt = ours.world.attempt.run_directory, ours.world.attempt.directory.name
    first, *lines = read_lines(run)
    assert first == {"time": first["time"], "attempt": attempt, "step": 0, "epoch": 0}
    assert {line["attempt"] for line in lines} == {attempt}
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)
    history = read_metrics(run)
    assert [step for step, _ in series(history, "train.loss")] == [2, 4, 6]
    assert [step for step, _ in series(history, "val.loss")] == [3, 6]
    assert series(history, "val.loss")[-1][1] == ours.results["val.loss"]
    last = history[-1]
    assert 0 < last["goodput"] <= 1
    assert (last["train.lr"], last["train.nonfinite_steps"]) == (0.1, 0)
    assert last["train.grad_norm"] > 0
    assert last["memory.peak_bytes"] > 10e6
    # A step's time is what was waited for data and the rest; four samples of three tokens went into each.
    parts = last["train.data_seconds"] + last["train.compute_seconds"]
    assert parts == pytest.approx(last["train.step_seconds"])
    assert last["train.samples_per_second"] == pytest.approx(4 / last["train.step_seconds"])
    assert last["train.tokens_per_second"] == pytest.approx(12 / last["train.step_seconds"])
    assert last["train.productive_seconds"] == pytest.approx(2 * last["train.step_seconds"])
    assert last["evaluation.seconds"] == 0.0
    evaluated = history[2]  # at step 4, after the evaluation at step 3
    assert evaluated["step"] == 4
    assert evaluated["evaluation.seconds"] > 0
    assert "train.mfu" not in last  # nobody knows a CPU's peak


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "an exception of the user's own loop"])
def test_the_last_record_says_the_last_step(tmp_path: Path, closes: bool) -> None:
    """And not that of the last log line, which every command would show."""
    ours = runner(tmp_path, {"steps": 6, "log_interval": 2 if closes else 100})
    ours.prepare(Net, DATA, loss=loss)
    for batch in ours.batches("train"):
        ours.step(batch)
        if ours.global_step == 3:
            break
    if closes:
        ours.close()
    attempt = ours.world.attempt
    write_result(attempt.directory, Outcome(status=Status.FAILED, exit_code=1, message="broken"))
    lines = list(read_lines(attempt.run_directory))
    ours.close()
    assert (lines[-1]["step"], lines[-1]["epoch"], lines[-1]["status"]) == (3, 0, "failed")
    assert progress(attempt.run_directory)[0] == 3


def test_what_is_not_finite_is_written_as_nothing(tmp_path: Path) -> None:
    ours = fit(tmp_path, {}, loss=lambda output, batch: loss(output, batch) * math.inf)
    history = read_metrics(ours.world.attempt.run_directory)
    assert [line["train.loss"] for line in history if "train.lr" in line] == [None] * 3
    assert series(history, "train.loss") == []
    assert "NaN" not in metrics_file(ours.world.attempt.run_directory).read_text()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path: Path) -> None:
    saved = {"checkpoint": {"load_only": False, "interval": 2}}
    first = fit(tmp_path, {"steps": 4, **saved})
    run = first.world.attempt.run_directory
    with open(metrics_file(run), "a") as file:
        file.write('{"time": 1.0, "attempt": "x", "st')  # as a killed process leaves it
    fit(tmp_path, {"steps": 8, "resume": str(run / "checkpoints" / "latest"), **saved})
    assert [step for step, _ in series(read_metrics(run), "train.loss")] == [2, 4, 6, 8]
    starts = [line["step"] for line in read_lines(run) if len(line) == 4]
    assert starts == [0, 4]


class Raising:
    """A tracker that fails when it is told to."""

    name = "a broken tracker"

    def __init__(self, where: str) -> None:
        self.where, self.calls = where, []

    def _do(self, what: str) -> None:
        self.calls.append(what)
        if what == self.where:
            raise OSError("the network is down")

    def start(self, facts: RunFacts) -> None:
        self._do("start")

    def log(self, record: Record) -> None:
        self._do("log")

    def finish(self, status: str, score: float | None) -> None:
        self._do("finish")


@pytest.mark.parametrize(("where", "calls"), [("start", 1), ("log", 2), ("finish", 8)])
def test_a_tracker_that_fails_stops_nothing_and_is_said_once(
    tmp_path: Path, where: str, calls: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Raising(where)
    monkeypatch.setattr(choose, "chosen", lambda config: [broken])
    ours = fit(tmp_path, {})
    assert ours.global_step == 6
    assert len(broken.calls) == calls  # after its error it is left alone
    said = "warning: a broken tracker failed, and training goes on without it: OSError: the network is down"
    assert capsys.readouterr().out.count(said) == 1
    assert (ours.world.attempt.directory / "rank-0.log").read_text().count(said) == 1
    assert [step for step, _ in series(read_metrics(ours.world.attempt.run_directory), "train.loss")] == [2, 4, 6]


@pytest.mark.parametrize("where", ["start", "log"])
def test_a_tracker_that_hangs_holds_nothing_up(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_go = threading.Event()

    class Hanging(Raising):
        def _do(self, what: str) -> None:
            if what == where:
                let_go.wait(60)

    monkeypatch.setattr(choose, "chosen", lambda config: [Hanging(where)])
    monkeypatch.setattr(guarded, "_LAST_SECONDS", 0.1)
    monkeypatch.setattr(guarded, "_WAITING_RECORDS", 2)
    ours = fit(tmp_path, {})
    let_go.set()
    assert ours.global_step == 6
    out = capsys.readouterr().out
    assert out.count("takes metrics too slowly") == 1
    assert out.count("has not taken everything") == 1


def test_tensorboard_has_scalars_hyperparameters_and_the_score(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    saved = {"tensorboard": True, "checkpoint": {"load_only": False, "interval": 2}}
    first = fit(tmp_path, {"steps": 4, **saved})
    run = first.world.attempt.run_directory
    second = fit(tmp_path, {"steps": 8, "resume": str(run / "checkpoints" / "latest"), **saved})
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("val/loss")] == [3, 4, 6, 8]
    assert events.Scalars("val/loss")[-1].value == pytest.approx(second.results["val.loss"])
    assert events.Scalars("score")[-1].value == pytest.approx(second.score.best)
    metadata = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(metadata).session_start_info.hparams
    assert given["optim.lr"].number_value == 0.1
    assert given["optim.type"].string_value == "sgd"
    assert not (Path(fit(tmp_path, {}).world.attempt.run_directory) / "tensorboard").exists()


def records_of(folder: Path) -> list[Any]:
    """What Weights & Biases wrote, as its own records."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.rglob("*.wandb")
    content, found, whole = path.read_bytes(), [], b""
    place = 7  # after the file's own header
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:  # no header fits into the rest of a block
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


@pytest.mark.slow
def test_weights_and_biases_offline(tmp_path: Path) -> None:
    ours = fit(tmp_path, {"wandb": {"enabled": True, "mode": "offline"}})
    attempt = ours.world.attempt
    records = records_of(attempt.run_directory / "wandb")
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.project, run.run_group, run.display_name) == ("lin", "exp", attempt.run_id)
    settings = {item.key: item.value_json for item in run.config.update}
    assert settings["optim.lr"] == "0.1"
    assert json.loads(settings["run"]) == str(attempt.run_directory)
    rows = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    losses = {row["_step"]: row["train.loss"] for row in rows if "train.loss" in row}
    assert losses == dict(series(read_metrics(attempt.run_directory), "train.loss"))
    assert [row["_step"] for row in rows if "val.loss" in row] == [3, 6]
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


def test_settings_of_weights_and_biases_reach_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    calls: list[dict[str, Any]] = []

    class Run:
        summary: dict[str, Any] = {}

        def log(self, values: dict[str, float], step: int) -> None:
            pass

        def finish(self, exit_code: int) -> None:
            calls[-1]["exit_code"] = exit_code

    def init(**given: Any) -> Run:
        calls.append(given)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    chosen = {"project": "p", "entity": "e", "group": "g", "name": "n", "job_type": "j", "mode": "online",
              "dir": str(tmp_path / "there")}  # fmt: skip
    ours = fit(tmp_path, {"wandb": {"enabled": True, "tags": "one", **chosen}})
    assert calls[0].items() >= {**chosen, "tags": ["one"], "exit_code": 0, "resume": "allow"}.items()
    assert Run.summary["score"] == ours.score.best
    fit(tmp_path, {"wandb": {"enabled": True, "tags": ["a", 2024]}})
    assert calls[1]["tags"] == ["a", "2024"]
    assert (calls[1]["mode"], calls[1]["entity"], calls[1]["job_type"]) == (None, None, None)
    assert calls[1]["id"] != calls[0]["id"]  # another run
    fit(tmp_path, {"wandb": {"enabled": False, **chosen}})
    assert len(calls) == 2


@pytest.mark.slow
def test_mlflow_in_a_database_of_the_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    saved = {"mlflow": {"enabled": True}, "checkpoint": {"load_only": False, "interval": 2}}
    first = fit(tmp_path, {"steps": 4, **saved})
    run = first.world.attempt.run_directory
    second = fit(tmp_path, {"steps": 8, "resume": str(run / "checkpoints" / "latest"), **saved})
    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lin/exp")
    (found,) = client.search_runs([experiment.experiment_id])  # both attempts are one run of theirs
    assert found.info.run_name == run.name
    assert found.info.status == "FINISHED"
    assert found.data.params["optim.lr"] == "0.1"
    assert found.data.metrics["score"] == pytest.approx(second.score.best)
    history = client.get_metric_history(found.info.run_id, "train.loss")
    assert {item.step for item in history} == {2, 4, 6, 8}


@pytest.mark.slow
def test_settings_of_mlflow(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'shared.db'}"
    section = {"enabled": True, "tracking_uri": uri, "experiment": "mine", "name": "named"}

    class Broken(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:  # and not where a batch is tried before
                raise RuntimeError("this model is broken")
            return super().forward(x)

    ours = fit(tmp_path, {"mlflow": section})
    with pytest.raises(RuntimeError, match="this model is broken"):
        runner(tmp_path, {"mlflow": section}).fit(Broken, DATA, loss=loss)
    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert sorted(item.info.status for item in found) == ["FAILED", "FINISHED"]
    assert {item.info.run_name for item in found} == {"named"}
    assert not (ours.world.attempt.run_directory / "mlflow.db").exists()


def test_a_tracker_is_imported_only_where_it_is_used(tmp_path: Path) -> None:
    assert choose.chosen(config(tmp_path)) == []
    names = [tracker.name for tracker in choose.chosen(
        config(tmp_path, {"tensorboard": True, "wandb": {"enabled": True}, "mlflow": {"enabled": True}})
    )]  # fmt: skip
    assert names == ["TensorBoard", "Weights & Biases", "MLflow"]


def test_nothing_is_waited_for_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number of the device waits for it: outside of log lines and evaluation nobody does. On the CPU, where
    losses are read as they come, the metrics are the same."""
    at_once = fit(tmp_path, {"steps": 6, "log_interval": 4, "eval_interval": 6, "max_grad_norm": 1.0})
    for module in (meters, observers):  # as on an accelerator
        monkeypatch.setattr(module, "at_hand", lambda value: value)
    read: list[int] = []
    ours = runner(tmp_path, {"steps": 6, "log_interval": 4, "eval_interval": 6, "max_grad_norm": 1.0})
    ours.prepare(Net, DATA, loss=loss)
    for name in ("item", "tolist", "__float__", "__bool__", "__int__"):
        original = getattr(Tensor, name)

        def noted(self: Tensor, *rest: Any, original: Any = original) -> Any:
            read.append(ours.global_step)
            return original(self, *rest)

        monkeypatch.setattr(torch.Tensor, name, noted)
    for batch in ours.batches("train"):
        ours.step(batch)
    monkeypatch.undo()
    ours.finish()
    assert {step for step in read if 0 < step < 6} == {4}  # before the first step, the sampler reads its order
    histories = [read_metrics(each.world.attempt.run_directory) for each in (at_once, ours)]
    assert at_once.results == ours.results
    for name in ("train.loss", "train.grad_norm"):
        assert series(histories[0], name) == series(histories[1], name) != []
