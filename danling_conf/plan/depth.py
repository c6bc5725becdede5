"""Depth of a model: which of its repeated blocks are alike, and the same model with few of each kind.

Tracing every block of a deep model would take minutes, and blocks of one kind all do the same. A model is traced with
three and with four blocks of each kind; what a fourth one adds, each further one adds too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.init_plan import meta_copy

FEW = 3
"""Units that a run is cut to: a first one, a last one, and one that has a neighbour on either side."""
_LONGEST = 8
"""Blocks of the longest pattern that is looked for."""


@dataclass(frozen=True)
class Run:
    """Blocks that follow each other in one container, in a pattern that repeats."""

    blocks: tuple[str, ...]
    """Their names, in order."""
    period: int
    """Blocks of the pattern; 1 where all are alike."""

    @property
    def units(self) -> int:
        """How often the pattern repeats."""
        return len(self.blocks) // self.period

    @property
    def long(self) -> bool:
        """Whether it is cut to be traced."""
        return self.units > FEW + 1

    def kept(self, units: int) -> tuple[str, ...]:
        """Names of the blocks that are left of a long run."""
        return self.blocks[: units * self.period] if self.long else self.blocks

    def slot(self, index: int, units: int) -> int:
        """The place in a run of `units` of the block that does what block `index` of the whole run does: counted from
        the front for the first two units, from the back for the last two, and the third unit for those between."""
        unit, place = divmod(index, self.period)
        if not self.long or unit < 2:
            return index
        if unit >= self.units - 2:
            return (unit - self.units + units) * self.period + place
        return self.period + place


def runs_of(model: nn.Module, *, every: int = 1, stage_of: dict[str, int] | None = None) -> list[Run]:
    """The runs of a model's repeated blocks.

    Args:
        every: one block in so many is treated differently (activation checkpointing).
        stage_of: the pipeline stage of each block: a run does not reach into the next stage.
    """
    found: list[Run] = []
    blocks = repeated_blocks(model)
    group: list[tuple[str, object]] = []
    where: object = None
    for number, (name, block) in enumerate(blocks):
        place = (name.rpartition(".")[0], (stage_of or {}).get(name))
        if group and place != where:
            found += _split(group)
            group = []
        where = place
        group.append((name, (signature(block), number % every)))
    return found + _split(group)


def signature(block: nn.Module) -> object:
    """What two blocks have in common that are alike: classes, shapes and the settings that are plain values."""
    return tuple(
        (
            name,
            type(module).__qualname__,
            tuple((key, tuple(item.shape), item.dtype, item.requires_grad) for key, item in _own(module)),
            tuple(sorted((key, value) for key, value in vars(module).items() if _is_setting(key, value))),
        )
        for name, module in block.named_modules()
    )


def shortened(model: nn.Module, runs: Sequence[Run], units: Sequence[int]) -> nn.Module:
    """A copy of a model on the meta device in which each long run has so many units, and names of blocks are those of
    the copy where a list numbers them anew."""
    copy = meta_copy(model)
    for run, count in zip(reversed(runs), reversed(units), strict=True):
        kept = set(run.kept(count))
        container_name = run.blocks[0].rpartition(".")[0]
        container = copy.get_submodule(container_name) if container_name else copy
        for name in reversed(run.blocks):
            if name not in kept:
                key = name.rpartition(".")[2]
                if isinstance(container, nn.ModuleDict):
                    del container[key]
                else:
                    del container[int(key)]  # type: ignore[operator]
    return copy


def names_in(runs: Sequence[Run], units: Sequence[int]) -> list[list[str]]:
    """By run, the names that its blocks have in a model that was `shortened`: lists number theirs anew."""
    found: list[list[str]] = []
    taken: dict[str, int] = {}
    for run, count in zip(runs, units, strict=True):
        names = []
        for name in run.kept(count):
            container, _, key = name.rpartition(".")
            if key.isdecimal():
                key, taken[container] = str(taken.get(container, 0)), taken.get(container, 0) + 1
            names.append(f"{container}.{key}" if container else key)
        found.append(names)
    return found


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(recurse=False))


def _is_setting(key: str, value: object) -> bool:
    # A block's own number makes it no other kind.
    return key != "training" and "idx" not in key and "index" not in key and isinstance(value, (bool, int, float, str))


def _split(group: list[tuple[str, object]]) -> list[Run]:
    """The runs of blocks that follow each other: with one pattern if there is one, else of equal ones."""
    if not group:
        return []
    names, kinds = [name for name, _ in group], [kind for _, kind in group]
    for period in range(1, min(_LONGEST, len(kinds) // 2) + 1):
        whole = len(kinds) // period * period
        if all(kinds[place] == kinds[place % period] for place in range(len(kinds))):
            found = [Run(tuple(names[:whole]), period)]
            return [*found, Run(tuple(names[whole:]), len(names) - whole)] if whole < len(names) else found
    runs: list[Run] = []
    start = 0
    for place in range(1, len(kinds) + 1):
        if place == len(kinds) or kinds[place] != kinds[start]:
            runs.append(Run(tuple(names[start:place]), 1))
            start = place
    return runs
