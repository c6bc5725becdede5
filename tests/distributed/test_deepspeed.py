"""Runs on `stack=deepspeed`: what one process without it trains, under every stage of ZeRO and on 1, 2 and 4 ranks.

A world of ranks is called once for all of its cases: they share what the first one imports.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from danling_conf import EMA, Callback, ConfigRefused
from danling_conf.runner.callbacks import TrainingRun
from tests.support.small import DropoutNet, Net, Pairs, equal, loss, runner
from tests.support.spawn import shared

pytestmark = pytest.mark.slow

STAGES = (0, 1, 2, 3)
GLOBAL_BATCH = 16

SETTINGS: dict[str, Any] = {
    "steps": 3,
    "optim": {"type": "adamw", "lr": 0.01, "param_groups": [{"pattern": "bias$", "weight_decay": 0.0}]},
    "dataloader": {"val": {"batch_size": 4}},
    "log_interval": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation, clipping, unequal tokens": {"accum_steps": 2, "max_grad_norm": 0.05},
    "SGD, rest of an epoch": {
        "steps": None, "epochs": 2, "accum_steps": 2, "accum_remainder": "step",
        "optim": {"type": "sgd", "lr": 0.1, "momentum": 0.9, "param_groups": None},
    },
    "schedule by step": {"scheduler": {"type": "cosine", "warmup_steps": 1}, "accum_steps": 2},
    "schedule by metric": {
        "eval_interval": 1, "scheduler": {"type": "plateau", "factor": 0.5, "patience": 0, "threshold": 0.5},
    },
}  # fmt: skip
"""Ways to train. What happens to the learning rate shows in the weights."""


class Tied(nn.Module):
    """A frozen layer, a tied weight, and a parameter that no four ranks share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.again = nn.Linear(5, 8)
        self.again.weight = self.net.first.weight
        self.odd = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(x)) * self.odd + self.again(x)[:, :3]


def per_sample(output: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
    """A sum and its count, of samples that are unequally many on every rank."""
    used = (batch[0][:, 0] > -0.3).float()
    return (nn.functional.cross_entropy(output.float(), batch[1], reduction="none") * used).sum(), used.sum()


def whole_weights(trained: Any) -> dict[str, Tensor]:
    engine = trained.setup.assembled.engine
    if engine is None:
        return {name: item.detach().clone() for name, item in trained.model.state_dict().items()}
    with engine.whole_weights():
        return {name: item.detach().clone() for name, item in trained.model.state_dict().items()}


def settings_of(degree: int, changes: Mapping[str, Any], stage: int | None) -> dict[str, Any]:
    size = GLOBAL_BATCH // degree // int(changes.get("accum_steps", 1))
    layout = {"dataloader": {"batch_size": size}, "parallel": {"axes": {"replicate": degree}}}
    merged = OmegaConf.to_container(OmegaConf.merge(SETTINGS, layout, dict(changes)))
    if stage is not None:
        zero = {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
        merged = OmegaConf.to_container(OmegaConf.merge(zero, merged))  # type: ignore[arg-type]
    return merged  # type: ignore[return-value]


class Killed(Exception):
    """The process ended here."""


def trained(
    root: str, degree: int, changes: Mapping[str, Any], stage: int | None, *, kill_at: int | None = None, **options: Any
) -> dict[str, Any]:
    """Train to the end, or until the process is lost after step `kill_at`."""
    model = options.pop("model", Tied)
    options.setdefault("loss", per_sample)
    train = options.pop("train", None) or Pairs(56)
    run = runner(root, settings_of(degree, changes, stage))
    losses: list[float] = []
    try:
        run.prepare(model, {"train": train, "val": Pairs(9, seed=1)}, **options)
        began = run.global_step
        for batch in run.batches("train"):
            losses.append(run.step(batch).item())
            if run.global_step == kill_at:
                raise Killed
        run.finish()
    except Killed:
        pass
    finally:
        run.close()
    return {
        "weights": whole_weights(run),
        "results": run.results,
        "rates": [group["lr"] for group in run.optimizer.param_groups],
        "losses": losses,
        "began": began,
        "run": run.world.attempt.run_directory,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@functools.cache
def alone(root: str, variant: str) -> dict[str, Any]:
    return trained(root, 1, VARIANTS[variant], None)


def close(found: Mapping[str, Any], expected: Mapping[str, Any], within: float = 1e-6) -> None:
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=within)
    for name in ("val.loss",):
        assert found["results"][name] == pytest.approx(expected["results"][name], abs=within * 10)
    assert found["rates"] == pytest.approx(expected["rates"])


def cases(root: str, degree: int, chosen: list[tuple[int, str]]) -> dict[tuple[int, str], dict[str, Any]]:
    linear = nn.functional.linear
    found = {(stage, variant): trained(root, degree, VARIANTS[variant], stage) for stage, variant in chosen}
    assert nn.functional.linear is linear, "DeepSpeed has replaced a function of torch for the whole process"
    return found


@pytest.mark.parametrize("degree", [1, 2])
def test_every_stage_is_one_process(root: str, degree: int) -> None:
    """Weights after some steps, the score and the learning rates."""
    fewer = [variant for variant in VARIANTS if degree == 2 or variant in list(VARIANTS)[1:2]]
    chosen = [(stage, variant) for stage in STAGES for variant in fewer]
    for of_rank in shared(cases, degree, root, degree, chosen):
        for (_, variant), found in of_rank.items():
            close(found, alone(root, variant))


def on_stacks(root: str) -> dict[str, tuple[bool, bool]]:
    """Whether the optimizer's step is one graph, and whether the model is in the hands of an engine."""
    found = {}
    for stack in ("auto", "parallel", "graph", "deepspeed"):
        run = runner(root, {"stack": stack})
        run.prepare(Net, {"train": Pairs(56)}, loss=loss)
        found[stack] = (run.setup.compiled_update is not None, run.setup.assembled.engine is not None)
        run.close()
    return found


def test_the_stack_is_the_one_that_was_chosen(root: str) -> None:
    wanted = {"auto": (False, False), "parallel": (False, False), "graph": (True, False), "deepspeed": (False, True)}
    assert shared(on_stacks, 1, root) == [wanted]
    with pytest.raises(ConfigRefused, match="stack"):  # it is for layouts that only replicate
        runner(root, {"stack": "ddp", "fsdp": {"enabled": True}})


def held(root: str, stage: int) -> dict[str, Any]:
    """What a rank holds between two steps, as shares of the parameters."""
    run = runner(root, settings_of(2, {}, stage))
    run.prepare(Net, {"train": Pairs(56), "val": Pairs(9, seed=1)}, loss=loss)
    for batch in run.batches("train"):
        run.step(batch)
    total = sum(item.numel() for item in Net().parameters())
    states = [item for state in run.optimizer.state.values() for item in state.values() if item.numel() > 1]
    weights = sum(item.numel() for item in run.model.parameters())
    reduces = run.setup.zero is not None and getattr(run.setup.zero.zero, "partition_gradients", stage == 3)
    run.close()
    return {"states": sum(item.numel() for item in states) / 2 / total, "weights": weights / total, "cuts": reduces}


def of_stages(root: str) -> list[dict[str, Any]]:
    return [held(root, stage) for stage in STAGES]


def test_a_rank_holds_what_the_stage_says(tmp_path: Path) -> None:
    zero, one, two, three = shared(of_stages, 2, str(tmp_path))[1]
    assert zero["states"] == 1
    for part in (one, two, three):
        assert 0.4 < part["states"] < 0.8  # padded
    assert (zero["weights"], one["weights"], two["weights"]) == (1, 1, 1)
    assert (zero["cuts"], one["cuts"], two["cuts"], three["cuts"]) == (False, False, True, True)


SAVING: dict[str, Any] = {
    "steps": 6,
    "eval_interval": 3,
    "accum_steps": 2,
    "max_grad_norm": 0.5,
    "checkpoint": {"load_only": False, "interval": 2},
    "scheduler": {"type": "cosine"},
}


def resumed(root: str, stage: int) -> dict[str, Any]:
    whole = trained(f"{root}/whole", 2, SAVING, stage, model=DropoutNet)
    killed = trained(f"{root}/killed", 2, SAVING, stage, model=DropoutNet, kill_at=5)
    again = trained(f"{root}/killed", 2, {**SAVING, "resume": str(killed["run"])}, stage, model=DropoutNet)
    return {"whole": whole, "resumed": again}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path: Path, stage: int) -> None:
    """With dropout, accumulation, a schedule and the optimizer's state; under ZeRO 0 all of it is torch's own."""
    for found in shared(resumed, 2, str(tmp_path), stage):
        assert found["resumed"]["began"] == 4
        assert found["resumed"]["losses"] == found["whole"]["losses"][-4:]
        assert equal(found["resumed"]["weights"], found["whole"]["weights"])
    folder = found["whole"]["run"] / "checkpoints"
    assert {item.name for item in folder.iterdir() if item.is_symlink()} == {"latest", "best"}
    # Nothing of DeepSpeed's own: tensors by name, what all ranks share, and each rank's own.
    files = {item.name for item in (folder / "latest").iterdir()}
    assert {"state.pt", "shared.pt", "rank-0.pt", "rank-1.pt"} < files
    assert not [name for name in files if "zero" in name or "mp_rank" in name]


def exported(root: str, stage: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    changes = {"checkpoint": {"load_only": False, "last_save_model_only": True}}
    found = trained(root, 2, changes, stage)
    written = load_file(found["run"] / "checkpoints" / "export" / "model.safetensors")
    started = trained(f"{root}/next", 2, {"pretrained": str(found["run"] / "checkpoints" / "export"),
                                          "optim": {"lr": 0.0, "weight_decay": 0.0}}, stage)  # fmt: skip
    return {**found, "written": written, "started": started["weights"]}


@pytest.mark.parametrize("stage", [2, 3])
def test_an_export_holds_the_whole_weights(tmp_path: Path, stage: int) -> None:
    """And another run starts from them."""
    for found in shared(exported, 2, str(tmp_path), stage):
        assert equal(found["written"], found["weights"])
        assert equal(found["started"], found["weights"])


OFFLOAD = {"device": "cpu"}
ON_HOST = [
    (2, {"offload_optimizer": OFFLOAD}),
    (3, {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}),
]
HALF: dict[str, Any] = {"precision": "bf16", "accum_steps": 2}


def on_host_and_in_bf16(root: str) -> dict[str, list[dict[str, Any]]]:
    found = []
    for stage, zero in ON_HOST:
        changes = {**VARIANTS["accumulation, clipping, unequal tokens"], "deepspeed": {"zero_optimization": zero}}
        found.append(trained(root, 2, changes, stage))
    return {"host": found, "bf16": [trained(root, 2, HALF, stage) for stage in STAGES]}


def test_offload_and_bf16(root: str, tmp_path: Path) -> None:
    half = trained(str(tmp_path), 1, HALF, None)
    for found in shared(on_host_and_in_bf16, 2, root):
        for item in found["host"]:
            close(item, alone(root, "accumulation, clipping, unequal tokens"))
        for item in found["bf16"]:
            close(item, half, within=2e-2)
            assert all(value.dtype == torch.float32 for value in item["weights"].values())


class Poisoned(Pairs):
    """Two samples that are not finite."""

    def __init__(self) -> None:
        super().__init__(56)
        self.inputs[20:22] = float("nan")


class Stream(IterableDataset[Any]):
    """Five micro-batches a rank of data without a length: the rest of an epoch shows when it ends."""

    def __init__(self, degree: int) -> None:
        self.degree = degree

    def shard(self, num_shards: int, index: int) -> Stream:
        self.rank = index
        return self

    def __iter__(self) -> Iterator[Any]:
        pairs, rank = Pairs(40), getattr(self, "rank", 0)
        size = 8 // self.degree
        for number in range(5):
            yield from (pairs[number * 8 + rank * size + index] for index in range(size))


NONFINITE = {"dataloader": {"shuffle": False}, "steps": 3}
REST = {"steps": None, "epochs": 3, "accum_steps": 2, "checkpoint": {"load_only": True}}


def faults_of_steps(root: str, degree: int, stages: Iterable[int | None]) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for stage in stages:
        for mode in ("skip", "count") if stage else ("skip",):
            changes = {**NONFINITE, "nonfinite": mode}
            found[stage, mode] = trained(root, degree, changes, stage, train=Poisoned(), loss=loss)
        found[stage, "rest"] = trained(root, degree, REST, stage, train=Stream(degree), loss=loss)
    return found


def test_steps_that_are_not_finite_or_not_whole_are_left_out(root: str) -> None:
    """ZeRO leaves them out whatever `nonfinite` says; micro-batches at the end of an epoch are dropped."""
    expected = faults_of_steps(f"{root}/faults", 1, [None])
    for found in shared(faults_of_steps, 2, f"{root}/faults", 2, list(STAGES)):
        for (_, what), item in found.items():
            close(item, expected[None, "rest" if what == "rest" else "skip"])


class Looks(Callback):
    """Looks at gradients, which ZeRO has cut."""

    def on_before_optimizer_step(self, runner: TrainingRun) -> None:
        raise AssertionError("it is refused before")


class Unused(Net):
    """A parameter that nothing uses; or only the first step."""

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self.spare, self.first_uses, self.calls = nn.Parameter(torch.ones(3)), first, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * (self.spare if self.first_uses and self.calls <= 1 else 1.0)


def refusals(root: str, stage: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, options in {
        "gradients": {"callbacks": [Looks()]},
        "average": {"callbacks": [EMA(0.5)]},
        "unused": {"model": Unused},
        "unused later": {"model": functools.partial(Unused, first=True)},
    }.items():
        try:
            found[name] = trained(root, 2, {}, stage, **options)["results"]["val.loss"]
        except ConfigRefused as error:
            found[name] = str(error)
    return found


def test_what_zero_cannot_do_is_refused(root: str) -> None:
    averaged = trained(f"{root}/average", 1, {}, None, callbacks=[EMA(0.5)])["results"]["val.loss"]
    for stage in (2, 3):
        for found in shared(refusals, 2, f"{root}/average", stage):
            assert "on_before_optimizer_step finds no gradients" in found["gradients"]
            assert "get no gradient: spare" in found["unused"]
            assert "in some steps and none in others: spare" in found["unused later"]
            if stage == 3:
                assert "callbacks=EMA" in found["average"]
            else:
                assert found["average"] == pytest.approx(averaged, abs=1e-5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x))


class Deep(nn.Module):
    """Blocks, which are recomputed or compiled one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = Net()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def with_blocks(root: str) -> list[dict[str, Any]]:
    recomputed = {"activation_checkpointing": {"mode": "full"}}
    compiled = {"compile": {"enable": True, "backend": "aot_eager"}}
    return [
        trained(root, 2, {**recomputed, "accum_steps": 2}, 3, model=Deep),
        trained(root, 2, {**compiled, "accum_steps": 2}, 2, model=Deep),
    ]


def test_blocks_are_recomputed_and_compiled(root: str) -> None:
    expected = trained(f"{root}/blocks", 1, {}, None, model=Deep)
    for of_rank in shared(with_blocks, 2, f"{root}/blocks"):
        for found in of_rank:
            close({**found, "weights": {clean(name): item for name, item in found["weights"].items()}}, expected)


def clean(name: str) -> str:
    return name.replace("_checkpoint_wrapped_module.", "")


def started_beside_a_lock(root: str, extensions: str) -> list[str]:
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    trained(root, 2, {}, 2)
    return sorted(str(path.relative_to(extensions)) for path in Path(extensions).rglob("*") if path.is_file())


def test_a_lock_of_a_killed_build_is_not_waited_for(root: str, tmp_path: Path) -> None:
    """Nothing of DeepSpeed's is compiled when ranks start."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    for found in shared(started_beside_a_lock, 2, f"{root}/lock", str(tmp_path)):
        assert found == ["deepspeed_shm_comm/lock"]


OTHER = {**SAVING, "force_resume": True, "parallel": {"allow_degree_change": True}}


def test_a_run_goes_on_under_another_stage_stack_and_number_of_ranks(tmp_path: Path) -> None:
    """2 ranks of ZeRO 2, then 4 of ZeRO 3, then one process without DeepSpeed: as if it had been one all along."""
    expected = trained(str(tmp_path / "alone"), 1, SAVING, None)
    first = shared(trained_on, 2, str(tmp_path / "a"), 2, SAVING, 2, 2)[0]
    second = shared(trained_on, 4, str(tmp_path / "b"), 4, {**OTHER, "resume": str(first["run"])}, 3, 4)[0]
    assert second["began"] == 2
    last = trained(str(tmp_path / "c"), 1, {**OTHER, "resume": str(second["run"])}, None)
    assert last["began"] == 4
    close(last, expected)
    back = shared(trained_on, 4, str(tmp_path / "d"), 4, {**OTHER, "resume": str(last["run"])}, 1, None)[0]
    assert back["began"] == 6
    close(back, expected)


def trained_on(root: str, degree: int, changes: Mapping[str, Any], stage: int, kill_at: int | None) -> dict[str, Any]:
    return trained(root, degree, changes, stage, kill_at=kill_at)


def test_every_stage_is_one_process_on_four_ranks(root: str) -> None:
    """Last, in the world that the test before this one has used."""
    variant = "accumulation, clipping, unequal tokens"
    for of_rank in shared(cases, 4, root, 4, [(stage, variant) for stage in STAGES]):
        for found in of_rank.values():
            close(found, alone(root, variant))
