"""Adapter of Hydra's private interface, for 1.3.8 and 1.4. Beside hydra_changes.py, no other module imports
`hydra._internal`.

These are private, but the same in both versions: the `Hydra` object with its configuration loader and repository, the
parser of the command line, and `hydra.core.utils.run_job`, which launcher plugins use as well.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import version
from hydra._internal import config_loader_impl
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.defaults_list import Overrides
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import run_job, setup_globals
from hydra.errors import ConfigCompositionException, HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from danling_conf.config.defects import circle_from, defect_of
from danling_conf.config.hydra_changes import BrokenValue, Look, batches_unvalidated, first_broken_value, without_waste
from danling_conf.config.typed_text import restore_typed, restore_written, written_in
from danling_conf.groups.source import LAUNCHER_GROUP, LAUNCHERS, SUBMITIT, NameSource
from danling_conf.schema.files import LONGEST_NAME
from danling_conf.schema.imports import uncollected
from danling_conf.schema.printable import unprintable
from danling_conf.schema.setting import OUTPUT_DIRECTORY
from danling_conf.topology.violation import ABSENT, ConfigRefused, Violation

# Hydra 1.3 warns without a version_base; 1.4 warns at every run that passes one.
VERSION_BASE: dict[str, Any] = {"version_base": None} if hydra.__version__.startswith("1.3") else {}

# By name: Hydra executes the modules of its plugins itself, and to import them here would do so again.
_CORE = "hydra._internal.core_plugins"
_LAUNCHER, _SWEEPER = f"{_CORE}.basic_launcher.BasicLauncher", f"{_CORE}.basic_sweeper.BasicSweeper"

MOST_JOBS = 100_000
"""Most jobs of a sweep. All are checked, and get a folder each, before the first one starts."""

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
        _check_size(parsed)
        return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]

    def check_size(self, master: DictConfig) -> None:
        """Raises ConfigRefused where Hydra's own sweeper would make no job, or too many, and Hydra's errors."""
        batch = master.hydra.sweeper.get("max_batch_size")
        if batch is not None and batch < 1:
            fix = "leave it out: hydra.launcher decides how many jobs run at once"
            raise ConfigRefused([Violation("hydra.sweeper.max_batch_size", batch, "it must be at least 1", fix)])
        _check_size(self._parsed(_given_to_sweeper(master)))

    def _parsed(self, overrides: Sequence[str]) -> list[Override]:
        return OverridesParser.create(config_loader=self.loader).parse_overrides(list(overrides))

    def run_job(self, config: DictConfig, task: Any, directory: Path) -> Any:
        """Run `task` as Hydra's job in `directory`: Hydra writes `.hydra` and the job log there, and calls callbacks.

        Raises what the task raised.
        """
        return _run_job(config, task, directory, self.search.config_name, self.loader)


def run_frozen(settings: Mapping[str, Any], config: Mapping[str, Any], task: Any, directory: Path) -> Any:
    """`Composer.run_job` for a configuration that another process composed.

    Args:
        settings: of `hydra_settings`.
        config: the rest of the configuration.
    """
    # Normally `hydra.main` does these two; this process never enters it.
    _set_version_base()
    setup_globals()
    composed = _frozen_node(settings, config)
    os.environ.update({name: str(value) for name, value in composed.hydra.job.env_set.items()})
    return _run_job(composed, task, directory, composed.hydra.job.config_name, None)


def _run_job(config: DictConfig, task: Any, directory: Path, name: str | None, loader: Any) -> Any:
    single = _is_single(config.hydra.job)
    with open_dict(config):
        config.hydra.run.dir = str(directory)
        config.hydra.mode = RunMode.RUN if single else RunMode.MULTIRUN
    callbacks = Callbacks(config)
    if single:  # the jobs of a sweep have the callbacks of a job only
        callbacks.on_run_start(config=config, config_name=name)
    with uncollected() as end_pause:

        def collected(composed: DictConfig) -> Any:
            end_pause()
            return task(composed)

        result = run_job(
            hydra_context=HydraContext(config_loader=loader, callbacks=callbacks),
            task_function=collected,
            config=config,
            job_dir_key="hydra.run.dir",  # also for a job of a sweep: its directory is that of its run
            job_subdir_key=None,
        )
    if single:
        callbacks.on_run_end(config=config, config_name=name, job_return=result)
    return result


def _is_single(job: Mapping[str, Any]) -> bool:
    """Whether Hydra's job is not one of a sweep: those have numbers."""
    missing = OmegaConf.is_missing(job, "num") if isinstance(job, DictConfig) else job.get("num") == "???"
    return missing or job.get("num") is None


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


def _check_size(overrides: Sequence[Override]) -> None:
    """Raises ConfigRefused where the combinations are none, or more than a sweep may have.

    Counted before they are made: Hydra would make a list of all, and `range(0, 1e9)` alone fills the memory.
    """
    counts = {item.get_key_element(): _values_in(item) for item in overrides if item.is_discrete_sweep()}
    if 0 in counts.values():
        key = next(key for key, count in counts.items() if count == 0)
        raise ConfigRefused([Violation(key, ABSENT, "it has no values, so the sweep has no jobs", "give one or more")])
    jobs = math.prod(counts.values())
    if math.isinf(jobs):
        key = next(key for key, count in counts.items() if math.isinf(count))
        raise ConfigRefused([Violation(key, ABSENT, "its range has no end", "give it a finite end and a step")])
    if jobs > MOST_JOBS:
        key = max(counts, key=lambda each: counts[each])
        values = f"{_readable(counts[key])} values of {key} among them"
        rule = f"it has {_readable(jobs)} jobs, {values}, and a sweep has at most {MOST_JOBS}"
        raise ConfigRefused([Violation("sweep", ABSENT, rule, "give fewer values, or split it into several sweeps")])


def _readable(count: float) -> str:
    return f"{count:g}" if count > MOST_JOBS else f"{count:.0f}"


def _values_in(override: Override) -> float:
    """The number of values of a sweep's override; infinity where a range has no end."""
    values = override.value()
    if not isinstance(values, RangeSweep):
        return sum(1 for _ in override.sweep_iterator())
    try:
        start, stop, step = (float(item or 0) for item in (values.start, values.stop, values.step))
    except OverflowError:
        return math.inf
    if not all(map(math.isfinite, (start, stop, step))):
        return math.inf
    return max(0, math.ceil((stop - start) / step)) if step else math.inf


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
    _set_version_base()
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


def _set_version_base() -> None:
    version.setbase(*VERSION_BASE.values() or (version._UNSPECIFIED_,))


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Hydra's command line: overrides, and flags such as --help and --multirun."""
    return get_args_parser().parse_args(list(arguments))


def hydra_settings(composed: DictConfig, directory: Path | None) -> dict[str, Any]:
    """Hydra's own node of a composed configuration as plain values, with interpolations unresolved.

    Args:
        directory: directory of the job; None where it is not known yet, and `settings_in` sets it later.
    """
    settings: Any = OmegaConf.to_container(composed.hydra, enum_to_str=True)
    return settings if directory is None else settings_in(settings, directory)


def settings_of_job(settings: Mapping[str, Any], *, task: Sequence[str] | None = None, **job: Any) -> dict[str, Any]:
    """Hydra's settings with a job's own overrides and entries of `hydra.job`. Jobs share the rest, without a copy."""
    overrides = settings["overrides"] if task is None else {**settings["overrides"], "task": list(task)}
    return {**settings, "overrides": overrides, "job": {**settings["job"], **job}}


def settings_in(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Hydra's settings for a job that runs in `directory`."""
    run, runtime = {**settings["run"], "dir": str(directory)}, {**settings["runtime"], "output_dir": str(directory)}
    mode = RunMode.RUN if _is_single(settings["job"]) else RunMode.MULTIRUN
    return {**settings, "mode": mode.name, "run": run, "runtime": runtime}


def override_facts(config: DictConfig, overrides: Sequence[Override]) -> dict[str, Any]:
    """The entries that Hydra 1.3 adds to `hydra.job` for a job's overrides; 1.4 computes them when they are read."""
    name = getattr(config_loader_impl, "get_overrides_dirname", None)
    if name is None:
        return {}
    form = config.hydra.job.config.override_dirname
    written = name(
        overrides=list(overrides), kv_sep=form.kv_sep, item_sep=form.item_sep, exclude_keys=form.exclude_keys
    )
    return {"override_dirname": written}


def take_part(settings: Mapping[str, Any], config: Mapping[str, Any]) -> DictConfig:
    """Enter a Hydra job in a process that composed nothing itself.

    `HydraConfig.get()`, `hydra.job.chdir` and `hydra.job.env_set` work as in the process where Hydra runs the job.

    Args:
        settings: of `hydra_settings`.
        config: the rest of the configuration, which they may refer to.

    Returns:
        Hydra's own node.
    """
    from hydra.core.hydra_config import HydraConfig

    setup_globals()  # registers Hydra's resolvers, such as `now` and `hydra`
    typed = _frozen_node(settings, config)
    HydraConfig.instance().set_config(typed)
    os.environ.update({name: str(value) for name, value in typed.hydra.job.env_set.items()})
    if typed.hydra.job.chdir:
        os.chdir(typed.hydra.runtime.output_dir)
    node = typed.hydra
    assert isinstance(node, DictConfig)
    return node


def _frozen_node(settings: Mapping[str, Any], config: Mapping[str, Any]) -> DictConfig:
    from hydra.conf import HydraConf

    typed = OmegaConf.create({**config, "hydra": OmegaConf.structured(HydraConf, flags={"struct": False})})
    typed.merge_with({"hydra": settings})
    return typed


@contextmanager
def hydra_of(composed: DictConfig) -> Iterator[None]:
    """Let `HydraConfig.get()`, and with it `${hydra:...}`, read a composed configuration."""
    from hydra.core.hydra_config import HydraConfig

    instance = HydraConfig.instance()
    previous = instance.cfg
    given = copy.deepcopy(composed)  # a copy: `set_config` makes its argument read-only
    if OmegaConf.is_missing(given.hydra.runtime, "output_dir"):
        with read_write(given), open_dict(given):
            given.hydra.runtime.output_dir = OUTPUT_DIRECTORY  # known once the run has its directory
    instance.set_config(given)
    try:
        yield
    finally:
        instance.cfg = previous


def running_job() -> tuple[list[str], dict[str, Any]]:
    """The overrides and the choices of groups of the Hydra job that this process runs; empty outside of one."""
    from hydra.core.hydra_config import HydraConfig

    node: Any = HydraConfig.instance().cfg
    if node is None:
        return [], {}
    return [str(item) for item in node.hydra.overrides.task], dict(node.hydra.runtime.choices)


def output_directory() -> str | None:
    """The output directory of the Hydra job that this process runs; None outside of one."""
    from hydra.core.hydra_config import HydraConfig

    node: Any = HydraConfig.instance().cfg
    if node is None or OmegaConf.is_missing(node.hydra.runtime, "output_dir"):
        return None
    return str(node.hydra.runtime.output_dir)
