"""`danling-conf plan --gpus` and `check --gpu`, as they are typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from danling_conf.cli import plan_proposals
from danling_conf.cli.main import main
from danling_conf.plan import engine

pytestmark = pytest.mark.slow

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples" / "train.py")
SMALL = ["model.depth=4", "model.width=64", "model.context=32", "data.context=32"]


def test_proposals_are_traced_ranked_and_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_proposals, "SECONDS", 1000.0)  # however busy the machine is
    page = tmp_path / "plan.html"
    words = ["plan", EXAMPLE, "parallel=fsdp", *SMALL, "--gpus", "2", "--gpu", "a10g", "--html", str(page)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "16 samples a step" in text, "the configured batch of 8 on each of 2 data ranks"
    listed = re.findall(r"^ *(\d+)  (\w+) ", text, re.MULTILINE)
    assert {name for _, name in listed} == {"fsdp2", "ddp2", "tp2", "pp2"}
    assert "derived" not in text, "there was time to trace them all"
    assert f"{listed[0][1]} is " in text
    # What is to be pasted is accepted as it stands.
    pasted = [line.split()[2:] for line in text.splitlines() if line.startswith("  python ")]
    assert len(pasted) == len(listed)
    for overrides in pasted:
        assert main(["check", EXAMPLE, *overrides, "--gpus-per-node", "8"]) == 0
    html = page.read_text()
    assert "Why the first" in html
    assert all(name in html for _, name in listed)


def test_a_batch_that_no_layout_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXAMPLE, *SMALL, "--gpus", "7", "--gpu", "h100"]) == 2
    said = capsys.readouterr().err
    assert "no layout of 7 GPUs gives each data rank a whole number of the 8 samples of a step" in said
    assert "--global-batch" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "8"], "add --gpu h100"),
        (["--gpus", "many", "--gpu", "h100"], "it is a whole number above 0"),
        (["--html", "page.html"], "add --gpu h100"),
        (["--gpu-per-node", "8"], "did you mean --gpus-per-node?"),
    ],
)
def test_refused_options(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXAMPLE, *options]) == 2
    assert said in capsys.readouterr().err


def test_jobs_that_do_not_fit_are_refused_and_alike_ones_planned_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    figures_of = engine.figures_of
    monkeypatch.setattr(engine, "figures_of", lambda subject: planned.append(subject) or figures_of(subject))
    tiny = tmp_path / "tiny.yaml"
    tiny.write_text("base: h100\nmemory_gib: 0.7\nsource: made up\n")
    sweep = ["parallel=fsdp2,fsdp4", "optim.lr=1e-3,1e-4", "seed=1,2", *SMALL]
    options = ["--gpus-per-node", "8", "--gpu"]
    assert main(["check", EXAMPLE, "-m", *sweep, *options, "h100"]) == 0
    text = capsys.readouterr().out
    assert len(planned) == 2
    assert "#0-3 fsdp2: fits:" in text
    assert "#4-7 fsdp4: fits:" in text
    assert main(["check", EXAMPLE, "-m", "parallel=fsdp2,ddp2", "dataloader.batch_size=512", *SMALL, *options,
                 str(tiny)]) == 2  # fmt: skip
    refused = " ".join(capsys.readouterr().err.split())
    assert "2 of 2 jobs refused" in refused
    assert "does not" in refused
    assert "activations, at" in refused
    assert len(planned) == 4
