"""Sweepers that choose jobs by the scores of those before: Optuna's, on real digits, in an environment of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from danling_conf.records.ledger import Ledger
from tests.support.commands import APP, REPOSITORY, run

pytestmark = pytest.mark.sweeper

TRAIN = REPOSITORY / "examples" / "train.py"
SEARCH = ["hydra/sweeper=optuna", "hydra.sweeper.n_jobs=2", "hydra.sweeper.direction=maximize",
          "optim.lr=tag(log,interval(1e-4,1e-1))", "task=digits", "epochs=2", "log_interval=1000"]  # fmt: skip


def test_scores_reach_the_sweeper(tmp_path: Path) -> None:
    done = run([TRAIN, "-m", *SEARCH, "hydra.sweeper.n_trials=4"], cwd=tmp_path)
    assert done.code == 0, done.text
    (sweep,) = tmp_path.glob("experiments/lin/exp/sweeps/*")
    records = list(Ledger(sweep).records().values())
    assert [record.number for record in records] == [0, 1, 2, 3]
    assert all(record.status == "completed" for record in records)
    scores = {_rate(record.facts["overrides"]): record.score for record in records}
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert found["best_value"] == max(scores.values())  # type: ignore[type-var]
    assert scores[found["best_params"]["optim.lr"]] == found["best_value"]
    assert found["best_value"] > 0.5  # of ten classes: it has learnt
    for record in records:
        result = json.loads(next((record.run / "attempts").glob("*/result.json")).read_text())  # type: ignore[operator]
        assert result["score"] == record.score


@pytest.mark.parametrize(("rate", "started"), [(0.0, 1), (1.0, 3)])
def test_a_failed_job_is_told_to_the_sweeper(tmp_path: Path, rate: float, started: int) -> None:
    """As a failure, of which it can bear as many as it is told to."""
    done = run([APP, "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=3",
                f"hydra.sweeper.max_failure_rate={rate}", "optim.lr=interval(0.1,0.2)", "data.do=fail", "steps=1"],
               cwd=tmp_path)  # fmt: skip
    assert done.code == 1, done.text
    assert "RuntimeError: this job is broken" in done.err
    (sweep,) = tmp_path.glob("experiments/lin/exp/sweeps/*")
    assert [record.status for record in Ledger(sweep).records().values()] == ["failed"] * started


def test_a_sweeper_that_waits_for_scores_cannot_be_detached(tmp_path: Path) -> None:
    done = run([TRAIN, "-m", *SEARCH, "hydra.sweeper.n_trials=2", "hydra/launcher=danling_slurm",
                "hydra.launcher.detach=true"], cwd=tmp_path)  # fmt: skip
    assert done.code == 2, done.text
    assert "hydra.launcher.detach=true" in done.err
    assert "Traceback" not in done.err
    assert not list(tmp_path.rglob("jobs.jsonl"))


def _rate(overrides: list[str]) -> float:
    (given,) = [item for item in overrides if item.startswith("optim.lr=")]
    return float(given.partition("=")[2])
