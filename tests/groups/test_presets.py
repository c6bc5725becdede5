"""Presets: each composes, changes what it names and nothing else, and combines with any other in any order."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.identity import flatten
from danling_conf.config.resolve import inspect
from danling_conf.groups.presets import DEFAULT_CHOICES, GLOBAL, GROUPS
from danling_conf.topology.rules import Context, ineffective_settings

pytestmark = [pytest.mark.composition, pytest.mark.slow]

PRESETS = [(group, name) for group, presets in GROUPS.items() for name in presets]


@pytest.fixture(scope="module")
def composing():
    with composer(ConfigSearch(config_name="danling")) as opened:
        yield opened


def leaves(config):
    """Every setting and its value, Hydra's own left out."""
    tree = OmegaConf.to_container(config)
    return flatten({key: value for key, value in tree.items() if key != "hydra"})


@pytest.fixture(scope="module")
def under(composing):
    """The settings under one choice, such as `optim=sgd`; each is composed once."""
    return cache(lambda choice: leaves(composing.compose([choice, "steps=3"])))


def test_every_group_has_its_default_choice():
    assert DEFAULT_CHOICES.keys() == {"parallel", *GROUPS}
    assert all(DEFAULT_CHOICES[group] in presets for group, presets in GROUPS.items())


@pytest.mark.parametrize(("group", "name"), PRESETS, ids=lambda value: value)
def test_a_preset_changes_what_it_names(under, group, name):
    """Every setting it names has its value, and against the bare schema nothing else differs."""
    bare, changed = under(f"~{group}"), under(f"{group}={name}")
    preset = GROUPS[group][name]
    prefix = "" if preset.package == GLOBAL else f"{group}."
    named = {prefix + path: value for path, value in flatten(dict(preset.settings)).items()}
    assert {path: changed[path] for path in named} == named
    # A mapping that was unset is a leaf before and a branch after.
    different = {path for path, value in changed.items() if path not in bare or bare[path] != value}
    assert different <= named.keys()
    if name != DEFAULT_CHOICES[group]:
        assert different, f"{group}={name} changes nothing"
    assert preset.doc.endswith((".", "?"))


@pytest.mark.parametrize("group", GROUPS)
def test_presets_of_a_group_differ_from_each_other(under, group):
    names = list(GROUPS[group])
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            assert under(f"{group}={name}") != under(f"{group}={other}"), f"{group}={name} is {group}={other}"


@pytest.mark.parametrize(("group", "name"), PRESETS, ids=lambda value: value)
def test_a_preset_is_accepted_or_refused(composing, group, name):
    """In a layout where its section is in use: accepted without a word, or refused, as listed."""
    layout = "fsdp2" if group in ("fsdp", "comm") else "single"
    composed = composing.compose([f"{group}={name}", f"parallel={layout}", "steps=3"])
    config, violations = inspect(composed, context=Context())
    assert violations == []
    assert ineffective_settings(config, Context()) == []


choices = st.fixed_dictionaries({group: st.sampled_from(sorted(presets)) for group, presets in GROUPS.items()})
layouts = st.sampled_from(["single", "ddp4", "fsdp8", "hsdp2x2"])


@settings(max_examples=15, deadline=None)
@given(choices, layouts, st.randoms())
def test_any_presets_combine_in_any_order(composing, chosen, layout, random):
    """The order on the command line changes nothing, and each preset's settings are all there."""
    arguments = [f"{group}={name}" for group, name in chosen.items()] + [f"parallel={layout}", "steps=3"]
    shuffled = list(arguments)
    random.shuffle(shuffled)
    one, two = (composing.compose(order) for order in (arguments, shuffled))
    found = leaves(one)
    assert found == leaves(two)
    for group, name in chosen.items():
        preset = GROUPS[group][name]
        prefix = "" if preset.package == GLOBAL else f"{group}."
        for path, value in flatten(dict(preset.settings)).items():
            assert found[prefix + path] == value
    assert found["fsdp.enabled"] == layout.startswith(("fsdp", "hsdp"))
