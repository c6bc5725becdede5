"""Rules of fault tolerance: numbers of groups, the order of time limits, and what replica groups do not go with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from danling_conf.schema import RunnerConfig, declared_class, defaults_of
from danling_conf.schema.fault_tolerance import DDP, DILOCO
from danling_conf.topology.machine import Machine
from danling_conf.topology.rules.rule import Context, Ineffective
from danling_conf.topology.violation import ABSENT, Violation


def installed(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Fault tolerance needs the package that provides it."""
    if config.ft.enabled and not context.machine.torchft:
        fix = "pip install danling-conf[ft], or ft=none"
        yield Violation("ft.enabled", True, "the package torchft is not installed", fix)


def numbers_of_groups(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """There are no more groups that a step needs, or that are named, than there are groups; and more than one."""
    section = config.ft
    if not section.enabled:
        return
    size = section.group_size
    if size == 1 and starts_groups(config, context.machine):
        rule = "one replica group has no other that would go on without it"
        yield Violation("ft.group_size", size, rule, "ft.group_size=2 or more, or ft=none")
    if section.min_replica_size > size:
        rule = f"a step would need more groups than the {size} of ft.group_size"
        yield Violation("ft.min_replica_size", section.min_replica_size, rule, f"choose {size} or less")
    if section.replica_id >= size:
        rule = f"groups are numbered from 0 to {size - 1}, by ft.group_size={size}"
        yield Violation("ft.replica_id", section.replica_id, rule, "choose one of these, or raise ft.group_size")


def order_of_limits(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """A limit that waits for another one is the longer of the two. Otherwise a group would leave before the lighthouse
    had said who is dead."""
    section = config.ft
    if not section.enabled:
        return
    limits = [
        ("heartbeat_timeout_ms", section.heartbeat_timeout_ms / 1000),
        ("process_group_timeout_ms", section.process_group_timeout_ms / 1000),
        ("timeout_seconds", float(section.timeout_seconds)),
        ("quorum_timeout_seconds", float(section.quorum_timeout_seconds)),
    ]
    joining = ("join_timeout_seconds", float(section.join_timeout_seconds))
    if lighthouse_of(config, context.machine) is None:
        pairs = [*pairwise(limits), (joining, limits[-1])]
    else:  # a lighthouse that runs already has limits of its own
        pairs = [*pairwise(limits[1:])]
    for (shorter, least), (longer, seconds) in pairs:
        if seconds < least:
            given, value = f"ft.{longer}", getattr(section, longer)
            rule = f"it may not be shorter than ft.{shorter}={getattr(section, shorter)}, which ends first"
            unit = 1000 if longer.endswith("_ms") else 1
            yield Violation(given, value, rule, f"{given}={int(-(-least * unit // 1))}, or shorten ft.{shorter}")


def groups_meet(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """Groups that are started one by one, as a launcher of ranks does, have to be told where they meet."""
    section = config.ft
    if not section.enabled:
        return
    address = lighthouse_of(config, context.machine)
    if address is not None and re.fullmatch(r"(?:https?://)?[^\s/:]+:[0-9]{1,5}/?", address) is None:
        yield Violation("ft.lighthouse", address, "it is the address of a lighthouse", "write HOST:PORT")
    if address is not None and config.seed is None:
        rule = "groups that are started one by one draw a seed each, and have to shuffle and initialise alike"
        yield Violation("seed", None, rule, "give all of them one, such as seed=0")
    launcher = context.machine.launcher
    if address is None and launcher is not None:
        rule = f"{launcher} starts the ranks of one group, which does not know where it meets the others"
        fix = "start a lighthouse, and each group with ft.lighthouse=HOST:PORT and its ft.replica_id"
        yield Violation("ft.lighthouse", ABSENT, rule, fix)


def groups_fit(config: RunnerConfig, context: Context) -> Iterator[Violation]:
    """What has not been made to work with replica groups."""
    section = config.ft
    if not section.enabled:
        return
    if section.process_group == "nccl" and context.on_cpu(config):
        rule = "it communicates between accelerators, and the run is on the CPU"
        yield Violation("ft.process_group", "nccl", rule, "ft.process_group=gloo")
    if config.stack in ("graph", "deepspeed"):
        rule = f"stack={config.stack} has no place between gradients and their use at which groups could agree"
        yield Violation("ft.enabled", True, rule, "ft=none, or stack=auto")


def unread_settings(config: RunnerConfig, context: Context) -> Iterator[Ineffective]:
    """Settings that nothing reads beside the others."""
    section = config.ft
    if not section.enabled:
        return
    reasons: dict[str, str] = {}
    if lighthouse_of(config, context.machine) is None:
        reasons["replica_id"] = "this command starts all groups (ft.lighthouse=null)"
        if context.machine.cluster_world_size is None:
            reasons["address"] = "this command starts all groups, on this machine (ft.lighthouse=null)"
    else:
        reason = "the lighthouse runs already, and groups are started one by one (ft.lighthouse)"
        reasons |= dict.fromkeys(("heartbeat_timeout_ms", "join_timeout_seconds", "max_restarts"), reason)
    if section.sync == DDP:
        reasons["sync_every"] = "groups agree at every step (ft.sync=ddp)"
    if section.sync != DILOCO:
        reasons |= dict.fromkeys(
            ("outer_lr", "outer_momentum"), f"there is no outer optimizer (ft.sync={section.sync})"
        )
    default = defaults_of(declared_class(section))
    for name, reason in reasons.items():
        if getattr(section, name) != getattr(default, name):
            yield Ineffective(f"ft.{name}", reason)


def starts_groups(config: RunnerConfig, machine: Machine) -> bool:
    """Whether the command, or its job, starts the lighthouse and all replica groups."""
    return config.ft.enabled and lighthouse_of(config, machine) is None


def lighthouse_of(config: RunnerConfig, machine: Machine) -> str | None:
    """The address of the lighthouse that groups meet at; None where the command starts one."""
    return config.ft.lighthouse or machine.lighthouse
