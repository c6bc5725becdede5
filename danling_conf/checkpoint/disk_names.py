"""Names on disk of models of transformers: several families save other names, and other tensors, than they have in
memory.

transformers converts whole files before it fills a model. Here a tensor is converted when it is read, so that no rank
holds more than what makes up one of them. No family is known here by name: the mappings are those of the library.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from danling_conf.checkpoint import sources
from danling_conf.checkpoint.export import bare
from danling_conf.checkpoint.manifest import Broken
from danling_conf.checkpoint.sources import Source
from danling_conf.checkpoint.state import MODEL
from danling_conf.parallel.hugging_face import is_model


def in_memory(source: Source, path: Path, model: nn.Module) -> Source:
    """A source of files that others wrote, by the names of the model; itself where the model is not of transformers.

    Raises Broken where tensors that belong together do not fit each other.
    """
    model = bare(model)
    if not is_model(model) or source.content is None:
        return source
    content = {name.removeprefix(MODEL): item for name, item in source.content.items()}
    converted = _converted(path, _twin(model), content)
    return sources.of_content({f"{MODEL}{name}": item for name, item in converted.items()})


def _converted(path: Path, model: Any, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content by the names of the model; what the model does not have keeps its name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Any] = {}
    groups: dict[str, _Group] = {}
    # In the order of their numbers: experts are stacked as they come.
    for name in sorted(content, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        if renamed not in known:
            renamed, pattern = name, None
        if pattern is not None:
            group = groups.setdefault(renamed, _Group(path, model, renamed, by_pattern[pattern]))
            group.add(pattern, name, content[name])
        elif renamed in found:
            raise Broken(f"{path}: it holds {renamed} under two names, and {name} is one of them")
        else:
            found[renamed] = content[name]
    for group in groups.values():
        for name, blank in group.convert(on_meta=True).items():
            if name in found:
                raise Broken(f"{path}: it holds {name} twice: converted, and as it is in memory")
            found[name] = Converted(group, name, blank)
    return found


class _Group:
    """Tensors on disk that one conversion takes, and that make up one tensor of the model or several."""

    def __init__(self, path: Path, model: Any, name: str, converter: Any) -> None:
        self._path, self._model, self._name, self._converter = path, model, name, converter
        self._parts: list[tuple[str, str, Any]] = []

    def add(self, pattern: str, name: str, item: Any) -> None:
        """Add a tensor, by the pattern that its name matches."""
        self._parts.append((pattern, name, item))

    def convert(self, *, on_meta: bool) -> dict[str, Tensor]:
        """The model's tensors by name; on the meta device, they have shapes and no values. Raises Broken."""
        converter = copy.deepcopy(self._converter)
        for pattern, name, item in self._parts:
            shape, dtype = sources.shape_and_dtype(item)
            blank = torch.empty(shape, dtype=dtype, device="meta") if on_meta else item[...]
            converter.add_tensor(self._name, name, pattern, blank)
        try:
            made = converter.convert(self._name, model=self._model, config=self._model.config)
        except Exception as error:  # whatever the operations of the library make of tensors that do not fit
            names = f"{self._parts[0][1]} and {len(self._parts) - 1} more tensors"
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise Broken(f"{self._path}: {names} do not make up {self._name}: {reason}") from error
        return {name: item[0] if isinstance(item, list) else item for name, item in made.items()}


class Converted:
    """A tensor of the model that is converted when it is read.

    Attributes:
        shape, dtype: of the tensor.
    """

    def __init__(self, group: _Group, name: str, blank: Tensor) -> None:
        self._group, self._name = group, name
        self.shape, self.dtype = blank.shape, blank.dtype

    def __getitem__(self, where: Any) -> Tensor:
        return self._group.convert(on_meta=False)[self._name][where]


def _twin(model: Any) -> Any:
    """A model of the same class and configuration on the meta device: without what FSDP has made of its class, and with
    all that a stage of a pipeline lacks. The model itself where its class wants more than a configuration."""
    from torch.distributed.fsdp import FSDPModule

    kind: Any = next(item for item in type(model).__mro__ if not issubclass(item, FSDPModule))
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(model.config))
    except (TypeError, ValueError, AttributeError):
        return model
