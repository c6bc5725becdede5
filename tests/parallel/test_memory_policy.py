"""Memory policies: the bytes that are saved for the backward pass, and gradients that do not change with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from danling_conf.groups.layout_names import parse_layout
from danling_conf.parallel import compile as compilation
from danling_conf.parallel import mesh
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.model import assemble
from danling_conf.schema.activation_checkpointing import ActivationCheckpointingConfig
from danling_conf.schema.compile import CompileConfig
from danling_conf.schema.fsdp import FsdpConfig
from models.decoder import Decoder, DecoderConfig
from tests.support.spawn import shared

pytestmark = pytest.mark.slow

LENGTH, VOCABULARY, BATCH = 32, 64, 8
POLICIES = ("eager", "default", "budget:0.5", "full")


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    with compilation.restored():
        yield
    torch._dynamo.reset()


def decoder() -> Decoder:
    return Decoder(DecoderConfig(width=32, depth=2, heads=2, context=LENGTH, vocab_size=VOCABULARY))


def measured(
    layout_name: str, policy: str | None, scope: str = "block", micro_batches: int = 1, stack: str = "auto"
) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that are saved for backward beside parameters and inputs, and every gradient, whole."""
    layout = parse_layout(layout_name)
    made = mesh.make(layout, "cpu")
    section = CompileConfig(enable=policy is not None, backend="aot_eager", scope=scope, memory_policy=policy)
    assembled = assemble(
        decoder, layout=layout, mesh=made, device=torch.device("cpu"), seed=3, fsdp=FsdpConfig(enabled=layout.fsdp),
        compile=section, activation_checkpointing=ActivationCheckpointingConfig(),
    )  # fmt: skip
    passes = Passes(
        assembled, lambda model, batch: model(batch[0]),
        lambda output, batch: torch.nn.functional.cross_entropy(output.flatten(0, 1), batch[1].flatten()),
        layout, torch.device("cpu"), graph=section if stack == "graph" else None,
    )  # fmt: skip
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    mine = tokens.chunk(layout.data_degree)[dist.get_rank() if dist.is_initialized() else 0]
    own = [item.to_local() if isinstance(item, DTensor) else item for _, item in assembled.named_parameters()]
    parameters = {item.untyped_storage().data_ptr() for item in own}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and tensor.is_floating_point():
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    for index, part in enumerate(mine.chunk(micro_batches)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            passes.train((part[:, :-1], part[:, 1:]), micro_batches=micro_batches, last=index == micro_batches - 1)
    named = {name.removeprefix("module."): item for name, item in assembled.named_parameters()}
    passes.finish(named.values())
    whole = {
        name: (item.grad.full_tensor() if isinstance(item.grad, DTensor) else item.grad).clone()  # type: ignore[union-attr]
        for name, item in named.items()
    }
    return sum(saved.values()), whole


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - item).norm() / item.norm()).item() for name, item in expected.items())


@pytest.mark.parametrize("scope", ["block", "model"])
def test_less_is_kept_and_gradients_are_equal(scope: str) -> None:
    eager, expected = measured("single", None)
    kept = {policy: measured("single", policy, scope) for policy in POLICIES}
    assert max(largest_difference(gradients, expected) for _, gradients in kept.values()) < 1e-5
    everything, default, half, nothing = (kept[policy][0] for policy in POLICIES)
    assert everything == pytest.approx(eager, rel=0.02)
    assert everything > 1.1 * default > 1.3 * half > 1.3 * nothing


def test_the_policy_is_a_matter_of_the_run() -> None:
    from torch._functorch import config

    before = config.activation_memory_budget, config.max_dist_from_bw, torch._dynamo.config.optimize_ddp
    section = CompileConfig(enable=True, memory_policy="budget:0.25", optimize_ddp="no_optimization")
    with compilation.restored():
        compilation.configure(section)
        assert config.activation_memory_budget == 0.25
        with compilation.restored():
            compilation.configure(CompileConfig(enable=True, memory_policy="eager"))
            assert (config.activation_memory_budget, config.max_dist_from_bw) == (1.0, -1)
        assert config.activation_memory_budget == 0.25
    assert (config.activation_memory_budget, config.max_dist_from_bw, torch._dynamo.config.optimize_ddp) == before
    with pytest.raises(ValueError, match=r"compile\.memory_policy=budget:2\n"):
        compilation.configure(CompileConfig(enable=True, memory_policy="budget:2"))


def of_rank() -> dict[str, list[tuple[int, dict[str, torch.Tensor]]]]:
    found = {}
    for layout in ("ddp2", "fsdp2"):
        with compilation.restored():
            found[layout] = [measured(layout, policy, micro_batches=2) for policy in ("default", "full")]
            torch._dynamo.reset()
    return found


def test_under_data_parallelism_and_accumulation() -> None:
    _, expected = measured("single", None)

    def check(results: list[Any]) -> None:
        for of_layouts in results:
            for (default, gradients), (nothing, recomputed) in of_layouts.values():
                assert default > 1.5 * nothing > 0
                assert largest_difference(gradients, expected) < 1e-5
                assert largest_difference(recomputed, expected) < 1e-5

    shared(of_rank, 2, check=check)
