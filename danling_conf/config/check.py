"""Compose and check: from a command line's overrides to a resolved configuration, or to all of its faults."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.faults import all_faults
from danling_conf.config.hydra_adapter import Composer, shadowed_settings
from danling_conf.config.resolve import inspect
from danling_conf.schema import RunnerConfig
from danling_conf.topology.machine import this_machine
from danling_conf.topology.rules import Context, ineffective_settings
from danling_conf.topology.violation import ConfigRefused


def compose_or_refuse(composing: Composer, overrides: Sequence[str], *, multirun: bool = False) -> DictConfig:
    """Compose. Where Hydra refuses, raise ConfigRefused with every fault instead of only Hydra's first."""
    try:
        return composing.compose(overrides, multirun=multirun)
    except ConfigRefused:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigRefused(all_faults(composing, overrides, context_of(overrides), error)) from error


def check(composing: Composer, composed: DictConfig, overrides: Sequence[str]) -> RunnerConfig:
    """The resolved configuration of what was composed. Raises ConfigRefused with all violations."""
    kind = kind_of(composed)
    config, violations = inspect(composed, kind=kind, context=context_of(overrides))
    violations = shadowed_settings(composing, kind) + violations
    if violations:
        raise ConfigRefused(violations)
    return config


def kind_of(composed: DictConfig) -> type[RunnerConfig]:
    """The class that a composed configuration was declared with."""
    declared = OmegaConf.get_type(composed)
    return declared if isinstance(declared, type) and issubclass(declared, RunnerConfig) else RunnerConfig


def context_of(overrides: Sequence[str]) -> Context:
    """What the rules know besides the configuration: this machine, and which settings the user gave."""
    given = frozenset(item.partition("=")[0].lstrip("+~") for item in overrides)
    return Context(machine=this_machine(), given=given)


def warnings_of(config: RunnerConfig) -> list[str]:
    """The settings that have no effect, one sentence each."""
    return [str(item) for item in ineffective_settings(config, Context(machine=this_machine()))]
