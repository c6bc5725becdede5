from __future__ import annotations

import pytest
from torch import nn

from danling_conf.parallel.blocks import repeated_blocks, sharing_parameters


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2)])


class Other(Block):
    pass


def names(model: nn.Module, *arguments: object) -> list[str]:
    return [name for name, _ in repeated_blocks(model, *arguments)]


def tree(**children: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, child in children.items():
        model.add_module(name, child)
    return model


def test_encoder_and_decoder_are_both_found_and_blocks_never_nest() -> None:
    model = tree(
        encoder=tree(layers=nn.ModuleList([Block(), Block()])),
        decoder=tree(layers=nn.ModuleDict({"a": Other(), "b": Other()})),
        head=nn.Linear(4, 4),
    )
    assert names(model) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.a", "decoder.layers.b"]


def test_a_list_of_lists_is_searched_for_the_blocks_in_it() -> None:
    model = tree(stages=nn.ModuleList([nn.ModuleList([Block(), Block()]), nn.ModuleList([Block(), Block()])]))
    assert names(model) == ["stages.0.0", "stages.0.1", "stages.1.0", "stages.1.1"]


def test_torch_transformer_layers_are_blocks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    assert names(nn.TransformerEncoder(layer, 3)) == ["layers.0", "layers.1", "layers.2"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        tree(one=nn.ModuleList([Block()])).one[0].parts[0],
        nn.ModuleList([nn.Sequential(nn.ReLU()), nn.Sequential(nn.ReLU())]),
    ],
)
def test_plain_layers_are_no_blocks(model: nn.Module) -> None:
    assert names(model) == []


def test_children_of_different_classes_are_no_blocks() -> None:
    assert names(nn.ModuleList([Block(), Other()])) == ["0.parts.0", "0.parts.1", "1.parts.0", "1.parts.1"]


def test_module_classes_select_by_name_outer_modules_first() -> None:
    model = tree(layers=nn.ModuleList([Block()]), head=nn.Linear(4, 4))
    assert names(model, ["Block", "Linear"]) == ["layers.0", "layers.0.parts.0.0", "layers.0.parts.1.0", "head"]


def test_a_class_that_matches_nothing_is_refused_with_the_classes_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)fsdp\.module_classes=.*no module of the class Blok\n.*fix: .*Block, Linear"
    ):
        repeated_blocks(tree(layers=nn.ModuleList([Block()])), ["Blok"])


def test_the_parameters_of_the_whole_model_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tree(layers=nn.ModuleList([Block() for _ in range(20)]), head=nn.Linear(4, 4))
    blocks = list(model.layers)
    blocks[3].parts[0][0].weight = model.head.weight
    blocks[5].parts[0][0].weight = blocks[5].parts[1][0].weight  # within one block
    counted: list[nn.Module] = []
    named = nn.Module.named_parameters

    def recorded(self: nn.Module, *given: object, **options: object) -> object:
        counted.append(self)
        return named(self, *given, **options)

    monkeypatch.setattr(nn.Module, "named_parameters", recorded)
    assert sharing_parameters(model, blocks) == {blocks[3]}
    assert counted == [model, *blocks]
