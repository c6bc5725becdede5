"""Open mapping: the read-only form of settings that an app declares in its files, such as `model` and `data`.

Apps of Hydra read `config.model.width`, and libraries expect a `dict`: this is both. OmegaConf takes no subclass of
dict, `plain_values` makes what it takes; `hydra.utils.instantiate` takes an open mapping as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from danling_conf.schema.nearest import nearest


class OpenMapping(dict[str, Any]):
    """A read-only dict whose keys are attributes too. `dict(mapping)` is a writable copy of its first level.

    A key that is named like a method of dict (`items`, `copy`) is read by `mapping["items"]`.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            near = nearest(name, map(str, self), cutoff=0.6)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(map(str, self)) or 'no keys'}"
            raise AttributeError(f"there is no setting {name!r} here; {hint}") from None

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *map(str, self)})

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("the configuration is read-only: take a copy of this mapping, dict(...), and change that")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"the configuration is read-only: {name} was set to {value!r} after it was resolved")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"the configuration is read-only: {name} cannot be deleted")

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenMapping, (dict(self),)  # pickle fills a dict through __setitem__ otherwise


def read_only(value: Any) -> Any:
    """A value with all mappings in it as open mappings."""
    if isinstance(value, Mapping):
        return OpenMapping({key: read_only(inner) for key, inner in value.items()})
    if isinstance(value, list):
        return [read_only(inner) for inner in value]
    return value


def plain_values(value: Any) -> Any:
    """The reverse of `read_only`: a copy with all mappings in it as plain, writable dicts."""
    if isinstance(value, Mapping):
        return {key: plain_values(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain_values(inner) for inner in value]
    return value
