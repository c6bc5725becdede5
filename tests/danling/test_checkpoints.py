"""Weights of checkpoints that DanLing 0.4.0 wrote: files and shards, in a run and for inference."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import TensorDataset

import danling_conf
from danling_conf.checkpoint.danling_files import not_taken
from danling_conf.checkpoint.manifest import Broken
from danling_conf.schema.files import danling_checkpoint
from danling_conf.topology.violation import ConfigRefused
from tests.support import small
from tests.support.spawn import run

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ["full.pth", "model_only.pth", "shards", "run"]


class Net(nn.Module):
    """The model that the fixtures were made with."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)).relu())


class Other(Net):
    """Another model."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)


def place(folder: Path, kind: str) -> Path:
    """A checkpoint of DanLing, as a user names it."""
    if kind.endswith(".pth"):
        return Path(shutil.copy(FIXTURES / kind, folder))
    with tarfile.open(FIXTURES / "dcp.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder if kind == "run" else next((folder / "checkpoints").glob("latest-*"))


def expected() -> dict[str, Tensor]:
    return torch.load(FIXTURES / "model_only.pth", weights_only=True)["model"]


def start(root: Path, **settings: Any) -> dict[str, Tensor]:
    """The weights that a run starts from; it then trains a step."""
    runner = small.runner(root, {"steps": 1, **settings})
    data = TensorDataset(torch.randn(16, 4), torch.randint(0, 2, (16,)))
    runner.prepare(Net, {"train": data}, loss=small.loss)
    found = {
        name: value.full_tensor() if isinstance(value, DTensor) else value.clone()
        for name, value in runner.model.state_dict().items()
    }
    for batch in runner.batches("train"):
        runner.step(batch)
    runner.finish()
    return found


def same(found: dict[str, Tensor]) -> None:
    assert found.keys() == expected().keys()
    for name, value in expected().items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_for_inference(tmp_path, kind):
    net = Net()
    danling_conf.load_weights(net, place(tmp_path, kind))
    same(net.state_dict())


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_weights_of_a_compiled_model(tmp_path, kind):
    content = {"model": {f"_orig_mod.{name}": value for name, value in expected().items()}}
    if kind == "file":
        torch.save(content, tmp_path / "latest.pth")
    else:
        torch.distributed.checkpoint.save(content, checkpoint_id=tmp_path, no_dist=True)
        (tmp_path / "runner.yaml").touch()
    net = Net()
    danling_conf.load_weights(net, tmp_path)
    same(net.state_dict())


def test_what_is_not_taken_is_named(tmp_path):
    assert not_taken(place(tmp_path, "full.pth")) == ["runner", "state", "dataloaders", "optimizer", "scheduler"]
    assert not_taken(place(tmp_path, "model_only.pth")) == []
    assert {"runner", "state", "optimizer", "scheduler"} <= set(not_taken(place(tmp_path, "run")))


@pytest.mark.parametrize("key", ["resume", "pretrained"])
@pytest.mark.parametrize("kind", ["full.pth", "run"])
def test_a_run_starts_from_them(tmp_path, capfd, key, kind):
    source = place(tmp_path, kind)
    same(start(tmp_path / "out", **{key: str(source)}))
    shown = capfd.readouterr()
    assert "not taken from it: runner, state, dataloaders," in shown.out + shown.err


def test_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"of another shape head\.weight"):
        danling_conf.load_weights(Other(), place(tmp_path, "full.pth"))


class Evil:
    """Would make a folder when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


@pytest.mark.parametrize("part", ["model", "scheduler"])
@pytest.mark.parametrize("called", [os.mkdir, exec, getattr])
def test_nothing_of_a_file_is_executed(tmp_path, called, part):
    """Neither in the place of a weight nor beside them."""
    folder = tmp_path / "executed"
    code = f"import os; os.mkdir({str(folder)!r})"
    evil = Evil(called, *{os.mkdir: (str(folder),), exec: (code,), getattr: ("text", "upper")}[called])
    model = {**expected(), "head.bias": evil} if part == "model" else expected()
    torch.save({"model": model, "scheduler": evil}, tmp_path / "evil.pth")
    net = Net()
    if called is os.mkdir or part == "model":
        # torch refuses the modules of the operating system by any name; else a weight is missing.
        with pytest.raises(ValueError, match=r"evil\.pth"):
            danling_conf.load_weights(net, tmp_path / "evil.pth")
    else:
        danling_conf.load_weights(net, tmp_path / "evil.pth")
        same(net.state_dict())
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"not a file of torch", None, {"optimizer": {}}, [1, 2]])
def test_other_files(tmp_path, content):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(Broken, match=r"other\.pth"):
        danling_conf.load_weights(Net(), path)


def test_a_cut_file(tmp_path):
    path = place(tmp_path, "full.pth")
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(Broken, match=r"full\.pth"):
        danling_conf.load_weights(Net(), path)


def test_a_pointer_that_leads_out_is_not_followed(tmp_path):
    folder = place(tmp_path, "run") / "checkpoints"
    (folder / "latest.pointer").write_text("../../elsewhere\n")
    assert danling_checkpoint(tmp_path) is None


def test_a_path_that_is_absent_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigRefused, match="there is no such file"):
        small.config(tmp_path, {"resume": str(tmp_path / "latest.pth")})


def two_ranks(root: str, source: str) -> dict[str, Tensor]:
    return start(Path(root), pretrained=source, parallel={"axes": {"shard": 2}}, fsdp={"enabled": True})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full.pth", "shards"])
def test_each_rank_reads_its_shards(tmp_path, kind):
    for found in run(two_ranks, 2, str(tmp_path / "out"), str(place(tmp_path, kind))):
        same(found)
