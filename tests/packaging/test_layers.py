"""Imports run one way, and what needs no torch imports none."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import danling_conf
from tests.support.command_line import poisoned_torch, write_app

PACKAGE = Path(danling_conf.__file__).parent

COMPOSING = {"schema", "topology", "config", "records"}

ALLOWED = {
    "schema": set(),
    "groups": {"schema"},
    "topology": {"schema"},
    "config": {"schema", "groups", "topology"},
    "records": {"schema", "topology", "config"},
    "_torch_private": set(),
    "components": {"schema", "topology", "config", "_torch_private"},
    "parallel": {"schema", "topology", "_torch_private", "components"},
    "checkpoint": {"schema", "topology", "_torch_private", "components", "parallel"},
    "runner": {"schema", "topology", "config", "records", "_torch_private", "components", "parallel", "checkpoint"},
    "plan": COMPOSING | {"_torch_private", "components", "parallel", "checkpoint", "runner"},
    "builders": {"topology", "components", "parallel", "runner"},
    "launch": {"schema", "topology", "config", "records"},
    "sweep": {"schema", "topology", "config", "records", "launch"},
    "command": {"schema", "topology", "config", "records", "launch", "sweep"},
    "app": {"schema", "config", "launch", "command"},
    "cli": COMPOSING | {"groups", "checkpoint", "plan", "launch", "sweep", "command", "app"},
    "__init__": {"schema", "groups", "topology", "config", "checkpoint", "runner", "app"},
    "hydra_plugins": {"groups", "sweep"},
}
"""What each part of the house may import beside itself."""

DANLING = PACKAGE.parent / "tests" / "danling" / "fixtures" / "saved.yaml"

TORCH_FREE = {
    "schema", "groups", "topology", "config", "records", "sweep", "hydra_plugins", "command", "app", "__init__", "cli",
}  # fmt: skip


def parts() -> Iterator[tuple[str, Path]]:
    """Every module, with the part of the house that it is in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).parts
        yield (inside[0] if len(inside) > 1 else path.stem), path
    for path in sorted((PACKAGE.parent / "hydra_plugins").rglob("*.py")):
        yield "hydra_plugins", path


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def at_import(tree: ast.Module) -> Iterator[str]:
    """What is imported when the module is: not in functions, not for type checkers alone."""
    nodes: list[ast.AST] = list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(ast.Module(body=[node], type_ignores=[]))
        nodes += ast.iter_child_nodes(node)


def test_every_part_of_the_house_has_its_place():
    assert {part for part, _ in parts()} <= ALLOWED.keys()


@pytest.mark.parametrize(
    ("part", "path"), list(parts()), ids=lambda value: value if isinstance(value, str) else value.stem
)
def test_imports_run_one_way(part, path):
    for name in imported(ast.parse(path.read_text())):
        package, _, rest = name.partition(".")
        if package == "danling_conf":
            target = rest.partition(".")[0]
            known = target in ALLOWED or part != "__init__"
            assert not known or target == part or target in ALLOWED[part], f"{path} imports {name}"
        assert package != "examples"
        assert package != "tests"


def test_the_order_has_no_circle():
    """`ALLOWED` itself is an order: whoever may be imported comes before."""
    done: set[str] = set()
    while done != ALLOWED.keys():
        ready = {part for part, below in ALLOWED.items() if part not in done and below <= done}
        assert ready, f"a circle among {ALLOWED.keys() - done}"
        done |= ready


def test_no_circle_of_modules():
    """Nor among the modules of one part."""
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for part, path in parts()
        if part != "__init__"  # it imports nothing before a name is used
    }
    below = {
        name: {found for item in imported(ast.parse(path.read_text())) for found in (item, item.rpartition(".")[0])}
        & (modules.keys() - {name})
        for name, path in modules.items()
    }
    done: set[str] = set()
    while done != modules.keys():
        ready = {name for name in modules.keys() - done if below[name] <= done}
        assert ready, f"a circle among {sorted(modules.keys() - done)}"
        done |= ready


@pytest.mark.parametrize(("part", "path"), [case for case in parts() if case[0] in TORCH_FREE],
                         ids=lambda value: value if isinstance(value, str) else value.stem)  # fmt: skip
def test_no_torch_in_what_needs_none(part, path):
    names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert names.isdisjoint({"torch", "torchdata", "torchmetrics"})


@pytest.mark.parametrize("path", [path for part, path in parts() if part == "launch"], ids=lambda path: path.stem)
def test_launching_imports_torch_only_when_ranks_start(path):
    names = {name.partition(".")[0] for name in at_import(ast.parse(path.read_text()))}
    assert "torch" not in names


@pytest.mark.parametrize("path", [path for part, path in parts() if part == "runner"], ids=lambda path: path.stem)
def test_the_runner_knows_nothing_of_hydra(path):
    names = {name.partition(".")[0] for name in imported(ast.parse(path.read_text()))}
    assert names.isdisjoint({"hydra", "omegaconf"})


def test_no_submodule_has_the_name_of_an_export():
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert modules.isdisjoint(danling_conf.__all__)
    assert set(danling_conf.__all__) <= set(dir(danling_conf))


def in_fresh_interpreter(folder: Path, code: str) -> None:
    """Run code where importing torch raises."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(poisoned_torch(folder)), str(PACKAGE.parent)])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_poison_works(tmp_path):
    with pytest.raises(AssertionError, match="torch was imported"):
        in_fresh_interpreter(tmp_path, "import torch")


@pytest.mark.parametrize(
    "module",
    [
        *(f"danling_conf.{part}" for part in sorted(ALLOWED.keys() & TORCH_FREE - {"__init__", "hydra_plugins"})),
        "danling_conf.schema.torch_options",
        "danling_conf.groups.plugin",
        "danling_conf.topology.rules",
        "danling_conf.topology.machine",
        "danling_conf.config.check",
        "danling_conf.config.faults",
        "danling_conf.records.run_directory",
        "danling_conf.launch.execute",
        "danling_conf.sweep.submit",
        "danling_conf.launch.joined",
        "danling_conf.cli.main",
        "danling_conf.cli.explain",
        "danling_conf.cli.check",
        "danling_conf.cli.json_schema",
        "danling_conf.cli.init",
        "danling_conf.cli.import_danling",
        "danling_conf.cli.watch",
        "danling_conf.plan.figures",
        "danling_conf.plan.proposals",
        "danling_conf.cli.plan",
        "danling_conf.cli.report",
        "hydra_plugins.danling_conf_plugin",
        "hydra_plugins.danling_conf_plugin.local_launcher",
    ],
)
def test_importing_needs_no_torch(tmp_path, module):
    in_fresh_interpreter(tmp_path, f"import {module}")


def test_composing_checking_and_explaining_need_no_torch(tmp_path):
    app = write_app(tmp_path)
    code = f"""
import danling_conf
from danling_conf.cli.main import main
config = danling_conf.compose(["steps=3", "parallel=fsdp8", "fsdp=bf16", "optim=muon", "scheduler=wsd"])
assert config.parallel.axes.shard == 8
try:
    danling_conf.compose(["stepz=3", "optim.betass=[1]"])
except danling_conf.ConfigRefused as refused:
    assert len(refused.violations) == 3
else:
    raise SystemExit("accepted")
assert main(["check", {str(app)!r}, "steps=3", "parallel=fsdp8"]) == 0
assert main(["check", {str(app)!r}, "steps=abc"]) == 2
assert main(["explain", "fsdp.reshard_after_forward"]) == 0
assert main(["explain", "parallel"]) == 0
assert main(["explain"]) == 0
assert main(["schema", {str(app)!r}]) == 0
assert main(["init", "new"]) == 0
assert main(["check", "new/train.py"]) == 0
assert main(["import", {str(DANLING)!r}]) == 0
assert main(["explain", "fsdp.enabled", {str(app)!r}, "steps=3", "parallel=fsdp8"]) == 0
danling_conf.name_of(danling_conf.parse_layout("fsdp8_tp2"))
"""
    in_fresh_interpreter(tmp_path, code)
