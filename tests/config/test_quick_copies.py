"""Quick copies hold what Python's own copies hold, and share nothing that can be changed."""

from __future__ import annotations

import copy

import pytest
from omegaconf import OmegaConf
from omegaconf.base import Metadata

from danling_conf.config.quick_copies import quick_copies
from danling_conf.schema import RunnerConfig

pytestmark = pytest.mark.composition


def metadata(node):
    content = node._value()
    inner = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    return [vars(node._metadata), *(metadata(child) for child in inner)]


def test_a_quick_copy_is_the_same_and_independent():
    node = OmegaConf.structured(RunnerConfig)
    OmegaConf.set_struct(node.optim, False)
    node._metadata.resolver_cache["now"]["%Y"] = "2026"
    usual = copy.deepcopy(node)
    with quick_copies(), quick_copies():
        quick = copy.deepcopy(node)
    assert not hasattr(Metadata, "__deepcopy__")
    assert metadata(quick) == metadata(usual) == metadata(node)
    assert quick == node
    assert quick.optim._parent is quick
    OmegaConf.set_struct(quick.optim, True)
    quick._metadata.resolver_cache["now"]["%Y"] = "2027"
    quick._metadata.resolver_cache["other"]["x"] = 1  # a dictionary that makes its entries, as the original
    quick.steps = 5
    assert metadata(usual) == metadata(node)
    assert node.steps is None
