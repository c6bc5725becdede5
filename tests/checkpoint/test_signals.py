"""Signals to a real command: all ranks save at one step and leave with a code that says why; a second is at once."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from danling_conf.checkpoint import manifest
from tests.support.commands import REPOSITORY, Ranks, all_gone, attempts, run, runs, started, torchrun

pytestmark = pytest.mark.slow

APP = Path(__file__).with_name("signalled.py")
PATH = {"PYTHONPATH": str(REPOSITORY)}
STEPS = 100_000
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


def arguments(root: Path, layout: str, *more: str) -> list[Any]:
    return [
        APP,
        f"steps={STEPS}",
        "seed=1",
        "dataloader.batch_size=4",
        f"parallel={layout}",
        f"data.ranks={root}",
        *more,
    ]


def ended(process: Any) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def saved(root: Path) -> manifest.Manifest:
    (directory,) = runs(root)
    latest = directory / "checkpoints" / "latest"
    facts = manifest.read(latest)
    manifest.verify(latest, facts)
    return facts


@pytest.mark.parametrize("number", SIGNALS, ids=lambda item: item.name)
def test_one_process_saves_and_leaves(tmp_path: Path, number: signal.Signals) -> None:
    with started(arguments(tmp_path, "single"), cwd=tmp_path, env=PATH) as process:
        Ranks(tmp_path).wait(1, process)
        process.send_signal(number)
        code, text = ended(process)
    assert code == 128 + number
    facts = saved(tmp_path)
    assert 3 <= facts.step < STEPS
    assert f"stopped by {number.name}; saved at step {facts.step}" in text
    assert "Traceback" not in text
    (attempt,) = attempts(runs(tmp_path)[0])
    assert json.loads((attempt / "result.json").read_text())["status"] == "interrupted"


def test_what_it_says_goes_on_does(tmp_path: Path) -> None:
    with started(arguments(tmp_path, "single"), cwd=tmp_path, env=PATH) as process:
        Ranks(tmp_path).wait(1, process)
        process.send_signal(signal.SIGTERM)
        _, text = ended(process)
    facts = saved(tmp_path)
    (line,) = [line for line in text.splitlines() if line.startswith("to resume: ")]
    words = shlex.split(line.removeprefix("to resume: "))
    assert words[0] == "python"
    words = [word.replace(f"steps={STEPS}", f"steps={facts.step + 2}") for word in words[1:]]
    done = run([sys.executable, *words], cwd=tmp_path, env=PATH)
    assert done.code == 0, done.text
    assert f"resumed at step {facts.step} from " in done.out
    assert done.last["step"] == str(facts.step + 2)


@pytest.mark.parametrize(("to", "number"), [("command", signal.SIGUSR1), ("one rank", signal.SIGTERM)])
def test_ranks_save_at_the_same_step(tmp_path: Path, number: signal.Signals, to: str) -> None:
    more = ["dataloader.num_workers=1"] if to == "command" else []  # loader workers must not die of it
    with started(arguments(tmp_path, "fsdp2", *more), cwd=tmp_path, env=PATH) as process:
        pids = Ranks(tmp_path).wait(2, process)
        os.kill(process.pid if to == "command" else pids[1], number)
        code, text = ended(process)
    assert code == 128 + number, text
    assert "saved at step" in text, text
    facts = saved(tmp_path)
    assert (facts.layout, facts.backend) == ("fsdp2", "dcp")
    assert f"saved at step {facts.step}" in text
    assert "Traceback" not in text
    assert all_gone(pids)
    (attempt,) = attempts(runs(tmp_path)[0])
    assert json.loads((attempt / "result.json").read_text())["status"] == "interrupted"


def test_under_torchrun(tmp_path: Path) -> None:
    command = torchrun(*map(str, arguments(tmp_path, "fsdp2")), ranks=2)
    with started(command, cwd=tmp_path, env=PATH) as process:
        pids = Ranks(tmp_path).wait(2, process)
        process.send_signal(signal.SIGTERM)
        code, text = ended(process)
    assert code != 0
    assert f"stopped by SIGTERM; saved at step {saved(tmp_path).step}" in text
    assert all_gone(pids)


@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_a_second_signal_leaves_at_once(tmp_path: Path, layout: str) -> None:
    """While a rank does not come to the end of its step."""
    ranks = 1 if layout == "single" else 2
    with started(arguments(tmp_path, layout, "data.hang=true"), cwd=tmp_path, env=PATH) as process:
        pids = Ranks(tmp_path).wait(ranks, process)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(Exception, match="timed out"):
            process.communicate(timeout=2)
        process.send_signal(signal.SIGTERM)
        code, _ = ended(process)
    assert code == 128 + signal.SIGTERM
    assert all_gone(pids)


def test_without_checkpoints_it_only_leaves(tmp_path: Path) -> None:
    with started(arguments(tmp_path, "single", "checkpoint=none"), cwd=tmp_path, env=PATH) as process:
        Ranks(tmp_path).wait(1, process)
        process.send_signal(signal.SIGTERM)
        code, text = ended(process)
    assert code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; nothing is saved" in text
    assert not (runs(tmp_path)[0] / "checkpoints").exists()
