"""`danling-conf explain` and `danling-conf check`: what a user reads, and what the command exits with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from danling_conf.cli.main import main
from danling_conf.config.typed import setting_paths
from danling_conf.schema import RunnerConfig

pytestmark = [pytest.mark.composition, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
TRAIN = str(REPOSITORY / "examples" / "train.py")

PLAIN = """
from hydra import main

@main(version_base=None, config_path=".", config_name="mine")
def app(config):
    raise SystemExit("the app was run")

if __name__ == "__main__":
    app()
"""
OWN = '''
from dataclasses import dataclass
import danling_conf

@danling_conf.register
@dataclass(kw_only=True)
class OwnConfig(danling_conf.RunnerConfig):
    """Ours."""
    width: int = 512
    """Features of a layer."""

@danling_conf.main(config_path="conf", config_name="train")
def app(config):
    raise SystemExit("the app was run")

if __name__ == "__main__":
    app()
'''


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A script with plain `@hydra.main` and a file of its own."""
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "mine.yaml").write_text("defaults:\n  - danling\n  - _self_\nsteps: 7\noptim:\n  lr: 0.5\n")
    return str(tmp_path / "plain.py")


@pytest.fixture
def own(tmp_path: Path) -> str:
    """A script with a class, a group and a recipe of its own."""
    conf = tmp_path / "conf"
    (conf / "model").mkdir(parents=True)
    (conf / "recipe").mkdir()
    (conf / "train.yaml").write_text("defaults:\n  - own_config\n  - model: small\n  - _self_\nsteps: 7\n")
    (conf / "model" / "small.yaml").write_text("depth: 2\n")
    (conf / "model" / "large.yaml").write_text("depth: 20\n")
    recipe = "# @package _global_\ndefaults:\n  - override /parallel: fsdp8\nmax_grad_norm: 2.0\n"
    (conf / "recipe" / "sharded.yaml").write_text(recipe)
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


Lines = tuple[int, list[str], str]
Command = Callable[..., Lines]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command: exit code, lines of output, text of errors."""

    def run(*arguments: str) -> Lines:
        code = main(list(arguments))
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err

    return run


def test_a_setting(command: Command) -> None:
    code, lines, err = command("explain", "fsdp.reshard_after_forward")
    assert (code, err) == (0, "")
    assert lines[0] == "fsdp.reshard_after_forward"
    assert "  type     bool | int | None" in lines
    assert "  default  unset" in lines
    assert "  read by  danling_conf.parallel.fsdp" in lines
    assert any("Unset" in line for line in lines)  # the doc of the field


def test_choices_and_aliases_of_a_setting(command: Command) -> None:
    _, lines, _ = command("explain", "stack")
    assert "  choices  auto, ddp, parallel, graph, deepspeed" in lines
    assert "  aliases  torch = ddp, ds = deepspeed" in lines


def test_a_choice_with_a_number_is_listed(command: Command) -> None:
    lines = command("explain", "compile.memory_policy")[1]
    assert "  choices  default, full, eager, budget:X (X from 0 to 1)" in lines


def test_a_section_lists_its_settings_and_its_presets(command: Command) -> None:
    code, lines, _ = command("explain", "compile")
    assert code == 0
    assert "    compile.mode: str | None = unset" in lines
    assert "    compile.enable: bool = false" in lines
    assert "presets (compile=NAME)" in lines
    assert "  none (default)" in lines
    assert "      mode=max-autotune" in lines


def test_a_group_without_a_section_of_its_name(command: Command) -> None:
    code, lines, _ = command("explain", "tracking")
    assert code == 0
    assert lines[0] == "presets (tracking=NAME)"
    assert "      wandb.mode=offline" in lines


def test_a_preset(command: Command) -> None:
    assert command("explain", "compile=max")[1] == [
        "compile=max",
        "  Compile each block with max-autotune: the fastest kernels for long runs, at the longest compile",
        "  time.",
        "  enable=true",
        "  mode=max-autotune",
    ]


def test_layouts(command: Command) -> None:
    _, lines, _ = command("explain", "parallel")
    assert "layout names (parallel=NAME)" in lines
    assert any("fsdp64_tp8_pp2" in line for line in lines)
    _, lines, _ = command("explain", "parallel=hsdp2x4_tp2")
    assert lines[0] == "parallel=hsdp2x4_tp2"
    assert {
        "  parallel.axes.replicate=2",
        "  parallel.axes.shard=4",
        "  parallel.axes.tensor=2",
        "  fsdp.enabled=true",
    } < {*lines}


def test_free_form_sections_have_no_default_to_show(command: Command) -> None:
    _, lines, _ = command("explain", "model")
    assert "  default  empty" in lines
    assert "object at" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("key", "path", "fix"),
    [
        ("optim.lrr", "optim.lrr", "did you mean optim.lr?"),
        ("comple", "comple", "did you mean compile?"),
        ("compile=mx", "compile=mx", "choose among none, default, max"),
        ("stack=ddp", "stack=ddp", "groups are parallel, fsdp, deepspeed, compile"),
        ("parallel=fsp8", "parallel=fsp8", "write single, or ddpN"),
        ("qqqqqq", "qqqqqq", "see a training script's --help"),
        ("_target_", "_target_", "fix: "),
        ("", "KEY", "fix: "),
    ],
)
def test_a_key_that_is_none(command: Command, key: str, path: str, fix: str) -> None:
    code, lines, err = command("explain", key)
    assert (code, lines) == (2, [])
    assert err.splitlines()[:2] == ["configuration refused: 1 fault", f"  {path}"]
    assert fix in err
    assert err.count("fix: ") == 1


@pytest.mark.parametrize(
    ("key", "overrides", "expected"),
    [
        (
            "fsdp.enabled",
            ["parallel=fsdp8"],
            ["  fsdp.enabled = true", "    base or primary config own_config: false", "    parallel=fsdp8: true"],
        ),
        (
            "max_grad_norm",
            ["+recipe=sharded", "max_grad_norm=3"],
            [
                "  max_grad_norm = 3.0",
                "    base or primary config own_config: null",
                "    recipe=sharded: 2.0",
                "    command line max_grad_norm=3",
            ],
        ),
        (
            "steps",
            [],
            ["  steps = 7", "    base or primary config own_config: null", "    base or primary config train: 7"],
        ),
        (
            "stack",
            ["+recipe=sharded"],
            [
                "  stack = parallel",
                "    base or primary config own_config: auto",
                "    resolution: parallel (derived, or the canonical spelling)",
            ],
        ),
        (
            "precision",
            ["precision=bfloat16"],
            [
                "  precision = bf16",
                "    base or primary config own_config: null",
                "    command line precision=bfloat16",
                "    resolution: bf16 (derived, or the canonical spelling)",
            ],
        ),
        (
            "width",
            ["width=3"],
            ["  width = 3", "    base or primary config own_config: 512", "    command line width=3"],
        ),
        ("model.depth", ["model=large"], ["  model.depth = 20", "    model=large: 20"]),
        ("optim.betas", [], ["  optim.betas = [0.9, 0.95]", "    optim=adamw: [0.9, 0.95]"]),
        (
            "dataloader.val.batch_size",
            ["dataloader.val.batch_size=3"],
            ["  dataloader.val.batch_size = 3", "    command line dataloader.val.batch_size=3"],
        ),
    ],
)
def test_value_and_origin_in_an_app(
    command: Command, own: str, key: str, overrides: list[str], expected: list[str]
) -> None:
    code, lines, err = command("explain", key, own, *overrides)
    assert (code, err) == (0, "")
    assert lines[0] == key
    place = lines.index(f"in own.py {' '.join(overrides)}".rstrip())
    assert lines[place + 1 :] == expected


def test_a_setting_of_ones_own_has_its_doc(command: Command, own: str) -> None:
    _, lines, _ = command("explain", "width", own)
    assert lines[:4] == ["width", "  Features of a layer.", "  type     int", "  default  512"]
    assert "  read by  your own code" in lines


def test_a_section_in_an_app_shows_all_its_values(command: Command, own: str) -> None:
    _, lines, _ = command("explain", "optim", own, "optim=sgd", "optim.lr=0.2")
    assert lines[-5:] == [
        "  optim.type = sgd",
        "  optim.lr = 0.2",
        "  optim.weight_decay = null",
        "  optim.param_groups = null",
        "  optim.momentum = 0.9",
    ]


def test_a_group_of_the_app(command: Command, own: str) -> None:
    assert command("explain", "recipe", own)[1] == ["recipe: a group of this app", "  choices  sharded"]
    code, _, err = command("explain", "recipe=shrded", own)
    assert code == 2
    assert "choose among sharded" in err


def test_a_plain_hydra_script(command: Command, plain: str) -> None:
    code, lines, err = command("explain", "optim.lr", plain, "optim=sgd")
    assert (code, err) == (0, "")
    assert lines[-5:] == [
        "in plain.py optim=sgd",
        "  optim.lr = 0.5",
        "    base or primary config danling: 0.001",
        "    optim=sgd: 0.1",
        "    base or primary config mine: 0.5",
    ]


def test_explaining_runs_nothing_and_leaves_the_process_as_it_was(command: Command, own: str, plain: str) -> None:
    before = list(sys.argv), list(sys.path)
    for script in (own, plain):
        assert command("explain", "steps", script)[0] == 0  # the app would have exited with a text
        assert command("explain", "steps", script, "stepz=1")[0] == 2
    assert (sys.argv, sys.path) == before


def test_an_app_whose_configuration_is_refused(command: Command, own: str) -> None:
    code, lines, err = command("explain", "steps", own, "steps=abc", "accum_steps=0", "+parallel.axes.shrad=4")
    assert (code, lines) == (2, [])
    assert err.startswith("configuration refused: 3 faults\n")
    assert "steps=abc" in err
    assert "accum_steps=0" in err
    assert "did you mean parallel.axes.shard?" in err


@pytest.mark.parametrize("what", ["explain", "check"])
def test_a_script_that_is_none(command: Command, tmp_path: Path, what: str) -> None:
    key = ["steps"] if what == "explain" else []
    code, _, err = command(what, *key, "/no/such/train.py")
    assert code == 2
    assert "SCRIPT=/no/such/train.py\n      there is no such file" in err
    (tmp_path / "other.py").write_text("print('nothing here')\n")
    code, _, err = command(what, *key, str(tmp_path / "other.py"))
    assert code == 2
    assert "it ran without starting an app" in err


def test_check_accepts(command: Command, own: str) -> None:
    code, lines, err = command("check", own, "parallel=fsdp8", "compile=max", "gc.generation=2")
    assert (code, err) == (0, "")
    assert lines[0] == "accepted: own.py parallel=fsdp8 compile=max gc.generation=2"
    assert lines[1].startswith("layout fsdp8, 8 processes; config ")
    assert {"  parallel.axes.shard=8", "  compile.mode=max-autotune", "  steps=7", "  model.depth=2"} <= {*lines}
    assert "  width=512" not in lines  # a default
    assert [line for line in lines if line.startswith("warning: ")] == [
        "warning: gc.generation has no effect: collection is not paced (gc.interval=null)"
    ]


def test_check_refuses(command: Command, own: str) -> None:
    code, lines, err = command("check", own, "steps=3", "epochs=2", "parallel=ddp4", "parallel.axes.shard=2")
    assert (code, lines) == (2, [])
    assert "configuration refused: 2 faults" in err
    assert "add epochs=null" in err or "add steps=null" in err
    assert "Traceback" not in err


def test_check_names_the_same_run_as_the_command_would_make(command: Command, own: str) -> None:
    ids = []
    for overrides in (["optim.lr=0.1"], ["optim.lr=0.1", "steps=9"], ["optim.lr=0.2"]):
        ids.append(command("check", own, *overrides)[1][1].split("config ")[1].split(","))
    (config, job), (longer, longer_job), (other, _) = ids
    assert config == longer != other  # the budget is no part of a run's identity
    assert job != longer_job


def test_the_example(command: Command) -> None:
    code, lines, err = command("explain", "fsdp.enabled", TRAIN, "parallel=fsdp8")
    assert (code, err) == (0, "")
    assert lines[-2:] == ["    base or primary config train_config: false", "    parallel=fsdp8: true"]
    assert command("check", TRAIN, "task=digits", "optim=sgd", "scheduler=plateau", "epochs=5")[0] == 0


def test_the_command_as_it_is_installed(tmp_path: Path) -> None:
    """Neither explaining nor checking imports torch."""
    code = (
        "import sys; from danling_conf.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for arguments, expected in (
        (["check", TRAIN], 0),
        (["explain", "stack", TRAIN], 0),
        (["check", TRAIN, "stepz=1"], 2),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == expected, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [[], ["check"], ["nonsense"]])
def test_a_command_line_that_is_not_complete(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 2
    assert "usage: danling-conf" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_loop_of_the_apps_own_needs_no_budget(
    flags: list[str], plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(plain).parent / "mine.yaml"
    config.write_text("width: 3\n")
    assert main(["check", plain, "+parallel=fsdp2", *flags]) == 0
    assert "fsdp2" in capsys.readouterr().out
    config.write_text("defaults: [danling, _self_]\n")
    assert main(["check", plain, "parallel=fsdp2", *flags]) == 2
    assert "a run needs a budget" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["check"], ["explain", "steps"]])
def test_flags_of_hydra_pass_through(command: list[str], own: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(own).parent / "conf" / "other.yaml").write_text("defaults:\n  - own_config\n  - _self_\nsteps: 77\n")
    assert main([*command, own, "-cn", "other", "optim.lr=0.5"]) == 0
    assert "77" in capsys.readouterr().out


def test_what_writes_checkpoints_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "checkpoint.backend"]) == 0
    assert "every rank writes its shards" in " ".join(capsys.readouterr().out.split())


def test_explain_without_a_key_lists_groups_and_settings(capsys):
    shown = explained(capsys)
    assert "  compile: none, default, max, reduce_overhead, whole, aot_eager" in shown
    assert "  hydra/launcher: danling_local, danling_slurm" in shown
    listed, section = set(), ""
    for line in shown.split("\nsettings", 1)[1].splitlines()[1:]:
        if line.startswith("    "):
            listed.add(f"{section}{line.strip().partition(':')[0]}")
        elif line:
            section = "" if line == "  at the root" else f"{line.strip()}."
    assert set(setting_paths(RunnerConfig)) <= listed


def test_explain_a_launcher_shows_its_defaults(capsys):
    shown = explained(capsys, "hydra/launcher=danling_slurm")
    assert "hydra.launcher.timeout_min: int = 60" in shown
    assert "hydra.launcher.partition: str | None = unset" in shown


def test_explain_by_a_word(capsys):
    shown = explained(capsys, "--search", "Warm-Up")
    assert "scheduler.warmup_steps: int | None = unset" in shown
    assert "scheduler=wsd" in shown
    assert "hydra.launcher.timeout_min" in explained(capsys, "--search", "time limit of a job")
    assert main(["explain", "--search", "xyzzy"]) == 2
    assert "--search=xyzzy" in capsys.readouterr().err


def test_the_schema_needs_no_more_than_composing(capsys, own):
    assert main(["schema"]) == 0
    assert "definitions" in capsys.readouterr().out
    assert main(["schema", own]) == 0
    assert '"large"' in capsys.readouterr().out


def explained(capsys, *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    return capsys.readouterr().out
