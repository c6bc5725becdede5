"""Score of a run: which number selects the best model, whether it improved, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from danling_conf.components.dataloader import is_training
from danling_conf.topology.violation import SettingError

PREFERRED_SPLITS = ("val", "validate")


def infer_split(configured: str | None, splits: Iterable[str]) -> str:
    """The split that the score comes from: the configured one, else `val`, `validate`, another that begins with `val`,
    the first that is not trained on, or the training split where there is no other."""
    splits = list(splits)
    if configured is not None:
        return configured
    held_out = [split for split in splits if not is_training(split)]
    candidates = [*PREFERRED_SPLITS, *(split for split in held_out if split.startswith("val")), *held_out, *splits]
    return next(split for split in candidates if split in splits)


def infer_mode(configured: str | None, name: str, metrics: Mapping[str, Any], *, path: str = "score_mode") -> str:
    """`min` or `max`: as configured at `path`, else as the metric says.

    Raises SettingError for a metric that does not say.
    """
    if configured is not None:
        return configured
    if name == "loss":
        return "min"
    higher = getattr(metrics.get(name), "higher_is_better", None)
    if higher is None:
        raise SettingError(
            path,
            None,
            f"the metric {name} does not say whether a larger value is better",
            f"set {path}=min or {path}=max",
        )
    return "max" if higher else "min"


def make_score(
    *,
    split: str | None,
    name: str,
    mode: str | None,
    patience: int | None,
    splits: Iterable[str],
    metrics: Mapping[str, Any],
) -> Score:
    """The score of a run, from the `score_*` settings, its splits and its metrics.

    Raises:
        SettingError: there is no such metric, it does not say which way is better, or nothing measures it.
    """
    if name != "loss" and name not in metrics:
        known = ", ".join(["loss", *metrics])
        raise SettingError("score_name", name, "there is no such metric", f"choose one of {known}")
    better = infer_mode(mode, name, metrics)
    found = infer_split(split, splits)
    if is_training(found) and (found != "train" or name != "loss"):
        raise SettingError(
            "score_split",
            found,
            f"{name} is not measured on it, since no {found} split is evaluated",
            "pass a val split, or choose score_split=train score_name=loss",
        )
    return Score(split=found, name=name, mode=better, patience=patience)


@dataclass
class Score:
    """The best score so far, and how many evaluations ago it was."""

    split: str
    name: str
    mode: str
    patience: int | None = None
    best: float | None = None
    best_step: int = 0
    last: float | None = None
    worse: int = 0

    @property
    def key(self) -> str:
        """Name of the score among results: `val.loss`."""
        return f"{self.split}.{self.name}"

    @property
    def exhausted(self) -> bool:
        """Whether `patience` evaluations in a row did not improve the score."""
        return self.patience is not None and self.worse >= self.patience

    def update(self, results: Mapping[str, float], step: int) -> bool:
        """Take in an evaluation's results; returns whether they are the best so far.

        Raises KeyError, which names the results, when the score is not among them.
        """
        if self.key not in results:
            raise KeyError(f"the score {self.key} is not among the results: {', '.join(results) or 'none'}")
        self.last = results[self.key]
        better = not math.isnan(self.last) and (
            self.best is None or (self.last < self.best if self.mode == "min" else self.last > self.best)
        )
        if better:
            self.best, self.best_step, self.worse = self.last, step, 0
        else:
            self.worse += 1
        return better

    def state_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "mode": self.mode,
            "best": self.best,
            "best_step": self.best_step,
            "last": self.last,
            "worse": self.worse,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved score; one of another metric or split is ignored."""
        if (state["key"], state["mode"]) != (self.key, self.mode):
            return
        self.best, self.best_step = state["best"], state["best_step"]
        self.last, self.worse = state["last"], state["worse"]
