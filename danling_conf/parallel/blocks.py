"""The repeated blocks of a model: what is wrapped, compiled and recomputed one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import nn

from danling_conf.parallel.pass_through import PassThrough
from danling_conf.topology.violation import SettingError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_blocks(model: nn.Module, module_classes: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of `model` as (fully qualified name, module), in the model's order.

    Blocks are the children of a `ModuleList`, `ModuleDict` or `Sequential` that has at least two and whose children (in
    a pipeline stage, those that it holds) are all of one class that has parameters and is more than a layer of
    `torch.nn` without children (`Linear`). Containers within a block are not looked at, so that blocks never nest;
    several containers (encoder, decoder) are all found. A model without any gives an empty list.

    With `module_classes`, the modules of those classes instead, wherever they are; these may nest, outer ones first.
    Raises SettingError where a name matches nothing.
    """
    if module_classes is not None:
        return _of_classes(model, module_classes)
    blocks: list[tuple[str, nn.Module]] = []
    _collect(model, "", blocks, set())
    return blocks


def sharing_parameters(model: nn.Module, blocks: Iterable[nn.Module]) -> set[nn.Module]:
    """Those blocks that have a parameter in common with the rest of the model. FSDP2 refuses a parameter that two of
    its groups would hold."""
    # The whole model is counted once, not once a block.
    everywhere = _uses(model)
    return {block for block in blocks if any(everywhere[item] != count for item, count in _uses(block).items())}


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


def _collect(module: nn.Module, name: str, blocks: list[tuple[str, nn.Module]], seen: set[nn.Module]) -> None:
    if module in seen:
        return
    seen.add(module)
    children = [
        (f"{name}.{child_name}" if name else child_name, child) for child_name, child in module.named_children()
    ]
    if isinstance(module, _CONTAINERS) and _are_blocks([child for _, child in children]):
        blocks.extend((name, child) for name, child in children if not isinstance(child, PassThrough))
        return
    for child_name, child in children:
        _collect(child, child_name, blocks, seen)


def _are_blocks(children: list[nn.Module]) -> bool:
    if len(children) < 2:
        return False
    children = [child for child in children if not isinstance(child, PassThrough)]
    if len({type(child) for child in children}) != 1:
        return False
    # A list of lists has no forward: the blocks are further in.
    if isinstance(children[0], (nn.ModuleList, nn.ModuleDict)):
        return False
    return all(next(child.parameters(), None) is not None and not _is_plain_layer(child) for child in children)


def _is_plain_layer(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.") and next(module.children(), None) is None


def _of_classes(model: nn.Module, module_classes: Sequence[str]) -> list[tuple[str, nn.Module]]:
    present = {type(module).__name__ for name, module in model.named_modules() if name}
    absent = sorted(set(module_classes) - present)
    if absent:
        raise SettingError(
            "fsdp.module_classes",
            list(module_classes),
            f"{type(model).__name__} has no module of the class {' or '.join(absent)}",
            f"choose among its classes: {', '.join(sorted(present))}",
        )
    return [
        (name, module) for name, module in model.named_modules() if name and type(module).__name__ in module_classes
    ]
