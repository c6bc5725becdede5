"""Hydra's own settings under our `main`: each does what Hydra documents, or is refused with a reason."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from danling_conf.command import run_command
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.hydra_directories import chosen_run_directory, chosen_sweep_directory
from danling_conf.config.job import Job
from danling_conf.launch.app import App
from danling_conf.sweep.preflight import Refused, check_jobs, notes_of_job, shapes_of
from danling_conf.sweep.slurm_backend import frozen_shape, parameters_of
from danling_conf.topology.resources import Capacity
from tests.support.command_line import Outcome, poisoned_torch, run

pytestmark = [pytest.mark.composition, pytest.mark.slow]

TARGETS = Path(__file__).with_name("targets")


def started(folder: Path, *arguments: str) -> tuple[Outcome, list[str]]:
    """Run a copy of the app in `folder`. Returns its outcome and what Hydra called of its callback."""
    shutil.copytree(TARGETS, folder, dirs_exist_ok=True)
    poisoned_torch(folder)
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    path = os.pathsep.join([str(folder), str(folder / "poison"), str(TARGETS.parents[2])])
    done = run(folder / "train.py", "--config-name", "directories", *arguments, NOTES=str(notes), PYTHONPATH=path)
    return done, notes.read_text().split() if notes.exists() else []


def test_directories_callbacks_and_job_of_a_single_run(tmp_path: Path) -> None:
    for attempt in range(2):
        done, notes = started(tmp_path)
        assert done.code == 0, done.err
        output = tmp_path / "logs/train/run"
        assert f"output {output} True {output}" in done.out  # with hydra.job.chdir
        assert f"job mine RUN yes {output}" in done.out
        assert "stopping val/acc for 3 else True train" in done.out
        assert notes == ["run_start", "job_start", "job_end", "run_end"]
        assert (output / ".hydra/config.yaml").is_file()
        # The identity does not depend on where Hydra's output goes.
        runs = sorted((tmp_path / "experiments/lin/exp").glob("[!.]*"), key=lambda path: len(path.name))
        assert [run.name for run in runs] == [runs[0].name, f"{runs[0].name}.2"][: attempt + 1]
    assert not (tmp_path / "outputs").exists()


def test_a_sweep_that_files_describe(tmp_path: Path) -> None:
    """By `hydra.mode`; the jobs come from `hydra.sweeper.params`, and go where `hydra.sweep.dir` says."""
    done, notes = started(tmp_path, "hydra.mode=MULTIRUN", "hydra.output_subdir=null")
    assert done.code == 0, done.err
    sweep = tmp_path / "logs/train/sweep"
    assert f"sweep done: 2 of 2 jobs completed: {sweep}" in done.out
    assert "warning: hydra.launcher.cpus_per_task has no effect" in done.err
    assert (notes[0], notes[-1]) == ("multirun_start", "multirun_end")
    assert sorted(notes[1:-1]) == ["job_end"] * 2 + ["job_start"] * 2
    jobs = [path.parent for path in sweep.glob("jobs/*/job.json")]
    assert sorted(json.loads((job / "job.json").read_text())["config"]["model"]["width"] for job in jobs) == [4, 8]
    assert all("job mine MULTIRUN yes" in (job / "output.log").read_text() for job in jobs)
    assert not list(tmp_path.rglob(".hydra"))


def test_several_values_with_the_mode_of_a_sweep() -> None:
    with composer(ConfigSearch(config_name="train", config_path=str(TARGETS / "conf"))) as composing:
        assert composing.asks_for_sweep(["hydra.mode=MULTIRUN", "seed=1,2"])
        assert not composing.asks_for_sweep(["seed=1,2"])
        assert not composing.asks_for_sweep(["seed=1"])


def test_hydras_own_directories_are_those_that_it_ships(tmp_path: Path) -> None:
    """What the adapter takes for unset is what this version of Hydra has."""
    with composer(ConfigSearch(config_name="danling")) as composing:
        assert chosen_run_directory(composing.compose(["steps=1"])) is None
        assert chosen_sweep_directory(composing.compose(["steps=1"], multirun=True)) is None
        moved = composing.compose(["steps=1", "hydra.run.dir=there", "hydra.sweep.dir=${hydra:job.name}"])
        assert chosen_run_directory(moved) == Path("there").absolute()
        assert chosen_sweep_directory(moved) == Path("app").absolute()


@pytest.mark.parametrize("setting", ["hydra.run.dir", "hydra.sweep.dir"])
def test_directories_that_cannot_be_those_of_a_run(setting: str, tmp_path: Path, capsys: Any) -> None:
    app = App(function=print, script=TARGETS / "train.py", config_path=None, config_name="danling")
    sweep = ["-m"] if "sweep" in setting else []
    (tmp_path / "file").touch()
    said = {
        "/": "the root of the file system",
        str(tmp_path / "file"): "is not a directory",
        "/proc/nowhere": "it cannot be made",
        "": "an empty text names no directory",
        "${nowhere}": "'nowhere' not found",
    }
    for value, why in said.items():
        with pytest.raises(SystemExit) as ended:
            run_command(app, [*sweep, "steps=1", f"workspace_root={tmp_path}", f"{setting}='{value}'"])
        shown = capsys.readouterr().err
        assert ended.value.code == 2
        assert setting in shown
        assert why in shown, value
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hydra.sweep.subdir=${hydra.job.override_dirname}"], "a job has no directory in its sweep"),
        (["hydra/launcher=joblib"], "hydra/launcher=joblib\n      there is no such choice"),
    ],
)
def test_what_means_nothing_here_is_refused(arguments: list[str], said: str, capsys: Any, tmp_path: Path) -> None:
    app = App(function=print, script=TARGETS / "train.py", config_path=None, config_name="danling")
    with pytest.raises(SystemExit) as ended:
        run_command(app, ["-m", "steps=1,2", f"workspace_root={tmp_path}", *arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert said in shown or "joblib" in shown


def checked(launcher: Sequence[str], *overrides: str) -> tuple[list[Job], list[Refused]]:
    with composer(ConfigSearch(config_name="train", config_path=str(TARGETS / "conf"))) as composing:
        master = composing.compose([*launcher, *overrides], multirun=True)
        given = [str(item) for item in master.hydra.overrides.task]
        jobs = [[*given, "seed=1"], [*given, "seed=2"]]
        slurm = "submitit_slurm" in launcher[0]
        return check_jobs(composing, master, jobs, 0, capacity=Capacity(devices_per_node=8) if slurm else None)


def test_submitit_slurm_has_its_settings_and_our_machinery() -> None:
    accepted, refused = checked(
        ["hydra/launcher=submitit_slurm", "hydra.launcher.timeout_min=30", "hydra.launcher.partition=gpu",
         "hydra.launcher.mem_gb=4", "hydra.launcher.max_num_timeout=1", "hydra.launcher.signal_delay_s=60"],
        "parallel=fsdp8_tp2",
    )  # fmt: skip
    assert (len(accepted), refused) == (2, [])
    job = accepted[0]
    shape = frozen_shape(shapes_of([job], Capacity(devices_per_node=8))[0], job.launcher)
    parameters = parameters_of({"launcher": job.launcher, "shape": shape})
    expected = {"nodes": 2, "ntasks_per_node": 8, "gpus_per_node": 8, "time": 30, "partition": "gpu", "mem": "4096MB"}
    assert {name: parameters[name] for name in expected} == expected
    assert (parameters["signal_delay_s"], job.launcher["max_num_timeout"]) == (60, 1)
    assert parameters["additional_parameters"]["requeue"] is True


def test_settings_of_submitit_without_a_meaning_here_are_refused() -> None:
    def faults(*launcher: str) -> set[str]:
        _, refused = checked(launcher)
        return {item.path for job in refused for item in job.violations}

    slurm = [
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.submitit_folder=x",
        "hydra.launcher.stderr_to_stdout=true",
    ]
    assert faults(*slurm) == {"hydra.launcher.submitit_folder", "hydra.launcher.stderr_to_stdout"}
    local = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "hydra.launcher.tasks_per_node=4"]
    assert faults(*local) == {"hydra.launcher.timeout_min", "hydra.launcher.tasks_per_node"}
    accepted, _ = checked(["hydra/launcher=submitit_local", "hydra.launcher.mem_gb=5"])
    assert notes_of_job(accepted[0]) == [
        "hydra.launcher.mem_gb has no effect: jobs on this machine share its memory and cores"
    ]


def test_other_apps_keep_submitits_own_launchers() -> None:
    """Ours take their place only while an app of ours is composed."""
    from hydra.core.config_store import ConfigStore

    with composer(ConfigSearch(config_name="danling")) as composing:
        ours = composing.compose(["steps=1", "hydra/launcher=submitit_slurm"]).hydra.launcher._target_
    assert ours == "hydra_plugins.danling_conf_plugin.slurm_launcher.SubmititSlurmLauncher"
    stored = ConfigStore.instance().repo["hydra"]["launcher"].get("submitit_slurm.yaml")
    assert stored is None or OmegaConf.select(stored.node, "_target_").startswith(
        "hydra_plugins.hydra_submitit_launcher"
    )
