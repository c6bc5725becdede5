"""How settings are named: layout names, presets, base configs, and their one registration with Hydra."""

from danling_conf.groups.base import register
from danling_conf.groups.layout_names import LayoutNameError, name_of, parse_layout

__all__ = ["LayoutNameError", "name_of", "parse_layout", "register"]
