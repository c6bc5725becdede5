"""The table in docs/models.md says what the tests prove."""

from __future__ import annotations

from tests.distributed.models_table import LAYOUTS, read
from tests.distributed.test_foreign_models import EQUAL, REFUSED
from tests.support.families import FAMILIES, MODULES


def test_it_has_every_model_and_agrees_with_what_is_tested() -> None:
    found = read()
    assert list(found) == [*FAMILIES, *MODULES]
    for layout in LAYOUTS:
        assert {name for name in EQUAL[layout] if found[name][layout] != "equal"} == set()
        assert {name for name in REFUSED.get(layout, ()) if found[name][layout] != "refused"} == set()
