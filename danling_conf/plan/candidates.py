"""Candidates: every layout of a number of GPUs that the rules and the model's dimensions accept.

The global batch stays as it is configured: with fewer data ranks, each has more samples in a batch, or accumulates more
batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

from danling_conf.config.readonly import writable
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import MULTI_STAGE_SCHEDULES, SPLIT_BACKWARD_SCHEDULES
from danling_conf.topology.hardware import Cluster
from danling_conf.topology.layout import fill, layout_of
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context, violations_of
from danling_conf.topology.violation import ConfigRefused, Violation

CHECKPOINTING = ("none", "selective", "full")
"""Modes of activation checkpointing that are tried, besides the configured one."""
_LEAST_SEQUENCE = 1024
"""Positions of a context rank below which its share of attention is too small to be worth a gather."""
_MOST_MICROBATCH = 8
"""Samples of a pipeline's microbatch: more than these make the bubble longer, and nothing faster."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a configuration on a number of GPUs."""

    layout: Layout
    batch_size: int
    """Samples of a data rank in one batch."""
    accumulation: int
    microbatch_size: int
    """Samples of a pipeline's microbatch; the batch size without a pipeline."""
    schedule: str
    checkpointing: str
    reshard: bool = True
    """Whether a block's gathered weights are freed after its forward pass."""

    @property
    def microbatches(self) -> int:
        return self.batch_size // self.microbatch_size

    @property
    def stages_per_rank(self) -> int:
        several = self.layout.pipeline > 1 and self.schedule in MULTI_STAGE_SCHEDULES
        return 2 if several else 1


def global_batch(config: RunnerConfig, gpus: int) -> int:
    """Samples of an optimizer step as configured. A degree of -1 is filled with all GPUs."""
    return local_batch(config) * fill(layout_of(config), gpus).data_degree * config.accum_steps


def local_batch(config: RunnerConfig) -> int:
    """Samples of a data rank in one batch."""
    train: Any = vars(config.dataloader).get("train")
    own = train.get("batch_size") if isinstance(train, Mapping) else getattr(train, "batch_size", None)
    return own or config.dataloader.batch_size or 1


def candidates(
    config: RunnerConfig, gpus: int, cluster: Cluster, dims: Mapping[str, int], samples: int
) -> Iterator[Candidate]:
    """All candidates.

    Args:
        config: the configuration, of any layout.
        dims: what limits the degrees, as `LayoutFigures.dims`; an axis whose dimension is missing or 0 is not tried.
        samples: samples of an optimizer step.
    """
    modes = dict.fromkeys([*CHECKPOINTING, config.activation_checkpointing.mode])
    context = Context(machine=Machine(devices=cluster.gpus_per_node, cluster_world_size=gpus))
    for layout in layouts(gpus, cluster, dims, samples):
        for schedule in _schedules(config, layout, dims):
            for batch, accumulation, microbatch in _batches(layout, samples // layout.data_degree):
                for mode in modes:
                    found = Candidate(
                        layout=layout,
                        batch_size=batch,
                        accumulation=accumulation,
                        microbatch_size=microbatch,
                        schedule=schedule,
                        checkpointing=mode,
                    )
                    if violations_of(configured(config, found), context):
                        continue
                    for reshard in _reshards(config, layout, accumulation):
                        yield replace(found, reshard=reshard)


def layouts(gpus: int, cluster: Cluster, dims: Mapping[str, int], samples: int) -> Iterator[Layout]:
    """Layouts of a world size that the model's dimensions allow.

    The tensor axis stays within a node, since it waits for every one of its sums.
    """
    heads = gcd(dims.get("heads", 0), dims.get("key_value_heads", dims.get("heads", 0)))
    sequence = dims.get("sequence", 0)
    for tensor in _divisors(gpus):
        if tensor > 1 and (not heads or heads % tensor or tensor > cluster.gpus_per_node or not dims.get("tensor", 1)):
            continue
        for context in _divisors(gpus // tensor):
            # Twice: a rank takes an early and a late part of the sequence.
            if context > 1 and (sequence % (2 * context) or sequence // context < _LEAST_SEQUENCE):
                continue
            if context > 1 and not dims.get("context", 1):
                continue
            for pipeline in _divisors(gpus // tensor // context):
                if pipeline > 1 and pipeline > dims.get("blocks", 0):
                    continue
                data = gpus // tensor // context // pipeline
                if samples % data:
                    continue
                yield from _data_layouts(data, tensor, context, pipeline, cluster, dims)


def _data_layouts(
    data: int, tensor: int, context: int, pipeline: int, cluster: Cluster, dims: Mapping[str, int]
) -> Iterator[Layout]:
    base = Layout(tensor=tensor, context=context, pipeline=pipeline, fsdp=True, shard=data)
    shards = {data, max(1, min(data, cluster.gpus_per_node // (tensor * context)))}
    for shard in sorted(shards, reverse=True):
        if data % shard == 0 and shard * context > 1:
            sharded = replace(base, shard=shard, replicate=data // shard)
            yield sharded
            for expert in _divisors(dims.get("experts", 0)):
                if expert > 1 and (shard * context * tensor) % expert == 0:
                    yield replace(sharded, expert=expert)
    if not dims.get("experts", 0):
        yield replace(base, shard=1, replicate=data, fsdp=False)


def _schedules(config: RunnerConfig, layout: Layout, dims: Mapping[str, int]) -> list[str]:
    configured_one = config.parallel.pipeline_schedule
    if layout.pipeline == 1:
        return [configured_one]
    names = dict.fromkeys(["1F1B", "Interleaved1F1B", configured_one])
    several = dims.get("blocks", 0) >= 2 * layout.pipeline
    return [
        name
        for name in names
        if (several or name not in MULTI_STAGE_SCHEDULES)
        and not (config.compile.enable and name in SPLIT_BACKWARD_SCHEDULES)
    ]


def _reshards(config: RunnerConfig, layout: Layout, accumulation: int) -> tuple[bool, ...]:
    """Whether blocks free their gathered weights after forward: as configured, else both where both make sense."""
    given = config.fsdp.reshard_after_forward
    if given is not None:
        return (bool(given),)
    if not layout.fsdp or layout.shard * layout.context == 1:
        return (reshards_by_default(layout),)
    return (False, True) if layout.pipeline > 1 or accumulation > 1 else (True,)


def reshards_by_default(layout: Layout) -> bool:
    """What an unset `fsdp.reshard_after_forward` means: stages of a pipeline stay gathered between microbatches."""
    return layout.pipeline == 1


def _batches(layout: Layout, samples: int) -> Iterator[tuple[int, int, int]]:
    """Batch size, accumulated batches and microbatch size of a data rank's samples of a step."""
    if layout.pipeline == 1:
        for batch in _divisors(samples):
            yield batch, samples // batch, batch
        return
    for microbatch in _divisors(samples):
        if microbatch <= _MOST_MICROBATCH:
            yield samples, 1, microbatch


def configured(config: RunnerConfig, candidate: Candidate) -> RunnerConfig:
    """A configuration with the settings of a candidate."""
    made: RunnerConfig = writable(config)
    layout = candidate.layout
    for axis, degree in layout.degrees().items():
        setattr(made.parallel.axes, axis, degree)
    made.stack = "auto"
    made.fsdp.enabled = layout.fsdp
    made.dataloader.batch_size = candidate.batch_size
    made.accum_steps = candidate.accumulation
    made.activation_checkpointing.mode = candidate.checkpointing
    if config.fsdp.reshard_after_forward is None and candidate.reshard != reshards_by_default(layout):
        made.fsdp.reshard_after_forward = candidate.reshard
    if layout.pipeline > 1:
        made.parallel.pipeline_schedule = candidate.schedule
        made.parallel.pipeline_n_microbatches = candidate.microbatches
    return made


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def refuse_batch(samples: int, gpus: int) -> ConfigRefused:
    """The refusal where no layout gives every data rank a sample."""
    rule = f"no layout of {gpus} GPUs gives each data rank a whole number of the {samples} samples of a step"
    fix = f"--global-batch {gpus}, or a layout whose data ranks are counted: parallel=fsdp"
    return ConfigRefused([Violation("--gpus", gpus, rule, fix)])
