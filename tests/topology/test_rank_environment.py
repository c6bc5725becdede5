"""Which rank a process is: what torchrun, srun and nobody put in the environment, and contradictions."""

from __future__ import annotations

import pytest

from danling_conf.topology.machine import this_machine
from danling_conf.topology.rank_environment import SINGLE, RankEnvironment, started_rank
from danling_conf.topology.violation import ConfigRefused

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_NTASKS": "9", "SLURM_JOB_ID": "7",
}  # fmt: skip


def test_torchrun():
    expected = RankEnvironment(launcher="torchrun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert started_rank(TORCHRUN) == expected
    assert not expected.main


def test_srun():
    expected = RankEnvironment(launcher="srun", rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert started_rank(SRUN) == expected
    assert started_rank(SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,4"}) == expected


def test_torchrun_inside_a_slurm_step_is_torchrun():
    assert started_rank(TORCHRUN | SRUN | {"SLURM_PROCID": "0"}).launcher == "torchrun"


def test_variables_set_by_hand():
    found = started_rank({"RANK": "0", "WORLD_SIZE": "2"})
    assert (found.launcher, found.local_rank, found.local_world_size) == ("the environment (RANK, WORLD_SIZE)", 0, 2)
    assert found.main


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "4"},
        {"LOCAL_RANK": "0"},
        # A shell inside an allocation, and a batch script: srun has started nothing.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
    ],
)
def test_a_process_that_nothing_started(environment):
    assert started_rank(environment) is None
    machine = this_machine(environment | {"CUDA_VISIBLE_DEVICES": ""})
    assert (machine.started_world_size, machine.launcher, machine.fill_world_size) == (None, None, 1)


def test_the_machine_knows_its_launcher():
    machine = this_machine(TORCHRUN | {"CUDA_VISIBLE_DEVICES": ""})
    assert (machine.started_world_size, machine.launcher, machine.fill_world_size) == (8, "torchrun", 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "8"}, "impossible process"),
        ({"LOCAL_RANK": "4"}, "impossible process"),
        ({"LOCAL_WORLD_SIZE": "9"}, "impossible process"),
        ({"WORLD_SIZE": "0"}, "impossible process"),
        ({"RANK": "-1"}, "RANK=-1 is not a number"),
        ({"RANK": "first"}, "RANK=first is not a number"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= is not a number"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK=1.5"),
    ],
)
def test_contradictions_are_refused(change, said):
    with pytest.raises(ConfigRefused) as caught:
        started_rank(TORCHRUN | change)
    assert said in str(caught.value)


def test_a_step_without_its_local_id():
    with pytest.raises(ConfigRefused, match="SLURM_LOCALID is missing"):
        started_rank({name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})


def test_the_single_process_is_the_main_one():
    assert SINGLE.main
    assert SINGLE.world_size == 1
