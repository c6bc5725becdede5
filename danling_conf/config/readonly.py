"""Read-only configuration objects that stay instances of the user's class.

`@dataclass(frozen=True)` cannot do this: the classes are the user's, and derived settings are set before freezing.
"""

from __future__ import annotations

from dataclasses import is_dataclass, make_dataclass
from functools import cache
from typing import Any

from danling_conf.schema.setting import READONLY, declared_class, open_keys


def freeze(config: Any) -> Any:
    """Make a configuration object and its sections read-only, in place, and return it.

    Undeclared keys of open sections become fields, so that `dataclasses.fields`, `asdict` and `hydra.utils.instantiate`
    see them. The object stays an instance of its class. Copies by `dataclasses.replace` are writable. The user's own
    mappings and lists (`model`, `data`) stay plain `dict` and `list`, which libraries expect.
    """
    for value in vars(config).values():
        if is_dataclass(value) and not isinstance(value, type):
            freeze(value)
    # The class is swapped and not the object, so that references from other objects stay valid.
    kind = _readonly_class(declared_class(config), tuple(open_keys(config)))
    object.__setattr__(config, "__class__", kind)
    config.__dict__[READONLY] = True
    return config


def _set(self: Any, name: str, value: Any) -> None:
    if self.__dict__.get(READONLY):
        raise AttributeError(f"the configuration is read-only: {name} was set to {value!r} after it was resolved")
    object.__setattr__(self, name, value)


def _delete(self: Any, name: str) -> None:
    raise AttributeError(f"the configuration is read-only: {name} cannot be deleted")


def _reduce(self: Any) -> tuple[Any, ...]:
    # The read-only class is made at run time, so pickle cannot find it by its name: rebuild it from the user's class.
    values = {name: value for name, value in vars(self).items() if name != READONLY}
    return _rebuild, (declared_class(self), values)


def _rebuild(kind: type, values: dict[str, Any]) -> Any:
    config: Any = object.__new__(kind)
    config.__dict__.update(values)
    return freeze(config)


@cache
def _readonly_class(kind: type, extra: tuple[str, ...]) -> type:
    namespace = {
        "__setattr__": _set,
        "__delattr__": _delete,
        "__reduce__": _reduce,
        "__doc__": kind.__doc__,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        READONLY: False,
    }
    return make_dataclass(
        kind.__name__,
        [(name, Any, None) for name in extra],
        bases=(kind,),
        namespace=namespace,
        kw_only=True,
        eq=False,
    )
