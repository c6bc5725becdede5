"""Typed, composable Hydra configuration for distributed PyTorch training, and the layer that turns it into objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from danling_conf.schema.imports import import_large

if TYPE_CHECKING:
    from danling_conf.app import compose, main
    from danling_conf.checkpoint.weights import load_weights
    from danling_conf.config.resolve import load, resolve, save
    from danling_conf.groups import name_of, parse_layout, register
    from danling_conf.runner.averaging import EMA
    from danling_conf.runner.callbacks import Callback
    from danling_conf.runner.monitors import LearningRateMonitor, SamplePredictions
    from danling_conf.runner.training import Runner
    from danling_conf.schema import RunnerConfig
    from danling_conf.topology.violation import ConfigRefused

__version__ = "0.2.0"

_EXPORTS = {
    "Callback": "danling_conf.runner.callbacks",
    "ConfigRefused": "danling_conf.topology.violation",
    "EMA": "danling_conf.runner.averaging",
    "LearningRateMonitor": "danling_conf.runner.monitors",
    "Runner": "danling_conf.runner.training",
    "RunnerConfig": "danling_conf.schema",
    "SamplePredictions": "danling_conf.runner.monitors",
    "compose": "danling_conf.app",
    "load": "danling_conf.config.resolve",
    "load_weights": "danling_conf.checkpoint.weights",
    "main": "danling_conf.app",
    "name_of": "danling_conf.groups",
    "parse_layout": "danling_conf.groups",
    "register": "danling_conf.groups",
    "resolve": "danling_conf.config.resolve",
    "save": "danling_conf.config.resolve",
}

__all__ = [
    "EMA",
    "Callback",
    "ConfigRefused",
    "LearningRateMonitor",
    "Runner",
    "RunnerConfig",
    "SamplePredictions",
    "compose",
    "load",
    "load_weights",
    "main",
    "name_of",
    "parse_layout",
    "register",
    "resolve",
    "save",
]


def __getattr__(name: str) -> Any:
    """Import an export when it is first used, so that composing imports no torch."""
    if name in _EXPORTS:
        return getattr(import_large(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
