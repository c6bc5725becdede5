"""Installing is all the registration there is: the wheel and an editable install, seen from an app elsewhere.

The app is plain Hydra and never imports this package; a copy of the examples runs what it holds itself. Nothing is
downloaded: what the package depends on is borrowed from the environment of the tests.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.support.command_line import PLAIN, REPOSITORY, write_configs

pytestmark = pytest.mark.slow

TRAIN = "defaults:\n  - danling\n  - _self_\nsteps: 3\n"
ALONE = "defaults:\n  - parallel: fsdp8\n  - optim: sgd\n  - _self_\nsteps: 3\n"
GROUPS = ("parallel", "fsdp", "compile", "checkpoint", "dataloader", "optim", "scheduler", "profiling", "heartbeat",
          "comm", "gc", "ft", "tracking")  # fmt: skip


def call(*command: str | Path, folder: Path, **variables: str) -> str:
    """Run a command without this repository in sight; returns its output."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COMP_", "VIRTUAL"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder, env={**kept, **variables}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the repository."""
    copied = tmp_path_factory.mktemp("sources")
    for name in ("danling_conf", "hydra_plugins"):
        shutil.copytree(REPOSITORY / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copied / name)
    return copied


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    built = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, sources, folder=sources)
    (file,) = built.glob("*.whl")
    return file


def environment(folder: Path, *install: str | Path) -> Path:
    """A fresh environment with the package installed in it, and its dependencies borrowed; returns its Python."""
    call(sys.executable, "-m", "venv", folder, folder=folder.parent)
    python = folder / "bin" / "python"
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", *install,
         folder=folder, PYTHONPATH=borrowed(folder))  # fmt: skip
    inside = Path(
        call(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", folder=folder).strip()
    )
    (inside / "zz_borrowed.pth").write_text(f"{borrowed(folder)}\n")
    return python


def borrowed(folder: Path) -> str:
    """The packages of the tests' own environment without this one, whose editable install would be found as well."""
    links = folder.parent / f"{folder.name}-borrowed"
    if not links.exists():
        links.mkdir()
        for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
            if "danling" not in package.name and package.suffix != ".pth" and package.name != "__pycache__":
                (links / package.name).symlink_to(package)
    return str(links)


@pytest.fixture(scope="module")
def from_wheel(wheel, tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("environments") / "wheel", wheel)


@pytest.fixture(scope="module")
def editable() -> Path:
    """The environment of the tests: `make test` installs the package there as editable."""
    url = json.loads(importlib.metadata.distribution("danling-conf").read_text("direct_url.json") or "{}")
    assert url.get("dir_info", {}).get("editable"), "run the tests in an environment with `pip install --editable .`"
    return Path(sys.executable)


@pytest.fixture(params=["from_wheel", "editable"])
def python(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture
def app(tmp_path) -> Path:
    """A plain Hydra app in a folder of its own."""
    import hydra

    version_base = "version_base=None" if hydra.__version__.startswith("1.3") else ""
    app = tmp_path / "app.py"
    app.write_text(PLAIN.format(version_base=version_base))
    write_configs(tmp_path, {"train": TRAIN, "alone": ALONE, "parallel/mine": "# @package _global_\n"})
    return app


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"danling_conf", "hydra_plugins"}
    assert "hydra_plugins/__init__.py" not in names  # it is Hydra's namespace
    assert "hydra_plugins/danling_conf_plugin/__init__.py" in names
    assert "danling_conf/py.typed" in names
    packaged = {name for name in names if name.startswith("danling_conf/")}
    sources = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "danling_conf").rglob("*.py")}
    projects = (REPOSITORY / "danling_conf" / "cli" / "projects").rglob("*")
    sources |= {str(path.relative_to(REPOSITORY)) for path in projects if path.is_file()}
    assert packaged == sources | {"danling_conf/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_installed_package_is_the_one_that_is_imported(from_wheel, editable, tmp_path):
    code = "import danling_conf; print(danling_conf.__file__)"
    assert Path(call(from_wheel, "-c", code, folder=tmp_path).strip()).is_relative_to(from_wheel.parents[1])
    assert Path(call(editable, "-c", code, folder=tmp_path).strip()).is_relative_to(REPOSITORY / "danling_conf")


@pytest.mark.parametrize("name", ["benchmarks", "conf", "docs", "examples", "models", "tasks", "tests"])
def test_nothing_else_of_the_repository_can_be_imported(python, tmp_path, name):
    """Such a name would shadow a user's own folder."""
    code = f"import importlib.util as u; s = u.find_spec({name!r}); print(*(s and s.submodule_search_locations or []))"
    for found in call(python, "-c", code, folder=tmp_path).split():
        assert Path(found) not in (REPOSITORY / name, REPOSITORY / "examples" / name)


def test_modules_and_files_of_the_package_are_found(python, tmp_path):
    """By import hooks too: Hydra walks its namespace package, and typing marks are read as resources."""
    code = (
        "import importlib.resources as r, pkgutil, hydra_plugins, hydra_plugins.danling_conf_plugin.local_launcher\n"
        "assert r.files('danling_conf').joinpath('py.typed').is_file()\n"
        "assert 'danling_conf_plugin' in [m.name for m in pkgutil.iter_modules(hydra_plugins.__path__)]\n"
    )
    call(python, "-c", code, folder=tmp_path)


@pytest.fixture
def copied(tmp_path) -> Path:
    """The examples and their configurations in a folder of a user's own, who has changed the task `digits`."""
    for name in ("examples", "conf"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    task = tmp_path / "examples" / "tasks" / "digits.py"
    changed = task.read_text().replace("by chance", "in my own copy")
    assert changed != task.read_text()
    task.write_text(changed)
    return tmp_path


@pytest.mark.parametrize(
    "started",
    [
        ("examples/train.py",),
        ("examples/train.py", "parallel=ddp2", "dataloader=workers", "dataloader.num_workers=1"),
        ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "examples/train.py", "parallel=ddp"),
    ],
    ids=["alone", "local workers", "torchrun"],
)
def test_a_copy_of_the_examples_runs_its_own_code(python, copied, started):
    shown = call(python, *started, "task=digits", "epochs=1", folder=copied, OMP_NUM_THREADS="1")
    assert "in my own copy" in shown


def test_a_copied_script_is_checked_with_what_lies_beside_it(python, copied):
    script, settings = copied / "examples" / "train.py", copied / "examples" / "settings_of_mine.py"
    settings.write_text("STEPS = 7\n")
    text = script.read_text().replace(
        "import danling_conf\n", "import danling_conf\nfrom settings_of_mine import STEPS\n"
    )
    script.write_text(text.replace('    task_name: str = "lm"\n', '    task_name: str = "lm"\n    mine: int = STEPS\n'))
    command = python.with_name("danling-conf")
    assert "accepted" in call(command, "check", "examples/train.py", "mine=8", folder=copied)
    assert "7" in call(command, "explain", "mine", "examples/train.py", folder=copied)


def test_groups_in_help(python, app):
    shown = call(python, app, "--help", folder=app.parent)
    for group in GROUPS:
        assert f"\n{group}: " in shown
    assert "\ncompile: aot_eager, default, max, none, reduce_overhead, whole" in shown
    assert "mine" in next(line for line in shown.splitlines() if line.startswith("parallel: "))


def test_search_path(python, app):
    shown = call(python, app, "--info", "searchpath", folder=app.parent)
    assert shown.count("danling://") == 1
    assert shown.index("file://") < shown.index("danling://")


@pytest.mark.parametrize(
    ("line", "expected", "absent"),
    [
        ("app.py para", {"parallel=", "parallel."}, {"optim="}),
        ("app.py parallel=fs", {"parallel=fsdp", "parallel=fsdp8", "parallel=fsdp8_tp8_pp2"}, {"parallel=ddp8"}),
        ("app.py parallel=mi", {"parallel=mine"}, {"parallel=fsdp"}),
        ("app.py compile=", {"compile=max", "compile=none"}, set()),
        ("app.py optim.", {"optim.lr=", "optim.weight_decay="}, set()),
        ("app.py fsdp.mp", {"fsdp.mp_policy="}, set()),
    ],
)
def test_shell_completion(python, app, line, expected, absent):
    line = f"python {line}"
    shown = call(python, app, "-sc", "query=bash", folder=app.parent, COMP_LINE=line, COMP_POINT=str(len(line)))
    offered = set(shown.split())
    assert expected <= offered
    assert offered.isdisjoint(absent)


def test_an_app_runs_with_our_names(python, app):
    arguments = ("parallel=hsdp2x4", "fsdp=bf16", "compile=max", "hydra.run.dir=out")
    assert call(python, app, *arguments, folder=app.parent) == "axes 2 4 1 1 1 True\n"


def test_an_app_without_the_base_config_has_the_groups(python, app):
    shown = call(python, app, "--config-name", "alone", "--cfg", "job", folder=app.parent)
    assert "shard: 8" in shown
    assert "momentum: 0.9" in shown


def test_the_command_is_installed(python, app):
    command = python.with_name("danling-conf")
    assert "fsdp.reshard_after_forward" in call(command, "explain", "fsdp.reshard_after_forward", folder=app.parent)
    assert "accepted" in call(command, "check", app, "parallel=fsdp2", folder=app.parent)


def test_a_new_project_is_written_and_accepted(python, tmp_path):
    command = python.with_name("danling-conf")
    for task in ("classification", "lm", "hf"):
        assert "python train.py" in call(command, "init", task, "--task", task, folder=tmp_path)
        assert "accepted" in call(command, "check", f"{task}/train.py", "parallel=fsdp8", folder=tmp_path)
