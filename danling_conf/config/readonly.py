"""Read-only configuration objects that stay instances of the user's class.

`@dataclass(frozen=True)` cannot do this: the classes are the user's, and derived settings are set before freezing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, make_dataclass
from functools import cache
from typing import Any

from danling_conf.schema import RunnerConfig
from danling_conf.schema.open_mapping import plain_values, read_only
from danling_conf.schema.setting import OUTPUT_DIRECTORY, PLACED, READONLY, declared_class, open_keys

_PACKAGE = __name__.partition(".")[0] + "."


def freeze(config: Any) -> Any:
    """Make a configuration object and its sections read-only, in place, and return it.

    Undeclared keys of open sections become fields, so that `dataclasses.fields`, `asdict` and `hydra.utils.instantiate`
    see them. The object stays an instance of its class. Copies by `dataclasses.replace` are writable. The user's own
    mappings (`model`, `data`, keys of the app) become `OpenMapping`s, which are dicts; lists stay lists.
    """
    ours = not isinstance(config, RunnerConfig) and type(config).__module__.startswith(_PACKAGE)
    opened = open_keys(config)
    for name, value in list(vars(config).items()):
        if is_dataclass(value) and not isinstance(value, type):
            freeze(value)
        elif (not ours or name in opened) and not name.startswith("_"):
            config.__dict__[name] = read_only(value)
    # The class is swapped and not the object, so that references from other objects stay valid.
    kind = _readonly_class(declared_class(config), tuple(opened))
    object.__setattr__(config, "__class__", kind)
    config.__dict__[READONLY] = True
    return config


def place_output(config: Any, directory: str) -> None:
    """Replace what stands for Hydra's output directory in the settings of an app by the directory, in place."""
    if OUTPUT_DIRECTORY not in str(vars(config)):
        return
    config.__dict__[PLACED] = directory
    for name, value in list(vars(config).items()):
        if is_dataclass(value) and not isinstance(value, type):
            place_output(value, directory)
        elif not name.startswith("_"):
            config.__dict__[name] = replaced(value, OUTPUT_DIRECTORY, directory)


def replaced(value: Any, old: str, new: str) -> Any:
    """A value with one text in place of another in all strings in it."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, Mapping):
        return type(value)({key: replaced(inner, old, new) for key, inner in value.items()})  # type: ignore[call-arg]
    if isinstance(value, list):
        return [replaced(inner, old, new) for inner in value]
    return value


def writable(config: Any) -> Any:
    """A copy of a configuration object that can be changed, its mappings plain dicts, which OmegaConf reads."""
    made: Any = object.__new__(type(config))
    for name, value in vars(config).items():
        if name == READONLY:
            continue
        is_section = is_dataclass(value) and not isinstance(value, type)
        made.__dict__[name] = writable(value) if is_section else plain_values(value)
    return made


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
    if not extra:  # most sections: a class with the same fields, in a tenth of the time of a new dataclass
        return type(kind)(kind.__name__, (kind,), namespace)
    return make_dataclass(
        kind.__name__,
        [(name, Any, None) for name in extra],
        bases=(kind,),
        namespace=namespace,
        kw_only=True,
        eq=False,
    )
