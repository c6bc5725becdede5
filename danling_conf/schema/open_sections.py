"""Open sections: sections that accept undeclared keys, such as the options of an optimizer.

OmegaConf accepts such keys only without the struct flag, and then accepts typos too; config/ checks the keys
afterwards.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from danling_conf.schema.setting import facts_of


def open_sections(node: DictConfig) -> None:
    """Let the open sections of a typed node accept undeclared keys; config/ checks them."""
    if _is_open(OmegaConf.get_type(node)):
        OmegaConf.set_struct(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            open_sections(child)


def _is_open(kind: Any) -> bool:
    if kind is dict:
        return True  # free-form sections: model, data, and mappings of a user's own
    if not is_dataclass(kind):
        return False
    # `fsdp.mp_policy.param_dtype=...` sets a key below a setting that is still unset, which a struct refuses.
    facts = [facts_of(item) for item in fields(kind)]
    return hasattr(kind, "open_to") or any(item.shape or dict in (item.kinds or ()) for item in facts)
