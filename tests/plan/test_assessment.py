"""What a plan makes of figures: memory of the device, time of a step, candidates and their order. Without torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from danling_conf.cli.plan_page import layout_page, write_page
from danling_conf.config.resolve import resolve
from danling_conf.groups.layout_names import name_of, parse_layout
from danling_conf.plan import links
from danling_conf.plan.allocator import unused
from danling_conf.plan.assessment import assess, memory_lines, time_lines
from danling_conf.plan.candidates import Candidate, candidates, configured, global_batch, layouts
from danling_conf.plan.derive import FEW, MORE, costs_of, derived
from danling_conf.plan.device_memory import verdict_of
from danling_conf.plan.figures import Collective, LayoutFigures, Moment, RankFigures
from danling_conf.plan.proposals import overrides_of, proposal_of, ranked, why
from danling_conf.plan.time import bubble_share, step_time
from danling_conf.schema import RunnerConfig
from danling_conf.topology.hardware import GIB, GPUS, Cluster, find_gpu, gpu_reported_as
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context, violations_of
from danling_conf.topology.violation import ConfigRefused

H100 = Cluster(gpu=GPUS["h100"])
DIMS = {"blocks": 8, "heads": 8, "key_value_heads": 4, "sequence": 4096, "width": 1024}


def rank(**changed: Any) -> RankFigures:
    """A rank with round figures."""
    peak = {"parameters": 4 * GIB, "activations": 6 * GIB}
    return replace(
        RankFigures(
            coordinates={"pipeline": 0}, rank=0, ranks=8, stages=(0,), peak=peak, peak_moment="backward layers.7",
            moments=(Moment("forward layers.0", peak),), collectives=(), flops={"bfloat16": 10**15},
            recomputed_flops=0, hbm_bytes=10**12,
        ),
        **changed,
    )  # fmt: skip


def figures(*ranks: RankFigures, **changed: Any) -> LayoutFigures:
    return replace(
        LayoutFigures(
            layout="fsdp8", degrees=parse_layout("fsdp8").degrees(), ranks=ranks or (rank(),), microbatches=1,
            accumulation=1, samples=16, tokens=16 * 4096, parameters=10**9, settings={}, dims=DIMS,
        ),
        **changed,
    )  # fmt: skip


def config(**given: Any) -> RunnerConfig:
    settings = {
        "steps": 3,
        "dataloader": {"batch_size": 4},
        "parallel": {"axes": {"shard": 8}},
        "fsdp": {"enabled": True},
    }
    return resolve({**settings, **given}, context=Context(machine=Machine(devices=8, cluster_world_size=8)))


def passing(kind: str, size: float, ranks: int, stride: int = 1, cluster: Cluster = H100) -> float:
    return links.seconds(Collective(kind, "shard", 1, int(size), ranks, stride), cluster)


# Accelerators.


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: gpu.name)
def test_every_accelerator_is_whole_and_says_where_its_figures_are_from(gpu):
    assert gpu.sources
    assert {"float32", "bfloat16", "float16"} <= gpu.flops.keys()
    assert gpu.flops["float32"] <= gpu.flops["bfloat16"]
    assert 10 * GIB < gpu.memory < 300 * GIB
    assert gpu.network <= gpu.link < gpu.hbm


@pytest.mark.parametrize(
    ("reported", "name"),
    [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100-pcie"), ("NVIDIA A100-SXM4-40GB", "a100-40"),
     ("NVIDIA A100-SXM4-80GB", "a100-80"), ("NVIDIA L40S", "l40s"), ("NVIDIA L4", "l4"), ("NVIDIA A10G", "a10g")],
)  # fmt: skip
def test_a_device_is_found_by_what_the_driver_calls_it(reported, name):
    found = gpu_reported_as(reported)
    assert found is not None
    assert found.name == name


def test_an_own_accelerator(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: h100\nmemory_gib: 64\ntflops: {bfloat16: 500}\nnetwork_gbit_per_s: 100\n")
    found = find_gpu(str(file))
    assert (found.name, found.memory, found.network) == ("mine", 64 * GIB, 12.5e9)
    assert (found.flops["bfloat16"], found.hbm) == (5e14, GPUS["h100"].hbm)


def test_all_faults_of_an_own_accelerator_are_said_at_once(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("memroy_gib: 64\nhbm_gb_per_s: -1\ntflops: {bf16: 3}\nmatmul_efficiency: 2\nlink_kind: rope\n")
    with pytest.raises(ConfigRefused) as refused:
        find_gpu(str(file))
    said = refused.value.report()
    for words in ("did you mean memory_gib?", "hbm_gb_per_s=-1", "tflops.bf16", "matmul_efficiency=2", "link_kind=rope",
                  "memory_gib\n      it is missing", "tflops.float32"):  # fmt: skip
        assert words in said


@pytest.mark.parametrize(("name", "said"), [("h10", "did you mean h100?"), ("nowhere.yaml", "it cannot be read")])
def test_an_unknown_accelerator(name, said):
    with pytest.raises(ConfigRefused, match=said.replace("?", r"\?")):
        find_gpu(name)


# Memory.


def test_what_the_device_takes_is_counted_besides():
    verdict = verdict_of(figures(rank(collectives=(Collective("all_gather", "shard", 2, GIB, 8),))), H100)
    assert verdict.word == "fits"
    assert verdict.traced == 10 * GIB
    assert verdict.total == 10 * GIB + sum(term.bytes for term in verdict.terms)
    assert {term.name for term in verdict.terms} == {"context", "communicators", "workspaces", "allocator"}
    assert verdict.traced < verdict.reserved < verdict.total


@pytest.mark.parametrize(("gib", "word"), [(60, "fits"), (75, "too close to call"), (90, "does not fit")])
def test_the_verdict_knows_its_band(gib, word):
    full = figures(rank(peak={"activations": gib * GIB}))
    assert verdict_of(full, H100).word == word
    assert memory_lines(assess(full, H100))[0].startswith(f"{word}: ")


# Time.


def test_volumes_of_collectives():
    """Twice the ranks of a ring pass nearly the same bytes each; a sum passes twice what a gather does."""
    large = 64e9
    gather, scatter, total = (passing(kind, large, 8) for kind in ("all_gather", "reduce_scatter", "all_reduce"))
    assert gather == scatter
    assert total == pytest.approx(2 * gather, rel=0.01)
    assert gather == pytest.approx(7 / 8 * large / (450e9 * 0.8), rel=0.01)
    assert passing("all_gather", large, 1) == 0.0


def test_what_passes_between_nodes_takes_longer():
    size = 1e9
    assert passing("all_gather", size, 16) > passing("all_gather", size, 8)
    # The neighbours of a group with a stride of a node have one adapter each.
    assert passing("all_gather", size, 8, 8) > 5 * passing("all_gather", size, 8)
    assert H100.crosses(16, 1)
    assert H100.crosses(2, 8)
    assert not H100.crosses(8, 1)


def test_small_collectives_cost_their_latency():
    small = passing("all_reduce", 1e3, 512)
    assert passing("all_reduce", 2e3, 512) == pytest.approx(small, rel=0.05)
    assert small > passing("all_reduce", 1e3, 8)


@pytest.mark.parametrize(
    ("schedule", "stages", "share"),
    [("GPipe", 1, 3 / 8), ("1F1B", 1, 3 / 8), ("Interleaved1F1B", 2, 3 / 16), ("InterleavedZeroBubble", 2, 1 / 16),
     ("ZBVZeroBubble", 2, 3 / 80)],
)  # fmt: skip
def test_bubbles(schedule, stages, share):
    assert bubble_share(schedule, 4, 8, stages) == pytest.approx(share)
    assert bubble_share(schedule, 1, 8, stages) == 0.0


def test_a_step_is_the_sum_of_its_parts():
    passed = (Collective("all_gather", "shard", 16, 16 * GIB, 8), Collective("all_reduce", "tensor", 64, 4 * GIB, 2))
    time = step_time(figures(rank(collectives=passed)), H100)
    assert time.seconds == pytest.approx(time.matmul + time.attention + time.memory + time.exposed + time.bubble)
    of_weights, of_activations = time.passed
    assert of_weights.exposed < of_weights.seconds / 4, "gathers run beside the computation"
    assert of_activations.exposed == of_activations.seconds, "the next operation waits for what tensor ranks sum"
    assert time.tokens_per_second == pytest.approx(16 * 4096 / time.seconds)
    assert any("all_reduce over tensor" in line for line in time_lines(assess(figures(rank(collectives=passed)), H100)))


def test_communication_that_computation_cannot_hide():
    much = (Collective("all_gather", "shard", 16, 4096 * GIB, 64, 8),)
    time = step_time(figures(rank(collectives=much)), H100)
    assert time.exposed > 0.9 * (time.passed[0].seconds - time.matmul - time.memory)


def test_attention_takes_the_time_of_the_pairs_that_see_each_other():
    half = {"bfloat16": 10**15, "bfloat16 attention": 10**14, "bfloat16 masked": 10**14}
    time, whole = (
        step_time(figures(rank(flops=flops)), H100)
        for flops in (half, {"bfloat16": 10**15, "bfloat16 attention": 2 * 10**14})
    )
    assert time.attention == pytest.approx(whole.attention / 2)
    assert time.attention == pytest.approx(1e14 / (H100.gpu.peak("bfloat16") * H100.gpu.attention_efficiency))
    # MFU counts all pairs, as is usual.
    assert time.mfu * time.seconds == pytest.approx(whole.mfu * whole.seconds)


def test_mfu_counts_what_the_model_needs():
    time = step_time(figures(), H100)
    again = step_time(figures(rank(flops={"bfloat16": 4 * 10**15 // 3}, recomputed_flops=10**15 // 3)), H100)
    assert again.seconds > time.seconds
    assert again.mfu * again.seconds == pytest.approx(time.mfu * time.seconds)


def test_free_blocks_are_no_more_than_the_device_has_left():
    """torch gives them back before it is out of memory."""
    traced = rank(unused=3 * GIB)
    assert next(term for term in verdict_of(figures(traced), H100).terms if term.name == "allocator").bytes == 3 * GIB
    full = rank(unused=30 * GIB, peak={"activations": 70 * GIB})
    assert verdict_of(figures(full), H100).total == H100.gpu.memory


def test_an_allocator_keeps_blocks_that_nothing_fits_into():
    mib = 1 << 20
    # Half of 40 MiB is taken out of the free block, 50 MiB are too large for it.
    steps = [(1, 40 * mib), (1, -40 * mib), (2, 20 * mib), (3, 50 * mib), (2, -20 * mib), (3, -50 * mib)]
    assert unused([(0, 100 * mib)], steps, {}) == 20 * mib
    # What another stream has freed is not taken at all.
    assert unused([(0, 100 * mib)], steps, {2: 1}) == 40 * mib
    assert unused([], [(number, mib // 2) for number in range(4)], {}) == 0


# Candidates.


def test_candidates_keep_the_global_batch_and_break_no_rule():
    base = config()
    assert global_batch(base, 8) == 32
    found = list(candidates(base, 16, H100, DIMS, 32))
    names = {name_of(item.layout) for item in found}
    assert {"fsdp16", "ddp16", "fsdp8_tp2", "fsdp4_tp4", "hsdp2x8", "fsdp8_pp2", "fsdp8_cp2"} <= names
    context = Context(machine=Machine(devices=8, cluster_world_size=16))
    for item in found[:: max(1, len(found) // 50)]:
        assert item.layout.world_size == 16
        assert item.batch_size * item.accumulation * item.layout.data_degree == 32
        assert violations_of(configured(base, item), context) == []


def test_dimensions_limit_the_degrees():
    found = list(layouts(64, H100, DIMS, 64))
    assert max(layout.tensor for layout in found) == 4, "there are four heads of keys"
    assert max(layout.pipeline for layout in found) == 8, "there are eight blocks"
    assert max(layout.context for layout in found) == 4, "and a thousand positions are the least of a rank"
    assert {layout.expert for layout in found} == {1}
    assert {layout.tensor for layout in layouts(64, H100, {"blocks": 8}, 64)} == {1}


def test_overrides_say_what_differs():
    base = config()
    same = Candidate(
        layout=parse_layout("fsdp8"), batch_size=4, accumulation=1, microbatch_size=4, schedule="1F1B",
        checkpointing="none",
    )  # fmt: skip
    assert overrides_of(base, same) == ["parallel=fsdp8"]
    piped = replace(same, layout=parse_layout("fsdp4_pp2"), batch_size=8, microbatch_size=2, checkpointing="full")
    assert overrides_of(base, piped) == [
        "parallel=fsdp4_pp2", "dataloader.batch_size=8", "parallel.pipeline_n_microbatches=4",
        "activation_checkpointing.mode=full", "fsdp.reshard_after_forward=true",
    ]  # fmt: skip


def test_layouts_are_derived_from_the_difference_of_two_traces():
    few, more = (
        figures(
            rank(
                peak={"parameters": (2 + blocks) * GIB, "activations": 2 * blocks * GIB},
                flops={"bfloat16": 10**12 * (1 + blocks)},
            ),
            dims={**DIMS, "blocks": blocks},
            samples=8,
        )
        for blocks in (FEW, MORE)
    )
    candidate = Candidate(
        layout=parse_layout("fsdp8"), batch_size=2, accumulation=1, microbatch_size=2, schedule="1F1B",
        checkpointing="none",
    )  # fmt: skip
    found = derived(candidate, costs_of(few, more), more, blocks=8, samples=16).worst
    assert found.peak["parameters"] == (2 + 8) * GIB
    assert found.peak["activations"] == 2 * 2 * 8 * GIB, "of two samples"
    assert found.flops["bfloat16"] == pytest.approx(2 * 10**12 * (1 + 8))
    halved = replace(candidate, layout=parse_layout("fsdp16"))
    assert derived(halved, costs_of(few, more), more, blocks=8, samples=32).worst.peak["parameters"] == 5 * GIB


def test_the_order_of_proposals_and_its_reason():
    base = config()
    candidate = Candidate(
        layout=parse_layout("fsdp8"), batch_size=4, accumulation=1, microbatch_size=4, schedule="1F1B",
        checkpointing="none",
    )  # fmt: skip
    slow = figures(rank(collectives=(Collective("all_reduce", "tensor", 64, 400 * GIB, 2),)))
    full = figures(rank(peak={"activations": 200 * GIB}))
    given = {"fsdp8": figures(), "fsdp4_tp2": slow, "fsdp2_tp4": full}
    made = [
        proposal_of(base, replace(candidate, layout=parse_layout(name)), found, H100, traced=True)
        for name, found in given.items()
    ]
    order = ranked(reversed(made))
    assert [item.name for item in order] == ["fsdp8", "fsdp4_tp2", "fsdp2_tp4"]
    assert "less communication over tensor" in why(order[0], order[1])[0]
    assert why(order[1], order[2]) == ["fsdp4_tp2: fits; fsdp2_tp4: does not fit"]


# The page.


def test_the_page_of_a_layout(tmp_path: Path):
    passed = (Collective("all_gather", "shard", 16, 16 * GIB, 16),)
    stages = (rank(collectives=passed), rank(stages=(1,), peak={"activations": 70 * GIB}))
    html = layout_page(assess(figures(*stages, notes=("<b>a note</b>",)), H100), "train.py parallel=pp2")
    for words in (
        "Memory along a step", "Memory at the peak", "forward layers.0", "all_gather", "train.py parallel=pp2",
        "stage 1", "too close to call", "nvidia-tensor-core", "&lt;b&gt;a note",
    ):  # fmt: skip
        assert words in html
    assert "<b>a note" not in html
    target = tmp_path / "there" / "plan.html"
    assert write_page(str(target), html) == f"page: {target}"
    with pytest.raises(ConfigRefused, match="it cannot be written"):
        write_page(str(target / "below"), html)
