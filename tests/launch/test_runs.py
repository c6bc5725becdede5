"""A command and its run: nothing overwritten, one live attempt, what an attempt holds, true exit codes."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import APP, PLAIN_APP, Ranks, attempts, run, runs, started, wait_for

pytestmark = pytest.mark.slow


def settings(root: Path, do: str = "nothing", *more: str) -> list[str | Path]:
    return [APP, "steps=3", f"workspace_root={root}", f"data.do={do}", *more]


def result_of(directory: Path) -> dict[str, Any]:
    return json.loads((attempts(directory)[-1] / "result.json").read_text())


def test_the_same_command_again_is_another_run(tmp_path: Path) -> None:
    command = settings(tmp_path)
    for _ in range(3):
        done = run(command, cwd=tmp_path)
        assert done.code == 0, done.text
    first = runs(tmp_path)[0]
    assert [path.name for path in runs(tmp_path)] == [first.name, f"{first.name}.2", f"{first.name}.3"]
    assert [len(attempts(path)) for path in runs(tmp_path)] == [1, 1, 1]
    assert len({json.loads((path / "run.json").read_text())["seed"] for path in runs(tmp_path)}) == 3
    other = run([*command, "optim.lr=0.5"], cwd=tmp_path)
    assert other.code == 0
    assert [path.name.partition(".")[0] for path in runs(tmp_path)].count(first.name) == 3
    assert len(runs(tmp_path)) == 4


def test_a_resumed_run_has_another_attempt(tmp_path: Path) -> None:
    run(settings(tmp_path), cwd=tmp_path)
    (directory,) = runs(tmp_path)
    before = {path: path.read_bytes() for path in attempts(directory)[0].rglob("*") if path.is_file()}
    again = run(settings(tmp_path, "nothing", f"resume={directory}"), cwd=tmp_path)
    assert again.code == 0, again.text
    assert runs(tmp_path) == [directory]
    assert len(attempts(directory)) == 2
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_run_has_one_live_attempt(tmp_path: Path) -> None:
    with started(settings(tmp_path, "wait", f"data.ranks={tmp_path}"), cwd=tmp_path) as process:
        (pid,) = Ranks(tmp_path).wait(1, process).values()
        (directory,) = runs(tmp_path)
        again = ["wait", f"data.ranks={tmp_path}"]
        for how in (f"resume={directory}", "auto_resume=true"):
            second = run(settings(tmp_path, *again, how), cwd=tmp_path)
            assert second.code == 2, second.text
            assert f"the run is live: process {pid} on " in second.err
            assert "fix: wait for it, or end it" in second.err
            assert "Traceback" not in second.err
        assert len(attempts(directory)) == 1
        process.kill()
        process.communicate()
    # Its lock ends with it, however it ended.
    other = [f"data.ranks={tmp_path}", f"resume={directory}", "optim.lr=2"]
    third = run(settings(tmp_path, "wait", *other), cwd=tmp_path)
    assert "optim.lr=2" in third.err
    assert "live" not in third.err


def git(folder: Path, *arguments: str) -> str:
    """A git command in a repository of the test's own."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the app in a git repository, committed."""
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copy(APP, folder / "app.py")
    git(folder, "init", "--quiet")
    git(folder, "add", "app.py")
    git(folder, "commit", "--quiet", "-m", "The app")
    return folder


def test_what_an_attempt_holds(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "ws"
    command = [repository / "app.py", *settings(root, "nothing", "optim.lr=0.25", "experiment=mine")[1:]]
    done = run(command, cwd=repository)
    assert done.code == 0, done.text
    (directory,) = runs(root)
    assert directory.parent == root / "lin" / "mine"
    (attempt,) = attempts(directory)
    names = {".hydra", "app.log", "canonical.json", "config.yaml", "difference.yaml", "frozen.json", "rank-0.log",
             "result.json"}  # fmt: skip
    assert {item.name for item in attempt.iterdir()} == names
    assert {item.name for item in (attempt / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    given = yaml.safe_load((attempt / ".hydra" / "overrides.yaml").read_text())
    assert given[-2:] == ["optim.lr=0.25", "experiment=mine"]
    config = yaml.safe_load((attempt / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["stack"], config["steps"]) == (0.25, "ddp", 3)
    assert json.loads((attempt / "canonical.json").read_text()) == config
    difference = yaml.safe_load((attempt / "difference.yaml").read_text())
    assert difference["optim.lr"] == 0.25
    assert difference["experiment"] == "mine"
    assert "seed" not in difference
    frozen = json.loads((attempt / "frozen.json").read_text())
    assert frozen["config"] == config
    assert frozen["code_id"] == git(repository, "rev-parse", "HEAD")[:12]
    assert result_of(directory) == {"status": "completed", "score": 0.25, "error": None}
    # Nothing beside the run: no outputs/, nothing in the working directory.
    assert sorted(item.name for item in repository.iterdir()) == [".git", "app.py"]
    assert sorted(item.name for item in root.rglob("*") if item.parent == root) == ["lin"]


def test_changed_code_is_recorded_with_the_attempt_and_not_in_the_path(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "ws"
    command = [repository / "app.py", *settings(root)[1:]]
    run(command, cwd=repository)
    with open(repository / "app.py", "a") as script:
        script.write("# changed\n")
    done = run([*command, f"resume={runs(root)[0]}"], cwd=repository)
    assert done.code == 0, done.text
    first, second = attempts(runs(root)[0])
    assert not (first / "git.diff").exists()
    assert "+# changed" in (second / "git.diff").read_text()
    codes = [json.loads((attempt / "frozen.json").read_text())["code_id"] for attempt in (first, second)]
    assert codes[1].startswith(f"{codes[0]}-d")


def test_an_error_of_the_users_function_is_shown_with_its_trace(tmp_path: Path) -> None:
    done = run(settings(tmp_path, "fail"), cwd=tmp_path)
    assert done.code == 1
    assert "RuntimeError: this job is broken" in done.err
    assert done.err.count("Traceback") == 1
    assert f"run failed: {runs(tmp_path)[0]}" in done.err
    assert result_of(runs(tmp_path)[0]) == {
        "status": "failed", "score": None, "error": "RuntimeError: this job is broken"
    }  # fmt: skip
    assert "this job is broken" in (attempts(runs(tmp_path)[0])[0] / "rank-0.log").read_text()


def test_an_exit_of_the_users_function_is_the_commands(tmp_path: Path) -> None:
    assert run(settings(tmp_path, "exit"), cwd=tmp_path).code == 7
    assert result_of(runs(tmp_path)[0])["status"] == "failed"


@pytest.mark.parametrize("do", ["return a mapping", "return nan"])
def test_what_is_no_number_is_no_score(tmp_path: Path, do: str) -> None:
    assert run(settings(tmp_path, do), cwd=tmp_path).code == 0
    text = (attempts(runs(tmp_path)[0])[0] / "result.json").read_text()
    assert json.loads(text, parse_constant=_no_constant) == {"status": "completed", "score": None, "error": None}


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_ctrl_c(tmp_path: Path) -> None:
    with started(settings(tmp_path, "wait", f"data.ranks={tmp_path}"), cwd=tmp_path) as process:
        Ranks(tmp_path).wait(1, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"interrupted; the run so far: {runs(tmp_path)[0]}" in err
    assert "Traceback" not in out + err
    assert result_of(runs(tmp_path)[0])["status"] == "interrupted"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resume=/no/such/run", "resume=/no/such/run"),
        ("workspace_root=/proc/nowhere", "workspace_root=/proc/nowhere"),
        ("optim.lr=abc", "optim.lr=abc"),
    ],
)
def test_a_refused_command_leaves_nothing(tmp_path: Path, override: str, message: str) -> None:
    done = run([*settings(tmp_path / "ws"), override], cwd=tmp_path)
    assert done.code == 2, done.text
    assert message in done.err
    assert "fix: " in done.err
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_setting_that_does_nothing_is_said(tmp_path: Path) -> None:
    done = run(settings(tmp_path, "nothing", "gc.generation=2", "compile.memory_policy=default"), cwd=tmp_path)
    assert done.code == 0
    lines = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2
    assert any("gc.generation" in line and "not paced" in line for line in lines)
    assert any("memory_policy" in line and "nothing is compiled" in line for line in lines)


def test_attempts_at_the_same_second_do_not_meet(tmp_path: Path) -> None:
    """Many starts of one configuration at once: each its own run."""
    with started(settings(tmp_path), cwd=tmp_path) as one, started(settings(tmp_path), cwd=tmp_path) as two:
        codes = [process.wait(60) for process in (one, two)]
    assert codes == [0, 0]
    wait_for(lambda: len(runs(tmp_path)) == 2, "both runs")


def test_an_app_that_exits_well_has_completed(tmp_path: Path) -> None:
    done = run([APP, "steps=3", f"workspace_root={tmp_path}", "data.do=exit well"], cwd=tmp_path)
    assert (done.code, "failed" in done.text) == (0, False)
    (attempt,) = attempts(runs(tmp_path)[0])
    assert json.loads((attempt / "result.json").read_text()) == {"status": "completed", "score": None, "error": None}


def test_a_name_can_be_that_of_hydra_s_job(tmp_path: Path) -> None:
    given = ["experiment=${hydra:job.name}", "lineage=${hydra.job.name}-${steps}", "data.a.b=[1,${hydra:job.name}]"]
    done = run([APP, "steps=3", f"workspace_root={tmp_path}", *given], cwd=tmp_path)
    assert done.code == 0, done.text
    (directory,) = runs(tmp_path)
    assert directory.parent == tmp_path / "rank_app-3" / "rank_app"
    (attempt,) = attempts(directory)
    assert json.loads((attempt / "frozen.json").read_text())["config"]["data"]["a"]["b"] == [1, "rank_app"]


def test_composing_leaves_hydra_as_it_was() -> None:
    from hydra.core.hydra_config import HydraConfig

    import danling_conf

    before = HydraConfig.instance().cfg
    assert danling_conf.compose(["steps=3", "experiment=${hydra:job.name}"]).experiment == "app"
    assert HydraConfig.instance().cfg is before


def test_a_runner_alone_says_what_a_command_says_and_needs_its_world(tmp_path: Path) -> None:
    given = [f"workspace_root={tmp_path}", "steps=1", "log=false"]
    done = run([PLAIN_APP, *given, "gc.generation=0"], cwd=tmp_path)
    assert done.code == 0, done.text
    assert "warning: gc.generation has no effect: collection is not paced" in done.err
    before = runs(tmp_path)
    done = run([PLAIN_APP, *given, "parallel=ddp4"], cwd=tmp_path)
    assert done.code == 1
    assert "its degrees multiply to 4 processes, and this process is alone" in done.err
    assert runs(tmp_path) == before
