"""The stages of models of other people, one after another in one process, compute what the whole model does, or the
model is refused before it is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danling_conf._torch_private import fakes
from danling_conf.parallel import hugging_face, stage_forward, stages, trial
from danling_conf.topology.violation import SettingError
from tests.support.families import FAMILIES

pytestmark = pytest.mark.slow


def call(model: Any, batch: dict[str, Tensor]) -> Tensor:
    output = model(**{name: item for name, item in batch.items() if name != "targets"})
    return getattr(output, "logits", output)


def loss_of(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2).float(), batch["targets"].flatten())


def trained(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of a whole model."""
    loss = loss_of(call(model, batch), batch)
    loss.backward()
    return loss.detach(), {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def trained_in_stages(model: nn.Module, batch: dict[str, Tensor], count: int = 2) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of its stages. Raises SettingError for a model that cannot be cut."""
    blocks = stages.blocks_of(model)
    around = [name for side in stages.around(model, blocks) for name in side]
    found = trial.run(model, blocks, around, call, batch)
    names = stages.deal_out(model, count, found)
    stages.check(model, names)
    stages.check_used(model, names, found)
    stage_forward.rehearse(found, names, blocks, call, batch)
    work = stage_forward.Work(microbatches=[batch], forward=call, objective=loss_of)
    sent: Any = None
    gradients: dict[str, Tensor] = {}
    parts = []
    for index in range(count):
        part = stages.stage_model(model, names, index, found)
        stage_forward.make_stage(part, index, names, blocks, work, None, None, tuples=True)
        sent = part(sent)
        parts.append(part)
    sent.backward()
    for part in parts:
        for name, parameter in part.named_parameters():
            assert name not in gradients
            if parameter.grad is not None:
                gradients[name] = parameter.grad
    return sent.detach(), gradients


def assert_same(model: nn.Module, batch: dict[str, Tensor]) -> None:
    loss, gradients = trained_in_stages(copy.deepcopy(model), batch)
    expected_loss, expected = trained(model, batch)
    torch.testing.assert_close(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_copy_of_a_fake_tensor_has_the_mode_of_the_first() -> None:
    """A copied mode frees weak references of storages twice; torch 2.13 crashes when garbage is collected then."""
    with fakes.fake_tensors() as mode, fakes.quiet_fake_tensors():
        tensor: Any = copy.deepcopy(torch.empty(2))
        assert tensor.fake_mode is mode


NO_CUT = "which does not say how to cut it"
OF_OTHERS = r"does not run without the modules of the others"
REFUSED: dict[str, str] = {
    **dict.fromkeys(("ALBERT", "T5", "BART", "Pegasus", "Whisper"), NO_CUT),
    **dict.fromkeys(("Mamba", "Mamba-2", "ViT", "DeiT", "Swin", "Wav2Vec2", "Llama 4"), OF_OTHERS),
}
"""Families that a pipeline does not take, and what it says of them."""


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_of_a_family_are_the_whole_or_it_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = FAMILIES[name].build()
    hugging_face.prepare(model)
    batch = FAMILIES[name].batch(2, seed=1)
    if name in REFUSED:
        with pytest.raises(SettingError, match=REFUSED[name]):
            trained_in_stages(model, batch)
    else:
        assert_same(model, batch)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return x + torch.tanh(self.linear(x if condition is None else x + condition))


class Model(nn.Module):
    """A model in the order of its use, and in others."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.embed, self.condition = nn.Linear(4, 8), nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.unused = nn.Linear(2, 2)
        if kind == "shared":
            self.blocks[3].linear = self.blocks[0].linear

    def forward(self, x: Tensor) -> Tensor:
        kind, blocks = self.kind, list(self.blocks)
        h = first = self.embed(x)
        condition = None
        if kind == "condition":
            condition = self.condition(x)
        elif kind == "recomputed":  # an input of every block, without parameters
            condition = torch.zeros_like(h) + torch.arange(8) + x.sum(-1, keepdim=True)
        seen = []
        for place, block in enumerate(reversed(blocks) if kind == "reverse" else blocks):
            if kind == "drop" and torch.rand(()) < 0.1:
                continue
            if kind == "between" and place == 2:
                h = h * 2
            if kind == "inside" and place == 2:
                h = self.condition(x) + h
            h = block(h) if condition is None else block(h, condition)
            seen.append(h)
        if kind == "skip":
            h = h + first
        if kind == "outputs":
            h = sum(seen)
        if kind == "twice":
            for block in blocks:
                h = block(h)
        if kind == "left out":
            h = seen[-2]
        if kind == "both ends":
            return self.head(self.norm(h)) + self.embed(x)[..., :5]
        return self.head(self.norm(h))


@pytest.mark.parametrize("kind", ["head_first", "recomputed"])
@pytest.mark.parametrize("count", [2, 4])
def test_modules_go_where_they_are_used(kind: str, count: int) -> None:
    torch.manual_seed(0)
    model, generator = Model(kind), torch.Generator().manual_seed(1)
    batch = {"x": torch.randn(2, 4, generator=generator), "targets": torch.tensor([0, 3])}
    loss, gradients = trained_in_stages(copy.deepcopy(model), batch, count)
    expected_loss, expected = trained(model, batch)
    assert torch.equal(loss, expected_loss)
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("condition", r"what condition made is used in blocks\.1"),
        ("skip", "what embed made is used after the blocks"),
        ("twice", r"block blocks\.0 is called twice"),
        ("reverse", r"block blocks\.3 is called before blocks\.0"),
        ("outputs", r"what blocks\.0 made is used after the blocks"),
        ("between", r"behind blocks\.1"),
        ("inside", r"behind blocks\.1"),
        ("left out", r"what blocks\.2 made is used after the blocks"),
        ("both ends", "the parameter embed.weight is used before the blocks and after the blocks"),
        ("drop", r"block blocks\.0 is not called"),
        ("shared", "tied parameter"),
    ],
)
def test_what_a_pipeline_would_compute_otherwise_is_refused_by_name(kind: str, why: str) -> None:
    batch = {"x": torch.randn(2, 4), "targets": torch.tensor([0, 3])}
    with pytest.raises(SettingError, match=why):
        trained_in_stages(Model(kind), batch)


def test_configured_stages_must_follow_the_use() -> None:
    model = Model("head_first")
    blocks = stages.blocks_of(model)
    around = [name for side in stages.around(model, blocks) for name in side]
    found = trial.run(model, blocks, around, call, {"x": torch.randn(2, 4)})
    rest = ["condition", "unused"]
    good = [["embed", "blocks.0", *rest], ["blocks.1", "blocks.2", "blocks.3", "norm", "head"]]
    stages.check_used(model, good, found)
    for bad, why in (
        ([["embed", "norm", "blocks.0", *rest], ["blocks.1", "blocks.2", "blocks.3", "head"]], "norm.* used after"),
        ([["blocks.0", *rest], ["blocks.1", "blocks.2", "blocks.3", "norm", "head", "embed"]], "embed.* used before"),
        ([["embed", "blocks.1", *rest], ["blocks.0", "blocks.2", "blocks.3", "norm", "head"]], "blocks.1"),
    ):
        with pytest.raises(SettingError, match=why):
            stages.check_used(model, bad, found)


class Counting(nn.Module):
    """A block with a buffer that it writes to, one that it only reads, and one that its model replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * self.scale


class OfCounting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Counting(), Counting()])
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.last = x[0, :2]
        for layer in self.layers:
            x = layer(x)
        return x


def test_buffers_that_forward_changes_are_found() -> None:
    """A pipeline calls forward once a microbatch, so they do not end as in one process."""
    found = trial.run(OfCounting(), ["layers.0", "layers.1"], [], call, {"x": torch.ones(2, 4)})
    assert found.changed == {"last": None, "layers.0.calls": 1, "layers.1.calls": 3}
