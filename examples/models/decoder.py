"""A byte-level decoder: pre-norm blocks of rotary grouped-query attention and SwiGLU, or a mixture of experts.

Parallel axes join it by its plans. Tensor: `tp_plan` names the projections to shard, `sequence_plan` what changes when
the layers between them share the sequence. Context: tokens of a sequence meet in `inner_attention` only (`cp_plan`),
and `positions` says where they stand. Expert: `experts` takes rows already sorted by expert (`ep_plan`). A pipeline
needs no plan: it cuts between `layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.experts import MixtureOfExperts


@dataclass(kw_only=True)
class DecoderConfig:
    """Settings of a `Decoder`.

    Raises:
        ValueError: for a value that no decoder can be built from; the message names `model.<setting>`.
    """

    width: int
    """Features of the residual stream."""
    depth: int
    """Number of blocks."""
    heads: int
    """Query heads; `width / heads` features each, an even number."""
    kv_heads: int | None = None
    """Key and value heads, each shared by `heads / kv_heads` query heads (https://arxiv.org/abs/2305.13245). None: one
    for each query head."""
    hidden: int | None = None
    """Hidden features of the feed-forward layer, or of each expert. None: 8/3 of `width`, rounded up to a multiple of
    32 (three matrices then cost what two of 4 x width would, https://arxiv.org/abs/2002.05202)."""
    context: int
    """Longest sequence, in tokens."""
    vocab_size: int = 256
    """Number of token ids; 256 for bytes."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies (https://arxiv.org/abs/2104.09864)."""
    dropout: float = 0.0
    """Probability of dropping an output of attention or feed-forward, before it is added to the residual stream."""
    tie_embeddings: bool = False
    """Let the head use the embedding's weight. Not for a pipeline: the two are on different stages."""
    experts: int = 0
    """Experts of each block's feed-forward layer. 0: a plain one."""
    experts_per_token: int = 2
    """Experts that each token is sent to; needs `experts`."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "kv_heads", "hidden", "context", "vocab_size", "experts_per_token"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name}={value}: must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.heads={self.heads}: model.width={self.width} must be a multiple of 2 x heads, since rotary"
                " embeddings turn pairs of a head's features; choose another number of heads"
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads}: must divide model.heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout}: a probability, 0 or more and less than 1")
        if self.rope_base <= 0:
            raise ValueError(f"model.rope_base={self.rope_base}: must be larger than 0")
        if self.experts < 0:
            raise ValueError(f"model.experts={self.experts}: must be at least 0 (0: a plain feed-forward layer)")
        if 0 < self.experts < self.experts_per_token:
            raise ValueError(
                f"model.experts_per_token={self.experts_per_token}: more than there are experts"
                f" (model.experts={self.experts})"
            )

    @property
    def num_kv_heads(self) -> int:
        """`kv_heads`, or its default."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def num_hidden(self) -> int:
        """`hidden`, or its default."""
        return -(-8 * self.width // (3 * 32)) * 32 if self.hidden is None else self.hidden


class Embedding(nn.Embedding):
    """Token embedding whose weight can also serve as the head's: drawn with the standard deviation of a `Linear`."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)


class Linear(nn.Linear):
    """Linear map without bias that keeps the variance of its input, times `gain` squared."""

    def __init__(self, in_features: int, out_features: int, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.gain * self.in_features**-0.5)


class RotaryEmbedding(nn.Module):
    """Turns pairs of features by angles proportional to the position (https://arxiv.org/abs/2104.09864)."""

    frequencies: Tensor

    def __init__(self, features: int, base: float) -> None:
        super().__init__()
        self.features = features
        self.base = base
        self.register_buffer("frequencies", torch.empty(features // 2, dtype=torch.float32), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        exponents = torch.arange(0, self.features, 2, dtype=torch.float32, device=self.frequencies.device)
        self.frequencies.copy_(self.base ** (-exponents / self.features))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn (batch, sequence, heads, features) by positions of shape (sequence,) or (batch, sequence)."""
        angles = (positions[..., None] * self.frequencies)[..., None, :]
        cos, sin = angles.cos(), angles.sin()
        left, right = x.float().chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x)


class InnerAttention(nn.Module):
    """Causal attention itself, without parameters, so that an axis over the sequence can replace or hook it."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(batch, heads, sequence, features), keys and values with as many or fewer heads -> like `queries`."""
        grouped = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=grouped)


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_features = config.width // config.heads
        kv_width = config.num_kv_heads * self.head_features
        self.wq = Linear(config.width, config.width)
        self.wk = Linear(config.width, kv_width)
        self.wv = Linear(config.width, kv_width)
        self.wo = Linear(config.width, config.width, gain=(2 * config.depth) ** -0.5)
        self.rotary = RotaryEmbedding(self.head_features, config.rope_base)
        self.inner_attention = InnerAttention()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        # The number of heads is read off the projections: a tensor-parallel rank holds only some of them.
        queries, keys, values = (w(x).unflatten(-1, (-1, self.head_features)) for w in (self.wq, self.wk, self.wv))
        queries, keys = self.rotary(queries, positions), self.rotary(keys, positions)
        mixed = self.inner_attention(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        return self.wo(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer: w2(silu(w1 x) * w3 x) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = Linear(config.width, config.num_hidden)
        self.w2 = Linear(config.num_hidden, config.width, gain=(2 * config.depth) ** -0.5)
        self.w3 = Linear(config.width, config.num_hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each on the normed residual stream and added to it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-5)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=1e-5)
        if config.experts:
            self.feed_forward: nn.Module = MixtureOfExperts(
                config.width,
                config.num_hidden,
                config.experts,
                config.experts_per_token,
                output_gain=(2 * config.depth) ** -0.5,
            )
        else:
            self.feed_forward = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(batch, sequence, width) at positions (sequence,) or (batch, sequence) -> (batch, sequence, width)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), positions))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class Decoder(nn.Module):
    """Predicts the next token at each position.

    Every module with parameters or buffers of its own has `reset_parameters`, which sets just those: a decoder that was
    built on the meta device is initialised module by module, then by `tie_weights`.
    """

    tp_plan: ClassVar[dict[str, str]] = {
        "embedding": "embedding_rowwise",
        "layers.*.attention.wq": "colwise",
        "layers.*.attention.wk": "colwise",
        "layers.*.attention.wv": "colwise",
        "layers.*.attention.wo": "rowwise",
        "layers.*.feed_forward.w1": "colwise",
        "layers.*.feed_forward.w2": "rowwise",
        "layers.*.feed_forward.w3": "colwise",
        "head": "colwise_gather_output",
    }
    """How the tensor axis shards each module, in the names and styles of Hugging Face's plans. A mixture of experts is
    left whole: its expert axes shard it."""

    cp_plan: ClassVar[dict[str, str]] = {"layers.*.attention.inner_attention": "causal_attention"}
    """What reaches over the context axis."""

    ep_plan: ClassVar[dict[str, str]] = {
        "layers.*.feed_forward.router": "router",
        "layers.*.feed_forward.experts": "grouped_experts",
        "layers.*.feed_forward.experts.w1": "colwise",
        "layers.*.feed_forward.experts.w2": "rowwise",
        "layers.*.feed_forward.experts.w3": "colwise",
    }
    """What the expert axes deal out, and how expert-tensor ranks share an expert."""

    @property
    def sequence_plan(self) -> dict[str, str]:
        """What changes in `tp_plan` when activations between the sharded layers are split along the sequence."""
        plan = {
            "embedding": "embedding_rowwise_sequence",
            "layers.*.attention_norm": "sequence_parallel",
            "layers.*.attention": "gather_sequence",
            "layers.*.attention.wo": "rowwise_sequence",
            "layers.*.feed_forward_norm": "sequence_parallel",
            "norm": "sequence_parallel",
            "head": "colwise_gather_output_sequence",
        }
        if self.config.experts:
            return {**plan, "layers.*.feed_forward": "whole_sequence"}
        return {**plan, "layers.*.feed_forward": "gather_sequence", "layers.*.feed_forward.w2": "rowwise_sequence"}

    @property
    def tensor_divisors(self) -> dict[str, int]:
        """What the tensor degree must divide, by the names of the settings."""
        return {"model.heads": self.config.heads, "model.kv_heads": self.config.num_kv_heads}

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = nn.RMSNorm(config.width, eps=1e-5)
        self.head = Linear(config.width, config.vocab_size)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Let the head use the embedding's weight again, if so configured; `to_empty` parts them."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (batch, sequence, vocab_size) of the token after each.

        Args:
            tokens: (batch, sequence) int64.
            positions: (sequence,) or (batch, sequence), where `tokens` are not the start of their sequences.

        Raises:
            ValueError: for a sequence longer than the context.
        """
        if tokens.shape[1] > self.config.context:
            raise ValueError(
                f"model.context={self.config.context}: got a sequence of {tokens.shape[1]} tokens; shorten it, or train"
                " with a longer context"
            )
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x, positions)
        return self.head(self.norm(x))

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, length: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Continue each prompt: (batch, sequence) -> (batch, sequence + length), int64.

        Ranks that share a sharded model call this together, with generators of one seed.

        Args:
            length: tokens to add; each sees at most the `context` tokens before it.
            temperature: divides the logits; 0 takes the most probable token.
            generator: of the random draws, on the CPU. None: torch's default one.

        Raises:
            ValueError: for an empty prompt or a negative temperature.
        """
        if prompt.shape[1] == 0:
            raise ValueError("prompt: has no tokens to continue; give at least one")
        if temperature < 0:
            raise ValueError(f"temperature={temperature}: must be at least 0 (0 takes the most probable token)")
        training = self.training
        self.eval()
        tokens = prompt
        try:
            for _ in range(length):
                seen = tokens[:, -self.config.context :]
                # Attention is causal, so that padding on the right changes nothing, and one shape compiles only once.
                padded = F.pad(seen, (0, self.config.context - seen.shape[1]))
                logits = self(padded)[:, seen.shape[1] - 1].float().cpu()
                if temperature == 0:
                    chosen = logits.argmax(dim=-1, keepdim=True)
                else:
                    chosen = torch.multinomial((logits / temperature).softmax(dim=-1), 1, generator=generator)
                tokens = torch.cat((tokens, chosen.to(tokens.device)), dim=1)
        finally:
            self.train(training)
        return tokens
