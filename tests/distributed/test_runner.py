"""The runner under layouts that share a model: the losses, the evaluation and the outcome of a single process."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import Dataset
from torchmetrics.classification import MulticlassAccuracy

from danling_conf import ConfigRefused
from danling_conf.groups.layout_names import parse_layout
from danling_conf.schema.parallel import PIPELINE_SCHEDULES
from danling_conf.topology.layout import rank_at
from models.decoder import Decoder, DecoderConfig
from tests.support.small import runner
from tests.support.spawn import shared

pytestmark = pytest.mark.slow

LENGTH, VOCABULARY = 8, 16
SIZES = (1, 3, 9)
"""Of held-out splits with batches of four: fewer samples than data ranks or microbatches, and an incomplete batch."""

LAYOUTS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("tp2", "cp2", "pp2", "fsdp2_ep2")},
    **{f"pp2 {schedule}": {"pipeline_schedule": schedule} for schedule in PIPELINE_SCHEDULES},
    "pp2 of two samples": {"pipeline_microbatch_size": 2},
    "pp2 of two microbatches": {"pipeline_n_microbatches": 2},
    "tp2 sequence": {"sequence_parallel": True},
    **{name: {} for name in ("fsdp2_tp2", "fsdp2_cp2", "fsdp2_pp2", "pp2_tp2")},
    "fsdp2_pp2 ZBVZeroBubble": {"pipeline_schedule": "ZBVZeroBubble"},
}


class Tokens(Dataset[tuple[Tensor, Tensor]]):
    """`size` sequences and what comes next, the same in every process."""

    def __init__(self, size: int, seed: int) -> None:
        self.tokens = torch.randint(VOCABULARY, (size, LENGTH + 1), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.tokens[index, :-1], self.tokens[index, 1:]


class Seen:
    """How many samples there were; a metric that knows nothing of ranks."""

    def reset(self) -> None:
        self.samples = 0

    def update(self, output: Tensor, targets: Tensor) -> None:
        self.samples += len(targets)

    def compute(self) -> float:
        return float(self.samples)


class PerToken(MulticlassAccuracy):
    """Accuracy of (batch, sequence, classes)."""

    def update(self, output: Tensor, targets: Tensor) -> None:
        super().update(output.flatten(0, 1), targets.flatten())


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), batch[1].flatten())


def outcome(root: str, name: str, batch_size: int, experts: int) -> dict[str, Any]:
    """Train three steps with accumulation and clipping, evaluating splits of all sizes."""
    layout = parse_layout(name.partition(" ")[0])
    settings = {
        "steps": 3,
        "accum_steps": 2,
        "max_grad_norm": 0.5,
        "score_name": "accuracy",
        "dataloader": {"batch_size": batch_size, "val": {"batch_size": 4}},
        "parallel": {"axes": layout.degrees(), **LAYOUTS.get(name, {})},
        "fsdp": {"enabled": layout.fsdp},
        "log_interval": 1,
    }
    ours = runner(root, settings)
    config = DecoderConfig(
        width=16, depth=4, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY, experts=experts
    )
    splits = {"val": Tokens(8, 1), **{f"held{size}": Tokens(size, size) for size in SIZES}}
    datasets = {"train": Tokens(64, 0), **splits}
    metrics: dict[str, Any] = {"accuracy": functools.partial(PerToken, VOCABULARY, average="micro")}
    if layout.data_degree == 1:
        metrics["seen"] = Seen
    told: list[bool] = []

    def report(model: nn.Module | None, results: Any) -> list[str]:
        if model is not None:
            # Outside of a step: whole sequences in, whole outputs out, on every rank alike.
            told.append(tuple(model(datasets["val"].tokens[:2, :-1]).shape) == (2, LENGTH, VOCABULARY))
        return []

    ours.prepare(functools.partial(Decoder, config), datasets, loss=loss, metrics=metrics, report=report)
    losses = [ours.step(batch).item() for batch in ours.batches("train")]
    ours.finish()
    ours.close()
    return {"results": ours.results, "losses": losses, "score": ours.score.best, "told": told}


@functools.cache
def alone(root: str, experts: int) -> dict[str, Any]:
    return outcome(root, "single", 8, experts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_that_of_a_single_process(root: str, name: str) -> None:
    layout = parse_layout(name.partition(" ")[0])
    experts = 4 if layout.expert > 1 else 0
    expected = alone(root, experts)
    ranks = shared(outcome, layout.world_size, root, name, 8 // layout.data_degree, experts)
    assert "val.loss" in expected["results"]
    assert "held9.accuracy" in expected["results"]
    assert ("train.expert_load" in expected["results"]) == bool(experts)
    assert expected["results"]["held9.seen"] == 9
    results = {key: value for key, value in expected["results"].items() if layout.data_degree == 1 or "seen" not in key}
    for found in ranks:
        assert found["results"] == pytest.approx(results, rel=1e-5)
        assert found["score"] == pytest.approx(expected["score"])
        assert found["told"] == ([] if layout.pipeline > 1 else [True])
    # Means over the data ranks; only the last stage has the loss.
    last = [rank_at(layout, {**dict.fromkeys(("replicate", "context", "tensor"), 0), "shard": shard,
                             "pipeline": layout.pipeline - 1}) for shard in range(layout.shard)]  # fmt: skip
    if layout.context == 1 and "V" not in name:
        mean = [sum(values) / len(last) for values in zip(*(ranks[rank]["losses"] for rank in last), strict=True)]
        assert mean == pytest.approx(expected["losses"], rel=1e-5)
        assert all(math.isnan(value) for rank, found in enumerate(ranks) if layout.pipeline > 1 and rank < last[0]
                   for value in found["losses"])  # fmt: skip


class Plain(nn.Module):
    """No plan, and no repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def refusal(root: str, name: str, model: Any, parallel: dict[str, Any]) -> str:
    """What every rank says of a model that the layout does not fit."""
    layout = parse_layout(name)
    ours = runner(root, {
        "steps": 1, "dataloader": {"batch_size": 4}, "fsdp": {"enabled": layout.fsdp},
        "parallel": {"axes": layout.degrees(), **parallel},
    })  # fmt: skip
    with pytest.raises(ConfigRefused) as refused:
        ours.fit(model, {"train": Tokens(16, 0)}, loss=loss)
    dist.barrier()  # nobody is left behind
    return refused.value.report()


def decoder(**settings: Any) -> Any:
    return functools.partial(Decoder, DecoderConfig(
        **{"width": 16, "depth": 2, "heads": 2, "hidden": 16, "context": LENGTH, "vocab_size": VOCABULARY, **settings}
    ))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "model", "parallel", "path", "rule", "fix"),
    [
        ("tp2", Plain, {}, "parallel.axes.tensor=2", "nothing lays Plain out", "tp_plan"),
        ("cp2", Plain, {}, "parallel.axes.context=2", "nothing lays Plain out", "cp_plan"),
        ("pp2", Plain, {}, "parallel.axes.pipeline", "no repeated blocks", "module_fqns_per_model_part"),
        ("fsdp2_ep2", decoder(), {}, "parallel.axes.expert=2", "nothing lays Decoder", "experts"),
        ("fsdp2_ep2", Plain, {}, "parallel.axes.expert=2", "nothing lays Plain out", "ep_plan"),
        ("tp2_etp2", Plain, {"tensor_plan": {"head": "colwise_rep"}}, "parallel.axes.expert_tensor=2", "Plain",
         "ep_plan"),
        ("tp2", Plain, {"tensor_plan": {"heads": "colwise"}}, "parallel.tensor_plan.heads=colwise",
         "no module of this name", "correct the name"),
        ("tp2", decoder(heads=1), {}, "parallel.axes.tensor=2", "must divide model.heads=1", "divisor"),
        ("tp2", decoder(hidden=15), {}, "parallel.axes.tensor=2", "15 output features", "divisor"),
        ("tp2", Plain, {"tensor_plan": {"head": "colwise_rep"}, "sequence_parallel": True},
         "parallel.sequence_parallel=true", "no sequence_plan", "false"),
        ("cp3", decoder(), {}, "parallel.axes.context=3", "8 tokens cannot be cut into 6 pieces", "multiple of 6"),
        ("pp2", decoder(depth=1), {}, "parallel.axes.pipeline", "no repeated blocks", "module_fqns"),
        ("pp2", decoder(), {"pipeline_schedule": "Interleaved1F1B"}, "parallel.axes.pipeline", "2 repeated blocks",
         "deeper model"),
        ("pp2", decoder(tie_embeddings=True), {}, "parallel.axes.pipeline", "tied parameter", "untie"),
        ("pp2", decoder(), {"module_fqns_per_model_part": [["embedding"], ["layers.0", "layers.1", "norm"]]},
         "parallel.module_fqns_per_model_part", "head.weight is in no stage", "exactly one"),
        ("pp2", decoder(),
         {"module_fqns_per_model_part": [["embedding", "layers.0"], ["layers.0", "layers.1", "head"]]},
         "parallel.module_fqns_per_model_part[1]=layers.0", "in stages 0 and 1", "once"),
        ("pp2", decoder(), {"module_fqns_per_model_part": [["embed"], ["layers", "norm", "head"]]},
         "parallel.module_fqns_per_model_part[0]=embed", "no module of this name", "correct"),
        ("fsdp2_ep2", decoder(experts=3), {}, "parallel.axes.expert=2", "must divide the 3 experts", "divisor"),
    ],
)  # fmt: skip
def test_what_a_model_does_not_implement_is_refused_by_all_ranks(
    root: str, name: str, model: Any, parallel: dict[str, Any], path: str, rule: str, fix: str
) -> None:
    said = set(shared(refusal, parse_layout(name).world_size, root, name, model, parallel))
    assert len(said) == 1
    (text,) = said
    assert text.startswith(f"configuration refused: 1 fault\n  {path}\n")
    assert rule in text
    assert fix in text


class OwnLayout(nn.Module):
    """Lays itself out over the tensor axis."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY, bias=False)

    def parallelize(self, mesh: DeviceMesh) -> None:
        parallelize_module(self.head, mesh["tensor"], ColwiseParallel(output_layouts=Replicate()))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def losses_of(root: str, name: str, parallel: dict[str, Any]) -> tuple[list[float], bool, int]:
    """Losses, whether there is a mesh, and how many parameters are sharded."""
    layout = parse_layout(name)
    ours = runner(root, {
        "steps": 3, "dataloader": {"batch_size": 8 // layout.data_degree},
        "parallel": {"axes": layout.degrees(), **parallel},
    })  # fmt: skip
    ours.prepare(OwnLayout, {"train": Tokens(64, 0)}, loss=loss)
    losses = [ours.step(batch).item() for batch in ours.batches("train")]
    sharded = sum(isinstance(parameter, DTensor) for parameter in ours.model.parameters())
    ours.finish()
    return losses, ours.world.mesh is not None, sharded


def test_a_model_may_lay_itself_out(root: str) -> None:
    expected, _, _ = losses_of(root, "single", {})
    for losses, _, sharded in shared(losses_of, 2, root, "tp2", {}):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert sharded == 1


def test_replicas_need_no_device_mesh(root: str) -> None:
    expected, _, _ = losses_of(root, "single", {})
    for use in (True, False):
        ranks = shared(losses_of, 2, root, "ddp2", {"use_device_mesh": use, "mesh_device_type": "cpu"})
        assert [mesh for _, mesh, _ in ranks] == [use, use]
        mean = [(left + right) / 2 for left, right in zip(ranks[0][0], ranks[1][0], strict=True)]
        assert mean == pytest.approx(expected, rel=1e-5)


class Misnamed(Decoder):
    """Plans that name nothing."""

    tp_plan = {"blocks.*.wq": "colwise"}
    cp_plan = {"layers.*.attention.inner": "causal_attention"}


class WithoutPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.cp_plan = {"inner": "causal_attention"}

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens)


def misnamed() -> Misnamed:
    return Misnamed(DecoderConfig(width=16, depth=2, heads=2, hidden=16, context=LENGTH, vocab_size=VOCABULARY))


@pytest.mark.parametrize(
    ("name", "model", "rule"),
    [
        ("tp2", misnamed, "no name in the tp_plan of Misnamed stands for one of its modules"),
        ("cp2", misnamed, "the cp_plan of Misnamed names what is no module of it: layers.*.attention.inner"),
        ("cp2", WithoutPositions, "WithoutPositions has no argument positions"),
    ],
)
def test_a_plan_that_would_do_nothing_is_refused(root: str, name: str, model: Any, rule: str) -> None:
    (text,) = set(shared(refusal, 2, root, name, model, {}))
    assert rule in text


def own_loss(root: str) -> str:
    ours = runner(root, {"steps": 1, "dataloader": {"batch_size": 4}, "parallel": {"axes": {"context": 2}}})
    with pytest.raises(ConfigRefused) as refused:
        ours.fit(decoder(), {"train": Tokens(16, 0)})
    dist.barrier()
    return refused.value.report()


def test_a_model_s_own_loss_would_shift_labels_inside_of_a_part(root: str) -> None:
    (text,) = set(shared(own_loss, 2, root))
    assert "the model's own loss shifts labels" in text


class Normed(nn.Module):
    """Running statistics, which a pass of anything but data would spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList([NormedBlock() for _ in range(2)])
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class NormedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


def statistics(root: str, name: str, microbatches: int) -> dict[str, Tensor]:
    layout = parse_layout(name)
    ours = runner(root, {
        "steps": 1, "dataloader": {"batch_size": 4}, "accum_steps": 1,
        "parallel": {"axes": layout.degrees(), "pipeline_n_microbatches": microbatches},
    })  # fmt: skip
    ours.prepare(Normed, {"train": Tokens(16, 0)}, loss=loss)
    for batch in ours.batches("train"):
        ours.step(batch)
    ours.finish()
    return {name: value.clone() for part in ours.parts for name, value in part.named_buffers()}


def test_running_statistics_are_those_of_the_data(root: str) -> None:
    """Torch passes something through each stage to find out its shapes."""
    ranks = shared(statistics, 2, root, "pp2", 2)
    assert ranks[0]["layers.0.norm.num_batches_tracked"] == 2
    assert ranks[1]["layers.1.norm.num_batches_tracked"] == 2
