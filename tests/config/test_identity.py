"""Two hashes: `job_id` of everything, `config_id` of what changes the result of training."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

import danling_conf
from danling_conf.config.identity import (
    canonical,
    config_id,
    difference_from_defaults,
    differences,
    flatten,
    job_id,
    plain,
)
from danling_conf.config.resolve import resolve
from danling_conf.schema import RunnerConfig, facts_of, setting
from danling_conf.topology.rules import Context
from tests.support.settings import another_value, settings

pytestmark = pytest.mark.composition

SETTINGS = settings()


def with_mappings() -> RunnerConfig:
    """A configuration whose unset mappings are set, so that each of their settings is there."""
    config = RunnerConfig()
    for path, item in SETTINGS:
        shape = facts_of(item).shape
        if shape is not None:
            owner, name = owner_of(config, path)
            setattr(owner, name, shape())
    return config


def owner_of(config: Any, path: str) -> tuple[Any, str]:
    *parents, last = path.split(".")
    for part in parents:
        config = getattr(config, part)
    return config, last


SEMANTIC = {path for path, item in SETTINGS if facts_of(item).semantic}
NOT_SEMANTIC = {path for path, item in SETTINGS if not facts_of(item).semantic}


@pytest.mark.parametrize(("path", "item"), [case for case in SETTINGS if not facts_of(case[1]).shape],
                         ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_every_setting_is_part_of_the_job_and_the_semantic_ones_of_the_configuration(path, item):
    before, after = with_mappings(), with_mappings()
    owner, name = owner_of(after, path)
    setattr(owner, name, another_value(path, item))
    assert job_id(before) != job_id(after)
    # A mapping that does not change the result has no part that does.
    semantic = all(".".join(path.split(".")[: end + 1]) not in NOT_SEMANTIC for end in range(len(path.split("."))))
    assert (config_id(before) != config_id(after)) == semantic


def test_setting_a_mapping_changes_the_job():
    assert job_id(with_mappings()) != job_id(RunnerConfig())


@pytest.mark.parametrize(
    "path",
    [
        "steps", "epochs", "workspace_root", "lineage", "experiment", "log", "log_interval", "checkpoint.interval",
        "dataloader.num_workers", "compile.enable", "heartbeat.enabled", "comm.init_timeout_seconds", "gc.interval",
        "parallel.allow_degree_change", "resume", "auto_resume", "wandb.name", "profiling.enabled",
    ],
)  # fmt: skip
def test_names_cadence_paths_workers_and_the_budget_do_not_change_the_result(path):
    assert path in NOT_SEMANTIC


@pytest.mark.parametrize(
    "path",
    [
        "seed", "accum_steps", "max_grad_norm", "precision", "optim.lr", "scheduler.type", "dataloader.batch_size",
        "dataloader.shuffle", "pretrained", "stack", "fsdp.enabled", "model", "data", "patience", "deterministic",
        *(f"parallel.axes.{axis}" for axis in ("replicate", "shard", "context", "pipeline", "tensor", "expert")),
    ],
)  # fmt: skip
def test_what_changes_the_result(path):
    assert path in SEMANTIC


def composed(*overrides: str):
    return danling_conf.compose(["steps=3", *overrides])


@pytest.mark.parametrize(
    ("override", "semantic"),
    [
        ("optim.amsgrad=true", True),
        ("scheduler.warmup_steps=1", True),
        ("model.width=3", True),
        ("model.blocks.depth=3", True),
        ("data.path=/x", True),
        ("dataloader.val.batch_size=3", True),
        ("dataloader.val.shuffle=true", True),
        ("dataloader.val.num_workers=3", False),
        ("dataloader.val.pin_memory=true", False),
        ("parallel=ddp2", True),
        ("parallel=fsdp2", True),
        ("steps=4", False),
        ("seed=1", True),
        ("hydra.verbose=true", False),
    ],
)
def test_open_keys_and_layouts(override, semantic):
    before, after = composed(), composed(override)
    assert (config_id(before) != config_id(after)) == semantic
    if not override.startswith("hydra."):
        assert job_id(before) != job_id(after)
    else:
        assert job_id(before) == job_id(after)


def test_a_setting_named_like_a_split_of_workers_in_free_form_is_the_users():
    """Only overrides of splits lose their worker settings; a model may have a setting of that name."""
    assert config_id(composed("model.val.num_workers=1")) != config_id(composed("model.val.num_workers=2"))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (["parallel=fsdp2", "fsdp=bf16", "optim=sgd"], ["optim=sgd", "fsdp=bf16", "parallel=fsdp2"]),
        (["model.b=1", "model.a=2"], ["model.a=2", "model.b=1"]),
        (["optim.fused=true", "optim.amsgrad=false"], ["optim.amsgrad=false", "optim.fused=true"]),
        (["precision=bfloat16"], ["precision=bf16"]),
        (["stack=torch"], ["stack=ddp"]),
        (["stack=torch"], []),
        (["parallel=ddp1"], ["parallel=single"]),
        (["parallel=fsdp2_tp1"], ["parallel=fsdp2"]),
        (["optim.lr=1e-3"], ["optim.lr=0.001"]),
        (["optim.lr=1"], ["optim.lr=1.0"]),
    ],
)
def test_what_means_the_same_has_the_same_identity(one, two):
    assert (config_id(composed(*one)), job_id(composed(*one))) == (config_id(composed(*two)), job_id(composed(*two)))


def test_a_filled_layout_is_the_layout_it_was_filled_to():
    from danling_conf.topology.machine import Machine

    world = Context(machine=Machine(devices=4))
    filled = resolve({"steps": 3, "parallel": {"axes": {"shard": -1}}, "fsdp": {"enabled": True}}, context=world)
    written = resolve({"steps": 3, "parallel": {"axes": {"shard": 4}}, "fsdp": {"enabled": True}}, context=world)
    assert config_id(filled) == config_id(written)


def test_the_identity_does_not_depend_on_the_process():
    code = (
        "import danling_conf; from danling_conf.config.identity import config_id, job_id;"
        "c = danling_conf.compose(['steps=3', 'optim.fused=true', 'model.a=1']); print(config_id(c), job_id(c))"
    )
    mine = composed("model.a=1", "optim.fused=true")
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )  # fmt: skip
        assert done.stdout.split() == [config_id(mine), job_id(mine)]


@dataclass(kw_only=True)
class NameConfig(RunnerConfig):
    label: str = setting("a", semantic=False)
    """A name."""
    width: int = 3
    """How wide."""
    table: dict[str, Any] = field(default_factory=dict)
    """Anything."""


def test_settings_of_a_user_count_unless_they_are_said_not_to():
    base = NameConfig()
    assert config_id(base) == config_id(NameConfig(label="b")) != config_id(NameConfig(width=4))
    assert job_id(base) != job_id(NameConfig(label="b"))


def test_the_plain_form_resolves_to_the_same_configuration():
    config = composed("parallel=hsdp2x2", "fsdp=bf16", "optim.fused=true", "dataloader.val.batch_size=3", "model.a.b=1")
    again = resolve(plain(config))
    assert (plain(again), job_id(again), canonical(again)) == (plain(config), job_id(config), canonical(config))
    assert "_target_" not in canonical(config)


def test_difference_from_defaults_is_all_that_differs():
    config = composed("optim.lr=0.5", "parallel=ddp2", "model.a.b=1", "~optim.betas")
    assert difference_from_defaults(config) == {
        "steps": 3, "stack": "ddp", "optim.lr": 0.5, "optim.weight_decay": 0.1, "parallel.axes.replicate": 2,
        "model.a.b": 1,
    }  # fmt: skip


def test_differences_of_two_trees():
    mine, theirs = {"a": {"b": 1, "c": 2}, "d": {}, "e": None}, {"a": {"b": 1, "c": 3}, "f": 4}
    assert differences(mine, theirs) == {"a.c": (2, 3), "f": (None, 4)}
    assert flatten(mine) == {"a.b": 1, "a.c": 2, "d": {}, "e": None}


def test_the_order_of_keys_in_a_mapping_does_not_matter():
    keys = [f"k{number}" for number in range(8)]
    shuffled = list(keys)
    random.Random(3).shuffle(shuffled)
    one, two = (RunnerConfig(model={key: 1 for key in order}) for order in (keys, shuffled))
    assert job_id(one) == job_id(two)
