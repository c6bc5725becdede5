"""`danling-conf check -m`: what a user reads of a whole sweep, and what the command exits with."""

from __future__ import annotations

from pathlib import Path

import pytest

from danling_conf.cli.main import main

pytestmark = [pytest.mark.composition, pytest.mark.slow]

TRAIN = str(Path(__file__).parents[2] / "examples" / "train.py")

APP = """
import danling_conf

@danling_conf.main(config_path=".", config_name="mine")
def app(config):
    raise SystemExit("the app was run")

if __name__ == "__main__":
    app()
"""


def check(*words: str) -> int:
    return main(["check", TRAIN, *words])


def test_a_sweep_and_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("-m", "parallel=fsdp8,fsdp4_tp2,fsdp3", "optim.lr=1e-3,3e-4", "--gpus-per-node", "8") == 0
    out = capsys.readouterr().out
    assert "accepted: 6 jobs" in out
    assert "total         6                                               6         38" in out
    assert "  optim.lr: 0.001, 0.0003" in out


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "--gpus-per-node=8", "parallel=fsdp8,fsdp16"),
        ("parallel=fsdp8,fsdp16", "--gpus-per-node", "8", "--multirun"),
        ("parallel=fsdp8,fsdp16", "--cpus-per-node", "64", "-m", "--gpus-per-node", "8", "optim.lr=0.1"),
    ],
)
def test_options_stand_anywhere(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(*words) == 0
    assert "accepted: 2 jobs" in capsys.readouterr().out


def test_all_faults_in_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("-m", "parallel=fsdp8,fsdp9", "optim.lr=0.1,x", "--gpus-per-node", "8") == 2
    err = capsys.readouterr().err
    assert "3 of 4 jobs refused: 2 distinct faults" in err
    assert "#1,#3       optim.lr=x" in err
    assert "#2-3        parallel=fsdp9" in err
    assert "1 of 4 jobs is fine" in err
    assert "Traceback" not in err


def test_parameters_of_the_sweeper_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - danling\n  - _self_\nsteps: 3\nhydra:\n  sweeper:\n    params:\n      accum_steps: 1,2,3\n"
    )
    assert main(["check", str(tmp_path / "app.py"), "-m", "parallel=single"]) == 0
    assert "accepted: 3 jobs" in capsys.readouterr().out


def test_one_job_on_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("parallel=fsdp16", "--gpus-per-node", "8") == 0
    assert "fsdp16     1      2           8          8" in capsys.readouterr().out
    assert check("parallel=fsdp9", "--gpus-per-node", "8") == 2
    assert "9 ranks do not divide evenly over 2 nodes of 8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("hydra.launcher.nodez=3",), "did you mean hydra.launcher.nodes?"),
        (("hydra.launcher.nodes=x",), "write a whole number, such as 8"),
        (("hydra.launcher.nodes=0",), "choose 1 or more"),
        (("--gpus-per-node", "many"), "write --gpus-per-node 8"),
        (("--gpus-per-node",), "write --gpus-per-node 8"),
    ],
)
@pytest.mark.parametrize("multirun", [(), ("-m",)])
def test_faults_of_the_launcher(
    words: tuple[str, ...], fix: str, multirun: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check("hydra/launcher=danling_slurm", *multirun, *words) == 2
    err = capsys.readouterr().err
    assert f"fix: {fix}" in err or fix in " ".join(err.split())
    assert "Traceback" not in err


@pytest.mark.parametrize("key", ["hydra.launcher.detach", "hydra.launcher", "hydra/launcher",
                                 "hydra/launcher=danling_slurm"])  # fmt: skip
def test_launchers_are_explained(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", key]) == 0
    assert "danling_slurm" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["hydra.launcher.detahc", "hydra/launcher=danling_slum", "hydra.nothing"])
def test_what_is_no_launcher(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", key]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_value_of_a_launchers_setting(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hydra/launcher=danling_slurm", "hydra.launcher.nodes=2"]
    assert main(["explain", "hydra.launcher.nodes", TRAIN, *words]) == 0
    assert "hydra.launcher.nodes = 2" in capsys.readouterr().out
