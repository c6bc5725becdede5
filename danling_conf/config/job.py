"""One job of a sweep, composed and checked: what is needed to start it anywhere, later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from omegaconf import OmegaConf

from danling_conf.config.identity import config_id, job_id, plain
from danling_conf.schema import Layout, RunnerConfig
from danling_conf.topology.layout import layout_of


@dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration of a sweep that was accepted."""

    number: int
    """Its place in the sweep."""
    overrides: tuple[str, ...]
    """What was given for it on the command line, the sweep's values in place."""
    config: RunnerConfig
    """Resolved and read-only."""
    hydra: Mapping[str, Any]
    """Hydra's own settings (`hydra_adapter.hydra_settings`), the launcher's among them."""

    @cached_property
    def launcher(self) -> dict[str, Any]:
        """`hydra.launcher` as it is for this job, whose own settings it may refer to."""
        settings = dict(self.hydra["launcher"])
        if "${" in str(settings):
            whole = OmegaConf.create({**plain(self.config), "hydra": dict(self.hydra)})
            resolved: Any = OmegaConf.to_container(whole.hydra.launcher, resolve=True)
            return resolved
        return settings

    @property
    def job_id(self) -> str:
        return job_id(self.config)

    @property
    def config_id(self) -> str:
        return config_id(self.config)

    @property
    def layout(self) -> Layout:
        return layout_of(self.config)
