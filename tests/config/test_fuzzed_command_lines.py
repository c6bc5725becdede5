"""Command lines that nobody would type: generated from the schema, mutated, and composed.

A command line is accepted or refused; a fault names its path; what is accepted has the values that were written. Any
other exception is a stack trace on somebody's terminal.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from danling_conf.cli.main import main
from danling_conf.config.check import check, compose_or_refuse
from danling_conf.config.hydra_adapter import Composer, ConfigSearch, composer
from danling_conf.groups.layout_names import EXAMPLES
from danling_conf.groups.presets import GROUPS
from danling_conf.schema import RunnerConfig, facts_of
from danling_conf.sweep.preflight import Preflight
from danling_conf.topology.violation import ConfigRefused
from tests.support.command_line import write_app
from tests.support.settings import given as value_at
from tests.support.settings import settings as declared

pytestmark = pytest.mark.slow

LINES, JOBS, COMMANDS = 120, 370, 20
SETTINGS = dict(declared())
DERIVED = ("stack", "parallel.axes.")
"""Settings whose value may be filled in by the check."""
PLAIN = string.ascii_letters + string.digits + " _-./:,=+#%&*!?<>|;@^~()[]"
"""Characters that Hydra takes as they are inside of quotes."""


@dataclass(frozen=True)
class Word:
    """An override, and what it sets where that is known."""

    text: str
    path: str | None = None
    value: Any = None


def quoted(text: str) -> str:
    return f"'{text}'"


@st.composite
def valid(draw: st.DrawFn) -> Word:
    """A value that its declaration allows."""
    path = draw(st.sampled_from(sorted(SETTINGS)))
    item = SETTINGS[path]
    facts, kind = facts_of(item), str(item.type)
    least = facts.at_least if facts.at_least is not None else -3
    if facts.choices is not None:
        written = draw(st.sampled_from([*facts.choices, *(facts.aliases or {})]))
        return Word(f"{path}={written}", path, (facts.aliases or {}).get(written, written))
    if "Dict" in kind or "List" in kind or facts.kinds or facts.shape or "Any" in kind or "Union" in kind:
        return Word(f"{path}=null")
    if "bool" in kind:
        flag = draw(st.booleans())
        return Word(f"{path}={str(flag).lower()}", path, flag)
    if "int" in kind:
        most = 2**63 - 1 if facts.at_most is None else int(facts.at_most)
        number = draw(st.integers(int(least), min(most, max(9, int(least)))) | st.integers(int(least), most))
        return Word(f"{path}={number}", path, number)
    if "float" in kind:
        most = 1e6 if facts.at_most is None else float(facts.at_most)
        real = draw(st.floats(max(0.0, float(least)), most, exclude_min=facts.above is not None, allow_subnormal=False))
        return Word(f"{path}={real!r}", path, real)
    text = draw(st.text(PLAIN, max_size=12))
    return Word(f"{path}={quoted(text)}", path, text)


HOSTILE = st.one_of(
    st.text(max_size=12),
    st.text("[]{}(),:'\"\\$=~+ \n\t", max_size=16),
    st.sampled_from([
        "", "null", "???", "1e400", "-1", "nan", "inf", "1e3", "0x10", "1_000", "${steps}", "${nope}", "${data}",
        "${.}", "${oc.env:NOPE}", "${oc.env:HOME}", "${hydra:job.name}", "${now:%s}", "[1,2]",
        "{a:1}", "{a:{b:[1,{c:2}]}}",
        "1,2", "range(3)", "range(0,1e9)", "glob(*)", "choice(1)", "sort(1,2)", "int(3)", "str(3)", "'a\nb'", "\x1b[2J",
        "\udcff", "\u202e", "9" * 400, "a" * 5000, "[" * 60 + "]" * 60, "os.system", "on", "off", "no", "~",
        "../..", "/",
    ]),
)  # fmt: skip
HYDRA = tuple(
    f"hydra{rest}"
    for rest in [
        "", ".launcher", "/launcher", ".launcher._target_", ".sweeper", "/sweeper", ".job", ".job.name", ".job.chdir",
        ".job.env_set", ".run.dir", ".sweep.dir", ".output_subdir", ".mode", ".verbose", ".searchpath", ".callbacks",
        ".runtime", "/job_logging", ".help",
    ]
)  # fmt: skip


@st.composite
def hostile(draw: st.DrawFn) -> Word:
    """A path that may be misspelled, and a value that may be anything."""
    path = draw(st.sampled_from([*sorted(SETTINGS), *GROUPS, "parallel", *HYDRA]))
    match draw(st.integers(0, 5)):
        case 0:
            path = path.upper()
        case 1:
            cut = draw(st.integers(0, len(path)))
            path = path[:cut] + draw(st.text(max_size=3)) + path[cut + 1 :]
        case 2:
            path = f"{path}.{draw(st.text(string.ascii_letters + '._-@:/', max_size=8))}"
        case _:
            pass
    sign = draw(st.sampled_from(["", "", "", "+", "++", "~"]))
    equals = draw(st.sampled_from(["=", "=", "=", "=", "", "==", "@x="]))
    return Word(f"{sign}{path}{equals}{draw(HOSTILE)}")


NAMED = st.one_of(
    st.sampled_from([Word(f"{group}={name}") for group, presets in GROUPS.items() for name in presets]),
    st.sampled_from([Word(f"parallel={name}") for name in EXAMPLES]),
    st.text(string.ascii_letters + string.digits + "_x", max_size=16).map(lambda name: Word(f"parallel={name}")),
)
WORDS = st.lists(st.one_of(valid(), valid(), NAMED, hostile()), max_size=4)
FUZZ = settings(
    max_examples=LINES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # four words need no shrinking, which takes minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def composing() -> Iterator[Composer]:
    with composer(ConfigSearch(config_name="danling")) as found:
        yield found


@pytest.fixture(scope="module")
def jobs(composing: Composer) -> Preflight:
    return Preflight(composing, composing.compose([], multirun=True), machine=None, capacity=None)


@FUZZ
@given(words=WORDS, budget=st.sampled_from(["steps=5", "steps=5", "epochs=2", ""]))
@example(words=[Word("++data.x=${data.x}")], budget="steps=5")
@example(words=[Word("++data." + "k" * 5000 + "=1")], budget="steps=5")
def test_accepted_as_written_or_refused_by_name(composing: Composer, words: list[Word], budget: str) -> None:
    line = [*filter(None, [budget]), *(word.text for word in words)]
    _examine(words, line, _outcome(lambda: check(composing, compose_or_refuse(composing, line), line)))


@settings(FUZZ, max_examples=JOBS)
@given(words=WORDS)
@example(words=[Word("~comm@x=" + "a" * 5000)])
def test_so_is_a_job_of_a_sweep(composing: Composer, jobs: Preflight, words: list[Word]) -> None:
    line = ["steps=5", *(word.text for word in words)]
    _examine(words, line, _outcome(lambda: jobs.check(line, 0).config))


def _examine(words: list[Word], line: list[str], found: RunnerConfig | ConfigRefused) -> None:
    if isinstance(found, ConfigRefused):
        assert found.violations
        assert all(item.path and item.rule and item.fix for item in found.violations), line
        assert all(mark.isprintable() or mark in "\n\t" for mark in found.report()), line
        return
    for index, word in enumerate(words):
        if word.path is None or word.path.startswith(DERIVED):
            continue
        behind = [other.text.lstrip("+~") for other in words[index + 1 :]]
        if any(text.startswith(word.path.partition(".")[0]) for text in behind):
            continue
        value = value_at(found, word.path)
        same = math.isclose(value, word.value) if isinstance(word.value, float) else value == word.value
        assert same, f"{word.text} composed to {value!r}"


def _outcome(compose: Callable[[], RunnerConfig]) -> RunnerConfig | ConfigRefused:
    try:
        return compose()
    except ConfigRefused as refusal:
        return refusal


@settings(FUZZ, max_examples=COMMANDS)
@given(words=WORDS, multirun=st.booleans())
def test_the_command_exits_with_0_or_2(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], words: list[Word], multirun: bool
) -> None:
    app = _app(tmp_path_factory)
    # argparse takes what begins with a hyphen for itself.
    line = [word.text for word in words if not word.text.startswith("-")]
    code = main(["check", str(app), *line, *(["-m"] if multirun else []), "steps=5"])
    shown = capsys.readouterr()
    assert code in (0, 2)
    assert "Traceback" not in shown.err
    assert shown.out.startswith("accepted: ") if code == 0 else "refused: " in shown.err


_apps: list[Path] = []


def _app(factory: pytest.TempPathFactory) -> Path:
    if not _apps:
        _apps.append(write_app(factory.mktemp("fuzzed")))
    return _apps[0]
