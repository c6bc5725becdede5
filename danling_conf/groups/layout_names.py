"""Grammar of layout names: parses `fsdp64_tp8_pp2` into a layout, and formats a layout as its name."""

from __future__ import annotations

import re

from danling_conf.schema.layout import FILL, Layout
from danling_conf.schema.nearest import nearest
from danling_conf.schema.parallel import MOST_RANKS

_DATA_TOKENS = ("ddp", "fsdp", "hsdp")
_AXIS_TOKENS = {"tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "expert", "etp": "expert_tensor"}
_TOKEN = re.compile(r"(?P<word>[a-z]+)(?P<degrees>.*)", re.DOTALL)
_DEGREE = re.compile(r"[1-9][0-9]*")

GRAMMAR = "single, or ddpN, fsdpN, hsdpRxS, tpN, cpN, ppN, epN, etpN joined with '_', such as fsdp64_tp8_pp2"

NAME_PATTERN = r"^(single|{token}(_{token})*)$".format(
    token=rf"((ddp|fsdp)([1-9]\d*)?|hsdp[1-9]\d*x[1-9]\d*|({'|'.join(_AXIS_TOKENS)})[1-9]\d*)"
)
"""The grammar as a regular expression of JSON Schema, but for parts that stand twice."""

EXAMPLES = (
    "single",
    "ddp",
    "ddp2",
    "ddp4",
    "ddp8",
    "fsdp",
    "fsdp2",
    "fsdp4",
    "fsdp8",
    "hsdp2x2",
    "hsdp2x4",
    "fsdp4_tp2",
    "fsdp8_tp8_pp2",
    "fsdp8_cp2",
    "fsdp8_ep4",
)
"""Names offered by completion; any other name of the grammar works as well."""


class LayoutNameError(ValueError):
    """A name outside the grammar; the message is one line with the part that is wrong, and why."""


def parse_layout(name: str) -> Layout:
    """The layout that `name` stands for. `ddp` and `fsdp` without a number are filled from the world size (-1).

    Raises LayoutNameError for a name outside the grammar.
    """
    if name == "single":
        return Layout()
    degrees: dict[str, int] = {}
    fsdp = False
    seen: set[str] = set()
    for token in name.split("_"):
        word, numbers = _split(name, token)
        kind = "data" if word in _DATA_TOKENS else word
        if kind in seen:
            twice = "a second of ddp, fsdp, hsdp" if kind == "data" else f"a second {word}"
            raise LayoutNameError(f"layout {name!r}: {token!r} is {twice}; each part may appear once")
        seen.add(kind)
        if word == "hsdp":
            first, x, second = numbers.partition("x")
            if not x:
                raise LayoutNameError(
                    f"layout {name!r}: {token!r} needs both degrees, replicate x shard, such as hsdp2x4"
                )
            degrees["replicate"], degrees["shard"] = _degree(name, token, first), _degree(name, token, second)
        elif word == "fsdp":
            degrees["shard"] = _degree(name, token, numbers) if numbers else FILL
        elif word == "ddp":
            degrees["replicate"] = _degree(name, token, numbers) if numbers else FILL
        else:
            if not numbers:
                raise LayoutNameError(f"layout {name!r}: {token!r} needs a degree, such as {word}2")
            degrees[_AXIS_TOKENS[word]] = _degree(name, token, numbers)
        fsdp = fsdp or word in ("fsdp", "hsdp")
    return Layout(fsdp=fsdp, **degrees)


def name_of(layout: Layout) -> str:
    """The canonical name of a layout: `parse_layout(name_of(layout)) == layout`.

    Raises ValueError for degrees that no name stands for (sharding without FSDP, a part to fill that cannot be
    written without a number).
    """
    unnamed = ValueError(f"no layout name stands for {layout}")
    parts: list[str] = []
    if layout.fsdp:
        if layout.replicate == 1:
            parts.append("fsdp" if layout.shard == FILL else f"fsdp{layout.shard}")
        elif FILL in (layout.replicate, layout.shard):
            raise unnamed
        else:
            parts.append(f"hsdp{layout.replicate}x{layout.shard}")
    elif layout.shard != 1:
        raise unnamed
    elif layout.replicate != 1:
        parts.append("ddp" if layout.replicate == FILL else f"ddp{layout.replicate}")
    for word, axis in _AXIS_TOKENS.items():
        degree = getattr(layout, axis)
        if degree == FILL:
            raise unnamed
        if degree != 1:
            parts.append(f"{word}{degree}")
    return "_".join(parts) or "single"


def looks_like_layout(name: str) -> bool:
    """Whether `name` is meant as a layout's name, right or wrong: its first word resembles one of the grammar's."""
    word = re.match(r"[a-z]*", name.lower())
    first = word.group() if word else ""
    words = (*_DATA_TOKENS, *_AXIS_TOKENS, "single")
    rest = name[len(first) :]
    return first in words or bool(rest[:1].isdigit() and nearest(first, words))


def _split(name: str, token: str) -> tuple[str, str]:
    match = _TOKEN.fullmatch(token)
    words = (*_DATA_TOKENS, *_AXIS_TOKENS)
    if match is None or match["word"] not in words:
        spoken = _TOKEN.match(token.lower())
        near = nearest(spoken["word"] if spoken else token, words)
        if near and spoken and re.match(NAME_PATTERN, near + spoken["degrees"]):
            near += spoken["degrees"]
        hint = f" (did you mean {near}?)" if near else ""
        part = f"part {token!r}" if token != name else "it"
        raise LayoutNameError(f"layout {name!r}: {part} is not of the grammar{hint}; write {GRAMMAR}")
    return match["word"], match["degrees"]


def _degree(name: str, token: str, text: str) -> int:
    if not _DEGREE.fullmatch(text):
        raise LayoutNameError(f"layout {name!r}: {text!r} in {token!r} is not a degree; write a whole number from 1 up")
    if len(text) > len(str(MOST_RANKS)) or int(text) > MOST_RANKS:
        raise LayoutNameError(
            f"layout {name!r}: {token[:20]!r} is more than {MOST_RANKS} ranks; write a smaller degree"
        )
    return int(text)
