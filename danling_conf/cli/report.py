"""`danling-conf report RUN --html FILE`: a run as one self-contained page, to keep or to send."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from danling_conf.checkpoint.folder import BEST, LATEST, Folder, real
from danling_conf.cli.checkpoints import folder_of, readable_size
from danling_conf.cli.pages.charts import Bar, Series, line_chart, timeline
from danling_conf.cli.pages.page import (
    KINDS,
    LOSS_RATIO,
    Html,
    badge,
    code,
    facts,
    folded,
    page,
    section,
    table,
    text,
    tiles,
)
from danling_conf.cli.pages.scales import short
from danling_conf.records.attempts import AttemptFacts, attempts_of
from danling_conf.records.find import runs_or_refuse
from danling_conf.records.history import History, read_history
from danling_conf.records.membership import GONE, Event, changes_of, members_of
from danling_conf.records.planned import read_plan
from danling_conf.records.reading import read_fields
from danling_conf.records.run_directory import newest_attempt
from danling_conf.records.status import Status, in_short
from danling_conf.schema.files import RUN_FILE
from danling_conf.sweep.ends import standing_of
from danling_conf.topology.violation import ConfigRefused, Violation, show

_BARS: dict[str, str] = {Status.COMPLETED: "good", Status.RUNNING: "s0", Status.INTERRUPTED: "busy"}
"""Colours of attempts on the timeline; `bad` for all other ends."""


def write_report(directory: str, html: str) -> list[str]:
    """Write the page of a run to a file. Returns a line for the user.

    Raises ConfigRefused where there is no run, or more than one.
    """
    runs = runs_or_refuse(directory)
    if len(runs) > 1:
        rule = f"there are {len(runs)} runs in it, and a report shows one"
        raise ConfigRefused([Violation("RUN", directory, rule, f"name one of them, such as {runs[0]}")])
    target = Path(html).expanduser()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(report(runs[0]), encoding="utf-8")
    except OSError as error:
        fix = "choose a file to write to"
        raise ConfigRefused([Violation("--html", html, f"it cannot be written: {error.strerror}", fix)]) from error
    return [f"report of {runs[0]}: {target}"]


def report(run: Path) -> str:
    """The page of a run, as HTML."""
    state = standing_of(run)
    history = read_history(run)
    attempts = attempts_of(run, state, history.attempts)
    newest = attempts[-1] if attempts else None
    made = read_fields(run / RUN_FILE, "config_id", "created")
    heading = Html(
        f"{badge(state.status, KINDS.get(state.status, 'bad'))} {text(run)}"
        f" &middot; config {text(made.text('config_id') or '?')} &middot; made {text(made.text('created') or '?')}"
    )
    sections = [
        _overview(history, attempts),
        _curves(history),
        _speed(history),
        _planned(run, history),
        _attempts(attempts, run),
        _groups(newest_attempt(run)),
        _checkpoints(run),
        _configuration(newest),
        _environment(newest),
    ]
    return page(f"Run {run.name}", [item for item in sections if item], subtitle=heading)


def _overview(history: History, attempts: Sequence[AttemptFacts]) -> Html:
    curves = history.curves
    reached, epoch = history.measured or (None, 0)
    items: list[tuple[str, object, object]] = [("step", reached, f"epoch {epoch}")]
    scored = next((item.score for item in reversed(attempts) if item.score is not None), None)
    if scored is not None:
        items.append(("best score", f"{scored:.6g}", ""))
    for key, label in (("train.loss", "train loss"), ("val.loss", "val loss")):
        if key in curves:
            step, least = curves[key].least
            items.append((label, f"{curves[key].last:.5g}", f"lowest {least:.5g} at step {step}"))
    unit = "tokens" if "train.tokens_per_second" in curves else "samples"
    speed = curves.get(f"train.{unit}_per_second")
    if speed is not None:
        items.append(("throughput", f"{short(speed.median)}/s", f"{unit}, the median"))
    if "memory.peak_bytes" in curves:
        items.append(("peak memory", readable_size(curves["memory.peak_bytes"].most), "of the fullest rank"))
    if history.goodput is not None:
        items.append(("goodput", f"{100 * history.goodput:.1f} %", "of wall time in steps that count"))
    wall = sum(each.end - each.begin for each in attempts)
    count = len(attempts)
    items.append(("wall time", duration(wall), f"{count} attempt{'' if count == 1 else 's'}"))
    bad = curves["train.nonfinite_steps"].most if "train.nonfinite_steps" in curves else 0
    if bad:
        items.append(("not finite", f"{bad:.0f}", "steps of an attempt"))
    return section("Overview", tiles(items))


def _curves(history: History) -> Html:
    keys = sorted(key for key in history.curves if key.partition(".")[0] not in _OTHERS and "." in key)
    of_losses = dict.fromkeys(("train.loss", *(key for key in keys if key.endswith(".loss"))))
    losses = [Series(key, history.points(key)) for key in of_losses]
    values = [value for each in losses for _, value in each.points]
    log = bool(values) and min(values) > 0 and max(values) / min(values) > LOSS_RATIO
    charts = [
        line_chart(losses, title="Loss", log_y=log),
        line_chart([Series("train.lr", history.points("train.lr"))], title="Learning rate", zero=True),
    ]
    norm = history.points("train.grad_norm")
    if norm:
        charts.append(line_chart([Series("train.grad_norm", norm)], title="Gradient norm", zero=True))
    names = sorted({key.partition(".")[2] for key in keys if not key.endswith(".loss") and not _of_training(key)})
    for name in names:
        of_splits = [key for key in keys if key.partition(".")[2] == name and not _of_training(key)]
        charts.append(line_chart([Series(key, history.points(key)) for key in of_splits], title=name.capitalize()))
    return section("Training", *charts, columns=2)


_OTHERS = ("memory", "evaluation", "checkpoint", "time", "attempt", "step", "epoch")


def _of_training(key: str) -> bool:
    return key.startswith("train.")


def _speed(history: History) -> Html:
    unit = "tokens" if "train.tokens_per_second" in history.curves else "samples"
    speed = history.points(f"train.{unit}_per_second")
    if not speed:
        return Html("")
    parts = [
        Series("step", _milliseconds(history, "train.step_seconds")),
        Series("data", _milliseconds(history, "train.data_seconds")),
        Series("compute and communication", _milliseconds(history, "train.compute_seconds")),
    ]
    ranks = [key for key in history.curves if key.startswith("memory.peak_bytes.rank-")]
    ranks.sort(key=lambda key: int(key.rpartition("-")[2]))
    memory = [Series(key.rpartition(".")[2], history.points(key)) for key in ranks[:8]]
    memory = memory or [Series("peak", history.points("memory.peak_bytes"))]
    charts = [
        line_chart([Series(unit, speed)], title=f"Throughput, {unit} per second", zero=True),
        line_chart(parts, title="Time of a step, ms", zero=True),
        line_chart(memory, title="Peak memory", zero=True, y_format=readable_size),
    ]
    used = history.points("train.mfu")
    if used:
        shares = [Series("MFU", [(step, 100 * value) for step, value in used])]
        charts.append(line_chart(shares, title="Model FLOPs utilisation, %", zero=True))
    return section("Speed and memory", *charts, columns=2)


def _planned(run: Path, history: History) -> Html:
    """What was planned, beside what was measured."""
    plan = read_plan(run)
    if plan is None:
        return Html("")
    rows: list[list[object]] = []
    peak, seconds, mfu = (history.curves.get(key) for key in ("memory.peak_bytes", "train.step_seconds", "train.mfu"))
    measured = None if peak is None else peak.most
    rows.append(["peak memory of the fullest rank", *_compared(plan.peak_bytes, measured, readable_size)])
    if plan.step_seconds is not None:
        median = None if seconds is None else seconds.median
        rows.append(["time of a step", *_compared(plan.step_seconds, median, duration)])
    if plan.mfu is not None:
        median = None if mfu is None else mfu.median
        rows.append(["MFU", *_compared(plan.mfu, median, lambda share: f"{share:.1%}")])
    held = facts({f"{name}, planned": readable_size(size) for name, size in plan.of_fullest.memory.items() if size})
    note = f"for {plan.layout}" + (f" on {plan.gpu}" if plan.gpu else "; on a CPU, the whole process is measured")
    listed = table(["", "planned", "measured", "difference"], rows, numeric=(1, 2, 3))
    return section("Planned and measured", listed, folded("what holds it", held), note=note)


def _compared(planned: float, measured: float | None, shown: Callable[[float], str]) -> list[object]:
    if measured is None or not planned:
        return [shown(planned), None, None]
    return [shown(planned), shown(measured), f"{100 * (measured / planned - 1):+.1f} %"]


def _milliseconds(history: History, key: str) -> list[tuple[float, float]]:
    return [(step, 1000 * value) for step, value in history.points(key)]


def _attempts(attempts: Sequence[AttemptFacts], run: Path) -> Html:
    if not attempts:
        return Html("")
    begin = attempts[0].begin
    rows = []
    for number, item in enumerate(attempts, 1):
        words = f"attempt {number}: {item.status}, {duration(item.end - item.begin)}"
        kind = _BARS.get(item.status, "bad")
        rows.append((f"attempt {number}", [Bar(item.begin - begin, item.end - begin, words, kind)]))
    saved = [
        (datetime.fromisoformat(entry.manifest.saved).timestamp() - begin, f"checkpoint of step {entry.step}")
        for entry in Folder(folder_of(run)).entries()
        if entry.manifest is not None
    ]
    chart = timeline(rows, title="Attempts and what ended them", x_format=duration, marks=saved)
    listed = table(
        ["", "started", "took", "steps", "ended", "why", "ranks", "code"],
        [
            [
                number,
                clock(item.begin),
                duration(item.end - item.begin),
                f"{item.first_step} to {item.last_step}",
                badge(item.status, KINDS.get(item.status, "bad")),
                in_short(item.status, item.error)[:120],
                item.ranks,
                item.code_id,
            ]
            for number, item in enumerate(attempts, 1)
        ],
        numeric=(0, 2, 6),
    )
    return section("Attempts", chart, Html('<div style="height:12px"></div>'), listed)


def _groups(attempt: Path | None) -> Html:
    """The replica groups of an attempt on its time line: from when to when each took part."""
    changes = [] if attempt is None else changes_of(attempt)
    if not changes:
        return Html("")
    begin, end = changes[0].time, changes[-1].time
    rows = []
    for member in members_of(changes):
        bars, since, starting = [], None, False
        for item in [each for each in changes if each.group == member.group]:
            if item.event in (Event.STARTED, Event.JOINED, *GONE) and since is not None:
                words = f"group {member.group}: {'starting' if starting else 'takes part'} until {clock(item.time)}"
                bars.append(Bar(since - begin, item.time - begin, words, "busy" if starting else "s0"))
                since = None
            if item.event in (Event.STARTED, Event.JOINED):
                since, starting = item.time, item.event is Event.STARTED
        if since is not None:
            words = f"group {member.group}: {member.state}"
            bars.append(Bar(since - begin, end - begin, words, "busy" if starting else "s0"))
        rows.append((f"group {member.group}", bars))
    chart = timeline(rows, title="Replica groups: when each took part", x_format=duration)
    listed = table(
        ["time", "group", "", "step", "why"],
        [
            [clock(item.time), item.group, str(item.event), item.step, item.why[:120]]
            for item in changes
            if item.event is not Event.LEFT
        ],
        numeric=(1, 3),
    )
    return section("Replica groups", chart, folded("every change", listed))


def _checkpoints(run: Path) -> Html:
    folder = Folder(folder_of(run))
    entries = sorted(folder.entries(), key=lambda entry: (entry.step, entry.path.name))
    if not entries:
        return Html("")
    named = {name: folder.pointed(name) for name in (LATEST, BEST)}
    rows = []
    for entry in entries:
        names = [badge(name) for name, target in named.items() if target == real(entry.path)]
        made = entry.manifest
        rows.append(
            [
                entry.path.name,
                entry.step,
                None if made is None else clock(datetime.fromisoformat(made.saved).timestamp()),
                None if made is None else readable_size(made.size),
                None if made is None else made.layout,
                badge("broken", "bad") if entry.fault else badge("whole", "good"),
                Html(" ".join(names)),
            ]
        )
    head = ["checkpoint", "step", "saved", "size", "layout", "state", ""]
    return section("Checkpoints", table(head, rows, numeric=(1, 3)), note=folder.path)


def _configuration(attempt: AttemptFacts | None) -> Html:
    if attempt is None:
        return Html("")
    changed = attempt.difference
    rows = [[path, show(value)] for path, value in sorted(changed.items())]
    parts: list[Html] = [table(["setting", "value"], rows) if rows else text("everything is at its default")]
    if attempt.config:
        parts.append(folded("the whole configuration", code(OmegaConf.to_yaml(OmegaConf.create(attempt.config)))))
    if attempt.command:
        parts.append(folded("the command", code(" ".join(attempt.command))))
    if attempt.diff:
        parts.append(folded("what was not committed", code(attempt.diff)))
    return section("Configuration", *parts, note="what differs from the defaults")


def _environment(attempt: AttemptFacts | None) -> Html:
    if attempt is None or not attempt.environment:
        return Html("")
    found = attempt.environment
    shown = {
        "host": found.text("host"),
        "platform": found.text("platform"),
        "CPUs": found.integer("cpus"),
        "accelerators": ", ".join(found.texts("accelerators")) or "none",
        "Python": (found.text("python") or "").partition(" ")[0],
        "torch": found.text("torch"),
        "CUDA": found.text("cuda"),
        "code": attempt.code_id,
    }
    packages = table(["package", "version"], sorted(found.table("packages").values.items()))
    return section("Environment", facts(shown), folded("packages", packages))


def duration(seconds: float) -> str:
    """Seconds in readable units: 45 s, 3 min 20 s, 2 h 5 min, 1 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{seconds:.0f} s"
    whole = round(seconds)
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s"


def clock(moment: float) -> str:
    """A time in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
