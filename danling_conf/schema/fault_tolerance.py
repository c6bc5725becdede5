"""Fault tolerance: replica groups that join and leave while training continues, managed by TorchFT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Optional

from danling_conf.schema.setting import setting

DDP, LOCAL_SGD, DILOCO = "ddp", "local_sgd", "diloco"
"""Values of `ft.sync`."""
AUTO = "auto"
"""Value of `ft.address`."""
LIGHTHOUSE_VARIABLE = "TORCHFT_LIGHTHOUSE"
"""Environment variable that names the lighthouse where `ft.lighthouse` does not."""


@dataclass(kw_only=True)
class FtConfig:
    """Fault tolerance managed by TorchFT: replica groups join and leave while training continues."""

    read_by: ClassVar[str] = "danling_conf.parallel.replica_groups"

    enabled: bool = setting(False, read_by="danling_conf.runner.training")
    """Use TorchFT."""
    process_group: str = setting("gloo", choices=("gloo", "nccl"), semantic=False)
    """Process group between replica groups: gloo or nccl."""
    process_group_timeout_ms: int = setting(10000, at_least=1, semantic=False)
    """Time limit of that process group, in milliseconds. A group that stands still costs the others so long, and the
    step."""
    replica_id: int = setting(0, at_least=0, semantic=False, read_by="danling_conf.runner.world")
    """Identifier of this run's replica group, from 0 up to `ft.group_size` - 1. Read where groups are started one by
    one, with `ft.lighthouse`; a command that starts all of them numbers them itself."""
    group_size: int = setting(1, at_least=1)
    """Number of replica groups. The processes of the run are as many times those of the layout."""
    min_replica_size: int = setting(1, at_least=1, semantic=False)
    """Healthy replica groups that each step requires. The first step waits for all of them."""
    lighthouse: Optional[str] = setting(None, semantic=False, read_by="danling_conf.runner.replicas")
    """Address of a running lighthouse, `HOST:PORT`. The command then is one group of several that are started one by
    one, and `ft.replica_id` says which. Unset: the environment variable TORCHFT_LIGHTHOUSE; without it the command
    starts a lighthouse and all groups on this machine, or, with `hydra/launcher=danling_slurm`, its job does."""
    address: Optional[str] = setting(None, semantic=False)
    """Address of this machine at which groups on other machines reach this one: its manager and its weights are served
    there, unencrypted, to whoever can connect. `auto`: what the machine's name leads to, on each machine of the group.
    Unset: 127.0.0.1; in a job of several nodes that starts its groups, the address by which Slurm reaches the node."""
    heartbeat_timeout_ms: int = setting(5000, at_least=100, semantic=False, read_by="danling_conf.launch.groups")
    """Milliseconds without a heartbeat after which the lighthouse takes a group for dead: about what its death costs
    the others."""
    join_timeout_seconds: int = setting(60, at_least=1, semantic=False, read_by="danling_conf.launch.groups")
    """Seconds that the others wait for a group that is alive and does not come to the next step. Longer than a save
    or an evaluation may take on one group more than on another."""
    timeout_seconds: int = setting(60, at_least=1, semantic=False)
    """Time limit in seconds of one transfer of weights to a group that joins, and of the vote on a step."""
    quorum_timeout_seconds: int = setting(300, at_least=1, semantic=False)
    """Seconds that a group waits while there are fewer than `ft.min_replica_size` of them, or no lighthouse answers. It
    then saves and leaves."""
    quorum_retries: int = setting(4, at_least=0, semantic=False)
    """How often a group asks for its quorum again within that time, where the answer fails to come."""
    max_restarts: int = setting(10, at_least=0, semantic=False, read_by="danling_conf.launch.groups")
    """How often the command starts each group again after it has died."""
    sync: str = setting(DDP, choices=(DDP, LOCAL_SGD, DILOCO), read_by="danling_conf.runner.replicas")
    """What groups agree on: `ddp` on the gradients of each step, `local_sgd` on the weights every `ft.sync_every`
    steps, `diloco` on an outer optimizer's step over what the weights have changed in so many."""
    sync_every: int = setting(10, at_least=1, read_by="danling_conf.runner.replicas")
    """Optimizer steps between two agreements of `local_sgd` and `diloco`."""
    outer_lr: float = setting(0.7, above=0, read_by="danling_conf.parallel.outer")
    """Learning rate of the outer optimizer of `diloco`, which is SGD with Nesterov momentum."""
    outer_momentum: float = setting(0.9, at_least=0, at_most=1, read_by="danling_conf.parallel.outer")
    """Momentum of the outer optimizer of `diloco`."""
