"""Figures of layouts without real ranks: extension by depth, what layouts have in common, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import danling_conf
from danling_conf.plan.depth import names_in, runs_of, shortened
from danling_conf.plan.engine import figures_of, subject_of
from danling_conf.plan.figures import ACTIVATIONS, OPTIMIZER, PARAMETERS, LayoutFigures
from danling_conf.plan.remedies import remedies_of
from danling_conf.plan.time import step_time
from danling_conf.plan.trace import Subject
from danling_conf.runner.planning import Recipe
from danling_conf.topology.hardware import GPUS, Cluster
from danling_conf.topology.violation import ConfigRefused, SettingError
from models.decoder import Decoder, DecoderConfig
from tests.plan.accuracy import loss

pytestmark = pytest.mark.slow

LENGTH = 32


def subject(*overrides: str, depth: int = 8, batch: int = 4, **model: Any) -> Subject:
    config = danling_conf.compose(["steps=3", f"dataloader.batch_size={batch}", *overrides])
    settings = {"width": 64, "heads": 4, "kv_heads": 4, "context": LENGTH, "vocab_size": 64, **model}
    sample = (torch.zeros(LENGTH, dtype=torch.int64),) * 2
    return subject_of(
        Recipe(
            config=config,
            model=partial(Decoder, DecoderConfig(depth=depth, **settings)),
            datasets={"train": [sample] * 8},
            loss=loss,
        )
    )


def figures(*overrides: str, **settings: Any) -> LayoutFigures:
    return figures_of(subject(*overrides, **settings))


def alternating(count: int) -> nn.Module:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, width), nn.Linear(width, 8)

    model = nn.Module()
    model.layers = nn.ModuleList(Block(8 + number % 2) for number in range(count))
    return model


def test_blocks_that_repeat_in_a_pattern_are_cut_by_whole_patterns():
    model = alternating(13)
    runs = runs_of(model)
    assert [(len(run.blocks), run.period, run.units) for run in runs] == [(12, 2, 6), (1, 1, 1)]
    few = shortened(model, runs, [3, 3])
    assert [block.first.out_features for block in few.layers] == [8, 9, 8, 9, 8, 9, 8]
    assert names_in(runs, [3, 3]) == [[f"layers.{place}" for place in range(6)], ["layers.6"]]


@pytest.mark.parametrize(
    "overrides",
    [
        ("parallel=fsdp4", "precision=bf16", "accum_steps=2"),
        ("parallel=fsdp2_tp2", "activation_checkpointing.mode=full"),
        ("parallel=single", "activation_checkpointing.mode=every_n"),
    ],
    ids=" ".join,
)
def test_few_blocks_extended_are_the_whole_model(overrides, monkeypatch):
    found = figures(*overrides)
    # So many units count as few: the whole model is traced.
    monkeypatch.setattr("danling_conf.plan.depth.FEW", 100)
    whole = figures(*overrides)
    for rank, other in zip(found.ranks, whole.ranks, strict=True):
        assert rank.peak == other.peak
        assert rank.peak_moment == other.peak_moment
        assert [moment.name for moment in rank.moments] == [moment.name for moment in other.moments]
        assert rank.flops == other.flops
        assert rank.hbm_bytes == other.hbm_bytes
        assert rank.collectives == other.collectives


def test_figures_of_a_rank_add_up():
    model = figures("parallel=fsdp4_tp2", "accum_steps=3")
    (rank,) = model.ranks
    parameters = model.parameters * 4
    assert rank.ranks == 8
    assert model.samples == 4 * 4 * 3
    assert model.tokens == model.samples * LENGTH
    # Norms are whole on each tensor rank, and fp32 AdamW keeps two numbers for each weight.
    assert parameters / 8 <= rank.peak[PARAMETERS] < parameters / 8 * 1.1
    assert rank.peak[OPTIMIZER] == pytest.approx(2 * rank.peak[PARAMETERS], rel=0.01)
    by_axis = {(item.kind, item.axis) for item in rank.collectives}
    assert {("all_gather", "shard"), ("reduce_scatter", "shard"), ("all_reduce", "tensor")} <= by_axis
    reduced = next(item for item in rank.collectives if item.kind == "reduce_scatter")
    assert (reduced.group_size, reduced.stride) == (4, 2)
    # Gradients are reduced once a step, not once a micro-batch.
    assert reduced.bytes == pytest.approx(parameters / 2, rel=0.1)


def test_a_step_costs_six_operations_a_weight_and_token():
    model = figures("parallel=single", depth=6, width=128)
    (rank,) = model.ranks
    embedding = 64 * 128
    products = 6 * (model.parameters - embedding) * model.tokens
    assert rank.flops["float32"] == pytest.approx(products, rel=0.01)
    # Half of all pairs, and the diagonal, see each other. Two products forward and five backward, of 4 heads each.
    attention, masked = rank.flops["float32 attention"], rank.flops["float32 masked"]
    assert masked / (attention + masked) == pytest.approx((LENGTH - 1) / (2 * LENGTH), rel=0.01)
    assert attention + masked == 7 * 2 * 6 * model.tokens * LENGTH * 128
    again = figures("parallel=single", "activation_checkpointing.mode=full", depth=6, width=128).ranks[0]
    # The forward of the blocks, up to the last tensor that backward needs; not the head's.
    assert 0.7 < again.recomputed_flops / (rank.flops["float32"] / 3) < 1
    assert sum(again.flops.values()) == sum(rank.flops.values()) + again.recomputed_flops


def test_a_thousand_ranks_are_planned_as_one():
    model = figures("parallel=fsdp128_tp4_pp2")
    assert [(rank.stages, rank.ranks) for rank in model.ranks] == [((0,), 512), ((1,), 512)]
    assert model.microbatches == 4
    # What time reads of the settings is what the engine writes into them.
    assert step_time(model, Cluster(gpu=GPUS["h100"])).bubble > 0


def test_stages_run_as_a_part_of_a_step():
    model = figures("parallel=tp2_cp2_pp2", depth=2)
    # Each rank attends to the whole sequence, and the logits stay sharded.
    assert all(
        ("all_gather", "context") in {(item.kind, item.axis) for item in rank.collectives} for rank in model.ranks
    )
    alone = figures("parallel=tp2_cp2", depth=2)

    def passed(ranks: Any) -> int:
        return sum(item.bytes for rank in ranks for item in rank.collectives if item.axis == "tensor")

    assert passed(model.ranks) <= 1.1 * passed(alone.ranks)


def test_compiled_code_keeps_and_moves_less():
    eager, found = figures("parallel=single").ranks[0], figures("parallel=single", "compile.enable=true")
    assert not found.notes
    rank = found.ranks[0]
    assert rank.flops == eager.flops
    assert rank.recomputed_flops == eager.recomputed_flops
    assert rank.hbm_bytes < 0.8 * eager.hbm_bytes
    assert rank.peak_bytes < eager.peak_bytes
    # Nothing of a graph is left once backward is over.
    assert rank.moments[-1] == eager.moments[-1]


def test_a_schedule_decides_how_many_microbatches_are_kept():
    def kept(schedule: str) -> int:
        settings = ("parallel=pp2", f"parallel.pipeline_schedule={schedule}", "dataloader.batch_size=8")
        return figures(*settings, width=128).ranks[0].peak[ACTIVATIONS]

    assert kept("GPipe") > 2.5 * kept("1F1B")


def test_a_busy_expert_is_named_as_the_worst_case():
    model = figures("parallel=fsdp4_ep2", experts=4)
    assert any(item.kind == "all_to_all" and item.axis == "shard" for item in model.worst.collectives)
    assert any("2 times the mean" in note for note in model.notes)


def test_remedies_say_what_they_save():
    given = subject("parallel=single", depth=3, width=128, batch=8)
    found = remedies_of(given, figures_of(given))
    saved = {remedy.overrides: remedy.saves for remedy in found}
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    full = figures_of(
        replace(
            given,
            config=replace(
                given.config, activation_checkpointing=replace(given.config.activation_checkpointing, mode="full")
            ),
        )
    )
    assert saved["activation_checkpointing.mode=full"] == figures_of(given).worst.peak_bytes - full.worst.peak_bytes
    assert "dataloader.batch_size=4 accum_steps=2" in saved


def test_figures_pass_through_json():
    model = figures("parallel=fsdp2")
    assert LayoutFigures.from_json(model.as_json()) == model


class Lost(nn.Module):
    """Asks for a value in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.map(x)
        return out if out.sum().item() > 0 else -out


def test_a_model_that_asks_for_values_is_refused_by_name():
    config = danling_conf.compose(["steps=3", "parallel=single"])
    recipe = Recipe(
        config=config,
        model=Lost,
        datasets={"train": [(torch.zeros(4), torch.zeros(4))]},
        loss=lambda output, batch: output.sum(),
    )
    with pytest.raises(SettingError, match=r"Lost.*value of a tensor") as refused:
        figures_of(subject_of(recipe))
    assert "test_engine.py" in str(refused.value)


class Rates(nn.Module):
    """Asks for values while it is built, as models with a rate for each block do."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
        self.map = nn.Linear(4, 4)
        nn.init.trunc_normal_(self.map.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x) * self.rates[-1]


class Grouped(nn.Module):
    """Experts in fp32, by one product of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        offsets = torch.full((2,), len(x), dtype=torch.int32) // 2
        return torch.nn.functional.grouped_mm(x, self.weight, offs=offsets)


def of_model(model: Any, width: int, datasets: Any = None, *overrides: str) -> LayoutFigures:
    config = danling_conf.compose(["steps=3", "parallel=single", "dataloader.batch_size=8", *overrides])
    samples = {"train": [(torch.zeros(width), torch.zeros(width))]} if datasets is None else datasets
    recipe = Recipe(config=config, model=model, datasets=samples, loss=lambda output, batch: output.sum())
    return figures_of(subject_of(recipe))


def test_models_that_only_ask_for_values_while_they_are_built():
    assert of_model(Rates, 4).parameters == 4 * 4 + 4


def test_products_of_groups_in_fp32():
    (rank,) = of_model(Grouped, 16).ranks
    assert rank.flops["float32"] == 2 * (2 * 8 * 16 * 16)  # the batch has no gradient


class Looking(Decoder):
    """Looks into a module that the last stage does not hold."""

    def forward(self, tokens: Tensor) -> Tensor:
        assert self.layers[0].attention.wq.weight.dtype.is_floating_point
        return super().forward(tokens)


def test_a_stage_that_lacks_a_module_is_refused_as_a_run_refuses_it():
    given = replace(subject("parallel=pp2"), model=subject_of_looking())
    with pytest.raises(SettingError, match="stage 1 of Looking does not run without the modules") as refused:
        figures_of(given)
    assert refused.value.violation.path == "parallel.axes.pipeline"


def subject_of_looking() -> nn.Module:
    settings = {"width": 64, "heads": 4, "kv_heads": 4, "context": LENGTH, "vocab_size": 64}
    with torch.device("meta"):
        return Looking(DecoderConfig(depth=8, **settings))


def test_a_large_product_hides_what_it_moves():
    rows, width = 8 * 1024, 2048
    samples = {"train": [(torch.zeros(1024, width),) * 2]}
    (rank,) = of_model(partial(nn.Linear, width, width, bias=False), width, samples).ranks
    assert rank.flops == {"float32": 2 * (2 * rows * width * width)}
    # What is left is the sum of the outputs, its gradient and the optimizer; the products move five times `rows`.
    assert rank.hbm_bytes < 4 * (2 * rows * width + 16 * width * width)


class Scaled(nn.Module):
    """Divides by the largest number: of all, as a cast to float8 does, or of each row."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.map, self.dims = nn.Linear(256, 256), dims

    def forward(self, x: Tensor) -> Tensor:
        x = self.map(x)
        return self.map(x / x.detach().abs().amax(self.dims, keepdim=True))


def test_what_needs_one_number_of_all_others_is_another_kernel():
    samples = {"train": [(torch.zeros(1024, 256),) * 2]}
    moved = [
        of_model(partial(Scaled, dims), 256, samples, "compile.enable=true").ranks[0].hbm_bytes
        for dims in ((0, 1, 2), (2,))
    ]
    assert moved[0] - moved[1] == pytest.approx(4 * 8 * 1024 * 256, rel=0.05)


def test_a_factory_that_fails_is_refused_with_its_line():
    def missing() -> nn.Module:
        open("missing.pt").close()
        return Rates()

    with pytest.raises(SettingError, match=r"factory raised FileNotFoundError.*missing.pt") as refused:
        of_model(missing, 4)
    assert "test_engine.py" in str(refused.value)


def test_data_sets_are_refused_as_a_run_refuses_them():
    with pytest.raises(ConfigRefused, match="pass a mapping"):
        of_model(Rates, 4, [(torch.zeros(4), torch.zeros(4))])
