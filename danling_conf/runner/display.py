"""Display of a run for a person: a live line on a terminal, plain lines in a file."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.text import Text

from danling_conf.records.logs import show_unwritable

_log = logging.getLogger("danling_conf.run")
_SILENCE_SECONDS = 15.0
_STATES = {
    "compiling": "compiling",
    "evaluating": "evaluating",
    "saving": "saving",
    "exporting": "saving",
    "reporting": "reporting",
}
"""The heartbeat's state during an activity, by the activity's first word."""


class Display:
    """Shows steps, losses and results. Off the main process it shows nothing, and logs.

    Args:
        show: whether this is the process that talks to the user; or a function that says so, where that may change.
        total: optimizer steps of the whole run; None when unknown.
        samples_per_step: samples of one optimizer step, over all ranks.
        tokens_per_sample: tokens of a sample, for data of which tokens are counted.
        position: returns the current optimizer step; read by the live display, not at every step.
        on_state: called with what the rank does, for its heartbeat.
    """

    def __init__(
        self,
        *,
        show: bool | Callable[[], bool],
        total: int | None,
        samples_per_step: int | None,
        tokens_per_sample: int | None,
        position: Callable[[], int],
        on_state: Callable[[str], None] = lambda state: None,
        console: Console | None = None,
    ) -> None:
        # Nothing may wrap or be replaced: lines are for reading and for scripts.
        self.console = console or Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
        self._shows = show
        self.total = total
        self.position = position
        self._on_state = on_state
        self.unit = "tokens" if tokens_per_sample else "samples"
        self.per_step = samples_per_step * (tokens_per_sample or 1) if samples_per_step else None
        self._facts = ""
        self._activity: str | None = None
        self._activity_since = 0.0
        self._since = time.perf_counter()
        self._first = position()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._live: Live | None = None
        self._watcher: threading.Thread | None = None

    @property
    def show(self) -> bool:
        """Whether this is the process that talks to the user."""
        return self._shows if isinstance(self._shows, bool) else self._shows()

    def start(self) -> None:
        """Start to show progress."""
        if not self.show:
            return
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._line, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        else:
            self._watcher = threading.Thread(target=self._show_silence, name="danling-conf-progress", daemon=True)
            self._watcher.start()

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._stop.set()
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None

    def activity(self, what: str | None) -> None:
        """Show what happens between steps (compiling, evaluating); None when steps continue."""
        self._on_state(_STATES[what.partition(" ")[0]] if what else "training")
        with self._lock:
            self._activity, self._activity_since = what, time.perf_counter()

    def restart_clock(self) -> None:
        """Measure speed from here: what came before (compilation) would spoil it."""
        self._since, self._first = time.perf_counter(), self.position()

    def pause_clock(self, seconds: float) -> None:
        """Leave out of the speed what was spent on something else (evaluation)."""
        self._since += seconds

    def step(
        self,
        loss: float | None,
        learning_rate: float,
        expert_load: float | None = None,
        utilisation: float | None = None,
    ) -> None:
        """A log line about the steps since the last one. `expert_load` is that of the busiest expert over the mean;
        `utilisation` the share of the devices' peak (MFU)."""
        facts = [f"loss {loss:.4f}" if loss is not None else "", f"lr {learning_rate:.2e}"]
        if expert_load is not None:
            facts.append(f"busiest expert {expert_load:.2f}x")
        speed = self._speed()
        if speed is not None:
            if self.per_step is not None:
                facts.append(f"{_short(speed * self.per_step)} {self.unit}/s")
            if utilisation is not None:
                facts.append(f"MFU {100 * utilisation:.1f} %")
            if self.total is not None:
                left = timedelta(seconds=round((self.total - self.position()) / speed))
                facts.append(f"{left} left")
        self._facts = "  ".join(filter(None, facts))
        self._plain(f"{self._where()}  {self._facts}", live=False)

    def results(self, results: Mapping[str, float], note: str = "") -> None:
        """The outcome of an evaluation."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in results.items())
        self._plain(f"{self._where()}  {shown}{f'  {note}' if note else ''}")

    def line(self, text: str) -> None:
        """A line for the user and the log."""
        self._plain(text)

    def _plain(self, text: str, *, live: bool = True) -> None:
        _log.info("%s", text)
        if not self.show:
            return
        if self._live is None:
            # Not by the console: it takes ten times as long, to lay out a line that needs no layout.
            try:
                print(text, file=self.console.file, flush=True)
            except OSError as error:  # it is a file on a full disk
                show_unwritable("standard output", error)
        elif live:
            self.console.print(text)

    def _where(self) -> str:
        return f"step {self.position()}" + (f"/{self.total}" if self.total is not None else "")

    def _speed(self) -> float | None:
        steps, seconds = self.position() - self._first, time.perf_counter() - self._since
        return steps / seconds if steps > 0 and seconds > 0 else None

    def _line(self) -> Text:
        with self._lock:
            what, since = self._activity, self._activity_since
        parts = [self._where(), self._facts]
        if what is not None:
            parts.append(f"{what} ({time.perf_counter() - since:.0f} s)")
        return Text("  ".join(filter(None, parts)), no_wrap=True, overflow="ellipsis")

    def _show_silence(self) -> None:
        """Without a live line, a long silence would look like a hang."""
        while not self._stop.wait(_SILENCE_SECONDS):
            with self._lock:
                what, since = self._activity, self._activity_since
            if what is not None and time.perf_counter() - since >= _SILENCE_SECONDS:
                self.console.print(f"still {what} ({time.perf_counter() - since:.0f} s)")


def _short(number: float) -> str:
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{suffix}"
    return f"{number:.3g}"
