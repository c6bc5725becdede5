from __future__ import annotations

import functools
import gc
import io
import logging
import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from danling_conf.parallel.init_plan import record, seeded
from danling_conf.parallel.initialize import materialize
from danling_conf.parallel.mesh import make
from danling_conf.parallel.model import assemble
from danling_conf.schema import Layout
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.topology.violation import SettingError
from tests.support.decoder import Decoder
from tests.support.families import MODULES
from tests.support.spawn import run

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def build(factory: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    """The model as a rank of several gets it: on the meta device first."""
    source = record(factory, seed)
    model = source.model
    assert all(tensor.device.type == "meta" for tensor in model.state_dict().values())
    materialize([model], device=CPU, source=source)
    return model


def plain(factory: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    with seeded(seed):
        return factory()


def assembled(model: Any, **changes: Any) -> nn.Module:
    arguments: dict[str, Any] = {
        "layout": Layout(),
        "mesh": None,
        "device": CPU,
        "seed": 1,
        "fsdp": FsdpConfig(),
        "compile": CompileConfig(),
        "activation_checkpointing": ActivationCheckpointingConfig(),
    }
    return assemble(model, **{**arguments, **changes}).module


def equal(first: nn.Module, second: nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# peft moves its adapters as no fake tensor is moved, so that such a model is built on the CPU.
@pytest.mark.parametrize("name", [name for name in MODULES if name != "LoRA (peft)"])
def test_a_replayed_construction_is_bitwise_a_plain_call(name: str) -> None:
    assert equal(build(MODULES[name]), plain(MODULES[name]))


def test_what_no_method_of_a_module_sets_is_replayed_too() -> None:
    for factory in (Decoder, Unset, Restyled, Counted, Listed, DrawingElsewhere, Additive, Halved):
        model, expected = build(factory, seed=3), plain(factory, seed=3)
        assert equal(model, expected), factory
        assert [vars(item).get("rates") for item in model.modules()] == [
            vars(item).get("rates") for item in expected.modules()
        ]


def test_values_follow_from_the_seed_and_leave_the_generators_alone() -> None:
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first = build(DrawingElsewhere)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), numpy.random.get_state()[1].tolist()) == state[1:]
    torch.manual_seed(5)
    assert equal(first, build(DrawingElsewhere))
    assert not (first.scale == build(DrawingElsewhere, seed=2).scale).any()


def test_a_single_process_calls_the_factory() -> None:
    assert equal(assembled(Decoder, seed=4), plain(Decoder, seed=4))


def test_no_more_than_one_tensor_lives_at_a_time() -> None:
    """Layers that are drawn when they are made, and drawn again when all are made, as models of libraries are."""

    class Redrawn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(20))
            for layer in self.layers:
                nn.init.normal_(layer.weight)

    source = record(Redrawn, 1)
    live: set[int] = set()
    most = 0
    for step, dead in zip(source.program.steps, source.program._dead_after, strict=True):
        live |= step.uses
        most = max(most, len(live))
        live -= set(dead)
    assert not live
    assert most <= 2


class Tied(nn.Module):
    def __init__(self, embedding_first: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        if embedding_first:
            self.head.weight = self.embedding.weight
        else:
            self.embedding.weight = self.head.weight


@pytest.mark.parametrize("embedding_first", [True, False])
def test_tied_parameters_stay_tied_with_the_value_of_the_one_that_was_kept(embedding_first: bool) -> None:
    model = build(lambda: Tied(embedding_first))
    assert model.head.weight is model.embedding.weight
    # nn.Linear draws from (-1/2, 1/2) here, nn.Embedding from a standard normal distribution.
    assert (model.head.weight.abs().max() > 0.5) == embedding_first


def test_marks_and_frozen_parameters_stay() -> None:
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.layer.weight.no_decay = True
            self.layer.bias.requires_grad_(False)

    layer = build(Marked).layer
    assert vars(layer.weight) == {"no_decay": True}
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)
    assert type(layer.weight) is nn.Parameter


class Unset(nn.Module):
    """A parameter and a buffer that no method sets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.scale = nn.Parameter(torch.full((2,), 3.0))
        self.register_buffer("positions", torch.arange(4))


class Restyled(nn.Module):
    """A constructor that overrides what its layers' own methods did, in the way that hides from version counters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.apply(self._init_weights)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(std=0.02)


class Counted(nn.Module):
    """A constructor that reads values that it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.layer = nn.Linear(2, 2)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.linspace(0, 1, 3).tolist()
        self.layer = nn.Linear(2, 2)


class Additive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        with torch.no_grad():
            self.scale.mul_(2)
            self.scale[0] = 7.0


class Halved(nn.Module):
    """A constructor with another default dtype."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)
        self.layer, self.scale = nn.Linear(2, 2), nn.Parameter(torch.rand(3))
        torch.set_default_dtype(torch.float32)


class DrawingElsewhere(nn.Module):
    """A constructor that draws from the generators of Python and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([random.random(), numpy.random.rand()]))


class Converting(nn.Module):
    """A constructor that hands values to numpy, which needs real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.linspace(0, 1, 3).numpy().tolist()
        self.layer = nn.Linear(2, 2)


class Deciding(nn.Module):
    """A constructor that decides by what it has drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        while self.layer.weight.abs().max() < 0.5:
            self.layer.reset_parameters()


class Seeding(nn.Module):
    """A constructor that seeds the generator itself."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.scale = nn.Parameter(torch.rand(3))


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, generator=torch.Generator().manual_seed(5)))


class Keeping(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.slopes = [torch.rand(3)]


class Careless(nn.Module):
    """A constructor that survives what it did not expect."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        try:
            self.layer.weight.data.normal_(generator=torch.Generator().manual_seed(5))
        except RuntimeError:
            self.layer.weight.data.zero_()


NOT_REPLAYED = {
    Converting: "numpy.* is not supported for tensor subclasses",
    Deciding: "what it draws decides what it does next",
    Seeding: "it seeds torch's generator",
    OwnGenerator: "a generator of its own",
    Careless: "a generator of its own",
    Keeping: r"slopes holds a tensor that is neither a parameter nor a buffer",
}


@pytest.mark.parametrize(("factory", "why"), NOT_REPLAYED.items())
def test_what_cannot_be_replayed_is_noticed(factory: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(RuntimeError, match=why):
        record(factory, 1)


@functools.lru_cache
def masks(size: int) -> torch.Tensor:
    return torch.ones(size, size).tril()


class Masked(nn.Module):
    """A constructor with a mask that a function keeps."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.weight.data.mul_(masks(4))
        if fails:
            raise ValueError("no")


def test_caches_are_looked_through_where_a_fake_value_stayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at all objects takes 30 ms: an ordinary model needs none."""
    looks, look = [], gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *given: looks.append(given) or look(*given))
    assert equal(build(Decoder), plain(Decoder))
    assert not looks
    assert equal(build(Masked), plain(Masked))
    assert looks
    masks.cache_clear()
    with pytest.raises(ValueError, match="no"):
        record(lambda: Masked(fails=True), 1)
    assert masks(4).sum().item() == 10


class OfItsRank(nn.Module):
    """A constructor that gives every rank other values, whatever the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1.0 + dist.get_rank()))


def laid_out() -> dict[str, tuple[dict[str, torch.Tensor], str]]:
    """By model and layout, the whole weights and what was logged."""
    found = {}
    for layout in (Layout(shard=2, fsdp=True), Layout(replicate=2)):
        for factory in (Decoder, OfItsRank, *NOT_REPLAYED):
            log = io.StringIO()
            handler = logging.StreamHandler(log)
            logger = logging.getLogger("danling_conf")
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            model = assembled(
                factory, layout=layout, mesh=make(layout, "cpu"), fsdp=FsdpConfig(enabled=layout.fsdp), seed=3
            )
            logger.removeHandler(handler)
            values = {
                name.removeprefix("module."): item.full_tensor() if isinstance(item, DTensor) else item.clone()
                for name, item in model.state_dict().items()
            }
            found[f"{factory.__name__} {layout.shard}"] = values, log.getvalue()
    return found


def test_several_ranks_have_a_plain_calls_values_however_they_are_had() -> None:
    first, second = run(laid_out, 2)
    for factory in (Decoder, *NOT_REPLAYED):
        expected = plain(factory, seed=3).state_dict()
        for shard in (1, 2):
            (values, log), (others, _) = (found[f"{factory.__name__} {shard}"] for found in (first, second))
            assert list(values) == list(expected)
            assert all(torch.equal(values[name], expected[name]) for name in expected)
            assert all(torch.equal(others[name], expected[name]) for name in expected)
            if factory in NOT_REPLAYED:
                assert re.search(f"built on the CPU, by one rank of a host at a time.*{NOT_REPLAYED[factory]}", log)
            else:
                assert not log
    for found in (first, second):
        for shard in (1, 2):
            values, log = found[f"OfItsRank {shard}"]
            assert values["scale"].tolist() == [1.0] * 4
            assert "not the same on all ranks" in log


def test_a_meta_module_is_refused_and_a_real_one_keeps_its_values() -> None:
    with torch.device("meta"):
        meta = Decoder()
    with pytest.raises(SettingError, match=r"embedding\.weight of Decoder is on the meta device"):
        assembled(meta)
    real = Decoder()
    before = {name: value.clone() for name, value in real.state_dict().items()}
    model = assembled(real)
    assert model is real
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_recurrent_weights_are_used_where_they_are_set() -> None:
    model = build(lambda: nn.ModuleDict({"norm": nn.BatchNorm1d(3), "cells": nn.LSTM(3, 4)}))
    assert model["norm"].num_batches_tracked == 0
    assert model["cells"].weight_hh_l0.abs().max() <= 0.5
    assert model["cells"](torch.zeros(1, 2, 3))[0].shape == (1, 2, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": Layout(shard=2)}, r"fsdp\.enabled=false\n.*shard=2"),
        *(
            ({"layout": Layout(**{axis: 2})}, rf"parallel\.axes\.{axis}=2\n\s+the mesh has no {axis} axis")
            for axis in ("replicate", "context", "tensor", "pipeline")
        ),
        ({"fsdp": FsdpConfig(enabled=True)}, r"fsdp\.enabled=true\n\s+the mesh has no shard axis"),
    ],
)
def test_a_layout_without_its_mesh_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assembled(Decoder, **changes)


def test_a_factory_of_something_else_is_refused() -> None:
    with pytest.raises(SettingError, match=r"returned a dict, and a model factory returns an nn\.Module"):
        assembled(dict)


def test_a_factory_that_fails_on_meta_and_gives_something_else_is_refused() -> None:
    with pytest.raises(SettingError, match=r"returned a list, and a model factory returns an nn\.Module"):
        assembled(lambda: torch.ones(2).numpy().tolist())
