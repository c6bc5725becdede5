"""Ways to load something else than was saved, without a word: each is refused by name, or gives the right values."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties

from danling_conf import load_weights
from danling_conf.checkpoint import durable, manifest
from danling_conf.checkpoint.fit import ModelDiffers
from danling_conf.checkpoint.loading import LayoutDiffers
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.checkpoint.manifest import Broken
from danling_conf.schema.checkpoint import CheckpointConfig
from danling_conf.schema.layout import Layout
from tests.checkpoint.test_files import sign
from tests.support.small import Net, equal


class Other(Net):
    """One that is changed after it was built."""

    def __init__(self, change: Callable[[Any], Any] = lambda _: None) -> None:
        super().__init__()
        change(self)


def manager(root: Path, backend: str = "file", layout: Layout | None = None) -> CheckpointManager:
    section = CheckpointConfig(backend=backend, async_mode="disabled")
    return CheckpointManager(section, root, rank=0, layout=layout or Layout(), layout_name="single")


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def saved(root: Path, backend: str = "file", step: int = 1, model: nn.Module | None = None) -> Path:
    """A checkpoint after a step of Adam."""
    root.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(step)
    model = model or Net()
    optimizer = optimizer_of(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    path = manager(root, backend).save(
        parts=[model],
        optimizer=optimizer,
        shared={"settings": {}, "scheduler": None, "scaler": None, "runner": {"global_step": step}},
        own={"loader": None, "generators": None},
        step=step,
        epoch=0,
        history=True,
    )
    assert path is not None
    return path


def restored(source: Path, model: nn.Module | None = None, *, choose: bool = False) -> Any:
    model = model or Net()
    optimizer = optimizer_of(model)
    loaded = manager(source).loader.restore(source, parts=[model], optimizer=optimizer, choose=choose)
    return model, optimizer, loaded


def started(source: Path, model: nn.Module | None = None) -> nn.Module:
    model = model or Net()
    manager(source.parent).loader.load_weights(source, [model])
    return model


def change_state(checkpoint: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint of one file, and make the checksums fit."""
    content = dict(torch.load(checkpoint / "state.pt", weights_only=True))
    change(content)
    torch.save(content, checkpoint / "state.pt")
    sign(checkpoint)


def change_metadata(checkpoint: Path, change: Callable[[Any], Any]) -> None:
    metadata = FileSystemReader(checkpoint).read_metadata()
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    sign(checkpoint)


def rename(model: Any) -> None:
    model.renamed = model.__dict__["_modules"].pop("second")


def transpose(model: Any) -> None:
    model.second.weight = nn.Parameter(torch.zeros(8, 3))


def buffer(model: Any) -> None:
    model.register_buffer("count", torch.zeros(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename, r"it lacks renamed\.weight.*; the model lacks second\.weight"),
        (transpose, r"of another shape second\.weight \(3, 8\) for \(8, 3\)"),
        (buffer, "it lacks count"),
        (lambda model: model.bfloat16(), "of another dtype first.weight float32 for bfloat16"),
        (lambda model: model.double(), "of another dtype first.weight float32 for float64"),
    ],
)
@pytest.mark.parametrize("backend", ["file", "dcp"])
def test_a_run_goes_on_with_the_very_model(tmp_path: Path, backend: str, change: Any, message: str) -> None:
    path = saved(tmp_path, backend)
    with pytest.raises(ModelDiffers, match=message):
        restored(path, Other(change))


def test_an_extra_buffer_in_the_checkpoint(tmp_path: Path) -> None:
    path = saved(tmp_path, model=Other(buffer))
    for load in (restored, started):
        with pytest.raises(ModelDiffers, match="the model lacks count"):
            load(path)


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_tensors_of_another_kind(tmp_path: Path, kind: torch.dtype) -> None:
    """torch copies them into floats."""
    path = saved(tmp_path)
    change_state(path, lambda state: state.update({"model.first.weight": state["model.first.weight"].to(kind)}))
    message = f"of another dtype first.weight {str(kind).removeprefix('torch.')} for float32"
    for load in (restored, started, lambda source: load_weights(Net(), source, cast=True)):
        with pytest.raises(ModelDiffers, match=message):
            load(path)


def test_a_start_is_cast_to_the_precision_of_the_model(tmp_path: Path) -> None:
    weights = {name: item.bfloat16() for name, item in Net().state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    model = started(tmp_path)
    assert equal(model.state_dict(), {name: item.float() for name, item in weights.items()})


def swap_keys(state: dict[str, Tensor]) -> None:
    state["optimizer.first.weight.exp_avg"] = state["optimizer.first.weight.exp_avg"].T.contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("optimizer.first.weight.exp_avg_sq"), "it lacks optimizer.first.weight.exp_avg_sq"),
        (lambda state: [state.pop(name) for name in list(state) if ".second.bias." in name and "opt" in name],
         "it lacks optimizer.second.bias.exp_avg, "),
        (swap_keys, "of another shape or dtype than when it was saved: optimizer.first.weight.exp_avg"),
        (lambda state: state.update({"optimizer.first.bias.exp_avg": torch.ones(8, dtype=torch.int64)}),
         "of another shape or dtype than when it was saved: optimizer.first.bias.exp_avg"),
    ],
)  # fmt: skip
def test_tensors_of_the_optimizer(tmp_path: Path, change: Any, message: str) -> None:
    path, model = saved(tmp_path), Net()
    before = {name: item.clone() for name, item in model.state_dict().items()}
    change_state(path, change)
    with pytest.raises(Broken, match=message):
        restored(path, model)
    assert equal(model.state_dict(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("optimizer.first.weight.exp_avg_sq"), "it lacks optimizer.first.weight.exp_avg_sq"),
        (swap_keys, r"optimizer.first.weight.exp_avg \(5, 8\) for \(8, 5\)"),
        (lambda state: state.update({"optimizer.first.bias.exp_avg": torch.ones(8, dtype=torch.int64)}),
         "optimizer.first.bias.exp_avg int64 for float32"),
    ],
)  # fmt: skip
def test_tensors_of_the_optimizer_where_an_earlier_version_does_not_say_which(
    tmp_path: Path, change: Any, message: str
) -> None:
    path = saved(tmp_path)
    shared = torch.load(path / "shared.pt", weights_only=True)
    del shared["optimizer"]["tensors"]
    torch.save(shared, path / "shared.pt")
    sign(path)
    restored(path)
    change_state(path, change)
    with pytest.raises((Broken, ModelDiffers), match=message):
        restored(path)


def first(metadata: Any, name: str = "model.first.weight") -> Any:
    return metadata.state_dict_metadata[name]


def uncover(metadata: Any) -> None:
    first(metadata).chunks = []


def halve(metadata: Any) -> None:
    item = first(metadata)
    item.chunks = [ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([4, 5]))]


def overlap(metadata: Any) -> None:
    item = first(metadata)
    item.chunks = [
        ChunkStorageMetadata(offsets=torch.Size([at, 0]), sizes=torch.Size([size, 5])) for at, size in ((0, 4), (2, 4))
    ]


def outside(metadata: Any) -> None:
    first(metadata).chunks = [ChunkStorageMetadata(offsets=torch.Size([0, 0]), sizes=torch.Size([9, 5]))]


def lose(metadata: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == "model.first.weight")
    del metadata.storage_data[index]


def recast(metadata: Any) -> None:
    first(metadata).properties = TensorProperties(dtype=torch.bfloat16)


def reuse(metadata: Any) -> None:
    """The bytes of one moment for the other."""
    entries = {index.fqn: index for index in metadata.storage_data}
    own, other = (entries[f"optimizer.first.weight.{key}"] for key in ("exp_avg", "exp_avg_sq"))
    metadata.storage_data[own] = metadata.storage_data[other]


def stray(metadata: Any) -> None:
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path="stray.distcp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (uncover, "the shards of model.first.weight do not make up the tensor: they hold 0 of 40 elements"),
        (halve, "they hold 20 of 40 elements"),
        (overlap, "some overlap"),
        (outside, r"one lies outside of its shape \(8, 5\)"),
        (lose, r"it names no file for the shard of model.first.weight at \(0, 0\)"),
        (recast, "of another dtype|is not what was saved: it is torch.float32"),
        (reuse, "it names bytes of __0_0.distcp twice"),
        (stray, "it names stray.distcp, of which the checkpoint has no checksum"),
    ],
)
def test_shards_that_are_not_the_tensor(tmp_path: Path, change: Any, message: str) -> None:
    path = saved(tmp_path, "dcp")
    shutil.copy(path / "__0_0.distcp", path / "stray.distcp")
    change_metadata(path, change)
    for load in (restored, started):
        with pytest.raises((Broken, ModelDiffers), match=message):
            load(path)


def test_a_file_without_a_checksum_is_not_read(tmp_path: Path) -> None:
    for backend, file in (("file", "state.pt"), ("dcp", "__0_0.distcp"), ("file", "shared.pt"), ("file", "rank-0.pt")):
        path = saved(tmp_path / backend / file, backend)
        facts = manifest.read(path)
        others = {name: item for name, item in facts.files.items() if name != file} | {"more": durable.Sum(0, 0)}
        (path / "more").touch()
        manifest.write(path, replace(facts, files=others))
        with pytest.raises(Broken, match=f"no checksum of {file}|{file}, of which the checkpoint has no checksum"):
            restored(path)


def test_a_missing_shard_and_files_of_another_checkpoint(tmp_path: Path) -> None:
    one, two = (saved(tmp_path, "dcp", step) for step in (1, 2))
    for file in ("__0_0.distcp", "shared.pt", "checkpoint.json"):
        shutil.copytree(two, tmp_path / "mixed" / two.name)
        mixed = tmp_path / "mixed" / two.name
        shutil.copy(one / file, mixed / file)
        with pytest.raises(Broken, match=r"its checksum differs|was written with"):
            restored(mixed)
        shutil.rmtree(mixed)
    (two / "__0_0.distcp").unlink()
    with pytest.raises(Broken, match=r"__0_0\.distcp: there is no such file"):
        restored(two)


def test_another_layout_and_another_world(tmp_path: Path) -> None:
    path = saved(tmp_path)
    for layout in (Layout(replicate=2), Layout(shard=2, fsdp=True)):
        facts = replace(manifest.read(path), degrees=layout.degrees(), fsdp=layout.fsdp, layout="other")
        manifest.write(path, facts)
        with pytest.raises(LayoutDiffers, match="the layout other"):
            restored(path)


def tie(model: Any) -> None:
    model.third = nn.Linear(5, 8)
    model.third.weight = model.first.weight


def test_tied_weights(tmp_path: Path) -> None:
    path = saved(tmp_path, model=Other(tie))
    model, *_ = restored(path, Other(tie))
    assert model.third.weight is model.first.weight
    untied = Other(lambda item: setattr(item, "third", nn.Linear(5, 8)))
    restored(path, untied)
    assert torch.equal(untied.third.weight, untied.first.weight)  # type: ignore[union-attr]
    change_state(path, lambda state: state.update({"model.third.weight": state["model.third.weight"] + 1}))
    for load in (restored, started, lambda source, into: load_weights(into, source)):
        into = Other(tie)
        before = into.first.weight.clone()
        with pytest.raises(ModelDiffers, match=r"the model ties first\.weight and third\.weight, whose values differ"):
            load(path, into)
        assert torch.equal(into.first.weight, before)
    once = {name: item for name, item in Other(tie).state_dict().items() if name != "third.weight"}
    save_file(once, tmp_path / "once.safetensors")
    assert torch.equal(started(tmp_path / "once.safetensors", Other(tie)).third.weight, once["first.weight"])  # type: ignore[union-attr]
    with pytest.raises(ModelDiffers, match=r"it lacks third\.weight"):
        started(tmp_path / "once.safetensors", Other(lambda item: setattr(item, "third", nn.Linear(5, 8))))


def test_a_stale_latest_is_passed_over(tmp_path: Path) -> None:
    """A save was killed between the rename and the link."""
    old, new = saved(tmp_path, step=1), saved(tmp_path, step=2)
    folder = old.parent
    for target in (old.name, "../elsewhere", str(tmp_path / "other" / "checkpoints" / new.name)):
        (folder / "latest").unlink()
        (folder / "latest").symlink_to(target)
        assert restored(tmp_path)[2].facts.step == 2
        assert equal(started(tmp_path).state_dict(), restored(new)[0].state_dict())
        assert load_weights(Net(), tmp_path).step == 2


def test_a_folder_by_another_name_is_what_its_manifest_says(tmp_path: Path) -> None:
    saved(tmp_path, step=3)
    path = saved(tmp_path, step=2)
    os.rename(path, path.with_name("ckpt-s00000009"))
    assert restored(tmp_path)[2].facts.step == 3
    assert restored(tmp_path, choose=True)[2].facts.step == 3


def test_two_files_with_a_tensor_of_one_name(tmp_path: Path) -> None:
    weights = Net().state_dict()
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"first.bias": torch.ones(8)}, tmp_path / "b.safetensors")
    for load in (started, lambda source: load_weights(Net(), source)):
        with pytest.raises(Broken, match=r"b\.safetensors: it holds first\.bias, and so does a\.safetensors"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"first.bias": "b.safetensors"}}, "b.safetensors: it has no first.bias, which"),
        ({"weight_map": {"first.bias": "c.safetensors"}}, "c.safetensors: there is no such file, and"),
        ({"weight_map": {"first.bias": "../b.safetensors"}}, "it names a file outside of its folder"),
        ({"weight_map": {"first.bias": 3}}, "it names a file outside of its folder, 3"),
        ({"weight_map": [1]}, "it has no weight_map"),
        ([], "it is not a JSON object"),
    ],
)
def test_an_index_that_says_something_else(tmp_path: Path, index: Any, message: str) -> None:
    save_file(Net().state_dict(), tmp_path / "a.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Broken, match=message):
        started(tmp_path)


def test_an_index_beside_a_whole_file_is_refused(tmp_path: Path) -> None:
    """transformers would read the file, and we what the index names."""
    save_file(Net().state_dict(), tmp_path / "model.safetensors")
    save_file(Net().state_dict(), tmp_path / "a.safetensors")
    index = {"weight_map": dict.fromkeys(Net().state_dict(), "a.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Broken, match=r"model\.safetensors: .* names other files: which are meant is not known"):
        started(tmp_path)


def test_a_file_of_torch_save(tmp_path: Path) -> None:
    theirs, file = Net(), tmp_path / "file.pth"
    for content in (theirs.state_dict(), {"state_dict": theirs.state_dict(), "epoch": 3}):
        torch.save(content, file)
        assert equal(started(file).state_dict(), theirs.state_dict())
        assert load_weights(Net(), file).step is None
    torch.save(theirs.state_dict(), file, _use_new_zipfile_serialization=False)
    assert equal(started(file).state_dict(), theirs.state_dict())
    renamed = {f"module.{name}": item for name, item in theirs.state_dict().items()}
    for content, message in (
        (theirs, "it holds other objects than tensors and plain values"),
        (
            {"state_dict": theirs.state_dict(), "model": theirs.state_dict()},
            "state_dict: it is OrderedDict, and no tensor",
        ),
        ({}, "it is not a mapping from names to tensors"),
        ({1: torch.ones(1)}, "1: its name is no text"),
        ({"a": torch.ones(2).to_sparse()}, "a: it is not a dense tensor"),
        (renamed, r"the model lacks module\.first\.weight"),
    ):
        torch.save(content, file)
        with pytest.raises((Broken, ModelDiffers), match=message) as refusal:
            started(file)
        assert str(file) in str(refusal.value)
        assert "weights_only" not in str(refusal.value)


def test_a_node_verifies_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its ranks takes a share, and together they take all."""
    path, seen = saved(tmp_path), []
    real = durable.sum_of
    monkeypatch.setattr(durable, "sum_of", lambda file: (seen.append(file.name), real(file))[1])
    for index in (0, 1):
        loading = manager(tmp_path).loader
        loading.on_node = (index, 2)
        loading.load_weights(path, [Net()])
    assert sorted(seen) == ["rank-0.pt", "shared.pt", "state.pt"]


def test_a_save_takes_one_checksum_of_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own, of each tensor in the archive, is left out: it is never compared."""
    import zipfile
    import zlib

    summed: list[int] = []
    counted = SimpleNamespace(crc32=lambda data, *begun: summed.append(len(data)) or zlib.crc32(data, *begun))
    for backend, file in (("file", "state.pt"), ("dcp", "__0_0.distcp")):
        with monkeypatch.context() as patched:
            patched.setattr(durable, "zlib", counted)
            path = saved(tmp_path / backend, backend)
        assert sum(summed) == sum(written.stat().st_size for written in path.iterdir())
        summed.clear()
        restored(path)
        if backend == "file":
            with zipfile.ZipFile(path / file) as archive:
                assert archive.testzip() is not None
    assert torch.serialization.get_crc32_options()
