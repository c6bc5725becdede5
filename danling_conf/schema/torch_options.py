"""Options of torch's optimizers and learning-rate schedulers, known without importing torch.

The tables are compared with torch by a test, so that an option that torch adds is noticed. They serve the rules, which
check a configuration before any process starts, and the builders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

from danling_conf.schema.nearest import nearest as near
from danling_conf.schema.setting import open_keys


class Problem(NamedTuple):
    """One fault of a mapping of options: which option, its value, the rule it breaks, and what to do."""

    option: str
    value: Any
    why: str
    fix: str


@dataclass(frozen=True, kw_only=True)
class Option:
    """One keyword that a class accepts."""

    kind: str
    """`float`, `int`, `bool`, `str`, `floats`, `ints` (lists), `float or floats`, `any`."""
    required: bool = False
    """Whether the class cannot be built without it."""
    filled: bool = False
    """Whether the builder fills it, when it is left out, from the length of the run (`max_lr`: from `optim.lr`)."""
    choices: tuple[str, ...] | None = None
    """The only values allowed."""
    length: int | None = None
    """Number of items of a list."""
    own: bool = False
    """Whether it is an option of this package that torch does not have."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One optimizer or scheduler that a configuration can name."""

    name: str
    """Canonical name of the class, or the dotted path of a user's own one."""
    options: Mapping[str, Option] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    """Options of torch that are Python objects, so that a configuration cannot give them: option -> what to do."""
    own_class: bool = False
    """A user's own class by dotted path: its options are known once it is imported."""
    shape: bool = False
    """A schedule by shape, made by this package."""
    metric_driven: bool = False
    """Whether the scheduler steps on a metric."""
    needs_closure: bool = False
    """Whether the optimizer's `step` needs a closure; it has a single parameter group then."""
    sharded: bool = True
    """Whether torch can step the optimizer on sharded parameters (of Muon: whether this package's own can)."""
    refused: str | None = None
    """Why and what instead, for a class that needs Python objects and so cannot be built from a configuration."""


_NUMBER = Option(kind="float")
_COUNT = Option(kind="int")
_FLAG = Option(kind="bool")
_PAIR = Option(kind="floats", length=2)
_FOREACH = {"foreach": _FLAG, "maximize": _FLAG, "differentiable": _FLAG}
_CAPTURABLE = {**_FOREACH, "capturable": _FLAG}
_DECAYED = {"lr": _NUMBER, "weight_decay": _NUMBER}
_ADAM = {**_DECAYED, **_CAPTURABLE, "betas": _PAIR, "eps": _NUMBER}


def _choice(*choices: str) -> Option:
    return Option(kind="str", choices=choices)


def _numbers(*names: str) -> dict[str, Option]:
    return dict.fromkeys(names, _NUMBER)


def _table(*entries: Entry) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


OPTIMIZERS: dict[str, Entry] = _table(
    Entry(name="ASGD", options={**_DECAYED, **_CAPTURABLE, **_numbers("lambd", "alpha", "t0")}),
    Entry(name="Adadelta", options={**_DECAYED, **_CAPTURABLE, **_numbers("rho", "eps")}),
    Entry(
        name="Adafactor",
        options={
            **_DECAYED,
            **_numbers("beta2_decay", "d"),
            # The first of the two may be None.
            "eps": Option(kind="any"),
            "foreach": _FLAG,
            "maximize": _FLAG,
        },
        sharded=False,
    ),
    Entry(
        name="Adagrad",
        options={
            **_DECAYED,
            **_FOREACH,
            **_numbers("lr_decay", "initial_accumulator_value", "eps"),
            "fused": _FLAG,
        },
    ),
    Entry(name="Adam", options={**_ADAM, "amsgrad": _FLAG, "fused": _FLAG, "decoupled_weight_decay": _FLAG}),
    Entry(name="AdamW", options={**_ADAM, "amsgrad": _FLAG, "fused": _FLAG}),
    Entry(name="Adamax", options=_ADAM),
    Entry(
        name="LBFGS",
        options={
            **_numbers("lr", "tolerance_grad", "tolerance_change"),
            **dict.fromkeys(("max_iter", "max_eval", "history_size"), _COUNT),
            "line_search_fn": _choice("strong_wolfe"),
        },
        needs_closure=True,
    ),
    Entry(
        name="Muon",
        options={
            **_DECAYED,
            **_numbers("momentum", "eps"),
            "nesterov": _FLAG,
            "ns_coefficients": Option(kind="floats", length=3),
            "ns_steps": _COUNT,
            "adjust_lr_fn": _choice("original", "match_rms_adamw"),
            # Of the AdamW that takes what Muon cannot: see danling_conf.components.muon.
            "betas": Option(kind="floats", length=2, own=True),
            "foreach": Option(kind="bool", own=True),
            "fused": Option(kind="bool", own=True),
            "adamw_lr_multiplier": Option(kind="float", own=True),
        },
    ),
    Entry(name="NAdam", options={**_ADAM, "momentum_decay": _NUMBER, "decoupled_weight_decay": _FLAG}),
    Entry(name="RAdam", options={**_ADAM, "decoupled_weight_decay": _FLAG}),
    Entry(
        name="RMSprop",
        options={**_DECAYED, **_CAPTURABLE, **_numbers("alpha", "eps", "momentum"), "centered": _FLAG},
    ),
    Entry(name="Rprop", options={**_CAPTURABLE, "lr": _NUMBER, "etas": _PAIR, "step_sizes": _PAIR}, sharded=False),
    Entry(
        name="SGD",
        options={
            **_DECAYED,
            **_FOREACH,
            **_numbers("momentum", "dampening"),
            "nesterov": _FLAG,
            "fused": _FLAG,
        },
    ),
    Entry(name="SparseAdam", options={"lr": _NUMBER, "betas": _PAIR, "eps": _NUMBER, "maximize": _FLAG}, sharded=False),
)
"""Every optimizer of `torch.optim`, by the name of its class."""

_WARMUP = {"warmup_steps": _COUNT}
_DECAY = {**_WARMUP, "final_lr_ratio": _NUMBER}
_PER_GROUP = Option(kind="float or floats")
_FILLED_COUNT = Option(kind="int", filled=True)
_INSTEAD = "use a schedule by shape (`scheduler.type` constant, linear, cosine or wsd) or a class of your own"

SCHEDULERS: dict[str, Entry] = _table(
    Entry(name="constant", options=_WARMUP, shape=True),
    Entry(name="linear", options=_DECAY, shape=True),
    Entry(name="cosine", options=_DECAY, shape=True),
    Entry(name="wsd", options={**_DECAY, "decay_steps": _COUNT}, shape=True),
    Entry(name="ConstantLR", options={"factor": _NUMBER, "total_iters": _COUNT}),
    Entry(
        name="CosineAnnealingLR",
        options={"T_max": Option(kind="int", required=True, filled=True), "eta_min": _NUMBER},
    ),
    Entry(
        name="CosineAnnealingWarmRestarts",
        options={"T_0": Option(kind="int", required=True), "T_mult": _COUNT, "eta_min": _NUMBER},
    ),
    Entry(
        name="CyclicLR",
        options={
            "base_lr": Option(kind="float or floats", required=True),
            "max_lr": Option(kind="float or floats", required=True),
            "step_size_up": _COUNT,
            "step_size_down": _COUNT,
            "mode": _choice("triangular", "triangular2", "exp_range"),
            "scale_mode": _choice("cycle", "iterations"),
            "cycle_momentum": _FLAG,
            **_numbers("gamma", "base_momentum", "max_momentum"),
        },
        objects={"scale_fn": "choose `mode`, or subclass CyclicLR and name your class"},
    ),
    Entry(name="ExponentialLR", options={"gamma": Option(kind="float", required=True)}),
    Entry(name="LinearLR", options={**_numbers("start_factor", "end_factor"), "total_iters": _FILLED_COUNT}),
    Entry(name="MultiStepLR", options={"milestones": Option(kind="ints", required=True), "gamma": _NUMBER}),
    Entry(
        name="OneCycleLR",
        options={
            "max_lr": Option(kind="float or floats", required=True, filled=True),
            "total_steps": _FILLED_COUNT,
            "epochs": _COUNT,
            "steps_per_epoch": _COUNT,
            "anneal_strategy": _choice("cos", "linear"),
            "base_momentum": _PER_GROUP,
            "max_momentum": _PER_GROUP,
            "cycle_momentum": _FLAG,
            "three_phase": _FLAG,
            **_numbers("pct_start", "div_factor", "final_div_factor"),
        },
    ),
    Entry(name="PolynomialLR", options={"total_iters": _FILLED_COUNT, "power": _NUMBER}),
    Entry(
        name="ReduceLROnPlateau",
        options={
            "mode": _choice("min", "max"),
            "threshold_mode": _choice("rel", "abs"),
            "patience": _COUNT,
            "cooldown": _COUNT,
            "min_lr": _PER_GROUP,
            **_numbers("factor", "threshold", "eps"),
        },
        metric_driven=True,
    ),
    Entry(name="StepLR", options={"step_size": Option(kind="int", required=True), "gamma": _NUMBER}),
    Entry(name="LambdaLR", refused=f"it needs a Python function: {_INSTEAD}"),
    Entry(name="MultiplicativeLR", refused=f"it needs a Python function: {_INSTEAD}"),
    Entry(name="SequentialLR", refused=f"it needs scheduler objects; for warm-up and decay {_INSTEAD}"),
    Entry(name="ChainedScheduler", refused=f"it needs scheduler objects; for warm-up and decay {_INSTEAD}"),
    Entry(name="SWALR", refused=f"it belongs to a loop that averages weights; for a flat end of training {_INSTEAD}"),
)
"""Our schedules by shape and every scheduler of `torch.optim.lr_scheduler`, by the name of its class."""

_SCHEDULER_ALIASES = {"plateau": "ReduceLROnPlateau"}
_SHAPE_OPTIONS = frozenset(SCHEDULERS["wsd"].options)
_SET_BY_BUILDER = frozenset({"params", "optimizer", "last_epoch", "verbose"})
_BETAS = ("beta1", "beta2")
_MULTIPLIERS = {"lr_multiplier": "lr", "weight_decay_multiplier": "weight_decay"}


def find_optimizer(name: str) -> Entry | None:
    """The entry of an optimizer by its class name in any case; a dotted path is a user's own class (`own_class`).
    None: there is no such optimizer."""
    return _find(name, OPTIMIZERS, {}, "torch.optim.")


def find_scheduler(name: str) -> Entry | None:
    """The entry of a scheduler by shape, alias or class name in any case; a dotted path is a user's own class
    (`own_class`). None: there is no such scheduler."""
    return _find(name, SCHEDULERS, _SCHEDULER_ALIASES, "torch.optim.lr_scheduler.")


def _find(name: str, table: Mapping[str, Entry], aliases: Mapping[str, str], package: str) -> Entry | None:
    lowered = name.removeprefix(package).lower()
    if "." in lowered:
        return Entry(name=name, own_class=True)
    by_lowered = {known.lower(): entry for known, entry in table.items()}
    return by_lowered.get(aliases.get(lowered, lowered).lower())


def nearest(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name: the nearest known one, else all of them."""
    known = sorted(known)
    if not known:
        return "remove it"
    close = near(str(name), known, cutoff=0.6)
    return f"did you mean {close}?" if close else f"use one of: {', '.join(known)}"


def optimizer_options(section: Any) -> dict[str, Any]:
    """Options of an optimizer: those that its section declares, and its open ones, that have a value."""
    return _with_value({"lr": section.lr, "weight_decay": section.weight_decay, **open_keys(section)})


def scheduler_options(section: Any) -> dict[str, Any]:
    """Options of a scheduler: those that its section declares, and its open ones, that have a value."""
    return _with_value({name: getattr(section, name) for name in sorted(_SHAPE_OPTIONS)} | open_keys(section))


def _with_value(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def option_problems(entry: Entry, options: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the options of an optimizer or scheduler. A value of None counts as left out. The options of
    a user's own class cannot be judged here."""
    if entry.own_class:
        return []
    if entry.refused:
        return [Problem("type", entry.name, f"{entry.name} cannot be built from a configuration", entry.refused)]
    given = _with_value(options)
    problems = [problem for name, value in given.items() if (problem := _judge(entry, name, value)) is not None]
    for name, option in entry.options.items():
        if option.required and not option.filled and name not in given:
            problems.append(Problem(name, None, f"{entry.name} needs it", f"give it a value ({option.kind})"))
    return problems


def group_problems(entry: Entry, group: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with one mapping of `optim.param_groups`, as far as it can be known without the model."""
    problems = _pattern_problems(group)
    own = {"pattern", *_MULTIPLIERS, *_BETAS}
    if entry.name == "Muon":
        own.add("algorithm")
        if group.get("algorithm") not in (None, "muon", "adamw"):
            fix = "use `muon` or `adamw`"
            problems.append(Problem("algorithm", group["algorithm"], "there is no such algorithm", fix))
    given = _with_value({key: value for key, value in group.items() if key not in own})
    for name, value in given.items():
        problem = _judge(_for_groups(entry), name, value, also=own)
        if problem is not None:
            problems.append(problem)
    for name in (*_MULTIPLIERS, *_BETAS):
        value = group.get(name)
        if value is None:
            continue
        replaced = _MULTIPLIERS.get(name, "betas")
        if not _is_kind(value, "float"):
            problems.append(Problem(name, value, "it must be a number", "write a number"))
        elif not entry.own_class and replaced not in entry.options:
            problems.append(Problem(name, value, f"{entry.name} has no `{replaced}`", "remove it"))
        elif given.get(replaced) is not None:
            fix = f"keep one of `{name}` and `{replaced}`"
            problems.append(Problem(name, value, f"the group sets `{replaced}` itself", fix))
    return problems


def _for_groups(entry: Entry) -> Entry:
    """Options a group may set: for Muon also those of AdamW, for its groups that AdamW takes."""
    if entry.name != "Muon":
        return entry
    muon = {name: option for name, option in entry.options.items() if name != "adamw_lr_multiplier"}
    return Entry(name=entry.name, options={**OPTIMIZERS["AdamW"].options, **muon})


def _pattern_problems(group: Mapping[str, Any]) -> list[Problem]:
    pattern = group.get("pattern")
    if not isinstance(pattern, str) or not pattern:
        why = "a parameter group is chosen by a regular expression on parameter names"
        return [Problem("pattern", pattern, why, "give it a `pattern`, such as `bias$`")]
    try:
        re.compile(pattern)
    except re.error as error:
        return [Problem("pattern", pattern, f"it is not a regular expression: {error}", "fix the expression")]
    return []


def _judge(entry: Entry, name: str, value: Any, also: Iterable[str] = ()) -> Problem | None:
    if entry.own_class:
        return None
    option = entry.options.get(name)
    if option is None:
        return _unknown(entry, name, value, also)
    if not _is_kind(value, option.kind):
        wanted = {"floats": "list of numbers", "ints": "list of integers", "float": "number", "int": "integer"}
        kind = wanted.get(option.kind, option.kind.replace("float or floats", "number, or a list of numbers"))
        return Problem(name, value, f"{entry.name} takes a {kind} here, not {type(value).__name__}", f"write a {kind}")
    if option.choices is not None and value not in option.choices:
        return Problem(name, value, f"{entry.name} does not know it", nearest(value, option.choices))
    if option.length is not None and len(value) != option.length:
        why = f"{entry.name} takes {option.length} numbers here, not {len(value)}"
        return Problem(name, value, why, f"write {option.length} numbers")
    return None


def _unknown(entry: Entry, name: str, value: Any, also: Iterable[str]) -> Problem:
    if name in _SET_BY_BUILDER:
        return Problem(name, value, "it is set where the object is built", "remove it")
    if name in entry.objects:
        return Problem(name, value, "it is a Python object", entry.objects[name])
    if name in _SHAPE_OPTIONS and not entry.shape and entry.name in SCHEDULERS:
        why = f"only a schedule by shape has it, {entry.name} does not"
        return Problem(name, value, why, "remove it, or set `scheduler.type` to linear, cosine or wsd")
    return Problem(name, value, f"{entry.name} has no such option", nearest(name, {*entry.options, *also}))


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "any":
        return True
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "str":
        return isinstance(value, str)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if kind == "float":
        return isinstance(value, Real) and not isinstance(value, bool)
    if kind == "float or floats":
        return _is_kind(value, "float") or _is_kind(value, "floats")
    return isinstance(value, list | tuple) and all(_is_kind(item, kind.removesuffix("s")) for item in value)
