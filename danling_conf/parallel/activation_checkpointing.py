"""Activation checkpointing of the repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from danling_conf._torch_private.dispatch import operators
from danling_conf.components.instantiate import section_from
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.topology.violation import SettingError

# Products of a layer with its weight: every second one is computed again, which halves what is kept of them for little
# time. An operator that this torch does not have is left out.
_PRODUCTS = ("aten.mm", "aten.addmm", "aten._scaled_mm")
# What is always kept.
_EXPENSIVE = (
    "aten.bmm",
    "aten.baddbmm",
    "aten._grouped_mm",
    "aten._scaled_dot_product_flash_attention",
    "aten._scaled_dot_product_efficient_attention",
    "aten._scaled_dot_product_cudnn_attention",
    "aten._scaled_dot_product_flash_attention_for_cpu",
    "aten._scaled_dot_product_fused_attention_overrideable",
    "higher_order.flex_attention",
)

COMPILED = "_compiled_forward"
"""Attribute of a block with its forward as compiled inside of the recomputation, where that is how it is compiled."""


def chosen(model: nn.Module, section: ActivationCheckpointingConfig) -> list[str]:
    """Names of the blocks that recompute their activations, as `section.mode` says: all, or the n-th, 2n-th, ... one.

    Raises SettingError where the model has no repeated blocks, or fewer than `every_n`.
    """
    if section.mode == "none":
        return []
    blocks = [name for name, _ in repeated_blocks(model)]
    if section.mode == "every_n":
        found, blocks = len(blocks), blocks[section.every_n - 1 :: section.every_n]
        if found and not blocks:
            raise SettingError(
                "activation_checkpointing.every_n",
                section.every_n,
                f"{type(model).__name__} has {found} repeated blocks, so that none is recomputed",
                f"choose a number up to {found}",
            )
    if not blocks:
        raise SettingError(
            "activation_checkpointing.mode",
            section.mode,
            f"{type(model).__name__} has no repeated blocks to recompute",
            "keep them in a ModuleList of one class, or use activation_checkpointing=none",
        )
    return blocks


def apply(model: nn.Module, section: ActivationCheckpointingConfig, names: Sequence[str] | None = None) -> nn.Module:
    """Recompute activations of the model's repeated blocks in the backward pass, as `section.mode` says. In place.

    A block's `forward` is replaced, the block is not wrapped: names, classes and state-dict keys stay as they were.
    `names` are the blocks `chosen` of the whole model, where `model` is a stage of it. Raises SettingError as `chosen`
    does.
    """
    wanted = set(chosen(model, section) if names is None else names)
    options: dict[str, Any] = {"use_reentrant": False}
    if section.mode == "selective":
        options["context_fn"] = partial(_contexts, *_operators(section.keep_ops))
    for block in (block for name, block in repeated_blocks(model) if name in wanted):
        block._recompute_options = options  # type: ignore[assignment]
        # A method of the block, so that a deep copy of the model has its own; and a Python function, so that dynamo,
        # which skips torch's own frames, has one to compile.
        block.forward = MethodType(_recomputed_forward, block)
    return model


def is_recomputed(block: nn.Module) -> bool:
    """Whether `apply` has made this block recompute its activations."""
    return hasattr(block, "_recompute_options")


def from_keywords(**keywords: Any) -> partial[nn.Module]:
    """`activation_checkpointing` as `hydra.utils.instantiate` reads it: a partial that waits for the model."""
    section = section_from(ActivationCheckpointingConfig, keywords, path="activation_checkpointing")
    return partial(apply, section=section)


def _recomputed_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    compute: Any = getattr(self, COMPILED, None) or type(self).forward
    return checkpoint(partial(compute, self), *args, **self._recompute_options, **kwargs)  # type: ignore


def _contexts(kept: frozenset[Any], alternating: frozenset[Any]) -> Any:
    """The two contexts of one pass through a block: of `alternating` operators the first, third, ... call is kept."""
    # Forward and recomputation count for themselves, and each pass anew: both decide alike.
    counts = {False: 0, True: 0}

    def keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in alternating:
            counts[context.is_recompute] += 1
            kept_this_time = counts[context.is_recompute] % 2 == 1
        else:
            kept_this_time = operator in kept
        return CheckpointPolicy.MUST_SAVE if kept_this_time else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(keep)


def _operators(names: Sequence[str] | None) -> tuple[frozenset[Any], frozenset[Any]]:
    """Those that are always kept, and those of which every second call is."""
    if names is None:
        always, alternating = (
            frozenset(overload for name in group for overload in _overloads(name)) for group in (_EXPENSIVE, _PRODUCTS)
        )
        return always, alternating
    kept: set[Any] = set()
    for index, name in enumerate(names):
        overloads = _overloads(name)
        if not overloads:
            raise SettingError(
                f"activation_checkpointing.keep_ops[{index}]",
                name,
                "torch.ops has no such operator",
                "write namespace.operator or namespace.operator.overload, such as aten.mm.default",
            )
        kept.update(overloads)
    return frozenset(kept), frozenset()


def _overloads(name: str) -> list[Any]:
    """The operators that a name stands for: one overload, or all of an operator. Empty where there is none."""
    found: Any = torch.ops
    parts = name.removeprefix("torch.ops.").split(".")
    if not 2 <= len(parts) <= 3:
        return []
    for part in parts:
        found = getattr(found, part, None)
        if found is None:
            return []
    return operators(found)
