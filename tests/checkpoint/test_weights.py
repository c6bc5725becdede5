"""Weights loaded into a plain module, and checkpoints exported after the run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from danling_conf import load_weights
from danling_conf.checkpoint.fit import ModelDiffers
from danling_conf.checkpoint.manifest import EXPORTED, Broken
from danling_conf.checkpoint.weight_sources import NothingSaved
from danling_conf.cli.main import main
from tests.support.resumed_runs import train
from tests.support.small import Net, Tensor, equal


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of three steps, each saved, and its model alone."""
    settings = {"steps": 3, "eval_interval": 1, "checkpoint": {"interval": 1, "export_dtype": "bf16"}}
    return train(tmp_path_factory.mktemp("runs"), settings)


@pytest.fixture
def run(done: dict[str, Any], tmp_path: Path) -> Path:
    """A copy of the run."""
    subprocess.run(["cp", "-a", str(done["run"]), str(tmp_path / "run")], check=True)
    return tmp_path / "run"


def weights(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize("place", [".", "checkpoints", "checkpoints/latest", "checkpoints/ckpt-s00000003"])
def test_any_name_of_the_newest_checkpoint(run: Path, done: dict[str, Any], place: str) -> None:
    model = Net()
    assert load_weights(model, run / place).step == 3
    assert equal(weights(model), done["weights"])


def test_the_best_and_an_older_one(run: Path, done: dict[str, Any]) -> None:
    model, first = Net(), Net()
    assert load_weights(model, run, best=True).step == done["best"][1]
    found = load_weights(first, run / "checkpoints" / "ckpt-s00000001")
    assert (found.step, equal(weights(first), done["weights"])) == (1, False)
    with pytest.raises(NothingSaved, match="this is no run"):
        load_weights(model, run / "checkpoints" / "latest", best=True)


def test_an_export_and_its_dtype(run: Path) -> None:
    model, exported = Net(), run / "checkpoints" / "export"
    before = {name: value.clone() for name, value in weights(model).items()}
    with pytest.raises(ModelDiffers, match=r"of another dtype first.weight bfloat16 for float32, .* \(cast=True"):
        load_weights(model, exported)
    assert equal(weights(model), before)
    load_weights(model, exported, cast=True)
    held = load_file(exported / "model.safetensors")
    assert equal(weights(model), {name: value.float() for name, value in held.items()})
    load_weights(model.bfloat16(), exported / "model.safetensors")
    assert equal(weights(model), held)


def test_a_later_export_is_newer_than_a_checkpoint(tmp_path: Path) -> None:
    ended = train(
        tmp_path, {"steps": 3, "eval_interval": 100, "checkpoint": {"interval": 2, "last_save_model_only": True}}
    )
    model = Net()
    found = load_weights(model, ended["run"])
    assert (found.step, found.path.name) == (3, "export")
    assert equal(weights(model), ended["weights"])


def test_what_does_not_fit_is_named(run: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 9)
            self.head = nn.Linear(2, 2)

    with pytest.raises(ModelDiffers) as refusal:
        load_weights(Other(), run)
    text = str(refusal.value)
    assert "it lacks head.bias, head.weight" in text
    assert "the model lacks second.bias, second.weight" in text
    assert "first.weight (8, 5) for (9, 5)" in text
    with pytest.raises(ModelDiffers, match="of another shape"):
        load_weights(Other(), run, strict=False)


def test_what_both_have_is_loaded_on_request(run: Path, done: dict[str, Any]) -> None:
    model = Net()
    del model.second
    model.head = nn.Linear(2, 2)
    found = load_weights(model, run, strict=False)
    assert found.missing == ("head.bias", "head.weight")
    assert found.unexpected == ("second.bias", "second.weight")
    assert torch.equal(model.first.weight, done["weights"]["first.weight"])


def test_a_broken_checkpoint_is_passed_over_and_never_loaded(
    run: Path, done: dict[str, Any], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints" / "ckpt-s00000003" / "state.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    (run / "checkpoints" / "export" / EXPORTED).unlink()
    model = Net()
    assert load_weights(model, run).step == 2
    assert "passed over a broken checkpoint" in caplog.text
    with pytest.raises(Broken, match="its checksum differs"):
        load_weights(model, file.parent)
    assert main(["export", str(file.parent), str(run.parent / "out")]) == 1
    assert "broken: " in capsys.readouterr().err
    assert not (run.parent / "out").exists()


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "model.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Broken, match=r"model\.pt: it cannot be read as a checkpoint: it holds other objects"):
        load_weights(Net(), tmp_path / "model.pt")
    assert not (tmp_path / "executed").exists()


def test_no_weights_and_no_values(tmp_path: Path, run: Path) -> None:
    with pytest.raises(NothingSaved):
        load_weights(Net(), tmp_path / "missing")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match=r"first\.weight is on the meta device"):
        load_weights(model, run)


def test_export_writes_what_the_checkpoint_holds(
    run: Path, done: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "export"
    assert main(["export", str(run), str(target)]) == 0
    out = capsys.readouterr().out
    assert f"exported step 3 of {run}/checkpoints/ckpt-s00000003 to {target}" in out
    assert "plain safetensors, without a config.json: its configuration names no model._target_" in out
    assert sorted(item.name for item in target.iterdir()) == [EXPORTED, "model.safetensors"]
    assert equal(load_file(target / "model.safetensors"), done["weights"])
    assert main(["export", str(run), str(target)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert sorted(item.name for item in target.parent.iterdir()) == ["export"]
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert main(["export", str(run), str(tmp_path / "half"), "--dtype", "fp16", "--best"]) == 0
    model = Net().half()
    assert load_weights(model, tmp_path / "half").step == done["best"][1]


HF: dict[str, Any] = {
    "_target_": "transformers.AutoModelForCausalLM.from_config",
    "config": {
        "_target_": "transformers.LlamaConfig", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def train_named(root: Path, section: dict[str, Any]) -> Any:
    from danling_conf import Runner
    from tests.checkpoint.test_export import Tokens
    from tests.support.resumed_runs import settings_of

    runner = Runner(settings_of(root, {"steps": 1, "model": section}))
    runner.fit(None, {"train": Tokens()})
    runner.model.eval()
    with torch.no_grad():
        return runner.world.attempt.run_directory, runner.model(input_ids=torch.arange(8)[None]).logits


@pytest.mark.slow
def test_a_model_of_transformers_becomes_a_folder_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    run, logits = train_named(tmp_path, HF)
    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    assert "LlamaForCausalLM.from_pretrained" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=torch.arange(8)[None]).logits, logits)
    for value in loaded.parameters():
        value.data.zero_()
    load_weights(loaded, run)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=torch.arange(8)[None]).logits, logits)


def test_a_target_of_a_checkpoint_is_not_called(run: Path, tmp_path: Path) -> None:
    """What a configuration in someone's checkpoint names is not executed."""
    from danling_conf.checkpoint import convert
    from danling_conf.checkpoint.weight_sources import OpenWeights
    from danling_conf.checkpoint.weights import opened

    with opened(run) as found:
        for target in ("os.mkdir", "transformers.utils.import_utils.os.mkdir", "transformers.pipeline"):
            bad = {"model": {"_target_": target, "path": str(tmp_path / "made"), "config": {"_target_": "os.mkdir"}}}
            settings = OpenWeights(path=found.path, facts=found.facts, tensors=found.tensors, settings=bad)
            with pytest.raises(convert._Unknown):
                convert._model_of(settings)
    assert not (tmp_path / "made").exists()


def test_it_runs_as_a_command_and_says_how(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "danling_conf.cli.main", "export"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "nothing is overwritten" in " ".join(shown.split())


def test_a_file_of_someone_elses(tmp_path: Path) -> None:
    theirs = Net()
    save_file(weights(theirs), tmp_path / "some.safetensors")
    model = Net()
    assert load_weights(model, tmp_path / "some.safetensors").step is None
    assert equal(weights(model), weights(theirs))
    assert main(["export", str(tmp_path / "some.safetensors"), str(tmp_path / "out")]) == 2
