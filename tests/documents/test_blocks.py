"""Every block of commands and of code in the documents works, or says why it is not run.

Commands of `danling-conf` are run. Commands that train are composed and checked: what they do when they train is tested
in `tests/examples/test_commands.py`; blocks marked with `run:` are trained here. `RUN` and `DIR` in the documents are
a run and a sweep that a project of `danling-conf init` has made. Outputs are compared, `...` stands for anything.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from danling_conf.cli.main import main
from tests.support.commands import REPOSITORY, Result, run
from tests.support.documents import DOCUMENTS, Block, blocks_of

pytestmark = pytest.mark.slow

LANGUAGES = {"bash", "console", "python", "yaml", "json", "text"}
OWN = ("data", "model", "train")
"""Modules of a project."""
SHORT = ["steps=2", "scheduler.warmup_steps=0", "val_fraction=0.01", "dataloader.batch_size=2", "heartbeat=fast"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project as `danling-conf init` writes it, that has run a sweep of two jobs."""
    folder = tmp_path_factory.mktemp("project")
    assert main(["init", str(folder), "--task", "lm"]) == 0
    done = run([folder / "train.py", "-m", "optim.lr=1e-3,3e-3", *SHORT], cwd=folder, limit=300)
    assert done.code == 0, done.text
    for name in ("examples", "conf"):
        shutil.copytree(REPOSITORY / name, folder / "repository" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def place(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project again, for the blocks of one document."""
    folder = tmp_path / "project"
    shutil.copytree(project, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget()


def forget() -> None:
    """Modules of the project may be others in the next block."""
    for name in OWN:
        sys.modules.pop(name, None)


class Document:
    """Runs the blocks of a document one after another."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys
        (sweep,) = folder.glob("experiments/lin/exp/sweeps/*")
        job = min(path.parent for path in folder.glob("experiments/lin/exp/*/run.json"))
        self.names = {"DIR": str(sweep.relative_to(folder)), "RUN": str(job.relative_to(folder))}
        self.namespace: dict[str, object] = dict(self.names)

    def follow(self, block: Block) -> None:
        if block.kind == "not run":
            assert len(block.mark) > 10, f"{block}: say why it is not run"
        elif block.kind == "file" or re.match(r"# \S+\.(py|yaml)\n", block.text):
            self.write(block.mark or block.text.split(maxsplit=2)[1], block)
        elif block.kind == "run":
            self.train(block)
        elif block.language == "bash":
            for line in commands(block.text):
                self.command(line, block)
        elif block.language == "console":
            self.console(block)
        elif block.language == "python":
            forget()
            exec(compile(block.text, str(block), "exec"), self.namespace)
        elif block.language in ("yaml", "json"):
            yaml.safe_load(block.text)

    def write(self, name: str, block: Block) -> None:
        """A file of the project. One of Python compiles, one of YAML is a mapping."""
        if name.endswith(".py"):
            compile(block.text, name, "exec")
        else:
            assert isinstance(yaml.safe_load(block.text), dict), block
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)

    def train(self, block: Block) -> None:
        """Train with a block of Python; or run what the mark names, whose last lines must agree."""
        if block.language == "python":
            (self.folder / "train.py").write_text(block.text)
        lasts = []
        for line in block.mark.split("; "):
            script, *arguments = shlex.split(line)
            if len(commands(block.text)) > 1:  # several processes
                lasts.append(run([self.folder / script, *arguments], cwd=self.folder, limit=300).last)
            else:
                lasts.append(self.trained(script, arguments))
        assert all(float(last["train.loss"]) > 0 for last in lasts)
        for key in ("step", "train.loss", "val.loss"):
            assert len({last[key] for last in lasts}) == 1, (key, lasts)

    def trained(self, script: str, arguments: list[str]) -> dict[str, str]:
        """The last line of one process, which is this one."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *arguments])
            self.capsys.readouterr()
            runpy.run_path(script, run_name="__main__")
        return Result(0, self.capsys.readouterr().out, "", self.folder).last

    def command(self, line: str, block: Block) -> None:
        """A command as typed, which does not fail."""
        words = self.words(line.partition(" > ")[0])
        where = f"{block}: {line}"
        if words[0] == "danling-conf":
            assert self.cli(words[1:]) == 0, f"{where}\n{self.capsys.readouterr().err}"
        elif words[0] == "torchrun" or (words[0] == "python" and words[1].endswith(".py")):
            script = next(index for index, word in enumerate(words) if word.endswith(".py"))
            assert self.cli(["check", *self.checkable(words[script:])]) == 0, f"{where}\n{self.capsys.readouterr().err}"
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE), where
        elif words[:2] == ["pip", "install"]:
            self.installable(words[2:], where)
        elif words[0] == "cd":
            assert words[1] == "mine", where  # the project that `init` has written
        elif words[:3] == ["python", "-m", "venv"]:
            assert words[3:] == [".venv", "&&", ".", ".venv/bin/activate"], where
        elif words[1:3] == ["-m", "pytest"]:
            assert all((REPOSITORY / word).exists() for word in words[3:]), where
        else:
            raise AssertionError(f"{where}: such a command is not known here; mark the block `not run: REASON`")

    def words(self, line: str) -> list[str]:
        """The words of a command, with the names of a run and a sweep in the place of RUN and DIR."""
        words = shlex.split(line, comments=True)
        return [re.sub(r"\b(RUN|DIR)\b", lambda found: self.names[found[1]], word) for word in words]

    def checkable(self, words: list[str]) -> list[str]:
        """A script and its overrides as `check` takes them on a machine without Slurm."""
        slurm = any("slurm" in word for word in words)
        return [*words, "--gpus-per-node", "8"] if slurm and "--gpus-per-node" not in words else words

    def installable(self, words: list[str], where: str) -> None:
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        for word in words:
            found = re.fullmatch(r"(?:danling-conf|\.)\[([\w,]+)\]", word)
            assert word == "." or found, where
            if found:
                assert set(found[1].split(",")) <= project["optional-dependencies"].keys(), where

    def cli(self, words: list[str]) -> int:
        """A command of ours in this process; scripts of the examples lie in the repository."""
        of_examples = any(word.startswith("examples/") for word in words)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder / "repository" if of_examples else self.folder)
            forget()
            try:
                return main(words)
            except SystemExit as ended:
                return int(ended.code or 0)
            finally:
                sys.modules.pop("models", None)
                sys.modules.pop("tasks", None)

    def console(self, block: Block) -> None:
        """Commands after `$`, each with its output."""
        for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
            line, _, output = part.partition("\n")
            words = self.words(line)
            self.capsys.readouterr()
            if words[0] == "danling-conf":
                self.cli(words[1:])
                shown = "".join(self.capsys.readouterr())
            else:
                shown = run([self.folder / words[1], *words[2:]], cwd=self.folder).text
            assert matches(shown, output), f"{block}: $ {line}\n{shown}"


def commands(text: str) -> list[str]:
    """The commands of a block; a line that ends in a backslash goes on."""
    return [line for line in text.replace("\\\n", "").splitlines() if line.strip() and not line.startswith("#")]


def matches(shown: str, expected: str) -> bool:
    """Whether an output is as documented, where `...` stands for anything."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("..."))
    return re.fullmatch(pattern, shown.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_work_or_say_why_they_are_not_run(
    document: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = Document(place, capsys)
    for block in blocks_of(document):
        assert block.language in LANGUAGES, f"{block}: name the language of the block"
        found.follow(block)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_command_hides_in_text(document: str) -> None:
    """Blocks of the kind `text` are outputs and listings, and indented blocks are not looked at."""
    for block in blocks_of(document):
        if block.language == "text":
            assert not re.search(r"^(\$ |python |danling-conf |torchrun |import |make )", block.text, re.MULTILINE), (
                block
            )
    outside = re.sub(r"^( *)```.*?^\1```$", "", (REPOSITORY / document).read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^ {4,}(\$ |python |danling-conf |torchrun |import |make )", outside, re.MULTILINE)


def test_what_is_compared() -> None:
    """Else an output that has changed would pass."""
    assert matches("a 1\nb\n", "a ...\nb\n")
    assert not matches("a 1\nc\n", "a ...\nb\n")
    assert commands("a \\\n  b\n\n# c\nd\n") == ["a   b", "d"]
