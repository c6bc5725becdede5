"""The schema is what the documentation lists: paths, types, defaults, a doc under each, a reader of each."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Optional

import pytest
from omegaconf import OmegaConf

from danling_conf.config.resolve import merge_leaves, resolve
from danling_conf.config.typed import check_declarations
from danling_conf.schema import RunnerConfig, facts_of
from danling_conf.schema.docs import describe, field_docs
from danling_conf.schema.launcher import LocalLauncherConfig, SlurmLauncherConfig
from danling_conf.schema.open_sections import open_sections
from danling_conf.topology.rules import Context
from tests.support.settings import Row, documented, given, nested, sections, settings

pytestmark = pytest.mark.composition

ROWS = {row.path: row for row in documented()}
SPLIT = "dataloader.<split>"
PLAIN_ROWS = [row for row in ROWS.values() if row.path != SPLIT]
TYPED_ROWS = [row for row in PLAIN_ROWS if row.type != "-"]

SOUND = {"bool": True, "int": 2, "float": 2.5, "str": "text", "list[str]": ["a"], "dict": {"a": 1},
         "list[dict]": [{"pattern": "a"}], "list[list[str]]": [["a"]]}  # fmt: skip
"""A value of each documented type."""
SOUND_AT = {"ft.heartbeat_timeout_ms": 200, "ft.outer_momentum": 0.5}
"""Values of settings that do not take those."""
UNSOUND = {"bool": "maybe", "int": "abc", "float": "abc", "str": {"a": 1}, "list[str]": {"a": 1}, "dict": 3,
           "list[dict]": 3, "list[list[str]]": ["a"]}  # fmt: skip
"""A value that is not of the type."""


def faults(*given_settings: tuple[str, object]) -> set[str]:
    """Paths of the settings whose name or type is refused; what values mean together is not looked at."""
    node = OmegaConf.structured(RunnerConfig)
    open_sections(node)
    tree = OmegaConf.to_container(OmegaConf.merge(*(nested(path, value) for path, value in given_settings)))
    violations = [*merge_leaves(node, tree, RunnerConfig), *check_declarations(node, RunnerConfig)]
    return {item.path for item in violations}


def types_of(row: Row) -> list[str]:
    return [name for name in row.type.split(" | ") if name != "None"]


def test_the_table_is_whole():
    assert len(ROWS) == len(documented()) == 126
    assert all(row.type and row.default for row in ROWS.values())


@pytest.mark.parametrize("row", PLAIN_ROWS, ids=lambda row: row.path)
def test_path_and_default(row: Row):
    found = describe(RunnerConfig, row.path)
    assert found is not None
    default = {"None": None, "-": None, "true": True, "false": False}.get(row.default, row.default)
    if found.default is None or isinstance(found.default, bool):
        assert found.default is default
    else:
        assert (type(found.default).__name__, str(found.default)) == (types_of(row)[0], default)
    assert given(RunnerConfig(), row.path) == found.default


def test_values_of_the_documented_types_are_taken():
    for number in range(3):  # bool | int | None: each of them
        values = []
        for row in TYPED_ROWS:
            facts = describe(RunnerConfig, row.path).facts
            name = types_of(row)[number % len(types_of(row))]
            values.append((row.path, facts.choices[-1] if facts.choices else SOUND_AT.get(row.path, SOUND[name])))
        assert faults(*values) == set()


def test_values_of_other_types_are_refused():
    """Each with its path, all at once."""
    values = [(row.path, {"a": 1} if len(types_of(row)) > 1 else UNSOUND[types_of(row)[0]]) for row in TYPED_ROWS]
    assert faults(*values) == {row.path for row in TYPED_ROWS}


def test_null_is_taken_where_it_is_documented():
    assert faults(*((row.path, None) for row in TYPED_ROWS)) == {row.path for row in TYPED_ROWS if not row.optional}


@pytest.mark.parametrize("row", [row for row in PLAIN_ROWS if row.type == "-"], ids=lambda row: row.path)
def test_a_mapping_or_null(row: Row):
    shape = describe(RunnerConfig, row.path).facts.shape
    for item in fields(shape):
        key = f"{row.path}.{item.name}"
        assert faults((key, facts_of(item).choices[-1] if facts_of(item).choices else True)) == set()
        assert faults((key, "nonsense")) == {key}
    assert faults((row.path, None)) == set()
    assert faults((row.path, 3)) == {row.path}
    assert faults((f"{row.path}.nonsense", 3)) == {f"{row.path}.nonsense"}


@pytest.mark.parametrize(("path", "value"), [("steps", 1.5), ("steps", True), ("accum_steps", "1e3"), ("log", 3.7)])
def test_numbers_and_booleans_are_not_mixed(path, value):
    assert faults((path, value)) == {path}


@pytest.mark.parametrize("split", ["train", "val", "validate", "a_split"])
def test_any_split_takes_typed_overrides(split):
    resolved = resolve({"steps": 1, "dataloader": {split: {"batch_size": 3, "shuffle": False}}}, context=Context())
    assert getattr(resolved.dataloader, split) == {"batch_size": 3, "shuffle": False}
    for wrong in (
        (f"dataloader.{split}.batch_size", "x"),
        (f"dataloader.{split}.batchsize", 3),
        (f"dataloader.{split}", 3),
    ):
        assert faults(wrong) == {wrong[0]}


@pytest.mark.parametrize("split", ["test-clean", "class", "_hidden", "2nd"])
def test_a_split_is_named_by_a_word(split):
    path = f"dataloader.{split}"
    assert faults((path, {"batch_size": 3})) == {path}


@pytest.mark.parametrize(("prefix", "kind"), list(sections()), ids=lambda value: str(value).rstrip(".") or "root")
def test_every_setting_has_a_doc(prefix, kind):
    """A doc under each field; it says what unset means; sections say what they are."""
    docs = field_docs(kind)
    for item in fields(kind):
        if item.name.startswith("_"):
            continue
        found = describe(RunnerConfig, prefix + item.name)
        assert found is not None
        assert len(found.doc) > 10, prefix + item.name
        if found.section is None or found.facts.shape:
            assert docs[item.name] == found.doc
            if item.default is None:
                assert "nset" in found.doc, f"the doc of {prefix}{item.name} does not say what unset means"


BY_ITERATION = {
    "danling_conf.components.dataloader": "fields(SplitDataloaderConfig)",
    "danling_conf.topology.layout": "degrees()",
}
"""Modules that read all settings of their section in a loop over their names, and the words that show it."""


def source_of(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin)
    files = path.parent.rglob("*.py") if path.name == "__init__.py" else [path]
    return "\n".join(file.read_text() for file in files)


@pytest.mark.parametrize("path", [path for path, _ in settings()])
def test_what_is_said_to_read_a_setting_reads_it(path):
    found = describe(RunnerConfig, path)
    assert found is not None
    assert found.read_by.startswith("danling_conf.")
    source = source_of(found.read_by)
    assert source is not None, f"{path} is read by {found.read_by}, which is not there"
    name = path.rpartition(".")[2]
    if path not in ("model", "data"):
        assert re.search(rf"\b{name}\b", source) or BY_ITERATION.get(found.read_by, "\0") in source


SECTIONS = [*dict.fromkeys(kind for _, kind in sections()), LocalLauncherConfig, SlurmLauncherConfig]


@pytest.mark.parametrize("kind", SECTIONS, ids=lambda kind: kind.__name__)
def test_readers_and_targets_can_be_imported(kind):
    """Found without importing them, since builders need torch."""
    assert source_of(kind.read_by) is not None, f"{kind.__name__} is read by {kind.read_by}"
    target = next((item.default for item in fields(kind) if item.name == "_target_"), None)
    if target is not None:
        module, _, name = target.rpartition(".")
        assert re.search(rf"^(def|class) {name}\b", source_of(module) or "", re.MULTILINE), target


@dataclass(kw_only=True)
class Own(RunnerConfig):
    width: Optional[int] = None
    """How wide. Unset: as wide as needed."""


def test_settings_of_a_user_are_described_as_theirs():
    found = describe(Own, "width")
    assert found is not None
    assert (found.type, found.doc, found.read_by) == (
        "int | None", "How wide. Unset: as wide as needed.", "your own code",
    )  # fmt: skip
    assert describe(Own, "steps").read_by == "danling_conf.runner"


@pytest.mark.parametrize("path", ["stepz", "optim.betas", "dataloader.shufle", "fsdp.enabled.x", "_target_", ""])
def test_what_is_no_setting_is_not_described(path):
    assert describe(RunnerConfig, path) is None
