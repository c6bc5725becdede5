"""What is replaced in Hydra changes no result: the same configurations, and copies that share nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.base import Metadata

from danling_conf.config import hydra_adapter
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.hydra_changes import quick_copies
from danling_conf.schema import RunnerConfig

pytestmark = pytest.mark.composition


def metadata(node):
    content = node._value()
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [vars(node._metadata), *(metadata(child) for child in inner)]


def test_a_quick_copy_is_the_same_and_independent():
    node = OmegaConf.structured(RunnerConfig)
    OmegaConf.set_struct(node.optim, False)
    node._metadata.resolver_cache["now"]["%Y"] = "2026"
    usual = copy.deepcopy(node)
    with quick_copies(), quick_copies():
        quick = copy.deepcopy(node)
    assert not hasattr(Metadata, "__deepcopy__")
    assert metadata(quick) == metadata(usual) == metadata(node)
    assert quick == node
    assert quick.optim._parent is quick
    OmegaConf.set_struct(quick.optim, True)
    quick._metadata.resolver_cache["now"]["%Y"] = "2027"
    quick._metadata.resolver_cache["other"]["x"] = 1  # a dictionary that makes its entries, as the original
    quick.steps = 5
    assert metadata(usual) == metadata(node)
    assert node.steps is None


FILES = {
    "plain.yaml": "defaults: [danling, _self_]\nsteps: 3\n",
    "chosen.yaml": "defaults: [danling, override optim: sgd, override fsdp: bf16, _self_]\n",
    "own_group.yaml": "defaults: [danling, override gc: none, _self_]\n",
    "gc/none.yaml": "interval: 7\n",
    "between.yaml": "defaults: [danling, values, gc@data: none, fsdp@data.fsdp: default, _self_]\n",
    "values.yaml": "# @package _global_\ndata: {x: 1}\n",
    "without_base.yaml": "defaults: [optim: adamw, gc@other: none, fsdp: default, _self_]\n",
    "elsewhere.yaml": "defaults: [danling@inner, fsdp@inner.more: default, _self_]\n",
}


@pytest.fixture
def app(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def composed(app: Path, name: str) -> DictConfig:
    with composer(ConfigSearch(config_path=str(app), config_name=name)) as composing:
        return composing.compose(["hydra.job.name=x"])


@pytest.mark.parametrize("name", ["plain", "chosen", "own_group", "between", "without_base", "elsewhere"])
def test_hydra_without_waste_composes_the_same(app: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = composed(app, name)
    monkeypatch.setattr(hydra_adapter, "without_waste", nullcontext)
    usual = composed(app, name)
    assert OmegaConf.to_yaml(quick) == OmegaConf.to_yaml(usual)
    for config in (quick, usual):
        config._metadata.resolver_cache.clear()  # holds the time of day
    assert metadata(quick) == metadata(usual)


def test_presets_that_set_nothing_are_not_merged(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def merges() -> int:
        merged = []
        merge = DictConfig.merge_with
        with monkeypatch.context() as patched:
            patched.setattr(DictConfig, "merge_with", lambda self, *others: (merged.append(1), merge(self, *others)))
            composed(app, "plain")
        return len(merged)

    quick = merges()
    monkeypatch.setattr(hydra_adapter, "without_waste", nullcontext)
    assert merges() - quick >= 5
