"""Translation under way: settings, choices of groups and notes; and what all parts of it share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from danling_conf.schema import RunnerConfig
from danling_conf.schema.docs import describe
from danling_conf.topology.violation import ConfigRefused, Violation, show

GONE = {
    "name": "a run is named by its lineage, experiment and configuration id; wandb.name and mlflow.name show a label",
    "max_grad_value": "gradients are clipped by norm only (max_grad_norm); to clip values, write a callback with "
    "on_before_optimizer_step",
    "backend": "the process group's backend follows from the device",
    "init_method": "torchrun, srun or the command itself says where ranks meet",
    "train_splits": "the split `train` is trained on",
    "evaluate_splits": "every other split is evaluated",
    "score": "set score_name, score_split and score_mode",
    "fp8": "there is no fp8",
    "checkpoint.fail_on_error": "a save that fails always fails the run",
    "fsdp.mesh": "it is an object; the mesh follows from the layout",
    "fsdp.shard_placement_fn": "it is an object, which a configuration cannot hold",
    "fsdp.ignored_params": "they are objects, which a configuration cannot hold",
    "dataloader.timeout": "loaders wait for their workers without a limit",
    "dataloader.pin_memory_device": "memory is pinned for the device of the run",
    "dataloader.worker_init_fn": "it is an object; workers are seeded by rank and epoch",
    "dataloader.multiprocessing_context": "workers start as torch starts them by default",
    "dataloader.generator": "it is an object; data order follows from seed",
    "dataloader.collate_fn": "it is an object; pass it in code, as the data set's",
    "dataloader.sampler": "it is an object; data order follows from seed and shuffle",
}
"""Settings without a counterpart, and what there is instead."""
_DTYPES = {"float": "fp32", "float32": "fp32", "double": "fp64", "float64": "fp64", "half": "fp16", "float16": "fp16",
           "bfloat16": "bf16"}  # fmt: skip


@dataclass
class Translation:
    """A configuration of ours, and what is to be said about it."""

    settings: dict[str, Any] = field(default_factory=dict)
    """Values by dotted path."""
    presets: dict[str, str] = field(default_factory=dict)
    """Choices of groups, for the defaults list."""
    notes: list[str] = field(default_factory=list)
    """One line for each setting that means something else here, or has gone."""

    def keep(self, path: str, value: Any) -> None:
        """Write a setting, unless it is our default anyway."""
        known = describe(RunnerConfig, path)
        if known is None or known.section is not None or known.default != value:
            self.settings[path] = value

    def note(self, path: str, value: Any, text: str) -> None:
        self.notes.append(f"{path}={show(value)}: {text}")

    def gone(self, path: str, value: Any, text: str) -> None:
        self.note(path, value, f"gone: {text}")


def keep_section(name: str, section: Mapping[str, Any], made: Translation) -> None:
    """Settings that mean the same."""
    for key, value in section.items():
        path = f"{name}.{key}"
        known = describe(RunnerConfig, path)
        if path in GONE:
            if value is not None:
                made.gone(path, value, GONE[path])
        elif known is None:
            made.gone(path, value, "there is no such setting here")
        elif path == "gc.interval" and isinstance(value, int) and value <= 0:
            made.gone(path, value, "leave it unset for no pacing")
        else:
            made.keep(path, value)


def mapping(value: Any, path: str) -> Mapping[str, Any]:
    """A section, empty where it is null. Raises ConfigRefused for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigRefused([Violation(path, value, "it must be a mapping", "correct it in the file")])
    return value


def dtype_name(value: Any) -> str:
    """Our name of a dtype, where we have one."""
    name = str(value).strip().lower().replace("-", "_").removeprefix("torch.")
    return _DTYPES.get(name, name)
