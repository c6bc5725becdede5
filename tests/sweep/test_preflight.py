"""All jobs of a sweep checked before any starts: right ones with their shapes, wrong ones with all their faults."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

from danling_conf.config import sweep_composer, typed
from danling_conf.config.hydra_adapter import Composer, ConfigSearch, composer
from danling_conf.config.hydra_job import hydra_settings, settings_in
from danling_conf.config.job import Job
from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.sweep.preflight import Preflight, Refused, check_jobs, shapes_of
from danling_conf.sweep.preflight_tables import fault_table, numbers_as_text, shape_table, varying
from danling_conf.topology.machine import Machine
from danling_conf.topology.resources import Capacity
from danling_conf.topology.violation import ConfigRefused, Violation

pytestmark = pytest.mark.composition

NODES = Capacity(devices_per_node=8, cpus_per_node=64, nodes=2, minutes=120, name="gpu")
LAPTOP = Machine()


@pytest.fixture(scope="module")
def composing() -> Iterator[Composer]:
    with composer(ConfigSearch(config_name="danling")) as made:
        yield made


def checked(
    composing: Composer, *jobs: list[str], given: tuple[str, ...] = (), capacity: Capacity | None = NODES
) -> tuple[list[Job], list[Refused]]:
    master = composing.compose(["hydra/launcher=danling_slurm", *given], multirun=True)
    sweep = [["steps=3", *job] for job in jobs]
    return check_jobs(composing, master, sweep, 4, machine=LAPTOP, capacity=capacity)


def faults(refused: list[Refused]) -> list[list[str]]:
    return [[item.path for item in job.violations] for job in refused]


def test_accepted_jobs_are_numbered_and_shaped(composing: Composer) -> None:
    jobs, refused = checked(composing, ["parallel=fsdp8"], ["parallel=fsdp16"], ["parallel=fsdp3"])
    assert refused == []
    assert [(job.number, job.hydra["job"]["num"], job.hydra["job"]["id"]) for job in jobs] == [
        (4, 4, "4"), (5, 5, "5"), (6, 6, "6")
    ]  # fmt: skip
    shapes = shapes_of(jobs, NODES)
    assert [(shapes[job.number].nodes, shapes[job.number].gpus_per_node) for job in jobs] == [(1, 8), (2, 8), (1, 3)]
    assert jobs[0].overrides == ("steps=3", "parallel=fsdp8")


def test_jobs_of_the_same_choices_are_no_deep_copies(composing: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[type] = []
    deepcopy = copy.deepcopy

    def counted(item: object, memo: dict[int, object] | None = None) -> object:
        copied.append(type(item))
        return deepcopy(item, memo)

    monkeypatch.setattr(copy, "deepcopy", counted)
    counts = []
    for count in (1, 1, 6):  # the first looks up what all sweeps have in common
        copied.clear()
        jobs, refused = checked(composing, *([f"optim.lr={number + 1}e-3"] for number in range(count)))
        assert (len(jobs), refused) == (count, [])
        assert [job.config.optim.lr for job in jobs] == [float(f"{number + 1}e-3") for number in range(count)]
        counts.append(copied.count(DictConfig))
    assert counts[1] == counts[2]


MIXED = ["optim.lr=0.5", "optim.lr=-1", "optim.lr=x", "~optim.lr", "optim.lr=${seed}", "precision.dtype=nothing",
         "activation_checkpointing.mode=selectiv", "+data.x={a: 1}", "+data.x=${nothing}", "++optim.nothing=1",
         "~steps", "seed=-1", "seed=7", "++shedule=linear", "checkpoint.backend=dcp", "compile.enable=yes",
         "parallel=fsdp8", "parallel=ddp2", "experiment=${lineage}", "data.y=2", "++compile=null", "epochs=2",
         "parallel.axes.shard=2"]  # fmt: skip


def test_only_what_a_job_changes_is_checked_again(composing: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same outcome as the check of everything."""
    checks = []
    check = typed._check_setting
    monkeypatch.setattr(typed, "_check_setting", lambda *given: checks.append(given) or check(*given))
    master = composing.compose(["hydra/launcher=danling_slurm"], multirun=True)
    partly, wholly = (Preflight(composing, master, machine=LAPTOP, capacity=NODES) for _ in range(2))

    def outcome(preflight: Preflight, job: list[str]) -> tuple[int, object]:
        checks.clear()
        try:
            made = preflight.check(["steps=3", *job], 1)
        except ConfigRefused as refusal:
            return len(checks), refusal.violations
        return len(checks), (made.job_id, made.config)

    draw = random.Random(0)
    for mixture in [[], *([item] for item in MIXED), *(draw.sample(MIXED, 3) for _ in range(20))]:
        outcome(partly, mixture)  # the first of its choices is composed, and checked as a whole
        few, found = outcome(partly, mixture)
        with monkeypatch.context() as patched:
            patched.setattr(sweep_composer, "settled", lambda node: False)
            many, expected = outcome(wholly, mixture)
        assert found == expected, mixture
        assert few <= many
        assert mixture or 10 * few < many


def test_settings_of_hydra_are_what_hydra_composes(composing: Composer, tmp_path: Path) -> None:
    (job,), _ = checked(composing, ["parallel=fsdp8", "optim.lr=0.1"])
    master = composing.compose(["hydra/launcher=danling_slurm"], multirun=True)
    theirs = composing.sweep_config(master, ["steps=3", "parallel=fsdp8", "optim.lr=0.1"])
    theirs.hydra.job.update({"num": 4, "id": "4"})
    assert settings_in(job.hydra, tmp_path) == hydra_settings(theirs, tmp_path)


def test_every_fault_of_every_job(composing: Composer) -> None:
    jobs, refused = checked(
        composing,
        ["parallel=fsdp9"],
        ["parallel=fsdp9", "optim.lr=x"],
        ["parallel=fsdp8"],
        ["accum_steps=0", "parallel=fsdp64"],
        ["stepz=1", "compile=nothing"],
        ["parallel.axes.shard=2"],
    )
    assert [job.number for job in jobs] == [6]
    assert [job.number for job in refused] == [4, 5, 7, 8, 9]
    assert faults(refused) == [
        ["parallel"],
        ["optim.lr", "parallel"],
        ["accum_steps", "parallel"],
        ["compile", "stepz"],
        ["parallel.axes.shard"],
    ]


def test_a_layout_to_be_filled_fills_its_nodes(composing: Composer) -> None:
    one, _ = checked(composing, ["parallel=fsdp"])
    two, _ = checked(composing, ["parallel=fsdp"], given=("hydra.launcher.nodes=2",))
    assert [job.layout.world_size for job in (*one, *two)] == [8, 16]


def test_jobs_on_cpus_take_no_gpus(composing: Composer) -> None:
    jobs, _ = checked(composing, ["parallel=ddp16", "parallel.mesh_device_type=cpu"])
    assert shapes_of(jobs, NODES)[4].gpus == 0


def test_a_layout_without_a_name_is_refused_by_its_rule(composing: Composer) -> None:
    local = ("hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=3")
    _, refused = checked(composing, ["parallel.axes.shard=2"], given=local, capacity=None)
    assert faults(refused) == [["parallel.axes.shard"]]


def test_settings_of_the_launcher_may_refer_to_a_job(composing: Composer) -> None:
    jobs, refused = checked(
        composing, ["accum_steps=2", "parallel=fsdp8"], ["accum_steps=3", "parallel=fsdp8"],
        given=("hydra.launcher.nodes=${accum_steps}", "hydra.launcher.comment=${experiment}"),
    )  # fmt: skip
    assert [job.launcher["nodes"] for job in jobs] == [2]
    assert faults(refused) == [["hydra.launcher.nodes"]]


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ("hydra.launcher.timeout_min=0", "hydra.launcher.timeout_min"),
        ("hydra.launcher.timeout_min=121", "hydra.launcher.timeout_min"),
        ("+hydra.launcher.nodez=1", "hydra.launcher.nodez"),
        ("hydra.launcher.on_failure=sometimes", "hydra.launcher.on_failure"),
        ("hydra.launcher.mem_gb=0", "hydra.launcher.mem_gb"),
    ],
)
def test_faults_of_the_launcher(composing: Composer, given: str, path: str) -> None:
    _, refused = checked(composing, ["parallel=fsdp8"], given=(given,))
    assert faults(refused) == [[path]]


@pytest.mark.parametrize("given", ["continue", "stop", "retry", "retry2", "retry 2"])
def test_what_a_failure_may_mean(composing: Composer, given: str) -> None:
    assert checked(composing, ["parallel=fsdp8"], given=(f"hydra.launcher.on_failure={given}",))[1] == []


def test_the_same_job_twice(composing: Composer) -> None:
    jobs, refused = checked(composing, ["optim.lr=0.1"], ["optim.lr=0.1"])
    assert refused == []
    assert len({job.job_id for job in jobs}) == 1


def test_without_a_cluster_this_machine_counts(composing: Composer) -> None:
    master = composing.compose([], multirun=True)
    _, refused = check_jobs(composing, master, [["steps=1", "parallel=fsdp8"]], 0, machine=Machine(devices=2))
    assert faults(refused) == [["parallel"]]


def test_nodes_are_asked_for_once_a_partition(composing: Composer) -> None:
    asked: list[str | None] = []

    def nodes_of(launcher: SlurmLauncherConfig) -> Capacity:
        asked.append(launcher.partition)
        if launcher.partition == "gone":
            raise ConfigRefused([Violation("hydra.launcher.partition", "gone", "there is none", "choose another")])
        return Capacity(devices_per_node=4 if launcher.partition == "small" else 8)

    given = ["hydra/launcher=danling_slurm", "hydra.launcher.partition=${lineage}"]
    master = composing.compose(given, multirun=True)
    jobs = [["steps=3", f"lineage={name}", f"optim.lr={rate}", "parallel=fsdp8"]
            for name in ("small", "large", "gone") for rate in ("0.1", "0")]  # fmt: skip
    accepted, refused = check_jobs(composing, master, [*jobs, [*jobs[4], "seed=x"]], 0, capacity=nodes_of)
    assert asked == ["small", "large", "gone"]
    shapes = shapes_of(accepted, nodes_of)
    assert {number: shape.nodes for number, shape in shapes.items()} == {0: 2, 1: 2, 2: 1, 3: 1}
    assert faults(refused) == [["hydra.launcher.partition"], ["hydra.launcher.partition"], ["seed"]]


def test_what_nobody_answers_is_a_fault_beside_others(composing: Composer) -> None:
    def nodes_of(launcher: SlurmLauncherConfig) -> Capacity:
        raise ConfigRefused([Violation("hydra/launcher", "danling_slurm", "no answer", "ask elsewhere")])

    master = composing.compose(["hydra/launcher=danling_slurm"], multirun=True)
    jobs = [["steps=3", "parallel=fsdp"], ["steps=0", "parallel=fsdp16"], ["steps=3", "seed=x"]]
    assert faults(check_jobs(composing, master, jobs, 0, capacity=nodes_of)[1]) == [
        ["hydra/launcher"], ["steps", "hydra/launcher"], ["seed", "hydra/launcher"]
    ]  # fmt: skip


def test_jobs_of_this_machine_ask_nobody(composing: Composer) -> None:
    def nodes_of(launcher: SlurmLauncherConfig) -> Capacity:
        raise AssertionError("asked")

    jobs, refused = check_jobs(
        composing, composing.compose([], multirun=True), [["steps=3"]], 0, machine=LAPTOP, capacity=nodes_of
    )
    assert refused == []
    assert shapes_of(jobs, nodes_of)[0].nodes == 1


def test_table_of_faults(composing: Composer) -> None:
    _, refused = checked(composing, ["parallel=fsdp9"], ["parallel=fsdp9"], ["optim.lr=x"], ["parallel=fsdp9"])
    lines = fault_table(refused, of=6)
    assert lines[0] == "4 of 6 jobs refused: 2 distinct faults"
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("#4-5,#7     parallel=fsdp9") for line in lines)
    assert any(line.startswith("#6          optim.lr=x") for line in lines)


def test_table_of_shapes(composing: Composer) -> None:
    jobs, _ = checked(composing, ["parallel=fsdp8"], ["parallel=fsdp8", "seed=1"], ["parallel=fsdp16"])
    rows = [line.split() for line in shape_table(jobs, shapes_of(jobs, NODES))]
    assert rows[1:] == [
        ["fsdp8", "2", "1", "8", "8", "8", "1", "16"],
        ["fsdp16", "1", "2", "8", "8", "8", "1", "16"],
        ["total", "3", "3", "32"],
    ]


def test_numbers_are_shortened() -> None:
    assert numbers_as_text([5, 0, 1, 2, 8, 2]) == "#0-2,#5,#8"


def test_what_varies() -> None:
    assert varying([["a=1", "+b=x"], ["a=1", "+b=y"]]) == ["b: x, y"]
