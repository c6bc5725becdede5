"""Documented settings act: for each, `proofs.tsv` names the test that fails when it stops doing so."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.support.settings import documented

TESTS = Path(__file__).parents[1]
LINES = [line for line in Path(__file__).with_name("proofs.tsv").read_text().splitlines() if not line.startswith("#")]
PROOFS = dict(line.split("\t") for line in LINES)


@cache
def functions(file: Path) -> set[str]:
    return {item.name for item in ast.parse(file.read_text()).body if isinstance(item, ast.FunctionDef)}


def test_every_documented_setting_has_a_proof() -> None:
    assert len(PROOFS) == len(LINES)
    wanted = {row.path for row in documented()}
    assert wanted - PROOFS.keys() == set()
    assert PROOFS.keys() - {row.path for row in documented()} == set()


@pytest.mark.parametrize("proof", sorted(set(PROOFS.values())))
def test_the_proof_is_there(proof: str) -> None:
    file, _, function = proof.partition("::")
    assert function in functions(TESTS / file)
