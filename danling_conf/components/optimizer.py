"""Optimizers: any of `torch.optim`, or a class of the user's, with parameter groups by regular expression."""

from __future__ import annotations

import difflib
import functools
import inspect
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from danling_conf.components import muon
from danling_conf.components.instantiate import section_from
from danling_conf.schema.optim import OptimConfig
from danling_conf.schema.torch_options import (
    OPTIMIZERS,
    Entry,
    find_optimizer,
    group_problems,
    nearest,
    optimizer_options,
    option_problems,
)
from danling_conf.topology.rules.optimizers import violations_of
from danling_conf.topology.violation import ABSENT, SettingError, Violation, refuse

_COMPILED = "_orig_mod."
_CHECKPOINTED = "_checkpoint_wrapped_module."
_DDP = "module."
_OF_GROUP = frozenset({"pattern", "algorithm", "lr_multiplier", "weight_decay_multiplier", "beta1", "beta2"})


@dataclass(kw_only=True)
class ParameterGroup:
    """The parameters that one pattern takes; or the default group: those that no pattern takes."""

    path: str
    """Where the group stands in the configuration."""
    name: str
    """The pattern, or `default`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The mapping as it was configured."""
    parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)

    def options(self) -> dict[str, Any]:
        """The options that reach the optimizer unchanged; multipliers and single betas are applied to built groups."""
        given = {key: value for key, value in self.settings.items() if key not in _OF_GROUP and value is not None}
        return {"name": self.name, **as_torch_takes(given)}


def make(
    parameters: nn.Module | Iterable[tuple[str, nn.Parameter]],
    section: OptimConfig,
    *,
    whole: nn.Module | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of a model's trainable parameters.

    Group 0 holds what no pattern takes, where there is such a parameter; then come the patterns in their order. Each
    group carries its `name` (`default`, or the pattern). Names lose the prefixes of `torch.compile`, activation
    checkpointing and DDP before they are matched.

    Args:
        parameters: the model, or pairs of fully qualified name and parameter.
        whole: the whole model (it may be on the meta device), where `parameters` is a part of it such as a pipeline
            stage: a pattern that matches in another part is no error then, and Muon decides by the whole.

    Raises:
        SettingError: an unknown optimizer or option, a path in `optim.type` that does not name an optimizer class, no
            trainable parameter, or a faulty parameter group; ConfigRefused where several are wrong.
    """
    entry = _entry(section)
    options = dict(optimizer_options(section))
    refuse(violations_of(option_problems(entry, options), "optim"))
    specifications = list(section.param_groups or [])
    _check_specifications(entry, specifications)
    pairs = cleaned(parameters)
    named = _trainable(pairs)
    if not named:
        raise SettingError(
            "optim", ABSENT, "there is no parameter that requires a gradient", "unfreeze a part of the model"
        )
    everywhere = pairs if whole is None else cleaned(whole)
    _one_by_one(entry, options, named)
    groups = _split(named, specifications, everywhere)
    if entry.name == "Muon":
        model = whole if whole is not None else parameters if isinstance(parameters, nn.Module) else None
        outside = muon.outside(_trainable(everywhere), model)
        optimizer: torch.optim.Optimizer = muon.make(groups, as_torch_takes(options), outside)
    else:
        optimizer = _construct(entry, groups, as_torch_takes(options))
    _apply_relative(optimizer, groups)
    return optimizer


def from_keywords(**keywords: Any) -> functools.partial[torch.optim.Optimizer]:
    """The section's `_target_`: a partial of `make` that waits for the parameters."""
    return functools.partial(make, section=section_from(OptimConfig, keywords, path="optim"))


def import_class(path: str, where: str, base: type | tuple[type, ...]) -> type:
    """Import a user's own class.

    Args:
        path: dotted, or with a colon before the attribute.
        where: the setting that names it.

    Raises:
        SettingError: nothing can be imported by that path, or it is not a subclass of `base`.
    """
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        fix = "write the path that you would import it by, and install it or put it on PYTHONPATH"
        raise SettingError(where, path, f"it cannot be imported ({error})", fix) from error
    if not (inspect.isclass(found) and issubclass(found, base)):
        wanted = " or ".join(item.__name__ for item in (base if isinstance(base, tuple) else (base,)))
        raise SettingError(where, path, f"it is not a subclass of {wanted}", "name a class that is")
    return found


def construct(kind: type, arguments: Sequence[Any], options: Mapping[str, Any], where: str) -> Any:
    """Call a class with its options.

    Args:
        where: the section that the options come from.

    Raises:
        SettingError: the class does not take the options, or refuses a value.
    """
    try:
        inspect.signature(kind).bind(*arguments, **options)
    except TypeError as error:
        fix = "remove it (a declared option: set it to null)" if "unexpected" in str(error) else "give it a value"
        raise SettingError(where, ABSENT, f"{kind.__name__} {error}", fix) from error
    try:
        return kind(*arguments, **options)
    except (TypeError, ValueError) as error:
        rule = f"{kind.__name__} refuses its options {dict(options)}: {error}"
        raise SettingError(where, ABSENT, rule, "change or remove the option") from error


def as_torch_takes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with lists as tuples, which torch has in its parameter groups; saved ones are compared with new ones."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def _entry(section: OptimConfig) -> Entry:
    entry = find_optimizer(section.type)
    if entry is None:
        fix = nearest(section.type, OPTIMIZERS)
        raise SettingError("optim.type", section.type, "torch.optim has no such class", fix)
    return entry


def _check_specifications(entry: Entry, specifications: Sequence[Any]) -> None:
    if specifications and entry.needs_closure:
        raise SettingError("optim.param_groups", ABSENT, f"{entry.name} has a single parameter group", "remove them")
    found: list[Violation] = []
    for number, settings in enumerate(specifications):
        where = f"optim.param_groups[{number}]"
        if isinstance(settings, Mapping):
            found += violations_of(group_problems(entry, settings), where)
        else:
            found.append(
                Violation(where, settings, "it must be a mapping", "write `{pattern: bias$, weight_decay: 0}`")
            )
    refuse(found)


def cleaned(parameters: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Pairs of name and parameter, each parameter once, the names without what wrappers put into them."""
    pairs = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    once = list({id(parameter): (name, parameter) for name, parameter in reversed(list(pairs))}.values())[::-1]
    shortened = [(name.replace(_COMPILED, "").replace(_CHECKPOINTED, ""), parameter) for name, parameter in once]
    # DDP puts the whole model under one attribute; a submodule that is called so has siblings.
    if all(name.startswith(_DDP) for name, _ in shortened):
        shortened = [(name.removeprefix(_DDP), parameter) for name, parameter in shortened]
    return shortened


def _trainable(pairs: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in pairs if parameter.requires_grad]


def _split(
    named: Sequence[tuple[str, nn.Parameter]],
    specifications: Sequence[Mapping[str, Any]],
    everywhere: Sequence[tuple[str, nn.Parameter]],
) -> list[ParameterGroup]:
    """Give each parameter to the first group whose pattern matches its name. Groups without a parameter are left out,
    since `torch.distributed.checkpoint` cannot save more than one of them."""
    expressions = [re.compile(settings["pattern"]) for settings in specifications]

    def taker(name: str) -> int:
        return next((number for number, expression in enumerate(expressions) if expression.search(name)), -1)

    taken = {taker(name) for name, _ in _trainable(everywhere)}
    refuse(
        _no_match(f"optim.param_groups[{number}].pattern", expression, everywhere)
        for number, expression in enumerate(expressions)
        if number not in taken
    )
    default = ParameterGroup(path="optim", name="default")
    groups = [
        ParameterGroup(path=f"optim.param_groups[{number}]", name=settings["pattern"], settings=settings)
        for number, settings in enumerate(specifications)
    ]
    for name, parameter in named:
        number = taker(name)
        (default if number < 0 else groups[number]).parameters.append((name, parameter))
    return [group for group in (default, *groups) if group.parameters]


def _no_match(path: str, expression: re.Pattern[str], everywhere: Sequence[tuple[str, nn.Parameter]]) -> Violation:
    """Why a pattern takes no parameter."""
    matching = [name for name, _ in everywhere if expression.search(name)]
    names = [name for name, _ in _trainable(everywhere)]
    if set(matching) & set(names):
        rule, fix = f"earlier groups take all that it matches ({matching[0]})", "move it before them or remove it"
    elif matching:
        rule, fix = f"it matches frozen parameters only ({matching[0]})", "unfreeze them or remove the group"
    else:
        near = difflib.get_close_matches(expression.pattern, names, n=5, cutoff=0.3) or names[:5]
        rule, fix = "it matches no parameter", f"correct it; there are, for instance: {', '.join(near)}"
    return Violation(path, expression.pattern, rule, fix)


def _one_by_one(entry: Entry, options: dict[str, Any], named: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Let the optimizer step parameters one by one where some are sharded and some are not:
    torch's foreach and fused versions take lists of one kind. On an accelerator they would be its default.

    Those that are not sharded have no dimension or another dtype, or no place in the tensor plan. In groups of their
    own they would let the others be stepped at once; but groups are in checkpoints, and would not be those of another
    layout."""
    if len({isinstance(parameter, DTensor) for _, parameter in named}) < 2:
        return
    for name in ("foreach", "fused"):
        if options.get(name):
            why = "some parameters are sharded and some are not, which torch does not take in one list"
            raise SettingError(f"optim.{name}", True, why, "leave it unset, or choose a layout with FSDP")
    if "foreach" in entry.options:
        options["foreach"] = False


def _construct(entry: Entry, groups: Sequence[ParameterGroup], options: Mapping[str, Any]) -> torch.optim.Optimizer:
    if entry.own_class:
        kind = import_class(entry.name, "optim.type", torch.optim.Optimizer)
    else:
        kind = getattr(torch.optim, entry.name)
    as_dicts = [{"params": [item for _, item in group.parameters], **group.options()} for group in groups]
    optimizer = construct(kind, (as_dicts,), options, "optim")
    if entry.own_class:
        _check_known(optimizer, groups)
    return optimizer


def _check_known(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]) -> None:
    """Refuse an option that a class of the user's would carry in its groups and never read."""
    refuse(
        Violation(
            f"{group.path}.{name}",
            group.settings[name],
            f"{type(optimizer).__name__} has no such option",
            nearest(name, optimizer.defaults),
        )
        for group in groups
        for name in sorted(group.options().keys() - {"name"} - optimizer.defaults.keys())
    )


def _apply_relative(optimizer: torch.optim.Optimizer, groups: Sequence[ParameterGroup]) -> None:
    """Apply multipliers and single betas to built groups: there the optimizer's own defaults are known too."""
    group_of = {id(parameter): group for group in groups for _, parameter in group.parameters}
    for built in optimizer.param_groups:
        group = group_of[id(built["params"][0])]
        for multiplier, option in (("lr_multiplier", "lr"), ("weight_decay_multiplier", "weight_decay")):
            factor = group.settings.get(multiplier)
            if factor is not None:
                _need(built, option, f"{group.path}.{multiplier}", optimizer)
                built[option] = built[option] * factor
        for position, name in enumerate(("beta1", "beta2")):
            beta = group.settings.get(name)
            if beta is None or built.get("algorithm") == "muon":
                continue
            _need(built, "betas", f"{group.path}.{name}", optimizer)
            betas = list(built["betas"])
            betas[position] = beta
            built["betas"] = tuple(betas)


def _need(built: Mapping[str, Any], option: str, path: str, optimizer: torch.optim.Optimizer) -> None:
    if option not in built:
        raise SettingError(path, ABSENT, f"{type(optimizer).__name__} has no `{option}`", "remove it")
