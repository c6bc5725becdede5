"""Apps with keys and groups of their own over the base config: flat YAML, `_target_`s everywhere, dataclasses."""

from __future__ import annotations

import importlib.util
import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.errors import HydraException

import danling_conf
from danling_conf import ConfigRefused
from danling_conf.config.identity import config_id, job_id
from danling_conf.records.frozen import frozen_job, thaw_job
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context

pytestmark = [pytest.mark.composition, pytest.mark.slow]

APPS = Path(__file__).parent


def flat(*overrides: str) -> Any:
    return danling_conf.compose(list(overrides), config_path=APPS / "flat/conf", config_name="ours")


def targets(*overrides: str) -> Any:
    return danling_conf.compose(list(overrides), config_path=APPS / "targets/conf", config_name="train")


@pytest.fixture(scope="module")
def structured() -> Any:
    """The module of that app, which registers its classes."""
    import sys

    spec = importlib.util.spec_from_file_location("structured_app", APPS / "structured/train.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["structured_app"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refusals(compose: Any, *overrides: str) -> dict[str, str]:
    with pytest.raises(ConfigRefused) as caught:
        compose(*overrides)
    return {item.path: item.fix for item in caught.value.violations}


def test_a_flat_file() -> None:
    config = flat()
    assert (config.hidden, config.tags, config.nested.dropout) == (32, ["debug", "first"], 0.2)
    assert (config.optim.lr, config.experiment, config.release) == (0.1, "lr-0.1", 1.1)
    assert flat("hidden=64", "+extra.deep=1").extra.deep == 1
    assert config_id(flat("hidden=64")) != config_id(config)


def test_what_plain_hydra_composed_is_taken() -> None:
    """`Runner(cfg)` begins with `resolve`."""
    version = {"version_base": None} if hydra.__version__.startswith("1.3") else {}
    with hydra.initialize_config_dir(str(APPS / "flat/conf"), **version):
        composed = hydra.compose("ours", ["hidden=64", "optim.lr=0.5"])
        alone = hydra.compose("config", ["+parallel=fsdp2", "+steps=3"])
        with pytest.raises(HydraException):
            hydra.compose("ours", ["nested.dropuot=0.5"])
    config = danling_conf.resolve(composed)
    assert (config.hidden, config.nested.dropout, config.optim.lr) == (64, 0.2, 0.5)
    config = danling_conf.resolve(alone, context=Context(machine=Machine(devices=2)))  # without the base config too
    assert (config.hidden, config.parallel.axes.shard, config.fsdp.enabled, config.steps) == (32, 2, True, 3)


def test_groups_named_like_settings_of_ours() -> None:
    """`experiment/` and `callbacks/`, as the popular template has them."""
    config = targets("experiment=wide", "callbacks.early_stopping.monitor=val/loss")
    assert (config.model.width, config.experiment) == (32, "exp")
    assert config.callbacks.early_stopping == {
        "_target_": "train.EarlyStopping", "monitor": "val/loss", "patience": 9,
    }  # fmt: skip
    assert config_id(config) != config_id(targets("experiment=wide"))
    near = refusals(targets, "callbacks.early_stopping.patiense=1")["callbacks.early_stopping.patiense"]
    assert near.startswith("did you mean callbacks.early_stopping.patience?")
    assert "callbacks.early_stopping._target_" in refusals(targets, "callbacks.early_stopping._target_=os.system")
    assert targets("callbacks.early_stopping=null").callbacks == {"early_stopping": None}


def test_groups_with_targets_everywhere() -> None:
    config = targets("trainer.max_epochs=5", "+trainer.precision=32", "model.net.depth=4")
    assert (config.trainer.max_epochs, config.trainer.precision, config.model.net.depth) == (5, 32, 4)
    assert (config.task_name, config.ckpt_path, config.extras.print_config) == ("train", None, True)
    assert config.data.transforms[0].object == "flip"
    # Known once the run has its directory; until then, and in the run's identity, the same for every attempt.
    assert config.paths.output_dir == config.logger.csv.save_dir == "<hydra.runtime.output_dir>"


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("model.widht=5", "model.widht", "did you mean model.width? To add it, write +model.widht=..."),
        ("model.net.detph=5", "model.net.detph", "did you mean model.net.depth?"),
        ("data.batchsize=5", "data.batchsize", "did you mean data.batch_size?"),
        ("trainer.max_epoch=5", "trainer.max_epoch", "did you mean trainer.max_epochs?"),
        ("trainr.max_epochs=5", "trainr", "did you mean trainer?"),
        ("task_nam=x", "task_nam", "did you mean task_name?"),
        ("zzz=1", "zzz", "to add a key of your own, write +zzz=..."),
        ("data.zzz=1", "data.zzz", "to add it, write +data.zzz=..."),
        ("stepz=4", "stepz", "did you mean steps?"),
        ("+stepz=4", "stepz", "did you mean steps? A key of your own needs another name"),
        ("+optm.lr=4", "optm", "did you mean optim?"),
        ("+optim.lrr=4", "optim.lrr", "did you mean lr?"),
        ("trainer=gpu", "trainer", "did you mean trainer=cpu? Choices: cpu"),
        ("model.width=???", "model.width", "set model.width=..."),
    ],
)
def test_what_nobody_declares_is_refused_with_the_nearest_name(override: str, path: str, fix: str) -> None:
    assert refusals(targets, override)[path].startswith(fix)


def test_a_misspelt_setting_in_a_file_is_no_key_of_the_app(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [danling, _self_]\nstep: 3\noptm: {lr: 1}\nmodels: {a: 1}\n")
    found = refusals(lambda: danling_conf.compose(config_path=tmp_path, config_name="train"))
    assert found.keys() == {"step", "optm", "steps"}  # `models` is the app's


def test_workers_and_pickles_have_the_same_mappings() -> None:
    config = targets("+model.extra.a=1")
    frozen = json.loads(json.dumps(frozen_job(config, None)))
    for other in (pickle.loads(pickle.dumps(config)), thaw_job(frozen)):
        assert (other.model.extra.a, other.trainer.max_epochs, job_id(other)) == (1, 3, job_id(config))
        with pytest.raises(AttributeError, match="read-only"):
            other.trainer.max_epochs = 4


def test_structured_configs_are_typed_and_checked(structured: Any) -> None:
    def compose(*overrides: str) -> Any:
        return danling_conf.compose(["steps=3", *overrides], config_name="app_config")

    config = compose("model.net.depth=4", "trainer.max_epochs=7")
    assert isinstance(config.model, structured.MyModelConfig)
    assert asdict(config.model) == asdict(structured.MyModelConfig(net=structured.NetConfig(depth=4)))
    assert config.trainer.max_epochs == 7
    found = refusals(compose, "model.widht=3", "model.net.depth=deep", "+trainer.max_epoch=3")
    assert found["model.widht"] == "did you mean model.width?"
    assert found["model.net.depth"] == "write a whole number, such as 8"
    assert found["trainer.max_epoch"] == "did you mean trainer.max_epochs?"


def test_structured_configs_of_the_config_store_stay_typed_in_workers(structured: Any, tmp_path: Path) -> None:
    text = "defaults: [danling, model: wide, trainer: short, _self_]\nsteps: 3\n"
    (tmp_path / "train.yaml").write_text(text)

    def compose(*overrides: str) -> Any:
        return danling_conf.compose(list(overrides), config_path=tmp_path, config_name="train")

    config = compose("model.name=1e3")
    for made in (config, thaw_job(json.loads(json.dumps(frozen_job(config, None))))):
        assert isinstance(made.model, structured.WideConfig)
        assert isinstance(made.trainer, structured.TrainerConfig)
        assert asdict(made.model) == asdict(structured.WideConfig(name="1e3"))
        assert made.trainer.max_epochs == 1
    found = refusals(compose, "model.width=wide", "trainer.max_epoch=3", "+model.net.dept=3")
    assert found.keys() == {"model.width", "trainer.max_epoch", "model.net.dept"}


def test_a_second_class_of_the_whole_configuration_is_refused_with_the_way_out(tmp_path: Path) -> None:
    from hydra.core.config_store import ConfigStore

    @dataclass
    class Whole:
        lr: float = 0.1

    ConfigStore.instance().store(name="whole_of_apps", node=Whole)
    (tmp_path / "train.yaml").write_text("defaults: [danling, whole_of_apps, _self_]\nsteps: 3\n")
    found = refusals(lambda: danling_conf.compose(config_path=tmp_path, config_name="train"))
    assert "derive Whole from danling_conf.RunnerConfig" in found["defaults"]
