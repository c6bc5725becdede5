"""Hands Hydra's plugin discovery the classes that live in danling_conf."""

from danling_conf.groups.plugin import DanlingSearchPath, NameSource

__all__ = ["DanlingSearchPath", "NameSource"]
