"""Launchers of a sweep's jobs (`hydra.launcher`): this machine and Slurm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional

from danling_conf.schema.setting import setting

# Hydra 1.3 accepts launcher classes of the namespace hydra_plugins only: it looks the class up by its module's name.
_PLUGIN = "hydra_plugins.danling_conf_plugin"


@dataclass(kw_only=True)
class LauncherConfig:
    """Settings of both launchers."""

    read_by: ClassVar[str] = "danling_conf.sweep.submit"

    on_failure: str = "continue"
    """What a failed job means for the others: `continue` with them, `stop` the sweep, or `retry N`: start the job again
    up to N times, from its newest checkpoint. The sweep fails where a job has failed in the end."""
    skip_refused: bool = False
    """Run the jobs that are accepted where others are refused. Otherwise nothing starts while one is refused."""


@dataclass(kw_only=True)
class LocalLauncherConfig(LauncherConfig):
    """The jobs of a sweep on this machine, several at once."""

    read_by: ClassVar[str] = "danling_conf.sweep.local_backend"

    _target_: str = f"{_PLUGIN}.local_launcher.LocalLauncher"
    parallel_jobs: Optional[int] = setting(None, at_least=1)
    """Jobs that run at once. Unset: as many as the devices of this machine can take, one device a rank; on the CPU, as
    the cores can, one a rank."""


@dataclass(kw_only=True)
class SlurmLauncherConfig(LauncherConfig):
    """Jobs on Slurm, each with the nodes, tasks, GPUs and CPUs of its own layout.

    Names are those of hydra-submitit-launcher, and so of sbatch; what it does not name goes to
    `additional_parameters`.
    """

    read_by: ClassVar[str] = "danling_conf.launch.slurm"

    _target_: str = f"{_PLUGIN}.slurm_launcher.SlurmLauncher"
    detach: bool = False
    """Submit and return at once: `danling-conf runs DIRECTORY` shows how the jobs stand."""
    partition: Optional[str] = None
    """Partition. Unset: the cluster's default one."""
    gpus_per_node: Optional[int] = setting(None, at_least=0)
    """GPUs that a node has; a job takes as many of them as it has ranks there. 0: the jobs run on CPUs. Unset: what
    `sinfo` reports for the partition."""
    nodes: Optional[int] = setting(None, at_least=1)
    """Nodes of each job. Unset: as few as its layout fits on."""
    tasks_per_node: Optional[int] = setting(None, at_least=1)
    """Ranks on each node, or replica groups (`ft=torchft`), with all ranks of each. Unset: spread evenly over the nodes
    of the job."""
    cpus_per_task: Optional[int] = setting(None, at_least=1)
    """CPU cores of each rank. Unset: the share of a node's cores that goes with one GPU; 1 where there are none."""
    mem_gb: Optional[float] = setting(None, above=0)
    """Memory of a node, in GB. Unset: the partition's default."""
    timeout_min: int = setting(60, at_least=1)
    """Time limit of a job, in minutes. A run that reaches it is saved and queued again, `max_num_timeout` times."""
    signal_delay_s: Optional[int] = setting(None, at_least=1)
    """Seconds before the time limit at which a run is asked to save. Unset: 120, or a fifth of a limit under ten
    minutes."""
    max_num_timeout: int = setting(3, at_least=0)
    """How many time limits a run may reach before its job is given up. Preemptions do not count."""
    name: str = "${hydra.job.name}"
    """Name of the jobs in the queue."""
    array_parallelism: int = setting(256, at_least=1)
    """Jobs of one array that run at once."""
    qos: Optional[str] = None
    """Quality of service."""
    account: Optional[str] = None
    """Account that is charged."""
    constraint: Optional[str] = None
    """Features that nodes must have."""
    exclude: Optional[str] = None
    """Nodes not to use."""
    nodelist: Optional[str] = None
    """Nodes to use."""
    gres: Optional[str] = None
    """Generic resources of a node, in place of `--gpus-per-node`: `gpu:a100:8`."""
    gpus_per_task: Optional[int] = setting(None, at_least=1)
    """GPUs bound to each rank, in place of `--gpus-per-node`. Every rank then sees only its own."""
    cpus_per_gpu: Optional[int] = setting(None, at_least=1)
    """CPU cores with each GPU, in place of `cpus_per_task`."""
    mem_per_gpu: Optional[str] = None
    """Memory with each GPU: `80G`."""
    mem_per_cpu: Optional[str] = None
    """Memory with each CPU core: `4G`."""
    comment: Optional[str] = None
    """Comment in the queue."""
    dependency: Optional[str] = None
    """Jobs to wait for: `afterok:1234`."""
    exclusive: Optional[bool] = None
    """Whether the nodes are not shared with other jobs."""
    setup: Optional[List[str]] = None
    """Shell commands that run on the first node before the ranks start (`module load cuda`)."""
    srun_args: Optional[List[str]] = None
    """Further arguments of `srun`."""
    additional_parameters: Dict[str, Any] = setting(factory=dict)
    """Any other option of `sbatch`, by its long name: `{mail-type: END}`. They come last and win."""


@dataclass(kw_only=True)
class SubmititSlurmConfig(SlurmLauncherConfig):
    """The settings of hydra-submitit-launcher on Slurm, for our launcher under our `main`."""

    _target_: str = f"{_PLUGIN}.slurm_launcher.SubmititSlurmLauncher"
    submitit_folder: Optional[str] = None
    """Refused: submitit's files are in the sweep's directory."""
    stderr_to_stdout: bool = False
    """Refused: the two streams stay apart."""


@dataclass(kw_only=True)
class SubmititLocalConfig(LocalLauncherConfig):
    """The settings of hydra-submitit-launcher on this machine, for our launcher under our `main`."""

    _target_: str = f"{_PLUGIN}.local_launcher.SubmititLocalLauncher"
    name: str = "${hydra.job.name}"
    """No effect on this machine."""
    nodes: int = setting(1, at_least=1, at_most=1)
    """Only 1: this machine is one node."""
    tasks_per_node: Optional[int] = setting(None, at_least=1)
    """Ranks of each job, which must be those of its layout. Unset: the layout's."""
    gpus_per_node: Optional[int] = setting(None, at_least=0)
    """Devices of each job, which must be one a rank, or 0 on the CPU. Unset: one a rank."""
    cpus_per_task: Optional[int] = None
    """No effect on this machine, as with submitit."""
    mem_gb: Optional[float] = None
    """No effect on this machine, as with submitit."""
    timeout_min: Optional[int] = None
    """Refused: jobs on this machine have no time limit."""
    submitit_folder: Optional[str] = None
    """Refused: submitit's files are in the sweep's directory."""
    stderr_to_stdout: bool = False
    """Refused: the two streams stay apart."""


REFUSED_OF_SUBMITIT = {
    "submitit_folder": ("a sweep keeps submitit's files in its own directory", "leave it out, or set hydra.sweep.dir"),
    "stderr_to_stdout": (
        "the streams stay apart: what srun prints to stderr names the rank that died first",
        "leave it out",
    ),
    "timeout_min": ("jobs on this machine have no time limit", "leave it out, or hydra/launcher=submitit_slurm"),
}
"""Settings of hydra-submitit-launcher that have no meaning here, with the reason and what to do."""
