"""What was typed is what arrives, on command lines and in files."""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, List, Optional

import pytest

import danling_conf
from danling_conf import ConfigRefused
from danling_conf.config.check import warnings_of

pytestmark = pytest.mark.composition


@dataclass(kw_only=True)
class TextConfig(danling_conf.RunnerConfig):
    kind: str = "text"
    names: List[str] = field(default_factory=list)
    count: int = 3
    rate: float = 0.1
    note: Optional[str] = None


danling_conf.register(TextConfig, "text_of_apps")


def composed(*overrides: str, **place: Any) -> Any:
    return danling_conf.compose(list(overrides), **{"config_name": "text_of_apps", **place})


TEXTS = [
    "123e4567", "12e3", "1_000", "0x10", "1e5", "007", "1.10", "true", "True", "inf", "nan", "-0", "+5",
    "12345678901234567890123", "1.0", "'1e3'", '"007"',
]  # fmt: skip


def test_text_is_not_read_as_a_number() -> None:
    places = ["kind", "experiment", "note", "lineage", "wandb.project"]
    for start in range(0, len(TEXTS), len(places)):
        given = dict(zip(places, TEXTS[start:], strict=False))
        config = composed("steps=3", *(f"{place}={text}" for place, text in given.items()))
        for place, text in given.items():
            assert attrgetter(place)(config) == text.strip("'\"")
    assert composed("steps=3", "names=[1e3,b,007,1_000]").names == ["1e3", "b", "007", "1_000"]
    assert composed("steps=3", "note=null").note is None


def test_text_in_files(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/one.yaml").write_text("# @package _global_\nkind: 0x10\nlineage: 007\nnote: '1e3'\n")
    (tmp_path / "train.yaml").write_text(
        "defaults: [text_of_apps, part: one, _self_]\nsteps: 3\nexperiment: 1.10\nnames: [1e3, '1e3', x]\n"
        "wandb: {project: 1_000}\n"
    )
    config = composed(config_path=tmp_path, config_name="train")
    assert (config.kind, config.lineage, config.note, config.experiment) == ("0x10", "007", "1e3", "1.10")
    assert (config.names, config.wandb.project) == (["1e3", "1e3", "x"], "1_000")
    assert composed("kind=2.50", config_path=tmp_path, config_name="train").kind == "2.50"


def test_integers_are_not_rounded() -> None:
    assert composed("steps=3", "count=9007199254740993").count == 9007199254740993
    assert composed("steps=3", "rate=1").rate == 1.0
    with pytest.raises(ConfigRefused, match=r"write 100000000000000000000000$"):
        composed("steps=3", "count=1e23")


def test_the_budget_that_was_typed_wins(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [danling, _self_]\nepochs: 20\n")
    config = composed("steps=5", config_path=tmp_path, config_name="train")
    assert (config.steps, config.epochs) == (5, None)
    (line,) = warnings_of(config)
    assert line == "steps=5 is on the command line, so epochs=20 of a file is set to null"
    with pytest.raises(ConfigRefused, match="exclude each other"):
        composed("steps=5", "epochs=3", config_path=tmp_path, config_name="train")


@pytest.mark.parametrize(
    ("overrides", "dropped"),
    [
        (["optim.type=SGD"], ["optim.betas"]),
        (["optim.type=Rprop"], ["optim.weight_decay", "optim.betas"]),
        (["optim=sgd", "optim.type=adamw"], ["optim.momentum"]),
        (["scheduler=cosine", "scheduler.type=StepLR", "scheduler.step_size=3"], ["scheduler.final_lr_ratio"]),
        (["scheduler=plateau", "scheduler.type=cosine"], ["scheduler.factor", "scheduler.patience"]),
    ],
)
def test_options_that_only_a_preset_gave_are_dropped_with_a_line(overrides: list[str], dropped: list[str]) -> None:
    lines = [line.partition("=")[0] for line in warnings_of(composed("steps=3", *overrides)) if "dropped" in line]
    assert sorted(lines) == sorted(dropped)


def test_options_that_the_user_wrote_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigRefused, match=r"optim\.betas"):
        composed("steps=3", "optim.type=SGD", "optim.betas=[0.9,0.95]")
    text = "defaults: [danling, _self_]\nsteps: 3\noptim: {type: SGD, betas: [0.8, 0.9]}\n"
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(ConfigRefused, match=r"optim\.betas"):
        composed(config_path=tmp_path, config_name="train")
