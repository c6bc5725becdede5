"""Runs of one replica group, with a lighthouse in this process: what settings of `ft` do to it."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch

import danling_conf
from danling_conf.launch import groups
from danling_conf.parallel import replica_groups
from danling_conf.parallel.replica_groups import ReplicaGroup
from danling_conf.schema.fault_tolerance import FtConfig
from tests.support import small


@pytest.fixture(scope="module")
def lighthouse():
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100)
    yield f"127.0.0.1:{server.address().rpartition(':')[2]}"
    server.shutdown()


def fit(root: Any, settings: dict[str, Any], refused: tuple[int, ...] = ()) -> tuple[danling_conf.Runner, list[int]]:
    """A run; and the steps after which the group voted. The votes of these numbers, from 0, are refusals."""
    votes: list[int] = []
    commit = ReplicaGroup.commit
    runner = danling_conf.Runner(small.config(root, {"seed": 5, **settings}))

    def vote(self: ReplicaGroup) -> bool:
        if len(votes) in refused:
            self.manager.report_error(RuntimeError("an error of communication"))
        votes.append(runner.global_step)
        return commit(self)

    with mock.patch.object(ReplicaGroup, "commit", vote):
        runner.fit(small.Net, {"train": small.Pairs(), "val": small.Pairs(7, seed=1)}, loss=small.loss)
    return runner, votes


def of_group(lighthouse: str, **settings: Any) -> dict[str, Any]:
    return {"ft": {"enabled": True, "lighthouse": lighthouse, **settings}}


def test_a_group_alone_trains_as_a_run_without_groups(tmp_path, lighthouse):
    alone, _ = fit(tmp_path / "alone", {})
    group, votes = fit(tmp_path / "group", of_group(lighthouse))
    assert votes == [0, 1, 2, 3, 4, 5]
    assert group.results == alone.results
    for mine, theirs in zip(group.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_refused_step_is_repeated_and_counted_nowhere(tmp_path, lighthouse):
    settings = {"accum_steps": 2, "scheduler": {"type": "cosine"}, "steps": 5, "max_grad_norm": 0.1}
    settings["nonfinite"] = "skip"
    alone, _ = fit(tmp_path / "alone", settings)
    group, votes = fit(tmp_path / "group", {**settings, **of_group(lighthouse)}, refused=(0, 2, 3))
    assert votes == [0, 0, 1, 1, 1, 2, 3, 4]
    assert group.results == alone.results
    assert group.global_step == 5
    assert group.optimizer.param_groups[0]["lr"] == alone.optimizer.param_groups[0]["lr"]
    for mine, theirs in zip(group.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("sync", ["local_sgd", "diloco"])
def test_groups_agree_every_so_many_steps(tmp_path, lighthouse, sync):
    _, votes = fit(tmp_path, of_group(lighthouse, sync=sync, sync_every=3))
    assert votes == [3, 6]


def test_the_lighthouse_of_a_command_has_its_limits():
    section = FtConfig(min_replica_size=2, join_timeout_seconds=7, heartbeat_timeout_ms=1234)
    with mock.patch("torchft.coordination.LighthouseServer") as server:
        groups._lighthouse(section, 29510)
    assert server.call_args.kwargs == {
        "bind": "127.0.0.1:29510", "min_replicas": 2, "join_timeout_ms": 7000, "heartbeat_timeout_ms": 1234,
    }  # fmt: skip


def test_the_manager_of_a_rank_has_its_limits():
    section = FtConfig(min_replica_size=2, timeout_seconds=11, quorum_timeout_seconds=99, quorum_retries=3,
                       address="127.0.0.1", process_group="gloo", process_group_timeout_ms=4321)  # fmt: skip
    place = {"index": 4, "rank": 0, "world_size": 1, "store": ("127.0.0.1", 1), "lighthouse": "http://127.0.0.1:2"}
    with mock.patch.object(replica_groups, "_manager_class") as made:
        ReplicaGroup(section, **place, step=8, state=dict, load=lambda state: None)
    given = made.return_value.call_args.kwargs
    seconds = {name: given[name].total_seconds() for name in ("timeout", "quorum_timeout")}
    assert seconds == {"timeout": 11, "quorum_timeout": 99}
    assert (given["min_replica_size"], given["quorum_retries"], given["hostname"]) == (2, 3, "127.0.0.1")
    assert given["replica_id"] == "group-4"
    assert given["pg"]._timeout.total_seconds() == 4.321
    assert given["checkpoint_transport"].metadata().startswith("127.0.0.1:")


def test_the_process_group_is_the_one_that_was_chosen():
    with mock.patch("torchft.process_group.ProcessGroupNCCL") as made:
        replica_groups._process_group(FtConfig(process_group="nccl", process_group_timeout_ms=5000))
    assert made.call_args.kwargs["timeout"].total_seconds() == 5
