"""Ranks that somebody else started: torchrun, srun; under our `main` and under plain `@hydra.main`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from danling_conf.records.state import state_of
from danling_conf.records.status import Status
from tests.support.commands import APP, PLAIN_APP, Ranks, attempts, run, runs, started, torchrun, wait_for


def settings(root: Path, do: str, *more: str) -> list[str]:
    return ["steps=3", f"workspace_root={root}", f"data.ranks={root}", f"data.do={do}", *more]


@pytest.mark.slow
def test_under_torchrun(tmp_path: Path) -> None:
    done = run([*torchrun(str(APP)), *settings(tmp_path, "train", "parallel=fsdp")], cwd=tmp_path)
    assert done.code == 0, done.text
    facts = Ranks(tmp_path).facts()
    assert [fact["launcher"] for fact in facts.values()] == ["torchrun", "torchrun"]
    assert facts[0]["stack"] == "parallel"
    assert facts[0]["attempt"] == facts[1]["attempt"]
    (directory,) = runs(tmp_path)
    (attempt,) = attempts(directory)
    assert {"rank-0.log", "rank-1.log", "config.yaml", "result.json"} <= {item.name for item in attempt.iterdir()}
    assert json.loads((attempt / "frozen.json").read_text())["config"]["parallel"]["axes"]["shard"] == 2
    assert done.run == directory
    (line,) = [line for line in done.out.splitlines() if line.startswith("to resume: ")]
    assert line.startswith(f"to resume: torchrun --nproc-per-node 2 {APP} ")
    assert line.endswith(f" steps=6 resume={directory.relative_to(tmp_path)}")


@pytest.mark.slow
def test_a_failing_rank_under_torchrun_stops_the_others(tmp_path: Path) -> None:
    done = run([*torchrun(str(APP)), *settings(tmp_path, "fail in a collective", "parallel=ddp2")], cwd=tmp_path)
    assert done.code == 1
    assert "KeyError: 'this rank is broken'" in done.err


@pytest.mark.slow
def test_a_refusal_under_torchrun_is_said_once(tmp_path: Path) -> None:
    done = run([*torchrun(str(APP)), *settings(tmp_path, "train", "parallel=ddp3", "stepz=3")], cwd=tmp_path)
    assert done.code != 0
    assert done.err.count("configuration refused: 2 faults") == 1
    assert "did you mean steps?" in done.err
    assert "replicate 3 needs 3 processes, but torchrun started 2" in done.err
    assert "exitcode  : 2" in done.err
    assert 'app.py", line' not in done.err
    assert runs(tmp_path) == []


def srun(rank: int, ranks: int, step: str) -> dict[str, str]:
    """What srun puts into the environment of a task."""
    return {
        "SLURM_JOB_ID": "4242",
        "SLURM_STEP_ID": step,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": str(ranks),
        "SLURM_STEP_TASKS_PER_NODE": str(ranks),
        "SLURM_NTASKS": str(ranks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "code"), [("parallel=ddp", 0), ("parallel=ddp3", 2)])
def test_tasks_of_srun_join(tmp_path: Path, layout: str, code: int) -> None:
    command = [APP, *settings(tmp_path, "sum", layout)]
    step = str(abs(hash(str(tmp_path))))  # a port of its own
    with (
        started(command, cwd=tmp_path, env=srun(0, 2, step)) as first,
        started(command, cwd=tmp_path, env=srun(1, 2, step)) as second,
    ):
        outputs = [process.communicate(timeout=90) for process in (first, second)]
    assert [first.returncode, second.returncode] == [code, code], outputs
    if code == 0:
        facts = Ranks(tmp_path).facts()
        assert [fact["total"] for fact in facts.values()] == [3.0, 3.0]
        assert [fact["launcher"] for fact in facts.values()] == ["srun", "srun"]
        assert len(runs(tmp_path)) == 1
    else:
        assert "replicate 3 needs 3 processes, but srun started 2" in outputs[0][1]
        assert outputs[1] == ("", "")  # rank 0 says it for all


def test_variables_of_a_job_without_a_step_are_no_rank(tmp_path: Path) -> None:
    """A shell inside an allocation has the job's variables."""
    job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}
    done = run([APP, *settings(tmp_path, "nothing")], cwd=tmp_path, env=job)
    assert done.code == 0, done.text
    assert Ranks(tmp_path).facts()[0]["launcher"] == "none"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK=abc"),
        ({"RANK": "5", "WORLD_SIZE": "2"}, "rank 5 of 2"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_LOCALID"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(
    tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    done = run([APP, *settings(tmp_path, "nothing")], cwd=tmp_path, env=variables)
    assert done.code == 2, done.text
    assert message in done.err
    assert "fix: " in done.err
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_plain_hydra_main_under_torchrun(tmp_path: Path) -> None:
    """The ranks claim one run directory; Hydra keeps its own."""
    done = run([*torchrun(str(PLAIN_APP)), "steps=2", f"workspace_root={tmp_path}/ws", "parallel=ddp"], cwd=tmp_path)
    assert done.code == 0, done.text
    (directory,) = runs(tmp_path / "ws")
    (attempt,) = attempts(directory)
    assert {"rank-0.log", "rank-1.log", "frozen.json", "environment.json"} <= {item.name for item in attempt.iterdir()}
    assert done.out.splitlines()[-1].startswith("step=2 ")
    assert len([line for line in done.out.splitlines() if line.startswith("step=")]) == 1
    assert (directory / "checkpoints" / "latest" / "rank-1.pt").is_file()
    assert (tmp_path / "outputs").is_dir()


@pytest.mark.slow
def test_ranks_of_plain_hydra_main_that_disagree_stop_with_the_keys(tmp_path: Path) -> None:
    command = [*torchrun(str(PLAIN_APP)), "steps=2", f"workspace_root={tmp_path}/ws", "parallel=ddp"]
    done = run(command, cwd=tmp_path, env={"OTHER_LR": "0.5"})
    assert done.code != 0
    assert "optim.lr=0.5" in done.err
    assert "rank 1 has this, and rank 0 has 0.001" in done.err
    assert runs(tmp_path) == []


@pytest.mark.slow
def test_hydra_answers_on_every_rank(tmp_path: Path) -> None:
    given = settings(tmp_path, "nothing", "parallel=ddp2", "hydra.job.name=mine", "hydra.job.chdir=true")
    done = run([*torchrun(str(APP)), *given], cwd=tmp_path)
    assert done.code == 0, done.text
    facts = Ranks(tmp_path).facts()
    assert [(fact["job"], fact["cwd"]) for fact in facts.values()] == [("mine", facts[0]["attempt"])] * 2


@pytest.mark.slow
@pytest.mark.parametrize("told", ["torchrun", "a rank"])
def test_ranks_of_torchrun_that_are_stopped_before_they_train_are_interrupted(tmp_path: Path, told: str) -> None:
    """No runner listens for signals yet, and nobody but the first rank could say how the run ended."""
    script = tmp_path / "train.py"
    script.write_text(
        "import os, pathlib, time\n"
        "import danling_conf\n"
        "@danling_conf.main()\n"
        "def app(config):\n"
        "    pathlib.Path('rank-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "app()\n"
    )
    words = [*torchrun(str(script)), "parallel=ddp2", "steps=3", f"workspace_root={tmp_path / 'runs'}"]
    with started([*words], cwd=tmp_path) as process:
        pids = wait_for(lambda: _numbers(tmp_path), "two ranks")
        os.kill(process.pid if told == "torchrun" else pids[1], signal.SIGTERM)
        process.communicate(timeout=60)
    (run_directory,) = runs(tmp_path)
    state = state_of(run_directory)
    assert (state.status, state.error) == (Status.INTERRUPTED, "stopped by SIGTERM")


def _numbers(folder: Path) -> list[int] | None:
    found = [path.read_text() for path in sorted(folder.glob("rank-?"))]
    return [int(text) for text in found] if len(found) == 2 and all(found) else None
