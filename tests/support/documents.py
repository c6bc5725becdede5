"""The documents, and the blocks of code in them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = tuple(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md")))
)
GENERATED = {"index.md", "changelog.md", "contributing.md", "settings/index.md"}
"""Pages of the site that docs/tools/hooks.py adds."""
_BLOCK = re.compile(
    r"(?:^ *<!-- (?P<kind>not run|file|run): (?P<mark>[^>]*?) *-->\n)?"
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block, and the mark in the comment above it.

    `not run: REASON` leaves it out, `file: PATH` writes it, `run: SCRIPT ARGUMENTS` trains with it.
    """

    document: str
    line: int
    language: str
    text: str
    kind: str = ""
    mark: str = ""

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def text_of(document: str) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def blocks_of(document: str) -> Iterator[Block]:
    """The blocks of a document, in their order."""
    whole = text_of(document)
    for found in _BLOCK.finditer(whole):
        yield Block(
            document=document,
            line=whole.count("\n", 0, found.start("indent")) + 1,
            language=found["language"],
            text=textwrap.dedent(found["text"]),
            kind=found["kind"] or "",
            mark=found["mark"] or "",
        )
