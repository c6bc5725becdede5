"""The builders: every public function that turns sections of a configuration into running objects, in one place.

Each takes its own section, so that a loop of one's own can use some of them and leave the others, as in
`examples/own_loop.py`. Those of a run (`join`, `Checkpoints`) take the whole configuration, which is what a run is
known by; `examples/gan.py` trains two models with two optimizers by them. The modules behind these names may change,
the names do not. Where a builder's section has a `_target_`, `hydra.utils.instantiate(section)` returns a partial of it
instead.

Where this process stands:
    device_type, local_device: the kind of device of the run, and the one of this process.
    layout_of: degrees of all axes.
    started_rank: rank and world size, as the launcher sets them.
    start_process_group, stop_process_groups, is_distributed: the default process group.
    make_mesh, make_expert_mesh: the device mesh of a layout, and that of its experts.
    data_rank_and_degree: which share of the samples this rank reads.

A model under the layout:
    assemble: all of the following in their right order, with values that do not depend on the layout.
    model_factory: the model that `model._target_` names.
    shard: FSDP2, block by block.
    replicate: DDP.
    recompute: activation checkpointing of the blocks.
    compile_model: `torch.compile`, by block or as a whole.

What trains it:
    Passes, compiled_update: forward, backward and evaluation of an assembled model, and an optimizer's step as a graph;
        with `graph=`, both are what `stack=graph` runs.
    make_dataloader, set_epoch, resume_dataloader, stop_workers: the loader of a split, resumable at any batch.
    make_optimizer: an optimizer with parameter groups by pattern.
    make_scheduler, scheduler_interval, is_metric_driven, resume_scheduler: the schedule of the learning rate.
    accumulate, clip: communication and norm of gradients.
    autocast, make_scaler: mixed precision outside of FSDP.
    make_profiler: traces of some steps.

A run of one's own loop:
    join: the run's directory, the process group and the mesh, as `danling_conf.main` or a launcher started this rank.
    Batches: a loader's batches, epoch after epoch.
    Checkpoints: saves and resumes any number of models and optimizers.

Faults of a setting raise `SettingError`, several at once `ConfigRefused`; both are ValueErrors with violations.
"""

from __future__ import annotations

from danling_conf.components.dataloader import make as make_dataloader
from danling_conf.components.dataloader import resume as resume_dataloader
from danling_conf.components.dataloader import set_epoch, stop_workers
from danling_conf.components.gradients import accumulate, clip
from danling_conf.components.instantiate import model_factory
from danling_conf.components.optimizer import make as make_optimizer
from danling_conf.components.precision import autocast
from danling_conf.components.precision import scaler as make_scaler
from danling_conf.components.profiler import make as make_profiler
from danling_conf.components.scheduler import interval_of as scheduler_interval
from danling_conf.components.scheduler import is_metric_driven
from danling_conf.components.scheduler import make as make_scheduler
from danling_conf.components.scheduler import resume as resume_scheduler
from danling_conf.parallel.activation_checkpointing import apply as recompute
from danling_conf.parallel.compile import apply as compile_model
from danling_conf.parallel.ddp import replicate
from danling_conf.parallel.device import device_type, local_device
from danling_conf.parallel.forward_backward import Passes
from danling_conf.parallel.fsdp import shard
from danling_conf.parallel.graph import compiled_update
from danling_conf.parallel.mesh import data_rank_and_degree
from danling_conf.parallel.mesh import make as make_mesh
from danling_conf.parallel.mesh import make_expert as make_expert_mesh
from danling_conf.parallel.model import assemble
from danling_conf.parallel.process_group import is_distributed
from danling_conf.parallel.process_group import start as start_process_group
from danling_conf.parallel.process_group import stop as stop_process_groups
from danling_conf.runner.batches import Batches
from danling_conf.runner.checkpoints import Checkpoints
from danling_conf.runner.world import join
from danling_conf.topology.layout import layout_of
from danling_conf.topology.rank_environment import started_rank
from danling_conf.topology.violation import ConfigRefused, SettingError

__all__ = [
    "Batches",
    "Checkpoints",
    "ConfigRefused",
    "Passes",
    "SettingError",
    "accumulate",
    "assemble",
    "autocast",
    "clip",
    "compile_model",
    "compiled_update",
    "data_rank_and_degree",
    "device_type",
    "is_distributed",
    "is_metric_driven",
    "join",
    "layout_of",
    "local_device",
    "make_dataloader",
    "make_expert_mesh",
    "make_mesh",
    "make_optimizer",
    "make_profiler",
    "make_scaler",
    "make_scheduler",
    "model_factory",
    "recompute",
    "replicate",
    "resume_dataloader",
    "resume_scheduler",
    "scheduler_interval",
    "set_epoch",
    "shard",
    "start_process_group",
    "started_rank",
    "stop_process_groups",
    "stop_workers",
]
