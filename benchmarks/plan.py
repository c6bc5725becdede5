"""Seconds of a plan, and plans beside figures that others have published.

Run it as `python benchmarks/plan.py`, or with `--published`. See benchmarks/README.md and docs/plan.md.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from danling_conf.config.resolve import resolve
from danling_conf.groups.layout_names import parse_layout
from danling_conf.plan import engine
from danling_conf.plan.assessment import Assessment, assess
from danling_conf.plan.search import propose
from danling_conf.runner.planning import Recipe
from danling_conf.schema import RunnerConfig
from danling_conf.topology.hardware import GIB, GPUS, Cluster
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context
from models.decoder import Decoder, DecoderConfig, Linear

ONE, PROPOSALS = "one layout of an 8B model at 4,096 ranks", "proposals of {} for 512 GPUs"
LLAMA: Mapping[str, dict[str, int]] = {
    "13B": {"width": 5120, "depth": 40, "heads": 40, "kv_heads": 40, "hidden": 13824, "vocab_size": 32000},
    "70B-2": {"width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "hidden": 28672, "vocab_size": 32000},
    "8B": {"width": 4096, "depth": 32, "heads": 32, "kv_heads": 8, "hidden": 14336},
    "70B": {"width": 8192, "depth": 80, "heads": 64, "kv_heads": 8, "hidden": 28672},
    "405B": {"width": 16384, "depth": 126, "heads": 128, "kv_heads": 8, "hidden": 53248},
}
"""Llama 3.1, as a decoder of the examples."""
VOCABULARY = 128256


class Tokens:
    """Sequences of one token: a plan looks at sizes alone."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 1 << 16

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        tokens = torch.zeros(self.length, dtype=torch.long)
        return tokens, tokens


class Float8Linear(Linear):
    """A linear map by products in float8, scaled by the largest number of each operand, as torchao's are
    (https://github.com/pytorch/ao, torchao/float8: dynamic scales of whole tensors)."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = _Float8Product.apply(x.flatten(0, -2), self.weight)
        return found.unflatten(0, x.shape[:-1])


class _Float8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        (rows, scale), (columns, other) = _in_float8(x), _in_float8(weight)
        return _product(rows, columns.t(), scale * other, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        (grads, scale), (rows, other), (columns, another) = map(_in_float8, (grad, x, weight))
        given = _product(grads, columns, scale * another, x.dtype)
        return given, _product(grads.t(), rows, scale * other, x.dtype)


def _in_float8(tensor: Tensor) -> tuple[Tensor, Tensor]:
    scale = tensor.abs().max().float() / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn), scale


def _product(left: Tensor, right: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Of matrices; the kernel wants the rows of the left one, and the columns of the right one, without gaps."""
    return torch._scaled_mm(
        left.contiguous(), right.t().contiguous().t(), scale, torch.ones_like(scale), out_dtype=dtype
    )


def model_of(sizes: DecoderConfig, float8: bool) -> nn.Module:
    model = Decoder(sizes)
    for name, module in model.named_modules():
        if float8 and isinstance(module, Linear) and name != "head":
            module.__class__ = Float8Linear
    return model


def loss_of(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[1].flatten())


@dataclass(frozen=True)
class Published:
    """A run that somebody has measured."""

    model: str
    gpu: str
    layout: str
    batch: int
    length: int
    tokens: float
    """Per second and device."""
    gib: float | None
    """Most memory that the allocator had reserved on any device."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    float8: bool = False
    """Whether the products of linear maps are in float8."""

    @property
    def name(self) -> str:
        said = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in self.settings.items())
        return f"{self.model} {self.layout}, batch {self.batch} x {self.length}, {said}"


AC, COMPILE, SCHEDULE = "activation_checkpointing.mode", "compile.enable", "parallel.pipeline_schedule"
SELECTIVE, FULL = {AC: "selective"}, {AC: "full"}
COMPILED, FULL_COMPILED = {**SELECTIVE, COMPILE: True}, {**FULL, COMPILE: True}
PIPELINE = {**FULL_COMPILED, "parallel.pipeline_n_microbatches": 8}
LOOPED = {**PIPELINE, SCHEDULE: "Interleaved1F1B"}
_ATTENTION = ["aten._scaled_dot_product_flash_attention", "aten._scaled_dot_product_flash_attention_for_cpu"]
IN_2025 = {**COMPILED, "activation_checkpointing.keep_ops": [*_ATTENTION, "aten.max"]}
"""What torchtitan kept in June 2025: `aten.mm`, of which a block in float8 has none, and not `aten._scaled_mm`."""
TITAN = (
    Published("8B", "h100-96", "fsdp8", 2, 8192, 5762, 82.4, SELECTIVE),
    Published("8B", "h100-96", "fsdp8", 2, 8192, 6667, 77.0, COMPILED),
    Published("8B", "h100-96", "fsdp8", 2, 8192, 8532, 76.8, COMPILED, float8=True),
    Published("8B", "h100-96", "fsdp128", 2, 8192, 5605, 67.0, SELECTIVE),
    Published("8B", "h100-96", "fsdp128", 2, 8192, 6514, 62.0, COMPILED),
    Published("8B", "h100-96", "fsdp128", 2, 8192, 8380, 61.8, COMPILED, float8=True),
    Published("8B", "h100-96", "fsdp8", 1, 32768, 3890, 83.9, FULL_COMPILED, float8=True),
    Published("8B", "h100-96", "fsdp4_cp2", 1, 65536, 2540, 84.2, FULL_COMPILED, float8=True),
    Published("8B", "h100-96", "fsdp2_cp4", 1, 131072, 1071, 84.0, FULL_COMPILED, float8=True),
    Published("8B", "h100-96", "fsdp1_cp8", 1, 262144, 548, 84.5, FULL_COMPILED, float8=True),
    Published("70B", "h100-96", "fsdp32_tp8", 16, 8192, 597.3, None, FULL_COMPILED),
    Published("70B", "h100-96", "fsdp32_tp8", 16, 8192, 829, 71.9, FULL_COMPILED, float8=True),
    Published("8B", "h100-96", "fsdp8_tp8", 12, 8192, 4378, None, COMPILED),
    Published("8B", "h100-96", "fsdp8_tp8", 12, 8192, 5078.1, None, IN_2025, float8=True),
    Published("405B", "h100-96", "fsdp8_tp8_pp8", 32, 8192, 100, 82.5, PIPELINE, float8=True),
    Published("405B", "h100-96", "fsdp8_tp8_pp8", 32, 8192, 128, 72.7, LOOPED, float8=True),
    Published("8B", "h200", "fsdp32", 2, 8192, 10938, 47.96, IN_2025, float8=True),
    Published("8B", "h200", "fsdp64", 2, 8192, 10753, 46.97, IN_2025, float8=True),
    Published("8B", "a100-80", "fsdp64", 1, 8192, 2973, None, SELECTIVE),
    Published("8B", "a100-80", "fsdp64", 1, 8192, 2904, None, {AC: "every_n"}),
    Published("70B", "a100-80", "fsdp64", 1, 8192, 331, None, FULL),
    Published("13B", "a100-80", "fsdp64", 2, 4096, 2162, None, {AC: "none"}),
    Published("13B", "a100-80", "fsdp64", 2, 4096, 1914, None, {AC: "every_n"}),
    Published("13B", "a100-80", "fsdp64", 2, 4096, 1904, None, SELECTIVE),
    Published("70B-2", "a100-80", "fsdp64", 1, 4096, 355, None, SELECTIVE),
    Published("70B-2", "a100-80", "fsdp64", 2, 4096, 353, None, FULL),
    Published("405B", "h100-96", "fsdp8_tp8_pp8", 8, 32768, 76, 75.3, PIPELINE, float8=True),
    Published("405B", "h100-96", "fsdp4_tp8_pp8_cp2", 8, 65536, 47, 75.9, PIPELINE, float8=True),
    Published("405B", "h100-96", "fsdp2_tp8_pp8_cp4", 8, 131072, 31, 77.1, PIPELINE, float8=True),
    Published("405B", "h100-96", "fsdp1_tp8_pp8_cp8", 8, 262144, 16, 84.9, PIPELINE, float8=True),
)
"""Of https://github.com/pytorch/torchtitan, by its teams: benchmarks/llama3_h100_202412_torchtitan.md,
benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md, benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md, and earlier
versions of docs/performance.md. What is to be compared with them by others is not here."""
PAIRS = (
    (1, 0), (2, 1), (4, 3), (5, 4), (11, 10), (13, 12), (15, 14), (18, 19), (21, 22), (22, 23), (24, 25),
)  # fmt: skip
"""Alternatives for the same model and GPUs: the faster one, in tokens of each device, and the slower one."""
LENGTHS = ((6, 7), (7, 8), (8, 9), (26, 27), (27, 28), (28, 29))
"""The same of sequences of two lengths, which ask for a context axis."""


def config_of(layout: str, batch: int, settings: Mapping[str, Any], per_node: int = 8) -> RunnerConfig:
    """A configuration of a layout, for any number of ranks."""
    parsed = parse_layout(layout)
    given: dict[str, Any] = {
        "steps": 10,
        "precision": "bf16",
        "parallel": {"axes": parsed.degrees(), "sequence_parallel": parsed.tensor > 1},
        "fsdp": {"enabled": parsed.fsdp},
        "dataloader": {"batch_size": batch},
    }
    for path, value in settings.items():
        place = given
        *sections, name = path.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    context = Context(machine=Machine(devices=per_node, cluster_world_size=parsed.world_size))
    return resolve(given, context=context)


def recipe_of(model: str, length: int, config: RunnerConfig, *, float8: bool = False) -> Recipe:
    """What a script would pass to its runner."""
    sizes = DecoderConfig(**{"vocab_size": VOCABULARY, **LLAMA[model]}, context=length)
    return Recipe(
        config=config,
        model=functools.partial(model_of, sizes, float8),
        datasets={"train": Tokens(length)},
        loss=loss_of,
    )


def planned(case: Published) -> Assessment:
    """The plan of a published run."""
    config = config_of(case.layout, case.batch, case.settings)
    figures = engine.figures_of(
        engine.subject_of(recipe_of(case.model, case.length, config, float8=case.float8), accelerated=True)
    )
    return assess(figures, Cluster(gpu=GPUS[case.gpu]))


def compare(chosen: list[int]) -> None:
    """Print plans beside what was published, and which of two alternatives is planned to be faster."""
    found: dict[int, float] = {}
    print("| run | GiB reserved | planned | off | tokens/s a GPU | planned | off |")
    print("|---|---|---|---|---|---|---|")
    for number in chosen:
        case = TITAN[number]
        plan = planned(case)
        tokens = plan.time.tokens_per_second / parse_layout(case.layout).world_size
        found[number] = tokens
        memory = plan.verdict.reserved / GIB
        off = "" if case.gib is None else f"{100 * (memory / case.gib - 1):+.0f} %"
        print(
            f"| {case.name} | {case.gib or ''} | {memory:.1f} | {off} | {case.tokens:,.0f} | {tokens:,.0f} | "
            f"{100 * (tokens / case.tokens - 1):+.0f} % |",
            flush=True,
        )
    for title, all_pairs in (("alternatives", PAIRS), ("lengths", LENGTHS)):
        pairs = [(fast, slow) for fast, slow in all_pairs if fast in found and slow in found]
        wrong = [(fast, slow) for fast, slow in pairs if found[fast] <= found[slow]]
        print(f"\n{len(pairs) - len(wrong)} of {len(pairs)} pairs of {title} in the right order")
        for fast, slow in wrong:
            print(f"not: {TITAN[fast].name} before {TITAN[slow].name}")


def speed() -> bool:
    """Print how long plans take. Returns whether all are within their goals."""
    config = config_of("fsdp512_tp8", 1, FULL)

    def one() -> None:
        engine.figures_of(engine.subject_of(recipe_of("8B", 8192, config), accelerated=True))

    def proposals(model: str) -> None:
        propose(recipe_of(model, 8192, config_of("single", 1, {})), 512, Cluster(gpu=GPUS["h100"]), 1024)

    within = True
    cases = [(ONE, 10.0, one)]
    cases += [(PROPOSALS.format(model), 30.0, functools.partial(proposals, model)) for model in ("8B", "70B")]
    for name, goal, plan in cases:
        begun = time.perf_counter()
        plan()
        taken = time.perf_counter() - begun
        print(f"{name}: {taken:.1f} s (goal: at most {goal:.0f})", flush=True)
        within = within and taken <= goal
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--published", nargs="*", type=int, help="compare with published figures: all, or these numbers"
    )
    parsed = parser.parse_args()
    warnings.simplefilter("ignore")
    if parsed.published is not None:
        compare(parsed.published or list(range(len(TITAN))))
        return 0
    return 0 if speed() else 1


if __name__ == "__main__":
    sys.exit(main())
