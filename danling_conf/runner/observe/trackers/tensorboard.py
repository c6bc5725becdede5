"""TensorBoard: scalars, and the hyperparameters with the score for its HParams page."""

from __future__ import annotations

import threading
from typing import Any

from danling_conf.runner.observe.trackers.tracker import Record, RunFacts

FOLDER = "tensorboard"
_HPARAMS_SCORE = "score"


class TensorBoard:
    """Writes event files into the run's folder `tensorboard`; attempts of one run are one curve."""

    name = "TensorBoard"

    def __init__(self) -> None:
        self._writer: Any = None

    def start(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        _hide_traces_of_writers()
        folder = facts.attempt.run_directory / FOLDER
        # What an earlier attempt wrote beyond this step is done again, and TensorBoard leaves it out.
        self._writer = SummaryWriter(str(folder), purge_step=facts.step + 1 if facts.step else None)
        self._step = facts.step
        make_hparams: Any = hparams  # has no annotations
        for summary in make_hparams(_plain(facts.settings), {_HPARAMS_SCORE: 0.0}):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()

    def log(self, record: Record) -> None:
        self._step = record.step
        for name, value in record.finite().items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, record.step, walltime=record.time)
        for name, text in record.texts.items():
            # TensorBoard shows Markdown: indented lines stay as they are.
            shown = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text(name.replace(".", "/", 1), shown, record.step, walltime=record.time)

    def finish(self, status: str, score: float | None) -> None:
        if score is not None:
            self._writer.add_scalar(_HPARAMS_SCORE, score, self._step)
        self._writer.close()


def _hide_traces_of_writers() -> None:
    """An error of TensorBoard's own thread, such as a full disk, is raised again for who writes, and shown there."""
    shown = threading.excepthook
    if getattr(shown, "hides_writers", False):
        return

    def show(what: threading.ExceptHookArgs) -> None:
        if not type(what.thread).__module__.startswith("tensorboard."):
            shown(what)

    show.hides_writers = True  # type: ignore[attr-defined]
    threading.excepthook = show


def _plain(settings: Any) -> dict[str, Any]:
    """Settings as HParams takes them: numbers, booleans and text."""
    return {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()}
