"""A plan, a forward or a loss that computes something else over the axes is refused before the first step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from danling_conf.groups.layout_names import parse_layout
from danling_conf.parallel import inside_step, mesh, rehearsal
from danling_conf.parallel.model import assemble
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.parallel import ParallelConfig
from danling_conf.topology.violation import SettingError
from tests.support.spawn import shared

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.scale, self.proj = nn.Linear(16, 48), nn.LayerNorm(4), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (item.unflatten(-1, (-1, 4)).transpose(1, 2) for item in self.qkv(x).chunk(3, dim=-1))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        heads = self.up(x).unflatten(-1, (-1, 4))
        return x + self.down(self.scale(heads).flatten(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


RIGHT = {"blocks.*.up": "colwise", "blocks.*.scale": "replicated_with_grad_allreduce", "blocks.*.down": "rowwise"}
FUSED = {**RIGHT, "blocks.*.qkv": "colwise", "blocks.*.proj": "rowwise"}
UNSUMMED = {name: style for name, style in RIGHT.items() if name != "blocks.*.scale"}


class Uneven(Net):
    """Its second rank computes something else, and one of the ranks alone sees it."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 1 if isinstance(self.blocks[0].up.weight, DTensor) and dist.get_rank() == 1 else out


class Mixed(Net):
    """A layer that no style shards."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(super().forward(x).mT).mT


class Adapted(Net):
    """Frozen layers with adapters around two of them, as peft has them."""

    def __init__(self) -> None:
        super().__init__()
        inject_adapter_in_model(LoraConfig(target_modules=["up", "down"], init_lora_weights=False), self)


def cut_refusals(plans: list[dict[str, str]]) -> list[str | None]:
    """With a limit that leaves one block of the three."""
    rehearsal._SMALL = 0
    try:
        assert len(rehearsal._like_others(Net(), plans[0])) == 2
        return refusals(plans)
    finally:
        rehearsal._SMALL = 64 << 20


def refusals(plans: list[dict[str, str]], model: type[nn.Module] = Net) -> list[str | None]:
    made = mesh.make(parse_layout("tp2"), "cpu")
    found: list[str | None] = []
    for plan in plans:
        try:
            assemble(
                model,
                layout=parse_layout("tp2"),
                mesh=made,
                device=torch.device("cpu"),
                seed=0,
                fsdp=FsdpConfig(),
                compile=CompileConfig(),
                activation_checkpointing=ActivationCheckpointingConfig(),
                parallel=ParallelConfig(tensor_plan=plan),
                example=lambda: torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0)),
                forward=_call,
            )
            found.append(None)
        except SettingError as error:
            found.append(f"{error.violation.path}: {error.violation.rule}")
    return found


def _call(model: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    return model(batch)


def check(found: list[str | None]) -> None:
    right, fused, unsummed = found
    assert right is None
    assert fused is not None
    assert "blocks.*.qkv: colwise" in fused
    assert "computes something else in blocks.0.proj" in fused
    assert unsummed is not None
    assert "gives blocks.0.scale.weight another gradient" in unsummed


def test_a_wrong_plan_is_refused_with_its_entries_and_a_right_one_is_not() -> None:
    check(shared(refusals, 2, [RIGHT, FUSED, UNSUMMED])[0])


def test_a_large_model_is_tried_by_one_block_of_each_kind() -> None:
    check(shared(cut_refusals, 2, [RIGHT, FUSED, UNSUMMED])[0])


def test_what_one_rank_alone_sees_is_refused_by_all() -> None:
    of_ranks = shared(refusals, 2, [RIGHT], Uneven)
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0][0] is not None
    assert "returns something else" in of_ranks[0][0]


@pytest.mark.parametrize("style", ["colwise", "rowwise", "embedding_rowwise"])
def test_a_layer_that_no_style_shards_is_named_with_its_entry(style: str) -> None:
    refused = shared(refusals, 2, [{**RIGHT, "mix": style}], Mixed)[0]
    assert refused == ["parallel.tensor_plan.mix: it shards an nn.Linear or an nn.Embedding, and mix is a Conv1d"]


def test_the_layers_inside_of_an_adapter_are_sharded_and_the_adapter_is_refused() -> None:
    inside = {
        "blocks.*.up.base_layer": "colwise",
        "blocks.*.up.lora_B.default": "colwise",
        "blocks.*.scale": "replicated_with_grad_allreduce",
        "blocks.*.down.base_layer": "rowwise",
        "blocks.*.down.lora_A.default": "rowwise",
    }
    around, right = shared(refusals, 2, [RIGHT, inside], Adapted)[0]
    assert right is None
    assert around is not None
    assert "blocks.0.up is a Linear with an adapter around it" in around


class Attention(nn.Module):
    dropout = 0.0

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, dropout_p=dropout)


class Dropping(Attention):
    dropout = 0.5


class Causal(nn.Module):
    cp_plan = {"attention": "causal_attention"}

    def __init__(self, attention: type[nn.Module] = Attention) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Embedding(9, 16), attention(), nn.Linear(16, 9)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        return self.head(x + self.attention(heads, heads, heads).transpose(1, 2).flatten(2))


def _mean(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def _shifting(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten())


def _total(logits: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    total = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    return total, (batch["labels"] != -100).sum()


def context_refusal(kind: type[nn.Module], loss: Callable[..., object], masked: int) -> str | None:
    tokens = torch.randint(9, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[:, :masked] = -100
    try:
        assemble(
            lambda: Causal(kind),
            layout=parse_layout("cp2"),
            mesh=mesh.make(parse_layout("cp2"), "cpu"),
            device=torch.device("cpu"),
            seed=0,
            fsdp=FsdpConfig(),
            compile=CompileConfig(),
            activation_checkpointing=ActivationCheckpointingConfig(),
            example=lambda: {"tokens": tokens[:, :-1], "labels": labels},
            forward=lambda model, batch: model(batch["tokens"]),
            loss=loss,
        )
    except SettingError as error:
        return error.violation.rule
    return None


PARTS = "the loss over the parts of a sequence, one on each rank, is not that over the whole"


@pytest.mark.parametrize(
    ("kind", "loss", "masked", "refused"),
    [
        (Attention, _mean, 0, None),
        (Attention, _total, 3, None),
        (Attention, _mean, 3, PARTS),
        (Attention, _mean, 6, PARTS),
        (Attention, _shifting, 0, PARTS),
        (Dropping, _mean, 0, "computes something else in training"),
    ],
)
def test_a_loss_and_attention_over_parts_of_sequences_are_those_over_whole_ones(
    kind: type[nn.Module], loss: Callable[..., object], masked: int, refused: str | None
) -> None:
    for found in shared(context_refusal, 2, kind, loss, masked):
        assert found is None if refused is None else refused in (found or "")


def sequences_in_a_row() -> list[str | None]:
    """What each rank says of a batch of Llama's that the last rank alone could tell from others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> nn.Module:
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        )

    layout = parse_layout("cp2")
    assembled = assemble(
        model,
        layout=layout,
        mesh=mesh.make(layout, "cpu"),
        device=torch.device("cpu"),
        seed=0,
        fsdp=FsdpConfig(),
        compile=CompileConfig(),
        activation_checkpointing=ActivationCheckpointingConfig(),
    )
    assert assembled.context is not None
    ordered = torch.arange(8).expand(2, 8)
    padded, begun_anew = torch.ones(2, 8, dtype=torch.int64), ordered.clone()
    padded[0, -1], begun_anew[0, -1] = 0, 0
    found: list[str | None] = []
    for options in ({"position_ids": ordered + 1}, {"attention_mask": padded}, {"position_ids": begun_anew}):
        part = assembled.context.part({"input_ids": torch.ones(2, 8, dtype=torch.int64), **options})
        try:
            with inside_step.step(sharded_logits=False):
                assembled.module(**part)
            found.append(None)
        except SettingError as error:
            found.append(error.violation.rule)
    return found


def test_padding_and_several_sequences_in_a_row_are_refused_by_all_ranks() -> None:
    for plain, padding, several in shared(sequences_in_a_row, 2):
        assert plain is None
        assert padding is not None
        assert "attention_mask with padding" in padding
        assert several is not None
        assert "several sequences in a row" in several
