"""The pictures of the documentation, as SVG: `python docs/tools/pictures.py [NAME...]` writes docs/pictures.

What the program computes or shows is drawn from the program itself: coordinates of ranks from its topology, the watch
table by `danling-conf watch` of two heartbeats, the report's charts from the page of a run that is trained here (which
needs torch).
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from rich.console import Console

from danling_conf.cli.pages.style import STYLE
from danling_conf.groups.layout_names import parse_layout
from danling_conf.topology.layout import coordinates, data_rank, mesh_axes

FOLDER = Path(__file__).parents[1] / "pictures"
_SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", _SVG)


def _colours() -> str:
    """The colour variables of the program's pages, for light and dark."""
    light = re.search(r":root\{color-scheme.*?\}", STYLE, re.DOTALL)
    dark = re.search(r"@media \(prefers-color-scheme:dark\)\{:root\{.*?\}\}", STYLE, re.DOTALL)
    assert light is not None
    assert dark is not None
    return f"{light[0]}{dark[0]}"


_RULES = """
text{font:14px system-ui,-apple-system,"Segoe UI",sans-serif;fill:var(--ink)}
.soft{fill:var(--soft);font-size:12.5px}.code{font:13px ui-monospace,Menlo,monospace}.strong{font-weight:600}
.card{fill:var(--card);stroke:var(--line)}.back{fill:var(--back)}.arrow{stroke:var(--soft);fill:none;stroke-width:1.5}
.light{fill:#fff}
"""


def _picture(width: int, height: int, title: str, body: list[str], rules: str = "") -> str:
    head = (
        f'<svg xmlns="{_SVG}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{_colours()}{_RULES}{rules}</style>'
    )
    return "\n".join([head, f'<rect class="back" width="{width}" height="{height}" rx="8"/>', *body, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, kind: str = "card", style: str = "") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" class="{kind}" style="{style}"/>'


ROAD = (
    ("python train.py parallel=fsdp8 compile=max", "schema: every setting typed · groups: names become settings"),
    ("composed configuration", "topology: rules in pure Python · config: checked, read-only · records: run directory"),
    ("resolved configuration", "launch: the ranks of this machine, of torchrun, or of Slurm"),
    (
        "rank 0 ... rank 7",
        "parallel: mesh, model, compile, FSDP2 · components: optimizer, loaders · runner: steps",
    ),
    ("experiments/lin/exp/<config id>/", "metrics, logs, checkpoints, the frozen configuration"),
)
"""The states of a run on its way, and what makes the next one of each."""


def road() -> str:
    """From a command line to a trained model."""
    body, width = [], 760
    for number, (state, makes) in enumerate(ROAD):
        y = 16 + 84 * number
        body += [_box(16, y, width - 32, 36), _text(32, y + 23, state, "code strong")]
        if number < len(ROAD) - 1:
            body.append(f'<path class="arrow" d="M40 {y + 40}V{y + 78}M35 {y + 72}L40 {y + 79}L45 {y + 72}"/>')
            body.append(_text(58, y + 63, makes, "soft"))
        else:
            body.append(_text(58, y + 58, makes, "soft"))
        if number == 1:
            refused = "refused: all faults, exit code 2, before torch is imported"
            body.append(_text(width - 32, y + 23, refused, "soft", "end"))
    return _picture(width, 16 + 84 * len(ROAD), "From a command line to a trained model", body)


def mesh(name: str = "fsdp2_tp2_pp2") -> str:
    """The ranks of a layout with three axes: a column for each pipeline stage, rows of shards, tensor ranks inside."""
    layout = parse_layout(name)
    axes = mesh_axes(layout)
    outer, middle, inner = axes
    size, gap, left, top = 104, 10, 104, 84
    body = [_text(16, 30, f"parallel={name}: {layout.world_size} ranks", "code strong")]
    body.append(_text(16, 50, "mesh axes, outermost first: " + ", ".join(f"{a} {d}" for a, d in axes.items()), "soft"))
    wide = axes[inner] * (size + gap) + 2 * gap
    for rank in range(layout.world_size):
        place = coordinates(layout, rank)
        x = left + place[outer] * (wide + 24) + gap + place[inner] * (size + gap)
        y = top + 30 + place[middle] * (size - 24 + gap)
        if place[middle] == place[inner] == 0:
            height = axes[middle] * (size - 24 + gap) + 40
            body += [_box(x - gap, top, wide - gap, height), _text(x, top + 20, f"{outer} {place[outer]}", "soft")]
        if place[outer] == place[inner] == 0:
            body.append(_text(16, y + 44, f"{middle} {place[middle]}", "soft"))
        body.append(_box(x, y, size, size - 24, "", f"fill:var(--s{data_rank(layout, rank)})"))
        body.append(_text(x + size / 2, y + 32, f"rank {rank}", "strong light", "middle"))
        body.append(_text(x + size / 2, y + 54, f"{inner} {place[inner]}", "light", "middle"))
    bottom = top + axes[middle] * (size - 24 + gap) + 72
    body.append(_text(16, bottom, "One colour: ranks that read the same samples.", "soft"))
    return _picture(left + axes[outer] * (wide + 24), bottom + 16, f"Ranks of {name}", body)


def pipeline(ranks: int = 4, microbatches: int = 8) -> str:
    """A step of 1F1B: each rank runs ahead by the stages behind it, then alternates; a backward takes two forwards."""
    order = {rank: _one_f_one_b(ranks - 1 - rank, microbatches) for rank in range(ranks)}
    ends: dict[tuple[str, int, int], int] = {}
    placed: list[tuple[int, str, int, int]] = []
    clock, pending = dict.fromkeys(order, 0), {rank: list(actions) for rank, actions in order.items()}
    while any(pending.values()):
        for rank, actions in pending.items():
            while actions:
                kind, number = actions[0]
                needed = (kind, rank - 1 if kind == "F" else rank + 1, number)
                if needed[1] in order and needed not in ends:
                    break
                begin = max(clock[rank], ends.get(needed, 0))
                clock[rank] = ends[kind, rank, number] = begin + (1 if kind == "F" else 2)
                placed.append((rank, kind, number, begin))
                actions.pop(0)
    cell, left, top = 24, 84, 56
    total = max(clock.values())
    body = [_text(16, 30, f"parallel=pp{ranks}, 1F1B, {microbatches} microbatches", "code strong")]
    for rank in order:
        y = top + rank * (cell + 12)
        body += [_text(16, y + 22, f"rank {rank}", "soft"), _box(left, y, total * cell, cell + 6)]
    for rank, kind, number, begin in placed:
        x, y, width = left + begin * cell, top + rank * (cell + 12), cell * (1 if kind == "F" else 2)
        body.append(_box(x, y, width - 1.5, cell + 6, "", f"fill:var(--{'s0' if kind == 'F' else 's1'})"))
        body.append(_text(x + width / 2 - 1, y + 20, str(number), "light", "middle"))
    y = top + ranks * (cell + 12) + 22
    legend = "Blue: forward of a microbatch. Orange: backward. Empty: the rank waits (the bubble)."
    return _picture(left + total * cell + 16, y + 16, "1F1B", [*body, _text(16, y, legend, "soft")])


def _one_f_one_b(ahead: int, microbatches: int) -> list[tuple[str, int]]:
    """Actions of a rank with so many stages behind it."""
    ahead = min(ahead, microbatches)
    actions = [("F", number) for number in range(ahead)]
    for number in range(microbatches):
        actions += [("F", number + ahead)] if number + ahead < microbatches else []
        actions.append(("B", number))
    return actions


def watch() -> str:
    """`danling-conf watch` of two ranks, one of which has stopped."""
    from danling_conf.cli.watch import view
    from danling_conf.records.ranks import look_at
    from danling_conf.records.run_lock import RunLock

    now, attempt = 1_000_000.0, "20261126-101500"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "7f99f6a9864f")
        (run / "attempts" / attempt).mkdir(parents=True)
        (run / "heartbeats").mkdir()
        (run / "run.json").write_text("{}")
        settings = {"enabled": True, "interval_seconds": 1.0, "dir_name": "heartbeats"}
        (run / "attempts" / attempt / "frozen.json").write_text(json.dumps({"config": {"heartbeat": settings}}))
        common = {"attempt": attempt, "world_size": 2, "host": "node1", "epoch": 0, "total_steps": 400, "interval": 1.0}
        waiting = {"state": "waiting in a collective", "state_since": now - 6.7, "waiting_share": 1.0}
        stopped = {"state": "training", "state_since": now - 8.2, "waiting_share": 0.12}
        ranks = (
            {
                **waiting,
                "pid": 31439,
                "step": 46,
                "written": now - 0.5,
                "last_step_time": now - 7.3,
                "memory_bytes": 74e7,
            },
            {
                **stopped,
                "pid": 31440,
                "step": 45,
                "written": now - 7.3,
                "last_step_time": now - 7.5,
                "memory_bytes": 75e7,
            },
        )
        for rank, facts in enumerate(ranks):
            (run / "heartbeats" / f"rank-{rank}.json").write_text(json.dumps({**common, "rank": rank, **facts}))
        lock = RunLock(run)
        try:
            seen = look_at(run, now)
        finally:
            lock.release()
    console = Console(record=True, width=150, force_terminal=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(view([_renamed(seen, "experiments/lin/exp/7f99f6a9864f")]))
    drawn = console.export_svg(title="danling-conf watch experiments/lin/exp/7f99f6a9864f", unique_id="watch")
    # rich names a font of the network, which nothing here loads.
    drawn = re.sub(r"@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return re.sub(r'viewBox="0 0 (\S+) (\S+)"', r'viewBox="0 0 \1 \2" width="\1" height="\2"', drawn, count=1)


def _renamed(seen: object, name: str) -> object:
    from dataclasses import replace

    return replace(seen, run=name)  # type: ignore[type-var]


def report() -> str:
    """The head of `danling-conf report`: tiles and charts of the page of a run that is trained here."""
    from danling_conf.cli.report import report as page_of

    with tempfile.TemporaryDirectory() as folder:
        page = page_of(_trained(Path(folder)))
    heading = re.search(r"<h1>(.*?)</h1>", page)
    assert heading is not None
    width, body = 1160, [_text(24, 40, heading[1], "title strong")]
    tiles = re.findall(r'<span class="label">(.*?)</span>.*?<span class="value">(.*?)</span>', page, re.DOTALL)[:6]
    for number, (label, value) in enumerate(tiles):
        x = 24 + number * 186
        body += [_box(x, 60, 174, 64), _text(x + 14, 84, label, "soft"), _text(x + 14, 110, value, "value strong")]
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)[:4]
    for number, figure in enumerate(figures):
        x, y = 24 + (number % 2) * 562, 144 + (number // 2) * 310
        caption = re.search(r"<figcaption>(?:<span>)?([^<]*)", figure)
        drawing = ElementTree.fromstring(re.search(r"<svg.*</svg>", figure, re.DOTALL)[0])  # type: ignore[index]
        for name in [key for key in drawing.attrib if key.startswith("data-")]:
            del drawing.attrib[name]
        drawing.attrib |= {"x": str(x + 8), "y": str(y + 34), "width": "534", "height": "240"}
        body += [_box(x, y, 550, 294), _text(x + 14, y + 24, caption[1] if caption else "", "strong")]
        body.append(ElementTree.tostring(drawing, encoding="unicode"))
    taken = (".axis", ".rule", ".path", ".mark", ".cross", ".chosen")
    rules = "\n".join(line for line in STYLE.splitlines() if line.startswith(taken))
    rules += ".title{font-size:22px}.value{font-size:19px}"
    height = 144 + math.ceil(len(figures) / 2) * 310
    return _picture(width, height, "The page of a run", body, rules)


def _trained(root: Path) -> Path:
    """A run of a few hundred steps of a small model; returns its directory."""
    import torch
    from torch.nn.functional import cross_entropy

    import danling_conf

    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 16, generator=source)
    samples = [(each, int(each[:4].argmax())) for each in inputs]
    settings = ["steps=400", "seed=0", "optim.lr=3e-3", "scheduler=cosine", "scheduler.warmup_steps=40"]
    settings += ["max_grad_norm=1", "log_interval=8", "eval_interval=40", "dataloader.batch_size=32"]
    runner = danling_conf.Runner(danling_conf.compose([*settings, f"workspace_root={root}"]))
    runner.fit(
        lambda: torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4)),
        {"train": samples[:448], "val": samples[448:]},
        loss=lambda output, batch: cross_entropy(output, batch[1]),
    )
    return runner.world.attempt.run_directory


PICTURES: dict[str, Callable[[], str]] = {
    "road": road,
    "mesh": mesh,
    "pipeline": pipeline,
    "watch": watch,
    "report": report,
}


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in names or PICTURES:
        (FOLDER / f"{name}.svg").write_text(PICTURES[name](), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
