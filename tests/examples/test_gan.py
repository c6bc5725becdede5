"""Two models and two optimizers: the same weights under every layout, and after a process was killed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import danling_conf
from tests.support.gan_runs import trained
from tests.support.processes import Died
from tests.support.processes import run as on_ranks

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "gan.py"
SGD = ["optim=sgd", "optim.lr=0.05", "~optim.betas", "discriminator_optim.type=sgd", "discriminator_optim.lr=0.05",
       "~discriminator_optim.betas"]  # fmt: skip
"""Adam would make a difference in the last bit of a small gradient one of a whole step."""


def run_of(root: Path) -> Path:
    (found,) = root.glob("lin/exp/*/run.json")
    return found.parent


def weights(root: Path) -> dict[str, Tensor]:
    """The weights of both models, by the one call that loads them."""
    from models.mlp import MLP, MLPConfig

    both = nn.ModuleDict(
        {
            "generator": MLP(MLPConfig(inputs=16, classes=64, width=32)),
            "discriminator": MLP(MLPConfig(inputs=64, classes=1, width=32)),
        }
    )
    danling_conf.load_weights(both, run_of(root))
    return dict(both.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "accumulate"), [("ddp2", 1), ("fsdp2", 2)])
def test_ranks_train_as_one_process_does(tmp_path: Path, layout: str, accumulate: int) -> None:
    size = 32 // accumulate
    settings = [*SGD, "steps=4", f"accum_steps={accumulate}"]
    alone = on_ranks(trained, 1, str(tmp_path / "alone"), [*settings, f"dataloader.batch_size={size}"])
    assert alone[0] > 0
    expected = weights(tmp_path / "alone")
    on_ranks(trained, 2, str(tmp_path / layout),
             [*settings, f"parallel={layout}", f"dataloader.batch_size={size // 2}"])  # fmt: skip
    for name, value in weights(tmp_path / layout).items():
        assert torch.allclose(value, expected[name], rtol=2e-5, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["single", "fsdp2"])
def test_a_run_that_is_killed_and_then_stopped_resumes_bit_by_bit(tmp_path: Path, layout: str) -> None:
    """Adam's moments, the place in the second epoch, and the steps of the budget."""
    ranks = 1 if layout == "single" else 2
    size = 128 // ranks  # eleven micro-batches an epoch, so that a step takes its two from two epochs
    settings = [f"parallel={layout}", "steps=9", f"dataloader.batch_size={size}", "accum_steps=2"]
    settings.append("checkpoint.interval=2")
    whole = on_ranks(trained, ranks, str(tmp_path / "whole"), settings)
    killed = on_ranks(trained, ranks, str(tmp_path / "killed"), settings, 6)
    assert all(isinstance(item, Died) for item in killed)
    settings.append("auto_resume=true")
    stopped = on_ranks(trained, ranks, str(tmp_path / "killed"), settings, None, 7)
    assert all("SIGTERM" in words for words in stopped)
    latest = (run_of(tmp_path / "killed") / "checkpoints" / "latest").resolve().name
    assert latest == f"ckpt-s{7 if ranks == 1 else 8:08d}"
    resumed = on_ranks(trained, ranks, str(tmp_path / "killed"), settings)
    assert resumed == whole
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    names = sorted(path.name for path in (run_of(tmp_path / "killed") / "checkpoints").glob("ckpt-*"))
    assert names == [f"ckpt-s{step:08d}" for step in (2, 4, 6, 8, 9)]


@pytest.mark.slow
def test_it_runs_as_it_says_and_learns(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), f"workspace_root={tmp_path}", "steps=40", "parallel=ddp2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(value) for value in re.findall(r"^step=\d+ discriminator=([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 2
    assert losses[1] < losses[0] < 1.5


def test_a_bad_key_is_refused(tmp_path: Path) -> None:
    bad = ["discriminator_optim.lr=-1", "discriminator_optim.lrr=1", "wdith=3"]
    command = [sys.executable, str(SCRIPT), f"workspace_root={tmp_path}", *bad]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    for expected in ("discriminator_optim.lr=-1", "wdith", "did you mean width?"):
        assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_resumed_is_refused(tmp_path: Path) -> None:
    trained(str(tmp_path), ["steps=1", "dataloader.batch_size=512"])
    run = run_of(tmp_path)
    (run / "checkpoints" / "latest" / "state.pt").write_bytes(b"")
    with pytest.raises(danling_conf.ConfigRefused, match=r"state\.pt: it cannot be read: it is empty"):
        trained(str(tmp_path), ["steps=2", "dataloader.batch_size=512", f"resume={run}"])
    with pytest.raises(danling_conf.ConfigRefused, match="counts optimizer steps"):
        trained(str(tmp_path), ["steps=null", "epochs=1"])


def test_it_uses_public_functions_and_fits_on_a_page() -> None:
    source = SCRIPT.read_text()
    nodes = ast.walk(ast.parse(source))
    modules = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {name for name in modules if name.startswith("danling_conf")}
    assert ours == {"danling_conf", "danling_conf.schema.optim"}
    assert not re.search(r"\._[a-z]", source)
    assert len(source.splitlines()) < 120
