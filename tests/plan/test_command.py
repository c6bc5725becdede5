"""`danling-conf plan`, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from danling_conf.cli.main import main

EXAMPLE = str(Path(__file__).resolve().parents[2] / "examples" / "train.py")
SMALL = ["model.depth=6", "model.width=64", "model.context=32"]


def test_one_layout(capsys):
    assert main(["plan", EXAMPLE, "parallel=fsdp64_tp2", "precision=bf16", *SMALL, "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    assert "layout fsdp64_tp2, 128 ranks" in text
    assert "fits: " in text
    assert "activations" in text
    assert "all_gather over shard (64)" in text
    assert "needs less memory with:" in text
    assert "activation_checkpointing.mode=full" in text


def test_as_json_with_everything_that_is_shown(capsys):
    assert main(["plan", EXAMPLE, "parallel=pp2", *SMALL, "--gpu=h100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [rank["stages"] for rank in found["figures"]["ranks"]] == [[0], [1]]
    assert found["verdict"]["word"] == "fits"
    assert found["ways"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["parallel=fsdp"], "name all degrees"),
        (["parallel=fsdp64_tp8"], "parallel.axes.tensor=8"),
        (["parallel=fsdp4", "--gpu", "h1000"], "--gpu"),
        (["parallel=fsdp4", "--gpu-memory", "80"], "no such option"),
    ],
)
def test_refusals(argv, said, capsys):
    assert main(["plan", EXAMPLE, *argv]) == 2
    assert said in capsys.readouterr().err
