"""Open sections: sections that accept undeclared keys, such as the options of an optimizer.

OmegaConf accepts such keys only without the struct flag, and then accepts typos too; config/ checks the keys
afterwards. The user's own mappings (`model`, `data`) are not opened where files can declare their keys: a key on the
command line must then be in a file, or have a `+`, as everywhere in Hydra.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from danling_conf.schema.runner import RunnerConfig
from danling_conf.schema.setting import facts_of

_PACKAGE = __name__.partition(".")[0] + "."


def open_sections(node: DictConfig, *, free: bool = False) -> None:
    """Let the open sections of a typed node accept undeclared keys; config/ checks them.

    Args:
        free: open the user's own mappings too: nothing declares their keys.
    """
    kind = OmegaConf.get_type(node)
    if _is_open(kind):
        OmegaConf.set_struct(node, False)
    ours = kind.__module__.startswith(_PACKAGE) and kind is not RunnerConfig  # whose mappings are the user's
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            if OmegaConf.get_type(child) is dict:
                if ours or free:
                    OmegaConf.set_struct(child, False)
            else:
                open_sections(child, free=free)


def _is_open(kind: Any) -> bool:
    if not is_dataclass(kind):
        return False
    # `fsdp.mp_policy.param_dtype=...` sets a key below a setting that is still unset, which a struct refuses.
    facts = [facts_of(item) for item in fields(kind)]
    return hasattr(kind, "open_to") or any(item.shape or dict in (item.kinds or ()) for item in facts)
