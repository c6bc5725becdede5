"""A mixture of experts in place of a feed-forward layer; it drops no token and pads no expert, whatever the load."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


# An operator of our own, since `F.grouped_mm` computes in float32 but cannot be compiled in it: its shape check, which
# runs in place of the computation, takes bfloat16 only.
@torch.library.custom_op("danling_conf_examples::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows (rows, inputs), in groups that end at `ends` (groups,) int32, each by its group's weight, weights
    (groups, inputs, outputs) -> (rows, outputs)."""
    return F.grouped_mm(rows, weights, offs=ends).contiguous()


@grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[-1])


@torch.library.custom_op("danling_conf_examples::grouped_outer", mutates_args=())
def grouped_outer(rows: Tensor, gradients: Tensor, ends: Tensor) -> Tensor:
    """Gradient of the weights of `grouped_mm`: rows (rows, inputs) and gradients (rows, outputs) -> (groups, inputs,
    outputs)."""
    return F.grouped_mm(rows.t(), gradients, offs=ends).contiguous()


@grouped_outer.register_fake
def _(rows: Tensor, gradients: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(ends.shape[0], rows.shape[1], gradients.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    gradients = gradients.contiguous()
    return grouped_mm(gradients, weights.transpose(1, 2), ends), grouped_outer(rows, gradients, ends), None


grouped_mm.register_autograd(_backward, setup_context=_save)


class Router(nn.Module):
    """Sends each token to its `experts_per_token` most probable experts.

    `load` (experts,) int64 counts the rows that each expert was sent in the last forward pass. It stays on the device:
    reading it synchronises, keeping it does not.
    """

    load: Tensor

    def __init__(self, width: int, experts: int, experts_per_token: int) -> None:
        super().__init__()
        self.experts_per_token = experts_per_token
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.register_buffer("load", torch.empty(experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)
        self.load.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, width) -> weights, which sum to 1 for each token, and experts, both (tokens, experts_per_token); and
        how many rows each expert is sent (experts,)."""
        probabilities = F.linear(x, self.weight).softmax(dim=-1, dtype=torch.float32)
        weights, experts = probabilities.topk(self.experts_per_token, dim=-1)
        chosen = experts.flatten()
        counts = torch.zeros_like(self.load).scatter_add(0, chosen, torch.ones_like(chosen))
        # Set, not added to: activation checkpointing runs this twice.
        self.load.copy_(counts)
        return weights / weights.sum(dim=-1, keepdim=True), experts, counts


class Experts(nn.Module):
    """SwiGLU layers side by side, one an expert: w1 and w3 (experts, hidden, width), w2 (experts, width, hidden)."""

    def __init__(self, width: int, hidden: int, experts: int, output_gain: float) -> None:
        super().__init__()
        self.width = width
        self.hidden = hidden
        self.output_gain = output_gain
        self.w1 = nn.Parameter(torch.empty(experts, hidden, width))
        self.w2 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w3 = nn.Parameter(torch.empty(experts, hidden, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.w1, std=self.width**-0.5)
        nn.init.normal_(self.w2, std=self.output_gain * self.hidden**-0.5)
        nn.init.normal_(self.w3, std=self.width**-0.5)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """(rows, width), sorted by expert, and how many of them each expert has (experts,) -> (rows, width)."""
        # Sharded over expert axes, each rank works with the experts, and the part of their width, that it holds.
        w1, w2, w3 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2, self.w3))
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = F.silu(grouped_mm(rows, w1.transpose(1, 2), ends)) * grouped_mm(rows, w3.transpose(1, 2), ends)
        return grouped_mm(hidden, w2.transpose(1, 2), ends)


class MixtureOfExperts(nn.Module):
    """Each token's output is the weighted sum of a few experts' (https://arxiv.org/abs/2401.04088).

    Args:
        width: features of a token.
        hidden: hidden features of each expert.
        experts: how many there are.
        experts_per_token: how many each token is sent to.
        output_gain: factor of the initial standard deviation of the experts' output maps.
    """

    def __init__(self, width: int, hidden: int, experts: int, experts_per_token: int, output_gain: float = 1.0) -> None:
        super().__init__()
        self.router = Router(width, experts, experts_per_token)
        self.experts = Experts(width, hidden, experts, output_gain)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, sequence, width) -> (batch, sequence, width)."""
        tokens = x.flatten(0, 1)
        weights, experts, counts = self.router(tokens)
        # Rows are (token, choice) pairs; row r belongs to token r // choices.
        order = experts.flatten().argsort(stable=True)
        rows = self.experts(tokens[order // experts.shape[-1]], counts)
        outputs = rows[order.argsort()].view(*experts.shape, -1)
        return (outputs * weights[..., None]).sum(dim=1).type_as(x).view_as(x)
