"""Rules: whether a configuration can run. Each rule is a function, and all of them are in one list."""

from __future__ import annotations

from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules import (
    axes,
    checkpoints,
    deepspeed,
    effect,
    fault_tolerance,
    optimizers,
    options,
    paths,
    pipeline,
    world,
)
from danling_conf.topology.rules.rule import Context, EffectRule, Ineffective, Rule
from danling_conf.topology.violation import Violation, unique

RULES: tuple[Rule, ...] = (
    deepspeed.installed,
    world.whole_degrees,
    world.sharding_is_fsdp,
    world.stack_fits_layout,
    world.graph_of_one_process,
    world.world_size,
    world.reshard_divides,
    axes.experts_borrow,
    axes.known_styles,
    axes.ring_on_cuda,
    axes.selection_with_gather,
    axes.mesh_for_axes,
    axes.whole_graphs,
    axes.whole_statistics,
    options.one_budget,
    optimizers.monitored_metric,
    pipeline.microbatches,
    pipeline.whole_batches,
    pipeline.stage_parts,
    pipeline.enough_microbatches,
    pipeline.local_statistics,
    pipeline.split_backward,
    pipeline.stages_are_not_compiled,
    options.compile_options,
    options.graph_options,
    options.precision_fits,
    options.loader_workers,
    options.saving_with_interval,
    options.selection_by_ops,
    options.declared_splits,
    options.named_callbacks,
    options.targets_of_python,
    checkpoints.excluded_parts,
    checkpoints.background_group,
    checkpoints.replica_names,
    checkpoints.exports_by_safetensors,
    options.installed_trackers,
    deepspeed.only_replicates,
    deepspeed.known_keys,
    deepspeed.no_contradiction,
    deepspeed.fits_stage,
    deepspeed.kept_promises,
    fault_tolerance.installed,
    fault_tolerance.numbers_of_groups,
    fault_tolerance.order_of_limits,
    fault_tolerance.groups_meet,
    fault_tolerance.groups_fit,
    optimizers.known_optimizer,
    optimizers.known_scheduler,
    paths.writable_root,
    paths.plain_names,
    paths.existing_sources,
    paths.artifact_directory,
)

EFFECT_RULES: tuple[EffectRule, ...] = (
    effect.policy_without_fsdp,
    effect.settings_without_axis,
    effect.options_without_compile,
    effect.pacing_without_interval,
    effect.limits_without_processes,
    effect.overruled_precision,
    effect.unread_mode_settings,
    effect.sources_by_priority,
    checkpoints.writing_settings,
    checkpoints.sources_to_exclude_from,
    deepspeed.settings_without_the_stack,
    effect.settings_of_what_is_off,
    fault_tolerance.unread_settings,
)


def violations_of(config: RunnerConfig, context: Context) -> list[Violation]:
    """Every rule that the configuration breaks."""
    return unique(found for rule in RULES for found in rule(config, context))


def ineffective_settings(config: RunnerConfig, context: Context) -> list[Ineffective]:
    """Settings that were given and change nothing in this configuration."""
    return list(dict.fromkeys(found for rule in EFFECT_RULES for found in rule(config, context)))


__all__ = ["EFFECT_RULES", "RULES", "Context", "Ineffective", "ineffective_settings", "violations_of"]
