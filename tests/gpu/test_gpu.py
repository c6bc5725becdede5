"""The GPU script: its parts on a GPU where there is one, and the script itself on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.process import FAILED, NOT_RUN, PARTS, PASSED, Part, in_process
from tests.support.commands import REPOSITORY

pytestmark = pytest.mark.slow


def test_the_script_runs_on_the_cpu(tmp_path: Path) -> None:
    """Every part that needs no CUDA passes with tiny sizes: the script is whole on the day that there is a GPU."""
    command = [sys.executable, "-m", "tests.gpu", "--device", "cpu", "--size", "tiny", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--limit", "900"], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1000, check=False,
    )  # fmt: skip
    results = {item["part"]: item for item in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())}
    assert list(results) == [part.name for part in PARTS]
    failed = {name: item for name, item in results.items() if item["outcome"] == FAILED}
    assert not failed
    assert done.returncode == 0, done.stderr
    for name, item in results.items():
        assert item["outcome"] == PASSED or item["why"].startswith("needs "), name
        assert name in done.stdout


def test_a_part_is_killed_at_its_limit_and_says_so(tmp_path: Path) -> None:
    (part,) = (part for part in PARTS if part.name == "main")
    outcome, figures = in_process(part, "cpu", True, tmp_path / "main.txt", 0.2)
    assert outcome == FAILED
    assert "took longer" in figures["why"]


def test_without_a_device_nothing_is_counted_as_passed(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_on_a_gpu(part: Part, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("not run: this machine has no CUDA device")
    outcome, figures = in_process(part, "cuda", False, tmp_path / "output.txt", part.seconds)
    if outcome == NOT_RUN:
        pytest.skip(f"not run: {figures['why']}")
    assert outcome == PASSED, figures
