"""Text of others on one's own terminal: nothing that a terminal would obey, and commands that a shell reads right."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from danling_conf.cli.main import main
from danling_conf.schema.printable import override, printable, printable_lines, printable_output, shell_line
from danling_conf.topology.violation import ConfigRefused, Violation
from tests.support.records import write_sweep_of

HOSTILE = "gone\x1b[2J\r\x07 \u202etxt\udcff"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcödé", "plain ünïcödé"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202eexe.txt", r"\u202eexe.txt"),
        ("\udcff\x00\x9b", r"\udcff\x00\x9b"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable_lines(f"{text}\n").endswith("\n")
    assert printable(printable(text)) == shown


def test_output_keeps_colours_and_progress_bars() -> None:
    assert printable_output("\x1b[1;31mred\x1b[0m\r50 %\n\x1b[2J\x1b]0;title\x07") == (
        "\x1b[1;31mred\x1b[0m\r50 %\n\\x1b[2J\\x1b]0;title\\x07"
    )


def test_a_refusal_cannot_move_the_cursor() -> None:
    report = ConfigRefused([Violation(f"a{HOSTILE}", HOSTILE, HOSTILE, HOSTILE)]).report()
    assert report.replace("\n", "").isprintable()
    assert report.count("\n") == 3


@pytest.mark.parametrize("words", ["a b", "it's", "$(rm -rf .)", "--flag", ""])
def test_a_line_to_paste_is_read_as_it_was_meant(words: str) -> None:
    assert shlex.split(shell_line("danling-conf", "runs", Path("x y") / "z", words)) == [
        "danling-conf", "runs", "x y/z", words,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["a b'$(x)/w", 'w s"x', "x\\", 'x\\"y', "366eeecc842f", "12e456789012", "1234", "null", "a,b=[", "~/é", ""]
)
def test_an_override_to_paste_is_read_as_it_was_meant(text: str) -> None:
    (word,) = shlex.split(shell_line(override("resume", text)))
    value = OverridesParser.create().parse_override(word).value()
    assert (value, isinstance(value, str)) == (text, True)


@pytest.mark.parametrize("flags", [("runs",), ("watch", "--once"), ("checkpoints",), ("cancel",), ("resume",)])
def test_records_of_others_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    text = HOSTILE.replace("\udcff", "")
    failed = {"status": "failed", "score": None, "error": text}
    sweep = write_sweep_of(tmp_path / "my runs", failed, failed)
    sweep.ledger.add("0" * 12, overrides=["steps=10", f"data.name={text}"], host=text)
    name, *rest = flags
    assert main([name, str(sweep.path), *rest]) in (0, 1, 2)
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()
    if name == "runs":
        assert r"gone\x1b[2J\r\x07" in out
        command = next(line for line in out.splitlines() if line.startswith("to resume: "))
        assert shlex.split(command.removeprefix("to resume: "))[-1] == str(sweep.path)
