"""Models of other people, small: families of transformers, and modules of torch in ways that users write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, LENGTH, VOCABULARY, IMAGE, CLASSES = 32, 4, 4, 16, 48, 32, 5

_USUAL = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": LENGTH, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_KV = {"num_key_value_heads": 2, "head_dim": WIDTH // HEADS}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_BERT = {**_NO_DROPOUT, "type_vocab_size": 2}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_IMAGE = {"image_size": IMAGE, "patch_size": 8, "num_channels": 3, "num_labels": CLASSES, **_NO_DROPOUT}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "decoder_start_token_id": 1, "bos_token_id": 1,
    "eos_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": HEADS,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
_SPEECH = {
    "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0, "layerdrop": 0.0,
    "mask_time_prob": 0.0, "num_labels": CLASSES, "classifier_proj_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A model of transformers and what it is called with."""

    config: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: str = "tokens"
    """`tokens`, `image`, `speech`, `features` (of a spectrogram), or `pair` (tokens of two sequences)."""
    usual: bool = True
    """Whether the configuration has the numbers that most have."""

    def build(self) -> nn.Module:
        import transformers

        config = getattr(transformers, self.config)(**{**(_USUAL if self.usual else {}), **self.settings})
        return getattr(transformers, self.model)(config)  # type: ignore[no-any-return]

    def batch(self, size: int, seed: int) -> dict[str, Tensor]:
        """Inputs by keyword, and `targets`."""
        generator = torch.Generator().manual_seed(seed)

        def tokens() -> Tensor:
            return torch.randint(3, VOCABULARY, (size, LENGTH), generator=generator)

        def classes() -> Tensor:
            return torch.randint(CLASSES, (size,), generator=generator)

        def noise(*shape: int) -> Tensor:
            return torch.randn(size, *shape, generator=generator)

        if self.inputs == "image":
            return {"pixel_values": noise(3, IMAGE, IMAGE), "targets": classes()}
        if self.inputs == "speech":
            return {"input_values": noise(256), "targets": classes()}
        if self.inputs == "features":
            return {"input_features": noise(8, 32), "decoder_input_ids": tokens(), "targets": tokens()}
        if self.inputs == "pair":
            return {"input_ids": tokens(), "decoder_input_ids": tokens(), "targets": tokens()}
        return {"input_ids": tokens(), "targets": tokens()}


_DROPLESS = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_GPT2 = {
    "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": LENGTH, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}  # fmt: skip


def _decoder(name: str, suffix: str = "ForCausalLM", **settings: Any) -> Family:
    return Family(f"{name}Config", f"{name}{suffix}", settings)


FAMILIES = {
    "Llama": _decoder("Llama", **_KV),
    "Qwen3": _decoder("Qwen3", **_KV),
    "Gemma": _decoder("Gemma", **_KV),
    "Phi": _decoder("Phi", resid_pdrop=0.0, embd_pdrop=0.0, attention_dropout=0.0),
    "Granite": _decoder("Granite", embedding_multiplier=3.0, logits_scaling=2.0, **_KV),
    "StableLm": _decoder("StableLm", **_KV),
    "GPT-2": _decoder("GPT2", "LMHeadModel", **_GPT2),
    "OpenAI GPT": _decoder("OpenAIGPT", "LMHeadModel", **_GPT2),
    "GPT-Neo": _decoder(
        "GPTNeo", num_layers=LAYERS, num_heads=HEADS, attention_types=[[["global", "local"], 2]], window_size=8,
        embed_dropout=0.0, resid_dropout=0.0, attention_dropout=0.0,
    ),
    "GPT-NeoX": _decoder("GPTNeoX", hidden_dropout=0.0, attention_dropout=0.0),
    "GPT-J": _decoder("GPTJ", **_GPT2, rotary_dim=4),
    "CodeGen": _decoder("CodeGen", **_GPT2, rotary_dim=4),
    "OPT": _decoder("OPT", word_embed_proj_dim=WIDTH, ffn_dim=48, layerdrop=0.0, **_DROPLESS),
    "BLOOM": _decoder("Bloom", n_layer=LAYERS, n_head=HEADS, hidden_dropout=0.0, attention_dropout=0.0),
    "Falcon": _decoder("Falcon", hidden_dropout=0.0, attention_dropout=0.0),
    "MPT": _decoder("Mpt", d_model=WIDTH, n_heads=HEADS, n_layers=LAYERS, max_seq_len=LENGTH, expansion_ratio=2),
    "XGLM": _decoder("XGLM", d_model=WIDTH, ffn_dim=48, num_layers=LAYERS, attention_heads=HEADS, **_DROPLESS),
    "BioGPT": _decoder("BioGpt", layerdrop=0.0, activation_dropout=0.0, **_NO_DROPOUT),
    "Mixtral": _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2, **_KV),
    "Qwen3-MoE": _decoder("Qwen3Moe", num_experts=4, **_EXPERTS, **_KV),
    "Llama 4": Family(
        "Llama4TextConfig", "Llama4ForCausalLM",
        {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": LENGTH,
         "interleave_moe_layer_step": 2, **_KV},
    ),
    "Mamba": _decoder("Mamba", state_size=8, num_hidden_layers=LAYERS),
    "Mamba-2": _decoder("Mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    "BERT": _decoder("Bert", "ForMaskedLM", **_BERT),
    "RoBERTa": _decoder("Roberta", "ForMaskedLM", **{**_BERT, "max_position_embeddings": LENGTH + 2}),
    "ALBERT": _decoder("Albert", "ForMaskedLM", embedding_size=16, **_BERT),
    "ELECTRA": _decoder("Electra", "ForMaskedLM", embedding_size=WIDTH, **_BERT),
    "DistilBERT": _decoder(
        "DistilBert", "ForMaskedLM", dim=WIDTH, hidden_dim=48, n_layers=LAYERS, n_heads=HEADS, dropout=0.0,
        attention_dropout=0.0,
    ),
    "DeBERTa": _decoder("DebertaV2", "ForMaskedLM", **_BERT),
    "ModernBERT": _decoder("ModernBert", "ForMaskedLM", bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "T5": Family("T5Config", "T5ForConditionalGeneration", _T5, "pair"),
    "BART": Family("BartConfig", "BartForConditionalGeneration", _BART, "pair"),
    "Pegasus": Family("PegasusConfig", "PegasusForConditionalGeneration", _BART, "pair"),
    "Whisper": Family(
        "WhisperConfig", "WhisperForConditionalGeneration",
        {**_BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": LENGTH}, "features",
    ),
    "ViT": Family("ViTConfig", "ViTForImageClassification", _IMAGE, "image"),
    "DeiT": Family("DeiTConfig", "DeiTForImageClassification", _IMAGE, "image"),
    "BEiT": Family("BeitConfig", "BeitForImageClassification", {**_IMAGE, "drop_path_rate": 0.0}, "image"),
    "Swin": Family(
        "SwinConfig", "SwinForImageClassification",
        {**_IMAGE, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4,
         "drop_path_rate": 0.0}, "image", usual=False,
    ),
    "ConvNeXt": Family(
        "ConvNextConfig", "ConvNextForImageClassification",
        {**_IMAGE, "hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "drop_path_rate": 0.0}, "image",
        usual=False,
    ),
    "ResNet": Family(
        "ResNetConfig", "ResNetForImageClassification",
        {"num_labels": CLASSES, "embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
        "image", usual=False,
    ),
    "Wav2Vec2": Family("Wav2Vec2Config", "Wav2Vec2ForSequenceClassification", _SPEECH, "speech"),
    "HuBERT": Family("HubertConfig", "HubertForSequenceClassification", _SPEECH, "speech"),
}  # fmt: skip
"""Decoders, mixtures of experts, state space, encoders, encoder-decoders, vision and speech."""


class ConvBlock(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class ConvNet(nn.Module):
    """A ResNet, initialised as torchvision's: by kind of module, after all are made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(8) for _ in range(4))
        self.head = nn.Linear(8, CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    """Blocks down, blocks up, and skips from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = nn.ModuleList(ConvBlock(8) for _ in range(2))
        self.up = nn.ModuleList(ConvBlock(8) for _ in range(2))
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = nn.functional.avg_pool2d(x, 2)
        for block in self.up:
            x = nn.functional.interpolate(x, scale_factor=2)
            x = block(x + skips.pop())
        return self.head(x)


class Recurrent(nn.Module):
    """An LSTM with orthogonal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.cells = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for name, parameter in self.cells.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
            elif "bias" in name:
                nn.init.zeros_(parameter)
                parameter.data[WIDTH : 2 * WIDTH].fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(self.embedding(x))[0])


class Seq2Seq(nn.Module):
    """torch's own transformer, whose layers are deep copies of one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.transformer = nn.Transformer(WIDTH, HEADS, 2, 2, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embedding(x)
        return self.head(self.transformer(embedded, embedded))


class Handmade(nn.Module):
    """Parameters and buffers that a constructor computes: by torch.randn, from lists, from numpy, one from another."""

    def __init__(self) -> None:
        super().__init__()
        import numpy

        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0]).repeat(WIDTH // 2))
        self.bias = nn.Parameter(torch.Tensor(WIDTH).uniform_(-0.1, 0.1))
        self.low = nn.Parameter(torch.linalg.qr(torch.randn(WIDTH, 4)).Q)
        self.register_buffer("positions", torch.arange(LENGTH).float()[:, None] / torch.linspace(1, 9, WIDTH))
        self.register_buffer("noise", torch.from_numpy(numpy.random.rand(WIDTH)).float())
        self.register_buffer("copied", self.weight.detach()[0].clone())
        self.register_buffer("order", torch.randperm(WIDTH), persistent=False)
        self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 3)]
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)
        nn.init.trunc_normal_(self.inner.weight, std=0.02)
        with torch.no_grad():
            self.inner.weight[0] = self.weight[1]
            self.inner.bias.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.weight * self.scale + self.bias + self.noise * self.rates[1] + (x @ self.low) @ self.low.T
        return self.head(self.inner(x[:, self.order]))


class Tied(nn.Module):
    """An embedding that is the head too, drawn by the one and then by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def lora() -> nn.Module:
    """A frozen Llama with adapters of low rank, by peft."""
    import peft

    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, init_lora_weights="gaussian")
    return peft.get_peft_model(FAMILIES["Llama"].build(), settings)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "ConvNet": ConvNet, "U-Net": UNet, "LSTM": Recurrent, "nn.Transformer": Seq2Seq, "Handmade": Handmade,
    "Tied": Tied, "LoRA (peft)": lora,
}  # fmt: skip


def module_batch(name: str, size: int, seed: int) -> dict[str, Tensor]:
    """Inputs and `targets` of one of the `MODULES`."""
    if name == "LoRA (peft)":
        return FAMILIES["Llama"].batch(size, seed)
    generator = torch.Generator().manual_seed(seed)
    if name in ("ConvNet", "U-Net"):
        images = torch.randn(size, 3, 8, 8, generator=generator)
        classes = torch.randint(CLASSES, (size,), generator=generator)
        return {"x": images, "targets": classes if name == "ConvNet" else images.flip(3)}
    if name == "Handmade":
        x = torch.randn(size, WIDTH, generator=generator)
        return {"x": x, "targets": torch.randint(CLASSES, (size,), generator=generator)}
    return {
        "x": torch.randint(VOCABULARY, (size, LENGTH), generator=generator),
        "targets": torch.randint(VOCABULARY, (size, LENGTH), generator=generator),
    }
