"""Checkpoints that leave frozen weights out: smaller, resumed exactly, and refused where the weights are others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from danling_conf import ConfigRefused, Runner
from danling_conf.checkpoint import state
from danling_conf.checkpoint.sources import STATE
from danling_conf.groups.layout_names import parse_layout
from tests.support.resumed_runs import whole_weights
from tests.support.small import Net, Pairs, loss, runner, weights
from tests.support.spawn import run


class HalfFrozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class OtherFrozen(HalfFrozen):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.first.weight.mul_(2)


def trained(root: Path, steps: int, model: Any = HalfFrozen, **settings: Any) -> Runner:
    given = {"steps": steps, "optim": {"momentum": 0.9}, "checkpoint": {"load_only": False, "save_frozen": False}}
    found = runner(root, {**given, **settings})
    found.fit(model, {"train": Pairs()}, loss=loss)
    return found


def test_a_checkpoint_without_frozen_weights_resumes_exactly(tmp_path: Path) -> None:
    whole, half = trained(tmp_path / "whole", 6), trained(tmp_path / "half", 3)
    saved = half.world.attempt.run_directory / "checkpoints" / "latest"
    resumed = trained(tmp_path / "resumed", 6, resume=str(saved))
    assert resumed.global_step == 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    held = torch.load(saved / STATE, weights_only=True)
    assert "model.second.weight" in held
    assert not any(name.startswith("model.first") for name in held)


def test_an_optimizer_holds_what_is_trained(tmp_path: Path) -> None:
    found = trained(tmp_path, 1)
    held = {id(item) for group in found.optimizer.param_groups for item in group["params"]}
    assert held == {id(item) for item in found.model.second.parameters()}


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    saved = trained(tmp_path / "half", 3).world.attempt.run_directory
    with pytest.raises(ConfigRefused, match=r"those of this run are others: first\.weight") as refusal:
        trained(tmp_path / "resumed", 6, OtherFrozen, resume=str(saved))
    assert refusal.value.violations[0].path == "checkpoint.save_frozen"


def test_frozen_weights_come_from_pretrained_ones(tmp_path: Path) -> None:
    source = trained(tmp_path / "source", 1, OtherFrozen, checkpoint={"load_only": False}).world.attempt.run_directory
    half = trained(tmp_path / "half", 3, pretrained=str(source)).world.attempt.run_directory
    resumed = trained(tmp_path / "resumed", 6, pretrained=str(source), resume=str(half))
    whole = trained(tmp_path / "whole", 6, pretrained=str(source))
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name


def digests_of_a_sharded_model() -> dict[str, int]:
    torch.manual_seed(0)
    model = HalfFrozen()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("shard",)))
    return state.digests(state.frozen([model]))


def adapted() -> Any:
    """A frozen model with adapters of low rank, by peft."""
    import peft

    settings = peft.LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"], lora_dropout=0.0)
    return peft.get_peft_model(Net(), settings)  # type: ignore[arg-type]


def adapters_trained(root: str) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of a whole run, of one that was cut and resumed, and of what its checkpoint holds, under each layout."""
    found = {}
    for name in ("ddp2", "fsdp2"):
        layout = parse_layout(name)
        settings = {"parallel": {"axes": layout.degrees()}, "fsdp": {"enabled": layout.fsdp},
                    "dataloader": {"batch_size": 2}}  # fmt: skip
        folder = Path(root) / name
        whole = trained(folder / "whole", 6, adapted, **settings)
        saved = trained(folder / "half", 3, adapted, **settings).world.attempt.run_directory / "checkpoints" / "latest"
        resumed = trained(folder / "resumed", 6, adapted, resume=str(saved), **settings)
        found[name] = {**whole_weights(whole.model)}
        found[f"{name} resumed"] = {**whole_weights(resumed.model)}
    return found


@pytest.mark.slow
def test_a_digest_is_the_same_however_a_tensor_is_sharded() -> None:
    torch.manual_seed(0)
    expected = state.digests(state.frozen([HalfFrozen()]))
    assert set(expected) == {"model.first.weight", "model.first.bias"}
    assert run(digests_of_a_sharded_model, 2) == [expected, expected]


@pytest.mark.slow
def test_adapters_of_peft_train_as_in_one_process_and_resume(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", 6, adapted)
    expected = {name: item for name, item in weights(alone).items() if "lora" in name or "second" in name}
    assert sum(item.requires_grad for item in alone.model.parameters()) == 4
    found = run(adapters_trained, 2, str(tmp_path))[0]
    for layout in ("ddp2", "fsdp2"):
        for name, value in expected.items():
            torch.testing.assert_close(found[layout][name], value, rtol=1e-5, atol=1e-6, msg=f"{layout} {name}")
            assert torch.equal(found[f"{layout} resumed"][name], found[layout][name]), (layout, name)
