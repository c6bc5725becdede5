"""Tensor parallelism: each weight matrix is sharded over the tensor axis, by a plan of names to styles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from danling_conf._torch_private.distributed import as_no_view
from danling_conf.parallel import hugging_face
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.parallel.inside_step import sharded_logits
from danling_conf.parallel.pass_through import PassThrough
from danling_conf.parallel.plan import matches, plan_of, unmatched
from danling_conf.schema.parallel import TENSOR_STYLES, ParallelConfig
from danling_conf.schema.torch_options import nearest
from danling_conf.topology.violation import ABSENT, SettingError, Violation, refuse

_SEQUENCE = Shard(1)
_GATHERING = ("colwise_gather_output", "colwise_rep", "colwise_gather_output_sequence")


def plan_for(model: nn.Module, section: ParallelConfig, degree: int) -> dict[str, str]:
    """The plan of a whole model: `section.tensor_plan`, else the model's `tp_plan` (Hugging Face's are read as they
    are); with `section.sequence_parallel`, the entries of the model's `sequence_plan` replace or join it.

    Raises:
        SettingError: no plan, names of a configured plan that match nothing, or numbers of heads that the degree does
            not divide; ConfigRefused where several are wrong.
    """
    kind, path = type(model).__name__, "parallel.axes.tensor"
    if section.tensor_plan is not None:
        plan = dict(section.tensor_plan)
        refuse(
            Violation(
                f"parallel.tensor_plan.{name}",
                plan[name],
                f"{kind} has no module of this name",
                "correct the name or remove it",
            )
            for name in unmatched(model, plan)
        )
    else:
        own = plan_of(model, "tp_plan")
        if own is None:
            raise SettingError(
                path,
                degree,
                f"nothing lays {kind} out over the tensor axis",
                "give the model a tp_plan (names to styles) or a method parallelize(mesh), set parallel.tensor_plan, "
                "or set the degree to 1",
            )
        plan = own
    if next(matches(model, plan), None) is None:
        raise SettingError(
            path,
            degree,
            f"no name in the tp_plan of {kind} stands for one of its modules",
            "correct the names, or set the degree to 1",
        )
    if section.sequence_parallel:
        sequence = plan_of(model, "sequence_plan")
        if sequence is None:
            raise SettingError(
                "parallel.sequence_parallel",
                True,
                f"{kind} has no sequence_plan (names to styles)",
                "give it one, or set it to false",
            )
        plan = {**plan, **sequence}
    own_divisors: Mapping[str, int] = getattr(model, "tensor_divisors", None) or hugging_face.tensor_divisors(model)
    if odd := [f"{setting}={number}" for setting, number in own_divisors.items() if number % degree]:
        raise SettingError(path, degree, f"it must divide {' and '.join(odd)}", "choose a divisor, or change the model")
    return plan


def parallelize(model: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh, *, loss_parallel: bool) -> bool:
    """Shard `model`, or a part of it, over the tensor axis `mesh`, in place.

    Returns whether its logits may stay sharded in a step (`parallel.inside_step`).

    Parameters outside the plan stay whole and the same on all ranks. Tied parameters stay tied.

    Raises SettingError for an unknown style, and for features that the degree does not divide.
    """
    styles = _styles()
    ties = _ties(model)
    outside = _outside_blocks(model)
    sharded = False
    done: set[nn.Module] = set()  # a module in several places is sharded once
    for name, style, is_parameter in list(matches(model, plan)):
        if style not in TENSOR_STYLES or is_parameter:
            # Styles of a library's own models (mixtures of experts, latent attention) are that library's to apply.
            if not hugging_face.apply_style(model, name, style, mesh, is_parameter=is_parameter):
                rule = f"the tensor plan of {type(model).__name__} gives {name} the style {style}, which does not exist"
                raise SettingError("parallel.tensor_plan", ABSENT, rule, nearest(style, TENSOR_STYLES))
            continue
        module = model.get_submodule(name)
        if isinstance(module, PassThrough) or module in done:
            continue
        done.add(module)
        _check_features(name, module, style, mesh.size())
        is_head = name in outside and style in _GATHERING
        if is_head and loss_parallel:
            sharded = True
            made: ParallelStyle = ShardedHead(_SEQUENCE if style.endswith("_sequence") else Replicate())
        else:
            made = styles[style]()
        parallelize_module(module, mesh, made)
        if name in outside and not is_head:
            # An output that a collective is still filling, fed to a compiled block under FSDP2, makes the gradient of
            # this module exactly 0 (torch 2.13): a copy is an ordinary tensor.
            module.register_forward_hook(copied)
        elif not is_head:
            module.register_forward_hook(_may_be_changed)
    _tie(model, ties)
    return sharded


def _styles() -> dict[str, Callable[[], ParallelStyle]]:
    made: dict[str, Callable[[], ParallelStyle]] = {
        "colwise": ColwiseParallel,
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "colwise_gather_output_sequence": lambda: ColwiseParallel(input_layouts=_SEQUENCE, output_layouts=Replicate()),
        "rowwise": RowwiseParallel,
        "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
        "rowwise_sequence": lambda: RowwiseParallel(output_layouts=_SEQUENCE),
        "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
        "embedding_rowwise_sequence": EmbeddingToSequence,
        "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
        "replicated_with_grad_allreduce": BetweenShards,
        "sequence_parallel": lambda: SequenceParallel(use_local_output=True),
        "gather_sequence": GatherSequence,
        "whole_sequence": WholeSequence,
    }
    made["colwise_rep"], made["rowwise_rep"] = made["colwise_gather_output"], made["rowwise_split_input"]
    return made


class EmbeddingToSequence(ParallelStyle):
    """An embedding whose rows are sharded, and whose output is sharded along the sequence."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, inputs: _check_sequence(inputs[0], device_mesh.size()))
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=_SEQUENCE)
        return parallelize_module(module, device_mesh, style)


class ShardedHead(ParallelStyle):
    """A head whose logits stay sharded in a step that can use them so, and are gathered for every other caller."""

    def __init__(self, input_layout: Replicate | Shard) -> None:
        super().__init__()
        self.input_layout = input_layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style = ColwiseParallel(input_layouts=self.input_layout, output_layouts=Shard(-1), use_local_output=False)
        made = parallelize_module(module, device_mesh, style)
        made.register_forward_hook(lambda _, inputs, output: output if sharded_logits() else _whole(output))
        return made


class BetweenShards(ParallelStyle):
    """A layer between sharded ones, on activations of which each rank holds some heads: a norm of queries and keys.

    Its parameters stay whole, and their gradients are summed over the ranks.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
            # Heads are next to last; whatever the dim, the layer itself works along another.
            return DTensor.from_local(inputs[0], mesh, [Shard(inputs[0].ndim - 2)], run_check=False), *inputs[1:]

        return distribute_module(module, device_mesh, None, enter, lambda _, output, mesh: output.to_local())


class GatherSequence(ParallelStyle):
    """Gathers the first input of a module, sharded along the sequence, for the sharded layers inside it."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return _from_parts(inputs[0], device_mesh), *inputs[1:]

        module.register_forward_pre_hook(enter)
        return module


class WholeSequence(ParallelStyle):
    """Gathers the first input of a module that no style shards, and shards its output along the sequence again."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return _from_parts(inputs[0], device_mesh).to_local(), *inputs[1:]

        def leave(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            whole = DTensor.from_local(output, device_mesh, [Replicate()], run_check=False)
            return whole.redistribute(placements=[_SEQUENCE]).to_local()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


def copied(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A hook that returns a copy of a module's output."""
    return output.clone()


def _may_be_changed(module: nn.Module, inputs: Any, output: Any) -> Any:
    """A hook that lets what follows a sharded layer work in place (`ReLU(inplace=True)`, `add_`)."""
    return as_no_view(output) if isinstance(output, Tensor) and not isinstance(output, DTensor) else output


def _from_parts(part: Tensor, mesh: DeviceMesh) -> DTensor:
    joined = part if isinstance(part, DTensor) else DTensor.from_local(part, mesh, [_SEQUENCE], run_check=False)
    return joined.redistribute(placements=[Replicate()])


def _whole(output: Any) -> Any:
    if not isinstance(output, DTensor):
        return output
    return as_no_view(output.redistribute(placements=[Replicate()]).to_local())


def _check_sequence(tokens: Tensor, degree: int) -> None:
    if tokens.shape[1] % degree:
        raise SettingError(
            "parallel.sequence_parallel",
            True,
            f"a sequence of {tokens.shape[1]} tokens cannot be split evenly over the tensor degree, {degree}",
            f"make its length a multiple of {degree}, or set sequence_parallel to false",
        )


def _outside_blocks(model: nn.Module) -> set[str]:
    """Names of all modules outside of the repeated blocks, the head among them."""
    blocks = {id(module) for _, block in repeated_blocks(model) for module in block.modules()}
    return {name for name, module in model.named_modules(remove_duplicate=False) if id(module) not in blocks}


def _check_features(name: str, module: nn.Module, style: str, degree: int) -> None:
    base = getattr(module, "base_layer", None)
    if isinstance(base, nn.Module):  # a layer of peft, whose `weight` is that of the layer in it
        raise SettingError(
            f"parallel.tensor_plan.{name}",
            style,
            f"{name} is a {type(base).__name__} with an adapter around it, and a style shards one layer",
            f"name the layers in it: {name}.base_layer with this style, and of the adapter those that meet a part of "
            f"the features (lora_B of a colwise layer as colwise, lora_A of a rowwise one as rowwise)",
        )
    if isinstance(getattr(module, "weight", None), Tensor) and "weight" not in module._parameters:
        raise SettingError(
            f"parallel.tensor_plan.{name}",
            style,
            f"the weight of {name} is computed of other parameters (a parametrization), which no style shards",
            "leave it out of the plan, or remove the parametrization",
        )
    if style.startswith(("colwise", "rowwise", "embedding_")) and not isinstance(module, (nn.Linear, nn.Embedding)):
        raise SettingError(
            f"parallel.tensor_plan.{name}",
            style,
            f"it shards an nn.Linear or an nn.Embedding, and {name} is a {type(module).__name__}",
            "name linear layers, leave it out of the plan, or replace it by an nn.Linear",
        )
    if not isinstance(module, nn.Linear):
        return
    features = module.out_features if style.startswith("colwise") else module.in_features
    if style.startswith(("colwise", "rowwise")) and features % degree:
        what = "output" if style.startswith("colwise") else "input"
        raise SettingError(
            "parallel.axes.tensor",
            degree,
            f"it must divide the {features} {what} features of {name} ({style})",
            "choose a divisor of them, or change the model",
        )


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """The places of each parameter that several modules share."""
    places: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for module, name, parameter in _places(model):
        places[id(parameter)].append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter


def _tie(model: nn.Module, ties: list[list[tuple[nn.Module, str]]]) -> None:
    """Tie parameters again: sharding gives each place a parameter of its own."""
    for places in ties:
        parameters = [getattr(module, name) for module, name in places]
        layouts = {item.placements if isinstance(item, DTensor) else None for item in parameters}
        if len(layouts) > 1:
            kinds = " and ".join(type(module).__name__ for module, _ in places)
            raise SettingError(
                "parallel.tensor_plan",
                ABSENT,
                f"{kinds} share a parameter, and the plan shards it in one place and not in the other",
                "give both a style that shards rows, such as embedding_rowwise and colwise_gather_output",
            )
        for module, name in places[1:]:
            setattr(module, name, parameters[0])
