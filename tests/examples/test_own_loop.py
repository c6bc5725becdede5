"""The hand-written loop that the README points to: it runs as it says, and gives the same in one process and in two."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "own_loop.py"
LINE = re.compile(r"^step=(\d+) lr=([0-9.e+-]+) val\.accuracy=([0-9.]+)$", re.MULTILINE)

Lines = list[tuple[int, float, float]]


def run(root: Path, *arguments: str, processes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the example from another folder than its own; by torchrun where `processes` says so."""
    torchrun = [] if processes is None else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *torchrun, str(SCRIPT), f"workspace_root={root / 'runs'}", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)


def lines_of(done: subprocess.CompletedProcess[str]) -> Lines:
    """Step, learning rate and accuracy of every line printed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [(int(step), float(rate), float(accuracy)) for step, rate, accuracy in LINE.findall(done.stdout)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Lines:
    return lines_of(run(tmp_path_factory.mktemp("alone")))


@pytest.mark.slow
def test_alone_it_learns_the_digits(alone: Lines) -> None:
    assert [step for step, _, _ in alone] == [44, 88, 132, 176, 220]
    assert alone[0][2] > 0.5
    assert alone[-1][2] > 0.9


@pytest.mark.slow
def test_under_torchrun_it_is_the_same_training_on_the_same_global_batch(alone: Lines, tmp_path: Path) -> None:
    """One process prints, and a sample more or less right (of 360) is all that summation order may change."""
    found = lines_of(run(tmp_path, "parallel=fsdp", "dataloader.batch_size=16", processes=2))
    assert [line[:2] for line in found] == [line[:2] for line in alone]
    assert [line[2] for line in found] == pytest.approx([line[2] for line in alone], abs=1.5 / 360)


@pytest.mark.slow
def test_the_command_starts_its_own_workers_too(alone: Lines, tmp_path: Path) -> None:
    found = lines_of(run(tmp_path, "parallel=ddp2", "dataloader.batch_size=16", "epochs=1"))
    assert [step for step, _, _ in found] == [44]
    assert found[0][2] == pytest.approx(alone[0][2], abs=1.5 / 360)


@pytest.mark.slow
def test_budget_schedule_clipping_precision_and_compile_come_from_the_command_line(tmp_path: Path) -> None:
    """Fifty steps: a whole epoch of 44 and a part of one, with a linear schedule that is used up at the end."""
    settings = ["steps=50", "epochs=null", "scheduler=linear", "max_grad_norm=1.0", "precision=bf16"]
    found = lines_of(run(tmp_path, *settings, "compile=aot_eager"))
    assert [(step, rate) for step, rate, _ in found] == [(44, pytest.approx(1.2e-4)), (50, 0.0)]
    assert found[-1][2] > 0.4


@pytest.mark.slow
def test_a_schedule_by_metric_advances_once_an_epoch(tmp_path: Path) -> None:
    """With almost no learning rate the accuracy stays as it is, and patience is soon at its end."""
    settings = ["scheduler=plateau", "scheduler.patience=0", "optim=sgd", "optim.lr=1e-6", "epochs=3"]
    assert [rate for _, rate, _ in lines_of(run(tmp_path, *settings))] == pytest.approx([1e-6, 1e-7, 1e-8])


def test_a_second_budget_on_the_command_line_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "steps=30", "epochs=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert "steps=30" in done.stderr
    assert "add epochs=null" in done.stderr
    assert "Traceback" not in done.stderr


def test_it_uses_builders_and_no_runner() -> None:
    """What it shows: everything built by `danling_conf.builders`, in a file of a page."""
    source = SCRIPT.read_text()
    imported = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = {node.module for node in imported if isinstance(node, ast.ImportFrom)}
    names = {item.name for node in imported if getattr(node, "module", None) == "danling_conf" for item in node.names}
    assert "builders" in names
    assert not any(str(module).startswith(("danling_conf.runner", "danling_conf.launch")) for module in modules)
    assert "danling_conf.Runner(" not in source
    assert len(source.splitlines()) < 90
