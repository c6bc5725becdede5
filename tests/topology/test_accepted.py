"""Accepting what is right: command lines that must compose, pass every rule and leave nothing to be warned of."""

from __future__ import annotations

import pytest

import danling_conf
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.resolve import inspect
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context, ineffective_settings

pytestmark = [pytest.mark.composition, pytest.mark.slow]

CPU = Context()
EIGHT = Context(machine=Machine(devices=8))


def started(count: int) -> Context:
    return Context(machine=Machine(devices=8, started_world_size=count, launcher="torchrun"))


ACCEPTED = [
    ("steps=1", CPU),
    ("epochs=1", CPU),
    ("steps=null epochs=3", CPU),
    ("steps=1000000000", CPU),
    ("steps=3 seed=0", CPU),
    ("steps=3 seed=null deterministic=true", CPU),
    ("steps=3 parallel=fsdp8 compile=max", CPU),
    ("steps=3 parallel=fsdp8 compile=max", EIGHT),
    ("steps=3 parallel=fsdp8 compile=max", started(8)),
    ("steps=3 parallel=fsdp", started(4)),
    ("steps=3 parallel=fsdp", CPU),
    ("steps=3 parallel=ddp", EIGHT),
    ("steps=3 parallel=ddp4", EIGHT),
    ("steps=3 parallel=hsdp2x2 fsdp=bf16 optim=adamw scheduler=cosine", CPU),
    ("steps=3 parallel=hsdp4x8", started(32)),
    ("steps=3 parallel=ddp64", CPU),
    ("steps=3 parallel=ddp4 accum_steps=2 max_grad_norm=1.0", CPU),
    ("steps=3 parallel=ddp16 parallel.mesh_device_type=cpu", EIGHT),
    ("steps=3 parallel=fsdp8 parallel.axes.replicate=2", CPU),
    ("steps=3 parallel.axes.replicate=-1", started(6)),
    ("steps=3 parallel.axes.replicate=2 parallel.axes.shard=-1 fsdp.enabled=true", started(6)),
    ("steps=3 parallel=single stack=ddp", CPU),
    ("steps=3 parallel=ddp2 stack=torch", CPU),
    ("steps=3 parallel=fsdp2 stack=parallel", CPU),
    ("steps=3 parallel=fsdp4 fsdp.reshard_after_forward=2", CPU),
    ("steps=3 parallel=fsdp4 fsdp.reshard_after_forward=false", CPU),
    ("steps=3 parallel=fsdp4 fsdp.mp_policy.param_dtype=bfloat16 precision=bf16", CPU),
    ("steps=3 parallel=fsdp4 +fsdp.mp_policy.param_dtype=bf16", CPU),
    ("steps=3 parallel=fsdp4 fsdp=offload fsdp.offload_policy.pin_memory=false", CPU),
    ("steps=3 precision=fp16", CPU),
    ("steps=3 precision=bfloat16 parallel=ddp2", CPU),
    ("epochs=5 optim=sgd scheduler=plateau", CPU),
    ("epochs=5 scheduler=plateau scheduler.monitor=val.loss scheduler.interval=validation", CPU),
    ("steps=3 optim=muon optim.param_groups=[{pattern:embed,algorithm:adamw}]", CPU),
    ("steps=3 optim.type=AdamW optim.lr=1e-3 optim.betas=[0.9,0.99] optim.fused=true", CPU),
    ("steps=3 optim.lr=1", CPU),
    ("steps=3 optim.lr=null optim=adafactor", CPU),
    ("steps=3 optim=adafactor parallel=ddp2", CPU),
    ("steps=3 optim.type=sgd ~optim.betas optim.momentum=0.9", CPU),
    ("steps=3 optim.type=my_package.optimizers.Lion optim.anything=3", CPU),
    ("steps=3 optim.param_groups=[{pattern:bias$,weight_decay_multiplier:0},{pattern:head,lr_multiplier:0.1}]", CPU),
    ("steps=3 scheduler.type=StepLR scheduler.step_size=10 scheduler.gamma=0.5", CPU),
    ("steps=3 scheduler=wsd scheduler.warmup_steps=1 scheduler.decay_steps=1", CPU),
    ("steps=3 scheduler.type=onecyclelr scheduler.max_lr=0.1", CPU),
    ("steps=3 dataloader.batch_size=8 dataloader.train.shuffle=false dataloader.val.batch_size=3", CPU),
    ("steps=3 dataloader=workers dataloader.val.num_workers=0", CPU),
    ("steps=3 dataloader.my_own_split.batch_size=1", CPU),
    ("steps=3 +dataloader.val.batch_size=3", CPU),
    ("steps=3 ++dataloader.batch_size=3", CPU),
    ("steps=3 compile.enable=true compile.options={max_autotune:true}", CPU),
    ("steps=3 compile=aot_eager", Context(machine=Machine(compiler=False))),
    ("steps=3 parallel=ddp2 compile=default compile.optimize_ddp=python_reducer", CPU),
    ("steps=3 activation_checkpointing.mode=every_n activation_checkpointing.every_n=3", CPU),
    ("steps=3 gc=paced comm=strict parallel=ddp2", CPU),
    ("steps=3 comm=strict", Context(machine=Machine(started_world_size=1, launcher="srun"))),
    ("steps=3 checkpoint.interval=2 checkpoint.backend=file", CPU),
    ("steps=3 checkpoint=none", CPU),
    ("steps=3 auto_resume=true", CPU),
    ("steps=3 compile=default +compile.options.max_autotune=true", CPU),
    ("steps=3 compile=default compile.options.max_autotune=true", CPU),
    ("steps=3 workspace_root='~/not/yet/there' lineage=a.b experiment=lr-1e-3", CPU),
    ("steps=3 model.width=64 model.blocks.depth=2 +model.names=[a,b] data.path=/x", CPU),
    ("steps=3 score_split=test score_name=accuracy score_mode=max patience=3", CPU),
    ("steps=3 log=false log_interval=1 eval_interval=2", CPU),
    ("steps=3 lineage=${experiment}", CPU),
    ("steps=3 dataloader.batch_size=${accum_steps}", CPU),
    ("steps=3 hydra.verbose=true hydra.job.name=other", CPU),
]
"""Command lines and surroundings."""


@pytest.fixture(scope="module")
def composing():
    with composer(ConfigSearch(config_name="danling")) as opened:
        yield opened


@pytest.mark.parametrize(("line", "context"), ACCEPTED)
def test_accepted_without_a_word(composing, line, context):
    config, violations = inspect(composing.compose(line.split()), context=context)
    assert violations == []
    assert ineffective_settings(config, context) == []


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("steps=3 stack=torch parallel=ddp2", "stack", "ddp"),
        ("steps=3 parallel=ddp2", "stack", "ddp"),
        ("steps=3", "stack", "ddp"),
        ("steps=3 parallel=fsdp2", "stack", "parallel"),
        ("steps=3 parallel=hsdp2x2", "stack", "parallel"),
        ("steps=3 precision=bfloat16", "precision", "bf16"),
        ("steps=3 precision=32", "precision", "fp32"),
        ("steps=3 scheduler=plateau scheduler.interval=validation", "scheduler.interval", "epoch"),
        ("steps=3 parallel=fsdp2 fsdp.mp_policy.reduce_dtype=float32", "fsdp.mp_policy.reduce_dtype", "fp32"),
        ("steps=3 lineage=${experiment}", "lineage", "exp"),
        ("steps=3 optim.lr=1", "optim.lr", 1.0),
    ],
)
def test_other_spellings_become_the_canonical_one(line, path, value):
    found = danling_conf.compose(line.split())
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_a_layout_is_filled_from_the_world(composing):
    config, _ = inspect(composing.compose(["steps=3", "parallel=fsdp"]), context=started(6))
    assert config.parallel.axes.shard == 6
    config, _ = inspect(composing.compose(["steps=3", "parallel=ddp"]), context=EIGHT)
    assert config.parallel.axes.replicate == 8
    config, _ = inspect(composing.compose(["steps=3", "parallel=fsdp"]), context=CPU)
    assert (config.parallel.axes.shard, config.fsdp.enabled) == (1, True)
