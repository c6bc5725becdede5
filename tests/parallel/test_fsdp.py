"""FSDP2's settings take effect, in a world of one; parity with one process is in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from danling_conf.components import gradients
from danling_conf.parallel import ddp, fsdp, mesh, process_group
from danling_conf.schema import Layout
from danling_conf.schema.fsdp import FsdpConfig, MixedPrecisionPolicyConfig, OffloadPolicyConfig
from danling_conf.schema.process import CommConfig
from danling_conf.topology.violation import SettingError
from tests.support.decoder import LENGTH, Decoder

TOKENS = torch.zeros(1, LENGTH, dtype=torch.long)


@pytest.fixture(scope="module")
def alone() -> Iterator[DeviceMesh]:
    environment = pytest.MonkeyPatch()
    environment.delenv("RANK", raising=False)
    process_group.start(CommConfig(init_timeout_seconds=60), "cpu")
    made = mesh.make(Layout(fsdp=True), "cpu")
    assert made is not None
    yield made
    process_group.stop()
    environment.undo()


def wrapped(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]


def test_disabled_returns_the_model_unchanged() -> None:
    model = Decoder()
    assert fsdp.shard(model, FsdpConfig(), None) is model
    assert wrapped(model) == []


@pytest.mark.parametrize(
    ("module_classes", "expected"),
    [
        (None, ["", "blocks.0", "blocks.1", "blocks.2"]),
        (["Embedding"], ["", "embedding"]),
        (
            ["Block", "MultiheadAttention"],
            ["", *(f"blocks.{i}{part}" for i in range(3) for part in ("", ".attention"))],
        ),
    ],
)
def test_blocks_or_the_named_classes_are_wrapped_and_the_root(
    module_classes: list[str] | None, expected: list[str], alone: DeviceMesh
) -> None:
    model = fsdp.shard(Decoder(), FsdpConfig(enabled=True, module_classes=module_classes), alone)
    assert wrapped(model) == expected
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("setting", "blocks", "root"), [(None, True, False), (True, True, True), (False, False, False)]
)
def test_reshard_after_forward_frees_what_it_says(
    setting: bool | None, blocks: bool, root: bool, alone: DeviceMesh
) -> None:
    model = fsdp.shard(Decoder(), FsdpConfig(enabled=True, reshard_after_forward=setting), alone)
    model(TOKENS)
    assert isinstance(model.blocks[0].gain, DTensor) is blocks
    assert isinstance(model.embedding.weight, DTensor) is root


@pytest.mark.parametrize(
    ("precision", "policy", "expected"),
    [
        (None, None, torch.float32),
        ("fp32", None, torch.float32),
        ("bf16", None, torch.bfloat16),
        ("bf16", MixedPrecisionPolicyConfig(), torch.float32),
        (None, MixedPrecisionPolicyConfig(param_dtype="bf16"), torch.bfloat16),
    ],
)
def test_the_policy_sets_the_dtype_of_the_computation_and_weights_keep_theirs(
    precision: str | None, policy: MixedPrecisionPolicyConfig | None, expected: torch.dtype, alone: DeviceMesh
) -> None:
    model = fsdp.shard(Decoder(), FsdpConfig(enabled=True, mp_policy=policy), alone, precision=precision)
    assert model(TOKENS).dtype is expected
    model.reshard()
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())


def test_outputs_are_cast_to_output_dtype(alone: DeviceMesh) -> None:
    layer, seen = nn.Linear(2, 2), []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    policy = MixedPrecisionPolicyConfig(param_dtype="bf16", output_dtype="fp32")
    model = fsdp.shard(nn.Sequential(layer), FsdpConfig(enabled=True, mp_policy=policy), alone)
    assert model(torch.ones(1, 2)).dtype is torch.float32
    assert seen == [torch.bfloat16]


def test_a_cast_of_the_outputs_does_not_reach_the_layers_between_blocks_and_output(alone: DeviceMesh) -> None:
    policy = MixedPrecisionPolicyConfig(param_dtype="bf16", output_dtype="fp32")
    model = fsdp.shard(Decoder(), FsdpConfig(enabled=True, mp_policy=policy), alone)
    output = model(TOKENS)
    output.sum().backward()
    assert output.dtype is torch.float32


def test_a_model_that_fails_on_inputs_that_are_not_cast_says_so(alone: DeviceMesh) -> None:
    section = FsdpConfig(
        enabled=True, mp_policy=MixedPrecisionPolicyConfig(param_dtype="bf16", cast_forward_inputs=False)
    )
    model, policy = fsdp.shard(nn.Linear(2, 2), section, alone), fsdp.mixed_precision_policy(section, None)
    for kind, path in ((torch.bfloat16, None), (torch.float32, "fsdp.mp_policy.cast_forward_inputs")):
        inputs, failed = torch.ones(1, 2, dtype=kind), None
        try:
            with fsdp.explaining_uncast([inputs], policy):
                assert model(inputs).dtype is torch.bfloat16
        except SettingError as error:
            failed = error.violation.path
        assert failed == path
    with pytest.raises(RuntimeError, match="of its own"), fsdp.explaining_uncast([torch.ones(1).bfloat16()], policy):
        raise RuntimeError("of its own")


def test_every_field_of_the_policies_reaches_torch() -> None:
    policy = MixedPrecisionPolicyConfig(
        param_dtype="fp16", reduce_dtype="bf16", output_dtype="fp64", cast_forward_inputs=False
    )
    made = fsdp.mixed_precision_policy(FsdpConfig(mp_policy=policy), "bf16")
    assert (made.param_dtype, made.reduce_dtype, made.output_dtype) == (torch.float16, torch.bfloat16, torch.float64)
    assert made.cast_forward_inputs is False
    assert fsdp.mixed_precision_policy(FsdpConfig(), "bf16").reduce_dtype is torch.float32

    made = fsdp.offload_policy(FsdpConfig(enabled=True, offload_policy=OffloadPolicyConfig(pin_memory=False)))
    assert isinstance(made, CPUOffloadPolicy)
    assert made.pin_memory is False
    unset = fsdp.offload_policy(FsdpConfig(enabled=True, offload_policy=OffloadPolicyConfig()))
    assert unset.pin_memory is torch.accelerator.is_available()  # type: ignore[attr-defined]
    off = fsdp.offload_policy(FsdpConfig(enabled=True, offload_policy=OffloadPolicyConfig(enabled=False)))
    assert type(off) is OffloadPolicy


def test_a_block_that_shares_a_parameter_is_left_to_the_root(alone: DeviceMesh) -> None:
    model = Decoder()
    model.norm.weight = model.blocks[1].norm.weight
    fsdp.shard(model, FsdpConfig(enabled=True), alone)
    assert wrapped(model) == ["", "blocks.0", "blocks.2"]
    model(TOKENS).sum().backward()
    assert model.norm.weight is model.blocks[1].norm.weight


@pytest.mark.parametrize("size", [0, 2])
def test_a_size_that_does_not_divide_the_shard_degree_is_refused(size: int, alone: DeviceMesh) -> None:
    with pytest.raises(ValueError, match=rf"fsdp\.reshard_after_forward={size}\n\s+it must divide the 1 ranks"):
        fsdp.shard(Decoder(), FsdpConfig(enabled=True, reshard_after_forward=size), alone)


def test_hydra_instantiates_the_section(alone: DeviceMesh) -> None:
    section = OmegaConf.structured(FsdpConfig(enabled=True, mp_policy={"param_dtype": "bfloat16"}))
    model = instantiate(section)(Decoder(), mesh=alone)
    assert model(TOKENS).dtype is torch.bfloat16
    with pytest.raises(ValueError, match=r"param_dtpe\n.*\n.*did you mean fsdp\.mp_policy\.param_dtype"):
        fsdp.from_keywords(mp_policy={"param_dtpe": "bf16"})


def test_clipping_combines_plain_and_sharded_gradients(alone: DeviceMesh) -> None:
    sharded = fsdp.shard(nn.Linear(2, 2, bias=False), FsdpConfig(enabled=True), alone)
    plain = nn.Linear(2, 2, bias=False)
    sharded(torch.ones(1, 2)).sum().backward()
    plain(torch.ones(1, 2)).sum().backward()
    parameters: list[Any] = [*sharded.parameters(), *plain.parameters(), nn.Parameter(torch.ones(3))]
    assert gradients.clip(parameters, float("inf")).item() == pytest.approx(8**0.5)
    assert torch.equal(plain.weight.grad, torch.ones(2, 2))
    gradients.clip(parameters, 1.0)
    assert gradients.clip(parameters, 1.0).item() == pytest.approx(1.0, rel=1e-5)
    assert gradients.clip([nn.Parameter(torch.ones(3))], 1.0).item() == 0.0


def test_ddp_takes_views_of_its_buckets_as_gradients_and_no_mesh_means_no_wrapper(alone: DeviceMesh) -> None:
    model = nn.Linear(2, 2)
    assert ddp.replicate(model, None) is model
    assert ddp.replicate(model, alone) is model
    replicas = ddp.replicate(model, mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("replicate",)))
    assert isinstance(replicas, DistributedDataParallel)
    assert replicas.gradient_as_bucket_view
    with gradients.accumulate(replicas, last=False):
        assert not replicas.require_backward_grad_sync
    with gradients.accumulate(replicas, last=True):
        assert replicas.require_backward_grad_sync


def test_only_the_last_micro_batch_reduces_gradients(alone: DeviceMesh) -> None:
    model = fsdp.shard(Decoder(), FsdpConfig(enabled=True), alone)
    with gradients.accumulate(model, last=False):
        model(TOKENS).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters() if isinstance(parameter, DTensor))
    with gradients.accumulate(model, last=True):
        model(TOKENS).sum().backward()
    assert all(isinstance(parameter.grad, DTensor) for parameter in model.parameters())
