"""The example tasks: data that leaks nothing, baselines that are right, and settings that are refused by name."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from models.mlp import MLP, MLPConfig
from tasks import build_task
from tasks.text import Windows, bigram_loss, corpus, split, unigram_loss

CONF = Path(__file__).parents[2] / "conf" / "model"
SMALL = dict(width=32, depth=2, heads=2, context=32)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(task, model: nn.Module, steps: int, batch_size: int, lr: float, warmup_steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def shape(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    generator, step = torch.Generator().manual_seed(0), 0
    while step < steps:
        for batch in DataLoader(task.datasets["train"], batch_size, shuffle=True, drop_last=True, generator=generator):
            task.loss(model(batch[0]), batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            step += 1
            if step == steps:
                return


@torch.no_grad()
def evaluate(task, model: nn.Module) -> dict[str, float]:
    model.eval()
    metrics = {name: build() for name, build in task.metrics.items()}
    total = count = 0
    for batch in DataLoader(task.datasets["val"], 64):
        output = model(batch[0])
        total += task.loss(output, batch).item() * len(batch[0])
        count += len(batch[0])
        for metric in metrics.values():
            metric.update(output, batch[1])
    return {"val.loss": total / count} | {f"val.{name}": metric.compute().item() for name, metric in metrics.items()}


def test_corpus_is_split_without_overlap():
    text = corpus()
    assert text.dtype == torch.uint8
    assert text.numel() > 300_000
    train_bytes, val_bytes = split(text, 0.1)
    assert torch.equal(torch.cat((train_bytes, val_bytes)), text)
    assert val_bytes.numel() == round(text.numel() * 0.1)


def test_windows_predict_the_next_token():
    windows = Windows(torch.arange(23, dtype=torch.uint8), context=4, stride=3)
    assert len(windows) == 7
    inputs, targets = windows[2]
    assert inputs.tolist() == [6, 7, 8, 9]
    assert targets.tolist() == [7, 8, 9, 10]
    assert inputs.dtype == targets.dtype == torch.int64
    assert windows[len(windows) - 1][1][-1] == 22
    with pytest.raises(IndexError):
        windows[7]
    with pytest.raises(ValueError, match="needs 24 tokens, the split has 23"):
        Windows(torch.arange(23), context=23, stride=1)


def test_validation_predicts_each_byte_once():
    task = build_task("lm", SMALL, {})
    targets = torch.cat([target for _, target in task.datasets["val"]])
    _, val_bytes = split(corpus(), 0.1)
    assert torch.equal(targets, val_bytes[1 : targets.numel() + 1].long())
    assert val_bytes.numel() - 1 - targets.numel() < SMALL["context"]


def test_stride_sets_the_number_of_training_windows():
    by_default = len(build_task("lm", SMALL, {}).datasets["train"])
    assert len(build_task("lm", SMALL, {"stride": 8}).datasets["train"]) == by_default
    assert len(build_task("lm", SMALL, {"stride": 32}).datasets["train"]) == pytest.approx(by_default / 4, abs=2)


def test_baselines_equal_their_definition():
    train_bytes = torch.tensor([7, 8, 7, 8, 7, 9], dtype=torch.uint8)
    val_bytes = torch.tensor([7, 8, 5], dtype=torch.uint8)
    unigram = {byte: (train_bytes.tolist().count(byte) + 1) / (6 + 256) for byte in range(256)}
    expected = -(math.log(unigram[7]) + math.log(unigram[8]) + math.log(unigram[5])) / 3
    assert unigram_loss(train_bytes, val_bytes) == pytest.approx(expected)
    # 7 is followed by 8 twice and by 9 once; 8 by 7 twice.
    after_7, after_8 = (2 + 5 * unigram[8]) / (3 + 5), (0 + 5 * unigram[5]) / (2 + 5)
    assert bigram_loss(train_bytes, val_bytes, prior=5.0) == pytest.approx(-(math.log(after_7) + math.log(after_8)) / 2)


def test_bigram_is_a_strong_baseline():
    train_bytes, val_bytes = split(corpus(), 0.1)
    pairs = torch.bincount(train_bytes[:-1].long() * 256 + train_bytes[1:].long(), minlength=65536).view(256, 256) + 1.0
    add_one = -(pairs / pairs.sum(1, keepdim=True)).log()[val_bytes[:-1].long(), val_bytes[1:].long()].mean()
    assert bigram_loss(train_bytes, val_bytes) < add_one < unigram_loss(train_bytes, val_bytes)


def test_lm_task():
    task = build_task("lm", SMALL, {})
    model = task.model()
    batch = next(iter(DataLoader(task.datasets["train"], 4)))
    assert task.tokens_per_sample == batch[0].shape[1] == 32
    expected = F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1])
    torch.testing.assert_close(task.loss(model(batch[0]), batch), expected)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in task.model().parameters())
    pickle.loads(pickle.dumps(task))


def test_lm_report():
    task = build_task("lm", SMALL, {})
    lines = task.report(task.model(), {"val.loss": 1.25})
    bigram = bigram_loss(*split(corpus(), 0.1))
    assert f"bigram {bigram:.3f}, this model 1.250" in lines[0]
    assert lines[-1].startswith('The "with" statement')
    assert len(task.report(None, {})) == 1


@pytest.mark.parametrize("name", ["decoder", "mlp"])
def test_default_settings_are_complete(name):
    config = OmegaConf.load(CONF / f"{name}.yaml")
    task = build_task({"decoder": "lm", "mlp": "digits"}[name], config, {})
    assert set(config) == set(vars(task.model.args[0]))


def test_digits_are_split_alike_and_standardised_by_train():
    datasets = build_task("digits", {}, {}).datasets
    train_x, train_y = datasets["train"].tensors
    val_x, val_y = datasets["val"].tensors
    assert train_x.dtype == torch.float32
    assert train_y.dtype == torch.int64
    assert (len(train_x), len(val_x)) == (1437, 360)
    shares = train_y.bincount() / len(train_y), val_y.bincount() / len(val_y)
    torch.testing.assert_close(*shares, atol=0.003, rtol=0)
    torch.testing.assert_close(train_x.mean(dim=0), torch.zeros(64), atol=1e-5, rtol=0)
    deviation = train_x.std(dim=0, correction=0)
    torch.testing.assert_close(deviation[deviation > 0], torch.ones(int((deviation > 0).sum())))
    assert torch.equal(build_task("digits", {}, {}).datasets["val"].tensors[0], val_x)


def test_digits_are_learnt():
    task = build_task("digits", OmegaConf.load(CONF / "mlp.yaml"), {})
    torch.manual_seed(0)
    model = task.model()
    train(task, model, steps=200, batch_size=64, lr=3e-3, warmup_steps=10)
    results = evaluate(task, model)
    assert results["val.accuracy"] > 0.94
    assert task.report(model, results) == [f"val.accuracy {results['val.accuracy']:.1%}, by chance 10%"]


def test_mlp_dropout_in_training_only():
    model, x = MLP(MLPConfig(dropout=0.5)), torch.randn(8, 64)
    assert model(x).shape == (8, 10)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.slow
def test_default_decoder_beats_the_bigram():
    task = build_task("lm", OmegaConf.load(CONF / "decoder.yaml"), {})
    torch.manual_seed(0)
    model = task.model()
    train(task, model, steps=80, batch_size=16, lr=3e-3, warmup_steps=20)
    assert evaluate(task, model)["val.loss"] < bigram_loss(*split(corpus(), 0.1)) - 0.1


@pytest.mark.parametrize(
    ("name", "model", "data", "error", "message"),
    [
        ("digit", {}, {}, ValueError, r"^task 'digit': no such task; did you mean 'digits'\?"),
        ("zzz", {}, {}, ValueError, "known are digits, lm"),
        ("lm", {"widht": 3}, {}, ValueError, r"^model\.widht=3: no such setting; did you mean 'width'\?"),
        ("lm", SMALL, {"strid": 3}, ValueError, r"^data\.strid=3: no such setting; did you mean 'stride'\?"),
        ("digits", {}, {"stride": 3}, ValueError, r"^data\.stride=3: no such setting"),
        ("lm", {"width": 8, "depth": 1}, {}, ValueError, r"^model\.heads, model\.context: missing"),
        ("lm", SMALL | {"width": "wide"}, {}, TypeError, r"^model\.width='wide': must be int, not str"),
        ("lm", SMALL | {"depth": True}, {}, TypeError, r"^model\.depth=True: must be int, not bool"),
        ("lm", SMALL | {"hidden": 1.5}, {}, TypeError, r"^model\.hidden=1\.5: must be int or null, not float"),
        ("lm", SMALL | {"vocab_size": 100}, {}, ValueError, r"^model\.vocab_size=100"),
        ("lm", SMALL, {"val_fraction": 1}, ValueError, r"^data\.val_fraction=1:"),
        ("lm", SMALL, {"stride": 0}, ValueError, r"^data\.stride=0:"),
        ("digits", {"inputs": 32}, {}, ValueError, r"^model\.inputs=32: the task digits has 64"),
        ("digits", {"depth": 0}, {}, ValueError, r"^model\.depth=0:"),
        ("digits", {"dropout": 1}, {}, ValueError, r"^model\.dropout=1:"),
    ],
)
def test_bad_settings_are_refused_by_name(name, model, data, error, message):
    with pytest.raises(error, match=message):
        build_task(name, model, data)
