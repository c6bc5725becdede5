"""Composer: adapter of Hydra's private interface for 1.3.8 and 1.4, with hydra_job.py and hydra_changes.py. No other
module imports `hydra._internal`.

These are private, but the same in both versions: the `Hydra` object with its configuration loader and repository, the
parser of the command line, and `hydra.core.utils.run_job`, which launcher plugins use as well.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import Overrides
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.defects import circle_from, defect_of
from danling_conf.config.hydra_changes import BrokenValue, Look, batches_unvalidated, first_broken_value, without_waste
from danling_conf.config.hydra_job import run_as_job, set_version_base
from danling_conf.config.sweep_size import check_size
from danling_conf.config.typed_text import restore_typed, restore_written, written_in
from danling_conf.groups.source import LAUNCHER_GROUP, LAUNCHERS, SUBMITIT, NameSource
from danling_conf.schema.files import LONGEST_NAME
from danling_conf.schema.printable import unprintable
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

# By name: Hydra executes the modules of its plugins itself, and to import them here would do so again.
_CORE = "hydra._internal.core_plugins"
_LAUNCHER, _SWEEPER = f"{_CORE}.basic_launcher.BasicLauncher", f"{_CORE}.basic_sweeper.BasicSweeper"

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)
"""Errors of composing for a faulty command line or configuration file."""


@dataclass(frozen=True, kw_only=True)
class ConfigSearch:
    """The places of an app's configuration."""

    config_name: str | None
    """Primary config."""
    config_path: str | None = None
    """Absolute directory, or `pkg://` module, of the app's own configs."""
    config_dir: str | None = None
    """A further directory, which is searched first (`--config-dir`)."""
    job_name: str = "app"
    """Name of the script, for log files."""

    @property
    def without_files(self) -> str | None:
        """The primary config where the app has no files, and its primary config so is a base config; None otherwise."""
        return self.config_name if self.config_path is None and self.config_dir is None else None


class Composer:
    """Composes the configurations of one app."""

    def __init__(self, search: ConfigSearch, instance: Hydra) -> None:
        self.search = search
        self._hydra = instance

    def compose(self, overrides: Sequence[str], *, multirun: bool = False) -> DictConfig:
        """The composed configuration, Hydra's own `hydra` node included.

        Raises Hydra's errors, and ConfigRefused for a launcher or a sweeper that is none.
        """
        mode = RunMode.MULTIRUN if multirun else RunMode.RUN
        return self._compose(overrides, mode, ())

    def compose_until_broken(self, overrides: Sequence[str], look: Look) -> tuple[DictConfig, BrokenValue | None]:
        """The composed configuration without the first value that it cannot take, and all values after that one.

        Raises like `compose` for all other faults.

        Args:
            look: looks at the configuration before each value.
        """
        with first_broken_value(look) as found:
            config = self._compose(overrides, RunMode.RUN, found)
        return config, found[0] if found else None

    def _compose(self, overrides: Sequence[str], mode: RunMode, broken: Sequence[BrokenValue]) -> DictConfig:
        circle = circle_from(self.loader.repository, self.search.config_name)
        if circle is not None:
            raise ConfigRefused([circle])
        with self._files_named(overrides):
            config = self.loader.load_configuration(self.search.config_name, list(overrides), run_mode=mode)
        left_out = broken[0].values[broken[0].number :] if broken else ()
        self._restore_text(config, [text for text in overrides if text not in left_out])
        _check_hydra(config)
        return config

    @contextmanager
    def _files_named(self, overrides: Sequence[str]) -> Iterator[None]:
        """Turn errors of config files that name no file into refusals that do."""
        try:
            with _named_defects():
                yield
        except (RecursionError, UnicodeDecodeError, OSError) as error:
            if isinstance(error, HydraException):  # some of Hydra's are OSErrors
                raise
            found = defect_of(self.loader.repository, self.search.config_name, overrides, error)
            raise ConfigRefused([found]) from error

    def apply(self, override: Override, config: DictConfig) -> None:
        """Apply one value override, as composing does. Raises ConfigCompositionException."""
        with _named_defects():
            ConfigLoaderImpl._apply_overrides_to_config([override], config)
            restore_typed(config, [override])

    def sweep_config(self, master: DictConfig, overrides: Sequence[str]) -> DictConfig:
        """The configuration of one job of a sweep, as Hydra's own launchers compose it. Raises Hydra's errors."""
        with self._files_named(overrides):
            config = self.loader.load_sweep_config(master, list(overrides))
        self._restore_text(config, [*map(str, master.hydra.overrides.hydra), *overrides])
        return config

    def _restore_text(self, config: DictConfig, overrides: Sequence[str]) -> None:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        restore_typed(config, parsed)
        given = frozenset(item.key_or_group for item in parsed)
        restore_written(config, given, lambda paths: self._written(paths, parsed))

    def _written(self, paths: Sequence[str], overrides: Sequence[Override]) -> dict[str, tuple[Any, Any]]:
        """For settings, what YAML made of them in the last file that has them, and their text there."""
        single = [item for item in overrides if not item.is_sweep_override()]
        choices = [str(item.input_line) for item in single if self.group_exists(item.key_or_group)]
        merged = self.loader.compute_defaults_list(self.search.config_name, choices, RunMode.RUN).defaults
        return written_in(self.loader.repository, merged, paths)

    def classifier(self, master: DictConfig) -> Callable[[Sequence[Override]], list[Override]]:
        """A function that selects the overrides of a job that Hydra applies as values, after composing.

        It knows the groups of the sweep, including those of `hydra.searchpath`. Raises Hydra's errors.
        """
        own = overrides_of(master, "hydra")
        _, repository = self.loader._parse_overrides_and_create_caching_repo(master.hydra.job.config_name, own)

        def values_among(overrides: Sequence[Override]) -> list[Override]:
            with _named_defects():
                return Overrides(repo=repository, overrides_list=list(overrides)).config_overrides

        return values_among

    def defaults(self, overrides: Sequence[str]) -> list[tuple[str, Any]]:
        """The configs that are merged, in order, as pairs of path and content (placed at its package)."""
        with _named_defects():
            merged = self.loader.compute_defaults_list(self.search.config_name, list(overrides), RunMode.RUN).defaults
            return [
                (str(item.config_path), self.loader._load_single_config(item, self.loader.repository).config)
                for item in merged
                if item.config_path is not None
            ]

    @property
    def loader(self) -> ConfigLoaderImpl:
        loader = self._hydra.config_loader
        if not isinstance(loader, ConfigLoaderImpl):
            raise TypeError(f"Hydra's configuration loader is a {type(loader).__name__}, which this package cannot use")
        return loader

    def group_exists(self, name: str) -> bool:
        with _named_defects(), suppress(OSError):  # a name too long for a folder
            return self.loader.repository.group_exists(name)
        return False

    def config_exists(self, path: str) -> bool:
        with _named_defects(), suppress(OSError):  # a name too long for a file
            return self.loader.repository.config_exists(path)
        return False

    def fault_of_file(self, path: str) -> str | None:
        """Why a config cannot be loaded by itself; None where it can."""
        try:
            with _named_defects():
                self.loader.repository.load_config(path)
        except COMPOSITION_ERRORS as error:
            return str(error).strip().splitlines()[0]
        return None

    def options(self, group: str) -> list[str]:
        return self.loader.repository.get_group_options(group)

    def groups(self) -> list[str]:
        """All groups, nested ones and Hydra's own included: `optim`, `hydra/launcher`."""
        found: list[str] = []
        waiting = [""]
        while waiting:
            parent = waiting.pop()
            names = self.loader.list_groups(parent)
            below = [f"{parent}/{name}".lstrip("/") for name in names]
            found += [group for group in below if self.options(group)]
            waiting += below
        return sorted(set(found))

    def multirun(self, overrides: Sequence[str], task: Any) -> Any:
        """Run Hydra's own sweep with the configured sweeper and launcher. Raises what a job raised."""
        with batches_unvalidated():
            return self._hydra.multirun(self.search.config_name, task, list(overrides))

    def asks_for_sweep(self, overrides: Sequence[str]) -> bool:
        """Whether a command line without `-m` is a sweep: `hydra.mode=MULTIRUN`, there or in a file."""
        if not any("hydra.mode" in item for item in overrides) and not self._has_several_values(overrides):
            return False  # whatever a file says is seen once the single run is composed
        try:
            return bool(self.compose(overrides, multirun=True).hydra.mode == RunMode.MULTIRUN)
        except (*COMPOSITION_ERRORS, ConfigRefused):
            return False

    def _has_several_values(self, overrides: Sequence[str]) -> bool:
        try:
            return any(item.is_sweep_override() for item in OverridesParser.create().parse_overrides(list(overrides)))
        except HydraException:
            return False

    def sweep_jobs(self, master: DictConfig) -> list[list[str]]:
        """The jobs that Hydra's own sweeper makes, each as a list of overrides.

        Raises Hydra's errors, and ConfigRefused like `check_size`.
        """
        return self.split_jobs(_given_to_sweeper(master))

    def split_jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """Every combination of the values in a sweep's overrides. Raises like `sweep_jobs`."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parsed = self._parsed(overrides)
        check_size(parsed)
        return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]

    def check_size(self, master: DictConfig) -> None:
        """Raises ConfigRefused where Hydra's own sweeper would make no job, or too many, and Hydra's errors."""
        batch = master.hydra.sweeper.get("max_batch_size")
        if batch is not None and batch < 1:
            fix = "leave it out: hydra.launcher decides how many jobs run at once"
            raise ConfigRefused([Violation("hydra.sweeper.max_batch_size", batch, "it must be at least 1", fix)])
        check_size(self._parsed(_given_to_sweeper(master)))

    def _parsed(self, overrides: Sequence[str]) -> list[Override]:
        return OverridesParser.create(config_loader=self.loader).parse_overrides(list(overrides))

    def run_job(self, config: DictConfig, task: Any, directory: Path) -> Any:
        """Run `task` as Hydra's job in `directory`: Hydra writes `.hydra` and the job log there, and calls callbacks.

        Raises what the task raised.
        """
        return run_as_job(config, task, directory, self.search.config_name, self.loader)


def _check_hydra(composed: DictConfig) -> None:
    """Raises ConfigRefused where a setting of Hydra's would write elsewhere than in the run's directory, or where
    `hydra.launcher` or `hydra.sweeper` is not what its group chose."""
    folder, name = composed.hydra.output_subdir, composed.hydra.job.name
    if folder is not None and (Path(folder).is_absolute() or ".." in Path(folder).parts or unprintable(folder)):
        fix = "write the name of a folder, or null for none"
        raise ConfigRefused([Violation("hydra.output_subdir", folder, "it lies in the run's directory", fix)])
    if "/" in name or unprintable(name) or len(os.fsencode(name)) > LONGEST_NAME - len(".log"):
        rule = "it is the name of log files and of jobs in a queue"
        raise ConfigRefused([Violation("hydra.job.name", name, rule, "write one name without slashes")])
    for kind, own in (("launcher", _LAUNCHER), ("sweeper", _SWEEPER)):
        node = composed.hydra[kind]
        chosen = composed.hydra.runtime.choices.get(f"hydra/{kind}")
        fix = f"leave it out, or choose another by its name: hydra/{kind}=NAME"
        if not isinstance(node, DictConfig) or not isinstance(node.get("_target_"), str):
            raise ConfigRefused([Violation(f"hydra.{kind}", node, f"a {kind} is a section with a _target_", fix)])
        targets = {"basic": own}
        if kind == "launcher":
            targets |= {name: str(getattr(declared, "_target_", "")) for name, declared in LAUNCHERS.items()}
        if node._target_ != targets.get(str(chosen), node._target_):
            rule = f"hydra/{kind}={chosen} is made by {targets[str(chosen)]}"
            raise ConfigRefused([Violation(f"hydra.{kind}._target_", node._target_, rule, fix)])


def overrides_of(composed: DictConfig, kind: str) -> list[str]:
    """The overrides of a composed configuration as they were given.

    Args:
        kind: `hydra` for Hydra's own settings, `task` for all others.
    """
    # Not by iterating, which resolves interpolations: `data.x=${data.y}` is one.
    found: Any = OmegaConf.to_container(composed.hydra.overrides, resolve=False)
    return [str(item) for item in found[kind]]


def _given_to_sweeper(master: DictConfig) -> list[str]:
    """The overrides that Hydra's sweeper combines: its parameters in files, and those of the command line."""
    parameters = master.hydra.sweeper.get("params") or {}
    return [*(f"{key}={value}" for key, value in parameters.items()), *overrides_of(master, "task")]


def knows_all_jobs(master: DictConfig) -> bool:
    """Whether a sweep's sweeper is Hydra's own, which knows all jobs before the first one starts."""
    return bool(master.hydra.sweeper._target_ == _SWEEPER)


@contextmanager
def _named_defects() -> Iterator[None]:
    """Turn bare builtin errors of Hydra and OmegaConf into Hydra's own errors, and YAML errors into refusals."""
    try:
        yield
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        name = Path(mark.name).name if mark else "a configuration file"
        raise ConfigRefused([Violation(name, ABSENT, f"{where}{problem or error}", "fix the YAML")]) from error
    except (AttributeError, AssertionError, TypeError) as error:
        text = str(error)
        if "NoneType" in text:  # OmegaConf 2.3: a key is set below a mapping that is null
            raise ConfigCompositionException("a mapping that is null cannot take keys") from error
        if "argument of type 'int' is not iterable" in text:
            raise ConfigCompositionException("a group is chosen by a name") from error
        raise
    except RecursionError as error:
        raise ConfigCompositionException("it is nested too deeply, or configs choose each other in a circle") from error
    except OSError as error:
        if isinstance(error, HydraException):
            raise
        # Hydra looks up whether a key is a folder, whose name may be too long; and a file may hold no mapping.
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        raise ConfigCompositionException(text) from error


@contextmanager
def composer(search: ConfigSearch) -> Iterator[Composer]:
    """A composer for an app.

    Hydra's state is global. That of an enclosing `hydra.main`, or of a notebook, is saved and restored at the end.
    """
    previous = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    set_version_base()
    path = create_config_search_path(search.config_path)
    if search.config_dir is not None:
        directory = Path(search.config_dir).absolute()
        if not directory.is_dir():
            raise ConfigRefused(
                [Violation("--config-dir", search.config_dir, "there is no such directory", "name an existing one")]
            )
        path.prepend("command-line", f"file://{directory}", anchor=SearchPathQuery(provider="schema"))
    try:
        with as_in_main(search):
            yield Composer(search, Hydra.create_main_hydra2(search.job_name, path))
    finally:
        GlobalHydra.instance().clear()
        if previous is not None:
            GlobalHydra.instance().initialize(previous)


@contextmanager
def as_in_main(search: ConfigSearch) -> Iterator[None]:
    """Let Hydra compose as it does for an app of our `main`: an app without files may put any key below `model` and
    `data`, and `hydra/launcher=submitit_slurm` and `submitit_local` name our launchers.

    hydra-submitit-launcher keeps its own in Hydra's ConfigStore. They are taken out of it while an app is composed:
    Hydra 1.3 merges a config of any other source with the one of that name in the store.
    """
    Plugins.instance()  # imports that package, if it is not yet
    stored: Any = ConfigStore.instance().repo
    for name in LAUNCHER_GROUP.split("/"):
        stored = stored.setdefault(name, {})
    theirs = {file: stored.pop(file) for file in [f"{name}.yaml" for name in SUBMITIT] if file in stored}
    before = NameSource.free, NameSource.launchers
    NameSource.free, NameSource.launchers = search.without_files, LAUNCHERS | SUBMITIT
    try:
        with without_waste():
            yield
    finally:
        NameSource.free, NameSource.launchers = before
        stored.update(theirs)


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's command line: overrides, and flags such as --help and --multirun."""
    return get_args_parser().parse_args(list(arguments))
