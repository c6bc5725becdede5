"""Models of other people under context parallelism and activation checkpointing: what reaches over the context axis is
counted by block, and recomputed blocks have the gradients of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danling_conf.parallel import activation_checkpointing as recomputation
from danling_conf.parallel import context, hugging_face
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.topology.violation import SettingError
from tests.parallel.test_foreign_pipelines import call, trained
from tests.support.families import FAMILIES

pytestmark = pytest.mark.slow

REACH = (
    "Llama", "Qwen3", "Gemma", "Phi", "Granite", "StableLm", "GPT-2", "GPT-NeoX", "GPT-J", "CodeGen", "OPT", "BioGPT",
    "Mixtral", "Qwen3-MoE",
)  # fmt: skip
OWN_CODE = r"{} of \w+ does not call the attention that reaches over the context axis"
LATER = "attends to what comes later"
REFUSED = {
    "Falcon": OWN_CODE.format(r"transformer\.h\.0"),
    "GPT-Neo": OWN_CODE.format(r"transformer\.h\.0"),
    "XGLM": OWN_CODE.format(r"model\.layers\.0"),
    "OpenAI GPT": OWN_CODE.format(r"transformer\.h\.0"),
    "DeBERTa": OWN_CODE.format(r"deberta\.encoder\.layer\.0"),
    **{name: LATER for name in ("BERT", "RoBERTa", "ALBERT", "ELECTRA", "DistilBERT")},
    "ModernBERT": "attends by full_attention, sliding_attention",
    "BLOOM": "has no argument positions",
    "MPT": "has no argument positions",
    "Mamba": "has no argument positions",
}


def check(name: str) -> None:
    model = FAMILIES[name].build()
    hugging_face.prepare(model)
    context.check(model, 2)
    context.check_attention(model, 2, call, FAMILIES[name].batch(2, seed=1))


@pytest.mark.parametrize("name", REACH)
def test_every_block_of_these_reaches_over_the_context_axis(name: str) -> None:
    check(name)


@pytest.mark.parametrize(("name", "why"), REFUSED.items())
def test_a_family_that_does_not_is_refused_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(SettingError, match=why):
        check(name)


class Attention(nn.Module):
    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.attention = nn.Linear(8, 8), Attention()

    def forward(self, x: Tensor, skipped: bool) -> Tensor:
        heads = self.project(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return x if skipped else x + self.attention(heads, heads, heads).transpose(1, 2).flatten(2)


class Planned(nn.Module):
    """A model with a plan, one of whose attentions may not be called."""

    cp_plan = {"blocks.*.attention": "causal_attention"}

    def __init__(self, skipped: int | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.skipped = skipped

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        for place, block in enumerate(self.blocks):
            x = block(x, place == self.skipped)
        return x


def test_attention_that_a_plan_names_must_be_called() -> None:
    def run(model: Any, batch: Tensor) -> Tensor:
        return model(batch)

    model = Planned()
    context.check_attention(model, 2, run, torch.zeros(1, 4, 8))
    assert not hasattr(model.blocks[0].attention, "_context_attention")
    with pytest.raises(SettingError, match=r"blocks\.1\.attention of Planned does not call the attention"):
        context.check_attention(Planned(skipped=1), 2, run, torch.zeros(1, 4, 8))


@pytest.mark.parametrize("name", ["T5", "BART", "Whisper", "Llama 4", "Falcon", "BLOOM", "Wav2Vec2", "Mamba"])
def test_recomputed_blocks_have_the_same_gradients(name: str) -> None:
    found = []
    for mode in ("none", "full"):
        torch.manual_seed(0)
        model = FAMILIES[name].build()
        hugging_face.prepare(model)
        if mode == "full":
            recomputation.apply(model, ActivationCheckpointingConfig(mode="full"))
        found.append(trained(model, FAMILIES[name].batch(2, seed=1)))
    (loss, expected), (again, recomputed) = found
    torch.testing.assert_close(again, loss)
    assert recomputed.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(recomputed[key], expected[key])
