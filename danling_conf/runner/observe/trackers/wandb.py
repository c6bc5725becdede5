"""Weights & Biases."""

from __future__ import annotations

import hashlib
import html
import os
from typing import Any

from danling_conf.records.status import Status
from danling_conf.runner.observe.trackers.tracker import Record, RunFacts
from danling_conf.schema.observability import WandbConfig


class Wandb:
    """Logs scalars to a run of Weights & Biases, the same one for all attempts of a run.

    Unset settings come from the run: project from the lineage, group from the experiment, name from the run id, the
    local directory from the run's.
    """

    name = "Weights & Biases"

    def __init__(self, section: WandbConfig) -> None:
        self.section = section
        self._run: Any = None

    def start(self, facts: RunFacts) -> None:
        import wandb

        section, attempt = self.section, facts.attempt
        tags = [section.tags] if isinstance(section.tags, str) else section.tags
        folder = section.dir if section.dir is not None else str(attempt.run_directory)
        os.makedirs(folder, exist_ok=True)
        # One W&B run for all attempts; two run directories of the same name are two runs.
        identity = hashlib.sha256(str(attempt.run_directory).encode()).hexdigest()[:8]
        self._run = wandb.init(
            project=section.project or facts.lineage,
            entity=section.entity,
            group=section.group or facts.experiment,
            name=section.name or attempt.run_id,
            job_type=section.job_type,
            tags=None if tags is None else [str(tag) for tag in tags],
            dir=folder,
            mode=section.mode,  # type: ignore[arg-type]
            id=f"{attempt.run_id}-{identity}".replace(".", "-"),
            resume="allow" if section.mode in (None, "online") else None,
            config={"run": str(attempt.run_directory), "attempt": attempt.directory.name, **facts.settings},
            settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
        )

    def log(self, record: Record) -> None:
        values: dict[str, Any] = {**record.finite(), "epoch": record.epoch}
        if record.texts:
            import wandb

            values |= {
                name: wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False) for name, text in record.texts.items()
            }
        self._run.log(values, step=record.step)

    def finish(self, status: str, score: float | None) -> None:
        if score is not None:
            self._run.summary["score"] = score
        self._run.finish(exit_code=0 if status == Status.COMPLETED else 1)
