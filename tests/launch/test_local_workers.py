"""Workers that a command starts itself: what the user sees of them, and that none outlives its run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import APP, Ranks, alive, all_gone, attempts, run, runs, started

pytestmark = pytest.mark.slow


def arguments(root: Path, do: str, *more: str) -> list[str | Path]:
    """A command line of two ranks that do something."""
    return [APP, "steps=3", f"workspace_root={root}", f"data.ranks={root}", f"data.do={do}", "parallel=ddp2", *more]


def result_of(root: Path) -> dict[str, Any]:
    (attempt,) = attempts(*runs(root))
    return json.loads((attempt / "result.json").read_text())


def test_ranks_train_and_tighten_their_time_limits(tmp_path: Path) -> None:
    limits = ["comm.init_timeout_seconds=77", "comm.train_timeout_seconds=33"]
    done = run(arguments(tmp_path, "train", *limits), cwd=tmp_path)
    assert done.code == 0, done.text
    facts = Ranks(tmp_path).facts()
    for rank in (0, 1):
        # Tighter once the first step is done; what waits for one rank that writes files keeps the limit of the start,
        # and what writes checkpoints, from the first of them on, has a day.
        assert facts[rank]["limits"] == [[[77], []], [[33], [77, 86400]], [[33], [77, 86400]]]
        assert facts[rank]["world_size"] == 2
        assert facts[rank]["stack"] == "ddp"
        assert facts[rank]["job"] == "rank_app"  # Hydra's own configuration is there on every rank
        assert facts[rank]["score"] == facts[0]["score"]
    assert facts[0]["losses"] != facts[1]["losses"]
    assert facts[0]["pid"] != facts[1]["pid"]
    assert result_of(tmp_path) == {
        "status": "completed",
        "score": facts[0]["score"],
        "error": None,
        "step": 3,
        "epoch": 0,
    }
    assert done.run == runs(tmp_path)[0]
    (line,) = [line for line in done.out.splitlines() if line.startswith("to resume: ")]
    assert line.startswith(f"to resume: python {APP} ")
    assert " parallel=ddp2 " in line


def test_rank_0_keeps_the_terminal_and_every_rank_has_a_log(tmp_path: Path) -> None:
    done = run(arguments(tmp_path, "sum"), cwd=tmp_path)
    assert done.code == 0, done.text
    assert done.out.splitlines() == ["rank 0 prints"]
    assert done.err.splitlines() == ["rank 0 complains"]
    assert [facts["total"] for facts in Ranks(tmp_path).facts().values()] == [3.0, 3.0]
    (attempt,) = attempts(*runs(tmp_path))
    assert (attempt / "rank-0.log").is_file()
    place, *said = (attempt / "rank-1.log").read_text().splitlines()
    assert "rank 1 of 2, local rank 1 of 2 on " in place
    assert "started by local workers; master 127.0.0.1:" in place
    assert said == ["rank 1 prints", "rank 1 complains"]
    assert not list(attempt.glob("error-*.json"))


def test_the_first_failing_rank_is_what_the_user_sees(tmp_path: Path) -> None:
    """Rank 0 would wait for ever in a collective for rank 1, which raises."""
    done = run(arguments(tmp_path, "fail in a collective"), cwd=tmp_path)
    assert done.code == 1
    assert "rank 1 failed: KeyError: 'this rank is broken'" in done.err
    assert "raise KeyError(" in done.err  # with the line that raised
    assert "elastic" not in done.text
    assert f"the other ranks were stopped; logs: {attempts(runs(tmp_path)[0])[0]}" in done.err
    assert all_gone({rank: facts["pid"] for rank, facts in Ranks(tmp_path).facts().items()})
    assert "this rank is broken" in (attempts(runs(tmp_path)[0])[0] / "rank-1.log").read_text()
    assert result_of(tmp_path)["status"] == "failed"
    assert "this rank is broken" in result_of(tmp_path)["error"]


def test_a_refusal_in_a_worker_is_one_without_a_trace(tmp_path: Path) -> None:
    """A pattern that matches no parameter: nobody can know before there is a model."""
    groups = "optim.param_groups=[{pattern: nowhere, lr_multiplier: 0.1}]"
    done = run(arguments(tmp_path, "train", groups), cwd=tmp_path)
    assert done.code == 2, done.text
    assert done.out == ""
    assert done.err.startswith("configuration refused: 1 fault\n  optim.param_groups[0]")
    assert "nowhere" in done.err
    assert "fix: " in done.err
    assert "Traceback" not in done.text
    assert done.err.count("refused") == 1
    assert result_of(tmp_path)["status"] == "refused"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_a_failure(tmp_path: Path, rank: int) -> None:
    with started(arguments(tmp_path, "wait in a collective"), cwd=tmp_path) as process:
        pids = Ranks(tmp_path).wait(2, process)
        os.kill(pids[rank], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"rank {rank} failed: ended by SIGKILL" in err
    assert "Traceback" not in out + err
    assert all_gone(pids)
    assert result_of(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_ends_all_ranks(tmp_path: Path, number: signal.Signals) -> None:
    with started(arguments(tmp_path, "wait in a collective"), cwd=tmp_path) as process:
        pids = Ranks(tmp_path).wait(2, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; the run so far: {runs(tmp_path)[0]}" in err
    assert "Traceback" not in out + err
    assert all_gone(pids)
    assert result_of(tmp_path)["status"] == "interrupted"


def test_ranks_end_with_a_command_that_is_killed(tmp_path: Path) -> None:
    with started(arguments(tmp_path, "wait in a collective"), cwd=tmp_path) as process:
        pids = Ranks(tmp_path).wait(2, process)
        assert all(map(alive, pids.values()))
        process.kill()
        process.communicate(timeout=60)
    assert all_gone(pids)
    # The run is not live any more.
    again = run([APP, "steps=3", f"workspace_root={tmp_path}", f"data.ranks={tmp_path}",
                 "data.do=wait in a collective", "parallel=ddp2", f"resume={runs(tmp_path)[0]}", "optim.lr=0.5"],
                cwd=tmp_path)  # fmt: skip
    assert again.code == 2
    assert "optim.lr=0.5" in again.err  # refused for that alone
    assert "live" not in again.err


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["hydra.output_subdir=null", "hydra.job.chdir=true"])
def test_workers_know_hydra_settings_wherever_it_writes(tmp_path: Path, setting: str) -> None:
    given = ["steps=3", "workspace_root=ws", f"data.ranks={tmp_path}", "parallel=ddp2", "hydra.job.name=mine", setting]
    done = run([APP, *given], cwd=tmp_path)
    assert done.code == 0, done.text
    facts = Ranks(tmp_path).facts()
    assert [fact["job"] for fact in facts.values()] == ["mine", "mine"]
    attempt = facts[0]["attempt"]
    cwd = attempt if "chdir" in setting else str(tmp_path)
    assert [fact["cwd"] for fact in facts.values()] == [cwd, cwd]


@pytest.mark.slow
@pytest.mark.parametrize(
    "left", [{"RANK": "0", "WORLD_SIZE": "1"}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}]
)
def test_a_shell_inside_an_allocation_can_start_workers(tmp_path: Path, left: dict[str, str]) -> None:
    done = run([APP, "steps=3", f"workspace_root={tmp_path}", f"data.ranks={tmp_path}", "data.do=sum", "parallel=ddp2"],
               cwd=tmp_path, env=left)  # fmt: skip
    assert done.code == 0, done.text
    assert [fact["total"] for fact in Ranks(tmp_path).facts().values()] == [3.0, 3.0]
