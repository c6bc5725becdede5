"""The final export of the model alone, and what `pretrained` takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danling_conf import ConfigRefused, Runner
from danling_conf.checkpoint import export, manifest
from danling_conf.checkpoint.manifest import EXPORTED
from tests.support.processes import run as on_ranks
from tests.support.resumed_runs import checkpoints, settings_of, start, train
from tests.support.small import Net, Pairs, equal, loss

pytestmark = pytest.mark.slow

EXPORTING: dict[str, Any] = {"steps": 3, "eval_interval": 100, "checkpoint": {"last_save_model_only": True}}


def test_the_last_checkpoint_holds_the_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = train(tmp_path, {**EXPORTING, "checkpoint": {"last_save_model_only": True, "interval": 2}})
    assert checkpoints(done["run"]) == ["ckpt-s00000002", "export", "latest"]
    exported = done["run"] / "checkpoints" / "export"
    assert sorted(item.name for item in exported.iterdir()) == [EXPORTED, "model.safetensors"]
    assert equal(load_file(exported / "model.safetensors"), done["weights"])
    facts = manifest.read(exported, EXPORTED)
    assert (facts.step, facts.backend) == (3, "safetensors")
    manifest.verify(exported, facts)
    assert "the model of step 3, the best so far, is in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp64", torch.float64)],
)
def test_its_dtype(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Beside the last checkpoint, which holds everything as it was."""
    done = train(tmp_path, {"steps": 3, "checkpoint": {"export_dtype": name}})
    exported = load_file(done["run"] / "checkpoints" / "export" / "model.safetensors")
    assert {item.dtype for item in exported.values()} == {dtype}
    assert equal(exported, {key: value.to(dtype) for key, value in done["weights"].items()})
    again = train(tmp_path, {"steps": 3, "checkpoint": {"export_dtype": name}, "resume": str(done["run"])})
    assert (again["began"], equal(again["weights"], done["weights"])) == (3, True)


def test_none_is_written_unasked(tmp_path: Path) -> None:
    assert "export" not in checkpoints(train(tmp_path, {"steps": 2})["run"])


def test_a_run_is_not_resumed_from_an_export(tmp_path: Path) -> None:
    done = train(tmp_path, EXPORTING)
    with pytest.raises(ConfigRefused, match="there is no whole checkpoint in it"):
        train(tmp_path, {**EXPORTING, "steps": 4, "resume": str(done["run"])})


def test_a_large_model_is_exported_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_FILE_BYTES", 200)
    done = train(tmp_path, EXPORTING)
    folder = done["run"] / "checkpoints" / "export"
    files = sorted(folder.glob("*.safetensors"))
    assert [path.name for path in files] == [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    parts = {path.name: load_file(path) for path in files}
    assert {name: place for place, part in parts.items() for name in part} == index["weight_map"]
    tuned = train(tmp_path, {"steps": 1, "optim": {"lr": 0.0}, "pretrained": str(folder)})
    assert equal(tuned["weights"], done["weights"])


@pytest.mark.parametrize("kind", ["run", "export", "file", "folder", "own shards"])
def test_pretrained_takes_it(tmp_path: Path, kind: str) -> None:
    saving = {"last_save_model_only": True} if kind != "own shards" else {"backend": "dcp"}
    done = train(tmp_path, {"steps": 3, "checkpoint": saving})
    exported = done["run"] / "checkpoints" / "export"
    folder = tmp_path / "given"
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in done["weights"].items()}, folder / "weights.safetensors")
    source = {
        "run": done["run"], "export": exported, "file": folder / "weights.safetensors", "folder": folder,
        "own shards": done["run"],
    }[kind]  # fmt: skip
    tuned = train(tmp_path, {"steps": 2, "optim": {"lr": 0.0}, "pretrained": str(source)})
    assert tuned["began"] == 0
    assert equal(tuned["weights"], done["weights"])


def test_missing_and_unexpected_keys_are_listed(tmp_path: Path) -> None:
    weights = {"first.weight": torch.zeros(8, 5), "first.bias": torch.zeros(8), "head.weight": torch.zeros(3, 8)}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigRefused) as refusal:
        train(tmp_path / "runs", {"steps": 1, "pretrained": str(tmp_path)})
    text = str(refusal.value)
    assert "it lacks second.weight, second.bias; the model lacks head.weight" in text
    assert "exclude_from_loading" in text
    skipping = {"exclude_from_loading": ["model.second", "model.head"]}
    tuned = train(
        tmp_path / "runs",
        {"steps": 1, "optim": {"lr": 0.0, "weight_decay": 0.0}, "pretrained": str(tmp_path), "checkpoint": skipping},
    )
    assert not tuned["weights"]["first.weight"].any()
    assert tuned["weights"]["second.weight"].any()


@pytest.mark.parametrize("how", ["flip", "truncate", "lost part"])
def test_a_damaged_export_is_refused(tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "lost part":
        monkeypatch.setattr(export, "_FILE_BYTES", 200)
    folder = train(tmp_path, EXPORTING)["run"] / "checkpoints" / "export"
    path = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if how == "lost part":
        path.unlink()
    else:
        path.write_bytes(content if how == "flip" else content[:-40])
    with pytest.raises(ConfigRefused, match=rf"pretrained={folder}\n.*{path.name}: "):
        train(tmp_path, {"steps": 1, "pretrained": str(folder)})


def exported_by(root: str, layout: str) -> Any:
    from tests.support import decoder_runs as decoding

    done = decoding.train(root, layout, {"steps": 2, "checkpoint": {"last_save_model_only": True, "interval": None}})
    return done["run"], done["weights"]


def test_a_sharded_model_is_exported_whole(tmp_path: Path) -> None:
    (run, weights), _ = on_ranks(exported_by, 2, str(tmp_path), "fsdp2")
    assert equal(load_file(run / "checkpoints" / "export" / "model.safetensors"), weights)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
        )
    )  # fmt: skip


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(8) + index % 8
        return {"input_ids": tokens, "labels": tokens}


def train_llama(root: str, changes: dict[str, Any]) -> Any:
    """Train a model of transformers; what it says of some tokens at the end, and where its export is."""
    runner = Runner(settings_of(root, {"steps": 2, "checkpoint": {"last_save_model_only": True}, **changes}))
    runner.fit(llama(), {"train": Tokens()})
    runner.model.eval()
    with torch.no_grad():
        said = runner.model(input_ids=torch.arange(8)[None]).logits
    return said, runner.world.attempt.run_directory / "checkpoints" / "export"


@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_transformers_loads_a_model_of_its_own(tmp_path: Path, layout: str) -> None:
    from transformers import AutoModelForCausalLM

    sharded = {"parallel": {"axes": {"shard": 2}}, "fsdp": {"enabled": True}}
    ranks = on_ranks(train_llama, 1 if layout == "single" else 2, str(tmp_path), {} if layout == "single" else sharded)
    said, folder = ranks[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded).__name__ == "LlamaForCausalLM"
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=torch.arange(8)[None]).logits, said, atol=1e-6)
    # And back: a folder that transformers wrote.
    loaded.save_pretrained(tmp_path / "theirs")
    changes = {"steps": 1, "optim": {"lr": 0.0, "weight_decay": 0.0}, "pretrained": str(tmp_path / "theirs")}
    again, _ = on_ranks(train_llama, 1, str(tmp_path), changes)[0]
    assert torch.allclose(again, said, atol=1e-6)


def test_transformers_loads_a_cast_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (_, folder), *_ = on_ranks(
        train_llama, 1, str(tmp_path), {"checkpoint": {"last_save_model_only": True, "export_dtype": "bf16"}}
    )
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16


def test_an_export_that_cannot_be_written_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from danling_conf.checkpoint.background import SaveFailed

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_plainly", fail)
    with pytest.raises(SaveFailed, match=r"export: the model could not be exported: .*No space left on device"):
        start(tmp_path, EXPORTING).fit(Net, {"train": Pairs()}, loss=loss)
