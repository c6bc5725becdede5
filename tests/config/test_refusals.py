"""What a user sees when a configuration is refused: through the real command line, in full, as stored in `snapshots`.

`UPDATE_SNAPSHOTS=1 pytest tests/config/test_refusals.py` writes the snapshots anew; read them aloud afterwards.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.support.command_line import fake_nvidia_smi, run, write_app, write_configs

pytestmark = [pytest.mark.composition, pytest.mark.slow]

SNAPSHOTS = Path(__file__).with_name("snapshots")
UPDATE = os.environ.get("UPDATE_SNAPSHOTS") == "1"

REFUSED = {
    "misspelt_key": ["stepz=3"],
    "misspelt_key_behind_plus": ["steps=3", "+parallel.axes.shrad=4"],
    "misspelt_key_behind_two_plus": ["steps=3", "++paralel.axes.shard=4"],
    "misspelt_section": ["steps=3", "optm.lr=0.1"],
    "key_of_another_section": ["steps=3", "lr=0.1"],
    "key_that_is_like_nothing": ["steps=3", "zzz=1"],
    "misspelt_key_of_a_split": ["steps=3", "dataloader.val.batchsize=3"],
    "misspelt_key_of_all_splits": ["steps=3", "dataloader.batchsize=3"],
    "split_with_a_name_that_is_no_word": ["steps=3", "dataloader.test-clean.batch_size=3"],
    "misspelt_option_of_the_optimizer": ["steps=3", "optim.betass=[0.9,0.95]"],
    "misspelt_key_of_a_policy": ["steps=3", "parallel=fsdp2", "fsdp.mp_policy.param_dtpye=bf16"],
    "wrong_type": ["steps=abc"],
    "wrong_types": [
        "steps=1e3", "optim.lr=fast", "deterministic=maybe", "accum_steps=null", "fsdp.reshard_after_forward=half",
        "parallel=[1,2]", "lineage={a:1}", "compile.options=3", "parallel.axes=3", "model=3",
        "activation_checkpointing.keep_ops=one",
    ],
    "value_out_of_range": ["steps=0", "accum_steps=-1", "max_grad_norm=0", "heartbeat.interval_seconds=0", "seed=-1",
                           "checkpoint.wait_timeout=nan"],
    "value_that_is_no_choice": ["steps=3", "precision=bf61", "stack=fsdp", "score_mode=least"],
    "steps_with_epochs": ["steps=3", "epochs=2"],
    "neither_steps_nor_epochs": [],
    "no_such_layout": ["steps=3", "parallel=fpsd8"],
    "layout_with_a_bad_degree": ["steps=3", "parallel=fsdp8x"],
    "layout_that_is_like_nothing": ["steps=3", "parallel=zorro"],
    "no_such_preset": ["steps=3", "compile=maxx"],
    "group_given_null": ["steps=3", "parallel=null"],
    "group_chosen_again": ["steps=3", "+parallel=ddp2"],
    "layout_contradicted": ["steps=3", "parallel=ddp4", "parallel.axes.shard=2"],
    "two_axes_to_fill": ["steps=3", "parallel=fsdp", "parallel.axes.replicate=-1"],
    "axes_that_do_not_fit": [
        "steps=3", "parallel=fsdp8_tp2_cp2_pp2_ep3_etp4", "dataloader.batch_size=4", "parallel.context_method=ring",
        "parallel.pipeline_schedule=dualpipev", "parallel.pipeline_n_microbatches=2", "compile=aot_eager",
        "parallel.use_device_mesh=false", "precision=fp16", "dataloader.drop_last=false",
    ],
    "keys_of_deepspeed": [
        "steps=3", "max_grad_norm=0.5",
        "deepspeed.gradient_cliping=1.0", "deepspeed.gradient_clipping=1.0",
        "deepspeed.zero_optimization.stage3_max_live_params=5", "+deepspeed.bf16.enabled=true",
        "deepspeed.zero_optimization.offload_param.device=nvme",
    ],
    "graph_of_several_processes": ["steps=3", "stack=graph", "parallel=fsdp2", "compile.memory_policy=budget:1.5"],
    "fault_tolerance_of_too_few_groups": [
        "steps=3", "ft=torchft", "ft.group_size=2", "ft.min_replica_size=3", "ft.replica_id=2", "ft.timeout_seconds=3",
    ],
    "batch_that_microbatches_do_not_divide": [
        "steps=3", "parallel=pp2", "dataloader.batch_size=6", "parallel.pipeline_microbatch_size=4",
    ],
    "no_such_optimizer": ["steps=3", "optim.type=adamv"],
    "option_that_the_optimizer_lacks": ["steps=3", "optim=sgd", "optim.betas=[0.9,0.95]"],
    "option_that_the_scheduler_lacks": ["steps=3", "scheduler=cosine", "scheduler.step_size=3"],
    "sweep_without_multirun": ["steps=1,2", "parallel=ddp2,fsdp2"],
    "value_that_cannot_be_read": ["steps=3", "workspace_root=~/runs", "optim.betas=[0.9"],
    "no_value": ["steps"],
    "no_key": ["=3", "steps=3"],
    "broken_interpolation": ["steps=${stepz}", "lineage=${oc.env:NOT_SET_ANYWHERE}"],
    "value_left_out": ["steps=3", "lineage=???"],
    "root_that_is_a_file": ["steps=3", "workspace_root=app.py/runs"],
    "names_that_are_no_folder": ["steps=3", "experiment=a/b", "lineage=..", "checkpoint.dir_name=/tmp"],
    "nothing_to_resume": ["steps=3", "resume=nowhere/ckpt", "pretrained=nowhere.pt"],
    "no_such_config": ["steps=3", "--config-name", "nowhere"],
    "no_such_directory_of_configs": ["steps=3", "--config-dir", "nowhere"],
    "faults_of_a_sweep": ["-m", "steps=abc,3", "parallel=ddp2,fpsd2"],
    "many_at_once": [
        "steps=abc", "optim.lr=x", "stepz=3", "+optim.betass=[1]", "parallel=fsdp8_tp2", "compile=maxx",
        "dataloader.val.batchsize=3", "fsdp.mp_policy.param_dtype=f32", "lineage=a/b", "epochs=0", "a b=3",
    ],
}  # fmt: skip


def compare(name: str, folder: Path, text: str) -> None:
    """Against the stored text, in which the folder of the test is `FOLDER`."""
    text = text.replace(str(folder), "FOLDER")
    stored = SNAPSHOTS / f"{name}.txt"
    if UPDATE:
        SNAPSHOTS.mkdir(exist_ok=True)
        stored.write_text(text)
    assert stored.read_text() == text


def refused(name: str, folder: Path, *arguments: str, **options) -> str:
    """Run the app, which must refuse without a stack trace, without torch, and without leaving anything behind."""
    app = folder / "app.py"
    if not app.exists():
        write_app(folder)
    before = sorted(folder.rglob("*"))
    done = run(app, *arguments, **options)
    assert done.code == 2, done.err
    assert done.out == ""
    assert "Traceback" not in done.err
    assert "torch was imported" not in done.err
    left = [path for path in sorted(folder.rglob("*")) if path not in before and "__pycache__" not in path.parts]
    assert left == [] or "-m" in arguments  # Hydra makes a sweep's directory before it composes the jobs
    shown = "$ app.py " + " ".join(arguments)
    compare(name, folder, f"{shown.rstrip()}\n{done.err}")
    return done.err


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    # Installed, whatever the environment has; looked for, and never imported.
    (tmp_path / "torchft.py").write_text("raise AssertionError('it was imported')\n")
    said = refused(name, tmp_path, *REFUSED[name])
    if "-m" in REFUSED[name]:  # a table, a fault a row, which begins with the jobs that have it
        rows = re.findall(r"^#[\d,#-]+ +\S+ +\S", said, re.MULTILINE)
        assert len(rows) == int(re.search(r"jobs refused: (\d+) distinct fault", said)[1])
        return
    # Each fault has its place, its rule and its way out.
    count = int(re.search(r"configuration refused: (\d+) fault", said)[1])
    assert len(re.findall(r"^  \S", said, re.MULTILINE)) == count
    assert len(re.findall(r"^      fix: \S", said, re.MULTILINE)) == count


def test_the_snapshots_are_those_of_the_tests():
    text = Path(__file__).read_text()
    for stored in SNAPSHOTS.glob("*.txt"):
        assert f'"{stored.stem}"' in text, f"no test has the snapshot {stored.name}"


def test_many_faults_are_all_listed(tmp_path):
    write_app(tmp_path)
    done = run(tmp_path / "app.py", *REFUSED["many_at_once"])
    listed = re.findall(r"^  ([^\s=]+)", done.err, re.MULTILINE)
    assert set(listed) >= {
        "steps", "optim.lr", "stepz", "optim.betass", "compile", "dataloader.val.batchsize",
        "fsdp.mp_policy.param_dtype", "lineage", "epochs", "a",
    }  # fmt: skip


FILE_WITH_STEPS = {"train": "defaults:\n  - danling\n  - _self_\nsteps: 100\n"}
FILE_WITH_EPOCHS = {"train": "defaults:\n  - danling\n  - _self_\nepochs: 100\n"}


@pytest.mark.parametrize(
    ("files", "argument", "said"),
    [
        (FILE_WITH_STEPS, "epochs=2", "steps None epochs 2 "),
        (FILE_WITH_EPOCHS, "steps=2", "steps 2 epochs None "),
    ],
)
def test_a_budget_on_the_command_line_wins_over_the_other_kind_in_a_file(tmp_path, files, argument, said):
    """And says so."""
    write_configs(tmp_path, files)
    done = run(write_app(tmp_path, config_path="conf", config_name="train"), argument)
    assert (done.code, done.out.startswith(said)) == (0, True), done
    other = "steps" if argument.startswith("epochs") else "epochs"
    assert f"warning: {argument} is on the command line, so {other}=100 of a file is set to null" in done.err


def test_layout_against_the_started_world(tmp_path):
    torchrun = {"RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
    said = refused("layout_against_the_started_world", tmp_path, "steps=3", "parallel=ddp2", **torchrun)
    assert "replicate 2 needs 2 processes" in said


def test_layout_against_the_world_of_torchrun(tmp_path):
    """Asked by `danling-conf check`, since a rank that leads others has to tell them, for which it needs torch."""
    app = write_app(tmp_path)
    done = run(app, "steps=3", "parallel=fsdp8", command=("-m", "danling_conf.cli.main", "check"),
               RANK="0", WORLD_SIZE="4", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4", TORCHELASTIC_RUN_ID="x")  # fmt: skip
    assert done.code == 2
    compare("layout_against_the_world_of_torchrun", tmp_path, done.err)


def test_ranks_that_cannot_be(tmp_path):
    refused("ranks_that_cannot_be", tmp_path, "steps=3", RANK="5", WORLD_SIZE="2")


def test_layout_against_the_devices(tmp_path):
    tools = fake_nvidia_smi(tmp_path, 4)
    said = refused("layout_against_the_devices", tmp_path, "steps=3", "parallel=fsdp8", tools=tools)
    assert "this machine has 4" in said
    said = refused("layout_against_the_visible_devices", tmp_path, "steps=3", "parallel=ddp4", tools=tools,
                   CUDA_VISIBLE_DEVICES="0,1")  # fmt: skip
    assert "this machine has 2" in said


def test_no_compiler(tmp_path):
    """Neither on PATH nor as CXX; Python itself is started by its full path."""
    refused("no_compiler", tmp_path, "steps=3", "compile=max", PATH=str(tmp_path), CXX="")


def test_folder_that_hides_a_setting(tmp_path):
    write_configs(tmp_path, {"train": FILE_WITH_STEPS["train"], "experiment/large": "# @package _global_\nsteps: 3\n"})
    write_app(tmp_path, config_path="conf", config_name="train")
    refused("folder_that_hides_a_setting", tmp_path, "experiment=mine")
    for choice in ([], ["+experiment=large"]):
        assert run(tmp_path / "app.py", *choice).code == 0


def test_misspelt_key_in_a_file(tmp_path):
    write_configs(tmp_path, {"train": "defaults:\n  - danling\n  - _self_\nstepz: 100\n"})
    write_app(tmp_path, config_path="conf", config_name="train")
    refused("misspelt_key_in_a_file", tmp_path)


def test_faults_of_several_files_and_of_the_command_line_are_shown_together(tmp_path):
    train = "defaults: [danling, task: one, _self_]\nstepz: 100\noptim:\n  lr: fast\nfsdp:\n  reshard: 3\n"
    task = "# @package _global_\naccum_steps: null\nparallel:\n  axes:\n    shrad: 3\n"
    write_configs(tmp_path, {"train": train, "task/one": task})
    write_app(tmp_path, config_path="conf", config_name="train")
    said = refused("faults_of_files_and_command_line", tmp_path, "steps=abc", "compile=maxx", "parallel=fsdp2_tp2")
    assert "7 faults" in said


def test_wrong_type_in_a_file(tmp_path):
    write_configs(tmp_path, {"train": "defaults:\n  - danling\n  - _self_\nsteps: many\n"})
    write_app(tmp_path, config_path="conf", config_name="train")
    refused("wrong_type_in_a_file", tmp_path)


def test_file_that_is_no_yaml(tmp_path):
    write_configs(tmp_path, {"train": "defaults:\n  - danling\n  - _self_\nsteps: 1\nsteps: 2\n"})
    write_app(tmp_path, config_path="conf", config_name="train")
    refused("file_that_is_no_yaml", tmp_path)


def test_misspelt_preset_in_a_file(tmp_path):
    write_configs(tmp_path, {"train": "defaults:\n  - danling\n  - override optim: adamv\n  - _self_\nsteps: 1\n"})
    write_app(tmp_path, config_path="conf", config_name="train")
    refused("misspelt_preset_in_a_file", tmp_path)


def test_misspelt_layout_in_a_file(tmp_path):
    write_configs(tmp_path, {"train": "defaults:\n  - danling\n  - override parallel: fsdp8x\n  - _self_\nsteps: 1\n"})
    write_app(tmp_path, config_path="conf", config_name="train")
    refused("misspelt_layout_in_a_file", tmp_path)


def test_a_directory_that_cannot_be_made(tmp_path):
    """Nobody can make a directory there, whoever asks; who is told by the rule and who by the system reads the same."""
    app = write_app(tmp_path)
    done = run(app, "steps=3", "workspace_root=/proc/self/runs")
    assert done.code == 2
    assert "workspace_root=/proc/self/runs" in done.err
    assert "fix: choose a directory to write to" in done.err
    assert "Traceback" not in done.err


def test_accepted_runs_without_torch(tmp_path):
    """The same app, the same poison: a sound command line gets through, so that the refusals are not all it can do."""
    app = write_app(tmp_path)
    done = run(app, "steps=3", "seed=1")
    assert (done.code, done.out, done.err) == (0, "steps 3 epochs None replicate 1\n", "")
    (run_file,) = tmp_path.glob("experiments/lin/exp/*/run.json")
    assert run_file.is_file()
    assert not (tmp_path / "outputs").exists()


def test_warned_of_and_accepted(tmp_path):
    app = write_app(tmp_path)
    done = run(app, "steps=3", "compile.memory_policy=default", "fsdp=bf16", "gc.generation=2")
    assert done.code == 0
    compare("warnings_of_an_accepted_run", tmp_path, done.err)
