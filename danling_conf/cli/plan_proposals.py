"""`danling-conf plan --gpus N`: the layouts of a number of GPUs that fit, ranked, ready to paste."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from danling_conf.config.check import check_composed, compose_or_refuse, context_of
from danling_conf.config.hydra_adapter import ConfigSearch, composer
from danling_conf.launch.app import App
from danling_conf.plan.assessment import gib, seconds
from danling_conf.plan.candidates import global_batch
from danling_conf.plan.proposals import Proposals
from danling_conf.plan.script import plan_of_script
from danling_conf.schema.printable import shell_line
from danling_conf.topology.hardware import Cluster
from danling_conf.topology.machine import Machine

SECONDS = 26.0
"""Of a command, within which proposals are traced; the first ones are there much earlier."""
_REPLACED = ("parallel=", "dataloader.batch_size=", "dataloader.train.batch_size=", "accum_steps=",
             "activation_checkpointing.mode=", "parallel.pipeline_", "parallel.axes.")  # fmt: skip


def propose_layouts(
    gpus: int, cluster: Cluster, samples: int | None, begun: float, app: App, search: ConfigSearch, overrides: list[str]
) -> Proposals:
    """Find the layouts of an app for a number of GPUs.

    Args:
        samples: samples of an optimizer step; as configured when None.
        begun: when the command began, on the clock of `time.monotonic`.

    Raises:
        ConfigRefused: the configuration is refused, or no layout takes it.
    """
    machine = Machine(devices=cluster.gpus_per_node, cluster_world_size=gpus)
    with composer(search) as composing:
        composed = compose_or_refuse(composing, overrides)
        config = check_composed(composed, context_of(overrides, machine))
    wanted = global_batch(config, gpus) if samples is None else samples

    # torch, and all that is built with it, only once the configuration is accepted.
    from danling_conf.plan.search import propose

    def plan(recipe: Any) -> Proposals:
        return propose(recipe, gpus, cluster, wanted, end=begun + SECONDS)

    return plan_of_script(app.function, app.script.name, config, plan)


def proposal_lines(found: Proposals, cluster: Cluster, script: str, overrides: Sequence[str]) -> list[str]:
    """Proposals as text."""
    gpu = cluster.gpu
    lines = [
        f"planned: {shell_line(script, *overrides)}",
        f"{found.gpus:,} GPUs {gpu.name} of {gib(gpu.memory)} GiB, {cluster.gpus_per_node} to a node; "
        f"{found.samples:,} samples a step; {found.looked_at:,} layouts with their settings looked at",
        "",
    ]
    rows: list[tuple[str, ...]] = [("", "layout", "GiB", "step", "MFU", "arithmetic", "memory", "waits", "bubble", "")]
    for number, item in enumerate(found.shown, 1):
        time_of = item.time
        parts = (time_of.matmul + time_of.attention, time_of.memory, time_of.exposed, time_of.bubble)
        said = "" if item.verdict.word == "fits" else item.verdict.word
        rows.append(
            (
                str(number), item.name, gib(item.verdict.total), seconds(time_of.seconds), f"{100 * time_of.mfu:.1f} %",
                *map(seconds, parts), " ".join(filter(None, (said, "" if item.traced else "derived"))),
            )
        )  # fmt: skip
    lines += _columns(rows)
    lines += ["", *found.reasons, "", "to paste, in the same order:"]
    kept = [word for word in overrides if not word.lstrip("+").startswith(_REPLACED)]
    lines += [f"  {shell_line('python', script, *kept, *item.overrides)}" for item in found.shown]
    if any(not item.traced for item in found.shown):
        derived = "derived: from traces of this model under other layouts; plan it alone to trace it"
        lines += ["", f"note: {derived}"]
    return [*lines, *(f"note: {note}" for note in found.notes)]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column in (1, len(row) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
