"""The grammar of layout names, both ways."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danling_conf.groups.layout_names import (
    EXAMPLES,
    LayoutNameError,
    looks_like_layout,
    name_of,
    parse_layout,
)
from danling_conf.schema import FILL, Layout

degree = st.integers(1, 4096)
above_one = st.integers(2, 4096)
others = {"tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "expert", "etp": "expert_tensor"}


@st.composite
def named(draw):
    """A name in the order of the grammar, its parts, and the layout it stands for."""
    parts: list[str] = []
    degrees: dict[str, int] = {}
    data = draw(st.sampled_from(["none", "ddp", "fsdp", "hsdp", "ddp-filled", "fsdp-filled"]))
    if data == "ddp":
        degrees["replicate"] = draw(above_one)
        parts.append(f"ddp{degrees['replicate']}")
    elif data == "fsdp":
        degrees["shard"] = draw(degree)
        parts.append(f"fsdp{degrees['shard']}")
    elif data == "hsdp":
        degrees["replicate"], degrees["shard"] = draw(above_one), draw(degree)
        parts.append(f"hsdp{degrees['replicate']}x{degrees['shard']}")
    elif data == "ddp-filled":
        degrees["replicate"] = FILL
        parts.append("ddp")
    elif data == "fsdp-filled":
        degrees["shard"] = FILL
        parts.append("fsdp")
    for word, axis in others.items():
        if draw(st.booleans()):
            degrees[axis] = draw(above_one)
            parts.append(f"{word}{degrees[axis]}")
    layout = Layout(fsdp=data.startswith(("fsdp", "hsdp")), **degrees)
    return parts, layout


@given(named())
def test_a_name_and_its_layout_are_one(case):
    parts, layout = case
    name = "_".join(parts) or "single"
    assert parse_layout(name) == layout
    assert name_of(layout) == name
    assert looks_like_layout(name)


@given(named(), st.randoms())
def test_the_order_of_the_parts_does_not_matter(case, random):
    parts, layout = case
    if parts:
        random.shuffle(parts)
        assert parse_layout("_".join(parts)) == layout
        assert looks_like_layout("_".join(parts))


layouts = st.builds(
    Layout,
    **{axis: st.sampled_from([FILL, 1, 2, 3, 8]) for axis in Layout().degrees()},
    fsdp=st.booleans(),
)


@given(layouts)
def test_any_layout_has_a_name_that_means_it_or_none(layout):
    """A layout without a name is one that the grammar cannot say."""
    filled = [axis for axis, size in layout.degrees().items() if size == FILL]
    sayable = (
        set(filled) <= {"replicate", "shard"}
        and (layout.fsdp or layout.shard == 1)
        and not (layout.fsdp and layout.replicate != 1 and filled)
    )
    if sayable:
        assert parse_layout(name_of(layout)) == layout
    else:
        with pytest.raises(ValueError, match="no layout name"):
            name_of(layout)


def test_what_names_mean():
    assert parse_layout("single") == Layout()
    assert parse_layout("ddp8") == Layout(replicate=8)
    assert parse_layout("fsdp") == Layout(shard=FILL, fsdp=True)
    assert parse_layout("hsdp4x8") == Layout(replicate=4, shard=8, fsdp=True)
    assert parse_layout("fsdp64_tp8_pp2") == Layout(shard=64, tensor=8, pipeline=2, fsdp=True)
    assert parse_layout("etp2_ep4_cp3") == Layout(expert_tensor=2, expert=4, context=3)


def test_the_names_offered_are_names():
    assert len({parse_layout(name) for name in EXAMPLES}) == len(EXAMPLES)
    assert all(name_of(parse_layout(name)) == name for name in EXAMPLES)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fsdp8x", "'8x'"),
        ("fsdp0", "'0'"),
        ("fsdp08", "'08'"),
        ("fsdp-1", "'-1'"),
        ("fsdp2.5", "'2.5'"),
        ("ddp\uff18", "'\uff18'"),  # a digit of another script
        ("fsdp8\n", "'8\\n'"),
        ("hsdp8", "replicate x shard"),
        ("hsdp", "replicate x shard"),
        ("hsdp2x", "''"),
        ("hsdpx2", "did you mean hsdp?"),
        ("hsdp2x2x2", "'2x2'"),
        ("fsdp8_fsdp8", "second of ddp, fsdp, hsdp"),
        ("ddp2_fsdp4", "second of ddp, fsdp, hsdp"),
        ("fsdp8_tp2_tp4", "second tp"),
        ("tp", "needs a degree"),
        ("fsdp8_pp", "needs a degree"),
        ("fsdp8_", "''"),
        ("fsdp8__tp2", "''"),
        ("_fsdp8", "''"),
        ("fsdp8_single", "'single'"),
        ("single_tp2", "'single'"),
        ("fpsd8", "did you mean fsdp8?"),
        ("fdsp8_tp2", "did you mean fsdp8?"),
        ("FSDP8", "grammar"),
        ("fsdp8-tp2", "'8-tp2'"),
        ("fsdp8 tp2", "'8 tp2'"),
        ("", "grammar"),
        ("8", "grammar"),
        ("tensor2", "grammar"),
    ],
)
def test_a_bad_name_gets_one_line_that_names_its_fault(name, said):
    with pytest.raises(LayoutNameError) as caught:
        parse_layout(name)
    message = str(caught.value)
    assert said in message
    assert repr(name) in message
    assert "\n" not in message


@given(st.text(max_size=12))
def test_any_text_is_a_name_or_refused_in_one_line(text):
    try:
        layout = parse_layout(text)
    except LayoutNameError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert parse_layout(text) == layout


@pytest.mark.parametrize("name", ["mine", "single_node", "default", "cluster_a", "fsdp_mine", "my8"])
def test_names_of_files_of_a_user(name):
    """Names with words outside the grammar are a user's own, unless they begin like a layout."""
    assert looks_like_layout(name) == (name in ("single_node", "fsdp_mine"))
