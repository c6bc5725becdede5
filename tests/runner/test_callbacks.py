"""Callbacks: order, state, configuration, refusals; values logged by name; a pass before training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import danling_conf
from danling_conf import EMA, Callback, ConfigRefused, LearningRateMonitor, SamplePredictions
from danling_conf.runner.callbacks import CallbackFailed, TrainingRun
from danling_conf.runner.observe.logged import OWN
from tests.support.small import DropoutNet, Net, Pairs, config, equal, loss, runner, weights

SAVING = {"checkpoint": {"load_only": False, "interval": 2}}
HOOKS = (
    "setup", "on_load", "on_fit_start", "on_step_start", "on_before_optimizer_step", "on_step_end", "on_log",
    "on_evaluation_start", "on_evaluation_end", "on_export_start", "on_export_end", "on_save", "on_exception",
    "on_fit_end",
)  # fmt: skip


class Witness(Callback):
    """Notes every hook with the step at which it is called."""

    def __init__(self, calls: list[tuple[str, int]], name: str = "witness") -> None:
        self.calls, self.name = calls, name

    def __getattribute__(self, attribute: str) -> Any:
        if attribute not in HOOKS:
            return super().__getattribute__(attribute)
        return lambda run, *more: self.calls.append((f"{self.name}.{attribute}", run.global_step))


for _hook in HOOKS:  # overridden, so that they are bound
    setattr(Witness, _hook, lambda self, run, *more: None)


class Counter(Callback):
    """State that a resumed run must continue: a count, and the sum of all gradients' norms."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor, self.steps, self.total = factor, 0, torch.zeros(())

    def on_before_optimizer_step(self, runner: TrainingRun) -> None:
        self.steps += 1
        self.total = self.total + sum(p.grad.norm() for p in runner.model.parameters()) * self.factor

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "total": self.total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.total = state["steps"], state["total"]


def splits() -> dict[str, Pairs]:
    return {"train": Pairs(), "val": Pairs(10, seed=1)}


def fit(root: Path, settings: Mapping[str, Any] | None = None, *callbacks: Callback, model: Any = Net) -> Any:
    run = runner(root, settings)
    run.fit(model, splits(), loss=loss, callbacks=callbacks)
    return run


def metrics(run: danling_conf.Runner, name: str) -> list[float]:
    lines = (run.world.attempt.run_directory / "metrics.jsonl").read_text().splitlines()
    return [line[name] for line in map(json.loads, lines) if name in line]


def test_order_of_calls(tmp_path):
    calls: list[tuple[str, int]] = []
    settings = {**SAVING, "steps": 2, "eval_interval": 2, "accum_steps": 2, "log_interval": 2}
    settings["checkpoint"] = {**SAVING["checkpoint"], "export_dtype": "fp32"}
    fit(tmp_path, settings, Witness(calls, "a"), Witness(calls, "b"))
    step = [("on_step_start", 0), ("on_before_optimizer_step", 0), ("on_step_end", 1)]
    last = [("on_step_start", 1), ("on_before_optimizer_step", 1), ("on_step_end", 2)]
    due = [("on_log", 2), ("on_evaluation_start", 2), ("on_evaluation_end", 2), ("on_save", 2)]
    end = [("on_export_start", 2), ("on_export_end", 2), ("on_fit_end", 2)]
    expected = [("setup", 0), ("on_fit_start", 0), *step, *last, *due, *end]
    assert [(name.partition(".")[2], at) for name, at in calls if name.startswith("a.")] == expected
    order = {hook: [name[0] for name, _ in calls if name.endswith(f".{hook}")][:2] for hook, _ in expected}
    assert {hook: found == (["b", "a"] if hook.endswith("_end") else ["a", "b"]) for hook, found in order.items()} == (
        dict.fromkeys(order, True)
    )


def test_hooks_that_nobody_has_are_not_called(tmp_path):
    run = fit(tmp_path, None, Counter())
    assert run.callbacks.step_start is None
    assert run.callbacks.before_optimizer_step is not None
    assert not fit(tmp_path).callbacks


def test_state_resumes_bitwise(tmp_path):
    settings = {**SAVING, "optim": {"type": "adamw", "lr": 0.01}}
    whole, averages = Counter(), EMA(0.5)
    run = fit(tmp_path, settings, whole, averages, model=DropoutNet)
    expected, average = weights(run), {name: item.clone() for name, item in averages.tensors().items()}

    class Broken(Callback):
        def on_step_start(self, runner: TrainingRun) -> None:
            if runner.global_step == 4:
                raise RuntimeError("lost")

    with pytest.raises(CallbackFailed, match="callback Broken, on_step_start: RuntimeError: lost"):
        fit(tmp_path / "cut", settings, Counter(), EMA(0.5), Broken(), model=DropoutNet)
    found = next((tmp_path / "cut").rglob("checkpoints")).parent
    counter, again, calls = Counter(), EMA(0.5), []
    resumed = runner(tmp_path / "cut", {**settings, "resume": str(found)})
    resumed.fit(DropoutNet, splits(), loss=loss, callbacks=[counter, again, Witness(calls)])
    assert calls[:2] == [("witness.setup", 0), ("witness.on_load", 4)]
    assert equal(weights(resumed), expected)
    assert (counter.steps, again.averaged) == (6, 6)
    assert torch.equal(counter.total, whole.total)
    assert equal(dict(again.tensors()), average)
    log = "".join(path.read_text() for path in resumed.world.attempt.directory.rglob("*.log"))
    assert "callback witness: the checkpoint holds no state of it, and it starts anew" in log
    assert "callback Broken: the checkpoint holds its state, and this run has no such callback" in log


class NormNet(Net):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_average_is_that_of_torch(tmp_path, use_buffers):
    """Against `AveragedModel` on a run that does the same steps; it is what is evaluated and exported."""
    from safetensors.torch import load_file
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    class Reference(Callback):
        def on_fit_start(self, runner: TrainingRun) -> None:
            average = get_ema_multi_avg_fn(0.8)
            self.model = AveragedModel(runner.model, multi_avg_fn=average, use_buffers=use_buffers)

        def on_step_end(self, runner: TrainingRun) -> None:
            self.model.update_parameters(runner.model)

    reference, average = Reference(), EMA(0.8, use_buffers=use_buffers)
    model = NormNet if use_buffers else Net
    settings = {"steps": 6, "eval_interval": 6, "checkpoint": {"load_only": False, "export_dtype": "fp32"}}
    run = fit(tmp_path, settings, average, reference, model=model)
    whole = {name.removeprefix("module."): item for name, item in reference.model.eval().state_dict().items()}
    expected = {name: item for name, item in whole.items() if item.is_floating_point() and item.dim()}
    assert equal(dict(average.tensors()), expected)
    val = Pairs(10, seed=1)
    with torch.no_grad():
        of_average = loss(reference.model(val.inputs), (val.inputs, val.targets)).item()
    assert run.results["val.loss"] == pytest.approx(of_average, rel=1e-6)
    exported = load_file(run.world.attempt.run_directory / "checkpoints" / "export" / "model.safetensors")
    assert equal({name: exported[name] for name in expected}, expected)
    assert equal(weights(run), weights(fit(tmp_path / "without", {"steps": 6}, model=model)))


def test_configured_callbacks(tmp_path):
    entries = [
        {"_target_": "tests.runner.test_callbacks.Counter", "factor": 2.0},
        {"_target_": "danling_conf.EMA", "decay": 0.5},
    ]
    run = fit(tmp_path, {"callbacks": entries}, LearningRateMonitor())
    assert run.callbacks.keys == ["Counter", "EMA", "LearningRateMonitor"]
    assert run.callbacks.state_dict()["Counter"]["steps"] == 6


@pytest.mark.parametrize(
    ("entries", "path", "rule"),
    [
        ([{"decay": 0.5}], "callbacks[0]._target_", "names no callback"),
        ([{"_target_": "danling_conf.EMAA"}], "callbacks[0]._target_", "EMAA"),
        ([{"_target_": "danling_conf.EMA", "decoy": 0.5}], "callbacks[0]._target_", "decoy"),
        ([{"_target_": "danling_conf.EMA", "decay": 2.0}], "callbacks[0]._target_", "decay"),
        ([{"_target_": "torch.nn.ReLU"}], "callbacks[0]._target_", "it makes a ReLU"),
        ([{"_target_": "os.system", "command": "exit"}], "callbacks[0]._target_", "Python's own os"),
        ({"ema": {"_target_": "danling_conf.EMA", "decay": 2.0}, "none": None}, "callbacks.ema._target_", "decay"),
        ([{"_target_": "danling_conf.EMA"}, {"_target_": "danling_conf.EMA"}], "callbacks", "two callbacks"),
        ([{"_target_": "danling_conf.EMA", "name": "a.b"}], "callbacks", "no dot"),
        ([{"_target_": "danling_conf.SamplePredictions", "split": "vall"}], "callbacks", "no such split"),
    ],
)
def test_refusals(tmp_path, entries, path, rule):
    with pytest.raises(ConfigRefused) as refusal:
        runner(tmp_path, {"callbacks": entries}).fit(Net, splits(), loss=loss)
    (violation,) = refusal.value.violations
    assert violation.path == path
    assert rule in violation.rule
    assert violation.fix


def test_callbacks_are_part_of_the_identity(tmp_path):
    from danling_conf.config.identity import config_id

    with_average = config(tmp_path, {"callbacks": [{"_target_": "danling_conf.EMA"}]})
    assert config_id(with_average) != config_id(config(tmp_path))
    assert config_id(config(tmp_path, {"evaluate_first": True})) == config_id(config(tmp_path))


def test_what_is_no_callback_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"is no danling_conf\.Callback"):
        runner(tmp_path).fit(Net, splits(), loss=loss, callbacks=[object()])


def test_on_exception(tmp_path):
    calls: list[tuple[str, int]] = []

    def breaks(output: Tensor, batch: Any) -> Tensor:
        raise ValueError("of the loss")

    with pytest.raises(ValueError, match="of the loss"):
        runner(tmp_path).fit(Net, splits(), loss=breaks, callbacks=[Witness(calls)])
    assert calls[-1] == ("witness.on_exception", 0)


class Stops(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_step_end(self, runner: TrainingRun) -> None:
        if self.hook == "step" and runner.global_step == 3:
            runner.stop("it is enough")

    def on_evaluation_end(self, runner: TrainingRun, split: str, results: Mapping[str, float]) -> None:
        if self.hook == "evaluation" and runner.global_step == 4:
            runner.stop()


@pytest.mark.parametrize(("hook", "step"), [("step", 3), ("evaluation", 4)])
def test_stop(tmp_path, hook, step):
    run = fit(tmp_path, {**SAVING, "steps": 12, "eval_interval": 4}, Stops(hook))
    assert run.global_step == step
    assert "val.loss" in run.results
    assert (run.world.attempt.run_directory / "checkpoints" / "latest").resolve().name == f"ckpt-s{step:08d}"


def test_logged_values_are_means_between_lines(tmp_path):
    run = runner(tmp_path, {"steps": 5, "log_interval": 2})

    class Logs(Callback):
        def on_step_end(self, runner: TrainingRun) -> None:
            runner.log("own.step", torch.tensor(float(runner.global_step), requires_grad=True))

        def on_fit_end(self, runner: TrainingRun) -> None:
            runner.log("own.end", 7)

    def logging_loss(output: Tensor, batch: Any) -> Tensor:
        value = loss(output, batch)
        run.log("own.loss", value)
        return value

    run.fit(Net, {"train": Pairs()}, loss=logging_loss, callbacks=[Logs(), LearningRateMonitor()])
    assert metrics(run, "own.step") == [1.5, 3.5, 5.0]
    assert metrics(run, "own.end") == [7.0]
    assert metrics(run, "own.loss")[:2] == pytest.approx(metrics(run, "train.loss")[:2])
    assert metrics(run, "lr.0-default") == [0.1, 0.1]
    assert metrics(run, "momentum.0-default") == [0.0, 0.0]


@pytest.mark.parametrize("name", ["step", "train.loss", "memory.peak_bytes.rank-0", "a:b", "", 3])
def test_names_that_are_not_logged(tmp_path, name):
    run = runner(tmp_path)
    with pytest.raises(ValueError, match="log\\("):
        run.log(name, 1.0)
    run.close()


@pytest.mark.parametrize("value", [torch.zeros(2), "text", None])
def test_values_that_are_not_logged(tmp_path, value):
    run = runner(tmp_path)
    with pytest.raises(ValueError, match="log\\('a'\\)"):
        run.log("a", value)
    run.close()


def test_names_of_the_runner_are_all_known(tmp_path):
    run = fit(tmp_path, {"log_interval": 1, "max_grad_norm": 1.0})
    lines = (run.world.attempt.run_directory / "metrics.jsonl").read_text().splitlines()
    names = {name for line in map(json.loads, lines) for name in line}
    assert names - set(OWN) == {"val.loss"}


def test_evaluate_first(tmp_path):
    settings = {"steps": 4, "eval_interval": 2}
    plain = fit(tmp_path / "plain", settings, model=DropoutNet)
    first = fit(tmp_path / "first", {**settings, "evaluate_first": True}, model=DropoutNet)
    assert len(metrics(first, "val.loss")) == len(metrics(plain, "val.loss")) + 1
    assert metrics(first, "val.loss")[1:] == metrics(plain, "val.loss")
    assert equal(weights(first), weights(plain))


def test_evaluate_first_is_not_repeated_on_resume(tmp_path):
    settings = {**SAVING, "eval_interval": 2, "evaluate_first": True}
    run = fit(tmp_path, {**settings, "steps": 2})
    again = fit(tmp_path, {**settings, "steps": 4, "resume": str(run.world.attempt.run_directory)})
    assert len(metrics(again, "val.loss")) == 3


def test_sample_predictions(tmp_path):
    run = fit(tmp_path, {"steps": 4, "eval_interval": 2, "tensorboard": True}, EMA(0.5), SamplePredictions(3))
    lines = [json.loads(line) for line in (run.world.attempt.run_directory / "texts.jsonl").read_text().splitlines()]
    assert [(line["name"], line["step"]) for line in lines] == [("val.predictions", 2), ("val.predictions", 4)]
    val = Pairs(10, seed=1)
    targets = [line.split(" -> ")[0] for line in lines[-1]["text"].splitlines()]
    assert targets == [str(int(target)) for target in val.targets[:3]]
