"""`danling-conf plan`: memory, communication and time of a layout, on a machine without its devices."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from danling_conf.cli.inspect_app import inspect_app
from danling_conf.cli.plan_page import layout_page, proposals_page, write_page
from danling_conf.cli.plan_proposals import proposal_lines, propose_layouts
from danling_conf.config.check import compose_or_refuse
from danling_conf.config.hydra_adapter import ConfigSearch, composer, overrides_of
from danling_conf.groups.layout_names import name_of
from danling_conf.launch.app import App
from danling_conf.plan.assessment import Assessment, assess, gib, memory_lines, time_lines
from danling_conf.plan.figures import LayoutFigures, RankFigures
from danling_conf.plan.script import plan_of_script
from danling_conf.records.planned import memory_text
from danling_conf.schema.nearest import nearest
from danling_conf.schema.printable import shell_line
from danling_conf.sweep.preflight import Preflight
from danling_conf.topology.hardware import GPUS_PER_NODE, Cluster, find_gpu
from danling_conf.topology.layout import layout_of
from danling_conf.topology.resources import Capacity
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

if TYPE_CHECKING:
    from danling_conf.plan.remedies import Remedy

_NUMBERS = ("--gpus", "--gpus-per-node", "--global-batch")
_TEXTS = ("--gpu", "--html")


@dataclass(frozen=True, kw_only=True)
class Request:
    """The overrides of a command line, and the options among them."""

    overrides: list[str]
    gpu: str | None
    gpus_per_node: int
    as_json: bool
    gpus: int | None = None
    """Number of GPUs to propose layouts for; None for a plan of the configured one."""
    global_batch: int | None = None
    html: str | None = None

    @property
    def cluster(self) -> Cluster | None:
        """The devices that the plan is for; None where only memory and communication are asked for."""
        return None if self.gpu is None else Cluster(gpu=find_gpu(self.gpu), gpus_per_node=self.gpus_per_node)


@dataclass(frozen=True)
class Planned:
    """A layout with what would make it smaller."""

    figures: LayoutFigures
    remedies: Sequence[Remedy]
    assessment: Assessment | None


def plan_app(script: str, argv: list[str]) -> list[str]:
    """Plan an app's run. Returns the lines to print.

    Args:
        argv: overrides, and anywhere among them `--gpu NAME`, `--gpus-per-node N`, `--gpus N`, `--global-batch N`,
            `--html FILE` and `--json`.

    Raises ConfigRefused where the configuration, or the plan, is refused.
    """
    request, begun = parse(argv), time.monotonic()
    if request.gpus is not None:
        return _propose(request, script, begun)
    planned = inspect_app(script, request.overrides, partial(_plan, request))
    pages = []
    if request.html is not None and planned.assessment is not None:
        pages = [write_page(request.html, layout_page(planned.assessment, shell_line(script, *request.overrides)))]
    if request.as_json:
        return [json.dumps(as_json(planned), indent=1)]
    return [*lines_of(planned, request, script), *pages]


def _propose(request: Request, script: str, begun: float) -> list[str]:
    cluster, gpus = request.cluster, request.gpus
    assert cluster is not None
    assert gpus is not None
    look = partial(propose_layouts, gpus, cluster, request.global_batch, begun)
    found = inspect_app(script, request.overrides, look)
    pages = []
    if request.html is not None:
        command = shell_line("danling-conf", "plan", script, *request.overrides, "--gpus", str(gpus))
        pages = [write_page(request.html, proposals_page(found, command))]
    if request.as_json:
        return [json.dumps(found.as_json(), indent=1)]
    return [*proposal_lines(found, cluster, script, request.overrides), *pages]


def _plan(request: Request, app: App, search: ConfigSearch, overrides: list[str]) -> Planned:
    cluster = request.cluster
    with composer(search) as composing:
        master = compose_or_refuse(composing, overrides)
        capacity = Capacity(devices_per_node=request.gpus_per_node)
        given = overrides_of(master, "task")
        config = Preflight(composing, master, machine=None, capacity=capacity).check(given, 0).config
    layout = layout_of(config)
    if not layout.filled:
        rule = f"{name_of(layout)} leaves a degree to the number of processes, and none are started"
        raise ConfigRefused([Violation("parallel", ABSENT, rule, "name all degrees, such as parallel=fsdp64_tp8")])
    return planned_run(app, config, cluster)


def planned_run(app: App, config: Any, cluster: Cluster | None) -> Planned:
    """Call an app's function up to where it would train, and plan that. Raises ConfigRefused."""
    # torch, and all that is built with it, only once the configuration is accepted.
    from danling_conf.plan.engine import figures_of, subject_of
    from danling_conf.plan.remedies import remedies_of

    def plan(recipe: Any) -> Planned:
        subject = subject_of(recipe, accelerated=cluster is not None)
        figures = figures_of(subject)
        assessment = None if cluster is None else assess(figures, cluster)
        return Planned(figures, remedies_of(subject, figures), assessment)

    return plan_of_script(app.function, app.script.name, config, plan)


def as_json(planned: Planned) -> dict[str, Any]:
    """As plain values for JSON."""
    found = planned.assessment.as_json() if planned.assessment is not None else {"figures": planned.figures.as_json()}
    from danling_conf.plan.remedies import cheapest_first

    remedies = cheapest_first(planned.remedies, planned.figures.worst.peak_bytes)
    ways = [f"{item.overrides}: {memory_text(item.saves)} less; {item.costs}" for item in remedies]
    return {**found, "ways": ways}


def lines_of(planned: Planned, request: Request, script: str) -> list[str]:
    """A plan as text."""
    figures = planned.figures
    world = sum(rank.ranks for rank in figures.ranks)
    tokens = f", {figures.tokens:,} tokens" if figures.tokens else ""
    lines = [
        f"planned: {shell_line(script, *request.overrides)}",
        f"layout {figures.layout}, {world:,} rank{'' if world == 1 else 's'}; {_count(figures.parameters)} parameters; "
        f"{figures.samples:,} samples{tokens} a step",
        "",
    ]
    if planned.assessment is not None:
        lines += [*memory_lines(planned.assessment), ""]
    for rank in figures.ranks:
        lines += [*rank_lines(rank, pipelined=len(figures.ranks) > 1), ""]
    if planned.assessment is not None:
        lines += [*time_lines(planned.assessment), ""]
    else:
        lines += [*collective_lines(figures.worst), ""]
    if planned.remedies:
        lines.append("needs less memory with:")
        width = max(len(item.overrides) for item in planned.remedies)
        for item in planned.remedies:
            lines.append(f"  {item.overrides:<{width}}  {gib(item.saves):>7} GiB less; {item.costs}")
        lines.append("")
    return [*lines, *(f"note: {note}" for note in (*figures.notes, *figures.worst.notes))]


def rank_lines(rank: RankFigures, *, pipelined: bool) -> list[str]:
    """The peak of a rank and what holds it."""
    stages = " and ".join(map(str, rank.stages))
    alike = f", {rank.ranks:,} alike" if rank.ranks > 1 else ""
    who = f"rank {rank.rank} (stage{'s' if len(rank.stages) > 1 else ''} {stages}{alike})" if pipelined else "each rank"
    flops = sum(rank.flops.values())
    return [
        f"{who}: {gib(rank.peak_bytes)} GiB at {rank.peak_moment}; {_count(flops)} FLOPs a step"
        + (f", {100 * rank.recomputed_flops / flops:.0f} % of them recomputed" if rank.recomputed_flops else ""),
        *(
            f"  {name:<14}{gib(size):>8} GiB"
            for name, size in sorted(rank.peak.items(), key=lambda item: -item[1])
            if size
        ),
    ]


def collective_lines(rank: RankFigures) -> list[str]:
    """What a rank sends and receives in a step."""
    return [
        f"  {item.kind} over {item.axis} ({item.group_size}): {item.count} x {gib(item.bytes / max(1, item.count))} GiB"
        for item in sorted(rank.collectives, key=lambda item: -item.bytes)
    ]


def parse(argv: list[str]) -> Request:
    """Read a command line. Raises ConfigRefused."""
    overrides: list[str] = []
    texts: dict[str, str] = {}
    in_json = False
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--json":
            in_json = True
        elif name in (*_NUMBERS, *_TEXTS):
            texts[name] = value if equals else next(rest, "")
        elif word.startswith("--"):
            near = nearest(name, (*_NUMBERS, *_TEXTS, "--json"))
            fix = f"did you mean {near}?" if near else f"choose among {', '.join((*_NUMBERS, *_TEXTS, '--json'))}"
            raise ConfigRefused([Violation(word, ABSENT, "danling-conf plan has no such option", fix)])
        else:
            overrides.append(word)
    numbers = {name: _number(name, texts[name]) for name in _NUMBERS if name in texts}
    if "--gpu" not in texts:
        for name in ("--gpus", "--html"):
            if name in texts:
                rule = "it needs an accelerator, whose memory and speed decide"
                raise ConfigRefused([Violation(name, texts[name], rule, "add --gpu h100, or another one")])
    return Request(
        overrides=overrides,
        gpu=texts.get("--gpu"),
        gpus_per_node=numbers.get("--gpus-per-node", GPUS_PER_NODE),
        as_json=in_json,
        gpus=numbers.get("--gpus"),
        global_batch=numbers.get("--global-batch"),
        html=texts.get("--html"),
    )


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ConfigRefused([Violation(name, text or ABSENT, "it is a whole number above 0", f"write {name} 8")])
    return int(text)


def _count(value: float) -> str:
    """A large number in words: `8.03 billion`."""
    for size, name in (
        (1e18, "quintillion"),
        (1e15, "quadrillion"),
        (1e12, "trillion"),
        (1e9, "billion"),
        (1e6, "million"),
    ):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:,.0f}"
