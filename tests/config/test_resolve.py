"""`resolve`: a typed, checked, read-only object of the user's class, open keys included."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import List

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import danling_conf
from danling_conf import ConfigRefused, RunnerConfig, resolve
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.identity import job_id, plain
from danling_conf.config.resolve import as_yaml
from danling_conf.records.frozen import frozen_content, thaw
from danling_conf.records.run_directory import Attempt
from danling_conf.schema import declared_class, open_keys
from danling_conf.topology.rules import Context

pytestmark = pytest.mark.composition

CPU = Context()


@dataclass(kw_only=True)
class PartConfig:
    depth: int = 2
    """How deep."""
    names: List[str] = field(default_factory=list)
    """Which."""


@dataclass(kw_only=True)
class OwnConfig(RunnerConfig):
    width: int = 512
    """How wide."""
    part: PartConfig = field(default_factory=PartConfig)

    def doubled(self) -> int:
        """A method of the user's own."""
        return 2 * self.width


danling_conf.register(OwnConfig, "own_of_resolve_tests")

OVERRIDES = ["steps=3", "optim=sgd", "dataloader.val.batch_size=3", "model.a=1", "parallel=fsdp2", "fsdp=bf16"]


@pytest.fixture
def config():
    return danling_conf.compose([*OVERRIDES, "width=7", "part.names=[a,b]"], config_name="own_of_resolve_tests")


def sections(config, path=""):
    yield path, config
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from sections(value, f"{path}.{item.name}")


def test_it_is_an_object_of_the_users_class(config):
    assert isinstance(config, OwnConfig)
    assert isinstance(config.part, PartConfig)
    assert declared_class(config) is OwnConfig
    assert type(config).__name__ == "OwnConfig"
    assert (config.width, config.doubled(), config.part.names) == (7, 14, ["a", "b"])
    assert "OwnConfig(" in repr(config)


def test_resolving_again_changes_nothing(config):
    assert resolve(config) is config
    assert resolve(resolve(config)) is config
    again = resolve(plain(config), kind=OwnConfig)
    assert again is not config
    assert plain(again) == plain(config)


def test_every_section_is_read_only(config):
    for path, section in sections(config):
        for name in (*vars(section), "something_new"):
            with pytest.raises(AttributeError, match="read-only"):
                setattr(section, name, 1)
            with pytest.raises(AttributeError, match="read-only"):
                delattr(section, name)
        assert not hasattr(section, "something_new"), path


def test_the_class_itself_stays_writable(config):
    own = OwnConfig()
    own.width = 3
    own.optim.lr = 0.5
    assert (own.width, own.optim.lr) == (3, 0.5)


def test_a_copy_by_replace_can_be_written(config):
    changed = replace(config, width=8)
    changed.width += 1
    assert (changed.width, config.width) == (9, 7)


def test_open_keys_are_fields(config):
    assert config.optim.momentum == 0.9
    assert config.dataloader.val == {"batch_size": 3}
    assert open_keys(config.optim) == {"momentum": 0.9}
    assert "momentum" in {item.name for item in fields(config.optim)}
    assert asdict(config)["optim"]["momentum"] == 0.9
    assert asdict(config)["dataloader"]["val"] == {"batch_size": 3}


def test_two_configurations_with_other_open_keys_do_not_share_them(config):
    other = danling_conf.compose(["steps=3", "optim=adam"])
    assert not hasattr(other.optim, "momentum")
    assert not hasattr(type(config.optim)(), "val")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_instantiate_sees_open_keys(config):
    """`hydra.utils.instantiate` of a section, as OmegaConf has it, passes its own settings and the open ones."""
    node = OmegaConf.structured(config.optim)
    node._target_ = "collections.OrderedDict"
    made = instantiate(node)
    assert made["momentum"] == 0.9
    assert made["type"] == "sgd"


@pytest.mark.parametrize("copied", [lambda it: pickle.loads(pickle.dumps(it)), copy.deepcopy, copy.copy])
def test_copies_and_pickles_are_the_same_and_read_only(config, copied):
    again = copied(config)
    assert plain(again) == plain(config)
    assert job_id(again) == job_id(config)
    assert isinstance(again, OwnConfig)
    assert again.optim.momentum == 0.9
    with pytest.raises(AttributeError, match="read-only"):
        again.optim.lr = 3
    assert resolve(again) is again


def test_what_hydra_composed_is_left_as_it_was():
    with composer(ConfigSearch(config_name="danling")) as composing:
        composed = composing.compose([*OVERRIDES, "precision=bfloat16"])
        before = OmegaConf.to_container(composed)
        resolve(composed, context=CPU)
        assert OmegaConf.to_container(composed) == before
        assert composed.precision == "bfloat16"


def test_everything_that_resolve_takes(config):
    trees = [
        {"steps": 3, "optim": {"lr": 0.5}},
        OmegaConf.create({"steps": 3, "optim": {"lr": 0.5}}),
        OmegaConf.merge(OmegaConf.structured(RunnerConfig), {"steps": 3, "optim": {"lr": 0.5}}),
    ]
    assert len({job_id(resolve(tree, context=CPU)) for tree in trees}) == 1
    own = RunnerConfig(steps=3)
    own.optim.lr = 0.5
    assert job_id(resolve(own, context=CPU)) == job_id(resolve(trees[0], context=CPU))
    assert own.stack == "auto"
    with pytest.raises(TypeError, match="not <class 'list'>"):
        resolve(["steps=3"])


def test_a_read_only_node_is_taken():
    node = OmegaConf.create({"steps": 3})
    OmegaConf.set_readonly(node, True)
    assert resolve(node, context=CPU).steps == 3


def test_interpolations_are_resolved_and_their_type_is_checked():
    config = resolve({"steps": 3, "eval_interval": "${steps}", "model": {"seen": "${optim.lr}"}}, context=CPU)
    assert (config.eval_interval, config.model) == (3, {"seen": 0.001})
    with pytest.raises(ConfigRefused, match="eval_interval"):
        resolve({"steps": 3, "eval_interval": "${lineage}"}, context=CPU)


def test_what_refers_to_a_seed_that_is_drawn_later_is_refused():
    given = {"steps": 2, "model": {"seed": "${seed}", "parts": ["run-${seed}"]}}
    with pytest.raises(ConfigRefused) as refused:
        resolve(OmegaConf.merge(OmegaConf.structured(RunnerConfig), given), context=CPU)
    assert [item.path for item in refused.value.violations] == ["model.seed", "model.parts[0]"]
    assert "set seed=0" in str(refused.value)
    seeded = resolve(OmegaConf.merge(OmegaConf.structured(RunnerConfig), given, {"seed": 3}), context=CPU)
    assert (seeded.model["seed"], seeded.model["parts"]) == (3, ["run-3"])


def test_all_faults_of_a_mapping_are_reported():
    tree = {"steps": "abc", "optim": {"lr": "x", "betass": [1]}, "fsdp": {"mp_policy": {"param_dtype": "f32", "a": 1}},
            "dataloader": {"val": {"batchsize": 3}, "test": 3}, "stepz": 3, "parallel": {"axes": {"tensor": 2, "x": 1}},
            "stack": "deepsped", "gc": None}  # fmt: skip
    with pytest.raises(ConfigRefused) as caught:
        resolve(tree, context=CPU)
    assert {item.path for item in caught.value.violations} == {
        "steps", "optim.lr", "optim.betass", "fsdp.mp_policy.param_dtype", "fsdp.mp_policy.a",
        "dataloader.val.batchsize", "dataloader.test", "stepz", "parallel.axes.x", "stack", "gc",
    }  # fmt: skip
    report = caught.value.report()
    assert report.startswith("configuration refused: 11 faults\n")
    assert report.count("fix: ") == 11


def attempt(tmp_path):
    return Attempt(run_directory=tmp_path, directory=tmp_path / "attempt", seed=5, command=("a.py", "steps=3"))


def test_a_frozen_configuration_thaws_to_the_same(config, tmp_path):
    content = frozen_content(config, attempt(tmp_path), "abc")
    again, its_attempt = thaw(content)
    assert plain(again) == plain(config)
    assert isinstance(again, OwnConfig)
    assert its_attempt == attempt(tmp_path)
    with pytest.raises(AttributeError, match="read-only"):
        again.width = 3


def test_a_frozen_configuration_that_was_edited_is_noticed(config, tmp_path):
    content = json.loads(frozen_content(config, attempt(tmp_path), "abc"))
    content["config"]["width"] = 8
    with pytest.raises(ValueError, match="job id"):
        thaw(json.dumps(content))


def test_a_saved_configuration_loads_as_it_was(config, tmp_path):
    danling_conf.save(config, tmp_path / "config.yaml")
    assert plain(danling_conf.load(tmp_path / "config.yaml", OwnConfig)) == plain(config)
    assert danling_conf.load(tmp_path / "config.yaml").width == config.width  # then a key of the app


def test_mappings_of_ones_own_are_read_only_dicts_with_attributes():
    """What a model is made of must pass wherever a dict does: `instantiate`, JSON, keyword arguments, pickle."""
    made = danling_conf.compose(["steps=3", "model.width=3", "+model.blocks.names=[a,b]"])
    for config in (made, pickle.loads(pickle.dumps(made)), copy.deepcopy(made), danling_conf.resolve(replace(made))):
        assert config.model.width == config.model["width"] == dict(**config.model)["width"] == 3
        assert config.model.blocks.names == ["a", "b"]
        assert config.model == json.loads(json.dumps(config.model)) == instantiate(config.model)
    with pytest.raises(AttributeError, match="read-only"):
        made.model.width = 4
    for change in (lambda: made.model.update(a=1), lambda: made.model.blocks.pop("names"), made.model.clear):
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(AttributeError, match="did you mean width"):
        made.model.widht  # noqa: B018
    assert not hasattr(made.data, "width")


def test_written_values_are_read_again_as_they_were():
    values = {
        "none": None, "yes": True, "word": "true", "number": "1e-3", "small": 1e-3, "big": 10**20, "empty": {},
        "rows": [1, [2.5, "x: y"], {"k": "ü"}], "text": "line\nline", "of": "${optim.lr}", "": "~", 3: "three",
    }  # fmt: skip
    text = as_yaml(values)
    assert OmegaConf.to_container(OmegaConf.create(text)) == values
    assert text == OmegaConf.to_yaml(OmegaConf.create(values))
