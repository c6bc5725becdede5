"""Every rule: what it refuses, with path, value and fix, and what it lets pass."""

from __future__ import annotations

import copy
import pickle

import pytest

from danling_conf.config.resolve import inspect, resolve
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules import (
    EFFECT_RULES,
    RULES,
    Context,
    axes,
    checkpoints,
    deepspeed,
    effect,
    fault_tolerance,
    ineffective_settings,
    optimizers,
    options,
    paths,
    pipeline,
    violations_of,
    world,
)
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

CPU = Context()
FOUR = Context(machine=Machine(devices=4))
CLUSTER = Context(machine=Machine(devices=4, cluster_world_size=4))
TWO_NODES = Context(machine=Machine(devices=4, started_world_size=8, launcher="srun"))
NO_COMPILER = Context(machine=Machine(compiler=False))
NO_DEEPSPEED = Context(machine=Machine(deepspeed=False))
NO_TRACKERS = Context(machine=Machine(trackers=frozenset()))
NO_SAFETENSORS = Context(machine=Machine(safetensors=False))


def started(count: int) -> Context:
    return Context(machine=Machine(started_world_size=count, launcher="torchrun"))


def config(given: dict):
    """A typed configuration of dotted paths; rules are not applied."""
    tree: dict = {}
    for path, value in given.items():
        owner = tree
        *parents, last = path.split(".")
        for part in parents:
            owner = owner.setdefault(part, {})
        owner[last] = value
    return inspect(tree, context=CPU)[0]


AXES = "parallel.axes."
DS = {"stack": "deepspeed"}
ZERO = "deepspeed.zero_optimization."
STAGE, OFFLOAD = ZERO + "stage", ZERO + "offload_optimizer"

FT = {"ft.enabled": True, "ft.group_size": 3}

REFUSED = [
    (deepspeed.installed, {"stack": "deepspeed"}, NO_DEEPSPEED, "stack", "pip install danling-conf[deepspeed]"),
    (deepspeed.installed, {"stack": "ds"}, NO_DEEPSPEED, "stack", "stack=auto"),
    (deepspeed.only_replicates, {**DS, AXES + "tensor": 2}, CPU, AXES + "tensor", "parallel=ddpN"),
    (deepspeed.only_replicates, {**DS, "fsdp.enabled": True}, CPU, "fsdp.enabled", "deepspeed=zero3"),
    (deepspeed.only_replicates, {**DS, "parallel.use_device_mesh": False}, CPU, "parallel.use_device_mesh", "true"),
    (deepspeed.known_keys, {"deepspeed.gradiant_clipping": 1.0}, CPU, "deepspeed.gradiant_clipping",
     "did you mean deepspeed.gradient_clipping?"),
    (deepspeed.known_keys, {ZERO + "reduce_bucket": 5}, CPU, ZERO + "reduce_bucket", "reduce_bucket_size?"),
    (deepspeed.known_keys, {ZERO + "reduce_bucket_size": "large"}, CPU, ZERO + "reduce_bucket_size", "correct"),
    (deepspeed.known_keys, {ZERO + "overlap_comm": 1}, CPU, ZERO + "overlap_comm", "correct"),
    (deepspeed.known_keys, {"deepspeed.bf16": {"enabled": True}}, CPU, "deepspeed.bf16", "remove"),
    (deepspeed.known_keys, {"deepspeed.optimizer": {"type": "Adam"}}, CPU, "deepspeed.optimizer", "remove"),
    (deepspeed.known_keys, {ZERO + "zero_quantized_weights": True}, CPU, ZERO + "zero_quantized_weights", "remove"),
    (deepspeed.no_contradiction, {"deepspeed.gradient_clipping": 1.0}, CPU, "deepspeed.gradient_clipping",
     "max_grad_norm=null"),
    (deepspeed.no_contradiction, {"deepspeed.gradient_accumulation_steps": 4, "accum_steps": 2}, CPU,
     "deepspeed.gradient_accumulation_steps", "accum_steps=2"),
    (deepspeed.no_contradiction, {"deepspeed.train_micro_batch_size_per_gpu": 8, "dataloader.batch_size": 4}, CPU,
     "deepspeed.train_micro_batch_size_per_gpu", "batch_size=4"),
    (deepspeed.no_contradiction, {"deepspeed.train_batch_size": 8, "dataloader.train": {"batch_size": 4},
                                  AXES + "replicate": 4}, CPU, "deepspeed.train_batch_size", "remove"),
    (deepspeed.fits_stage, {**DS, OFFLOAD: {"device": "cpu"}}, CPU, OFFLOAD + ".device", "stage=2"),
    (deepspeed.fits_stage, {**DS, STAGE: 2, ZERO + "offload_param": {"device": "cpu"}}, CPU,
     ZERO + "offload_param.device", "stage=3"),
    (deepspeed.fits_stage, {**DS, STAGE: 1, "optim.type": "muon"}, CPU, "optim.type", "stage=0"),
    (deepspeed.fits_stage, {**DS, STAGE: 1, "optim.type": "my.Optimizer"}, CPU, "optim.type", "AdamW"),
    (deepspeed.fits_stage, {**DS, STAGE: 1, ZERO + "overlap_comm": True, "accum_steps": 2}, CPU,
     ZERO + "overlap_comm", "stage=2"),
    (deepspeed.fits_stage, {**DS, STAGE: 3, "compile.enable": True}, CPU, "compile.enable", "stage=2"),
    (deepspeed.fits_stage, {**DS, STAGE: 3, "checkpoint.save_frozen": False}, CPU, "checkpoint.save_frozen", "true"),
    (deepspeed.kept_promises, {**DS, "precision": "fp16"}, CPU, "precision", "bf16"),
    (deepspeed.kept_promises, {**DS, "parallel.unused_parameters": "allow"}, CPU, "parallel.unused_parameters",
     "freeze"),
    (deepspeed.kept_promises, {**DS, STAGE: 2, "checkpoint.backend": "dcp"}, CPU, "checkpoint.backend", "file"),
    (fault_tolerance.installed, FT, Context(machine=Machine(torchft=False)), "ft.enabled", "danling-conf[ft]"),
    (fault_tolerance.numbers_of_groups, {**FT, "ft.min_replica_size": 4}, CPU, "ft.min_replica_size", "3 or less"),
    (fault_tolerance.numbers_of_groups, {**FT, "ft.replica_id": 3}, CPU, "ft.replica_id", "ft.group_size"),
    (fault_tolerance.numbers_of_groups, {"ft.enabled": True}, CPU, "ft.group_size", "ft=none"),
    (fault_tolerance.order_of_limits, {**FT, "ft.heartbeat_timeout_ms": 20000}, CPU, "ft.process_group_timeout_ms",
     "ft.process_group_timeout_ms=20000"),
    (fault_tolerance.order_of_limits, {**FT, "ft.timeout_seconds": 5}, CPU, "ft.timeout_seconds", "=10"),
    (fault_tolerance.order_of_limits, {**FT, "ft.quorum_timeout_seconds": 59, "ft.timeout_seconds": 20}, CPU,
     "ft.quorum_timeout_seconds", "ft.join_timeout_seconds"),
    (fault_tolerance.groups_meet, {**FT, "ft.lighthouse": "here", "seed": 1}, CPU, "ft.lighthouse", "HOST:PORT"),
    (fault_tolerance.groups_meet, {**FT, "ft.lighthouse": "here:80"}, CPU, "seed", "seed=0"),
    (fault_tolerance.groups_meet, FT, TWO_NODES, "ft.lighthouse", "ft.replica_id"),
    (fault_tolerance.groups_fit, {**FT, "ft.process_group": "nccl"}, CPU, "ft.process_group", "gloo"),
    (fault_tolerance.groups_fit, {**FT, "stack": "graph"}, CPU, "ft.enabled", "stack=auto"),
    (world.world_size, {**FT, AXES + "replicate": 2}, FOUR, "parallel", "smaller layout"),
    (world.whole_degrees, {AXES + "replicate": 0}, CPU, AXES + "replicate", "replicate=1"),
    (world.whole_degrees, {AXES + "replicate": -1, AXES + "shard": -1}, CPU, AXES + "shard", "all but one"),
    (world.sharding_is_fsdp, {AXES + "shard": 4}, CPU, AXES + "shard", "parallel=fsdp4"),
    (world.sharding_is_fsdp, {AXES + "shard": -1}, CPU, AXES + "shard", "parallel=fsdp,"),
    (world.sharding_is_fsdp, {AXES + "shard": 2, AXES + "replicate": 4}, CPU, AXES + "shard", "parallel=hsdp4x2"),
    (world.stack_fits_layout, {"stack": "ddp", AXES + "shard": 2, "fsdp.enabled": True}, CPU, "stack", "parallel=ddpN"),
    (world.stack_fits_layout, {"stack": "torch", "fsdp.enabled": True}, CPU, "stack", "stack=auto"),
    (world.graph_of_one_process, {"stack": "graph", AXES + "replicate": 2}, CPU, "stack", "compile=whole"),
    (world.graph_of_one_process, {"stack": "graph", AXES + "replicate": -1}, CPU, "stack", "compile=whole"),
    (world.graph_of_one_process, {"stack": "graph", "fsdp.enabled": True}, CPU, "stack", "parallel=single"),
    (options.graph_options, {"stack": "graph", "compile.fullgraph": False}, CPU, "compile.fullgraph", "=null"),
    (options.graph_options, {"stack": "graph", "compile.backend": "eager"}, CPU, "compile.backend", "aot_eager"),
    (options.graph_options, {"stack": "graph", "precision": "fp16"}, CPU, "precision", "precision=bf16"),
    (options.graph_options, {"stack": "graph", "compile.mode": "reduce-overhead"}, FOUR, "compile.mode", "no-cudag"),
    (options.graph_options, {"stack": "graph", "compile.memory_policy": "full"}, CPU, "compile.memory_policy",
     "memory_policy=null"),
    (options.graph_options, {"stack": "graph", "activation_checkpointing.mode": "full"}, CPU,
     "activation_checkpointing.mode", "compile=whole"),
    (options.compile_options, {"stack": "graph"}, NO_COMPILER, "compile.enable", "compile=aot_eager"),
    (paths.artifact_directory, {"compile.precompile_artifact_dir": __file__}, CPU, "compile.precompile_artifact_dir",
     "a directory"),
    (paths.artifact_directory, {"compile.precompile_artifact_dir": ""}, CPU, "compile.precompile_artifact_dir",
     "a directory"),
    (world.world_size, {AXES + "replicate": 8}, started(4), "parallel", "start 8"),
    (world.world_size, {}, started(4), "parallel", "start 1"),
    (world.world_size, {"stack": "ddp"}, started(4), "parallel", "parallel=ddp fills itself"),
    (world.world_size, {AXES + "replicate": 8}, FOUR, "parallel", "mesh_device_type=cpu"),
    (world.world_size, {AXES + "shard": -1, AXES + "replicate": 3, "fsdp.enabled": True}, started(8),
     AXES + "shard", "give every degree"),
    (world.world_size, {AXES + "replicate": -1, AXES + "shard": 3, "fsdp.enabled": True}, FOUR,
     AXES + "replicate", "give every degree"),
    (world.reshard_divides, {AXES + "shard": 4, "fsdp.enabled": True, "fsdp.reshard_after_forward": 3}, CPU,
     "fsdp.reshard_after_forward", "choose one"),
    (world.reshard_divides, {AXES + "shard": -1, "fsdp.enabled": True, "fsdp.reshard_after_forward": 3}, FOUR,
     "fsdp.reshard_after_forward", "choose one"),
    (world.reshard_divides, {AXES + "shard": 4, "fsdp.enabled": True, "fsdp.reshard_after_forward": 0}, CPU,
     "fsdp.reshard_after_forward", "choose one"),
    (axes.experts_borrow, {AXES + "shard": 4, AXES + "expert": 3, "fsdp.enabled": True}, CPU,
     AXES + "expert", "divisor of 4"),
    (axes.experts_borrow, {AXES + "tensor": 4, AXES + "expert_tensor": 2}, CPU,
     AXES + "expert_tensor", "expert_tensor=4"),
    (axes.experts_borrow, {AXES + "shard": 4, AXES + "context": 2, AXES + "expert": 4, AXES + "expert_tensor": 2,
                           AXES + "tensor": 4, "fsdp.enabled": True}, CPU, AXES + "expert_tensor", "expert_tensor=4"),
    (axes.experts_borrow, {AXES + "shard": 2, AXES + "context": 2, AXES + "tensor": 2, AXES + "expert": 2,
                           "fsdp.enabled": True}, CPU, AXES + "expert", "expert=4"),
    (axes.experts_borrow, {AXES + "context": 2, AXES + "tensor": 2, AXES + "expert_tensor": 2}, CPU, AXES + "expert",
     "expert=2"),
    (axes.known_styles, {AXES + "tensor": 2, "parallel.tensor_plan": {"head": "colwis"}}, CPU,
     "parallel.tensor_plan.head", "colwise"),
    (axes.ring_on_cuda, {AXES + "context": 2, "parallel.context_method": "ring"}, CPU, "parallel.context_method",
     "gather"),
    (axes.ring_on_cuda, {AXES + "context": 2, "parallel.context_method": "ring", "parallel.mesh_device_type": "cpu"},
     FOUR, "parallel.context_method", "ulysses"),
    (axes.selection_with_gather, {AXES + "context": 2, "activation_checkpointing.mode": "selective"}, FOUR,
     "activation_checkpointing.mode", "mode=full"),
    *((axes.mesh_for_axes, {AXES + axis: 2, "parallel.use_device_mesh": False}, CPU, "parallel.use_device_mesh",
       "parallel=ddpN") for axis in ("tensor", "context", "pipeline")),
    (axes.mesh_for_axes, {"fsdp.enabled": True, "parallel.use_device_mesh": False}, CPU, "parallel.use_device_mesh",
     "use_device_mesh=true"),
    (axes.whole_graphs, {AXES + "shard": 2, AXES + "expert": 2, "fsdp.enabled": True, "compile.enable": True,
                         "compile.fullgraph": True}, CPU, "compile.fullgraph", "fullgraph=null"),
    (pipeline.whole_batches, {AXES + "pipeline": 2, "dataloader.drop_last": False}, CPU, "dataloader.drop_last",
     "drop_last=null"),
    (pipeline.whole_batches, {AXES + "pipeline": 2, "dataloader.train": {"drop_last": False}}, CPU,
     "dataloader.train.drop_last", "drop_last=null"),
    (pipeline.stage_parts, {AXES + "pipeline": 2, "parallel.module_fqns_per_model_part": [["a"], ["b"], ["c"], ["d"]]},
     CPU, "parallel.module_fqns_per_model_part", "Interleaved1F1B"),
    (pipeline.stage_parts, {AXES + "pipeline": 2, "parallel.module_fqns_per_model_part": [["a"], ["b"]],
                            "parallel.pipeline_schedule": "zbvzerobubble"}, CPU, "parallel.module_fqns_per_model_part",
     "give 4 parts"),
    (pipeline.enough_microbatches, {AXES + "pipeline": 4, "dataloader.batch_size": 2}, CPU,
     "parallel.pipeline_microbatch_size", "larger dataloader.batch_size"),
    (pipeline.enough_microbatches, {AXES + "pipeline": 2, "dataloader.batch_size": 6,
                                    "parallel.pipeline_schedule": "DualPipeV", "parallel.pipeline_n_microbatches": 3},
     CPU, "parallel.pipeline_n_microbatches", "pipeline_n_microbatches=4"),
    (pipeline.enough_microbatches, {AXES + "pipeline": 2, "dataloader.batch_size": 5,
                                    "parallel.pipeline_schedule": "Interleaved1F1B"}, CPU,
     "parallel.pipeline_microbatch_size", "multiple of 2"),
    (pipeline.microbatches, {AXES + "pipeline": 2, "dataloader.batch_size": 8, "dataloader.train": {"batch_size": 6},
                             "parallel.pipeline_microbatch_size": 4}, CPU, "parallel.pipeline_microbatch_size",
     "dataloader.train.batch_size=8"),
    (pipeline.stages_are_not_compiled, {AXES + "pipeline": 2, "compile.enable": True, "compile.scope": "model"}, CPU,
     "compile.scope", "scope=block"),
    (axes.whole_statistics, {AXES + "replicate": 2, "parallel.sync_batch_norm": True, "compile.enable": True,
                             "compile.fullgraph": True}, CPU, "compile.fullgraph", "compile.fullgraph=null"),
    (pipeline.local_statistics, {AXES + "pipeline": 2, "parallel.sync_batch_norm": True}, CPU,
     "parallel.sync_batch_norm", "layout without a pipeline"),
    *((pipeline.split_backward, {AXES + "pipeline": 2, "parallel.pipeline_schedule": schedule, "compile.enable": True},
       CPU, "parallel.pipeline_schedule", "compile=none")
      for schedule in ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")),
    *((options.precision_fits, {"precision": "fp16", AXES + axis: 2}, CPU, "precision", "precision=bf16")
      for axis in ("tensor", "context", "pipeline")),
    (options.one_budget, {"steps": None}, CPU, "steps", "steps=1000 or epochs=10"),
    (options.one_budget, {"steps": 3, "epochs": 2}, CPU, "steps", "epochs=null"),
    (options.one_budget, {"steps": 3, "epochs": 2}, Context(given=frozenset({"epochs", "steps"})), "steps",
     "epochs=null"),
    (optimizers.monitored_metric, {"scheduler.monitor": "loss"}, CPU, "scheduler.monitor", "val.loss"),
    (pipeline.microbatches, {AXES + "pipeline": 2, "dataloader.batch_size": 6, "parallel.pipeline_microbatch_size": 4},
     CPU, "parallel.pipeline_microbatch_size", "dataloader.batch_size=8"),
    (pipeline.microbatches, {AXES + "pipeline": 2, "dataloader.batch_size": 6, "parallel.pipeline_n_microbatches": 4},
     CPU, "parallel.pipeline_n_microbatches", "divisor of 6"),
    (pipeline.stage_parts, {AXES + "pipeline": 2, "parallel.module_fqns_per_model_part": [["a"], ["b"], ["c"]]}, CPU,
     "parallel.module_fqns_per_model_part", "multiple of 2"),
    (options.compile_options, {"compile.mode": "max-autotune", "compile.options": {"a": 1}}, CPU, "compile.mode",
     "compile.options=null"),
    (options.compile_options, {"compile.mode": "max-autotune", "compile.backend": "eager"}, CPU, "compile.mode",
     "compile.mode=null"),
    (options.compile_options, {"compile.mode": "maximum"}, CPU, "compile.mode", "choose one"),
    (options.compile_options, {"compile.enable": True}, NO_COMPILER, "compile.enable", "compile=aot_eager"),
    (options.precision_fits, {"precision": "fp16", "fsdp.enabled": True}, CPU, "precision", "precision=bf16"),
    (options.precision_fits, {"fsdp.mp_policy": {"param_dtype": "half"}, "fsdp.enabled": True}, CPU,
     "fsdp.mp_policy.param_dtype", "param_dtype=bf16"),
    (options.loader_workers, {"dataloader.prefetch_factor": 2}, CPU, "dataloader.prefetch_factor", "num_workers=2"),
    (options.loader_workers, {"dataloader.persistent_workers": True}, CPU, "dataloader.persistent_workers",
     "num_workers=2"),
    (options.loader_workers, {"dataloader.num_workers": 2, "dataloader.val": {"num_workers": 0, "prefetch_factor": 4}},
     CPU, "dataloader.val.prefetch_factor", "dataloader.val.num_workers=2"),
    (checkpoints.excluded_parts, {"checkpoint.exclude_from_loading": ["optimiser", "lr_scheduler"]}, CPU,
     "checkpoint.exclude_from_loading", "did you mean optimizer?"),
    (checkpoints.excluded_parts, {"checkpoint.exclude_from_loading": "head.weight"}, CPU,
     "checkpoint.exclude_from_loading", "model.head.weight"),
    (checkpoints.background_group, {"checkpoint.async_process_group_backend": "gluo"}, CPU,
     "checkpoint.async_process_group_backend", "gloo"),
    (checkpoints.background_group, {"checkpoint.async_process_group_backend": "nccl"}, CPU,
     "checkpoint.async_process_group_backend", "gloo"),
    (checkpoints.replica_names, {"checkpoint.ft_replica_id": "a/b"}, CPU, "checkpoint.ft_replica_id", "no slashes"),
    (checkpoints.replica_names, {"checkpoint.ft_dataloader_checkpoint_prefix": "ckpt-"}, CPU,
     "checkpoint.ft_dataloader_checkpoint_prefix", "replica"),
    (checkpoints.exports_by_safetensors, {"checkpoint.export_dtype": "bf16"}, NO_SAFETENSORS, "checkpoint.export_dtype",
     "pip install"),
    (checkpoints.exports_by_safetensors, {"checkpoint.last_save_model_only": True}, NO_SAFETENSORS,
     "checkpoint.last_save_model_only", "pip install"),
    (options.installed_trackers, {"tensorboard": True}, NO_TRACKERS, "tensorboard", "danling-conf[tensorboard]"),
    (options.installed_trackers, {"wandb.enabled": True}, NO_TRACKERS, "wandb.enabled", "danling-conf[wandb]"),
    (options.installed_trackers, {"mlflow.enabled": True}, NO_TRACKERS, "mlflow.enabled", "danling-conf[mlflow]"),
    (options.saving_with_interval, {"checkpoint.load_only": True, "checkpoint.interval": 3}, CPU, "checkpoint.interval",
     "drop one"),
    (options.declared_splits, {"dataloader.splits": ["train", "val"], "score_split": "test"}, CPU,
     "score_split", "remove it"),
    (options.declared_splits, {"dataloader.splits": ["train"], "dataloader.trian": {"batch_size": 3}}, CPU,
     "dataloader.trian", "did you mean dataloader.train?"),
    (options.named_callbacks, {"callbacks": [{"decay": 0.5}]}, CPU, "callbacks[0]._target_", "write {_target_:"),
    (options.targets_of_python, {"callbacks": {"a": {"_target_": "os.system"}}}, CPU, "callbacks.a._target_", "name"),
    (options.targets_of_python, {"optim.type": "os.system"}, CPU, "optim.type", "name one of a package"),
    (options.selection_by_ops, {"activation_checkpointing.keep_ops": ["aten.mm.default"]}, CPU,
     "activation_checkpointing.keep_ops", "mode=selective"),
    (optimizers.known_optimizer, {"optim.type": "adamv"}, CPU, "optim.type", "dam"),
    (optimizers.known_optimizer, {"optim.type": "sgd", "optim.betas": [0.9, 0.9]}, CPU, "optim.betas", "momentum"),
    (optimizers.known_optimizer, {"optim.betass": [0.9, 0.9]}, CPU, "optim.betass", "betas"),
    (optimizers.known_optimizer, {"optim.param_groups": [{"lr": 0.1}]}, CPU,
     "optim.param_groups[0].pattern", "pattern"),
    (optimizers.known_optimizer, {"optim.type": "lbfgs"}, CPU, "optim.type", "another optimizer"),
    *((optimizers.known_optimizer, {"optim.type": kind, "optim.betas": None, "fsdp.enabled": True}, CPU, "optim.type",
       "parallel=ddpN") for kind in ("adafactor", "Rprop")),
    *((optimizers.known_optimizer, {"optim.type": "rprop", "optim.betas": None, AXES + axis: 2, AXES + "replicate": 2},
       CPU, "optim.type", "parallel=ddpN") for axis in ("tensor", "context", "pipeline")),
    (optimizers.known_scheduler, {"scheduler.type": "cosin"}, CPU, "scheduler.type", "cosine"),
    (optimizers.known_scheduler, {"scheduler.type": "cosine", "scheduler.step_size": 3}, CPU, "scheduler.step_size",
     "warmup_steps"),
    (optimizers.known_scheduler, {"scheduler.monitor": "val.loss"}, CPU, "scheduler.monitor", "scheduler=plateau"),
    (optimizers.known_scheduler, {"scheduler.type": "plateau", "scheduler.interval": "step"}, CPU,
     "scheduler.interval", "epoch"),
    (optimizers.known_scheduler, {"steps": 3, "scheduler.warmup_steps": 4}, CPU, "scheduler.warmup_steps", "steps=4"),
    (paths.writable_root, {"workspace_root": __file__}, CPU, "workspace_root", "a directory to write to"),
    (paths.writable_root, {"workspace_root": __file__ + "/deeper"}, CPU, "workspace_root", "a directory to write to"),
    *((paths.plain_names, {name: bad}, CPU, name, "without slashes")
      for name in ("lineage", "experiment", "checkpoint.dir_name", "heartbeat.dir_name")
      for bad in ("a/b", "..", "", " ", ".")),
    (paths.plain_names, {"experiment": "sweeps"}, CPU, "experiment", "another name"),
    (paths.existing_sources, {"resume": "/nowhere/at/all"}, CPU, "resume", "checkpoint"),
    (paths.existing_sources, {"pretrained": "/nowhere/at/all"}, CPU, "pretrained", "checkpoint"),
    (paths.existing_sources, {"resume": __file__}, CPU, "resume", "run's directory"),
    (paths.existing_sources, {"pretrained": "~"}, CPU, "pretrained", "run's directory"),
]  # fmt: skip
"""Rule, settings, surroundings, and the path and part of the fix of its one violation."""

PASSED = [
    (deepspeed.installed, {"stack": "ddp"}, NO_DEEPSPEED),
    (deepspeed.installed, DS, CPU),
    (deepspeed.only_replicates, {**DS, AXES + "replicate": 4}, CPU),
    (deepspeed.only_replicates, {AXES + "tensor": 2}, CPU),
    (deepspeed.known_keys, {ZERO + "reduce_bucket_size": 5e8, ZERO + "overlap_comm": True, ZERO + "stage": 2,
                            "deepspeed.gradient_predivide_factor": 2, "deepspeed.fp16": {"enabled": False},
                            "deepspeed.bf16": "auto", "deepspeed.train_batch_size": "auto"}, CPU),
    (deepspeed.no_contradiction, {"deepspeed.gradient_clipping": 0.5, "max_grad_norm": 0.5, "accum_steps": 2,
                                  "deepspeed.gradient_accumulation_steps": 2, AXES + "replicate": 4,
                                  "deepspeed.train_batch_size": 8}, CPU),
    (deepspeed.fits_stage, {**DS, STAGE: 3, OFFLOAD: {"device": "cpu"}, "optim.type": "SGD"}, CPU),
    (deepspeed.fits_stage, {**DS, "optim.type": "muon", "compile.enable": True}, CPU),
    (deepspeed.kept_promises, {**DS, STAGE: 2, "precision": "bf16", "checkpoint.backend": "file"}, CPU),
    (fault_tolerance.installed, {"ft.group_size": 2}, Context(machine=Machine(torchft=False))),
    (fault_tolerance.numbers_of_groups, {**FT, "ft.min_replica_size": 3, "ft.replica_id": 2}, CPU),
    (fault_tolerance.order_of_limits, FT, CPU),
    (fault_tolerance.groups_meet, {**FT, "ft.lighthouse": "http://here:80", "seed": 1}, TWO_NODES),
    (fault_tolerance.groups_meet, FT, CLUSTER),
    (fault_tolerance.groups_fit, {**FT, "ft.process_group": "nccl"}, FOUR),
    (world.world_size, {**FT, "ft.lighthouse": "here:80", AXES + "replicate": 2}, FOUR),
    (world.whole_degrees, {AXES + "replicate": 2, AXES + "shard": -1}, CPU),
    (world.sharding_is_fsdp, {AXES + "shard": 4, "fsdp.enabled": True}, CPU),
    (world.sharding_is_fsdp, {"fsdp.enabled": True}, CPU),
    (world.stack_fits_layout, {"stack": "ddp", AXES + "replicate": 4}, CPU),
    (world.stack_fits_layout, {"stack": "parallel", AXES + "shard": 4, "fsdp.enabled": True}, CPU),
    (world.world_size, {AXES + "replicate": 8}, CPU),
    (world.world_size, {AXES + "replicate": 8}, started(8)),
    (world.world_size, {AXES + "replicate": -1}, started(6)),
    (world.world_size, {AXES + "replicate": 4}, FOUR),
    (world.world_size, {AXES + "replicate": -1}, FOUR),
    (world.world_size, {AXES + "replicate": 2}, FOUR),
    (world.world_size, {AXES + "replicate": 8, "parallel.mesh_device_type": "cpu"}, FOUR),
    (world.world_size, {AXES + "replicate": 8}, TWO_NODES),
    (world.world_size, {AXES + "replicate": 0}, started(4)),  # named by `whole_degrees`
    (world.reshard_divides, {AXES + "shard": 4, "fsdp.enabled": True, "fsdp.reshard_after_forward": 2}, CPU),
    (world.reshard_divides, {AXES + "shard": 3, "fsdp.enabled": True, "fsdp.reshard_after_forward": True}, CPU),
    (world.reshard_divides, {AXES + "shard": -1, "fsdp.enabled": True, "fsdp.reshard_after_forward": 3}, started(6)),
    (world.reshard_divides, {"fsdp.reshard_after_forward": 3}, CPU),
    (axes.experts_borrow, {AXES + "shard": 8, AXES + "expert": 4, "fsdp.enabled": True}, CPU),
    (axes.experts_borrow, {AXES + "shard": -1, AXES + "expert": 4, "fsdp.enabled": True}, started(8)),
    (axes.experts_borrow, {AXES + "tensor": 2, AXES + "expert_tensor": 2}, CPU),
    (axes.experts_borrow, {AXES + "shard": 2, AXES + "context": 2, AXES + "tensor": 2, AXES + "expert": 4,
                           "fsdp.enabled": True}, CPU),
    (axes.experts_borrow, {AXES + "shard": 2, AXES + "context": 2, AXES + "tensor": 2, AXES + "expert": 2,
                           AXES + "expert_tensor": 2, "fsdp.enabled": True}, CPU),
    (axes.known_styles, {AXES + "tensor": 2, "parallel.tensor_plan": {"head": "colwise_rep"}}, CPU),
    (axes.ring_on_cuda, {AXES + "context": 2, "parallel.context_method": "ring"}, FOUR),
    (axes.selection_with_gather, {AXES + "context": 2, "activation_checkpointing.mode": "selective"}, CPU),
    (axes.selection_with_gather, {AXES + "context": 2, "activation_checkpointing.mode": "full"}, FOUR),
    (axes.mesh_for_axes, {AXES + "replicate": 2, "parallel.use_device_mesh": False}, CPU),
    (axes.whole_graphs, {AXES + "shard": 2, AXES + "expert": 2, "fsdp.enabled": True, "compile.enable": True}, CPU),
    (pipeline.whole_batches, {AXES + "pipeline": 2, "dataloader.val": {"drop_last": False}}, CPU),
    (pipeline.whole_batches, {AXES + "pipeline": 2, "dataloader.drop_last": False,
                              "dataloader.train": {"drop_last": True}}, CPU),
    (pipeline.enough_microbatches, {AXES + "pipeline": 4, "dataloader.batch_size": 2,
                                    "parallel.pipeline_schedule": "GPipe"}, CPU),
    (pipeline.stages_are_not_compiled, {AXES + "pipeline": 2, "compile.enable": True}, CPU),
    (axes.whole_statistics, {AXES + "replicate": 2, "parallel.sync_batch_norm": True, "compile.enable": True}, CPU),
    (pipeline.local_statistics, {AXES + "pipeline": 2}, CPU),
    (pipeline.split_backward, {AXES + "pipeline": 2, "parallel.pipeline_schedule": "LoopedBFS",
                               "compile.enable": True}, CPU),
    (options.one_budget, {"steps": 3}, CPU),
    (options.one_budget, {"epochs": 3}, CPU),
    (optimizers.monitored_metric, {"scheduler.monitor": "val.loss"}, CPU),
    (pipeline.microbatches, {"dataloader.batch_size": 6, "parallel.pipeline_microbatch_size": 4}, CPU),
    (pipeline.microbatches, {AXES + "pipeline": 2, "dataloader.batch_size": 6, "parallel.pipeline_microbatch_size": 4,
                           "parallel.pipeline_n_microbatches": 3}, CPU),
    (pipeline.stage_parts, {AXES + "pipeline": 2, "parallel.module_fqns_per_model_part": [["a"], ["b"]]}, CPU),
    (pipeline.stage_parts, {AXES + "pipeline": -1, "parallel.module_fqns_per_model_part": [["a"]]}, CPU),
    (options.compile_options, {"compile.enable": True, "compile.mode": "max-autotune"}, CPU),
    (options.compile_options, {"compile.enable": True, "compile.options": {"max_autotune": True}}, CPU),
    (options.compile_options, {"compile.enable": True, "compile.backend": "aot_eager"}, NO_COMPILER),
    (options.compile_options, {"compile.enable": True}, Context(machine=Machine(devices=1, compiler=False))),
    (options.precision_fits, {"precision": "fp16"}, CPU),
    (options.precision_fits, {"precision": "bf16", "fsdp.enabled": True}, CPU),
    (options.loader_workers, {"dataloader.num_workers": 2, "dataloader.prefetch_factor": 2}, CPU),
    (options.loader_workers, {"dataloader.prefetch_factor": 2, "dataloader.train": {"num_workers": 2}}, CPU),
    (options.loader_workers, {"dataloader.val": {"num_workers": 2, "prefetch_factor": 2}}, CPU),
    (options.precision_fits, {"precision": "fp16", "fsdp.mp_policy": {"param_dtype": "bf16"}, "fsdp.enabled": True},
     CPU),
    (optimizers.known_optimizer, {"optim.type": "adafactor"}, CPU),
    (optimizers.known_optimizer, {"optim.type": "adafactor", AXES + "pipeline": 2}, CPU),
    (optimizers.known_optimizer, {"optim.type": "adafactor", AXES + "replicate": 2}, CPU),
    (options.loader_workers, {"dataloader.num_workers": 2, "dataloader.prefetch_factor": 2,
                              "dataloader.val": {"num_workers": 0}}, CPU),
    (checkpoints.excluded_parts, {"checkpoint.exclude_from_loading": ["lr_scheduler", "data_loader", "model.x"]}, CPU),
    (checkpoints.background_group, {"checkpoint.async_process_group_backend": "nccl"},
     Context(machine=Machine(devices=1))),
    (checkpoints.replica_names, {"checkpoint.ft_replica_id": "7"}, CPU),
    (checkpoints.exports_by_safetensors, {"checkpoint.export_dtype": "bf16"}, CPU),
    (checkpoints.exports_by_safetensors, {}, NO_SAFETENSORS),
    (options.installed_trackers, {"tensorboard": True, "wandb.enabled": True, "mlflow.enabled": True}, CPU),
    (options.installed_trackers, {}, NO_TRACKERS),
    (options.saving_with_interval, {"checkpoint.load_only": True}, CPU),
    (options.saving_with_interval, {"checkpoint.interval": 3}, CPU),
    (options.declared_splits, {"dataloader.splits": ["train"], "dataloader.train": {"batch_size": 3}}, CPU),
    (options.named_callbacks, {"callbacks": [{"_target_": "danling_conf.EMA", "decay": 0.5}]}, CPU),
    (options.targets_of_python, {"callbacks": {"a": {"_target_": "danling_conf.EMA"}, "b": None}}, CPU),
    (options.selection_by_ops, {"activation_checkpointing.mode": "selective",
                                "activation_checkpointing.keep_ops": ["aten.mm.default"]}, CPU),
    (optimizers.known_optimizer, {"optim.type": "AdamW", "optim.betas": [0.8, 0.9]}, CPU),
    (optimizers.known_optimizer, {"optim.type": "my.own.Lion", "optim.anything": 3}, CPU),
    (optimizers.known_optimizer, {"optim.param_groups": [{"pattern": "bias$", "weight_decay": 0}]}, CPU),
    (optimizers.known_scheduler, {"scheduler.type": "steplr", "scheduler.step_size": 3}, CPU),
    (optimizers.known_scheduler, {"scheduler.type": "plateau", "scheduler.monitor": "val.loss",
                                  "scheduler.interval": "validation"}, CPU),
    (optimizers.known_scheduler, {"steps": 4, "scheduler.warmup_steps": 4}, CPU),
    (optimizers.known_scheduler, {"epochs": 1, "scheduler.warmup_steps": 400}, CPU),
    (paths.writable_root, {"workspace_root": "/tmp/a/b/c/d"}, CPU),
    (paths.writable_root, {"workspace_root": "~/runs"}, CPU),
    (paths.plain_names, {"lineage": "a.b-c d", "experiment": "sweeps2"}, CPU),
    (paths.existing_sources, {}, CPU),
    (paths.artifact_directory, {}, CPU),
    (paths.artifact_directory, {"compile.precompile_artifact_dir": "/tmp/a/b/c/d"}, CPU),
    (world.graph_of_one_process, {"stack": "graph"}, CPU),
    (world.graph_of_one_process, {AXES + "replicate": 2, "compile.enable": True}, CPU),
    (options.graph_options, {"stack": "graph", "precision": "bf16", "compile.backend": "aot_eager"}, CPU),
    (options.graph_options, {"stack": "graph", "compile.mode": "max-autotune-no-cudagraphs"}, FOUR),
    (options.graph_options, {"precision": "fp16", "compile.fullgraph": False}, CPU),
]  # fmt: skip
"""Rule, settings and surroundings that it has nothing to say of."""


@pytest.mark.parametrize(("rule", "given", "context", "path", "fix"), REFUSED)
def test_what_a_rule_refuses(rule, given, context, path, fix):
    (violation,) = rule(config(given), context)
    assert violation.path == path
    assert fix in violation.fix
    assert violation.rule
    assert "\n" not in violation.rule + violation.fix
    # It is one of the rules that are applied.
    assert violation in violations_of(config(given), context)


@pytest.mark.parametrize(("rule", "given", "context"), PASSED)
def test_what_a_rule_lets_pass(rule, given, context):
    assert list(rule(config(given), context)) == []


def test_every_rule_has_both_cases():
    assert {rule for rule, *_ in REFUSED} == {rule for rule, *_ in PASSED} == set(RULES)


@pytest.mark.parametrize(("rule", "given", "context", "path", "fix"), REFUSED)
def test_a_refusal_shows_the_value_that_the_configuration_has(rule, given, context, path, fix):
    (violation,) = rule(config(given), context)
    if violation.value is not ABSENT and "[" not in path:
        owner = config(given)
        for part in path.split("."):
            owner = owner[part] if isinstance(owner, dict) else getattr(owner, part)
        assert violation.value == owner


def test_an_unwritable_root_is_refused(monkeypatch, tmp_path):
    """Asked of the nearest folder that exists (as root everything can be written, so the answer is given here)."""
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    (violation,) = paths.writable_root(config({"workspace_root": str(tmp_path / "a" / "b")}), CPU)
    assert violation.rule == f"{tmp_path} cannot be written"


INEFFECTIVE = [
    (deepspeed.settings_without_the_stack, {STAGE: 2, ZERO + "overlap_comm": True,
                                            "deepspeed.prescale_gradients": True},
     CPU, {STAGE, ZERO + "overlap_comm", "deepspeed.prescale_gradients"}),
    (deepspeed.settings_without_the_stack, {**DS, STAGE: 2}, CPU, set()),
    (effect.settings_of_what_is_off, {"ft.group_size": 2}, CPU, {"ft.group_size"}),
    (fault_tolerance.unread_settings, {**FT, "ft.replica_id": 1, "ft.address": "10.0.0.1", "ft.sync_every": 3,
                                       "ft.outer_lr": 1.0}, CPU,
     {"ft.replica_id", "ft.address", "ft.sync_every", "ft.outer_lr"}),
    (fault_tolerance.unread_settings, {**FT, "ft.lighthouse": "here:80", "ft.max_restarts": 1, "ft.sync": "diloco",
                                       "ft.sync_every": 3, "ft.outer_lr": 1.0}, CPU, {"ft.max_restarts"}),
    (fault_tolerance.unread_settings, FT, CPU, set()),
    (fault_tolerance.unread_settings, {**FT, "ft.replica_id": 1, "ft.address": "auto"}, CLUSTER, {"ft.replica_id"}),
    (effect.settings_of_what_is_off, {"heartbeat.interval_seconds": 5.0, "profiling.wait": 3,
                                             "wandb.project": "p", "mlflow.name": "n"}, CPU,
     {"heartbeat.interval_seconds", "profiling.wait", "wandb.project", "mlflow.name"}),
    (effect.settings_of_what_is_off, {"heartbeat.interval_seconds": 5.0, "heartbeat.enabled": True}, CPU, set()),
    (checkpoints.writing_settings, {"checkpoint.load_only": True, "checkpoint.keep_latest_k": 2}, CPU,
     {"checkpoint.keep_latest_k"}),
    (checkpoints.writing_settings, {"checkpoint.async_mode": "async", "checkpoint.async_enabled": False}, CPU,
     {"checkpoint.async_enabled"}),
    (checkpoints.writing_settings, {"checkpoint.keep_latest_k": 2}, CPU, {"checkpoint.keep_latest_k"}),
    (checkpoints.writing_settings, {"checkpoint.keep_latest_k": 2, "checkpoint.interval": 1}, CPU, set()),
    (checkpoints.writing_settings, {"checkpoint.async_enabled": False, "checkpoint.wait_timeout": 3.0}, CPU,
     {"checkpoint.wait_timeout"}),
    (checkpoints.writing_settings, {"checkpoint.async_mode": "async_with_pinned_mem"}, CPU, {"checkpoint.async_mode"}),
    (checkpoints.writing_settings, {"checkpoint.async_mode": "async_with_pinned_mem", "checkpoint.backend": "dcp"}, CPU,
     set()),
    (checkpoints.writing_settings, {"checkpoint.dedicated_async_process_group": False}, CPU,
     {"checkpoint.dedicated_async_process_group"}),
    (checkpoints.writing_settings, {"checkpoint.dedicated_async_process_group": False, AXES + "replicate": 2,
                                    "checkpoint.async_process_group_backend": "mpi"}, CPU,
     {"checkpoint.async_process_group_backend"}),
    (checkpoints.writing_settings, {"checkpoint.ft_replica_id": "3"}, CPU, {"checkpoint.ft_replica_id"}),
    (checkpoints.sources_to_exclude_from, {"checkpoint.exclude_from_loading": "optimizer"}, CPU,
     {"checkpoint.exclude_from_loading"}),
    (checkpoints.sources_to_exclude_from, {"checkpoint.exclude_from_loading": "optimizer", "auto_resume": True}, CPU,
     set()),
    (checkpoints.sources_to_exclude_from, {"force_resume": True}, CPU, {"force_resume"}),
    *((effect.settings_without_axis, {"parallel." + name: value}, CPU, {"parallel." + name})
      for name, value in (("tensor_plan", {"head": "colwise"}), ("sequence_parallel", True), ("loss_parallel", False),
                          ("context_method", "ulysses"), ("context_balance", False), ("pipeline_schedule", "GPipe"),
                          ("pipeline_microbatch_size", 2), ("pipeline_n_microbatches", 2),
                          ("module_fqns_per_model_part", [["a"]]))),
    (effect.settings_without_axis, {AXES + "context": 2, "parallel.context_method": "ulysses",
                                    "parallel.context_balance": False}, CPU, {"parallel.context_balance"}),
    (effect.settings_without_axis, {AXES + "tensor": 2, "parallel.sequence_parallel": True}, CPU, set()),
    (effect.settings_without_axis, {AXES + "tensor": 2, "parallel.sync_batch_norm": True}, CPU,
     {"parallel.sync_batch_norm"}),
    (effect.settings_without_axis, {AXES + "context": 2, "parallel.sync_batch_norm": True}, CPU, set()),
    (effect.policy_without_fsdp, {"fsdp.mp_policy": {"param_dtype": "bf16"}}, CPU, {"fsdp.mp_policy"}),
    (effect.policy_without_fsdp, {"fsdp.reshard_after_forward": False}, CPU, {"fsdp.reshard_after_forward"}),
    (effect.policy_without_fsdp, {"fsdp.reshard_after_forward": False, "fsdp.enabled": True}, CPU, set()),
    (effect.options_without_compile, {"compile.mode": "default"}, CPU, {"compile.mode"}),
    (effect.options_without_compile, {"compile.mode": "default", "compile.enable": True}, CPU, set()),
    (effect.options_without_compile, {"compile.enable": True, "compile.optimize_ddp": None}, CPU,
     {"compile.optimize_ddp"}),
    (effect.options_without_compile, {"compile.enable": True, "compile.optimize_ddp": None, AXES + "replicate": 2}, CPU,
     set()),
    (effect.options_without_compile, {"stack": "graph", "compile.memory_policy": "default"}, CPU, set()),
    (effect.options_without_compile, {"stack": "graph", "compile.scope": "model"}, CPU, {"compile.scope"}),
    (effect.options_without_compile, {"compile.memory_policy": "full"}, CPU, {"compile.memory_policy"}),
    (effect.options_without_compile, {"compile.enable": True, "compile.backend": "eager",
                                      "compile.memory_policy": "full", "compile.precompile_artifact_dir": "kept"}, CPU,
     {"compile.memory_policy", "compile.precompile_artifact_dir"}),
    (effect.options_without_compile, {"compile.enable": True, "compile.precompile_artifact_max_gb": 1.0}, CPU,
     {"compile.precompile_artifact_max_gb"}),
    (effect.pacing_without_interval, {"gc.generation": 2}, CPU, {"gc.generation"}),
    (effect.pacing_without_interval, {"gc.generation": 2, "gc.interval": 3}, CPU, set()),
    (effect.limits_without_processes, {"comm.init_timeout_seconds": 3}, CPU, {"comm.init_timeout_seconds"}),
    (effect.limits_without_processes, {"comm.init_timeout_seconds": 3, AXES + "replicate": 2}, CPU, set()),
    (effect.limits_without_processes, {"comm.init_timeout_seconds": 3, AXES + "replicate": -1}, CPU, set()),
    (effect.overruled_precision, {"precision": "fp16", "fsdp.enabled": True, "fsdp.mp_policy": {"param_dtype": "bf16"}},
     CPU, {"precision"}),
    (effect.overruled_precision, {"precision": "bf16", "fsdp.enabled": True, "fsdp.mp_policy": {"param_dtype": "bf16"}},
     CPU, set()),
    (effect.unread_mode_settings, {"activation_checkpointing.every_n": 3}, CPU, {"activation_checkpointing.every_n"}),
    (effect.unread_mode_settings, {"activation_checkpointing.every_n": 3, "activation_checkpointing.mode": "every_n"},
     CPU, set()),
    (effect.sources_by_priority, {"resume": "a", "auto_resume": True, "pretrained": "b"}, CPU,
     {"auto_resume", "pretrained"}),
    (effect.sources_by_priority, {"auto_resume": True, "pretrained": "b"}, CPU, set()),
]  # fmt: skip
"""Rule, settings, surroundings, and the paths that change nothing."""


@pytest.mark.parametrize(("rule", "given", "context", "expected"), INEFFECTIVE)
def test_settings_that_change_nothing_are_said(rule, given, context, expected):
    found = list(rule(config(given), context))
    assert {item.path for item in found} == expected
    assert set(found) <= set(ineffective_settings(config(given), context))
    assert all(str(item).startswith(f"{item.path} has no effect: ") for item in found)


def test_every_rule_of_effects_has_both_cases():
    assert {rule for rule, *_, paths in INEFFECTIVE if paths} == set(EFFECT_RULES)
    assert {rule for rule, *_, paths in INEFFECTIVE if not paths} == set(EFFECT_RULES)


def test_the_defaults_have_nothing_to_be_said_of():
    assert ineffective_settings(resolve({"steps": 1}, context=CPU), CPU) == []


@pytest.mark.parametrize("place", [".", "made/best", "made/ckpt-s00000003"])
def test_a_run_or_a_checkpoint_can_be_loaded(tmp_path, place):
    given = {"resume": str(tmp_path), "pretrained": str(tmp_path), "checkpoint.dir_name": "made"}
    refused = list(paths.existing_sources(config(given), CPU))
    assert [(item.path, item.value) for item in refused] == [("resume", str(tmp_path)), ("pretrained", str(tmp_path))]
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    (tmp_path / place / "checkpoint.json").touch()
    assert list(paths.existing_sources(config(given), CPU)) == []


def test_a_run_without_checkpoints_can_be_resumed_and_not_loaded(tmp_path):
    (tmp_path / "run.json").touch()
    (refused,) = paths.existing_sources(config({"resume": str(tmp_path), "pretrained": str(tmp_path)}), CPU)
    assert refused.path == "pretrained"


def test_a_run_is_known_by_the_file_that_is_written_of_it():
    from danling_conf.records import run_directory

    assert run_directory.RUN_FILE == paths.RUN_FILE


def test_the_generations_of_the_garbage_collector_end():
    violations = inspect({"steps": 3, "gc": {"interval": 1, "generation": 3}}, context=CPU)[1]
    assert [(item.path, item.value, item.fix) for item in violations] == [("gc.generation", 3, "choose 2 or less")]


def test_a_refusal_and_its_sentinel_survive_pickling():
    refusal = ConfigRefused([Violation("a.b", ABSENT, "it is wrong", "mend it"), Violation("c", 3, "no", "yes")])
    for copied in (pickle.loads(pickle.dumps(refusal)), copy.deepcopy(refusal)):
        assert (str(copied), copied.violations) == (str(refusal), refusal.violations)
        assert copied.violations[0].value is ABSENT
        assert str(copied.violations[0]).startswith("a.b\n")
