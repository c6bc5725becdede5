"""Hydra's `instantiate` on a section gives a partial that waits for its object, and then does what the builder does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import TensorDataset

import danling_conf
from danling_conf.components import dataloader, optimizer, scheduler
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.config.identity import plain
from danling_conf.parallel import activation_checkpointing, fsdp, mesh, process_group
from danling_conf.parallel import compile as compilation
from danling_conf.schema import Layout, RunnerConfig
from danling_conf.schema.process import CommConfig

OVERRIDES = [
    "steps=20",
    "parallel=fsdp",
    "precision=bf16",
    "fsdp=bf16_reduce",
    "fsdp.mp_policy.output_dtype=float32",
    "fsdp.reshard_after_forward=false",
    "activation_checkpointing.mode=every_n",
    "compile=aot_eager",
    "compile.fullgraph=true",
    "+compile.options={trace: true}",
    "compile.optimize_ddp=null",
    "dataloader.batch_size=4",
    "dataloader.val.batch_size=3",
    "optim=sgd",
    "optim.lr=0.5",
    "optim.nesterov=true",
    "optim.param_groups=[{pattern: bias$, lr_multiplier: 0.1, weight_decay: 0}]",
    "scheduler=plateau",
    "scheduler.patience=${accum_steps}",
]
"""Aliases, presets, interpolations, mappings in open places, and keys that no section declares."""

Sections = Callable[[str], Any]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling sets a cache directory and dynamo's treatment of DDP for the process: put them back."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/unused"))
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield


@pytest.fixture(scope="module")
def alone() -> Iterator[DeviceMesh]:
    """A world of one process, with a shard axis."""
    environment = pytest.MonkeyPatch()
    environment.delenv("RANK", raising=False)
    process_group.start(CommConfig(init_timeout_seconds=60), "cpu")
    made = mesh.make(Layout(fsdp=True), "cpu")
    assert made is not None
    yield made
    process_group.stop()
    environment.undo()


@pytest.fixture(scope="module")
def resolved() -> RunnerConfig:
    return danling_conf.compose(OVERRIDES)


@pytest.fixture(scope="module")
def composed() -> Iterator[Any]:
    with composer(ConfigSearch(config_name="danling")) as composing:
        yield composing.compose(OVERRIDES)


@pytest.fixture(params=["composed by Hydra", "resolved"])
def sections(request: pytest.FixtureRequest, composed: Any, resolved: RunnerConfig) -> Sections:
    """The section of a name, in one of the two forms that a user may have it in."""
    config = resolved if request.param == "resolved" else composed
    return lambda name: getattr(config, name)


def instantiable() -> list[str]:
    """Sections that name what Hydra shall call."""
    kinds = {item.name: item.default_factory for item in fields(RunnerConfig) if is_dataclass(item.default_factory)}
    return [name for name, kind in kinds.items() if any(item.name == "_target_" for item in fields(kind))]


def test_these_sections_can_be_instantiated_and_each_has_a_test_below() -> None:
    expected = ["parallel", "fsdp", "activation_checkpointing", "compile", "optim", "scheduler", "dataloader"]
    assert instantiable() == expected
    assert all(f"test_{name}" in globals() for name in expected)


@pytest.mark.parametrize("name", instantiable())
def test_the_partial_holds_the_resolved_section_and_leaves_the_configuration_as_it_was(
    name: str, sections: Sections, resolved: RunnerConfig
) -> None:
    """Aliases, open keys and interpolations arrive as in the resolved section, in the section's own class."""
    section = sections(name)
    before = OmegaConf.to_container(section) if OmegaConf.is_config(section) else plain(section)
    waiting = instantiate(section)
    assert isinstance(waiting, partial)
    # `parallel` waits for nothing but may be told of FSDP; it holds its section by position.
    (held,) = (*waiting.args, *waiting.keywords.values())
    wanted = plain(getattr(resolved, name))
    if name == "parallel" and OmegaConf.is_config(section):
        assert held.axes.shard == -1  # filled when the mesh is made
        wanted["axes"]["shard"] = -1
    assert plain(held) == wanted
    assert not any(OmegaConf.is_config(value) for value in vars(held).values())
    assert before == (OmegaConf.to_container(section) if OmegaConf.is_config(section) else plain(section))


def test_parallel(sections: Sections, alone: DeviceMesh) -> None:
    made = instantiate(sections("parallel"))(fsdp=True)
    assert (made.mesh_dim_names, made.shape, made.device_type) == (("shard",), (1,), "cpu")
    assert made == alone


def test_fsdp(sections: Sections, resolved: RunnerConfig, alone: DeviceMesh) -> None:
    torch.manual_seed(0)
    found, expected = Model(), Model()
    expected.load_state_dict(found.state_dict())
    assert instantiate(sections("fsdp"))(found, mesh=alone) is found
    fsdp.shard(expected, resolved.fsdp, alone, precision=resolved.precision)
    names = [name for name, module in found.named_modules() if isinstance(module, FSDPModule)]
    assert names == ["", "blocks.0", "blocks.1"]
    assert names == [name for name, module in expected.named_modules() if isinstance(module, FSDPModule)]
    inputs = torch.randn(3, 4)
    outputs = [model(inputs) for model in (found, expected)]
    assert torch.equal(*outputs)
    # Computed in bf16, cast back by the policy that was written with an alias.
    assert outputs[0].dtype is torch.float32
    assert torch.equal(outputs[0], outputs[0].bfloat16().float())


def test_activation_checkpointing(sections: Sections, resolved: RunnerConfig) -> None:
    found, expected = Model(), Model()
    assert instantiate(sections("activation_checkpointing"))(found) is found
    activation_checkpointing.apply(expected, resolved.activation_checkpointing)
    for model in (found, expected):
        # Every second block is recomputed.
        assert [hasattr(block, "_recompute_options") for block in model.blocks] == [False, True]


def test_compile(sections: Sections, resolved: RunnerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: calls.append((type(self).__name__, options)))
    model = Model()
    assert instantiate(sections("compile"))(model) is model
    options = {"backend": "aot_eager", "fullgraph": True, "options": {"trace": True}}
    assert calls == [("Block", options)] * 2
    assert torch._dynamo.config.optimize_ddp is True  # null: left as torch has it
    compilation.apply(Model(), resolved.compile)
    assert calls == [("Block", options)] * 4


def test_dataloader(sections: Sections, resolved: RunnerConfig) -> None:
    data = TensorDataset(torch.arange(10))
    waiting = instantiate(sections("dataloader"))
    for split, sizes in {"train": [4, 4], "val": [3, 3, 3, 1]}.items():
        found = [batch[0].tolist() for batch in waiting(data, split=split, seed=5)]
        assert [len(batch) for batch in found] == sizes
        assert found == [batch[0].tolist() for batch in dataloader.make(data, resolved.dataloader, split, seed=5)]


def test_optim(sections: Sections, resolved: RunnerConfig) -> None:
    model = Model()
    found = instantiate(sections("optim"))(model)
    assert type(found) is torch.optim.SGD
    shared = {"momentum": 0.9, "nesterov": True}
    default, biases = found.param_groups
    assert default == {**default, **shared, "name": "default", "lr": 0.5}
    assert biases == {**biases, **shared, "name": "bias$", "lr": 0.05, "weight_decay": 0}
    expected = optimizer.make(model, resolved.optim)
    assert found.state_dict() == expected.state_dict()
    assert [len(group["params"]) for group in found.param_groups] == [3, 3]


def test_scheduler(sections: Sections, resolved: RunnerConfig) -> None:
    def rates(make: Callable[..., Any]) -> list[float]:
        moved = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = make(moved)
        assert isinstance(schedule, ReduceLROnPlateau)
        curve = []
        for _ in range(6):
            schedule.step(1.0)
            curve.append(moved.param_groups[0]["lr"])
        return curve

    found = rates(partial(instantiate(sections("scheduler")), total_steps=20))
    # The first is the best so far; after two in a row that are not better, a tenth.
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert found == rates(lambda moved: scheduler.make(moved, resolved.scheduler, 20))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("fsdp", {"reshard_after_foward": True}, "fsdp.reshard_after_forward"),
        ("compile", {"moed": "max-autotune"}, "compile.mode"),
        ("parallel", {"axes": {"shrad": 2}}, "parallel.axes.shard"),
        ("activation_checkpointing", {"mode": "ful"}, "full"),
    ],
)
def test_a_misspelt_key_or_choice_is_refused_with_its_path(name: str, keywords: dict[str, Any], message: str) -> None:
    """A plain mapping with a `_target_` has passed no check of ours before it arrives."""
    target = getattr(RunnerConfig(), name)._target_
    with pytest.raises(Exception, match="(?s)" + message.replace(".", r"\.")) as refusal:
        instantiate({"_target_": target, "_recursive_": False, **keywords})
    wrong = next(iter(keywords))
    assert f"{name}.{wrong}" in str(refusal.value)
