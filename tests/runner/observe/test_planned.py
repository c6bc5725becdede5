"""A plan made beside a run: in the run's file, in its report and its log, and in the error of a full device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from danling_conf.cli.report import report
from danling_conf.records.planned import PlannedRank, PlannedRun, read_plan, write_plan
from danling_conf.runner.observe import out_of_memory, planned
from danling_conf.schema.observability import PlanConfig
from danling_conf.topology.rank_environment import SINGLE, RankEnvironment
from tests.support.command_line import run, write_app
from tests.support.small import Net, Pairs, loss, runner

APP = """
from __future__ import annotations
import danling_conf
from tests.support.small import Net, Pairs, loss

@danling_conf.main()
def train(config):
    return danling_conf.Runner(config).fit(Net, {{"train": Pairs()}}, loss=loss)

if __name__ == "__main__":
    train()
"""
GIB = 1 << 30


def plan_of(step_seconds: float | None = 0.5) -> PlannedRun:
    ranks = [
        PlannedRank(pipeline=stage, peak_bytes=size * GIB, peak_moment="backward layers.3",
                    memory={"activations": size * GIB - 5, "parameters": 5})
        for stage, size in ((0, 4), (1, 2))
    ]  # fmt: skip
    ways = ["activation_checkpointing.mode=full: 2.1 GiB less; forward runs twice"]
    return PlannedRun(layout="pp2", gpu="h100", step_seconds=step_seconds, mfu=0.4, ranks=ranks, ways=ways)


class Idle(planned.Planned):
    """With a plan that is there already."""

    def _start(self, command: Any) -> None:
        self.plan = plan_of()


def watching(tmp_path: Path, said: list[str], device: str) -> Idle:
    ours = runner(tmp_path)
    ours.fit(Net, {"train": Pairs()}, loss=loss)
    return Idle(PlanConfig(gpu="h100"), ours.world.attempt, SINGLE, torch.device(device), said.append)


def test_what_goes_beyond_the_plan_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    watch = watching(tmp_path, said, "cuda")
    watch.compare([4.3 * GIB, 2.1 * GIB], [0, 1], 0.54)
    assert said == [], "within a tenth"
    for _ in range(2):
        watch.compare([4.3 * GIB, 2.5 * GIB], [0, 1], 0.7)
    assert said == [
        "warning: beyond its plan by 25 %: rank 1 has held 2.5 GiB, 2 GiB were planned",
        "warning: beyond its plan by 40 %: a step takes 0.7 s, 0.5 were planned",
    ]


def test_the_memory_of_a_process_on_a_cpu_is_not_compared(tmp_path: Path) -> None:
    said: list[str] = []
    watching(tmp_path, said, "cpu").compare([40 * GIB, 20 * GIB], [0, 1], 0.5)
    assert said == []


def test_the_report_shows_what_was_planned_beside_what_was_measured(tmp_path: Path) -> None:
    ours = runner(tmp_path, {"log_interval": 1})
    ours.fit(Net, {"train": Pairs()}, loss=loss)
    found = ours.world.attempt.run_directory
    assert "Planned and measured" not in report(found)
    write_plan(found, plan_of())
    assert read_plan(found) == plan_of()
    page = report(found)
    assert "Planned and measured" in page
    assert "for pp2 on h100" in page
    assert "500 ms" in page or "0.5 s" in page
    assert json.loads((found / "run.json").read_text())["run_id"] == found.name


@pytest.mark.parametrize("damage", [{"ranks": 3}, {"ranks": []}, {"ranks": [{"memory": 3}]}, []])
def test_a_damaged_plan_is_none(tmp_path: Path, damage: Any) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"plan": damage}))
    plan = read_plan(tmp_path)
    assert plan is None or plan.peak_bytes == 0


def test_a_full_device_is_explained_by_the_plan(tmp_path: Path) -> None:
    ours = runner(tmp_path)
    ours.fit(Net, {"train": Pairs()}, loss=loss)
    write_plan(ours.world.attempt.run_directory, plan_of())
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    lines = str(out_of_memory.explained(error, ours.config, ours.world, 6)).splitlines()
    assert lines[1] == "  planned: 4 GiB at backward layers.3: activations 4 GiB"
    assert lines[2] == "  try activation_checkpointing.mode=full: 2.1 GiB less; forward runs twice"
    assert len([line for line in lines if line.startswith("  try ")]) == 3


@pytest.mark.slow
def test_a_run_is_planned_beside_it(tmp_path: Path) -> None:
    """The time of an H100 is planned, and a CPU takes longer: the run says so itself."""
    app = write_app(tmp_path, APP)
    outcome = run(
        app, "steps=400", "log_interval=20", "dataloader.batch_size=4", f"workspace_root={tmp_path}",
        "plan.enabled=true", "plan.gpu=h100", PYTHONPATH=str(Path(__file__).parents[3]),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (file,) = tmp_path.rglob("run.json")
    plan = read_plan(file.parent)
    assert plan is not None, outcome.err
    assert (plan.layout, plan.gpu) == ("single", "h100")
    assert plan.peak_bytes > sum(item.numel() for item in Net().parameters()) * 4
    assert "not planned" not in outcome.out + outcome.err


def test_a_run_that_asks_for_no_plan_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned.Planned, "__init__", lambda *_: pytest.fail("a plan was begun"))
    ours = runner(tmp_path)
    ours.fit(Net, {"train": Pairs()}, loss=loss)
    assert read_plan(ours.world.attempt.run_directory) is None


@pytest.mark.parametrize(("given", "planned_for"), [(4, "4"), (None, "2")])
def test_a_plan_is_for_the_nodes_that_the_setting_names(given: int | None, planned_for: str) -> None:
    """Without it, for nodes like this one."""
    ranks = RankEnvironment(launcher="a test", rank=0, world_size=8, local_rank=0, local_world_size=2)
    section = PlanConfig(enabled=True, gpus_per_node=given)
    command = planned.plan_command(section, ["train.py", "parallel=fsdp8"], ranks, torch.device("cpu"))
    assert command[command.index("--gpus-per-node") + 1] == planned_for
    assert command[command.index("plan") + 1 :][:2] == ["train.py", "parallel=fsdp8"]
