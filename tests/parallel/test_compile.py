from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from danling_conf.parallel import compile as compilation
from danling_conf.schema.compile import CompileConfig

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(x).relu()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture(autouse=True)
def _process_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/unused"))
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Every call of `nn.Module.compile`: the module's class and the options."""
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: calls.append((type(self).__name__, options)))
    return calls


def test_disabled_leaves_the_model_alone(compiled: list[Any]) -> None:
    model = Model()
    assert compilation.apply(model, CompileConfig()) is model
    assert compiled == []
    assert torch._dynamo.config.optimize_ddp is True


def test_blocks_are_compiled_one_by_one_with_the_options_that_are_set(compiled: list[Any]) -> None:
    compilation.apply(Model(), CompileConfig(enable=True, backend="eager", fullgraph=True))
    assert compiled == [("Block", {"backend": "eager", "fullgraph": True})] * 2
    compiled.clear()
    compilation.apply(Model(), CompileConfig(enable=True, mode="max-autotune", dynamic=True))
    compilation.apply(Model(), CompileConfig(enable=True, options={"max_autotune": True}, dynamic=False))
    assert compiled[::2] == [
        ("Block", {"mode": "max-autotune", "dynamic": True}),
        ("Block", {"options": {"max_autotune": True}, "dynamic": False}),
    ]


def test_scope_model_and_a_model_without_blocks_are_compiled_whole(compiled: list[Any]) -> None:
    compilation.apply(Model(), CompileConfig(enable=True, scope="model"))
    compilation.apply(nn.Linear(2, 2), CompileConfig(enable=True))
    assert compiled == [("Model", {}), ("Linear", {})]


@pytest.mark.parametrize("scope", ["block", "model"])
def test_compiled_model_computes_the_same_under_the_same_names(scope: str) -> None:
    torch.manual_seed(0)
    model = Model()
    keys, x = list(model.state_dict()), torch.randn(3, 4)
    expected = model(x)
    compilation.apply(model, CompileConfig(enable=True, scope=scope, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(model(x), expected)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (CompileConfig(enable=True, backend="indctor"), r"compile\.backend=indctor\n.*no such backend\n.*inductor"),
        (CompileConfig(enable=True, mode="fastest"), r"compile\.mode=fastest\n\s+torch\.compile refuses"),
        (CompileConfig(enable=True, mode="default", options={"trace.enabled": True}), "set one of them"),
        (CompileConfig(enable=True, options={"no_such": 1}), r"compile\.options=.*\n.*refuses.*no_such.{,200}\n"),
    ],
)
def test_what_torch_does_not_know_is_refused_before_the_first_step(section: CompileConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compilation.apply(Model(), section)


@pytest.mark.parametrize(
    "value", ["ddp_optimizer", "python_reducer", "python_reducer_without_compiled_forward", "no_optimization"]
)
def test_every_optimize_ddp_value_is_one_of_dynamo(value: str) -> None:
    compilation.configure(CompileConfig(enable=True, optimize_ddp=value))
    assert torch._dynamo.utils.get_optimize_ddp_mode() == value


def test_optimize_ddp_unset_is_left_as_torch_has_it() -> None:
    compilation.configure(CompileConfig(enable=True, optimize_ddp=None))
    assert torch._dynamo.config.optimize_ddp is True


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/danling_conf/inductor"),
        ({"HOME": "/home/somebody"}, "/home/somebody/.cache/danling_conf/inductor"),
        ({"XDG_CACHE_HOME": "/caches", "TORCHINDUCTOR_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_cache_is_shared_unless_the_user_has_one(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    compilation.use_shared_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == expected


def test_inductor_reads_the_directory_when_it_is_imported_after(tmp_path: Path) -> None:
    code = (
        "from danling_conf.parallel.compile import use_shared_cache; use_shared_cache();"
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == tmp_path / "danling_conf" / "inductor"


def test_keywords_rebuild_the_section() -> None:
    build = compilation.from_keywords(enable=True, backend="eager")
    assert isinstance(build(Model()), Model)
    with pytest.raises(ValueError, match=r"compile\.bakend\n.*\n.*did you mean compile\.backend"):
        compilation.from_keywords(bakend="eager")
