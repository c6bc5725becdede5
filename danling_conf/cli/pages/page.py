"""HTML page: the document, its sections, tables, badges and folded parts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape

from danling_conf.cli.pages.script import SCRIPT
from danling_conf.cli.pages.style import STYLE
from danling_conf.records.status import Status
from danling_conf.schema.printable import printable_lines

KINDS: dict[str, str] = {
    Status.COMPLETED: "good",
    Status.RUNNING: "busy",
    Status.QUEUED: "",
    Status.PLANNED: "",
    Status.CANCELLED: "",
    Status.INTERRUPTED: "busy",
    Status.NOT_STARTED: "",
    Status.EMPTY: "",
    Status.UNKNOWN: "",
}
"""Style of a status badge; `bad` for a status that is not listed."""
LOSS_RATIO = 100.0
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""


class Html(str):
    """Text that is already markup. All other text is escaped, since names in a run can hold anything."""


def text(value: object) -> Html:
    """A value as markup: `Html` as it is, None as a dash, anything else escaped."""
    if isinstance(value, Html):
        return value
    return Html("&ndash;" if value is None else escape(printable_lines(str(value))))


def page(title: str, sections: Iterable[Html], *, subtitle: object = "") -> str:
    """A complete HTML document.

    Args:
        title: title of the page, and its heading.
        sections: made by `section`, in order.
        subtitle: a line under the heading.
    """
    head = f"<h1>{text(title)}</h1>" + (f'<p class="subtitle">{text(subtitle)}</p>' if subtitle else "")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The policy blocks every request to elsewhere, even if a name in the run got past the escaping.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; img-src data:\">\n"
        '<link rel="icon" href="data:,">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<header>{head}</header>\n"
        + "\n".join(sections)
        + f'\n</main>\n<div id="tip" role="status"></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def section(heading: str, *parts: Html, note: object = "", columns: int = 1) -> Html:
    """A section with a heading. Its parts are arranged in up to this many columns."""
    shown = f'<p class="note">{text(note)}</p>' if note else ""
    inside = "".join(parts)
    if columns > 1:
        inside = f'<div class="grid" style="--columns:{columns}">{inside}</div>'
    return Html(f"<section><h2>{text(heading)}</h2>{shown}{inside}</section>")


def tiles(items: Iterable[tuple[str, object, object]]) -> Html:
    """Key figures: label, value, and a short explanation (or "")."""
    made = [
        f'<div class="tile"><span class="label">{text(label)}</span><span class="value">{text(value)}</span>'
        + (f'<span class="note">{text(note)}</span>' if note else "")
        + "</div>"
        for label, value, note in items
    ]
    return Html(f'<div class="tiles">{"".join(made)}</div>')


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numeric: Collection[int] = ()) -> Html:
    """A table that scrolls on its own if it is too wide. A click on a heading sorts by that column.

    Args:
        numeric: columns with numbers, which are right-aligned.
    """
    kinds = [' class="number"' if column in numeric else "" for column in range(len(head))]
    top = "".join(f"<th{kind}>{text(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return Html(f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>')


def facts(items: Mapping[str, object]) -> Html:
    """Names and values, one pair per line."""
    return Html(
        '<dl class="facts">'
        + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in items.items())
        + "</dl>"
    )


def folded(heading: str, *parts: Html) -> Html:
    """Parts that unfold by a click on the heading."""
    return Html(f"<details><summary>{text(heading)}</summary>{''.join(parts)}</details>")


def code(content: str) -> Html:
    """Preformatted text."""
    return Html(f'<pre class="scroll"><code>{escape(printable_lines(content))}</code></pre>')


def badge(word: str, kind: str = "") -> Html:
    """A word in a frame; `kind` is good, bad, busy or ""."""
    return Html(f'<span class="badge {escape(kind)}">{escape(word)}</span>')
