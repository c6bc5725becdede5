"""Layout names and presets wherever Hydra takes a choice: command lines, defaults lists, recipes, sweeps, own files."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Dict, Optional

import pytest

import danling_conf
from danling_conf import ConfigRefused, RunnerConfig
from danling_conf.config.check import warnings_of
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.identity import difference_from_defaults
from tests.support.command_line import PLAIN, run, write_app, write_configs

pytestmark = [pytest.mark.composition, pytest.mark.slow]

TRAIN = "defaults:\n  - danling\n  - _self_\nsteps: 3\n"


@dataclass(kw_only=True)
class DeepConfig:
    depth: int = 2
    """How deep."""
    extra: Dict[str, Any] = field(default_factory=dict)
    """Anything."""


@dataclass(kw_only=True)
class OwnConfig(RunnerConfig):
    width: int = 512
    """How wide."""
    note: Optional[str] = None
    """Unset: none."""
    deep: DeepConfig = field(default_factory=DeepConfig)


danling_conf.register(OwnConfig, "own_of_composition_tests")


class Color(Enum):
    RED = 1
    BLUE = 2


@dataclass(kw_only=True)
class RequiredConfig(RunnerConfig):
    width: int
    """How wide."""
    color: Color = Color.RED
    """Which."""
    mapping: Optional[Dict[str, Any]] = None
    """Unset: none."""


danling_conf.register(RequiredConfig, "required_of_composition_tests")


def composed(tmp_path, overrides=(), files=None, name="train"):
    """What Hydra composes, unchecked."""
    write_configs(tmp_path, {"train": TRAIN, **(files or {})})
    with composer(ConfigSearch(config_name=name, config_path=str(tmp_path / "conf"))) as composing:
        return composing.compose(list(overrides))


def degrees(config):
    axes = config.parallel.axes
    return axes.replicate, axes.shard, axes.tensor, config.fsdp.enabled


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("single", (1, 1, 1, False)),
        ("ddp8", (8, 1, 1, False)),
        ("ddp", (-1, 1, 1, False)),
        ("fsdp", (1, -1, 1, True)),
        ("hsdp2x4", (2, 4, 1, True)),
        ("fsdp64_tp8_pp2", (1, 64, 8, True)),
        ("tp8_fsdp64_pp2", (1, 64, 8, True)),
    ],
)
def test_layout_on_the_command_line(tmp_path, name, expected):
    assert degrees(composed(tmp_path, [f"parallel={name}"])) == expected


def test_a_second_layout_leaves_nothing_of_the_first(tmp_path):
    files = {"train": "defaults:\n  - danling\n  - override parallel: fsdp64_tp8_pp2_ep4\n  - _self_\n"}
    config = composed(tmp_path, ["parallel=ddp4"], files)
    assert degrees(config) == (4, 1, 1, False)
    assert config.parallel.axes.pipeline == config.parallel.axes.expert == 1


def test_layout_in_a_file_of_the_user_in_the_same_group(tmp_path):
    mine = "# @package _global_\ndefaults:\n  - fsdp8\n  - _self_\nparallel:\n  axes:\n    replicate: 2\n"
    files = {"parallel/mine": mine, "parallel/fsdp_mine": "# @package _global_\ndefaults: [ddp2, _self_]\n"}
    assert degrees(composed(tmp_path, ["parallel=mine"], files)) == (2, 8, 1, True)
    # A name that begins like a layout is still the file's.
    assert degrees(composed(tmp_path, ["parallel=fsdp_mine"], files)) == (2, 1, 1, False)
    assert degrees(composed(tmp_path, ["parallel=fsdp4"], files)) == (1, 4, 1, True)


def test_preset_in_a_file_of_the_user_in_the_same_group(tmp_path):
    files = {"optim/mine": "defaults:\n  - sgd\n  - _self_\nnesterov: true\n"}
    optim = composed(tmp_path, ["optim=mine"], files).optim
    assert (optim.type, optim.momentum, optim.nesterov) == ("sgd", 0.9, True)


def test_recipe_overrides_the_layout(tmp_path):
    recipe = "# @package _global_\ndefaults:\n  - override /parallel: fsdp8_tp2\n  - override /fsdp: bf16\nsteps: 7\n"
    files = {"recipe/large": recipe}
    config = composed(tmp_path, ["+recipe=large"], files)
    assert degrees(config) == (1, 8, 2, True)
    assert (config.steps, config.fsdp.mp_policy.param_dtype) == (7, "bf16")
    # The command line is the last word.
    assert degrees(composed(tmp_path, ["+recipe=large", "parallel=ddp2"], files)) == (2, 1, 1, False)


@pytest.mark.parametrize("order", [["fsdp=bf16", "parallel=fsdp8"], ["parallel=fsdp8", "fsdp=bf16"]])
def test_layout_and_policy_in_either_order_on_the_command_line(tmp_path, order):
    config = composed(tmp_path, order)
    assert config.fsdp.enabled
    assert dict(config.fsdp.mp_policy) == {"param_dtype": "bf16", "reduce_dtype": "fp32"}
    assert degrees(config) == (1, 8, 1, True)


@pytest.mark.parametrize(
    "entries",
    [
        ["override parallel: fsdp8", "override fsdp: bf16"],
        ["override fsdp: bf16", "override parallel: fsdp8"],
    ],
)
def test_layout_and_policy_in_either_order_in_a_defaults_list(tmp_path, entries):
    train = "\n  - ".join(["defaults:", "danling", *entries, "_self_"])
    config = composed(tmp_path, files={"train": train})
    assert degrees(config) == (1, 8, 1, True)
    assert config.fsdp.mp_policy.param_dtype == "bf16"


@pytest.mark.parametrize("order", [["fsdp: bf16", "parallel: fsdp8"], ["parallel: fsdp8", "fsdp: bf16"]])
def test_without_the_base_config_groups_combine_in_either_order(tmp_path, order):
    train = "\n  - ".join(["defaults:", *order, "_self_"])
    config = composed(tmp_path, files={"train": train})
    assert config.fsdp.enabled
    assert config.fsdp.mp_policy.param_dtype == "bf16"
    assert config.parallel.axes.shard == 8


def test_explicit_contradiction_of_a_layout_is_refused():
    with pytest.raises(ConfigRefused) as caught:
        danling_conf.compose(["steps=3", "parallel=ddp4", "parallel.axes.shard=2"])
    (violation,) = caught.value.violations
    assert (violation.path, violation.value) == ("parallel.axes.shard", 2)
    assert "parallel=hsdp4x2" in violation.fix


@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_split_overrides_under_the_base_config(prefix):
    config = danling_conf.compose(["steps=3", f"{prefix}dataloader.val.batch_size=3", "dataloader.batch_size=8"])
    assert config.dataloader.val == {"batch_size": 3}
    assert config.dataloader.batch_size == 8


def test_split_overrides_under_a_registered_class():
    config = danling_conf.compose(
        ["steps=3", "dataloader.val.batch_size=3", "width=7", "optim.betas=[0.8,0.9]", "deep.depth=4", "model.w=1"],
        config_name="own_of_composition_tests",
    )
    assert isinstance(config, OwnConfig)
    assert config.dataloader.val == {"batch_size": 3}
    assert (config.width, config.optim.betas, config.deep.depth, config.model) == (7, [0.8, 0.9], 4, {"w": 1})


def test_a_registered_class_in_a_defaults_list(tmp_path):
    write_configs(tmp_path, {"train": "defaults:\n  - own_of_composition_tests\n  - _self_\nwidth: 9\nsteps: 2\n"})
    config = danling_conf.compose(["fsdp=bf16", "parallel=fsdp2"], config_name="train", config_path=tmp_path / "conf")
    assert isinstance(config, OwnConfig)
    assert (config.width, config.fsdp.enabled) == (9, True)


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("width=abc", "width", "whole number"),
        ("width=null", "width", "leave it out"),
        ("widht=3", "widht", "width"),
        ("+widht=3", "widht", "width"),
        ("deep.depth=x", "deep.depth", "whole number"),
        ("deep.dept=3", "deep.dept", "deep.depth"),
        ("+deep.dept=3", "deep.dept", "deep.depth"),
        ("deep=3", "deep", "deep.KEY"),
    ],
)
def test_settings_of_a_user_are_checked_like_ours(override, path, fix):
    with pytest.raises(ConfigRefused) as caught:
        danling_conf.compose(["steps=3", override], config_name="own_of_composition_tests")
    (violation,) = caught.value.violations
    assert violation.path == path
    assert fix in violation.fix


def test_a_setting_of_a_user_without_a_default_must_be_given():
    """Its absence is one fault among all; given, everything that looks at defaults copes."""
    with pytest.raises(ConfigRefused) as caught:
        danling_conf.compose(["color=GREEN", "accum_steps=0"], config_name="required_of_composition_tests")
    assert {item.path for item in caught.value.violations} == {"width", "color", "accum_steps", "steps"}
    config = danling_conf.compose(["steps=3", "width=7", "color=BLUE"], config_name="required_of_composition_tests")
    assert (config.width, config.color) == (7, Color.BLUE)
    assert warnings_of(config) == []
    assert {"width": 7, "color": "BLUE"}.items() <= difference_from_defaults(config).items()


@pytest.mark.parametrize("override", ["mapping={a:1}", "mapping.a=1", "+mapping.a=1"])
def test_keys_for_a_null_mapping_of_a_user_are_refused_with_the_way_out(override):
    with pytest.raises(ConfigRefused) as caught:
        danling_conf.compose(["steps=3", "width=7", override], config_name="required_of_composition_tests")
    (violation,) = caught.value.violations
    assert violation.path == "mapping"
    assert "default_factory=dict" in violation.fix


def test_free_form_mappings_of_a_user_take_anything():
    config = danling_conf.compose(
        ["steps=3", "deep.extra.a.b=1", "model.layers=3", "data.path=/x"], config_name="own_of_composition_tests"
    )
    assert config.deep.extra == {"a": {"b": 1}}
    assert (config.model, config.data) == ({"layers": 3}, {"path": "/x"})


def test_registering_what_cannot_be_registered():
    class Undecorated(RunnerConfig):
        pass

    with pytest.raises(TypeError, match="add @dataclass"):
        danling_conf.register(Undecorated)
    with pytest.raises(TypeError, match="derives from RunnerConfig"):
        danling_conf.register(DeepConfig)
    with pytest.raises(ValueError, match="already belongs to RunnerConfig"):
        danling_conf.register(OwnConfig, "danling")
    assert danling_conf.register(OwnConfig, "own_of_composition_tests") is OwnConfig


def test_sweep_of_plain_hydra(tmp_path):
    """Layout names in a sweep of an app that does not know this package; a recipe and presets beside them."""
    write_configs(tmp_path, {"train": TRAIN})
    app = write_app(tmp_path, PLAIN)
    done = run(app, "-m", "parallel=ddp2,fsdp4_tp2,hsdp2x2,single", "fsdp=bf16", "hydra.sweep.dir=out")
    assert done.code == 0, done.err
    seen = [line.removeprefix("axes ") for line in done.out.splitlines() if line.startswith("axes ")]
    assert seen == ["2 1 1 1 1 False", "1 4 1 1 2 True", "2 2 1 1 1 True", "1 1 1 1 1 False"]


def test_sweep_over_presets_and_files_of_the_user_by_pattern(tmp_path):
    write_configs(tmp_path, {"train": TRAIN, "optim/again": "type: adagrad\n"})
    app = write_app(tmp_path, PLAIN)
    done = run(app, "-m", "optim=glob(a*)", "hydra.sweep.dir=out")
    assert done.code == 0, done.err
    jobs = [line.rpartition(" ")[2] for line in done.out.splitlines() if "#" in line]
    assert jobs == ["optim=adafactor", "optim=adam", "optim=adamw", "optim=again"]


def test_bad_layout_name_under_plain_hydra_is_one_line(tmp_path):
    write_configs(tmp_path, {"train": TRAIN})
    app = write_app(tmp_path, PLAIN)
    done = run(app, "parallel=fsdp8x_tp2")
    assert done.code == 1
    assert "Traceback" not in done.err
    shown = [line for line in done.err.splitlines() if line and "HYDRA_FULL_ERROR" not in line]
    assert shown == ["layout 'fsdp8x_tp2': '8x' in 'fsdp8x' is not a degree; write a whole number from 1 up"]


def test_groups_in_help_and_search_path_of_plain_hydra(tmp_path):
    write_configs(tmp_path, {"train": TRAIN})
    app = write_app(tmp_path, PLAIN)
    shown = run(app, "--help").out
    assert "compile: aot_eager, default, max, none, reduce_overhead, whole" in shown
    assert "parallel: ddp, ddp2" in shown
    assert "danling://" in run(app, "--info", "searchpath").out
