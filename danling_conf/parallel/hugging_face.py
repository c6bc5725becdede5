"""What models of Hugging Face's transformers say of themselves. No family of models is known here by name, and the
library is imported only when a model is one of its own."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from danling_conf.parallel.plan import owner
from danling_conf.topology.violation import ABSENT, SettingError

_numbers = itertools.count()
"""One for each attention that is registered: models on different meshes may live in one process."""

_UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")
"""Arguments of attention functions that ask for more than a causal mask."""


def is_model(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(model, library.PreTrainedModel)


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Of a plan: each row of a batch is one sequence. The library compares positions to find several in a row; where
    tensors have no values it takes it that there are, and makes a mask that costs memory in each block."""
    masks: Any = sys.modules.get("transformers.masking_utils")
    name = "find_packed_sequence_indices"
    with mock.patch.object(masks, name, return_value=None) if hasattr(masks, name) else nullcontext():
        yield


def prepare(model: nn.Module) -> None:
    """Set a model up for training: without the cache of keys and values, which generation alone reads and which neither
    recomputed nor pipelined blocks can keep. Parts of a model (T5's decoder) have configurations of their own."""
    if not is_model(model):
        return
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "use_cache"):
            config.use_cache = False


def tensor_divisors(model: nn.Module) -> dict[str, int]:
    """Numbers in the model's configuration that the tensor degree must divide, by their names."""
    if not is_model(model):
        return {}
    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    names = ("num_attention_heads", "num_key_value_heads")
    return {f"model.config.{name}": value for name in names if isinstance(value := getattr(config, name, None), int)}


def apply_style(model: nn.Module, name: str, style: str, mesh: DeviceMesh, *, is_parameter: bool) -> bool:
    """Apply a style of transformers to one of its modules or parameters; False where there is none of this name."""
    if not is_model(model):
        return False
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    if style not in ALL_PARALLEL_STYLES:
        return False
    made = ALL_PARALLEL_STYLES[style]
    if is_parameter:
        module, parameter = owner(model, name)
        made.validate_param(module, parameter, mesh, parameter_name=name)
        made.shard_param(module, parameter, mesh)
        return True
    module = model.get_submodule(name)
    if style == "mla_kv_a_proj":
        # Its split between keys and positions is in the configuration, which the style reads from the module.
        module.config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    made.install_forward(module, mesh)
    return True


def attend_to_parts(
    model: nn.Module,
    attention: Callable[..., Tensor],
    active: Callable[[], bool],
    on_call: Callable[[nn.Module], None] = lambda _: None,
    anywhere: Callable[[Tensor], Tensor] = lambda flag: flag,
) -> None:
    """Let every attention layer of the model call `attention(queries, keys, values, scale=)`, all of shape (batch,
    heads, sequence, features), while `active()`; else it computes as before. A layer that computes attention in its own
    code does not notice: `on_call` is called with each layer that does. `anywhere(flag)` is whether a flag is set on
    any rank that has a part of the batch.

    Raises SettingError for a model whose attention is more than causal (a sliding window).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config.get_text_config()  # type: ignore[operator,union-attr]
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        raise SettingError(
            "parallel.axes.context",
            ABSENT,
            f"{type(model).__name__} attends by {', '.join(sorted(kinds))}, and context parallelism to all that came "
            f"before",
            "set the degree to 1, or the model's sliding_window to null",
        )
    whole, whole_mask = ALL_ATTENTION_FUNCTIONS["sdpa"], ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if not active():
            return whole(module, query, key, value, mask, **options)
        on_call(module)
        if options.get("is_causal", getattr(module, "is_causal", True)) is False or key.shape[2] != query.shape[2]:
            raise SettingError(
                "parallel.axes.context",
                ABSENT,
                f"{type(module).__name__} attends to what comes later, or to another sequence, and context "
                f"parallelism to what came before",
                "set the degree to 1",
            )
        if mask is not None:
            raise SettingError(
                "parallel.axes.context",
                ABSENT,
                f"{type(module).__name__} is given a mask, and context parallelism masks only what comes later",
                "leave the mask out of the batch, or set the degree to 1",
            )
        given = [name for name in _UNSUPPORTED if options.get(name) is not None]
        if options.get("dropout") or given:
            asked = [*given, "dropout"] if options.get("dropout") else given
            raise SettingError(
                "parallel.axes.context",
                ABSENT,
                f"{type(module).__name__} asks for {' and '.join(asked)} in its attention, which context parallelism "
                f"does not do",
                "set the degree to 1, or switch it off",
            )
        return attention(query, key, value, scale=options.get("scaling")).transpose(1, 2).contiguous(), None

    def mask(*args: Any, **options: Any) -> Any:
        padding = options.get("attention_mask")
        if not active():
            return whole_mask(*args, **options)
        # Padding may be in another rank's part alone, and every rank has to refuse it.
        if padding is not None and bool(anywhere(~padding.all())):
            raise SettingError(
                "parallel.axes.context",
                ABSENT,
                "the batch has an attention_mask with padding, and context parallelism masks only what comes later",
                "use whole sequences of one length, or set the degree to 1",
            )
        return None

    name = f"danling_context_{next(_numbers)}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    model.set_attn_implementation(name)  # type: ignore[operator]
