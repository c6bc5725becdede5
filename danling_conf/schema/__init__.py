"""Schema of a run's settings: dataclasses with a doc under every field, the only source of types, defaults and docs."""

from danling_conf.schema.layout import FILL, Layout
from danling_conf.schema.runner import RunnerConfig
from danling_conf.schema.setting import Facts, declared_class, defaults_of, facts_of, notes_of, open_keys, setting

__all__ = [
    "FILL",
    "Facts",
    "Layout",
    "RunnerConfig",
    "declared_class",
    "defaults_of",
    "facts_of",
    "notes_of",
    "open_keys",
    "setting",
]
