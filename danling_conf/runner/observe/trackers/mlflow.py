"""MLflow: its tracking server, or a database in the run's directory."""

from __future__ import annotations

from typing import Any

from danling_conf.records.status import Status
from danling_conf.runner.observe.trackers.tracker import Record, RunFacts
from danling_conf.schema.observability import MlflowConfig

_RUN_TAG = "danling_conf.run"
_STATUS: dict[str, str] = {Status.COMPLETED: "FINISHED", Status.INTERRUPTED: "KILLED"}
"""MLflow's words; it calls every other end FAILED."""
_LONGEST = 500
"""Characters of a parameter's value that every MLflow server takes."""


class Mlflow:
    """Logs scalars and settings to a run of MLflow, the same one for all attempts of a run."""

    name = "MLflow"

    def __init__(self, section: MlflowConfig) -> None:
        self.section = section
        self._client: Any = None
        self._run = ""

    def start(self, facts: RunFacts) -> None:
        from mlflow.tracking import MlflowClient

        section, attempt = self.section, facts.attempt
        uri = section.tracking_uri or f"sqlite:///{attempt.run_directory / 'mlflow.db'}"
        # The client, not the module's functions: those act on one run of the whole process, which may be the user's.
        client = self._client = MlflowClient(tracking_uri=uri)
        name = section.experiment or f"{facts.lineage}/{facts.experiment}"
        experiment = client.get_experiment_by_name(name)
        artifacts = None if section.tracking_uri else (attempt.run_directory / "mlflow").as_uri()
        number = experiment.experiment_id if experiment else client.create_experiment(name, artifact_location=artifacts)
        directory = str(attempt.run_directory)
        found = client.search_runs([number], filter_string=f"tags.`{_RUN_TAG}` = '{directory}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            client.update_run(self._run, status="RUNNING")
            return
        run = client.create_run(number, run_name=section.name or attempt.run_id, tags={_RUN_TAG: directory})
        self._run = run.info.run_id
        for key, value in facts.settings.items():
            client.log_param(self._run, key, str(value)[:_LONGEST])

    def log(self, record: Record) -> None:
        from mlflow.entities import Metric

        stamp = int(record.time * 1000)
        values = [Metric(name, value, stamp, record.step) for name, value in record.finite().items()]
        if values:
            self._client.log_batch(self._run, metrics=values)
        for name, text in record.texts.items():
            self._client.log_text(self._run, text, f"{name}/step-{record.step:08d}.txt")

    def finish(self, status: str, score: float | None) -> None:
        if score is not None:
            self._client.log_metric(self._run, "score", score)
        self._client.set_terminated(self._run, status=_STATUS.get(status, "FAILED"))
