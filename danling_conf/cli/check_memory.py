"""`danling-conf check --gpu NAME`: whether jobs fit their devices; those that are alike are planned once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from danling_conf.config.identity import flatten, plain
from danling_conf.config.job import Job
from danling_conf.groups.layout_names import name_of
from danling_conf.launch.app import App
from danling_conf.plan.assessment import Assessment, assess, verdict_line
from danling_conf.schema import RunnerConfig
from danling_conf.sweep.preflight import Refused
from danling_conf.sweep.preflight_tables import numbers_as_text
from danling_conf.topology.hardware import Cluster
from danling_conf.topology.violation import ABSENT, ConfigRefused, SettingError, Violation

if TYPE_CHECKING:
    from danling_conf.runner.planning import Recipe

_NEUTRAL = (
    *("seed", "deterministic", "steps", "epochs", "eval_interval", "evaluate_first", "patience", "score_", "nonfinite"),
    *("workspace_root", "lineage", "experiment", "auto_resume", "resume", "force_resume", "pretrained", "log"),
    *("optim.lr", "optim.weight_decay", "optim.betas", "optim.eps", "scheduler.", "checkpoint.", "comm.", "gc.", "ft."),
    *("tensorboard", "profiling.", "heartbeat.", "plan.", "wandb.", "mlflow."),
)
"""Settings that take no memory of a device: jobs that differ in nothing else are planned once."""


def memory_faults(app: App, jobs: Sequence[Job], cluster: Cluster) -> tuple[list[Refused], list[str]]:
    """Jobs that do not fit, and a line for each distinct plan.

    Raises ConfigRefused where a job cannot be planned.
    """
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(_alike(job.config), []).append(job)
    refused: list[Refused] = []
    lines = []
    for alike in groups.values():
        found = _assessed(app, alike[0].config, cluster)
        name, verdict = name_of(alike[0].layout), found.verdict
        lines.append(f"{numbers_as_text(job.number for job in alike)} {name}: {verdict_line(found)}")
        if verdict.word == "does not fit":
            peak = found.figures.worst
            most = max(peak.peak, key=lambda kind: peak.peak[kind])
            rule = (
                f"it {verdict_line(found).replace('fit:', 'fit a device:')}; most of it {most}, at {peak.peak_moment}"
            )
            fix = f"danling-conf plan {app.script.name} ... --gpu {cluster.gpu.name} says what would need less"
            fault = Violation("parallel", name, rule, fix)
            refused += [Refused(number=job.number, overrides=job.overrides, violations=(fault,)) for job in alike]
    return sorted(refused, key=lambda item: item.number), lines


def _alike(config: RunnerConfig) -> str:
    """What a plan depends on, of a configuration."""
    settings = flatten(plain(config))
    return json.dumps(
        {path: value for path, value in settings.items() if not path.startswith(_NEUTRAL)}, sort_keys=True, default=str
    )


def _assessed(app: App, config: RunnerConfig, cluster: Cluster) -> Assessment:
    # torch only where a job is planned.
    from danling_conf.plan.engine import figures_of, subject_of
    from danling_conf.runner.planning import plan_of_function

    def plan(recipe: Recipe) -> Assessment:
        return assess(figures_of(subject_of(recipe, accelerated=True)), cluster)

    try:
        found = plan_of_function(app.function, config, plan)
    except SettingError as error:
        raise ConfigRefused([error.violation]) from error
    if found is None:
        rule = f"{app.function.__name__} returned without a runner that prepares a training"
        raise ConfigRefused([Violation("--gpu", ABSENT, rule, "call danling_conf.Runner(config).fit(...)")])
    return found
