"""Loader of checkpoints: finds one, verifies it on all ranks together, compares it with the model, and reads it.

Each rank reads only its own part. Every fault is raised on all ranks, before anything has been loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from danling_conf.checkpoint import contents, manifest, sources, state
from danling_conf.checkpoint.contents import as_saved
from danling_conf.checkpoint.fit import (
    ModelDiffers,
    OptimizerDiffers,
    check_extra,
    check_optimizer,
    check_options,
    differing_ties,
    listed,
    misfit,
    other_dtypes,
    ties,
    without_tied,
)
from danling_conf.checkpoint.folder import Folder, find, reading
from danling_conf.checkpoint.manifest import Broken, Manifest
from danling_conf.checkpoint.replicas import ReplicaFolder
from danling_conf.checkpoint.several import class_of
from danling_conf.checkpoint.sources import Source
from danling_conf.checkpoint.state import MODEL, Known
from danling_conf.checkpoint.weight_sources import NothingSaved, OpenWeights, candidates, open_one
from danling_conf.checkpoint.writing import SHARED, rank_file
from danling_conf.parallel.waiting import waiting
from danling_conf.schema.checkpoint import LOADED_PARTS, CheckpointConfig, excluded
from danling_conf.schema.layout import Layout
from danling_conf.schema.nearest import nearest
from danling_conf.topology.layout import data_rank
from danling_conf.topology.violation import SettingError

Found = TypeVar("Found")


class LayoutDiffers(ValueError):
    """A checkpoint was written under another layout, which is not allowed."""

    def __init__(self, path: Path, saved: str, current: str) -> None:
        self.path, self.saved, self.current = path, saved, current
        super().__init__(f"{path} was written under the layout {saved}, and this run's is {current}")

    def __reduce__(self) -> tuple[object, ...]:  # one rank's error is sent to the others
        return type(self), (self.path, self.saved, self.current)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Everything that was read from a checkpoint, except for what was loaded into model and optimizer."""

    path: Path
    facts: Manifest
    shared: dict[str, Any]
    """State that is the same on all ranks, without excluded parts."""
    own: dict[str, Any]
    """State of this rank, or of one that read the same data, without excluded parts."""
    notes: list[str] = field(default_factory=list)


class Loader:
    """Loads checkpoints into the model of this run. Everything is collective, and fails on all ranks or on none.

    Args:
        section: `checkpoint` of the configuration.
        rank, layout, layout_name: of this process, and of all ranks.
        allow_degree_change: whether checkpoints of other layouts may be loaded.
        replica: states of loaders that come before those in a checkpoint.
        on_node: index of this rank among those of its node, and their number.
    """

    def __init__(
        self,
        section: CheckpointConfig,
        *,
        rank: int,
        layout: Layout,
        layout_name: str,
        allow_degree_change: bool,
        replica: ReplicaFolder | None,
        on_node: tuple[int, int] = (0, 1),
    ) -> None:
        self.dir_name, self.excluded = section.dir_name, excluded(section)
        self.rank, self.layout, self.layout_name = rank, layout, layout_name
        self.allow_degree_change, self.replica, self.on_node = allow_degree_change, replica, on_node

    def restore(
        self,
        source: Path,
        *,
        parts: Sequence[nn.Module],
        optimizer: Optimizer,
        choose: bool,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Loaded:
        """Load a checkpoint into model and optimizer. Collective.

        Args:
            source: a checkpoint, or a run, which means its latest one.
            choose: whether to take the newest complete checkpoint of the run, and skip broken ones.
            extra: further tensors by name (`OWNER.KEY.NAME`), laid out as parameters are; loaded in place. Those of a
                key that the checkpoint does not know are left as they are.

        Raises:
            NothingSaved: there is no checkpoint at `source`.
            Broken: the checkpoint is broken; with `choose`, all of them are.
            LayoutDiffers: it was written under another layout, which is not allowed.
            OptimizerDiffers, ModelDiffers: it does not fit the optimizer or the model.
            SettingError: `checkpoint.exclude_from_loading` names what the checkpoint does not hold.
        """
        passed_over: list[str] = []
        for path in self._on_main_rank(lambda: self._candidates(source, choose)):
            try:
                loaded = self._load(path, parts, optimizer, self._kept(dict(extra or {})))
            except Broken as error:
                if not choose:
                    raise
                passed_over.append(str(error))
            else:
                loaded.notes[:0] = [f"passed over a broken checkpoint: {fault}" for fault in passed_over]
                return loaded
        raise Broken("; ".join(passed_over))

    def load_weights(self, source: Path, parts: Sequence[nn.Module]) -> None:
        """Load only the model's weights: from a checkpoint, a run, an export, or safetensors. Raises as `restore`, and
        ImportError where the package safetensors is missing."""
        with ExitStack() as stack:
            found = self._open_weights(source, stack)
            opened = self._on_all_ranks(lambda: found.for_model(parts[0]))
            targets = without_tied(self._kept(state.model_tensors(parts)), opened.known)
            self._on_all_ranks(lambda: self._check_model(found.path, targets, opened.known, exact=False))
            self._on_all_ranks(lambda: self._check_excluded([*opened.known, *state.model_tensors(parts)]))
            self._check_ties(found.path, targets, opened)
            opened.load(targets)

    def _candidates(self, source: Path, choose: bool) -> list[Path]:
        if choose:
            found = [entry.path for entry in Folder(source / self.dir_name).entries()]
        else:
            named = find(source, self.dir_name)
            found = [] if named is None else [named]
        if not found:
            raise NothingSaved(f"{source}: there is no whole checkpoint in it, nor as its {self.dir_name}/latest")
        return found

    def _load(
        self, path: Path, parts: Sequence[nn.Module], optimizer: Optimizer, extra: Mapping[str, Tensor]
    ) -> Loaded:
        with ExitStack() as stack:
            self._on_all_ranks(lambda: stack.enter_context(reading(path)))
            facts = self._on_all_ranks(lambda: manifest.read(path))
            self._verify(path, facts)
            shared, own, notes = self._on_all_ranks(lambda: self._small_parts(path, facts, optimizer))
            opened = self._on_all_ranks(lambda: sources.open_tensors(path, facts))
            options = shared.pop("optimizer")
            left_out = options.get("frozen", {})
            self._check_frozen(path, left_out, parts)
            saved = {name: item for name, item in state.model_tensors(parts).items() if name not in left_out}
            targets = without_tied(self._kept(saved), opened.known)
            self._on_all_ranks(lambda: self._check_model(path, targets, opened.known, exact=True))
            self._on_all_ranks(lambda: self._check_excluded(opened.known))
            self._check_ties(path, targets, opened)
            wanted = {name: item for name, item in opened.known.items() if not self._skips(name)}
            if not self._skips("optimizer"):
                made = contents.tensors_of(options)
                made = None if made is None else {name: item for name, item in made.items() if not self._skips(name)}
                self._on_all_ranks(lambda: check_optimizer(path, parts, optimizer, wanted, made))
                self._on_all_ranks(lambda: check_options(path / SHARED, optimizer, options["groups"]))
                targets |= state.optimizer_targets(parts, optimizer, wanted)
            owners = {_owner(name) for name in opened.known}
            more = {name: item for name, item in extra.items() if _owner(name) in owners}
            self._on_all_ranks(lambda: check_extra(path, more, opened.known))
            opened.load(targets | more)
        if not self._skips("optimizer"):
            kept = {name: value for name, value in options["values"].items() if not self._skips(f"optimizer.{name}")}
            with as_saved(path / SHARED, "optimizer"):
                state.load_optimizer(parts, optimizer, targets, {**options, "values": kept})
        with as_saved(path / SHARED, "extra state"):
            state.load_extra(parts, {name: item for name, item in options["extra"].items() if not self._skips(name)})
        return Loaded(path=path, facts=facts, shared=shared, own=own, notes=notes)

    def _small_parts(
        self, path: Path, facts: Manifest, optimizer: Optimizer
    ) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
        """The parts in small files: state that all ranks share, state of this rank, and notes."""
        self._check_origin(path, facts, optimizer)
        ranks = facts.made_under.world_size
        if len(facts.files) < ranks:
            raise Broken(f"{path / manifest.FACTS}: it names fewer files than the {ranks} ranks that wrote one each")
        file = rank_file(self._rank_to_read(facts.made_under))
        manifest.check_listed(path, facts, [SHARED, file])
        shared, own = contents.shared(path / SHARED), contents.own(path / file)
        notes = self._take_replica(path, facts, own)
        if self._skips("dataloaders"):
            own.pop("loader")
        if self._skips("generators"):
            own.pop("generators")
        return self._without_excluded(shared), own, notes

    def _check_origin(self, path: Path, facts: Manifest, optimizer: Optimizer) -> None:
        if facts.made_under != self.layout and not self.allow_degree_change:
            raise LayoutDiffers(path, facts.layout, self.layout_name)
        mine = class_of(optimizer)
        if facts.optimizer != mine and not self._skips("optimizer"):
            raise OptimizerDiffers(path, facts.optimizer, mine)

    def _without_excluded(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Shared state without the parts that are excluded from loading, except in `optimizer`: `_load` filters
        that."""
        kept: dict[str, Any] = {}
        for key, value in shared.items():
            if key == "optimizer":
                kept[key] = value
            elif not self._skips(key):
                inside = [name.removeprefix(f"{key}.") for name in self.excluded if name.startswith(f"{key}.")]
                kept[key] = _without(value, inside) if isinstance(value, dict) else value
        return kept

    def _take_replica(self, path: Path, facts: Manifest, own: dict[str, Any]) -> list[str]:
        if self.replica is None or facts.made_under != self.layout:
            return []
        try:
            own["loader"] = contents.loader(self.replica.read(path.name))
        except Broken as error:
            return [f"the loader continues from the checkpoint, since the replica has no state of its own: {error}"]
        return []

    def _rank_to_read(self, made_under: Layout) -> int:
        """The rank whose own state this rank continues: itself, or one that read the same share of the data."""
        if made_under == self.layout:
            return self.rank
        wanted = data_rank(self.layout, self.rank) % made_under.data_degree
        return next(rank for rank in range(made_under.world_size) if data_rank(made_under, rank) == wanted)

    def _verify(self, path: Path, facts: Manifest) -> None:
        """Verify the checksums of all files, each on one rank: every rank reading all would multiply the traffic."""
        mine = sorted(facts.files)[self.rank :: self.layout.world_size]
        self._on_all_ranks(lambda: manifest.verify(path, facts, mine))

    def _open_weights(self, source: Path, stack: ExitStack) -> OpenWeights:
        path = self._on_main_rank(lambda: candidates(source)[0])
        return self._on_all_ranks(lambda: open_one(path, stack, self._verify_on_node))

    def _verify_on_node(self, path: Path, facts: Manifest) -> None:
        """Verify this rank's share of the files that the ranks of a node verify together: a node may have a copy of its
        own."""
        index, number = self.on_node
        manifest.verify(path, facts, sorted(facts.files)[index::number])

    def _check_model(
        self, path: Path, targets: Mapping[str, Tensor], known: Mapping[str, Known], *, exact: bool
    ) -> None:
        theirs = {name: item.shape for name, item in known.items() if name.startswith(MODEL) and not self._skips(name)}
        mine = {name: tuple(item.shape) for name, item in targets.items()}
        everywhere = set(mine)
        if self.layout.pipeline > 1:
            everywhere = set().union(*gather_objects(set(mine), self.layout.world_size))
        differences = [misfit(mine, theirs, everywhere), other_dtypes(targets, known, exact=exact)]
        if any(differences):
            raise ModelDiffers(path, "; ".join(item for item in differences if item))

    def _check_ties(self, path: Path, targets: Mapping[str, Tensor], opened: Source) -> None:
        groups = ties(targets)
        everywhere = gather_objects(groups, self.layout.world_size) if self.layout.world_size > 1 else [groups]
        if not any(everywhere):
            return
        differing = differing_ties(targets, groups, opened)

        def check() -> None:
            if differing:
                raise ModelDiffers(path, f"the model ties {listed(differing)}, whose values differ in it")

        self._on_all_ranks(check)

    def _check_frozen(self, path: Path, left_out: Mapping[str, int], parts: Sequence[nn.Module]) -> None:
        """Refuse frozen weights that are not those which a checkpoint was made with, and leaves out."""
        mine = {f"{MODEL}{name}": item for name, item in state.named_parameters(parts)}
        found = state.digests({name: mine[name] for name in left_out if name in mine and not self._skips(name)})
        differing = [name.removeprefix(MODEL) for name, digest in found.items() if digest != left_out[name]]

        def check() -> None:
            if differing:
                rule = f"{path} leaves frozen weights out, and those of this run are others: "
                rule += listed(differing)
                fix = "pass the model and the pretrained weights that it was made with, and the same seed"
                raise SettingError("checkpoint.save_frozen", False, rule, fix)

        self._on_all_ranks(check)

    def _check_excluded(self, known: Iterable[str]) -> None:
        names = [*known, *LOADED_PARTS]
        for key in self.excluded:
            found = any(name == key or name.startswith(f"{key}.") for name in names)
            if found or key.split(".")[0] not in ("model", "optimizer"):
                continue
            near = nearest(key, names)
            hint = f"did you mean {near}?" if near else "name a part of the model as its state calls it"
            rule = "the checkpoint holds nothing of that name"
            raise SettingError("checkpoint.exclude_from_loading", key, rule, hint)

    def _kept(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: item for name, item in tensors.items() if not self._skips(name)}

    def _skips(self, name: str) -> bool:
        return any(name == key or name.startswith(f"{key}.") for key in self.excluded)

    def _on_main_rank(self, find_all: Callable[[], Found]) -> Found:
        """What rank 0 finds, on all ranks: if each looked itself, a save in between would give them different
        answers."""
        if self.layout.world_size == 1:
            return find_all()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome = [find_all(), None]
            except (ValueError, OSError, RuntimeError) as error:
                outcome = [None, error]
        with waiting("the checkpoint that rank 0 chooses"):
            distributed.broadcast_object_list(outcome, src=0)
        found, fault = outcome
        if fault is not None:
            raise fault
        return cast(Found, found)

    def _on_all_ranks(self, do: Callable[[], Found]) -> Found:
        return on_all_ranks(do, self.layout.world_size, (ValueError, ImportError, OSError, RuntimeError))


def on_all_ranks(do: Callable[[], Found], world_size: int, errors: tuple[type[Exception], ...]) -> Found:
    """What `do` returns. If it fails on one rank, it fails on all: the others would hang in their next collective."""
    result, fault = None, None
    try:
        result = do()
    except errors as error:
        fault = error
    if world_size > 1:
        fault = next((item for item in gather_objects(fault, world_size) if item is not None), None)
    if fault is not None:
        raise fault
    return result  # type: ignore[return-value]


def gather_objects(item: Any, world_size: int) -> list[Any]:
    """One object from every rank, in the order of ranks."""
    everywhere: list[Any] = [None] * world_size
    with waiting("the other ranks"):
        distributed.all_gather_object(everywhere, item)
    return everywhere


def _owner(name: str) -> str:
    return ".".join(name.split(".", 2)[:2])


def _without(tree: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A copy of nested dictionaries without dotted paths."""
    copy = dict(tree)
    for key in keys:
        first, _, rest = key.partition(".")
        if not rest:
            copy.pop(first, None)
        elif isinstance(copy.get(first), dict):
            copy[first] = _without(copy[first], [rest])
    return copy
