"""Relay of warnings: those of all ranks reach the user once, from rank 0; each rank's log has its own."""

from __future__ import annotations

import hashlib
import logging
import sys
import warnings
from typing import Any

from danling_conf._torch_private.distributed import default_store
from danling_conf.records.logs import ENDS_RANK
from danling_conf.topology.rank_environment import RankEnvironment

_log = logging.getLogger("danling_conf.warnings")
_LOGGERS = (logging.getLogger(), logging.getLogger("danling_conf"))
_PREFIX = "danling_conf/warnings"


class WarningRelay(logging.Handler):
    """Takes Python's warnings on every rank of several, and what other ranks than 0 log as a warning or worse. What
    several ranks log is shown once.

    Ranks write their warnings into the store that they met at; rank 0 fetches them with its log lines. No rank waits.
    """

    def __init__(self, ranks: RankEnvironment) -> None:
        super().__init__(logging.WARNING)
        self.ranks = ranks
        self._store: Any = default_store() if ranks.world_size > 1 else None
        self._shown = 0
        self._seen: set[str] = set()
        self._before: Any = None

    def start(self) -> None:
        """Start to take warnings. Nothing where there is one rank."""
        if self._store is not None:
            self._before = warnings.showwarning
            warnings.showwarning = self._take
            for logger in _LOGGERS:
                logger.addHandler(self)

    def show(self) -> None:
        """On rank 0, show the warnings of other ranks."""
        if self._store is None or not self.ranks.main:
            return
        try:
            left = self._store.add(f"{_PREFIX}/count", 0)
            while self._shown < left and self._store.check([f"{_PREFIX}/{self._shown + 1}"]):
                self._shown += 1
                self._say(self._store.get(f"{_PREFIX}/{self._shown}").decode())
        except RuntimeError as error:  # the store has gone with the rank that held it
            _log.debug("warnings of other ranks are not known: %s", error)

    def stop(self) -> None:
        """Show the warnings that are left, and restore the handler from before."""
        if self._store is None:
            return
        warnings.showwarning = self._before
        for logger in _LOGGERS:
            logger.removeHandler(self)
        if sys.exc_info()[0] is None:  # a rank that fails must not wait for a store that may have gone
            self.show()
        self._store = None

    def _take(self, message: Any, category: type[Warning], filename: str, lineno: int, *rest: Any, **more: Any) -> None:
        text = f"{category.__name__}: {message}"
        _log.warning("%s (%s:%d)", text, filename, lineno)
        self._pass_on(text, shown=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass on what a rank logs. Whether rank 0's own lines are shown, its logging configuration decides."""
        if record.name != _log.name and not getattr(record, ENDS_RANK, False):
            self._pass_on(record.getMessage(), shown=self.ranks.main)

    def _pass_on(self, text: str, *, shown: bool) -> None:
        """Show a text, once among all ranks; `shown` where that has been done already."""
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key in self._seen:
            return
        self._seen.add(key)
        try:
            if self._store.add(f"{_PREFIX}/of/{key}", 1) != 1:
                return  # another rank was first
            if shown:
                return
            if self.ranks.main:
                print(f"warning: {text}", file=sys.stderr, flush=True)
                return
            number = self._store.add(f"{_PREFIX}/count", 1)
            self._store.set(f"{_PREFIX}/{number}", f"rank {self.ranks.rank}: {text}")
        except RuntimeError as error:
            _log.debug("the warning could not be passed on: %s", error)

    @staticmethod
    def _say(text: str) -> None:
        _log.warning("%s", text)
        print(f"warning: {text}", file=sys.stderr, flush=True)
