"""Trains the example tasks: `python examples/train.py parallel=fsdp8 compile=max`, `... task=digits epochs=5`."""

from __future__ import annotations

from dataclasses import dataclass

import danling_conf


@danling_conf.register
@dataclass(kw_only=True)
class TrainConfig(danling_conf.RunnerConfig):
    """Settings of a run, and one of this script's own."""

    task_name: str = "lm"
    """What is trained: `lm` or `digits`. Chosen with its settings by `task=`."""


@danling_conf.main(config_path="../conf", config_name="train")
def train(config: TrainConfig) -> float:
    """Train one task; the best score is the run's."""
    # Imported here, so that a refused configuration costs no import of torch.
    from tasks.task import build_task

    task = build_task(config.task_name, config.model, config.data)
    return danling_conf.Runner(config).fit(
        task.model,
        task.datasets,
        loss=task.loss,
        metrics=task.metrics,
        tokens_per_sample=task.tokens_per_sample if task.tokens_per_sample > 1 else None,
        report=task.report,
    )


if __name__ == "__main__":
    train()
