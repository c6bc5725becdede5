"""A model cut into pipeline stages: which module is where, that a row of stages is the whole, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    get_schedule_class,
)

from danling_conf.parallel import stages
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.schema.parallel import MULTI_STAGE_SCHEDULES, PIPELINE_SCHEDULES, SINGLE_STAGE_SCHEDULES
from models.decoder import Decoder, DecoderConfig


def decoder(depth: int = 5, **settings: bool) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(width=16, depth=depth, heads=2, context=8, vocab_size=16, **settings))


def test_blocks_are_dealt_out_evenly_with_what_is_around_them() -> None:
    assert stages.deal_out(decoder(), 2) == [
        ["embedding", "layers.0", "layers.1", "layers.2"],
        ["layers.3", "layers.4", "norm", "head"],
    ]
    assert [len(names) for names in stages.deal_out(decoder(7), 3)] == [4, 2, 4]


class Nested(nn.Module):
    """Blocks one level in, as in models of libraries, beside a module without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.embed = nn.Embedding(4, 4)
        self.model.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(2)])
        self.model.norm = nn.LayerNorm(4)
        self.model.dropout = nn.Dropout()
        self.head = nn.Linear(4, 4)


def test_what_is_around_the_blocks_is_found_at_every_level() -> None:
    assert stages.deal_out(Nested(), 2) == [["model.embed", "model.blocks.0"], ["model.blocks.1", "model.norm", "head"]]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_row_of_stages_is_the_whole(count: int) -> None:
    model = decoder()
    names = stages.deal_out(model, count)
    stages.check(model, names)
    parts = [stages.stage_model(model, names, index) for index in range(count)]
    held = [name for part in parts for name, _ in part.named_parameters()]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    tokens = torch.randint(16, (2, 8))
    output: torch.Tensor = tokens
    for part in parts:
        output = part(output)
    assert torch.equal(output, model(tokens))


def test_a_stage_has_its_own_blocks_under_their_names() -> None:
    model = decoder()
    part = stages.stage_model(model, stages.deal_out(model, 5), 4)
    assert [name for name, _ in repeated_blocks(part)] == ["layers.4"]
    assert isinstance(part.embedding, PassThrough)
    # A copy: the model itself is as it was.
    assert not any(isinstance(module, PassThrough) for module in model.modules())


def test_placements() -> None:
    assert stages.placement("Interleaved1F1B", 2, 4) == [0, 1, 0, 1]
    assert stages.placement("ZBVZeroBubble", 2, 4) == [0, 1, 1, 0]


class TwoContainers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
        self.decoder = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])


class ParameterBeside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])


@pytest.mark.parametrize(
    ("model", "count", "message"),
    [
        (nn.Linear(2, 2), 2, "(?s)no repeated blocks.*module_fqns_per_model_part"),
        (TwoContainers(), 2, "(?s)blocks in decoder, encoder.*module_fqns_per_model_part"),
        (ParameterBeside(), 2, "token is a parameter beside the blocks"),
        (decoder(2), 4, "(?s)2 repeated blocks for 4 stages.*deeper model"),
    ],
)
def test_models_that_do_not_say_how_to_be_cut(model: nn.Module, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        stages.deal_out(model, count)


def test_tied_parameters_are_not_parted() -> None:
    model = decoder(tie_embeddings=True)
    with pytest.raises(ValueError, match=r"embedding\.weight and head\.weight are one tied parameter"):
        stages.check(model, stages.deal_out(model, 2))
    stages.check(model, [["embedding", "head", "layers", "norm"], []])


def test_the_schedules_are_those_of_torch() -> None:
    """Every concrete schedule that torch knows, and how many stages a rank has under it."""
    for name in PIPELINE_SCHEDULES:
        kind = PipelineScheduleSingle if name in SINGLE_STAGE_SCHEDULES else PipelineScheduleMulti
        assert issubclass(get_schedule_class(name), kind)
    with pytest.raises(ValueError, match="valid options are") as unknown:
        get_schedule_class("none of them")
    listed = str(unknown.value).partition("[")[2].rstrip("]").replace("'", "").split(", ")
    abstract = {"PipelineScheduleSingle", "PipelineScheduleMulti"}
    assert set(listed) - abstract == {*SINGLE_STAGE_SCHEDULES, *MULTI_STAGE_SCHEDULES}
