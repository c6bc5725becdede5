"""`danling-conf check`: an app's configuration composed and checked, nothing started."""

from __future__ import annotations

from danling_conf.cli.inspect_app import inspect_app
from danling_conf.groups.layout_names import name_of
from danling_conf.launch.command import App, check, compose_or_refuse, warnings_of
from danling_conf.resolution.hydra_adapter import ConfigSearch, composer
from danling_conf.resolution.identity import config_id, difference_from_defaults, job_id
from danling_conf.topology.layout import layout_of
from danling_conf.topology.violation import show


def check_app(script: str, overrides: list[str]) -> list[str]:
    """Lines that say what would run. Raises ConfigRefused with all violations."""
    return inspect_app(script, overrides, _check)


def _check(app: App, search: ConfigSearch, overrides: list[str]) -> list[str]:
    with composer(search) as composing:
        config = check(composing, compose_or_refuse(composing, overrides), overrides)
    layout = layout_of(config.parallel.axes, config.fsdp.enabled)
    changed = [f"  {path}={show(value)}" for path, value in difference_from_defaults(config).items()]
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
    return [
        f"accepted: {app.script.name} {' '.join(overrides)}".rstrip(),
        f"layout {name_of(layout)}, {processes}; config {config_id(config)}, job {job_id(config)}",
        "differs from the defaults in:",
        *changed,
        *(f"warning: {line}" for line in warnings_of(config)),
    ]
