"""Check of a composed configuration, shared by a single run and every job of a sweep.

Hydra and OmegaConf stop at their first error. Here a configuration is either accepted, or refused with all of its
faults at once, before torch is imported and before anything starts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from danling_conf.config.faults import all_faults, faults_of_sweep, in_files, look_at
from danling_conf.config.hydra_adapter import COMPOSITION_ERRORS, Composer
from danling_conf.config.hydra_directories import run_directory_faults
from danling_conf.config.resolve import declared_kind, given_in, inspect
from danling_conf.schema import RunnerConfig, notes_of
from danling_conf.topology.machine import Machine, this_machine
from danling_conf.topology.rules import Context, ineffective_settings
from danling_conf.topology.violation import ConfigRefused, Violation


def check_composed(
    composed: DictConfig,
    context: Context,
    also: Callable[[RunnerConfig | None], list[Violation]] | None = None,
    *,
    spent: bool = False,
    changed: Collection[str] | None = None,
) -> RunnerConfig:
    """Returns the resolved, read-only form of a composed configuration.

    Args:
        context: further input of the rules, such as the machine.
        also: finds further faults; its argument is None where settings are missing.
        spent: whether `composed` may be changed, since the caller does not use it afterwards.
        changed: see `inspect`.

    Raises:
        ConfigRefused: with all violations.
    """
    kind = declared_kind(composed) or RunnerConfig
    config, violations = inspect(composed, kind=kind, context=context, spent=spent, changed=changed)
    if also is not None:
        violations += also(config)
    if violations or config is None:
        raise ConfigRefused(violations)
    return config


def check(composing: Composer, composed: DictConfig, overrides: Sequence[str]) -> RunnerConfig:
    """Check a single run. Raises ConfigRefused with all violations."""
    try:
        also = run_directory_faults(composed)
        return check_composed(composed, context_of(overrides), lambda _: also)
    except ConfigRefused as refusal:
        raise ConfigRefused(in_files(composing, overrides, refusal.violations)) from refusal


def compose_or_refuse(composing: Composer, overrides: Sequence[str], *, multirun: bool = False) -> DictConfig:
    """Compose. Where Hydra raises, raise ConfigRefused with every fault instead of only Hydra's first.

    Args:
        multirun: compose a sweep's own configuration. Only Hydra's overrides are then searched for faults: the others
            belong to the jobs, and may hold several values.
    """
    try:
        if multirun:
            return composing.compose(overrides, multirun=True)
        config, broken = composing.compose_until_broken(overrides, look_at)
    except ConfigRefused:
        raise
    except COMPOSITION_ERRORS as error:
        if multirun:
            raise ConfigRefused(faults_of_sweep(composing, overrides, error)) from error
        raise ConfigRefused(all_faults(composing, overrides, context_of(overrides), error)) from error
    if broken is not None:
        faults = all_faults(composing, overrides, context_of(overrides), broken.error, begun=(config, broken))
        raise ConfigRefused(faults) from broken.error
    return config


def context_of(
    overrides: Sequence[str], machine: Machine | None = None, choices: Mapping[str, Any] | None = None
) -> Context:
    """The context of the rules: the machine, the settings on the command line, and the choices of groups.

    Args:
        machine: machine on which the run would start; this one when None.
        choices: read from the composed configuration when None.
    """
    return Context(machine=machine or this_machine(), given=given_in(overrides), choices=choices or {})


def warnings_of(config: RunnerConfig) -> list[str]:
    """The settings that were set aside or have no effect, one sentence each."""
    ineffective = ineffective_settings(config, Context(machine=this_machine()))
    return [*notes_of(config), *map(str, ineffective)]
