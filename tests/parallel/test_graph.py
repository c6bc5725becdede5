"""The graph stack: one graph, the gradients of eager execution, and a sentence where there is no such graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from danling_conf.components import precision
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.graph import compiled_update
from danling_conf.parallel.model import assemble
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from danling_conf.schema.layout import Layout
from danling_conf.topology.violation import ConfigRefused
from tests.support.decoder import LENGTH, VOCABULARY, Decoder

TRACED = CompileConfig(enable=True, backend="aot_eager")
Loss = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    torch._dynamo.utils.counters.clear()
    yield
    assert torch._dynamo.config.trace_autograd_ops is False, "under DDP or FSDP2 it would lose all gradients"
    torch._dynamo.reset()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Every second batch is smaller."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (4 - seed % 2, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def mean(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1).float(), batch[1].flatten())


def summed(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum, and the count of tokens that are not 0."""
    counted = batch[1] != 0
    each = nn.functional.cross_entropy(output.flatten(0, 1).float(), batch[1].flatten(), reduction="none")
    return (each * counted.flatten()).sum(), counted.sum()


def passes(
    loss: Loss,
    graph: CompileConfig | None,
    *,
    model: Callable[[], nn.Module] = Decoder,
    dtype: str | None = None,
) -> Passes:
    assembled = assemble(
        model,
        layout=Layout(),
        mesh=None,
        device=torch.device("cpu"),
        seed=5,
        fsdp=FsdpConfig(),
        compile=graph or CompileConfig(),
        activation_checkpointing=ActivationCheckpointingConfig(),
    )
    autocast = partial(precision.autocast, dtype, "cpu")
    return Passes(
        assembled, lambda model, batch: model(batch[0]), loss, Layout(), torch.device("cpu"),
        autocast=autocast, graph=graph,
    )  # fmt: skip


def gradients(found: Passes, micro_batches: int) -> tuple[list[float], dict[str, Tensor | None]]:
    """The losses of the micro-batches of a step, and every gradient."""
    losses = [
        found.train(batch(index), micro_batches=micro_batches, last=index == micro_batches - 1).mean.item()
        for index in range(micro_batches)
    ]
    named = dict(found.model.module.named_parameters())
    found.finish(named.values())
    return losses, {name: item.grad for name, item in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "options", "micro_batches", "tolerance"),
    [
        (mean, {}, 1, 1e-6),
        (summed, {}, 2, 1e-6),
        (mean, {"dtype": "bf16"}, 2, 2e-2),
    ],
)
def test_every_gradient_is_there_and_that_of_eager_execution(
    loss: Loss, options: dict[str, Any], micro_batches: int, tolerance: float
) -> None:
    expected_losses, expected = gradients(passes(loss, None, **options), micro_batches)
    found = passes(loss, TRACED, **options)
    losses, named = gradients(found, micro_batches)
    assert [name for name, gradient in named.items() if gradient is None] == []
    assert losses == pytest.approx(expected_losses, rel=tolerance)
    for name, gradient in named.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()  # type: ignore[operator,union-attr]
        assert error <= tolerance, name
    assert not torch._dynamo.utils.counters["graph_break"]
    # One for the first micro-batch of a step, another for those that find gradients already.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == micro_batches


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(LENGTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x.float())
        torch._dynamo.graph_break()  # the line that is named
        return x


def test_a_graph_break_is_refused_with_its_line() -> None:
    found = passes(lambda output, batch: output.mean(), TRACED, model=Breaks)
    with pytest.raises(ConfigRefused) as caught:
        found.train(batch(0))
    (violation,) = caught.value.violations
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.endswith("# the line that is named"))
    assert (violation.path, violation.value) == ("stack", "graph")
    assert f"{__file__}:{line}, `torch._dynamo.graph_break()" in violation.rule
    assert "compile=whole" in violation.fix


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(LENGTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, batch: output, "reduce it to one number"),
        (lambda output, batch: None, "it returned None"),
        (lambda output, batch: output.mean().detach(), "without detach"),
    ],
)
def test_what_is_no_loss_is_refused_as_without_a_graph(loss: Loss, message: str) -> None:
    with pytest.raises(ConfigRefused, match=message):
        passes(loss, TRACED, model=Plain).train(batch(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [partial(torch.optim.AdamW, lr=0.01), partial(torch.optim.SGD, lr=0.1, momentum=0.9)])
def test_the_update_is_compiled_once_whatever_the_learning_rate(kind: Callable[..., torch.optim.Optimizer]) -> None:
    def trained(compiled: bool) -> tuple[list[Tensor], list[int]]:
        torch.manual_seed(0)
        model = Plain()
        optimizer = kind(model.parameters())
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
        update = compiled_update(optimizer, TRACED) if compiled else optimizer.step
        graphs = []
        for index in range(6):
            model(batch(index)[0]).square().mean().backward()
            update()
            optimizer.zero_grad()
            schedule.step()
            assert isinstance(optimizer.param_groups[0]["lr"], float)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return [item.detach() for item in model.parameters()], graphs

    expected, _ = trained(False)
    found, graphs = trained(True)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)
    # One makes the optimizer's state, and one finds it there.
    assert 0 < graphs[0] <= graphs[2] <= 3
    assert graphs[2:] == [graphs[2]] * 4
