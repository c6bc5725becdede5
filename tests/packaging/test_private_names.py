"""Private names of torch and Hydra are used in their adapters only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import danling_conf

PACKAGE = Path(danling_conf.__file__).parent
ADAPTERS = {
    "torch": sorted((PACKAGE / "_torch_private").glob("*.py")),
    "hydra": [PACKAGE / "config" / f"hydra_{name}.py" for name in ("adapter", "changes", "job")],
}
LIBRARIES = ("torch", "torchdata", "hydra")
# Their own attributes, without a module in front: a grep for `torch._x` does not see them.
ATTRIBUTES = {"_flatten", "_unflatten", "_cdata", "_iterator", "_shutdown_workers", "_get_closed_form_lr", "_schema"}
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "hydra_plugins").rglob("*.py")])


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def modules_bound(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `dist` for `torch.distributed`."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                bound[item.asname or item.name.partition(".")[0]] = (
                    item.name if item.asname else item.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for item in node.names:
                bound[item.asname or item.name] = f"{node.module}.{item.name}"
    return bound


def dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return None if before is None else f"{before}.{node.attr}"
    return None


def private_names(source: str) -> Iterator[str]:
    """Dotted private names of the libraries that a module imports or reads."""
    tree = ast.parse(source)
    bound = modules_bound(tree)
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [item.name for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{item.name}" for item in node.names]
        elif isinstance(node, ast.Attribute):
            if node.attr in ATTRIBUTES and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"....{node.attr}"
            if (path := dotted(node)) is not None:
                first, _, rest = path.partition(".")
                names.append(f"{bound.get(first, first)}.{rest}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(".")[0] in LIBRARIES:
            names.append(node.value)  # for importlib, patches and getattr
    for name in names:
        parts = name.split(".")
        if parts[0] in LIBRARIES and any(is_private(part) for part in parts[1:]):
            yield name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_private_names_stay_in_the_adapters(path: Path) -> None:
    allowed = {library for library, adapters in ADAPTERS.items() if path in adapters}
    found = {name for name in private_names(path.read_text())}
    outside = {name for name in found if name.split(".")[0] not in allowed}
    if "torch" in allowed:
        outside = {name for name in outside if name.startswith("hydra")}
    assert not outside, f"{path.name} uses {sorted(outside)}: move it to an adapter"


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils._pytree import tree_map",
        "import torch.utils._pytree",
        "import torch\ntorch.utils._pytree.tree_leaves([])",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "from torch import distributed\ndistributed.distributed_c10d._set_pg_timeout",
        "from torch.distributed import _functional_collectives as functional",
        "from torch.optim import lr_scheduler\nwith lr_scheduler._enable_get_lr_call(1): pass",
        "mesh._flatten('data')",
        "from hydra._internal.core_plugins.basic_sweeper import BasicSweeper",
        "import importlib\nimportlib.import_module('hydra._internal.hydra')",
    ],
)
def test_a_private_name_is_noticed(source: str) -> None:
    assert list(private_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "from torch.utils.data import Dataset\nclass Own(Dataset):\n    def size(self): return self._size",
        "from hydra.utils import instantiate\ninstantiate({'_target_': 'a'})",
        "from torch import nn\nnn.Module.__init__",
    ],
)
def test_public_and_own_names_are_not(source: str) -> None:
    assert not list(private_names(source))
