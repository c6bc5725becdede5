"""Each preset changes something that one can observe: what torch receives, what is written, or what the user is told.

One table a group gives what is observed under each of its presets; an observer composes nothing itself and looks only
at what comes out on the other side of our code.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.utils.data import TensorDataset

import danling_conf
from danling_conf.components import dataloader, optimizer, scheduler
from danling_conf.groups.presets import DEFAULT_CHOICES, GROUPS
from danling_conf.launch import execute
from danling_conf.parallel import compile as compilation
from danling_conf.parallel import deepspeed, fsdp, process_group
from danling_conf.records.heartbeats import read_heartbeats
from danling_conf.runner.display import Display
from danling_conf.schema import RunnerConfig

pytestmark = pytest.mark.slow

BF16, FP32 = torch.bfloat16, torch.float32


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


def data() -> TensorDataset:
    return TensorDataset(torch.randn(16, 4), torch.arange(16) % 2)


def cross_entropy(output: torch.Tensor, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def given_to_fully_shard(config: RunnerConfig) -> dict[str, Any]:
    """The options of torch's `fully_shard`, the same for the blocks and the root; the policy of dtypes without a
    `precision` and under bf16."""
    world = mock.MagicMock(mesh_dim_names=("shard",))
    with mock.patch("danling_conf.parallel.fsdp.fully_shard") as fully_shard:
        for precision in (None, "bf16"):
            fsdp.shard(Model(), config.fsdp, world, precision=precision)
    calls = [call.kwargs for call in fully_shard.call_args_list]
    assert calls == [calls[0]] * 3 + [calls[3]] * 3
    policies = [calls[index].pop("mp_policy") for index in (0, 3)]
    del calls[0]["mesh"]
    assert calls[0].pop("ignored_params") == set()  # every parameter of this model can be sharded
    return calls[0] | {"policies": policies}


def given_to_compile(config: RunnerConfig) -> list[tuple[str, dict[str, Any]]]:
    """Which modules torch compiles, with which options."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def record(self: nn.Module, **options: Any) -> None:
        calls.append((type(self).__name__, options))

    with mock.patch.object(nn.Module, "compile", record), torch._dynamo.config.patch(optimize_ddp=True):
        compilation.apply(Model(), config.compile)
    return calls


def written_checkpoints(config: RunnerConfig) -> tuple[list[str], str]:
    """What a short run leaves in its folder of checkpoints, and whether training waits for it."""
    with mock.patch.object(Display, "line"):
        runner = danling_conf.Runner(config)
        runner.fit(Model(), {"train": data(), "val": data()}, loss=cross_entropy)
    folder = runner.world.attempt.run_directory / "checkpoints"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return files, runner.checkpoints.mode


def loader_of_train(config: RunnerConfig) -> dict[str, Any]:
    """What the data loader of the training split is made with, and whether it takes samples in their order."""
    loader = dataloader.make(data(), config.dataloader, "train", seed=1)
    names = ("num_workers", "persistent_workers", "prefetch_factor", "pin_memory")
    return {name: getattr(loader, name) for name in names} | {"ordered": list(loader.sampler) == list(range(16))}


def optimizer_of_model(config: RunnerConfig) -> list[dict[str, Any]]:
    """For each parameter group the class of the optimizer, its options, and what it holds."""
    model = Model()
    made = optimizer.make(model, config.optim)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    watched = ("lr", "betas", "weight_decay", "momentum", "algorithm", "decoupled_weight_decay")
    return [
        {
            "class": type(made).__name__,
            "holds": {name_of[id(parameter)] for parameter in group["params"]},
            **{key: group[key] for key in watched if key in group},
        }
        for group in made.param_groups
    ]


def rates_of_ten_steps(config: RunnerConfig) -> list[float]:
    """The learning rates of ten updates, as shares of the first; the metric, where one is wanted, stays as it is."""
    moved = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = scheduler.make(moved, config.scheduler, 10, metric_mode="min")
    rates = []
    for _ in range(10):
        rates.append(round(moved.param_groups[0]["lr"], 3))
        moved.step()
        if schedule is not None:
            schedule.step(*([1.0] if scheduler.is_metric_driven(config.scheduler) else []))
    return rates


def given_to_deepspeed(config: RunnerConfig) -> Any:
    """What of ZeRO is cut, and what is on the host; None under another stack."""
    if config.stack != "deepspeed":
        return None
    given = deepspeed.configuration(config.deepspeed, batch_size=1, max_norm=None)["zero_optimization"]
    found = {name: given[name]["device"] for name in ("offload_optimizer", "offload_param") if name in given}
    return {"stage": given["stage"], **found}


def limits_of_collectives(config: RunnerConfig) -> dict[str, Any]:
    """The time limit that the process group starts with, and those that it is given after the first step."""
    limits: list[timedelta] = []
    with (
        mock.patch("torch.distributed.init_process_group") as start,
        mock.patch("torch.distributed.is_initialized", return_value=True),
        mock.patch("torch.distributed.barrier"),
        mock.patch("torch.distributed.new_group"),
        mock.patch.object(process_group, "process_groups", return_value=["world", "shard"]),
        mock.patch.object(process_group, "set_timeout", lambda group, limit: limits.append(limit)),
    ):
        process_group.start(config.comm, "cpu")
        process_group.tighten(config.comm)
    return {"start": start.call_args.kwargs["timeout"], "then": limits}


def collections_in_a_run(config: RunnerConfig) -> dict[str, Any]:
    """At which steps which generation is collected in a run, and whether Python collects besides."""
    calls: list[tuple[int, int]] = []
    automatic: set[bool] = set()
    runner = danling_conf.Runner(config)
    with (
        mock.patch.object(Display, "line"),
        mock.patch("gc.collect", lambda *generation: calls.append((runner.global_step, *generation))),
    ):
        runner.prepare(Model(), {"train": data()}, loss=cross_entropy)
        for batch in runner.batches("train"):
            automatic.add(gc.isenabled())
            runner.step(batch)
        runner.close()
    (enabled,) = automatic
    # One collection before the first step is part of switching the automatic one off.
    return {"automatic": enabled, "collections": [call for call in calls if len(call) == 2]}


def starts_groups(config: RunnerConfig) -> bool:
    """Whether the command would start replica groups, and a lighthouse where they meet."""
    attempt = mock.Mock(directory=Path("nowhere"))
    with mock.patch("danling_conf.launch.groups.run_groups", side_effect=Begun), mock.patch.object(execute, "run_rank"):
        try:
            execute.run_attempt(mock.Mock(), lambda task: mock.Mock(_return_value=task(None)), config, attempt)
        except Begun:
            return True
    return False


class Begun(Exception):
    """Replica groups would be started now."""


def fit(config: RunnerConfig) -> danling_conf.Runner:
    runner = danling_conf.Runner(config)
    with mock.patch.object(Display, "line"):
        runner.fit(Model(), {"train": data()}, loss=cross_entropy)
    return runner


def given_to_the_profiler(config: RunnerConfig) -> Any:
    """What torch's profiler is made with, and the traces of a run of ten steps."""
    with mock.patch("danling_conf.components.profiler.profile", wraps=torch.profiler.profile) as made:
        run = fit(config).world.attempt.run_directory
    if not made.called:
        return None
    options = ("record_shapes", "profile_memory", "with_stack", "with_flops")
    given = {name for name in options if made.call_args.kwargs[name]}
    return given, sorted(path.name for path in (run / "profiles").iterdir())


def interval_of_heartbeats(config: RunnerConfig) -> float | None:
    """Seconds between heartbeats, as a heartbeat says; None where there is none."""
    beats = read_heartbeats(fit(config).world.attempt.run_directory)
    return beats[0]["interval"] if beats else None


def where_metrics_go(config: RunnerConfig) -> set[str]:
    """What a run writes beside its own files, and the mode in which Weights & Biases is begun."""
    with mock.patch("wandb.init") as begun:
        run = fit(config).world.attempt.run_directory
    wandb = {f"wandb {begun.call_args.kwargs['mode']}"} if begun.called else set()
    return wandb | {path.name for path in run.iterdir() if path.name in ("tensorboard", "mlflow.db")}


@dataclass(frozen=True)
class Group:
    """How a group's presets are observed, and what is observed under each."""

    observe: Callable[[RunnerConfig], Any]
    expected: dict[str, Any]
    overrides: tuple[str, ...] = ()
    """Further settings, under all of them."""


def saved_as(mode: str, *files: str) -> tuple[list[str], str]:
    inside = (f"ckpt-s00000004/{name}" for name in ("checkpoint.json", "rank-0.pt", "shared.pt", *files))
    return sorted(["best", "ckpt-s00000004", *inside, "latest"]), mode


SHARDS = ("__0_0.distcp", ".metadata")
IN_PROCESS = {
    "num_workers": 0, "persistent_workers": False, "prefetch_factor": None, "pin_memory": False, "ordered": False,
}  # fmt: skip
WORKERS = {
    "num_workers": 4, "persistent_workers": True, "prefetch_factor": 2, "pin_memory": False, "ordered": False,
}  # fmt: skip
MATRICES = {"blocks.0.layer.weight", "blocks.1.layer.weight"}
REST = {"blocks.0.layer.bias", "blocks.1.layer.bias", "head.weight", "head.bias"}
ALL = MATRICES | REST
UNSET, ON_DEVICE = MixedPrecisionPolicy(), OffloadPolicy()

OBSERVED: dict[str, Group] = {
    "fsdp": Group(
        given_to_fully_shard,
        {
            "default": {"policies": [UNSET, MixedPrecisionPolicy(BF16, FP32)], "offload_policy": ON_DEVICE},
            "fp32": {"policies": [MixedPrecisionPolicy(FP32, FP32)] * 2, "offload_policy": ON_DEVICE},
            "bf16": {"policies": [MixedPrecisionPolicy(BF16, FP32)] * 2, "offload_policy": ON_DEVICE},
            "bf16_reduce": {"policies": [MixedPrecisionPolicy(BF16, BF16)] * 2, "offload_policy": ON_DEVICE},
            "offload": {
                "policies": [UNSET, MixedPrecisionPolicy(BF16, FP32)],
                "offload_policy": CPUOffloadPolicy(pin_memory=torch.accelerator.is_available()),
            },
            "zero2": {
                "policies": [UNSET, MixedPrecisionPolicy(BF16, FP32)], "offload_policy": ON_DEVICE,
                "reshard_after_forward": False,
            },
        },
        ("parallel=fsdp",),
    ),
    "compile": Group(
        given_to_compile,
        {
            "none": [],
            "default": [("Block", {})] * 2,
            "max": [("Block", {"mode": "max-autotune"})] * 2,
            "reduce_overhead": [("Block", {"mode": "reduce-overhead"})] * 2,
            "whole": [("Model", {})],
            "aot_eager": [("Block", {"backend": "aot_eager"})] * 2,
        },
    ),
    "checkpoint": Group(
        written_checkpoints,
        {
            "default": saved_as("async", "state.pt"),
            "none": ([], "async"),
            "file": saved_as("disabled", "state.pt"),
            "dcp": saved_as("disabled", *SHARDS),
            "async": saved_as("async", *SHARDS),
            "pinned": saved_as("async_with_pinned_mem", *SHARDS),
        },
        ("steps=4", "eval_interval=4", "dataloader.batch_size=4"),
    ),
    "dataloader": Group(
        loader_of_train,
        {
            "default": IN_PROCESS,
            "workers": WORKERS,
            "pinned": WORKERS | {"prefetch_factor": 4, "pin_memory": True},
            "ordered": IN_PROCESS | {"ordered": True},
        },
    ),
    "optim": Group(
        optimizer_of_model,
        {
            "adamw": [{
                "class": "AdamW", "holds": ALL, "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1,
                "decoupled_weight_decay": True,
            }],
            "adam": [{
                "class": "Adam", "holds": ALL, "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0,
                "decoupled_weight_decay": False,
            }],
            "sgd": [{"class": "SGD", "holds": ALL, "lr": 0.1, "momentum": 0.9, "weight_decay": 0}],
            "muon": [
                {
                    "class": "MuonAdamW", "holds": MATRICES, "algorithm": "muon", "lr": 1e-3, "momentum": 0.95,
                    "weight_decay": 0.1,
                },
                {
                    "class": "MuonAdamW", "holds": REST, "algorithm": "adamw", "lr": 1e-3, "betas": (0.9, 0.999),
                    "weight_decay": 0.1, "decoupled_weight_decay": True,
                },
            ],
            "adafactor": [{"class": "Adafactor", "holds": ALL, "lr": 1e-2, "weight_decay": 0}],
        },
    ),
    "scheduler": Group(
        rates_of_ten_steps,
        {
            "constant": [1.0] * 10,
            "linear": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
            "cosine": [1.0, 0.978, 0.914, 0.815, 0.689, 0.55, 0.411, 0.285, 0.186, 0.122],
            "wsd": [1.0] * 9 + [0.5],
            "plateau": [1.0] * 4 + [0.1] * 3 + [0.01] * 3,
        },
    ),
    "deepspeed": Group(
        given_to_deepspeed,
        {
            "none": None,
            "zero1": {"stage": 1},
            "zero2": {"stage": 2},
            "zero3": {"stage": 3},
            "zero3_offload": {"stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
        },
    ),
    "comm": Group(
        limits_of_collectives,
        {
            "default": {"start": None, "then": []},
            "strict": {"start": timedelta(minutes=10), "then": [timedelta(minutes=1)] * 2},
            "patient": {"start": timedelta(hours=1), "then": []},
        },
        ("parallel=ddp2",),
    ),
    "gc": Group(
        collections_in_a_run,
        {
            "none": {"automatic": True, "collections": []},
            "paced": {"automatic": False, "collections": [(step, 1) for step in range(50, 1001, 50)]},
            "full": {"automatic": False, "collections": [(1000, 2)]},
        },
        ("steps=1000", "eval_interval=1000", "checkpoint=none"),
    ),
    "ft": Group(starts_groups, {"none": False, "torchft": True}),
    "profiling": Group(
        given_to_the_profiler,
        {
            "none": None,
            "trace": ({"record_shapes"}, ["rank-0-step-5.json"]),
            "memory": ({"profile_memory", "with_stack"}, ["rank-0-step-5.json"]),
            "flops": ({"with_flops"}, ["rank-0-step-5.json"]),
        },
    ),
    "heartbeat": Group(interval_of_heartbeats, {"none": None, "default": 60.0, "fast": 5.0}),
    "tracking": Group(
        where_metrics_go,
        {
            "none": set(),
            "tensorboard": {"tensorboard"},
            "wandb": {"wandb None"},
            "wandb_offline": {"wandb offline"},
            "mlflow": {"mlflow.db"},
        },
    ),
}  # fmt: skip

CASES = [(group, name) for group, observed in OBSERVED.items() for name in observed.expected]


@pytest.fixture(autouse=True)
def _process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors this small gain nothing from threads; a cache directory of this process's own is left alone."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/unused")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_preset_of_every_group_has_a_case() -> None:
    assert {group: set(observed.expected) for group, observed in OBSERVED.items()} == {
        group: set(presets) for group, presets in GROUPS.items()
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("group", "name"), CASES, ids=lambda value: value)
def test_a_preset_is_observed(group: str, name: str, tmp_path: Path) -> None:
    observed = OBSERVED[group]
    expected = observed.expected[name]
    budget = () if any(item.startswith("steps=") for item in observed.overrides) else ("steps=10",)
    overrides = [f"{group}={name}", f"workspace_root={tmp_path}", *observed.overrides, *budget]
    assert observed.observe(danling_conf.compose(overrides)) == expected


@pytest.mark.parametrize(
    ("group", "name"),
    [case for case in CASES if DEFAULT_CHOICES[case[0]] != case[1]],
    ids=lambda value: value,
)
def test_what_is_observed_is_not_what_the_default_choice_gives(group: str, name: str) -> None:
    """The table itself: a preset whose case repeats the default's would prove nothing."""
    expected = OBSERVED[group].expected
    assert expected[name] != expected[DEFAULT_CHOICES[group]]
