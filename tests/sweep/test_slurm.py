"""What is read from Slurm's commands and told to it, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from danling_conf import compose
from danling_conf.launch.slurm import queries, requeue
from danling_conf.launch.slurm.queries import JobState, SlurmUnavailable, own_job, partition, states
from danling_conf.launch.slurm.rank import compare_with_first, see_own_devices
from danling_conf.launch.slurm.requeue import ASKED, REQUEUED, TIME_LIMIT, Cause, cause_of, superseded
from danling_conf.records.frozen import frozen_job
from danling_conf.records.job_file import JobFile
from danling_conf.records.status import Status
from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.sweep.slurm_backend import own_environment, parameters_of
from danling_conf.topology.rank_environment import RankEnvironment
from danling_conf.topology.violation import ConfigRefused

END = "2026-01-01T12:00:00"


def answer(monkeypatch: pytest.MonkeyPatch, **outputs: str | Exception) -> list[tuple[str, ...]]:
    """Let Slurm's commands answer; gives the commands that were run."""
    asked: list[tuple[str, ...]] = []

    def run(*words: str) -> str:
        asked.append(words)
        output = outputs[words[0]]
        if isinstance(output, Exception):
            raise output
        return output

    monkeypatch.setattr(queries, "run", run)
    monkeypatch.setattr(queries.shutil, "which", lambda name: name if name in outputs else None)
    return asked


@pytest.mark.parametrize(
    ("gres", "count"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:a100:4(S:0-1)", 4), ("gpu:a100:2,gpu:h100:6,shard:16", 8), ("shard:4,gpu:2", 2),
     ("gpu:nvidia_a100_80gb:8(S:0,1)", 8)],
)  # fmt: skip
def test_gpus_of_a_node(monkeypatch: pytest.MonkeyPatch, gres: str, count: int) -> None:
    answer(monkeypatch, sinfo=f"n1|main|64|{gres}|infinite|yes||\n", scontrol="PartitionName=main MaxTime=UNLIMITED\n")
    assert partition("main").gpus_per_node == count


@pytest.mark.parametrize(
    ("limit", "minutes"), [("UNLIMITED", None), ("1-12:00:00", 2160), ("02:00:00", 120), ("30:00", 30)]
)
def test_limits_of_a_partition(monkeypatch: pytest.MonkeyPatch, limit: str, minutes: float | None) -> None:
    answer(
        monkeypatch,
        sinfo="n1|main|64|gpu:8|x|x|x|\nn2|main|32|gpu:8|x|x|x|\nn3|other|16|(null)|x|x|x|\n",
        scontrol=f"PartitionName=main Default=YES MaxNodes=1 MaxTime={limit}\n",
    )
    found = partition(None)
    assert (found.name, found.nodes, found.gpus_per_node, found.cpus_per_node) == ("main", 1, 8, 32)
    assert found.minutes == minutes


def test_a_partition_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, sinfo="n1|main|64|gpu:8|x|x|x|\nn1|debug|64|gpu:8|x|x|x|\n", scontrol="")
    with pytest.raises(LookupError, match="there is no partition mian; there are debug, main"):
        partition("mian")


def test_states_come_from_the_queue_and_then_from_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answer(
        monkeypatch,
        squeue="7_0|RUNNING|None\n7_1|PENDING|Resources\n9|CANCELLED|None\n",
        sacct="7_2|CANCELLED by 1000|0:15\n8|OUT_OF_MEMORY|0:125\n",
    )
    assert states(["7_0", "7_1", "7_2", "8"]) == {
        "7_0": JobState(state="RUNNING", reason="None"),
        "7_1": JobState(state="PENDING", reason="Resources"),
        "7_2": JobState(state="CANCELLED", exit_code="0:15"),
        "8": JobState(state="OUT_OF_MEMORY", exit_code="0:125"),
    }
    assert asked[1][:6] == ("sacct", "-n", "-P", "-X", "-j", "7_2,8")


def test_accounting_that_is_switched_off_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, squeue="", sacct=SlurmUnavailable("Slurm accounting storage is disabled"))
    assert states(["1"]) == {}


def test_a_task_of_an_array_is_told_from_the_others() -> None:
    environment = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert own_job(environment) == "12_3"
    assert own_job({"SLURM_JOB_ID": "12"}) == "12"


@pytest.mark.parametrize(
    ("shown", "why", "requeue"),
    [
        ({"JobState": "RUNNING", "PreemptTime": END}, Status.PREEMPTED, True),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": END}, TIME_LIMIT, True),
        ({"JobState": "RUNNING", "PreemptTime": "None", "EndTime": "2026-01-01T18:00:00"}, ASKED, True),
        ({"JobState": "RUNNING", "EndTime": "Unknown"}, ASKED, True),
        ({"JobState": "COMPLETING", "PreemptTime": END}, Status.PREEMPTED, False),
        ({"JobState": "COMPLETING", "Reason": "TimeLimit"}, Status.TIMED_OUT, False),
        ({"JobState": "TIMEOUT"}, Status.TIMED_OUT, False),
        ({"JobState": "COMPLETING", "Restarts": "3"}, REQUEUED, False),
        ({"JobState": "COMPLETING", "Restarts": "2"}, Status.CANCELLED, False),
        ({"JobState": "CANCELLED"}, Status.CANCELLED, False),
    ],
)
def test_why_a_job_was_told_to_stop(shown: dict[str, str], why: str, requeue: bool) -> None:
    end = queries.time_of(END)
    assert end is not None
    found = cause_of(shown, start=2, warning_seconds=120, now=end - 150)
    assert found == Cause(why=why, requeue=requeue)


def test_a_node_that_reads_another_file_stops(tmp_path: Path) -> None:
    """With the settings that differ, and which rank has which value."""
    mine, theirs = compose(["optim.lr=0.5", "steps=3"]), compose(["optim.lr=0.25", "steps=3"])
    read = JobFile(path=tmp_path / "job.json", content=frozen_job(mine, None))
    ranks = RankEnvironment(launcher="srun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    compare_with_first(JobFile(path=read.path, content=frozen_job(theirs, None)), theirs, ranks)
    with pytest.raises(ConfigRefused) as refused:
        compare_with_first(read, theirs, ranks)
    (fault,) = refused.value.violations
    assert (fault.path, fault.value) == ("optim.lr", 0.5)
    assert "rank 5 on " in fault.rule
    assert "rank 0 has 0.25" in fault.rule


def test_the_environment_of_an_allocation_is_not_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody may submit from inside a job: what that one is called must not name the other."""
    left = {"SLURM_CONF": "c", "SBATCH_ACCOUNT": "a", "CUDA_HOME": "h", "RANKING": "r"}
    names = ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_CPU_BIND", "MASTER_PORT", "RANK", "WORLD_SIZE",
             "LOCAL_RANK", "SUBMITIT_EXECUTOR", "DANLING_CONF_JOB")  # fmt: skip
    taken = dict.fromkeys(names, "1")
    for name, value in {**left, **taken}.items():
        monkeypatch.setenv(name, value)
    with own_environment():
        assert not taken.keys() & os.environ.keys()
        assert {name: os.environ[name] for name in left} == left
    assert {name: os.environ[name] for name in taken} == taken


@pytest.mark.parametrize(
    ("gpus", "launcher", "expected"),
    [(0, {}, ""), (4, {}, "2,3"), (2, {"gpus_per_task": 2}, "2"), (0, {"gres": "gpu:2"}, "2,3")],
)
def test_devices_that_a_rank_sees(
    monkeypatch: pytest.MonkeyPatch, gpus: int, launcher: dict[str, Any], expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    see_own_devices({"gpus_per_node": gpus}, {"gpus_per_task": None, "gres": None, **launcher})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_requeue_whose_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm is asked again; where the job is no longer running, or has been started again, it is queued."""
    shown = iter([{"JobState": "RUNNING", "Restarts": "1"}, {"JobState": "PENDING", "Restarts": "2"}])
    tries: list[tuple[str, ...]] = []

    def busy(*words: str) -> str:
        tries.append(words)
        raise SlurmUnavailable("scontrol: Socket timed out")

    monkeypatch.setattr(requeue, "run", busy)
    monkeypatch.setattr(requeue, "show", lambda name: next(shown))
    monkeypatch.setattr(requeue.time, "sleep", lambda seconds: None)
    requeue.insist(lambda: requeue.requeue("7", 1))
    assert tries == [("scontrol", "requeue", "7")] * 2


def job(shape: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    launcher = {**vars(SlurmLauncherConfig()), "name": "train", **settings}
    wide = {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 8, "signal_delay_s": 120}
    return {"launcher": launcher, "shape": {**wide, **(shape or {})}}


def test_what_submitit_is_told() -> None:
    assert parameters_of(job()) == {
        "job_name": "train",
        "time": 60,
        "nodes": 2,
        "ntasks_per_node": 4,
        "gpus_per_node": 4,
        "cpus_per_task": 8,
        "signal_delay_s": 120,
        "array_parallelism": 256,
        "additional_parameters": {"requeue": True},
        "srun_args": ["--kill-on-bad-exit=1", "--cpus-per-task=8"],
    }


def test_explicit_settings_take_the_place_of_what_they_say() -> None:
    told = parameters_of(job(gres="gpu:a100:4", cpus_per_gpu=12, mem_gb=1.5, srun_args=["--cpu-bind=none"],
                             additional_parameters={"requeue": False, "mail-type": "END"}))  # fmt: skip
    assert told["gres"] == "gpu:a100:4"
    assert "gpus_per_node" not in told
    assert "cpus_per_task" not in told
    assert told["mem"] == "1536MB"
    assert told["srun_args"] == ["--kill-on-bad-exit=1", "--cpu-bind=none"]
    assert told["additional_parameters"] == {"mail-type": "END"}  # what is false is not given
    assert parameters_of(job(additional_parameters={"no_requeue": True}))["additional_parameters"] == {
        "no-requeue": True
    }
    assert "exclusive" not in parameters_of(job(exclusive=False))


def test_every_setting_of_the_launcher_is_read() -> None:
    """Each makes a difference to what submitit is told, or is read elsewhere."""
    elsewhere = {"_target_", "on_failure", "skip_refused", "detach", "nodes", "tasks_per_node", "gpus_per_node",
                 "cpus_per_task", "signal_delay_s", "max_num_timeout"}  # fmt: skip
    for name in vars(SlurmLauncherConfig()):
        if name in elsewhere:
            continue
        value: Any = {"additional_parameters": {"x": 1}, "setup": ["true"], "srun_args": ["-v"], "exclusive": True}.get(
            name, 3
        )
        assert parameters_of(job(**{name: value})) != parameters_of(job()), name


def test_a_start_that_was_overtaken_has_no_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes may run on, on a node that Slurm has lost."""
    made = JobFile(path=tmp_path / "jobs" / "k" / "job.json", content={"key": "k"})
    made.ledger.add("k", job=0, status="queued", slurm="7")

    def say(start: int) -> bool:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
        return superseded(made)

    assert not say(0)  # it fails before it has said that it runs
    made.ledger.add("k", status="running", slurm="7", start=0)
    assert not say(0)
    assert not say(1)
    made.ledger.add("k", status="running", slurm="7", start=1)
    assert say(0)
    assert not say(1)
    made.ledger.add("k", status="running", slurm="9", start=0)  # submitted anew
    assert say(1)
