"""The parity matrix: layouts by variants of training, each cell compared with one process on the same global batches.

python -m tests.distributed.matrix              # every cell, as `make parity` does
python -m tests.distributed.matrix tp2 fsdp2_pp2
python -m tests.distributed.matrix --random 20 --seed 7
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from danling_conf.groups.layout_names import name_of, parse_layout
from danling_conf.schema import RunnerConfig
from danling_conf.schema.layout import Layout
from danling_conf.schema.parallel import PIPELINE_SCHEDULES
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import Context, violations_of
from tests.distributed.cells import TOLERANCE, Cell, Trained, alone, joined, largest_error, offloaded, train
from tests.support.spawn import close_shared, shared

LAYOUTS = (
    "ddp4", "fsdp4", "hsdp2x2",
    "tp2", "tp4", "ddp2_tp2", "fsdp2_tp2", "hsdp2x2_tp2",
    "cp2", "cp4", "ddp2_cp2", "fsdp2_cp2", "cp2_tp2", "fsdp2_cp2_tp2",
    "pp2", "pp4", "ddp2_pp2", "fsdp2_pp2", "fsdp2_tp2_pp2", "ddp2_tp2_pp2", "cp2_tp2_pp2",
    "fsdp4_ep2", "fsdp4_ep4", "hsdp2x2_ep2", "cp2_ep2", "tp2_ep2", "tp2_etp2", "ddp2_tp2_ep2", "fsdp2_tp2_ep4",
    "fsdp2_tp2_ep2_etp2", "fsdp4_pp2_ep2", "fsdp2_cp2_tp2_ep2_etp2",
)  # fmt: skip
"""Every axis alone, and combinations of up to four at up to eight ranks."""

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"
BEGIN, END = "<!-- parity: begin -->", "<!-- parity: end -->"

EAGER = {"enable": True, "backend": "aot_eager"}
"""What is compiled is traced and differentiated as by inductor, without the time that generating code takes."""

VARIANTS = (
    Cell(layout="single", variant="one graph, unequal tokens, clipping", compile=EAGER, graph=True, accumulate=2,
         max_norm=0.1, weighted=True),
    *(
        Cell(layout="ddp2", variant=f"ZeRO {stage}, unequal tokens, clipping", zero=stage, accumulate=2, max_norm=0.1,
             weighted=True)
        for stage in (1, 2, 3)
    ),
    *(
        Cell(
            layout=layout,
            variant=schedule,
            parallel={"pipeline_schedule": schedule, "pipeline_microbatch_size": 2},
        )
        for schedule in PIPELINE_SCHEDULES
        for layout in ("pp2", "fsdp2_pp2")
        if schedule != "1F1B"
    ),
    Cell(layout="pp4", variant="ZBVZeroBubble", parallel={"pipeline_schedule": "ZBVZeroBubble"}, model={"depth": 8}),
    Cell(layout="pp2", variant="compile, LoopedBFS", compile=EAGER,
         parallel={"pipeline_schedule": "LoopedBFS"}),
    Cell(layout="pp4", variant="every second block", recompute={"mode": "every_n"}),
    Cell(layout="fsdp2_pp2", variant="named classes", fsdp={"module_classes": ["Embedding", "Block"]}),
    Cell(layout="pp2", variant="stages without blocks",
         parallel={"module_fqns_per_model_part": [["embedding"], ["layers", "norm", "head"]]}),
    Cell(layout="pp2", variant="a head alone",
         parallel={"module_fqns_per_model_part": [["embedding", "layers"], ["norm", "head"]]}),
    Cell(layout="ddp2_tp2", variant="unequal tokens", accumulate=2, weighted=True),
    Cell(layout="fsdp4_ep2", variant="unequal tokens", accumulate=2, weighted=True),
    Cell(layout="pp2", variant="4 microbatches", parallel={"pipeline_n_microbatches": 4}),
    Cell(
        layout="pp2", variant="named stages",
        parallel={"module_fqns_per_model_part": [
            ["embedding", "layers.0"], ["layers.1", "layers.2", "layers.3", "norm", "head"]]},
    ),
    Cell(layout="tp2", variant="gathered logits", parallel={"loss_parallel": False}),
    Cell(layout="tp2", variant="sequence parallel", parallel={"sequence_parallel": True}),
    Cell(layout="fsdp2_tp2", variant="sequence parallel", parallel={"sequence_parallel": True}),
    Cell(layout="tp2_pp2", variant="sequence parallel", parallel={"sequence_parallel": True}),
    Cell(layout="fsdp2_tp2_ep2_etp2", variant="sequence parallel", parallel={"sequence_parallel": True}),
    Cell(layout="tp2", variant="tied embeddings", model={"tie_embeddings": True}),
    Cell(layout="cp2", variant="ulysses", parallel={"context_method": "ulysses"}),
    Cell(layout="fsdp2_cp2_tp2", variant="ulysses", parallel={"context_method": "ulysses"}, model={"kv_heads": 4}),
    Cell(layout="cp4", variant="ulysses, repeated heads", parallel={"context_method": "ulysses"}),
    Cell(layout="cp2", variant="without balance", parallel={"context_balance": False}),
    *(
        Cell(layout=layout, variant="accumulation, clipping", accumulate=2, max_norm=0.1)
        for layout in ("ddp4", "fsdp2_tp2", "fsdp2_cp2", "fsdp2_pp2", "fsdp2_tp2_ep2_etp2", "ddp2_tp2")
    ),
    *(
        Cell(layout=layout, variant="unequal tokens", accumulate=2, weighted=True)
        for layout in ("ddp4", "fsdp4", "fsdp2_tp2", "fsdp2_cp2", "fsdp2_pp2", "cp2_tp2_pp2")
    ),
    *(
        Cell(layout=layout, variant="bf16", precision="bf16")
        for layout in ("fsdp4", "ddp2_tp2", "fsdp2_tp2", "fsdp2_cp2", "fsdp2_pp2", "pp2")
    ),
    # Each token goes to every expert: rounding then changes no choice.
    Cell(layout="fsdp4_ep2", variant="bf16, all experts", precision="bf16", model={"experts_per_token": 4}),
    *(
        Cell(layout=layout, variant=f"recompute {mode}", recompute={"mode": mode})
        for layout, mode in (("fsdp2_tp2", "full"), ("fsdp2_cp2", "full"), ("fsdp2_pp2", "full"), ("tp2", "selective"),
                             ("fsdp4_ep2", "full"), ("pp2", "every_n"), ("fsdp2_cp2", "selective"))
    ),
    *(
        Cell(layout=layout, variant="compile", compile=EAGER)
        for layout in ("ddp4", "tp2", "fsdp2_tp2", "cp2", "fsdp2_cp2_tp2", "pp2", "fsdp2_pp2", "fsdp4_ep2",
                       "ddp2_tp2")
    ),
    Cell(layout="fsdp2_tp2", variant="compile, sequence parallel", compile=EAGER, parallel={"sequence_parallel": True}),
    Cell(layout="fsdp2_tp2", variant="compile, recompute", compile=EAGER, recompute={"mode": "full"}),
    Cell(layout="tp2", variant="compile whole", compile={**EAGER, "scope": "model"}),
    Cell(layout="fsdp2_pp2", variant="compile, Interleaved1F1B", compile=EAGER,
         parallel={"pipeline_schedule": "Interleaved1F1B"}),
    *(Cell(layout=layout, variant="offload", fsdp=offloaded()) for layout in ("fsdp2_tp2", "fsdp2_pp2", "fsdp4_ep2")),
    Cell(layout="fsdp2_tp2", variant="keep gathered", fsdp={"reshard_after_forward": False}),
    Cell(layout="fsdp2_cp2", variant="reshard to pairs", fsdp={"reshard_after_forward": 2}),
    Cell(layout="fsdp2_pp2", variant="reshard", fsdp={"reshard_after_forward": True}),
)  # fmt: skip

FAMILIES = (
    *(Cell(layout=layout, variant="Llama", family="LlamaConfig") for layout in (
        "fsdp4", "ddp2_tp2", "fsdp2_tp2", "fsdp2_cp2", "fsdp2_pp2", "cp2_tp2_pp2")),
    Cell(layout="tp2", variant="Llama, tied", family="LlamaConfig", model={"tie_word_embeddings": True}),
    Cell(layout="fsdp2_pp2", variant="Llama, compile, recompute", family="LlamaConfig", compile=EAGER,
         recompute={"mode": "full"}),
    Cell(layout="fsdp2_tp2", variant="Llama, compile", family="LlamaConfig", compile=EAGER),
    Cell(layout="fsdp2_tp2", variant="Qwen3", family="Qwen3Config"),
    Cell(layout="fsdp2_tp2", variant="Mixtral", family="MixtralConfig",
         model={"num_local_experts": 4, "num_experts_per_tok": 2}),
    Cell(layout="tp2_pp2", variant="Phi3", family="Phi3Config"),
    Cell(layout="fsdp2_cp2", variant="Qwen2", family="Qwen2Config"),
    # They compute around their blocks: scaled embeddings and logits, embeddings of positions beside those of tokens.
    Cell(layout="fsdp2_pp2", variant="Granite", family="GraniteConfig",
         model={"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    Cell(layout="pp2", variant="GPT-2", family="GPT2Config",
         model={"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
                "attn_pdrop": 0.0}),
)  # fmt: skip
"""Models of transformers: nothing here knows their families."""

CELLS = (*(Cell(layout=layout) for layout in LAYOUTS), *VARIANTS, *FAMILIES)

CONTROLS = (
    Cell(layout="fsdp2_tp2", variant="gradients 1% too large", fault="scale"),
    Cell(layout="fsdp2_tp2", variant="the same numbers in every shard", fault="shards"),
    Cell(layout="fsdp2_tp2", variant="compile, embedding not copied", compile=EAGER, fault="collective"),
    Cell(layout="cp2", variant="local positions", fault="positions"),
    Cell(layout="cp2", variant="mask of the other piece", fault="mask"),
    Cell(layout="fsdp4_ep2", variant="expert gradients not rescaled", fault="experts"),
    Cell(layout="fsdp4", variant="mean of means", fault="mean", weighted=True),
)
"""Mistakes that the matrix must notice; each changes losses by little or not at all."""


def error_of(cell: Cell, timeout: float = 120) -> float:
    """The largest relative error of a cell against one process, trained in a world that other cells use as well.

    Raises:
        AssertionError: where a cell differs by more than its tolerance, or one with a fault by no more, and where a
            rank fails or hangs (RankFailed); in each case also in a world of its own.
    """
    expected = alone(cell)

    def check(ranks: list[Trained]) -> float:
        if parse_layout(cell.layout).pipeline > 1:
            assert all(rank.schedules == {cell.parallel.get("pipeline_schedule", "1F1B")} for rank in ranks)
        error = largest_error(joined(ranks, expected), expected)
        assert passes(cell, error), f"{cell}: the largest error is {error:.1e}, the tolerance {tolerance_of(cell):.0e}"
        return error

    return float(shared(train, cell.world_size, cell, check=check, timeout=timeout))


def passes(cell: Cell, error: float) -> bool:
    """Whether an error is within the tolerance, or beyond it where the cell has a fault."""
    return (error <= tolerance_of(cell)) == (cell.fault is None)


def tolerance_of(cell: Cell) -> float:
    return TOLERANCE[cell.precision]


def by_world_size(cells: Iterable[Cell]) -> list[Cell]:
    """The cells in an order in which each world is started once."""
    return sorted(cells, key=lambda cell: cell.world_size)


def drawn(count: int, seed: int, most: int = 8) -> list[Cell]:
    """Cells of layouts drawn from all that the rules accept, of up to `most` ranks and not in the matrix."""
    generator = random.Random(seed)
    known = {(parse_layout(layout)) for layout in LAYOUTS}
    found: list[Cell] = []
    while len(found) < count:
        degrees = {axis: generator.choice((1, 1, 2, 4)) for axis in Layout().degrees()}
        layout = Layout(fsdp=degrees["shard"] > 1 or generator.random() < 0.2, **degrees)
        cell = Cell(layout=name_of(layout) if layout.shard == 1 or layout.fsdp else "single", variant="drawn")
        if layout in known or layout.world_size not in range(2, most + 1) or not accepted(layout):
            continue
        known.add(layout)
        found.append(cell)
    return found


def accepted(layout: Layout) -> bool:
    """Whether the rules accept a layout, with the batch and the model of the cells."""
    config = RunnerConfig(steps=1)
    for axis, degree in layout.degrees().items():
        setattr(config.parallel.axes, axis, degree)
    config.fsdp.enabled = layout.fsdp
    config.dataloader.batch_size = 16 // layout.data_degree
    return not violations_of(config, Context(machine=Machine()))


def table(errors: dict[str, float]) -> str:
    """The table of docs/parity.md: what each is compared in, and the largest error found in fp32."""
    rows = ["| Layout | Ranks | Also with | Largest difference |", "|---|---|---|---|"]
    for layout in dict.fromkeys(cell.layout for cell in CELLS):
        variants = [cell.variant for cell in CELLS if cell.layout == layout and cell.variant != "plain"]
        ranks = parse_layout(layout).world_size
        rows.append(f"| `{layout}` | {ranks} | {'; '.join(dict.fromkeys(variants))} | {errors[layout]:.0e} |")
    return "\n".join(rows)


def write_document(errors: dict[str, float]) -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(errors)}\n{END}{after}")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.distributed.matrix", description=__doc__)
    parser.add_argument("layouts", nargs="*", help="only cells of these layouts")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="cells of N layouts drawn at random as well")
    parser.add_argument("--write", action="store_true", help="write the table of docs/parity.md; needs all cells")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; printed, and drawn when left out")
    given = parser.parse_args(arguments)
    cells = [cell for cell in (*CELLS, *CONTROLS) if not given.layouts or cell.layout in given.layouts]
    if given.random:
        seed = random.randrange(2**32) if given.seed is None else given.seed
        print(f"{given.random} layouts drawn with seed {seed}")
        cells += drawn(given.random, seed)
    failed, errors = 0, dict.fromkeys((cell.layout for cell in CELLS), 0.0)
    width = max(len(str(cell)) for cell in cells)
    for cell in by_world_size(cells):
        began = time.monotonic()
        tolerance = tolerance_of(cell)
        try:
            error = error_of(cell)
            good, shown = True, f"{error:.1e}"
            if cell in CELLS and cell.precision == "fp32":
                errors[cell.layout] = max(errors[cell.layout], error)
        except AssertionError as failure:
            good, shown = False, str(failure).strip().splitlines()[-1]
        failed += not good
        wanted = "<=" if cell.fault is None else "> "
        verdict = "ok" if good else "FAILED"
        print(
            f"{cell!s:<{width}}  {shown:>8} {wanted} {tolerance:.0e}  {time.monotonic() - began:5.1f} s  {verdict}",
            flush=True,
        )
    close_shared()
    print(f"{len(cells)} cells, {failed} failed")
    if given.write and not failed and not given.layouts:
        write_document(errors)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
