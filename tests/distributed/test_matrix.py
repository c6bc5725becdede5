"""Every layout trains what a single process trains on the same global batch: the parity matrix, cell by cell."""

from __future__ import annotations

import random

import pytest

from danling_conf.groups.layout_names import parse_layout
from tests.distributed.cells import TOLERANCE, Cell
from tests.distributed.matrix import (
    BEGIN,
    CELLS,
    CONTROLS,
    DOCUMENT,
    END,
    LAYOUTS,
    accepted,
    by_world_size,
    drawn,
    error_of,
    passes,
    table,
)

pytestmark = pytest.mark.slow

DRAWN = 4
SEED = random.SystemRandom().randrange(2**32)


@pytest.mark.parametrize("cell", by_world_size(CELLS), ids=str)
def test_a_cell_is_what_one_process_makes(cell: Cell) -> None:
    assert passes(cell, error_of(cell))


@pytest.mark.parametrize("cell", by_world_size(CONTROLS), ids=str)
def test_a_mistake_is_noticed(cell: Cell) -> None:
    assert passes(cell, error_of(cell))


@pytest.mark.parametrize("number", range(DRAWN))
def test_layouts_drawn_at_random_are_what_one_process_makes(number: int) -> None:
    cell = by_world_size(drawn(DRAWN, SEED))[number]
    print(f"layout {cell.layout}, drawn with seed {SEED}: python -m tests.distributed.matrix none --random {DRAWN} "
          f"--seed {SEED}")  # fmt: skip
    assert passes(cell, error_of(cell))


def test_the_matrix_has_every_axis_and_only_layouts_that_the_rules_accept() -> None:
    layouts = [parse_layout(name) for name in LAYOUTS]
    assert all(accepted(layout) for layout in layouts)
    assert len(CELLS) >= 40
    for axis in layouts[0].degrees():
        assert any(getattr(layout, axis) > 1 for layout in layouts)


def test_the_document_has_the_table_of_this_matrix() -> None:
    text = DOCUMENT.read_text()
    shown = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    wanted = table(dict.fromkeys((cell.layout for cell in CELLS), 0.0)).splitlines()
    # All but the numbers, which are those of the machine that wrote it: python -m tests.distributed.matrix --write
    assert [row.split("|")[1:4] for row in shown] == [row.split("|")[1:4] for row in wanted]
    assert all(float(row.split("|")[4]) <= TOLERANCE["fp32"] for row in shown[2:])
