from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from danling_conf._torch_private import distributed
from danling_conf.parallel import mesh, process_group
from danling_conf.parallel.device import device_type
from danling_conf.schema import Layout
from danling_conf.schema.process import CommConfig
from danling_conf.topology.layout import data_rank
from tests.support.spawn import run


def describe(layout: Layout) -> dict[str, Any]:
    made = mesh.make(layout, "cpu")
    data = mesh.data_mesh(made)
    return {
        "axes": dict(zip(made.mesh_dim_names, made.shape, strict=True)) if made is not None else None,
        "data ranks": None if data is None else data.mesh.tolist(),
        "data rank": mesh.data_rank_and_degree(made),
        "data rank of the layout": (data_rank(layout, dist.get_rank()), layout.data_degree),
        "tensor ranks": made["tensor"].mesh.tolist() if "tensor" in mesh.axes_of(made) else None,
    }


def limit_of(group: dist.ProcessGroup) -> int:
    return group._get_backend(group._device_types[0]).options._timeout.seconds


def describe_all() -> dict[str, Any]:
    found: dict[str, Any] = {
        "hsdp2x2": describe(Layout(replicate=2, shard=2, fsdp=True)),
        "ddp4": describe(Layout(replicate=4)),
        "hsdp4x1": describe(Layout(replicate=4, fsdp=True)),
        "fsdp2_tp2": describe(Layout(shard=2, tensor=2, fsdp=True)),
        "tp4": describe(Layout(tensor=4)),
    }
    try:
        mesh.make(Layout(shard=8, fsdp=True), "cpu")
    except ValueError as error:
        found["wrong"] = str(error)
    filled = mesh.from_keywords(axes={"shard": -1, "replicate": 2}, mesh_device_type="cpu")()
    found["filled"] = dict(zip(filled.mesh_dim_names, filled.shape, strict=True))
    before = distributed.process_groups()
    for _ in range(2):
        process_group.tighten(CommConfig(init_timeout_seconds=60, train_timeout_seconds=7))
    groups = distributed.process_groups()
    found["timeouts"] = {limit_of(group) for group in before}
    found["for slow work"] = [limit_of(group) for group in groups if group not in before]
    found["groups"] = len(groups)
    return found


@pytest.mark.slow
def test_meshes_of_four_ranks() -> None:
    ranks = run(describe_all, 4)
    first, last = ranks[0], ranks[3]
    assert first["hsdp2x2"]["axes"] == {"replicate": 2, "shard": 2}
    assert last["hsdp2x2"]["data ranks"] == [0, 1, 2, 3]
    assert [rank["hsdp2x2"]["data rank"] for rank in ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert first["ddp4"]["axes"] == {"replicate": 4}
    assert first["hsdp4x1"]["axes"] == {"replicate": 4, "shard": 1}
    assert first["fsdp2_tp2"]["axes"] == {"shard": 2, "tensor": 2}
    assert (first["fsdp2_tp2"]["data ranks"], first["fsdp2_tp2"]["tensor ranks"]) == ([0, 2], [0, 1])
    assert last["fsdp2_tp2"]["data rank"] == (1, 2)
    assert last["tp4"]["data rank"] == (0, 1)
    assert "shard=8 needs 8 processes, and 4 were started" in first["wrong"]
    assert first["filled"] == {"replicate": 2, "shard": 2}
    assert first["groups"] > 5
    assert first["timeouts"] == {7}
    assert first["for slow work"] == [60]
    for rank in ranks:
        for name in ("hsdp2x2", "ddp4", "hsdp4x1", "fsdp2_tp2", "tp4"):
            assert rank[name]["data rank"] == rank[name]["data rank of the layout"]


def wait_for_slow_work() -> list[bool]:
    """Whether a collective, and then waiting, outlast work of rank 0 that takes longer than the tightened limit."""
    process_group.tighten(CommConfig(init_timeout_seconds=60, train_timeout_seconds=1))
    outcome = []
    for wait in (lambda: dist.barrier(process_group.slow_work()), dist.barrier):
        if dist.get_rank() == 0:
            time.sleep(2.5)
        try:
            wait()
            outcome.append(True)
        except RuntimeError:
            outcome.append(False)
    return outcome


@pytest.mark.slow
def test_slow_work_of_one_rank_is_waited_for_under_a_tight_limit() -> None:
    assert run(wait_for_slow_work, 2)[1] == [True, False]


def test_a_single_process_without_a_process_group_has_no_mesh() -> None:
    assert mesh.make(Layout(), "cpu") is None
    assert mesh.make(Layout(fsdp=True), "cpu") is None
    assert mesh.data_mesh(None) is None
    assert mesh.data_rank_and_degree(None) == (0, 1)


def test_a_layout_of_two_does_not_start_alone() -> None:
    with pytest.raises(ValueError, match=r"parallel\.axes\n\s+replicate=2 needs 2 processes, and 1 were started"):
        mesh.make(Layout(replicate=2), "cpu")


def test_without_a_launcher_the_process_is_a_world_of_one_and_fsdp_keeps_its_axis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    process_group.start(CommConfig(init_timeout_seconds=60), device_type("cpu"))
    try:
        made = mesh.make(Layout(fsdp=True), "cpu")
        assert made is not None
        assert (made.mesh_dim_names, made.shape) == (("shard",), (1,))
        assert mesh.make(Layout(), "cpu") is None
    finally:
        process_group.stop()
    assert not dist.is_initialized()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.mesh_device_type=hpu\n\s+this machine has no usable hpu device"):
        device_type("hpu")
