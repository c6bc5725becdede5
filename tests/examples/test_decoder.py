"""The decoder computes what it says, and every seam that a parallel axis uses leaves the result as it is."""

from __future__ import annotations

import copy
import fnmatch
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoder import Attention, Block, Decoder, DecoderConfig, RotaryEmbedding
from models.experts import MixtureOfExperts

DENSE = dict(width=32, depth=2, heads=4, context=16, vocab_size=64)
GROUPED = DENSE | dict(kv_heads=2)
EXPERTS = DENSE | dict(experts=4, hidden=32)
VARIANTS = pytest.mark.parametrize("settings", [DENSE, GROUPED, EXPERTS], ids=["dense", "grouped", "experts"])


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from threads, which on a busy machine spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(seed: int = 0, **settings) -> Decoder:
    torch.manual_seed(seed)
    return Decoder(DecoderConfig(**settings))


def tokens(batch: int = 2, sequence: int = 16, seed: int = 1) -> Tensor:
    return torch.randint(0, 64, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@VARIANTS
def test_a_position_sees_itself_and_what_came_before(settings):
    model, inputs = build(**settings), tokens()
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 64
    before, after = model(inputs), model(changed)
    assert before.shape == (2, 16, 64)
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert ((after - before).abs().amax(dim=-1)[:, 9:] > 1e-4).all()


def test_grouped_heads_equal_repeated_ones():
    grouped = Attention(DecoderConfig(**GROUPED))
    whole = Attention(DecoderConfig(**DENSE))
    state = grouped.state_dict()
    for name in ("wk.weight", "wv.weight"):
        state[name] = state[name].unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    whole.load_state_dict(state)
    x, positions = torch.randn(2, 16, 32), torch.arange(16)
    torch.testing.assert_close(grouped(x, positions), whole(x, positions))


def test_attention_depends_on_distances_only():
    model, inputs = build(**DENSE), tokens()
    logits, positions = model(inputs), torch.arange(16)
    torch.testing.assert_close(model(inputs, positions + 100), logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(inputs, positions.expand(2, -1)), logits)
    assert (model(inputs, positions * 3) - logits).abs().max() > 1e-2


def test_rotary_part_of_a_sequence_by_its_positions():
    rotary, x, positions = RotaryEmbedding(8, 10000.0), torch.randn(2, 16, 4, 8), torch.arange(16)
    part = torch.tensor([0, 1, 14, 15])
    torch.testing.assert_close(rotary(x[:, part], positions[part]), rotary(x, positions)[:, part])
    torch.testing.assert_close(rotary(x, positions).norm(dim=-1), x.norm(dim=-1))
    # The first pair of features turns by one radian a position.
    turned = rotary(torch.eye(8)[0].view(1, 1, 1, 8), torch.tensor([1]))[0, 0, 0]
    torch.testing.assert_close(turned[[0, 4]], torch.tensor([math.cos(1), math.sin(1)]))


def test_mixture_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(width=32, hidden=48, experts=4, experts_per_token=2)
    x = torch.randn(2, 5, 32, requires_grad=True)
    router, experts = mixture.router, mixture.experts
    expected, load = [], torch.zeros(4, dtype=torch.int64)
    for token in x.flatten(0, 1):
        probabilities, chosen = F.linear(token, router.weight).softmax(dim=-1).topk(2)
        output = torch.zeros(32)
        for weight, index in zip(probabilities / probabilities.sum(), chosen.tolist(), strict=True):
            hidden = F.silu(experts.w1[index] @ token) * (experts.w3[index] @ token)
            output = output + weight * (experts.w2[index] @ hidden)
            load[index] += 1
        expected.append(output)
    expected = torch.stack(expected).view(2, 5, 32)
    actual = mixture(x)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(router.load, load)
    # One forward pass's load, not a sum: recomputing the pass must not count twice.
    mixture(x)
    assert torch.equal(router.load, load)

    inputs = [x, *mixture.parameters()]
    probe = torch.randn(2, 5, 32)
    for ours, reference in zip(
        torch.autograd.grad((actual * probe).sum(), inputs),
        torch.autograd.grad((expected * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)


def test_mixture_with_idle_experts():
    torch.manual_seed(0)
    mixture = MixtureOfExperts(width=32, hidden=48, experts=4, experts_per_token=1)
    with torch.no_grad():
        mixture.router.weight.zero_()
        mixture.router.weight[2] = 1
    x = torch.rand(1, 6, 32)
    output = mixture(x)
    assert mixture.router.load.tolist() == [0, 0, 6, 0]
    output.square().sum().backward()
    assert mixture.experts.w1.grad[[0, 1, 3]].abs().max() == 0
    assert mixture.experts.w1.grad[2].abs().max() > 0


@VARIANTS
def test_initialised_module_by_module_from_meta(settings):
    eager = build(**settings)
    with torch.device("meta"):
        model = Decoder(DecoderConfig(**settings))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(-1 if tensor.dtype == torch.int64 else float("nan"))
    for name, module in model.named_modules():
        own = {*module.parameters(recurse=False), *module.buffers(recurse=False)}
        if not own:
            continue
        others = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor not in own]
        before = [tensor.detach().clone() for tensor in others]
        module.reset_parameters()
        assert all((tensor.isfinite().all() and (tensor >= 0).all()) or tensor.std() > 0 for tensor in own), name
        for tensor, old in zip(others, before, strict=True):
            torch.testing.assert_close(tensor.detach(), old, equal_nan=True, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        reference = eager.get_parameter(name)
        torch.testing.assert_close(parameter.std(), reference.std(), rtol=0.15, atol=1e-3)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, eager.get_buffer(name))
    assert not set(dict(model.named_buffers())) & set(model.state_dict())
    assert model(tokens()).isfinite().all()


def test_tied_embeddings():
    model = build(**DENSE, tie_embeddings=True)
    assert model.head.weight is model.embedding.weight
    assert build(**DENSE).head.weight is not build(**DENSE).embedding.weight
    model.to_empty(device="cpu")
    model.tie_weights()
    assert model.head.weight is model.embedding.weight


def test_dropout_in_training_only():
    model, inputs = build(**DENSE, dropout=0.5), tokens()
    assert not torch.equal(model(inputs), model(inputs))
    model.eval()
    assert torch.equal(model(inputs), model(inputs))


@VARIANTS
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_compile_whole(settings, backend):
    torch._dynamo.reset()
    block = Block(DecoderConfig(**settings))
    compiled = copy.deepcopy(block)
    compiled.compile(backend=backend, fullgraph=True)
    x, positions = torch.randn(2, 16, 32), torch.arange(16)
    expected, actual = block(x, positions), compiled(x, positions)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    reference = gradients(block, expected.square().mean())
    for name, gradient in gradients(compiled, actual.square().mean()).items():
        torch.testing.assert_close(gradient, reference[name], atol=1e-5, rtol=1e-4)
    for name, buffer in compiled.named_buffers():
        assert torch.equal(buffer, block.get_buffer(name))


def test_generate_is_the_forward_pass_again_and_again():
    model, prompt = build(**DENSE), tokens(batch=3, sequence=5)
    expected = prompt
    for _ in range(20):
        expected = torch.cat((expected, model(expected[:, -16:])[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(prompt, 20, temperature=0), expected)
    assert model.training

    def sample(seed: int, temperature: float) -> Tensor:
        return model.generate(prompt, 20, temperature, torch.Generator().manual_seed(seed))

    assert torch.equal(sample(0, 1.0), sample(0, 1.0))
    assert not torch.equal(sample(0, 1.0), sample(1, 1.0))
    assert torch.equal(sample(0, 1e-4), expected)


def test_generate_refuses():
    model = build(**DENSE)
    with pytest.raises(ValueError, match="prompt"):
        model.generate(torch.empty(1, 0, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="temperature=-1"):
        model.generate(tokens(), 1, temperature=-1)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(ValueError, match=r"model\.context=16: got a sequence of 17"):
        build(**DENSE)(tokens(sequence=17))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (dict(width=30), "heads=4"),
        (dict(width=36), "heads=4"),
        (dict(kv_heads=3), "kv_heads=3"),
        (dict(kv_heads=0), "kv_heads=0"),
        (dict(depth=0), "depth=0"),
        (dict(dropout=1.0), r"dropout=1\.0"),
        (dict(rope_base=0.0), r"rope_base=0\.0"),
        (dict(experts=-1), "experts=-1"),
        (dict(experts=1), "experts_per_token=2"),
    ],
)
def test_settings_that_cannot_be(change, where):
    with pytest.raises(ValueError, match=rf"^model\.{where}:"):
        DecoderConfig(**DENSE | change)


def test_hidden_is_derived_for_the_cost_of_a_plain_layer():
    assert DecoderConfig(**DENSE).num_hidden == 96
    assert DecoderConfig(**DENSE | dict(width=128)).num_hidden == 352
    assert DecoderConfig(**DENSE | dict(hidden=10)).num_hidden == 10


def test_tp_plan_covers_every_matrix():
    names = {
        name.removesuffix(".weight") for name, parameter in build(**DENSE).named_parameters() if parameter.ndim == 2
    }
    matched = {pattern: fnmatch.filter(names, pattern) for pattern in Decoder.tp_plan}
    assert all(matched.values())
    assert {name for found in matched.values() for name in found} == names
