"""Rules of observability: trackers that are not installed, and settings of sections that are off."""

from __future__ import annotations

from collections.abc import Iterator

from danling_conf.schema import RunnerConfig
from danling_conf.topology.rules.rule import Context, Ineffective, changed
from danling_conf.topology.violation import Violation

_SECTIONS = {
    "profiling": "nothing is traced",
    "heartbeat": "no heartbeats are written",
    "plan": "the run is not planned",
    "wandb": "nothing goes to Weights & Biases",
    "mlflow": "nothing goes to MLflow",
    "ft": "there are no replica groups",
}


def installed_trackers(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A chosen tracker must be installed: a user would learn only after the run that nothing was tracked."""
    chosen = {
        "tensorboard": ("tensorboard", config.tensorboard),
        "wandb": ("wandb.enabled", config.wandb.enabled),
        "mlflow": ("mlflow.enabled", config.mlflow.enabled),
    }
    for package, (path, wanted) in chosen.items():
        if wanted and package not in context.machine.trackers:
            fix = f"pip install danling-conf[{package}], or leave it out"
            yield Violation(path, True, f"the package {package} is not installed", fix)


def settings_of_what_is_off(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings of a section that is not enabled."""
    for name, reason in _SECTIONS.items():
        section = getattr(config, name)
        if not section.enabled:
            yield from changed(section, name, f"{reason} ({name}.enabled=false)")
