"""Compile artifacts of whole runs: the compiler is called by the first one, and by no rank of the second."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import PLAIN_APP, REPOSITORY, environment, torchrun

pytestmark = pytest.mark.slow

NOBODY = 65534


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can read: pytest's own ones are private."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def counting_compiler(folder: Path) -> Path:
    """A C++ compiler that writes down each of its calls in `$COMPILED`. Its path is part of what a kernel is known
    by, as that of the machine's own is."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    path = folder / "g++"
    path.write_text(f'#!/bin/sh\necho "$@" >> $COMPILED\nexec {compiler} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return path


def train(home: Path, kept: Path) -> tuple[str, int]:
    """Train on two ranks with a home of one's own; returns what was printed and how often something was compiled."""
    home.mkdir()
    log = home / "compiled"
    log.touch()
    variables = environment({
        "HOME": str(home), "TMPDIR": str(home), "USER": home.name, "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1", "CXX": str(counting_compiler(home.parent)), "COMPILED": str(log),
    })  # fmt: skip
    for name in ("TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        variables.pop(name, None)
    done = subprocess.run(
        [*torchrun(str(PLAIN_APP)), "parallel=ddp2", "steps=3", "seed=1", "compile=default", "checkpoint=none",
         "dataloader.batch_size=4", f"compile.precompile_artifact_dir={kept}", f"workspace_root={home}/runs"],
        env=variables, cwd=home, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    # Asking the compiler for its version compiles nothing.
    calls = [line for line in log.read_text().splitlines() if ".cpp" in line or " -c " in line]
    return done.stdout + done.stderr, len(calls)


def test_a_second_job_compiles_nothing(open_folder: Path) -> None:
    """From another path and with another home; where this user may do so, of files that belong to somebody else."""
    _, first = train(open_folder / "first", open_folder / "kept")
    assert first > 0
    shutil.rmtree(open_folder / "first")
    (open_folder / "kept").rename(open_folder / "moved")
    (artifact,) = (open_folder / "moved").iterdir()
    content = artifact.read_bytes()

    if os.geteuid() == 0:
        for path in (artifact, artifact.parent):
            os.chown(path, NOBODY, NOBODY)

    text, second = train(open_folder / "second", open_folder / "moved")
    assert second == 0, text
    assert "artifact" not in text
    assert artifact.read_bytes() == content
