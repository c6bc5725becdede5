"""Shards that somebody crafted: nothing in them is executed, and nothing outside of their folder is read."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from danling_conf import ConfigRefused
from tests.checkpoint.test_files import Bomb, sign
from tests.support.resumed_runs import train

pytestmark = pytest.mark.slow

SAVED: dict[str, Any] = {"steps": 2, "checkpoint": {"interval": 2, "backend": "dcp"}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return train(tmp_path, SAVED)["run"] / "checkpoints" / "ckpt-s00000002"


def rewrite(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    """Change the metadata, and make the checksums fit."""
    path = checkpoint / ".metadata"
    path.write_bytes(pickle.dumps(change(FileSystemReader(checkpoint).read_metadata())))
    sign(checkpoint)


def refused(tmp_path: Path, checkpoint: Path, message: str) -> None:
    for key in ("resume", "pretrained"):
        with pytest.raises(ConfigRefused, match=message):
            train(tmp_path, {**SAVED, "steps": 4, key: str(checkpoint)})


def test_shards_are_what_dcp_itself_reads(tmp_path: Path, checkpoint: Path) -> None:
    state = {"model.first.weight": torch.zeros(8, 5)}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    assert state["model.first.weight"].abs().sum() > 0
    assert train(tmp_path, {**SAVED, "steps": 4, "resume": str(checkpoint)})["began"] == 2


def test_code_in_the_metadata_does_not_run(tmp_path: Path, checkpoint: Path) -> None:
    trap = tmp_path / "trap"

    def plant(metadata: Any) -> Any:
        metadata.planner_data = Bomb(trap)
        return metadata

    rewrite(checkpoint, plant)
    refused(tmp_path, checkpoint, r"\.metadata: it cannot be read: it names posix.mkdir, which is not loaded")
    assert not trap.exists()
    FileSystemReader(checkpoint).read_metadata()  # as somebody careless would: the trap is real
    assert trap.is_dir()


def test_code_in_a_shard_does_not_run(tmp_path: Path, checkpoint: Path) -> None:
    trap = tmp_path / "trap"
    buffer = io.BytesIO()
    torch.save(Bomb(trap), buffer)
    (shard,) = checkpoint.glob("*.distcp")
    offset = shard.stat().st_size
    with open(shard, "ab") as file:
        file.write(buffer.getvalue())

    def point(metadata: Any) -> Any:
        for index, info in metadata.storage_data.items():
            if index.fqn == "model.first.weight":
                metadata.storage_data[index] = replace(info, offset=offset, length=len(buffer.getvalue()))
        return metadata

    rewrite(checkpoint, point)
    refused(tmp_path, checkpoint, "__0_0.distcp: model.first.weight cannot be read: it holds other objects")
    assert not trap.exists()


def test_an_entry_of_bytes_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    """DCP would load it by `torch.load` without restriction."""

    def swap(metadata: Any) -> Any:
        metadata.state_dict_metadata["model.first.weight"] = BytesStorageMetadata()
        return metadata

    rewrite(checkpoint, swap)
    refused(tmp_path, checkpoint, "model.first.weight is no tensor")


@pytest.mark.parametrize("path", ["../../secret.distcp", "/etc/passwd", ".hidden"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path: Path, checkpoint: Path, path: str) -> None:
    def lead(metadata: Any) -> Any:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, relative_path=path)
        return metadata

    rewrite(checkpoint, lead)
    refused(tmp_path, checkpoint, "it names a file outside of its folder")


def test_transforms_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    def ask(metadata: Any) -> Any:
        for index, info in metadata.storage_data.items():
            metadata.storage_data[index] = replace(info, transform_descriptors=["stream.zstd"])
        return metadata

    rewrite(checkpoint, ask)
    refused(tmp_path, checkpoint, "it asks for transforms")


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1, 2]), pickle.dumps({"a": 1})])
def test_metadata_that_is_none(tmp_path: Path, checkpoint: Path, content: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(content)
    sign(checkpoint)
    refused(tmp_path, checkpoint, r"\.metadata: it cannot be read")


def test_facts_that_lead_out_of_the_folder_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    import dataclasses

    from danling_conf.checkpoint import durable, manifest

    facts = manifest.read(checkpoint)
    outside = checkpoint.parent / "outside"
    outside.write_text("x")
    manifest.write(checkpoint, dataclasses.replace(facts, files={"../outside": durable.sum_of(outside)}))
    refused(tmp_path, checkpoint, "it names a file outside of its folder")


def broken(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "flipped":
        path.write_bytes(
            content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :]
        )
    else:
        path.write_bytes(content[: len(content) // 2 if how == "truncated" else 0])


@pytest.mark.parametrize("how", ["truncated", "emptied", "removed", "flipped"])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "shared.pt", "rank-0.pt", "checkpoint.json"])
def test_broken_shards(tmp_path: Path, checkpoint: Path, file: str, how: str) -> None:
    broken(checkpoint / file, how)
    with pytest.raises(ConfigRefused, match=rf"ckpt-s00000002/{file}: "):
        train(tmp_path, {**SAVED, "steps": 4, "resume": str(checkpoint.parents[1])})
