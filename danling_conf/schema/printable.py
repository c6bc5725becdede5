"""Text for terminals and shells: characters that a terminal would obey are escaped, words of commands are quoted.

Names, values and messages come from command lines, files and other people's runs. Printed as they are, a carriage
return hides a line, an escape sequence moves the cursor, and a right-to-left mark turns a path around.
"""

from __future__ import annotations

import re
import shlex

_PLAIN_VALUE = re.compile(r"[\w./@%+:-]+", re.ASCII)
_WORDS = ("null", "true", "false", "inf", "nan")
_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")


def printable(text: str, keep: str = "") -> str:
    """A text with everything that is not printable, line breaks included, as escapes: `\\n`, `\\x1b`, `\\u202e`.

    Args:
        keep: characters that stay, such as line breaks of a traceback.
    """
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() or mark in keep else mark.encode("unicode_escape").decode() for mark in text
    )


def printable_lines(text: str) -> str:
    """A text of several lines, which keeps its line breaks and tabs."""
    return printable(text, keep="\n\t")


def printable_output(text: str) -> str:
    """What a program printed: line breaks, carriage returns of progress bars, and colours stay."""
    if "\x1b" not in text:
        return printable(text, keep="\n\t\r")
    kept = [*_COLOUR.findall(text), ""]
    parts = [printable(part, keep="\n\t\r") for part in _COLOUR.split(text)]
    return "".join(part + colour for part, colour in zip(parts, kept, strict=True))


def unprintable(text: str, allowed: str = "") -> str:
    """The first character that is not printable, as an escape; "" where there is none."""
    return next((printable(mark) for mark in text if not mark.isprintable() and mark not in allowed), "")


def shell_line(*words: object) -> str:
    """A command to paste into a shell: every word is quoted where it needs to be."""
    return printable(shlex.join(str(word) for word in words))


def override(key: str, value: object) -> str:
    """`KEY=VALUE` of Hydra's command line, where a text of any content is that text; for a shell, see `shell_line`."""
    text = str(value)
    return f"{key}={text if _is_plain(text) else quoted(text)}"


def quoted(text: str) -> str:
    """A text in quotes of Hydra's command line."""
    # Backslashes are themselves, unless a quote follows them.
    return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), text) + '"'


def _is_plain(text: str) -> bool:
    """Whether Hydra reads a text without quotes as that text."""
    if not _PLAIN_VALUE.fullmatch(text) or text.lower() in _WORDS:
        return False
    try:
        float(text)  # the name of a run may be 12e456789012
    except ValueError:
        return True
    return False
