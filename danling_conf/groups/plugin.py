"""Plugin classes that Hydra discovers: installing the package is all the registration that groups need."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

from danling_conf.groups.source import SCHEME, NameSource

PROVIDER = "danling-conf"


class DanlingSearchPath(SearchPathPlugin):
    """Appends our source to every app's search path, after the app's own directories."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        path = f"{SCHEME}://"
        # Hydra 1.4 finds the plugin twice, by its entry point and in the namespace package; 1.3 only finds the latter.
        if all(element.path != path for element in search_path.get_path()):
            search_path.append(PROVIDER, path)


__all__ = ["DanlingSearchPath", "NameSource"]
