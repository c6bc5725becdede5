"""`danling-conf plan --html FILE`: a plan as a page: stacks of memory by rank, time lines, proposals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from danling_conf.cli.pages.charts import Point, scatter
from danling_conf.cli.pages.page import Html, badge, code, facts, page, section, table, text, tiles
from danling_conf.cli.pages.scales import short
from danling_conf.cli.pages.stacks import stacked_area, stacked_bars
from danling_conf.plan.assessment import Assessment, gib, seconds, verdict_line
from danling_conf.plan.device_memory import stack_of
from danling_conf.plan.figures import (
    ACTIVATIONS,
    BATCH,
    BUFFERS,
    GATHERED,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    TEMPORARIES,
    RankFigures,
)
from danling_conf.plan.proposals import Proposals
from danling_conf.topology.hardware import GIB, Cluster
from danling_conf.topology.violation import ConfigRefused, Violation

_KINDS = {"fits": "good", "does not fit": "bad", "too close to call": "busy"}
_SHOWN_RANKS = 4
"""Time lines that are drawn: of the fullest ranks."""
_FEW = {BUFFERS: "others", BATCH: "others", "context": "device", "communicators": "device", "workspaces": "device",
        "allocator": "device"}  # fmt: skip
"""Small categories that share a colour."""
_SHOWN = (PARAMETERS, OPTIMIZER, GRADIENTS, ACTIVATIONS, GATHERED, TEMPORARIES, "others", "device")
"""Categories in the order of their colours."""


def write_page(target: str, content: str) -> str:
    """Write a page to a file. Returns a line for the user. Raises ConfigRefused where it cannot be written."""
    path = Path(target).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        rule = f"it cannot be written: {error.strerror}"
        raise ConfigRefused([Violation("--html", target, rule, "choose a file to write to")]) from error
    return f"page: {path}"


def layout_page(found: Assessment, command: str) -> str:
    """The page of one layout."""
    sections = [_overview(found), *_memory(found), _time(found), _assumptions(found)]
    return page(
        f"Plan of {found.figures.layout}", [item for item in sections if item], subtitle=_subtitle(found, command)
    )


def proposals_page(proposals: Proposals, command: str) -> str:
    """The page of the layouts that were found for a number of GPUs."""
    found = proposals.shown
    rows = [
        [
            number,
            item.name,
            badge(item.verdict.word, _KINDS[item.verdict.word]),
            gib(item.verdict.total),
            f"{item.time.seconds:.3f}",
            f"{100 * item.time.mfu:.1f}",
            item.settings_text,
            "traced" if item.traced else "derived",
        ]
        for number, item in enumerate(found, 1)
    ]
    head = ["", "layout", "", "GiB", "s a step", "MFU %", "settings", "by"]
    points = [
        Point(
            item.verdict.total, item.time.seconds, f"{item.name}: {item.settings_text}", group=0 if item in found else 1
        )
        for item in proposals.ranked
    ]
    chart = scatter(
        points,
        title="All layouts that fit",
        x_label="GiB of the fullest rank",
        y_label="seconds a step",
        log_y=True,
        groups=("shown", "others"),
        x_format=gib,
    )
    sections = [
        section("Proposals", table(head, rows, numeric=(0, 3, 4, 5)), note=" ".join(proposals.notes)),
        section("Why the first", Html("".join(f"<p>{text(line)}</p>" for line in proposals.reasons))),
        section("To paste", code("\n".join(" ".join(item.overrides) for item in found))),
        section("Memory and time", chart),
    ]
    if found:
        sections += _memory_rows([(item.name, item.fullest, item.cluster) for item in found])
    return page(f"Plan for {proposals.gpus} GPUs", [item for item in sections if item], subtitle=command)


def _subtitle(found: Assessment, command: str) -> Html:
    return Html(f"{badge(found.verdict.word, _KINDS[found.verdict.word])} {text(command)}")


def _overview(found: Assessment) -> Html:
    figures, time, verdict = found.figures, found.time, found.verdict
    devices = sum(rank.ranks for rank in figures.ranks)
    items: list[tuple[str, object, object]] = [
        ("memory of the fullest rank", f"{gib(verdict.total)} GiB", verdict_line(found)),
        ("time of a step", seconds(time.seconds), f"± {100 * time.band:.0f} %"),
        ("MFU", f"{100 * time.mfu:.1f} %", "of the devices' peak"),
        ("devices", devices, f"{found.cluster.gpus_per_node} to a node"),
        ("parameters", short(figures.parameters), f"{figures.parameters:,}"),
        ("samples a step", f"{figures.samples:,}", f"{figures.tokens:,} tokens" if figures.tokens else ""),
    ]
    if time.tokens_per_second:
        items.append(("throughput", f"{time.tokens_per_second / devices:,.0f}", "tokens/s of each device"))
    return section("Overview", tiles(items))


def _memory(found: Assessment) -> list[Html]:
    ranks = found.figures.ranks
    bars = _memory_rows([(_rank_name(rank, len(ranks)), rank, found.cluster) for rank in ranks])
    fullest = sorted(ranks, key=lambda rank: rank.peak_bytes, reverse=True)[:_SHOWN_RANKS]
    lines = [
        stacked_area(
            [(moment.name, _folded(moment.memory)) for moment in rank.moments],
            title=f"{_rank_name(rank, len(ranks))}: the most at {rank.peak_moment}",
            limit=found.cluster.gpu.memory / GIB,
            limit_name="device",
            value_format=_gib,
        )
        for rank in fullest
        if rank.moments
    ]
    if lines:
        bars.append(section("Memory along a step", *lines, columns=2))
    return bars


def _memory_rows(rows: Sequence[tuple[str, RankFigures, Cluster]]) -> list[Html]:
    stacks = [(name, _folded(stack_of(rank, cluster))) for name, rank, cluster in rows]
    chart = stacked_bars(
        stacks,
        title="Memory at the peak, GiB",
        limit=rows[0][2].gpu.memory / GIB,
        limit_name="device",
        value_format=_gib,
    )
    categories = list(dict.fromkeys(name for _, stack in stacks for name in stack))
    listed = table(
        ["", *categories, "all"],
        [
            [name, *(_gib(stack.get(part, 0)) for part in categories), _gib(sum(stack.values()))]
            for name, stack in stacks
        ],
        numeric=range(1, len(categories) + 2),
    )
    return [section("Memory", chart, Html('<div style="height:12px"></div>'), listed)]


def _time(found: Assessment) -> Html:
    time = found.time
    parts = facts(
        {
            "arithmetic": seconds(time.matmul),
            "attention": seconds(time.attention),
            "memory-bound operations": seconds(time.memory),
            "communication that nothing hides": seconds(time.exposed),
            "the pipeline's bubble": seconds(time.bubble),
            "all": seconds(time.seconds),
        }
    )
    if not time.passed:
        return section("Time of a step", parts)
    passed = table(
        ["collective", "axis", "ranks", "between nodes", "calls", "GiB", "seconds", "exposed"],
        [
            [
                item.kind,
                item.axis,
                item.group_size,
                "yes" if item.crosses_nodes else "no",
                item.count,
                gib(item.bytes),
                f"{item.seconds:.4f}",
                f"{item.exposed:.4f}",
            ]
            for item in time.passed
        ],
        numeric=(2, 4, 5, 6, 7),
    )
    return section("Time of a step", parts, Html('<div style="height:12px"></div>'), passed)


def _assumptions(found: Assessment) -> Html:
    gpu, figures = found.cluster.gpu, found.figures
    notes = [*figures.notes, *(note for rank in figures.ranks for note in rank.notes)]
    shown: dict[str, object] = {
        "device": f"{gpu.name}, {gib(gpu.memory)} GiB, {gpu.hbm / 1e9:,.0f} GB/s",
        "links": f"{gpu.link / 1e9:,.0f} GB/s within a node ({gpu.link_kind}), "
        f"{gpu.network / 1e9:,.1f} GB/s between nodes",
        "efficiency": f"arithmetic {gpu.matmul_efficiency:.0%}, memory {gpu.hbm_efficiency:.0%}, "
        f"links {gpu.link_efficiency:.0%}",
        "sources": "; ".join(gpu.sources),
        **{name: value for name, value in figures.settings.items()},
    }
    for number, note in enumerate(dict.fromkeys(notes), 1):
        shown[f"note {number}"] = note
    return section("Assumptions", facts(shown))


def _rank_name(rank: RankFigures, kinds: int) -> str:
    stages = ", ".join(map(str, rank.stages))
    return f"stage {stages}" if kinds > 1 else f"each of {rank.ranks} ranks"


def _folded(stack: Mapping[str, int]) -> dict[str, float]:
    """A stack in GiB, with its small categories joined, in the same order on all charts."""
    found = dict.fromkeys(_SHOWN, 0.0)
    for name, value in stack.items():
        found[_FEW.get(name, name)] = found.get(_FEW.get(name, name), 0.0) + value / GIB
    return found


def _gib(value: float) -> str:
    return gib(value * GIB)
