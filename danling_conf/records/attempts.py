"""Attempts of a run: when each one started, how it ended, and what it ran with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danling_conf.config.identity import flatten
from danling_conf.records.find import sweep_of
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.records.history import Span, read_history
from danling_conf.records.reading import Fields, read_fields, read_text, warn_of_damage
from danling_conf.records.run_directory import attempts_in
from danling_conf.records.state import RunState, state_of, written_end
from danling_conf.records.status import Status
from danling_conf.schema.files import DIFF, DIFFERENCE, ENVIRONMENT, FROZEN, RESULT


@dataclass(frozen=True, kw_only=True)
class AttemptFacts:
    """One attempt."""

    name: str
    begin: float
    """Seconds since 1970."""
    end: float
    """When it ended; for an attempt that wrote no end, its last sign of life."""
    status: Status
    error: str | None
    score: float | None
    first_step: int
    last_step: int
    ranks: int
    code_id: str | None
    command: Sequence[str]
    config: dict[str, Any]
    difference: dict[str, Any]
    """Settings that differ from the defaults, by dotted path."""
    environment: Fields
    diff: str
    """Diff of the code that was not committed."""


def attempts_of(
    run: Path, state: RunState | None = None, measured: Mapping[str, Span] | None = None
) -> list[AttemptFacts]:
    """The attempts of a run, in the order in which they started.

    Args:
        state: state of the run, which is that of its newest attempt; `state_of(run)` when None.
        measured: what the lines of metrics say of each, as a `History` has it; read here when None.
    """
    if measured is None:
        measured = read_history(run).attempts
    beats = list(read_heartbeats(run).values())
    folders = attempts_in(run)
    ends = _ends(run, folders, measured)
    if folders:
        ends[folders[-1].name] = state or state_of(run)
    found = []
    for folder in folders:
        signs = [beat["written"] for beat in beats if beat["attempt"] == folder.name]
        found.append(_facts(folder, measured.get(folder.name), signs, ends[folder.name]))
    return found


def _ends(run: Path, folders: Sequence[Path], measured: Mapping[str, Span]) -> dict[str, RunState]:
    """How each attempt ended, by name: from the sweep's ledger, else from its own result or metrics, else `lost`."""
    owner = sweep_of(run)
    in_ledger = {} if owner is None else owner[1].ends()
    found = {}
    for folder in folders:
        own = measured.get(folder.name)
        state = written_end(folder) or RunState(status=(own and own.status) or Status.LOST)
        if folder.name in in_ledger:
            status, error = in_ledger[folder.name]
            state = RunState(status=status, error=error, score=state.score)
        found[folder.name] = state
    return found


def _facts(folder: Path, measured: Span | None, signs: list[float], state: RunState) -> AttemptFacts:
    frozen = read_fields(folder / FROZEN, "config")
    # No file holds an attempt's start and end for certain: SIGKILL writes nothing. So take the extremes of all signs.
    times = signs if measured is None else [measured.begin, measured.end, *signs]
    times += [path.stat().st_mtime for path in (folder / FROZEN, folder / RESULT) if path.is_file()]
    return AttemptFacts(
        name=folder.name,
        begin=min(times, default=folder.stat().st_mtime),
        end=max(times, default=folder.stat().st_mtime),
        status=state.status,
        error=state.error,
        score=state.score,
        first_step=0 if measured is None else measured.first_step,
        last_step=0 if measured is None else measured.last_step,
        ranks=sum(re.fullmatch(r"rank-[0-9]+\.log", path.name) is not None for path in folder.iterdir()),
        code_id=frozen.text("code_id"),
        command=frozen.table("attempt").texts("command"),
        config=dict(frozen.table("config").values),
        difference=_yaml(folder / DIFFERENCE),
        environment=read_fields(folder / ENVIRONMENT),
        diff=read_text(folder / DIFF),
    )


def _yaml(path: Path) -> dict[str, Any]:
    """Settings in a YAML file, by dotted path; {} where there are none."""
    # Imported here: most commands read no YAML, and OmegaConf would dominate their start-up time.
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = read_text(path)
    if not text.strip():
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.create(text))
    except (YAMLError, OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        # A damaged file can fail deep inside the YAML parser, hence the builtin errors in the list.
        warn_of_damage(path, f"it is not a YAML file of settings: {type(error).__name__}")
        return {}
    if not isinstance(found, dict):
        warn_of_damage(path, "it holds no settings")
        return {}
    return flatten({str(name): value for name, value in found.items()})
