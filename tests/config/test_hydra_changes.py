"""What is replaced in Hydra changes no result: the same configurations, and copies that share nothing."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.base import Metadata

from danling_conf.config import hydra_adapter
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.hydra_changes import quick_copies, without_waste
from danling_conf.schema import RunnerConfig

pytestmark = pytest.mark.composition


def metadata(node):
    content = node._value()
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [type(node), vars(node._metadata), *(metadata(child) for child in inner)]


def test_a_quick_copy_is_the_same_and_independent():
    node = OmegaConf.structured(RunnerConfig)
    OmegaConf.set_struct(node.optim, False)
    node._metadata.resolver_cache["now"]["%Y"] = "2026"
    usual = copy.deepcopy(node)
    with quick_copies(), quick_copies():
        quick = copy.deepcopy(node)
    assert not hasattr(Metadata, "__deepcopy__")
    assert type(copy.deepcopy(StringNode("x"))) is StringNode  # by OmegaConf's own again
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


def test_an_override_is_parsed_once(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    parse = OverridesParser.parse_rule

    def counted(self: OverridesParser, s: str, rule_name: str) -> Any:
        seen.append(s)
        return parse(self, s, rule_name)

    monkeypatch.setattr(OverridesParser, "parse_rule", counted)
    with composer(ConfigSearch(config_path=str(app), config_name="plain")) as composing:
        first = composing.compose(["optim=sgd", "optim.lr=0.5", "+data.layers=[1,2]"])
        first.data.layers.append(3)
        again = composing.compose(["optim=sgd", "optim.lr=0.5", "+data.layers=[1,2]"])
    assert again.data.layers == [1, 2]
    assert sorted(seen) == ["+data.layers=[1,2]", "optim.lr=0.5", "optim=sgd"]


def test_nodes_below_know_the_flags_of_what_they_are_merged_into() -> None:
    with without_waste():
        node = OmegaConf.create({"a": {"b": {"c": 1}}})
        assert not OmegaConf.is_readonly(node.a.b)
        other = OmegaConf.create({"a": {"b": {"d": {"e": 2}}}})
        OmegaConf.set_readonly(other, True)
        assert OmegaConf.is_readonly(other.a.b.d)
        node.merge_with({"a": other.a})
        assert node.a.b.d._get_root() is node
        assert not OmegaConf.is_readonly(node.a.b.d)
        OmegaConf.set_readonly(node, True)
        assert OmegaConf.is_readonly(node.a.b.d)
