"""Command lines that cannot be right, in one process: each is refused, by its path and with a reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.main import main
from danling_conf.schema.launcher import SlurmLauncherConfig
from danling_conf.topology.rules.launcher import folder_faults, launcher_faults
from tests.support.command_line import write_app, write_configs

pytestmark = [pytest.mark.composition, pytest.mark.slow]

SLURM = ("hydra/launcher=danling_slurm", "hydra.launcher.gpus_per_node=8")
REFUSED: dict[str, tuple[tuple[str, ...], str, str]] = {
    "huge sweep": (("-m", "seed=range(0,1e9)"), "sweep", "1e+09 values of seed"),
    "huge product": (("-m", "seed=range(0,1000000)", "optim.lr=range(0,100000)"), "sweep", "1e+11 jobs"),
    "shuffled huge sweep": (("-m", "seed=shuffle(range(0,1000000000))"), "sweep", "1e+09 values of seed"),
    "endless sweep": (("-m", "seed=range(0,inf)"), "seed", "no end"),
    "sweep that goes nowhere": (("-m", "seed=range(0,10,0)"), "seed", "no end"),
    "empty sweep": (("-m", "seed=range(0)"), "seed", "no values"),
    "empty pattern": (("-m", "optim=glob(zz*)"), "optim", "no values"),
    "huge range in a run": (("seed=range(0,1e9)",), "seed=range(0,1e9)", "add -m"),
    "sweep that cannot be read": (("-m", "seed=choice()"), "seed=choice()", "cannot be read"),
    "no launcher": (("hydra.launcher=null",), "hydra.launcher=null", "a section"),
    "no launcher of a sweep": (("-m", "hydra.launcher=null", "seed=1,2"), "hydra.launcher=null", "a section"),
    "no sweeper": (("hydra.sweeper=null",), "hydra.sweeper=null", "a section"),
    "launcher that is a number": (("hydra.launcher=3",), "hydra.launcher=3", "a section"),
    "launcher that is a function": (
        ("hydra.launcher._target_=os.system",), "hydra.launcher._target_=os.system", "hydra/launcher=basic is made by",
    ),
    "sweeper that is a function": (
        ("-m", "hydra.sweeper._target_=os.system", "seed=1,2"), "hydra.sweeper._target_=os.system", "is made by",
    ),
    "optimizer that is a function": (("optim._target_=os.system",), "optim._target_=os.system", "builds this section"),
    "launcher's setting without a sweep": (
        ("hydra.launcher.parallel_jobs=2",), "hydra.launcher.parallel_jobs", "add -m",
    ),
    "long key": (("++data." + "k" * 5000 + "=1",), "data.kkkk", "255 bytes"),
    "long path": (("++data." + ".".join("k" * 400) + "=1",), "data.k.k", "255 bytes"),
    "long name": (("experiment=" + "a" * 300,), "experiment=aaa", "at most 255 bytes"),
    "deep value": (("++data.x=" + "[" * 500 + "]" * 500,), "data.x", "cannot be read"),
    "nested value": (("++data.x=" + "[" * 95 + "]" * 95,), "data.x", "nested"),
    "no memory": ((*SLURM, "hydra.launcher.mem_gb=1e400"), "hydra.launcher.mem_gb=inf", "finite"),
    "memory in words": ((*SLURM, "hydra.launcher.mem_per_gpu='80 gigs'"), "hydra.launcher.mem_per_gpu=80 gigs", "or T"),
    "no partition": ((*SLURM, "hydra.launcher.partition=''"), "hydra.launcher.partition=''", "names nothing"),
    "line break in a comment": (
        (*SLURM, "hydra.launcher.comment='a\ntouch x'"), r"hydra.launcher.comment=a\ntouch x", "line of a script",
    ),
    "line break in an option": (
        (*SLURM, "hydra.launcher.additional_parameters={mail-type: 'END\n#SBATCH'}"),
        r"hydra.launcher.additional_parameters.mail-type=END\n#SBATCH", "line of a script",
    ),
    "line break in srun's arguments": (
        (*SLURM, "hydra.launcher.srun_args=['a\nb']"), r"hydra.launcher.srun_args[0]=a\nb", "line of a script",
    ),
    "name that is no option": (
        (*SLURM, "hydra.launcher.additional_parameters={x y: 3}"), "hydra.launcher.additional_parameters.x y", "long n",
    ),
    "batches of no jobs": (
        ("-m", "hydra.sweeper.max_batch_size=0", "seed=1,2"), "hydra.sweeper.max_batch_size=0", "at least 1",
    ),
    "nothing": (("",), "''", "it is empty"),
    "value left out in a mapping": (("++data.x=???",), "data.x", "must be given"),
    "large seed": (("seed=18446744073709551616",), "seed=18446744073709551616", "64 bits"),
    "large value of one's own": (("++data.x=" + "9" * 30,), "data.x=999", "64 bits"),
    "large degree": (("parallel=fsdp100000000000000000000",), "parallel=fsdp1000", "more than 1048576 ranks"),
    "many ranks": (("parallel=hsdp50000x50000",), "parallel.axes.replicate=50000", "2.5e+09 ranks"),
    "sweep in the root": (("-m", "hydra.sweep.dir=/", "seed=1,2"), "hydra.sweep.dir=/", "the root of the file system"),
    "Hydra's files in the root": (("hydra.output_subdir=/",), "hydra.output_subdir=/", "in the run's directory"),
    "job's name with a line break": (("hydra.job.name='a\nb'",), r"hydra.job.name=a\nb", "name of log files"),
    "escape sequence in a path": (("experiment='\x1b[2J'",), r"experiment=\x1b[2J", "not a character for a path"),
    "value that refers to itself": (("++data.x=${data.x}",), "data.x=${data.x}", "interpolation"),
    "circle of values": (("++data.x=${data.y}", "++data.y=${data.x}"), "data.y=${data.x}", "interpolation"),
    "broken reference in a list": (("++data.x=[1,'${nope}']",), "data.x[1]=${nope}", "'nope' not found"),
    "broken reference in a setting": (
        ("optim.param_groups=[{pattern: '${nope}'}]",), "optim.param_groups[0].pattern=${nope}", "'nope' not found",
    ),
    "setting taken away": (("~parallel.axes.shard",), "~parallel.axes.shard", "unset already"),
    "layout in capitals": (("parallel=Fsdp2",), "parallel=Fsdp2", "did you mean fsdp2?"),
    "section of a section": (
        ("fsdp.cast_forward_inputs=false",), "fsdp.cast_forward_inputs",
        "did you mean fsdp.mp_policy.cast_forward_inputs?",
    ),
    "no folder of configs": (("--config-path", "/nowhere/at/all"), "config_path=/nowhere/at/all", "no such directory"),
    "choice in capitals": (("precision=BF16",), "precision=BF16", "did you mean bf16?"),
    "section in capitals": (("OPTIM.lr=3",), "OPTIM", "did you mean optim?"),
    "preset in capitals": (("optim=AdamW",), "optim=AdamW", "did you mean optim=adamw?"),
    "key in capitals": (("dataloader.SHUFFLE=true",), "dataloader.SHUFFLE", "did you mean dataloader.shuffle?"),
}  # fmt: skip
ACCEPTED = (
    ("-m", "hydra.launcher.parallel_jobs=2", "seed=1,2"),
    (*SLURM, "hydra.launcher.additional_parameters={mail-type: END}"),
    (*SLURM, "hydra.launcher.mem_per_gpu=80G", "hydra.launcher.comment='for the paper, \"v2\"'"),
    ("seed=9223372036854775807",),
    ("++data={a: '${optim.lr}', b: ['${steps}', {c: 1}]}",),
)
FILES = {
    "scalar": "3\n",
    "itself": "defaults:\n  - itself\n",
    "circle": "defaults:\n  - /recipe/other\n",
    "other": "defaults:\n  - /recipe/circle\n",
    "anchor": "a: &a [*a]\n",
    "defaults": "defaults: 3\n",
}


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("app")
    write_configs(folder, {f"recipe/{name}": text for name, text in FILES.items()})
    write_configs(folder, {"train": "defaults:\n  - danling\n  - optional recipe: none\n  - _self_\nsteps: 5\n"})
    return write_app(folder, config_path="conf", config_name="train")


def check(app: Path, *words: str) -> int:
    return main(["check", str(app), *words])


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(app: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, path, reason = REFUSED[name]
    assert check(app, *words) == 2
    err = capsys.readouterr().err
    assert f"\n  {path}" in err
    assert reason in err
    assert err.replace("\n", "").isprintable()


@pytest.mark.parametrize("words", ACCEPTED, ids=" ".join)
def test_accepted(app: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(app, *words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", list(FILES))
def test_a_file_that_is_no_config(app: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(app, f"recipe={name}") == 2
    assert "configuration refused: 1 fault" in capsys.readouterr().err


def test_an_accepted_command_is_shown_as_it_can_be_pasted(app: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(app, "++data.name='a b'") == 0
    assert capsys.readouterr().out.startswith("accepted: app.py '++data.name='")


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("dataloader.train.shuffle", "Draw samples in a new order each epoch"),
        ("dataloader.train", "dataloader.train.batch_size"),
    ],
)
def test_settings_of_a_split_are_explained(key: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", key]) == 0
    assert expected in capsys.readouterr().out
    assert main(["explain", "dataloader.shufle"]) == 2
    assert "did you mean dataloader.shuffle?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"setup": ["module load cuda\nexport A=1\n"]}, []),  # lines of a script are what it is for
        ({"setup": ["a\0b"]}, ["hydra.launcher.setup[0]"]),
        ({"name": "a\rb"}, ["hydra.launcher.name"]),
        ({"additional_parameters": {"mail-type": [1]}}, ["hydra.launcher.additional_parameters.mail-type"]),
        ({"mem_per_cpu": "4000M", "comment": ""}, []),
    ],
)
def test_what_a_script_for_sbatch_can_hold(settings: dict[str, Any], paths: list[str]) -> None:
    assert [item.path for item in launcher_faults(SlurmLauncherConfig(**settings))] == paths


@pytest.mark.parametrize(("folder", "fine"), [("/data/my runs", True), ("/data/100%j", False), ("/data/a\nb", False)])
def test_a_folder_that_slurm_would_misread(folder: str, fine: bool) -> None:
    assert [item.path for item in folder_faults(Path(folder))] == ([] if fine else ["workspace_root"])


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs a mount of its own")
def test_a_full_disk_at_the_start_is_a_refusal(tmp_path: Path) -> None:
    """In a mount namespace of its own, with a few kilobytes left."""
    import subprocess
    import sys

    app = write_app(tmp_path)
    (tmp_path / "disk").mkdir()
    script = (
        "mount -t tmpfs -o size=32k tmpfs disk && "
        f"{sys.executable} {app} steps=3 workspace_root=disk; echo code $?; umount disk"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "poison")}
    words = ["unshare", "-rm", "sh", "-c", script]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60)
    if "code" not in done.stdout:
        pytest.skip(f"no mounts here: {done.stderr}")
    assert "Traceback" not in done.stderr
    assert "workspace_root=disk" in done.stderr
    assert "No space left on device" in done.stderr
    assert "code 2" in done.stdout
