"""Groups: names of layouts, presets and base configs, and the config source where Hydra finds them."""

from danling_conf.groups.base import register
from danling_conf.groups.layout_names import LayoutNameError, name_of, parse_layout

__all__ = ["LayoutNameError", "name_of", "parse_layout", "register"]
