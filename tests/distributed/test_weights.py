"""Weights of every layout are loaded into a plain module in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import danling_conf
from danling_conf.cli.main import main
from danling_conf.groups.layout_names import parse_layout
from models.decoder import Decoder, DecoderConfig
from tests.support import decoder_runs
from tests.support.processes import run as on_ranks


def model(experts: int) -> Decoder:
    return Decoder(
        DecoderConfig(
            width=16, depth=2, heads=2, hidden=32, context=decoder_runs.LENGTH,
            vocab_size=decoder_runs.VOCABULARY, experts=experts,
        )
    )  # fmt: skip


def small() -> Decoder:
    return model(0)


def with_experts() -> Decoder:
    return model(4)


def trained(root: str, layout: str) -> Any:
    """Train two steps under a layout; the run, and the loss that its ranks measure afterwards."""
    changes = {"steps": 2, "checkpoint": {"interval": None}}
    factory = with_experts if parse_layout(layout).expert > 1 else small
    runner = danling_conf.Runner(decoder_runs.settings_of(root, layout, changes))
    texts = decoder_runs.Texts()
    runner.fit(factory, {"train": texts, "val": texts}, loss=decoder_runs.loss)
    return runner.world.attempt.run_directory, runner.results["val.loss"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp2", "tp2", "pp2", "fsdp2_ep2"])
def test_a_plain_module_computes_what_the_ranks_computed(tmp_path, layout):
    run, measured = on_ranks(trained, 2, str(tmp_path), layout)[0]
    plain = model(4 if "ep" in layout else 0)
    found = danling_conf.load_weights(plain, run)
    assert (found.step, found.missing, found.unexpected) == (2, (), ())
    texts = decoder_runs.Texts()
    with torch.no_grad():
        logits = plain.eval()(texts.tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts.tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(measured, rel=1e-5)
    # The same weights by way of an export, bit by bit.
    assert main(["export", str(run), str(tmp_path / "export")]) == 0
    again = model(4 if "ep" in layout else 0)
    danling_conf.load_weights(again, tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(again.eval()(texts.tokens[:, :-1]), logits)
    assert load_file(tmp_path / "export" / "model.safetensors").keys() == plain.state_dict().keys()
