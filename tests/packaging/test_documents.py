"""What the documents name exists, and their tables are the code's."""

from __future__ import annotations

import importlib.util
import re
import signal
from pathlib import Path

import pytest

import danling_conf
from danling_conf.records.status import EXIT_FAILED, EXIT_REFUSED, Status, exit_code_of_signal
from tests.support.documents import DOCUMENTS, GENERATED, REPOSITORY

TOPS = "danling_conf|hydra_plugins|examples|conf|tests|benchmarks|constraints|docs"
OF_A_USER = {"conf/after.yaml", "conf/experiment", "conf/optim", "conf/optim/split.yaml", "conf/parallel/mine.yaml",
             "conf/profile/slurm.yaml"}  # fmt: skip
"""Paths that a user would make."""


def text(name: str) -> str:
    return (REPOSITORY / name).read_text()


def rows(document: str, heading: str) -> dict[str, str]:
    """The rows of the table below a heading: the first cell without its backquotes, and the second."""
    section = text(document).split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", section, re.MULTILINE))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_paths_exist(name):
    found = set(re.findall(rf"(?<![\w/.-])((?:{TOPS}|\.ci)/[\w./-]*\w)", text(name))) - OF_A_USER
    assert [path for path in sorted(found) if not (REPOSITORY / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    folder = (REPOSITORY / name).parent
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text(name)) if "://" not in link}
    assert [link for link in sorted(links - GENERATED) if not (folder / link).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_dotted_names_are_ours(name):
    for dotted in set(re.findall(r"\bdanling_conf\.(\w+)\b(?!/)", text(name))) - {"py"}:
        exported = dotted in danling_conf.__all__
        assert exported or importlib.util.find_spec(f"danling_conf.{dotted}") is not None, dotted


def test_every_room_is_described():
    package = Path(danling_conf.__file__).parent
    rooms = {f"danling_conf/{path.name}" for path in package.iterdir() if (path / "__init__.py").is_file()}
    assert rows("docs/architecture.md", "The rooms").keys() == rooms


def test_status_words_are_the_codes_own():
    assert list(rows("docs/status.md", "Status words")) == [str(status) for status in Status]


def test_exit_codes_are_the_codes_own():
    documented = rows("docs/status.md", "Exit codes")
    assert list(documented) == ["0", str(EXIT_FAILED), str(EXIT_REFUSED), f"{exit_code_of_signal(0)} + n"]
    named = re.findall(r"(\d+) (?:by|and \d+ by) (SIG\w+)", documented["128 + n"])
    assert named
    for code, name in named:
        assert exit_code_of_signal(getattr(signal, name)) == int(code)


def test_the_version_is_one():
    """In the package, in its metadata's source, in the changelog and in the name of the wheel of the quickstart."""
    version = danling_conf.__version__
    assert f'\nversion = "{version}"\n' in text("pyproject.toml")
    assert re.search(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", text("CHANGELOG.md"), re.MULTILINE)[1] == version
    assert f"dist/danling_conf-{version}-py3-none-any.whl" in text("docs/quickstart.md")


def test_the_readme_is_short():
    """What needs more than a screen is a guide."""
    assert len(text("README.md").splitlines()) <= 150
