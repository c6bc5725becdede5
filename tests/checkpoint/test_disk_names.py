"""Weights of models of transformers, whose names and tensors on disk are others than in memory for some families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danling_conf import load_weights
from danling_conf.checkpoint import export, manifest
from danling_conf.checkpoint.fit import ModelDiffers
from danling_conf.checkpoint.manager import CheckpointManager
from danling_conf.checkpoint.manifest import EXPORTED, Broken, Manifest
from danling_conf.schema.checkpoint import CheckpointConfig
from danling_conf.schema.layout import Layout
from tests.support.families import FAMILIES, Family
from tests.support.small import Net, equal

DEEPSEEK = Family(
    "DeepseekV3Config",
    "DeepseekV3ForCausalLM",
    {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
    },
)  # fmt: skip
OTHERWISE_NAMED = {
    **{name: FAMILIES[name] for name in ("Mixtral", "Qwen3-MoE", "ViT", "GPT-NeoX", "BERT")},
    "DeepSeek": DEEPSEEK,
}


def made(family: Family, seed: int) -> Any:
    """A model without a value that two of them share."""
    torch.manual_seed(seed)
    model = family.build()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def start_from(source: Path, model: nn.Module) -> None:
    """As `pretrained=` does."""
    manager = CheckpointManager(
        CheckpointConfig(load_only=True), source.parent, rank=0, layout=Layout(), layout_name="single"
    )
    manager.loader.load_weights(source, [model])


def exported(model: nn.Module, folder: Path) -> Path:
    """As the end of a run writes it."""
    facts = Manifest(
        step=7, epoch=0, saved="2026-01-01T00:00:00+00:00", backend="safetensors", layout="single",
        degrees=Layout().degrees(), fsdp=False, history=False, optimizer="AdamW",
    )  # fmt: skip
    folder.mkdir()
    export.write(folder, [model], ((f"model.{name}", item) for name, item in state(model).items()), facts, None)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE_NAMED)
def test_what_the_library_and_what_we_write(tmp_path: Path, name: str) -> None:
    theirs, folder = made(OTHERWISE_NAMED[name], 1), tmp_path / "theirs"
    theirs.save_pretrained(folder)
    for source in (folder, exported(theirs, tmp_path / "export")):
        for load in (start_from, lambda found, model: load_weights(model, found)):
            model = made(OTHERWISE_NAMED[name], 2)
            load(source, model)  # type: ignore[no-untyped-call]
            assert equal(state(model), state(theirs)), source
    assert equal(state(type(theirs).from_pretrained(tmp_path / "export")), state(theirs))


def test_tensors_that_make_up_one_are_read_in_the_order_of_their_numbers_or_refused(tmp_path: Path) -> None:
    family = Family("MixtralConfig", "MixtralForCausalLM", {**FAMILIES["Mixtral"].settings, "num_local_experts": 12})
    theirs = made(family, 1)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    names = [name for name in whole if ".experts." in name and ".layers.1." in name]
    assert len(names) == 36  # in memory these are two tensors
    model = made(family, 2)
    load_weights(model, tmp_path)
    assert equal(state(model), state(theirs))
    before = {name: item.clone() for name, item in state(model).items()}
    some = next(name for name in names if ".11." in name)
    half = {name: item for name, item in whole.items() if name != some}
    for content, error in (
        (half, (Broken, ModelDiffers)),
        ({name: item for name, item in whole.items() if ".11." not in name}, ModelDiffers),
        ({**whole, some: whole[some].T.contiguous()}, (Broken, ModelDiffers)),
        ({**whole, "model.layers.9.mlp.gate.weight": torch.zeros(2)}, ModelDiffers),
    ):
        save_file(content, file, metadata={"format": "pt"})
        for load in (start_from, lambda source, into: load_weights(into, source)):
            with pytest.raises(error):
                load(tmp_path, model)  # type: ignore[no-untyped-call]
    assert equal(state(model), before)


class Adapter(Net):
    """Saves itself as models of peft do: the adapter alone, without a configuration of the model that it adapts."""

    class config:
        to_json_file = None

    def save_pretrained(self, folder: Path, state_dict: Any, is_main_process: bool) -> None:
        save_file({"base_model.second.weight": state_dict["second.weight"]}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        (folder / "other").mkdir()
        (folder / "other" / "adapter_config.json").write_text("{}")


def test_the_export_of_an_adapter_is_the_adapter(tmp_path: Path) -> None:
    folder = exported(Adapter(), tmp_path / "export")
    facts = manifest.read(folder, EXPORTED)
    assert sorted(facts.files) == ["adapter_config.json", "adapter_model.safetensors"]
    manifest.verify(folder, facts)
    with pytest.raises(ModelDiffers, match=r"the model lacks base_model\.second\.weight"):
        start_from(folder, Net())
