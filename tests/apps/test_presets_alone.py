"""Presets in an app that knows nothing of us: each brings a whole, typed section that `instantiate` makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

import hydra
import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from danling_conf.config.identity import flatten
from danling_conf.groups.base import section_kinds
from danling_conf.groups.presets import GROUPS

pytestmark = pytest.mark.composition

CONF = Path(__file__).with_name("flat") / "conf"
VERSION = {"version_base": None} if hydra.__version__.startswith("1.3") else {}


@pytest.fixture(autouse=True, scope="module")
def initialized() -> Iterator[None]:
    with hydra.initialize_config_dir(str(CONF), **VERSION):
        yield


def composed(*overrides: str) -> DictConfig:
    return hydra.compose("config", list(overrides))


def test_each_section_is_whole_and_typed() -> None:
    config = composed("+parallel=fsdp2", "+compile=max", "+fsdp=bf16", "compile.fullgraph=true")
    assert list(config)[:3] == ["lr", "hidden", "tags"]
    for name in ("parallel", "compile", "fsdp"):
        kind = section_kinds()[name]
        assert OmegaConf.get_type(config[name]) is kind
        assert set(config[name]) == {item.name for item in fields(kind)}
    assert (config.parallel.axes.shard, config.fsdp.enabled, config.compile.fullgraph) == (2, True, True)
    assert dict(config.fsdp.mp_policy) == {"param_dtype": "bf16", "reduce_dtype": "fp32"}


@pytest.mark.parametrize("order", [["+fsdp=bf16", "+parallel=fsdp2"], ["+parallel=fsdp2", "+fsdp=bf16"]])
def test_layout_and_policy_in_either_order(order: list[str]) -> None:
    config = composed(*order)
    assert (config.fsdp.enabled, config.fsdp.mp_policy.param_dtype, config.parallel.axes.shard) == (True, "bf16", 2)


@pytest.mark.parametrize("group", [name for name in GROUPS if name in section_kinds()])
def test_every_preset_of_a_section_is_whole(group: str) -> None:
    for name, preset in GROUPS[group].items():
        section = composed(f"+{group}={name}")[group]
        assert set(section) >= {item.name for item in fields(section_kinds()[group])} - {"enabled"}
        settings = preset.settings if preset.package is None else preset.settings.get(group, {})
        assert all(OmegaConf.select(section, key) == value for key, value in flatten(dict(settings)).items())


def test_a_preset_at_another_place() -> None:
    config = composed("+optim@trainer.optimizer=sgd", "trainer.optimizer.momentum=0.5")
    assert (config.trainer.optimizer.type, config.trainer.optimizer.momentum, config.trainer.optimizer.lr) == (
        "sgd", 0.5, 0.1
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["compile.modee=x"], "modee"),
        (["compile.fullgraph=maybe"], "not a valid bool"),
        (["parallel.axes.shard=many"], "Integer"),
        (["+parallel@other=fpsd2"], "fpsd2"),
    ],
)
def test_hydra_refuses_wrong_types_and_unknown_keys(overrides: Sequence[str], said: str) -> None:
    with pytest.raises(HydraException) as refusal:
        composed("+parallel=fsdp2", "+compile=max", *overrides)
    assert said in f"{refusal.value} {refusal.value.__cause__}"
