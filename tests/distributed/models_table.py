"""Table of models and layouts in docs/models.md: what became of each, and what it must say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"
LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2", "cp2")
EXACT = 2e-5
"""Largest relative error in fp32: the order of summation differs between layouts, nothing else."""

WITHOUT_PLAN = r"parallel\.axes\.tensor=2 nothing lays .* out over the tensor axis"
NO_CUT = r"parallel\.axes\.pipeline .* which does not say how to cut it"
OF_OTHERS = r"parallel\.axes\.pipeline stage \d of .* does not run without the modules of the others"
OWN_ATTENTION = r"parallel\.axes\.context=2 .* does not call the attention that reaches over the context axis"
NO_POSITIONS = r"parallel\.axes\.context=2 .* has no argument positions"
LATER = r"parallel\.axes\.context .* attends to what comes later"
WINDOW = r"parallel\.axes\.context .* attends by .*, and context parallelism to all that came before"
NO_CONTEXT = r"parallel\.axes\.context=2 nothing lays .* out over the context axis"
KINDS = (WITHOUT_PLAN, NO_CUT, OF_OTHERS, OWN_ATTENTION, NO_POSITIONS, LATER, WINDOW, NO_CONTEXT)
"""Refusals that differ in names only."""

OF_MICROBATCHES = (
    "as in one process that accumulates the microbatches (`accum_steps`): batch normalisation sees the samples of one, "
    "of which a warning names the first module"
)

SETTINGS: dict[str, dict[str, Any]] = {
    **{name: {"unused_parameters": "allow"} for name in ("BERT", "RoBERTa", "ALBERT", "DeBERTa", "BART", "Pegasus")},
    **{name: {"sync_batch_norm": True} for name in ("ConvNet", "U-Net", "ResNet")},
}
"""By model, what must be set in the section `parallel` for it to be what one process trains."""


@dataclass(frozen=True)
class Outcome:
    """What became of a model under a layout: the largest relative error against one process, or why there is none."""

    error: float | None = None
    refused: str | None = None
    failed: str | None = None

    def __str__(self) -> str:
        if self.error is not None:
            return f"{self.error:.0e}"
        return f"refused: {self.refused}" if self.refused else f"FAILED: {self.failed}"


_HEAD = """# Models

What becomes of models that nobody here wrote, small and in fp32, under layouts of two ranks: families of transformers,
then modules of torch in the ways users write them (`tests/support/families.py`). `equal`: bitwise the same initial
weights, and the same gradients and weights after two steps as in one process, to a relative error of {error:g}.
`refused`: before the first step, by the sentence below the table, which names the first such model.

`ddp2` and `fsdp2` are data axes, `tp2` splits layers by the model's own plan, `pp2` is a pipeline, and `cp2` splits
sequences. Two models with two optimizers are `examples/gan.py`, which trains the same under `ddp2` and `fsdp2`
(`tests/examples/test_gan.py`).

This file is written by `python -m tests.distributed.test_foreign_models`.

"""


def write(found: Mapping[tuple[str, str], Outcome]) -> None:
    """Write the table. Raises AssertionError where an outcome is neither equal nor refused."""
    sentences: dict[str, str] = {}
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = [_cell(name, layout, found[name, layout], sentences) for layout in LAYOUTS]
        settings = ", ".join(f"`parallel.{key}={str(value).lower()}`" for key, value in SETTINGS.get(name, {}).items())
        rows.append([name, *cells, settings])
    head = ["Model", *(f"`{layout}`" for layout in LAYOUTS), "With, on data axes"]
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    listed = [f"{number}. {text}" for number, text in enumerate(sentences.values(), 1)]
    text = _HEAD.format(error=EXACT) + "\n".join([*lines, "", *listed]) + "\n"
    DOCUMENT.write_text(text)


def _cell(name: str, layout: str, outcome: Outcome, sentences: dict[str, str]) -> str:
    if outcome.error is not None and outcome.error <= EXACT:
        if layout != "pp2" or "sync_batch_norm" not in SETTINGS.get(name, {}):
            return "equal"
        sentences.setdefault(OF_MICROBATCHES, OF_MICROBATCHES)
        return f"equal ({list(sentences).index(OF_MICROBATCHES) + 1})"
    assert outcome.refused is not None, f"{name} under {layout}: {outcome}"
    kind = next((kind for kind in KINDS if re.search(kind, outcome.refused)), outcome.refused)
    sentences.setdefault(kind, outcome.refused)
    return f"refused ({list(sentences).index(kind) + 1})"


def read() -> dict[str, dict[str, str]]:
    """The words of the table in the document: by model, by layout."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCUMENT.read_text().splitlines()
            if line.startswith("| ")]  # fmt: skip
    head = [cell.strip("`") for cell in rows[0]]
    words = [[re.sub(r" \(\d+\)$", "", cell) for cell in row] for row in rows[2:]]
    return {row[0]: {name: cell for name, cell in zip(head, row, strict=True) if name in LAYOUTS} for row in words}
