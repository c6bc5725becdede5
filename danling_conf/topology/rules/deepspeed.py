"""Rules of `stack=deepspeed`: keys that DeepSpeed would take in silence, and what does not go together with ZeRO."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from danling_conf.schema import RunnerConfig, open_keys
from danling_conf.schema.dataloader import DataloaderConfig
from danling_conf.schema.deepspeed import (
    AUTO,
    DERIVED,
    ELEMENTWISE,
    ROOT_KEYS,
    SAID_ELSEWHERE,
    ZERO_KEYS,
    ZERO_SAID_ELSEWHERE,
)
from danling_conf.schema.layout import WORLD_AXES
from danling_conf.schema.nearest import nearest
from danling_conf.schema.torch_options import find_optimizer
from danling_conf.topology.layout import fill
from danling_conf.topology.rules.rule import Context, Ineffective, changed
from danling_conf.topology.rules.world import known_layout
from danling_conf.topology.violation import Violation

_ZERO = "deepspeed.zero_optimization"
_STAGE = f"{_ZERO}.stage"
_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def is_chosen(config: RunnerConfig) -> bool:
    """Whether the run is one of DeepSpeed's."""
    return config.stack == "deepspeed"


def installed(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """The stack needs its package."""
    if is_chosen(config) and not context.machine.deepspeed:
        fix = "pip install danling-conf[deepspeed], or stack=auto: parallel=fsdpN shards as ZeRO 3"
        yield Violation("stack", config.stack, "the package deepspeed is not installed", fix)


def only_replicates(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """ZeRO partitions over the data ranks, which are those of the replicate axis."""
    if not is_chosen(config):
        return
    for axis in WORLD_AXES:
        degree = getattr(config.parallel.axes, axis)
        if axis != "replicate" and degree not in (0, 1):
            rule = "ZeRO partitions over data ranks, and the deepspeed stack has no other axis"
            fix = "parallel=ddpN: ZeRO cuts what those ranks hold; or stack=auto for this layout"
            yield Violation(f"parallel.axes.{axis}", degree, rule, fix)
    if config.fsdp.enabled:
        rule = "ZeRO and FSDP would both shard the weights"
        yield Violation("fsdp.enabled", True, rule, "parallel=ddpN with deepspeed=zero3, or stack=auto")
    if not config.parallel.use_device_mesh:
        rule = "the deepspeed stack finds the data ranks in the device mesh"
        yield Violation("parallel.use_device_mesh", False, rule, "leave it true")


def known_keys(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Every key of DeepSpeed's configuration is known: it takes misspelt ones at the root in silence."""
    section = config.deepspeed
    yield from _keys(open_keys(section), "deepspeed", ROOT_KEYS, SAID_ELSEWHERE, DERIVED)
    yield from _keys(open_keys(section.zero_optimization), _ZERO, ZERO_KEYS, ZERO_SAID_ELSEWHERE, {})


def _keys(
    given: Mapping[str, Any],
    where: str,
    known: Mapping[str, type],
    elsewhere: Mapping[str, str],
    derived: Mapping[str, str],
) -> Iterator[Violation]:
    declared = ("zero_optimization",) if where == "deepspeed" else ("stage", "offload_optimizer", "offload_param")
    for key, value in given.items():
        path = f"{where}.{key}"
        if value == AUTO or key in derived:
            continue
        if key in elsewhere:
            if not _switched_off(value):
                yield Violation(path, value, elsewhere[key], "remove it")
        elif key not in known:
            near = nearest(key, [*declared, *known, *derived, *elsewhere])
            fix = f"did you mean {where}.{near}?" if near else "remove it"
            yield Violation(path, value, "DeepSpeed has no such key", fix)
        elif not _is(value, known[key]):
            yield Violation(path, value, f"it is {_KINDS[known[key]]}", "correct it, or remove it")


def _switched_off(value: Any) -> bool:
    """Whether a key is in a configuration that was taken over, and asks for nothing: `fp16: {enabled: false}`."""
    return value in (None, False) or (isinstance(value, Mapping) and value.get("enabled") in (False, AUTO))


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:  # 5e8 is how its documentation writes sizes
        return not isinstance(value, bool) and isinstance(value, (int, float)) and float(value).is_integer()
    return isinstance(value, kind)


def no_contradiction(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A key that follows from settings of ours may be given where it says the same."""
    given = open_keys(config.deepspeed)
    for key, value in _derived(config, context).items():
        mine = given.get(key, AUTO)
        if mine != AUTO and mine != value:
            shown = "null" if key == "gradient_clipping" and not value else value
            rule = f"{DERIVED[key]} says it, and makes it {value}"
            fix = f"remove it; it follows from {DERIVED[key]}={shown}" if key != "train_batch_size" else "remove it"
            yield Violation(f"deepspeed.{key}", mine, rule, fix)


def _derived(config: RunnerConfig, context: Context) -> dict[str, Any]:
    """What follows from settings of ours, as far as it is known before ranks start."""
    made: dict[str, Any] = {
        "gradient_accumulation_steps": config.accum_steps,
        "gradient_clipping": config.max_grad_norm or 0.0,
    }
    size = batch_size_of(config.dataloader)
    made["train_micro_batch_size_per_gpu"] = size
    layout = known_layout(config)
    if layout is not None:
        try:
            ranks = fill(layout, context.machine.fill_world_size).data_degree
        except ValueError:
            return made  # reported by `world.world_size`
        made["train_batch_size"] = math.prod((size, config.accum_steps, ranks))
    return made


def batch_size_of(section: DataloaderConfig) -> int:
    """Samples of a micro-batch of the training split on one rank."""
    own = getattr(section, "train", None)
    found = own.get("batch_size") if isinstance(own, Mapping) else getattr(own, "batch_size", None)
    return found or section.batch_size or 1


def fits_stage(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """What the stage of ZeRO needs or excludes."""
    if not is_chosen(config):
        return
    zero = config.deepspeed.zero_optimization
    stage = zero.stage
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = getattr(zero, name)
        if offload is not None and offload.device != "none" and stage < least:
            rule = f"it is part of ZeRO {least}{'' if least == 3 else ' to 3'}, and the stage is {stage}"
            yield Violation(f"{_ZERO}.{name}.device", offload.device, rule, f"{_STAGE}={max(least, 2)}")
    entry = find_optimizer(config.optim.type)
    if stage > 0 and entry is not None and entry.name not in ELEMENTWISE and not entry.needs_closure:
        what = "is your own class" if entry.own_class else "does not treat each number on its own"
        rule = f"ZeRO {stage} joins parameters and cuts them anywhere, and {entry.name} {what}"
        fix = f"choose one of {', '.join(ELEMENTWISE)}; or {_STAGE}=0, which cuts nothing"
        yield Violation("optim.type", config.optim.type, rule, fix)
    if getattr(zero, "overlap_comm", False) is True and stage == 1 and config.accum_steps > 1:
        rule = "ZeRO 1 reduces each micro-batch then, beside those it has reduced already"
        yield Violation(f"{_ZERO}.overlap_comm", True, rule, f"{_STAGE}=2, or leave it out")
    if stage == 3 and config.compile.enable:
        rule = "ZeRO 3 gathers and frees weights between modules, which compiled code does not see"
        yield Violation("compile.enable", True, rule, f"compile=none, or {_STAGE}=2, or stack=auto parallel=fsdpN")
    if stage == 3 and not config.checkpoint.save_frozen:
        rule = "frozen weights are partitioned by ZeRO 3, and whether they are the same is not compared there"
        yield Violation("checkpoint.save_frozen", False, rule, f"leave it true, or {_STAGE}=2")


def kept_promises(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Settings whose promise the stack could not keep."""
    if not is_chosen(config):
        return
    if config.precision == "fp16":
        rule = "fp16 needs loss scaling, which DeepSpeed does by turning the weights into fp16"
        yield Violation("precision", "fp16", rule, "precision=bf16, or a ddp layout with stack=auto")
    if config.parallel.unused_parameters != "refuse":
        rule = "DeepSpeed takes gradients of zero for them, by which momentum and weight decay move them"
        fix = "freeze them (requires_grad_(False)) or remove them; or stack=auto"
        yield Violation("parallel.unused_parameters", config.parallel.unused_parameters, rule, fix)
    if config.checkpoint.backend == "dcp" and config.deepspeed.zero_optimization.stage > 0:
        rule = "rank 0 collects what ZeRO partitions, tensor by tensor, and writes it"
        yield Violation("checkpoint.backend", "dcp", rule, "checkpoint.backend=file, or auto")


def settings_without_the_stack(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings of DeepSpeed under another stack."""
    if is_chosen(config):
        return
    reason = f"the stack is {config.stack} (stack=deepspeed uses it)"
    yield from changed(config.deepspeed.zero_optimization, _ZERO, reason)
    for where, section in (("deepspeed", config.deepspeed), (_ZERO, config.deepspeed.zero_optimization)):
        for key in open_keys(section):
            yield Ineffective(f"{where}.{key}", reason)
