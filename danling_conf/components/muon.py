"""Muon for a whole model: the hidden matrices by Muon, everything else by AdamW, as one optimizer.

Muon (K. Jordan et al., https://kellerjordan.github.io/posts/muon/) is an optimizer of hidden weight matrices; its
author trains embeddings, output heads, gains and biases with AdamW. `torch.optim.Muon` takes matrices only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from danling_conf.schema.torch_options import OPTIMIZERS
from danling_conf.topology.violation import Violation, refuse

_EMBEDDING_WORDS = ("wte", "wpe")
_HEAD_WORDS = frozenset({"lm_head", "head", "output", "classifier", "score", "unembed", "proj_out", "fc_out"})
_ADAMW_OPTIONS = frozenset(OPTIMIZERS["AdamW"].options)
_MUON_OPTIONS = frozenset(name for name, option in OPTIMIZERS["Muon"].options.items() if not option.own)


class Group(Protocol):
    """A parameter group as `danling_conf.components.optimizer` splits them."""

    path: str
    name: str
    settings: Mapping[str, Any]
    parameters: list[tuple[str, nn.Parameter]]

    def options(self) -> dict[str, Any]: ...


class ShardedMuon(torch.optim.Muon):
    """`torch.optim.Muon` whose update of a sharded matrix is that of the whole matrix.

    torch runs the Newton-Schulz iteration on the shards, with a collective in each of its bfloat16 products, whose
    rounding then depends on the layout. Here the update is gathered once, orthogonalised on every rank and sliced.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        sharded = [
            (group, parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if isinstance(parameter, DTensor) and parameter.grad is not None
        ]
        for _, parameter, _ in sharded:
            parameter.grad = None  # torch's step passes over a parameter that has no gradient
        try:
            super().step()
        finally:
            for _, parameter, gradient in sharded:
                parameter.grad = gradient
        for group, parameter, gradient in sharded:
            self._step_sharded(group, parameter, gradient)
        return loss

    def _step_sharded(self, group: Mapping[str, Any], parameter: DTensor, gradient: torch.Tensor) -> None:
        gradient = cast(DTensor, gradient).redistribute(placements=parameter.placements)
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        # A momentum of zero makes torch's Muon orthogonalise what it is given, here the whole update.
        whole = cast(DTensor, update).full_tensor()
        change = torch.zeros_like(whole)
        change.grad = whole
        settings = {name: group[name] for name in ("ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
        lr = float(group["lr"])
        torch.optim.Muon([change], lr=lr, weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(distribute_tensor(change, parameter.device_mesh, parameter.placements, src_data_rank=None))


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer: each group says which by its `algorithm`, `muon` or `adamw`.

    The two share this optimizer's `param_groups` and `state`, so that schedulers, clipping, `state_dict` and
    `torch.distributed.checkpoint.state_dict` see one ordinary optimizer.

    Raises:
        ValueError: a group without an `algorithm`, or a parameter of Muon that is not a matrix.
    """

    _kinds = {"muon": ShardedMuon, "adamw": torch.optim.AdamW}

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        self._parts: list[torch.optim.Optimizer] = []
        # No defaults: the two have different ones, and each group is complete in itself.
        super().__init__(groups, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("algorithm") not in self._kinds:
            raise ValueError("a group of MuonAdamW needs an `algorithm`: `muon` or `adamw`")
        super().add_param_group(param_group)
        self._link()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Make the two optimizers over the very same groups and state; they fill in what a group leaves out."""
        self._parts = []
        for algorithm, kind in self._kinds.items():
            groups = [group for group in self.param_groups if group["algorithm"] == algorithm]
            if groups:
                part = kind(groups)
                part.state = self.state
                self._parts.append(part)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def make(groups: Sequence[Group], options: Mapping[str, Any], outside: set[str]) -> MuonAdamW:
    """Build the pair from parameter groups; a group with parameters of both kinds becomes two, Muon's first.

    One `lr` serves both: `adjust_lr_fn` is `match_rms_adamw` unless given, with which Muon's updates have the size of
    AdamW's (J. Liu et al., https://arxiv.org/abs/2502.16982). With `adjust_lr_fn=original`, `adamw_lr_multiplier`
    (1 unless given) relates AdamW's learning rate to `lr`. `betas`, `foreach` and `fused` are AdamW's, `eps` is
    Muon's; `weight_decay` is of both and, unset, each one's own default in torch. A group's options go to whichever
    of the two has them; its `algorithm` (`muon` or `adamw`) overrides the choice by name and shape.

    Args:
        groups: parameter groups, already checked on their own.
        options: options of the section.
        outside: names of matrices that are not hidden, see `outside`.

    Raises:
        SettingError: `algorithm: muon` on a parameter that is not a matrix; an option that nothing in its group has.
            ConfigRefused where several are wrong.
    """
    defaults = {"adjust_lr_fn": "match_rms_adamw", **options}
    for_muon, for_adamw = _taken(defaults, _MUON_OPTIONS), _taken(defaults, _ADAMW_OPTIONS - {"eps"})
    parted = [_by_algorithm(group, outside) for group in groups]
    refuse(found for group, parts in zip(groups, parted, strict=True) for found in _unfit(group, parts))
    of_algorithm = {"muon": (_MUON_OPTIONS, for_muon), "adamw": (_ADAMW_OPTIONS, for_adamw)}
    built: list[dict[str, Any]] = []
    related: list[dict[str, Any]] = []
    """Groups of AdamW without a learning rate of their own."""
    for group, parts in zip(groups, parted, strict=True):
        for algorithm, parameters in ((name, found) for name, found in parts.items() if found):
            known, base = of_algorithm[algorithm]
            own = _taken(group.options(), {*known, "name"})
            built.append({"params": parameters, "algorithm": algorithm, **base, **own})
            if algorithm == "adamw" and "lr" not in own:
                related.append(built[-1])
    # Only now: where `lr` is unset, the optimizer has filled it in.
    optimizer = MuonAdamW(built)
    for settings in related:
        settings["lr"] *= options.get("adamw_lr_multiplier", 1.0)
    return optimizer


def _taken(options: Mapping[str, Any], known: Set[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in known}


def _by_algorithm(group: Group, outside: set[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters of a group by the algorithm that trains them: the group's own, else by name and shape."""
    chosen = group.settings.get("algorithm")
    parts: dict[str, list[nn.Parameter]] = {"muon": [], "adamw": []}
    for name, parameter in group.parameters:
        hidden = parameter.ndim == 2 and name not in outside
        parts[chosen or ("muon" if hidden else "adamw")].append(parameter)
    return parts


def outside(named: Sequence[tuple[str, nn.Parameter]], model: nn.Module | None) -> set[str]:
    """Names of the matrices that are not hidden: embeddings and output heads.

    Embeddings are the weights of `nn.Embedding` and what is named like one. The head is, in this order: what
    `get_output_embeddings()` of the model returns; matrices named like a head outside of repeated blocks; matrices
    with a row for each entry of an embedding; else the last matrix of the model.

    Args:
        named: pairs of clean name and trainable parameter of the whole model, in its order.
        model: the whole model. Unset: names and order decide.
    """
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim == 2]
    modules = [] if model is None else [item for item in model.modules() if isinstance(item, nn.Embedding)]
    of_modules = {id(item.weight) for item in modules}
    embeddings = {name for name, item in matrices if id(item) in of_modules or _named_like_embedding(name)}
    heads = _heads(model, matrices, {item.num_embeddings for item in modules}, embeddings)
    if heads is None:
        heads = {matrices[-1][0]} if matrices else set()
    return embeddings | heads


def _heads(
    model: nn.Module | None, matrices: Sequence[tuple[str, nn.Parameter]], rows: set[int], embeddings: set[str]
) -> set[str] | None:
    """Names of the heads; empty where a head shares its weight with an embedding; None where none is recognised."""
    find_output: Any = getattr(model, "get_output_embeddings", None)
    output = find_output() if callable(find_output) else None
    if output is not None:
        return {name for name, item in matrices if item is output.weight}
    named_so = {name for name, _ in matrices if _named_like_head(name)}
    if named_so:
        return named_so
    if model is not None and _tied(model):
        return set()
    return {name for name, item in matrices if item.shape[0] in rows and name not in embeddings} or None


def _tied(model: nn.Module) -> bool:
    """Whether a module other than an embedding uses an embedding's weight."""
    weights = {id(item.weight) for item in model.modules() if isinstance(item, nn.Embedding)}
    others = (item for item in model.modules() if not isinstance(item, nn.Embedding))
    return any(id(weight) in weights for item in others for weight in item.parameters(recurse=False))


def _named_like_embedding(name: str) -> bool:
    return any("embed" in part or part in _EMBEDDING_WORDS for part in name.lower().split(".")[-3:])


def _named_like_head(name: str) -> bool:
    parts = name.lower().split(".")
    return not any(part.isdigit() for part in parts) and bool(_HEAD_WORDS.intersection(parts[-2:]))


def _unfit(group: Group, parts: Mapping[str, Sequence[nn.Parameter]]) -> Iterator[Violation]:
    """What a group asks of an algorithm that cannot do it."""
    odd = [f"{name} has {item.ndim} dimensions" for name, item in group.parameters if item.ndim != 2]
    if group.settings.get("algorithm") == "muon" and odd:
        more = f", and {len(odd) - 1} others are no matrices either" if len(odd) > 1 else ""
        rule = f"Muon takes matrices only, {odd[0]}{more}"
        yield Violation(f"{group.path}.algorithm", "muon", rule, "narrow the pattern or remove `algorithm`")
    known = {"name"}
    if parts["muon"]:
        known |= _MUON_OPTIONS
    if parts["adamw"]:
        known |= _ADAMW_OPTIONS
    betas = [] if parts["adamw"] else [name for name in ("beta1", "beta2") if group.settings.get(name) is not None]
    for name in [*sorted(group.options().keys() - known), *betas]:
        taker = "Muon" if parts["muon"] else "AdamW"
        why = f"every parameter of the group is trained by {taker}, which has no such option"
        yield Violation(f"{group.path}.{name}", group.settings[name], why, "remove it or change the pattern")
