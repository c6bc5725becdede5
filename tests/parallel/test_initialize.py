from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

from danling_conf.parallel.init_plan import blueprint_of, draw
from danling_conf.parallel.initialize import materialize
from danling_conf.parallel.mesh import make
from danling_conf.parallel.model import assemble
from danling_conf.schema import Layout
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.topology.violation import SettingError
from tests.support.decoder import LENGTH, WIDTH, Decoder
from tests.support.spawn import run

CPU = torch.device("cpu")


def build(factory: Callable[[], nn.Module], seed: int = 1) -> nn.Module:
    model, blueprint = draw(factory)
    return materialize(model, device=CPU, seed=seed, blueprint=blueprint)


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


def test_every_tensor_has_a_value_of_the_kind_its_constructor_gives() -> None:
    model = build(Decoder)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    block = model.blocks[0]
    assert torch.equal(block.norm.weight, torch.ones(WIDTH))
    # Set by the attention's own method, after the projection's.
    assert torch.equal(block.attention.out_proj.bias, torch.zeros(WIDTH))
    assert torch.equal(block.mask, torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1))
    assert 0.5 < block.gain.mean() < 1.5
    assert 0 < block.up.weight.abs().max() <= WIDTH**-0.5


def test_values_follow_from_the_seed_and_the_name_and_leave_the_generator_alone() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = build(Decoder)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert equal(first, build(Decoder))
    assert not equal(first, build(Decoder, seed=2))
    assert not torch.equal(first.blocks[0].up.weight, first.blocks[1].up.weight)


def test_a_module_added_elsewhere_does_not_change_the_others() -> None:
    class Longer(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    ours, theirs = build(Decoder).state_dict(), build(Longer).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
    """A constructor that needs values, which meta tensors lack."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.layer = nn.Linear(2, 2)


class Converting(nn.Module):
    """A constructor that hands values to numpy, which meta tensors refuse with a TypeError."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.linspace(0, 1, 3).numpy().tolist()
        self.layer = nn.Linear(2, 2)


class DrawingElsewhere(nn.Module):
    """A constructor that draws from the generators of Python and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([random.random(), numpy.random.rand()]))


class Disagreeing(nn.Module):
    """A method that does not set what the constructor set."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([3.0]))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)


class Additive(nn.Module):
    """A method that builds on a value that is not there after a build on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.scale.mul_(2)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        (Unset, ["scale", "positions"]),
        (Restyled, ["layer.weight"]),
        (Disagreeing, ["scale"]),
        (Additive, ["scale"]),
        (lambda: copy.deepcopy(nn.Linear(2, 2)), ["weight", "bias"]),
    ],
)
def test_what_the_initialisers_do_not_repeat_is_found(factory: Callable[[], nn.Module], expected: list[str]) -> None:
    model, blueprint = draw(factory)
    assert list(blueprint.missing) == expected
    with pytest.raises(ValueError, match=f"(?s){len(expected)} tensors cannot be initialised.*fix: .*reset_parameters"):
        materialize(model, device=CPU, seed=1, blueprint=blueprint)


@pytest.mark.parametrize("factory", [Unset, Restyled, Counted, Converting, Disagreeing, Additive])
def test_such_a_model_is_built_as_its_constructor_says_from_the_seed(
    factory: Callable[[], nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(9)
    state = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        model = assembled(factory)
    assert "built in full on the CPU" in caplog.text
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert equal(model, factory())


def test_a_model_that_draws_elsewhere_follows_the_seed_and_leaves_the_generators_alone() -> None:
    random.seed(0)
    numpy.random.seed(0)
    models = [assembled(DrawingElsewhere, seed=seed) for seed in (1, 1, 2)]
    after = random.random(), numpy.random.rand()
    random.seed(0)
    numpy.random.seed(0)
    assert after == (random.random(), numpy.random.rand())
    assert equal(models[0], models[1])
    assert not (models[0].scale == models[2].scale).any()


class OfItsRank(nn.Module):
    """A constructor that gives every rank other values, whatever the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 1.0 + dist.get_rank()))


def sharded_weights() -> torch.Tensor:
    layout = Layout(shard=2, fsdp=True)
    built = assembled(OfItsRank, layout=layout, mesh=make(layout, "cpu"), fsdp=FsdpConfig(enabled=True))
    return built.scale.full_tensor().detach()


@pytest.mark.slow
def test_a_model_built_in_full_has_rank_zeros_weights_when_it_is_sharded() -> None:
    for weights in run(sharded_weights, 2):
        assert weights.tolist() == [1.0] * 4


def test_missing_initialisers_of_a_meta_model_are_named() -> None:
    with torch.device("meta"):
        assert list(blueprint_of(Unset()).missing) == ["scale", "positions"]
        assert list(blueprint_of(Decoder()).missing) == []


def test_a_meta_module_is_given_values_and_a_real_one_keeps_its_own() -> None:
    with torch.device("meta"):
        meta = Decoder()
    assert equal(assembled(meta), build(Decoder))
    real = Decoder()
    before = {name: value.clone() for name, value in real.state_dict().items()}
    model = assembled(real)
    assert model is real
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_batch_norm_statistics_and_recurrent_weights_are_set() -> None:
    model = build(lambda: nn.ModuleDict({"norm": nn.BatchNorm1d(3), "cells": nn.LSTM(3, 4)}))
    assert torch.equal(model["norm"].running_var, torch.ones(3))
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
