"""`danling-conf schema`: what it accepts and what an editor underlines, judged by a JSON Schema validator."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator
from omegaconf import OmegaConf

from danling_conf.cli.main import main
from danling_conf.groups.layout_names import EXAMPLES, NAME_PATTERN
from danling_conf.groups.presets import GROUPS
from danling_conf.schema import RunnerConfig
from danling_conf.schema.docs import describe
from tests.support.command_line import REPOSITORY, write_configs
from tests.support.settings import documented, nested

pytestmark = pytest.mark.slow

TRAIN = str(REPOSITORY / "examples" / "train.py")

OWN = '''
from dataclasses import dataclass
from enum import Enum
import danling_conf

class Colour(Enum):
    red = 1
    blue = 2

@danling_conf.register
@dataclass(kw_only=True)
class OwnConfig(danling_conf.RunnerConfig):
    colour: Colour = Colour.red
    """Which colour."""
    sizes: list[int] | None = None

@danling_conf.main(config_path="conf", config_name="train")
def train(config): ...

if __name__ == "__main__":
    train()
'''


def schema(*arguments: str, capsys: Any) -> Draft7Validator:
    assert main(["schema", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    Draft7Validator.check_schema(found)
    return Draft7Validator(found)


def faults(judge: Draft7Validator, text: str) -> list[str]:
    """Paths of what is wrong in YAML."""
    content = OmegaConf.to_container(OmegaConf.create(text))
    return [".".join(str(part) for part in error.absolute_path) for error in judge.iter_errors(content)]


@pytest.fixture
def ours(capsys) -> Draft7Validator:
    return schema(capsys=capsys)


@pytest.fixture
def own(tmp_path, capsys) -> Draft7Validator:
    (tmp_path / "own.py").write_text(OWN)
    write_configs(
        tmp_path,
        {
            "train": "defaults:\n  - own_config\n  - model: small\n  - _self_\nsteps: 7\n",
            "model/small": "depth: 2\n",
            "model/large": "depth: 20\n",
            "optim/mine": "lr: 0.5\n",
        },
    )
    return schema(str(tmp_path / "own.py"), capsys=capsys)


GOOD = [
    "steps: 3",
    "steps: null",
    "steps: ${oc.env:STEPS}",
    "steps: ???",
    "optim: ${other}",
    "optim: {lr: 3e-4, betas: [0.9, 0.95]}",
    "optim: {type: my.package.Optimizer, whatever: {a: 1}}",
    "model: {anything: {at: all}}",
    "fsdp: {mp_policy: {param_dtype: bf16}, reshard_after_forward: 4}",
    "fsdp: {reshard_after_forward: true}",
    "precision: 32",
    "experiment: 12",
    "parallel: {axes: {shard: -1}}",
    "dataloader: {batch_size: 8, train: {shuffle: false}}",
    "wandb: {tags: [a, b]}",
    "wandb: {tags: a}",
    "callbacks: [{_target_: danling_conf.EMA, decay: 0.9}]",
    "defaults: [danling, _self_, optim: adamw, override parallel: fsdp64_tp8_pp2, /fsdp: null]",
    "defaults: [override /hydra/launcher: danling_slurm, optim@second: sgd, optional mine: x, profiling: [a, b]]",
    "hydra: {launcher: {timeout_min: 60}, run: {dir: x}}",
]
BAD = {
    "stepz: 3": "",
    "steps: abc": "steps",
    "steps: 0": "steps",
    "deterministic: 3": "deterministic",
    "precision: fp7": "precision",
    "optim: 3": "optim",
    "fsdp: {enabeld: true}": "fsdp",
    "fsdp: {mp_policy: {param_type: bf16}}": "fsdp",
    "parallel: fsdp8": "parallel",  # the mistake to write a choice outside of the defaults list
    "parallel: {axes: {shrad: 2}}": "parallel",
    "dataloader: {train: {shufle: false}}": "dataloader",
    "wandb: {tags: {a: 1}}": "wandb",
    "defaults: danling": "defaults",
    "defaults: [3]": "defaults.0",
    "hydra: {launcher: {timeout_min: soon}}": "hydra.launcher.timeout_min",
}


@pytest.mark.parametrize("text", GOOD)
def test_good_files(ours, text):
    assert faults(ours, text) == []


@pytest.mark.parametrize(("text", "where"), BAD.items())
def test_bad_files(ours, text, where):
    assert faults(ours, text) == [where]


def test_every_setting_is_described_and_typed(ours):
    root = ours.schema["properties"]
    for row in documented():
        if "<split>" in row.path:
            continue
        first, *rest = row.path.split(".")
        found = root[first]
        for part in rest:
            found = found["anyOf"][0]["properties"][part] if "properties" not in found else found["properties"][part]
        described = describe(RunnerConfig, row.path)
        assert found["description"] == " ".join(described.doc.split())
        for value in described.facts.choices or ():
            assert list(ours.iter_errors(nested(row.path, value))) == []


def test_presets_are_choices_with_their_reasons(ours):
    for group, presets in GROUPS.items():
        choices = ours.schema["definitions"][f"choice of {group}"]["anyOf"]
        found = {choice["const"]: choice.get("description") for choice in choices if "const" in choice}
        assert found == {name: preset.doc for name, preset in presets.items()}


def test_layout_names():
    assert all(re.search(NAME_PATTERN, name) for name in (*EXAMPLES, "cp2_ep4_etp2", "hsdp16x32"))
    assert not any(re.search(NAME_PATTERN, name) for name in ("fsdp0", "tp", "hsdp2", "fsdp8_", "ffsdp2"))


def test_the_files_of_the_examples_are_good(capsys):
    judge = schema(TRAIN, capsys=capsys)
    for path in ("train", "task/lm", "task/digits", "recipe/lm_small_fsdp"):
        assert faults(judge, (REPOSITORY / "conf" / f"{path}.yaml").read_text()) == []


def test_an_app_brings_its_settings_groups_and_choices(own):
    assert faults(own, "colour: blue") == []
    assert faults(own, "colour: green") == ["colour"]
    assert faults(own, "sizes: [1, two]") == ["sizes"]
    assert own.schema["properties"]["colour"]["description"] == "Which colour."
    assert faults(own, "defaults: [model: large, override optim: mine, override parallel: fsdp2]") == []
    assert faults(own, "defaults: [model: lage]") == ["defaults.0"]
    assert faults(own, "defaults: [override /optim: adamv]") == ["defaults.0"]
    assert faults(own, "defaults: [override /optm: adamw]") == ["defaults.0"]
    assert faults(own, "defaults: [/optim@second: adamw, optional /model: null]") == []
    assert "depth" in json.dumps(own.schema["properties"]["model"])


def test_files_of_a_group_have_a_schema_of_their_own(capsys):
    judge = schema("--section", "optim", capsys=capsys)
    assert faults(judge, "defaults: [adamw]\nlr: 0.1\nnesterov: true") == []
    assert faults(judge, "lr: fast") == ["lr"]
    judge = schema("--section", "fsdp", capsys=capsys)
    assert faults(judge, "lr: 0.1") == [""]


def test_refusals(capsys, tmp_path: Path):
    assert main(["schema", "--section", "optm"]) == 2
    assert "did you mean optim?" in capsys.readouterr().err
    assert main(["schema", str(tmp_path / "absent.py")]) == 2
    assert "there is no such file" in capsys.readouterr().err
