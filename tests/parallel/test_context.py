"""The parts of sequences that context ranks have: every token once, where it stands, and what cannot be cut."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from danling_conf.parallel import context, inside_step
from danling_conf.parallel.context import ContextParallel


def axis(degree: int, rank: int, **options: Any) -> ContextParallel:
    mesh = mock.Mock(device_type="cpu", **{"size.return_value": degree, "get_local_rank.return_value": rank})
    return ContextParallel(mesh, **{"method": "gather", "balance": True, **options})


@pytest.mark.parametrize("degree", [2, 3])
@pytest.mark.parametrize("options", [{}, {"balance": False}, {"method": "ulysses"}])
def test_ranks_have_every_token_once_and_know_where_it_stands(degree: int, options: dict[str, Any]) -> None:
    length = 12
    tokens = torch.arange(2 * length).view(2, length)
    seen = []
    for rank in range(degree):
        own = axis(degree, rank, **options)
        part = own.part(tokens)
        positions = own.positions(part.shape[1], tokens.device)
        assert torch.equal(part, tokens[:, positions])
        seen.append(positions)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(length))


def test_balance_gives_each_rank_an_early_and_a_late_piece() -> None:
    assert [axis(2, rank).held() for rank in range(2)] == [(0, 3), (1, 2)]
    assert [axis(2, rank, method="ulysses").held() for rank in range(2)] == [(0,), (1,)]


def test_only_sequences_are_cut() -> None:
    batch = {"tokens": torch.zeros(2, 8), "weights": torch.zeros(2), "image": torch.zeros(2, 3, 8), "name": "a"}
    part = axis(2, 0).part(batch)
    assert part["tokens"].shape == (2, 4)
    assert part["weights"].shape == (2,)
    assert part["image"].shape == (2, 3, 8)
    assert part["name"] == "a"
    assert axis(2, 0).part([torch.zeros(3)])[0].shape == (3,)


def test_a_sequence_that_cannot_be_cut_evenly_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"(?s)context=2\n.*a sequence of 10 tokens cannot be cut into 4 pieces.*multiple of 4"
    ):
        axis(2, 0).part(torch.zeros(1, 10))
    assert axis(2, 0, balance=False).part(torch.zeros(1, 10)).shape == (1, 5)


def test_the_ring_needs_cuda() -> None:
    with pytest.raises(ValueError, match=r"(?s)context_method=ring\n.*needs CUDA.*gather or ulysses"):
        axis(2, 0, method="ring")


def test_ulysses_needs_enough_heads() -> None:
    with pytest.raises(
        ValueError, match=r"context_method=ulysses\n\s+the context degree, 2, must divide the 3 query heads"
    ):
        axis(2, 0, method="ulysses").attention(*(torch.zeros(1, 3, 4, 2) for _ in range(3)))


class Positional(nn.Module):
    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        return tokens if positions is None else positions


def test_positions_are_given_in_a_step_only_and_not_over_given_ones() -> None:
    model, tokens, own = Positional(), torch.zeros(1, 4), torch.tensor([7, 7, 7, 7])
    context.give_positions(model, axis(2, 1))
    assert model(tokens) is tokens
    with inside_step.step(sharded_logits=False):
        assert model(tokens).tolist() == [2, 3, 4, 5]
        assert model(tokens, None).tolist() == [2, 3, 4, 5]
        assert model(tokens, own) is own
        assert model(tokens, positions=own) is own
    assert model(tokens) is tokens


def test_a_plan_in_unknown_words_is_refused() -> None:
    model = Positional()
    model.cp_plan = {"inner": "ring"}
    model.inner = nn.Identity()
    with pytest.raises(
        ValueError, match=r"cp_plan of Positional gives inner the style ring.*\n\s+fix: use causal_attention"
    ):
        context.parallelize(model, axis(2, 0))
