"""The documented commands, as typed, with a tiny model: each runs once, and leaves the files that it promises.

One of each kind is trained here; `tests/documents/test_blocks.py` composes and checks every command of the documents.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from danling_conf.cli.main import main
from danling_conf.records.ledger import Ledger
from tests.support.commands import REPOSITORY, Result, attempts, run, runs, torchrun

pytestmark = pytest.mark.slow

TRAIN = str(REPOSITORY / "examples" / "train.py")
SMALL = ["model.width=16", "model.depth=2", "model.heads=2", "model.context=16", "data.val_fraction=0.01"]
SHORT = [*SMALL, "steps=4", "eval_interval=2"]
DIGITS = ["task=digits", "optim=sgd", "scheduler=plateau", "model.width=16"]

COMMANDS = {
    "single": [TRAIN, *SHORT],
    "torchrun": [*torchrun(TRAIN), "+recipe=lm_small_fsdp", "parallel=fsdp", *SHORT],
    "digits": [TRAIN, *DIGITS, "epochs=2"],
    "experts": [
        TRAIN,
        "parallel=fsdp2_ep2",
        "model.experts=4",
        "accum_steps=2",
        "max_grad_norm=1.0",
        *SHORT,
    ],
    # A library's model, and jobs of two shapes.
    "sweep": [
        TRAIN,
        "-m",
        "model=hf",
        "parallel=tp2,single",
        "model.config.hidden_size=16",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=2",
        "model.config.num_key_value_heads=2",
        "data.context=16",
        "data.val_fraction=0.01",
        "steps=2",
        "eval_interval=2",
    ],
}
RANKS = {"single": 1, "torchrun": 2, "digits": 1, "experts": 2}
"""How many processes each command trains on."""
SHARDED = {"torchrun": (1, 2), "experts": (1, 2)}
"""Degrees of replication and of sharding of the commands that shard; the others do neither."""

Commands = Callable[[str], Result]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Commands:
    """Runs each command once, in a folder of its own."""

    @cache
    def done(name: str) -> Result:
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        return run([*COMMANDS[name], f"workspace_root={folder / 'ws'}"], cwd=folder, limit=300)

    return done


def test_the_busiest_expert_is_shown(command: Commands) -> None:
    assert "busiest expert 1." in command("experts").text
    assert float(command("experts").last["train.expert_load"]) >= 1


def attempt_of(result: Result) -> Path:
    (attempt,) = attempts(result.run)
    return attempt


@pytest.mark.parametrize("name", RANKS)
def test_a_command_trains(command: Commands, name: str) -> None:
    done = command(name)
    assert done.code == 0, done.text
    assert done.last["step"] == ("88" if name == "digits" else "4")
    assert 0 < float(done.last["val.loss"]) < 20
    assert 0 < float(done.last["train.loss"]) < 20
    assert done.run.is_dir()
    assert "Traceback" not in done.text


@pytest.mark.parametrize("name", RANKS)
def test_every_rank_has_a_log_of_the_run(command: Commands, name: str) -> None:
    attempt = attempt_of(command(name))
    logs = sorted(path.name for path in attempt.glob("rank-*.log"))
    assert logs == [f"rank-{rank}.log" for rank in range(RANKS[name])]
    step = command(name).last["step"]
    for log in logs:
        text = (attempt / log).read_text()
        assert f"step {step}/{step}" in text
        assert f" {log.removesuffix('.log').replace('-', ' ')} step " in text


@pytest.mark.parametrize("name", RANKS)
def test_what_an_attempt_holds(command: Commands, name: str) -> None:
    attempt = attempt_of(command(name))
    names = {"config.yaml", "canonical.json", "difference.yaml", "frozen.json", "environment.json", "result.json",
             ".hydra", "train.log"}  # fmt: skip
    logs = {f"rank-{rank}.log" for rank in range(RANKS[name])}
    assert {item.name for item in attempt.iterdir()} - {"git.diff"} == names | logs
    result = json.loads((attempt / "result.json").read_text())
    assert result["status"] == "completed"
    facts = json.loads((attempt / "environment.json").read_text())
    assert (
        facts["packages"]["torch"] == facts["torch"].partition("+")[0] or facts["torch"] in facts["packages"]["torch"]
    )


@pytest.mark.parametrize("name", [*RANKS, "sweep"])
def test_the_run_is_the_only_output(command: Commands, name: str) -> None:
    """No outputs/, no multirun/."""
    assert [item.name for item in command(name).cwd.iterdir()] == ["ws"]
    assert [item.name for item in (command(name).cwd / "ws").iterdir()] == ["lin"]


@pytest.mark.parametrize("name", RANKS)
def test_the_layout_is_what_the_name_says(command: Commands, name: str) -> None:
    config = yaml.safe_load((attempt_of(command(name)) / "config.yaml").read_text())
    axes = config["parallel"]["axes"]
    assert config["fsdp"]["enabled"] == (name in SHARDED)
    assert (axes["replicate"], axes["shard"]) == SHARDED.get(name, (1, 1))


def test_other_settings_are_what_the_command_says(command: Commands) -> None:
    experts, recipe = (
        yaml.safe_load((attempt_of(command(name)) / "config.yaml").read_text()) for name in ("experts", "torchrun")
    )
    assert (experts["accum_steps"], experts["max_grad_norm"], experts["steps"]) == (2, 1.0, 4)
    assert (recipe["scheduler"]["type"], recipe["fsdp"]["mp_policy"]["param_dtype"]) == ("wsd", "bf16")


def test_what_a_user_reads(command: Commands) -> None:
    lines = command("single").out.splitlines()
    assert lines[0].startswith("step 1/4  loss ")
    assert any(line.startswith("step 4/4  val.loss ") for line in lines)
    assert any("bigram" in line for line in lines)
    assert "a sample:" in lines
    assert lines[-4].startswith("score val.loss ")
    assert lines[-3].startswith("run directory ws/lin/exp/")
    assert lines[-2].startswith(f"to resume: python {TRAIN} ")
    assert lines[-1].startswith("step=4 ")
    assert "val.accuracy" in command("digits").out


def test_the_score_of_digits_is_its_accuracy(command: Commands) -> None:
    done = command("digits")
    score = json.loads((attempt_of(done) / "result.json").read_text())["score"]
    assert score == pytest.approx(float(done.last["val.accuracy"]), rel=1e-3) or score > float(
        done.last["val.accuracy"]
    )
    assert 0.5 < score <= 1
    assert "score val.accuracy " in done.out


@pytest.mark.parametrize("name", ["torchrun", "digits"])
def test_a_run_goes_on_as_it_says(command: Commands, name: str) -> None:
    done = command(name)
    assert done.code == 0, done.text
    (line,) = [line for line in done.out.splitlines() if line.startswith("to resume: ")]
    program, *words = shlex.split(line.removeprefix("to resume: "))
    if program == "torchrun":
        assert words[:2] == ["--nproc-per-node", "2"]
        words = [*torchrun(), *words[2:]]
    again = run(words, cwd=done.cwd, limit=300)
    assert again.code == 0, again.text
    assert int(again.last["step"]) == 2 * int(done.last["step"])
    assert again.run == done.run
    assert f"resumed at step {done.last['step']} from " in again.out


def test_a_sweep(command: Commands) -> None:
    done = command("sweep")
    assert done.code == 0, done.text
    root = done.cwd / "ws"
    (sweep,) = root.glob("lin/exp/sweeps/*")
    jobs = list(Ledger(sweep).records().values())
    assert [job.status for job in jobs] == ["completed"] * 2
    assert all(job.score is not None and 0 < job.score < 20 for job in jobs)
    assert {job.run for job in jobs} == {path for path in runs(root)}
    assert len(runs(root)) == 2
    logs = [len(list(attempts(job.run)[0].glob("rank-*.log"))) for job in jobs if job.run is not None]
    assert logs == [2, 1]
    config = yaml.safe_load((attempts(runs(root)[0])[0] / "config.yaml").read_text())
    assert config["model"]["_target_"].startswith("transformers.")
    assert "sweep done: 2 of 2 jobs completed" in done.out


def test_two_budgets_on_a_command_line_are_refused(tmp_path: Path) -> None:
    """One alone wins over that of the task's file."""
    done = run([TRAIN, "task=digits", "steps=5", "epochs=2", f"workspace_root={tmp_path / 'ws'}"], cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert done.err.splitlines()[:2] == ["configuration refused: 1 fault", "  steps=5"]
    assert "epochs=2 is set as well" in done.err
    assert list(tmp_path.iterdir()) == []


def test_steps_in_the_place_of_the_epochs_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", TRAIN, "task=digits", "steps=2", "epochs=null"]) == 0
    assert "steps=2" in capsys.readouterr().out
