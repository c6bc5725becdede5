"""Presets of every group except `parallel`: named settings that work well together, each with its reason.

A preset is sparse: it holds only what it is about, so that presets of different groups combine in any order, and none
undoes what a file has set. Groups call their empty choice `none`, never `off`, which YAML reads as false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GLOBAL = "_global_"


@dataclass(frozen=True)
class Preset:
    """One choice of a group."""

    doc: str
    """What it does and why one would choose it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its settings, below the group's package."""
    package: str | None = None
    """Where the settings go: the group's own section when None, `_global_` for the root."""


def _zero(stage: int, doc: str, **more: Any) -> Preset:
    settings = {"stack": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage, **more}}}
    return Preset(doc, settings, GLOBAL)


GROUPS: dict[str, dict[str, Preset]] = {
    "fsdp": {
        "default": Preset("FSDP2 as torch has it; `precision` decides the dtypes. A layout's name switches FSDP on."),
        "fp32": Preset(
            "Everything in fp32, whatever `precision` is: for debugging numerics.",
            {"mp_policy": {"param_dtype": "fp32", "reduce_dtype": "fp32"}},
        ),
        "bf16": Preset(
            "Compute in bf16 and reduce gradients in fp32: half the all-gather traffic, without losing small gradients "
            "in the sum over ranks.",
            {"mp_policy": {"param_dtype": "bf16", "reduce_dtype": "fp32"}},
        ),
        "bf16_reduce": Preset(
            "Compute and reduce in bf16: the least traffic, for slow networks and small shard degrees.",
            {"mp_policy": {"param_dtype": "bf16", "reduce_dtype": "bf16"}},
        ),
        "offload": Preset(
            "Parameters, gradients and optimizer states live in host memory: for a model that does not fit otherwise.",
            {"offload_policy": {"enabled": True}},
        ),
        "zero2": Preset(
            "Keep gathered parameters between forward and backward: saves an all-gather per block, costs the memory.",
            {"reshard_after_forward": False},
        ),
    },
    "deepspeed": {
        "none": Preset("No DeepSpeed."),
        "zero1": _zero(1, "ZeRO 1: each data rank holds a part of the optimizer's states, all else whole."),
        "zero2": _zero(2, "ZeRO 2: gradients are cut too, the traffic is that of ZeRO 1."),
        "zero3": _zero(3, "ZeRO 3: weights are cut too, and gathered where they are used: least memory, more traffic."),
        "zero3_offload": _zero(
            3,
            "ZeRO 3 with weights, optimizer states and step on the host: for what does not fit otherwise.",
            offload_optimizer={"device": "cpu"},
            offload_param={"device": "cpu"},
        ),
    },
    "compile": {
        "none": Preset("Eager execution: the quickest start, and the easiest to debug.", {"enable": False}),
        "default": Preset(
            "Compile each repeated block with torch's defaults: most of the gain, short to compile.", {"enable": True}
        ),
        "max": Preset(
            "Compile each block with max-autotune: the fastest kernels for long runs, at the longest compile time.",
            {"enable": True, "mode": "max-autotune"},
        ),
        "reduce_overhead": Preset(
            "CUDA graphs: for small models whose step is bound by kernel launches.",
            {"enable": True, "mode": "reduce-overhead"},
        ),
        "whole": Preset(
            "Compile the model as one graph instead of block by block: fuses across blocks, compiles longer.",
            {"enable": True, "scope": "model"},
        ),
        "aot_eager": Preset(
            "Trace forward and backward but generate no code: tells an error of tracing from one of code generation.",
            {"enable": True, "backend": "aot_eager"},
        ),
    },
    "checkpoint": {
        "default": Preset(
            "A checkpoint about ten times a run, when an evaluation improves the score, and at the end; written in the "
            "background, as shards where there are several ranks."
        ),
        "none": Preset("Write no checkpoints: for sweeps of short runs and for benchmarks.", {"load_only": True}),
        "file": Preset(
            "One file from the main process, whatever the world size, while training waits: simple to copy and read.",
            {"backend": "file", "async_mode": "disabled"},
        ),
        "dcp": Preset(
            "Every rank writes its shards (torch.distributed.checkpoint) while training waits: no memory for a copy.",
            {"backend": "dcp", "async_mode": "disabled"},
        ),
        "async": Preset(
            "Shards written in the background while training continues.", {"backend": "dcp", "async_mode": "async"}
        ),
        "pinned": Preset(
            "As async, staged through page-locked memory: the shortest pause, for the price of host memory.",
            {"backend": "dcp", "async_mode": "async_with_pinned_mem"},
        ),
    },
    "dataloader": {
        "default": Preset("Samples are loaded in the training process: right for small or in-memory data."),
        "workers": Preset(
            "Four worker processes per loader that live through all epochs: for samples that take time to make.",
            {"num_workers": 4, "persistent_workers": True, "prefetch_factor": 2},
        ),
        "pinned": Preset(
            "Workers and page-locked memory: batches are copied to an accelerator while it computes.",
            {"num_workers": 4, "persistent_workers": True, "prefetch_factor": 4, "pin_memory": True},
        ),
        "ordered": Preset("Samples in the data set's order: for comparing runs batch by batch.", {"shuffle": False}),
    },
    "optim": {
        "adamw": Preset(
            "AdamW with betas for transformers and decoupled weight decay: the safe default.",
            {"type": "adamw", "lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1},
        ),
        "adam": Preset("Adam without weight decay: for small models and fine-tuning.", {"type": "adam", "lr": 1e-3}),
        "sgd": Preset(
            "SGD with momentum: half of Adam's state, strong on vision and small data.",
            {"type": "sgd", "lr": 0.1, "momentum": 0.9},
        ),
        "muon": Preset(
            "Muon for hidden matrices and AdamW for the rest: fewer steps to the same loss for transformers.",
            {"type": "muon", "lr": 1e-3, "weight_decay": 0.1},
        ),
        "adafactor": Preset(
            "Adafactor: factored second moments, almost no optimizer state.", {"type": "adafactor", "lr": 1e-2}
        ),
    },
    "scheduler": {
        "constant": Preset(
            "A constant learning rate: costs nothing, right for trials and for short fine-tuning.", {"type": "constant"}
        ),
        "linear": Preset(
            "Linear decay to 0 over the run: the best final loss for a budget known beforehand.", {"type": "linear"}
        ),
        "cosine": Preset(
            "Cosine decay to a tenth over the run: the usual choice for language models.",
            {"type": "cosine", "final_lr_ratio": 0.1},
        ),
        "wsd": Preset(
            "Warm-up, stable, decay: a run can be extended from its stable part without a new schedule.",
            {"type": "wsd"},
        ),
        "plateau": Preset(
            "Divide the learning rate by ten when the score stops improving: for unknown budgets.",
            {"type": "plateau", "factor": 0.1, "patience": 2},
        ),
    },
    "profiling": {
        "none": Preset("No profiler.", {"enabled": False}),
        "trace": Preset(
            "One trace of a few steps, with shapes: where does a step's time go?",
            {"enabled": True, "repeat": 1, "record_shapes": True},
        ),
        "memory": Preset(
            "One trace with allocations and stacks, on CUDA the allocator's snapshot: who holds memory?",
            {"enabled": True, "repeat": 1, "profile_memory": True, "with_stack": True},
        ),
        "flops": Preset(
            "One trace with estimated FLOPs: how far from the device's peak?",
            {"enabled": True, "repeat": 1, "with_flops": True},
        ),
    },
    "heartbeat": {
        "none": Preset("No heartbeats.", {"enabled": False}),
        "default": Preset("A heartbeat a minute: enough to find a stuck rank, at no cost.", {"enabled": True}),
        "fast": Preset(
            "A heartbeat every five seconds: for finding a hang.", {"enabled": True, "interval_seconds": 5.0}
        ),
    },
    "comm": {
        "default": Preset("torch's own time limits."),
        "strict": Preset(
            "Ten minutes for start-up and compilation, then one minute a collective: a lost rank is found quickly.",
            {"init_timeout_seconds": 600, "train_timeout_seconds": 60},
        ),
        "patient": Preset(
            "An hour for everything: for slow file systems, large compilations, debuggers.",
            {"init_timeout_seconds": 3600},
        ),
    },
    "gc": {
        "none": Preset("Python's own garbage collection."),
        "paced": Preset(
            "Collect on every rank at the same step, each 50: no rank makes the others wait.", {"interval": 50}
        ),
        "full": Preset(
            "A full collection on every rank each 1000 steps, none between: for programs with few cycles.",
            {"interval": 1000, "generation": 2},
        ),
    },
    "ft": {
        "none": Preset("No fault tolerance beyond checkpoints.", {"enabled": False}),
        "torchft": Preset(
            "Two replica groups managed by TorchFT, or `ft.group_size` of them: a lost group does not stop the others, "
            "and is started again.",
            {"enabled": True, "group_size": 2},
        ),
    },
    "tracking": {
        "none": Preset(
            "The terminal and the run's own metrics.jsonl, no tracker.",
            {"tensorboard": False, "wandb": {"enabled": False}, "mlflow": {"enabled": False}},
            GLOBAL,
        ),
        "tensorboard": Preset("TensorBoard event files in the run's directory.", {"tensorboard": True}, GLOBAL),
        "wandb": Preset("Weights & Biases.", {"wandb": {"enabled": True}}, GLOBAL),
        "wandb_offline": Preset(
            "Weights & Biases without a network: upload later with `wandb sync`.",
            {"wandb": {"enabled": True, "mode": "offline"}},
            GLOBAL,
        ),
        "mlflow": Preset(
            "MLflow, in a SQLite database in the run's directory where no server is named.",
            {"mlflow": {"enabled": True}},
            GLOBAL,
        ),
    },
}

DEFAULT_CHOICES: dict[str, str] = {
    "parallel": "single",
    "fsdp": "default",
    "deepspeed": "none",
    "compile": "none",
    "checkpoint": "default",
    "dataloader": "default",
    "optim": "adamw",
    "scheduler": "constant",
    "profiling": "none",
    "heartbeat": "none",
    "comm": "default",
    "gc": "none",
    "ft": "none",
    "tracking": "none",
}
"""What the base config chooses in each group, in the order in which they are merged."""
