"""Runs of one replica group, with a lighthouse in this process: what settings of `ft` do to it."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

import danling_conf
from danling_conf.components import dataloader
from danling_conf.components.samplers import seed_of
from danling_conf.launch import groups
from danling_conf.parallel import process_group, replica_groups
from danling_conf.parallel.replica_groups import NoQuorum, ReplicaGroup
from danling_conf.records.reading import read_fields
from danling_conf.runner.leading import Lead
from danling_conf.runner.replicas import TooFewGroups
from danling_conf.schema.dataloader import DataloaderConfig
from danling_conf.schema.fault_tolerance import FtConfig
from tests.support import small, spawn


@pytest.fixture(scope="module")
def lighthouse():
    os.environ.setdefault("RUST_LOG", "error")
    from torchft.coordination import LighthouseServer

    # Each run waits until the one before counts as dead.
    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, heartbeat_timeout_ms=500)
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


def test_a_step_that_was_refused_before_the_group_left_is_done_after_a_resume(tmp_path, lighthouse):
    """What its batches are is saved as it was before they were taken."""
    settings = {"accum_steps": 2, "steps": 6, "checkpoint": {"load_only": False, "async_enabled": False}}
    alone, _ = fit(tmp_path / "alone", settings)
    settings |= of_group(lighthouse)
    begin = ReplicaGroup.begin

    def too_few(self: ReplicaGroup) -> bool:
        if self.manager.errored() is not None:
            raise NoQuorum("too few groups")
        return begin(self)

    with mock.patch.object(ReplicaGroup, "begin", too_few), pytest.raises(TooFewGroups):
        fit(tmp_path / "group", settings, refused=(4,))
    (run,) = (tmp_path / "group").glob("*/*/*/attempts/..")
    group, votes = fit(tmp_path / "group", {**settings, "resume": str(run.resolve())})
    assert votes == [4, 5]
    assert group.results == alone.results
    assert small.equal(small.weights(group), small.weights(alone))


def test_a_group_that_takes_the_lead_saves_what_the_one_before_may_not_have_written(tmp_path, lighthouse):
    settings = {"steps": 6, "checkpoint": {"load_only": False, "interval": 2}, **of_group(lighthouse)}
    begin, gone = ReplicaGroup.begin, []

    def too_few(self: ReplicaGroup) -> bool:
        if self.step == 2:  # whose checkpoint the other group was to write
            gone.append(self)
            raise NoQuorum("too few groups")
        return begin(self)

    def agree(self: Lead) -> bool:
        self.held = bool(gone)
        return self.held

    patched = mock.patch.object(ReplicaGroup, "begin", too_few), mock.patch.object(Lead, "agree", agree)
    with patched[0], patched[1], pytest.raises(TooFewGroups, match="saved at step 2"):
        fit(tmp_path, settings)
    (latest,) = tmp_path.glob("*/*/*/checkpoints/latest")
    assert read_fields(latest / "checkpoint.json").integer("step") == 2


class Stream(torch.utils.data.IterableDataset[Any]):
    """Samples from the start, each its own shard."""

    def shard(self, num_shards: int, index: int) -> Stream:
        return self

    def __iter__(self) -> Iterator[Any]:
        pairs = small.Pairs()
        return (pairs[index] for index in range(len(pairs)))


@pytest.mark.parametrize("data", [small.Pairs(), Stream()])
def test_a_group_that_catches_up_draws_other_random_numbers(tmp_path, lighthouse, data):
    """Its own, of the step that it has come to: not those again that it has drawn since its start."""
    begin, seeds = ReplicaGroup.begin, {}

    def behind(self: ReplicaGroup) -> bool:
        return begin(self) or self.step == 3

    class Seeds(danling_conf.Callback):
        def on_step_end(self, runner: Any) -> None:
            seeds[runner.global_step] = torch.initial_seed()

    runner = danling_conf.Runner(small.config(tmp_path, {"seed": 5, **of_group(lighthouse)}))
    with mock.patch.object(ReplicaGroup, "begin", behind):
        runner.fit(small.Net, {"train": data}, loss=small.loss, callbacks=[Seeds()])
    before, after = seed_of(5, 0, 0), seed_of(seed_of(5, 0, 3), 0, 0)
    assert [seeds[step] for step in (3, 4, 5, 6)] == [before, after, after, after]


@pytest.mark.parametrize("sync", ["local_sgd", "diloco"])
def test_groups_agree_every_so_many_steps(tmp_path, lighthouse, sync):
    _, votes = fit(tmp_path, of_group(lighthouse, sync=sync, sync_every=3))
    assert votes == [3, 6]


SYNC = {"sync_every": 2, "outer_lr": 0.5, "outer_momentum": 0.8}


def train_in_groups(root: str, lighthouse: str, sync: str) -> list[dict[str, torch.Tensor]]:
    """This rank as a group of its own: four steps, and four more after a resume. Its weights after each."""
    group = int(os.environ.pop("RANK"))
    process_group.stop()
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        del os.environ[name]
    section = {"sync": sync, "group_size": 2, "min_replica_size": 2, "replica_id": group, **SYNC}
    base = {**of_group(lighthouse, **section), "checkpoint": {"load_only": False, "async_enabled": False}}
    found, more = [], {}
    for steps in (4, 8):
        runner = danling_conf.Runner(small.config(f"{root}/{group}", {**base, "steps": steps, **more}))
        runner.fit(small.Net, {"train": small.Pairs()}, loss=small.loss)
        found.append(small.weights(runner))
        more = {"resume": str(runner.world.attempt.run_directory), "force_resume": True}
    return found


def by_hand(sync: str, steps: int) -> dict[str, torch.Tensor]:
    """The same in one process, with torch's own optimizers."""
    torch.manual_seed(3)
    agreed = small.Net()
    outer = torch.optim.SGD(agreed.parameters(), lr=SYNC["outer_lr"], momentum=SYNC["outer_momentum"], nesterov=True)
    pairs, batches = small.Pairs(), []
    for group in range(2):
        loader = dataloader.make(pairs, DataloaderConfig(batch_size=4), "train", data_rank=group, data_degree=2, seed=3)
        batches.append([batch for epoch in range(4) for batch in (dataloader.set_epoch(loader, epoch), *loader)[1:]])
    for first in range(0, steps, SYNC["sync_every"]):
        trained = [copy.deepcopy(agreed) for _ in batches]
        for model, own in zip(trained, batches, strict=True):
            inner = torch.optim.SGD(model.parameters(), lr=0.1)
            for batch in own[first : first + SYNC["sync_every"]]:
                inner.zero_grad()
                small.loss(model(batch[0]), batch).backward()
                inner.step()
        for kept, *others in zip(agreed.parameters(), *(model.parameters() for model in trained), strict=True):
            mean = torch.stack([item.detach() for item in others]).mean(0)
            kept.grad = kept.detach() - mean
            if sync == "local_sgd":
                kept.data.copy_(mean)
        if sync == "diloco":
            outer.step()
    return {name: item.detach() for name, item in agreed.state_dict().items()}


@pytest.mark.slow
def test_two_groups_that_agree_now_and_then_do_what_is_computed_by_hand(tmp_path):
    """Also after a resume, to which the momentum of the outer optimizer belongs."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=2, join_timeout_ms=60000)
    try:
        for sync in ("local_sgd", "diloco"):
            address = f"127.0.0.1:{server.address().rpartition(':')[2]}"
            groups = spawn.shared(train_in_groups, 2, str(tmp_path / sync), address, sync)
            for number, steps in enumerate((4, 8)):
                first, second = (found[number] for found in groups)
                assert small.equal(first, second)
                for name, wanted in by_hand(sync, steps).items():
                    torch.testing.assert_close(first[name], wanted, rtol=1e-5, atol=1e-6)
    finally:
        server.shutdown()


def test_the_lighthouse_of_a_command_has_its_limits():
    section = FtConfig(min_replica_size=2, join_timeout_seconds=7, heartbeat_timeout_ms=1234)
    with mock.patch("torchft.coordination.LighthouseServer") as server:
        groups._lighthouse(section, "127.0.0.1:29510")
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
