"""The public functions of the builders, in one place."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from danling_conf import builders


@pytest.mark.parametrize("name", builders.__all__)
def test_each_name_resolves_and_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(builders, name))
    assert re.search(rf"\b{name}\b", builders.__doc__ or ""), f"the module's docstring does not mention {name}"


def test_all_that_is_imported_is_public() -> None:
    tree = ast.parse(Path(builders.__file__).read_text())
    imports = [item for node in tree.body if isinstance(node, ast.ImportFrom) for item in node.names]
    assert {item.asname or item.name for item in imports} - {"annotations"} == set(builders.__all__)
