"""`danling-conf import`: configurations that DanLing 0.4.0 saved, and what each of its settings becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import danling_conf
from danling_conf.cli.importing.optimization import CURVE
from danling_conf.cli.main import main
from tests.support.command_line import OURS, run, write_app
from tests.support.settings import documented, nested

pytestmark = [pytest.mark.composition, pytest.mark.slow]

FIXTURES = Path(__file__).parent / "fixtures"
EXPERT = {"stack": "parallel", "parallel.axes.shard": 2, "fsdp.enabled": True}


class Imported:
    """What a file was imported as."""

    def __init__(self, folder: Path, content: Any, capsys: Any, name: str = "given.yaml") -> None:
        source = folder / name
        source.write_text(content if isinstance(content, str) else json.dumps(content))
        (folder / "imported.yaml").unlink(missing_ok=True)
        self.code = main(["import", str(source), "-o", str(folder / "imported.yaml")])
        shown = capsys.readouterr()
        self.notes, self.refusal = shown.out, shown.err
        self._folder = folder

    @property
    def config(self) -> Any:
        """The composed configuration, with all rules applied."""
        assert self.code == 0, self.refusal
        return danling_conf.compose(config_name="imported", config_path=self._folder)

    def written(self, path: str) -> Any:
        return OmegaConf.select(OmegaConf.load(self._folder / "imported.yaml"), path)


@pytest.fixture
def imported(tmp_path, capsys):
    return lambda content, name="given.yaml": Imported(tmp_path, content, capsys, name)


@pytest.mark.parametrize("name", ["saved.yaml", "saved.json"])
def test_what_the_release_saved(imported, name):
    found = imported((FIXTURES / name).read_text(), name)
    config = found.config
    assert (config.steps, config.seed, config.lineage, config.experiment) == (4, 1, "old", "digits")
    assert (config.optim.type, config.optim.lr, config.optim.weight_decay) == ("adamw", 0.01, None)
    assert not hasattr(config.optim, "betas")  # torch's own, as there
    assert (config.scheduler.type, config.scheduler.method) == (CURVE, "cosine")
    assert (config.dataloader.batch_size, config.checkpoint.interval, config.log) == (4, 4, False)
    assert dict(config.model) == {"type": "mlp", "width": 3}
    for path in ("name=first", "max_grad_value=1.0", "sched.type=cosine", "checkpoint.interval=-1", "network="):
        assert f"  {path}" in found.notes


def test_an_imported_file_passes_check(tmp_path, capsys):
    app = write_app(tmp_path, OURS, config_path=".", config_name="imported")
    assert main(["import", str(FIXTURES / "saved.yaml"), "-o", str(tmp_path / "imported.yaml")]) == 0
    assert main(["check", str(app)]) == 0
    assert "steps=4" in capsys.readouterr().out
    torchrun = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}
    done = run(app, "--cfg", "job", **torchrun)
    assert "replicate: -1" in done.out


def test_nested_and_dotted_keys_are_the_same(imported):
    first = imported({"optim": {"type": "sgd", "lr": 0.1}, "checkpoint": {"keep_latest_k": 2}, "steps": 3})
    written = first.written("optim"), first.written("checkpoint")
    second = imported("optim.type: sgd\noptim: {lr: 0.1}\ncheckpoint.keep_latest_k: 2\nsteps: 3\n")
    assert (second.written("optim"), second.written("checkpoint")) == written


def test_every_documented_setting_is_read(imported):
    """With its default; none is unknown. DanLing has no plans."""
    tree: Any = {}
    for row in documented():
        if row.default not in ("-", "None") and not row.path.startswith("plan."):
            value = OmegaConf.create(f"a: {row.default}").a
            tree = OmegaConf.merge(tree, nested(row.path, value))
    found = imported(OmegaConf.to_container(OmegaConf.merge(tree, {"stack": "parallel", "steps": 3})))
    assert found.config.stack == "ddp"
    assert "no such setting" not in found.notes
    assert "of your own" not in found.notes


WITH_DEEPSPEED = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="the package deepspeed is not installed: it is where torch is"
)
CASES = [
    # given, path in our configuration, what is there, part of the note
    ({"sched": {"type": "Linear"}}, "scheduler.method", "linear", "sched.type=Linear"),
    ({"scheduler": {"type": "constant", "warmup_steps": 3}}, "scheduler.warmup_steps", 3, "scheduler.type=constant"),
    ({"scheduler": {"type": "step", "step_size": 2}}, "scheduler.type", "StepLR", ""),
    ({"scheduler": {"type": "cosine", "interval": "validation"}}, "scheduler.total_steps", 6, ""),
    ({"optim": {"type": "torch_adamw"}}, "optim.type", "adamw", ""),
    ({"optim": {"type": "ds_adam", "lr": 0.1}}, "optim.type", "adam", "DeepSpeed's version is not used"),
    ({"optimizer": {"type": "SGD", "momentum": 0.9}}, "optim.momentum", 0.9, ""),
    ({"optim": {"type": "sgd"}}, "optim.lr", None, ""),
    ({"accum_steps": 4}, "accum_remainder", "step", ""),
    ({"steps": None, "epochs": 3, "patience": 2}, "patience", 3, "patience=2"),
    ({"skip_nonfinite_grad": True}, "nonfinite", "skip", "nonfinite=skip"),
    ({"precision": "bfloat16"}, "precision", "bf16", ""),
    ({"checkpoint": {"interval": -1}}, "checkpoint.interval", 6, "checkpoint.interval=-1"),
    ({"checkpoint": {"keep_latest_k": 1}}, "checkpoint.interval", 1, "latest.pth"),
    ({"checkpoint": {"async_mode": "on"}}, "checkpoint.async_mode", "async", ""),
    ({"checkpoint": {"exclude_from_loading": "lr_scheduler"}}, "checkpoint.exclude_from_loading", ["lr_scheduler"], ""),
    ({"checkpoint": {"exclude_from_loading": ["ema", "model.head"]}}, "checkpoint.exclude_from_loading",
     ["model.head"], "exclude_from_loading=ema"),
    ({"log_interval": -1}, "log_interval", None, "log_interval=-1: gone"),
    ({"gc": {"interval": -1}}, "gc.interval", None, "gc.interval=-1: gone"),
    ({"dataloader": {"timeout": 30, "batch_size": 2}}, "dataloader.batch_size", 2, "dataloader.timeout=30: gone"),
    ({"dataloader": {"train": {"pin_memory_device": "cuda", "shuffle": False}}}, "dataloader.train.shuffle", False,
     "dataloader.train.pin_memory_device=cuda: gone"),
    ({"dataloader": {"train": {"shuffle": None}}}, "dataloader.train.shuffle", False, "there null was false"),
    ({"wandb": {"tags": "one"}}, "wandb.tags", "one", ""),
    ({"stack": "torch"}, "parallel.axes.replicate", 1, "parallel=ddp replicates"),
    pytest.param({"stack": "ds", "deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage",
                 2, "", marks=WITH_DEEPSPEED),
    pytest.param({"stack": "ds", "deepspeed": {"bf16": {"enabled": True}}}, "stack", "deepspeed",
                 "deepspeed.bf16={...}: gone", marks=WITH_DEEPSPEED),
    ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "stack", "ddp", "deepspeed={...}: gone"),
    ({"fsdp": {"enabled": True}}, "fsdp.enabled", False, "no effect there without stack=parallel"),
    ({**EXPERT, "fsdp.mp_policy": {"param_dtype": "torch.bfloat16"}}, "fsdp.mp_policy.param_dtype", "bf16", ""),
    ({**EXPERT, "fsdp.offload_policy": {}}, "fsdp.offload_policy.enabled", True, ""),
    ({**EXPERT, "parallel.axes.expert": 4}, "parallel.axes.shard", 8, "as many ranks are needed as before"),
    ({**EXPERT, "parallel.axes.expert": 4, "dataloader.batch_size": 8}, "dataloader.batch_size", 2, "global batch"),
    ({**EXPERT, "parallel.axes.expert": 2, "parallel.axes.expert_tensor": 2, "parallel.axes.tensor": 2},
     "parallel.axes.expert_tensor", 2, "parallel.axes.expert_tensor=2"),
    ({**EXPERT, "parallel.axes.expert": 2, "parallel.axes.expert_tensor": 2}, "parallel.axes.expert_tensor", 1, "gone"),
    ({"stack": "parallel", "parallel.axes.shard": 4}, "parallel.axes.replicate", 4, "without FSDP"),
    ({"network": {"name": "vit"}, "hidden": 3}, "data.hidden", 3, "hidden=3: a setting of your own"),
    ({"ft": {"enabled": True}}, "ft.enabled", False, "ft.enabled=true: gone"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "path", "expected", "note"), CASES, ids=lambda value: str(value)[:40])
def test_a_setting(imported, given, path, expected, note):
    found = imported({"steps": 6, **given})
    value: Any = found.config
    for part in path.split("."):
        value = value[part] if isinstance(value, Mapping) else getattr(value, part)
    assert (list(value) if isinstance(value, tuple) else value) == expected
    assert note in found.notes


def test_names_of_dtypes(imported):
    found = imported({"steps": 6, "checkpoint": {"export_dtype": "float", "last_save_model_only": True}})
    assert found.written("checkpoint.export_dtype") == "fp32"


REFUSED = {
    "steps: 3\nepochs: 2\n": "steps and epochs exclude each other",
    "optim: {type: lion}": "it is not an optimizer of torch",
    "sched: {type: swirl}": "it is not a scheduler of DanLing 0.4",
    "sched: {type: cosine, interval: hour}": "DanLing has no such interval",
    "stack: horovod": "DanLing has no such stack",
    "stack: parallel\nparallel.axes.shard: many": "a degree is a whole number",
    "steps: soon": "it must be a whole number",
    "optim: 3": "it must be a mapping",
    "optim: 3\noptim.lr: 1": "the file has it twice",
    "[1, 2]": "it holds no mapping of settings",
    "a: [": "it cannot be read",
    "a: !!python/object:os.system {}": "it cannot be read",
}


@pytest.mark.parametrize(("text", "why"), REFUSED.items())
def test_refusals(imported, tmp_path, text, why):
    found = imported(text)
    assert found.code == 2
    assert why in found.refusal
    assert not (tmp_path / "imported.yaml").exists()


def test_nothing_is_overwritten(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("mine\n")
    assert main(["import", str(FIXTURES / "saved.yaml"), "-o", str(tmp_path / "mine.yaml")]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "mine\n"
    assert main(["import", str(tmp_path / "absent.yaml")]) == 2


def test_without_an_output_the_file_goes_to_standard_output(capsys):
    assert main(["import", str(FIXTURES / "saved.yaml")]) == 0
    shown = capsys.readouterr()
    assert OmegaConf.create(shown.out).steps == 4
    assert "max_grad_value" in shown.err
