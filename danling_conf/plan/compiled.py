"""Compiled code in a plan: the graphs that torch would compile, run operator by operator.

What compiled code keeps from forward for backward is decided by the partitioner, not by autograd, and what it fuses
never reaches memory. So a model is compiled for a plan too, by a backend that traces, decomposes and partitions as
inductor does, and generates no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from danling_conf._torch_private import compiling, dispatch
from danling_conf.plan.ledger import Ledger
from danling_conf.schema.compile import CompileConfig

BACKEND = "danling_plan"
_WITHOUT_PARTITIONS = ("eager",)
"""Backends that take a graph as it is and leave backward to autograd."""


def planned_section(section: CompileConfig) -> CompileConfig:
    """The section `compile` for a plan: the same settings with a backend that generates no code."""
    if section.backend in _WITHOUT_PARTITIONS:
        return replace(section, enable=False)
    compiling.register_tracing_backend(BACKEND, _Graph, fused=section.backend != "aot_eager")
    # The ledger's hooks around blocks break graphs where FSDP's do anyway. How DDP cuts graphs, to reduce gradients
    # early, moves no memory to speak of.
    return replace(
        section,
        backend=BACKEND,
        mode=None,
        options=None,
        fullgraph=None,
        optimize_ddp="no_optimization",
        precompile_artifact_dir=None,
    )


class _Graph(fx.Interpreter):
    """A compiled graph: calls with a list of inputs, which is emptied, run it under the ledger that is active.

    Args:
        fused: whether neighbouring operators of each element, and sums over them, become one kernel.
    """

    def __init__(self, graph: fx.GraphModule, *, fused: bool) -> None:
        super().__init__(graph)
        self._kernels = _Kernels(graph.graph) if fused else None
        self._ledger: Ledger | None = None

    def __call__(self, inputs: list[Any]) -> Any:
        self._ledger = dispatch.active_mode(Ledger)
        try:
            return self.boxed_run(inputs)
        finally:
            self.env = {}  # its results would stay in memory, and gradients be copied that others hold as well

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator; one that is to draw the same numbers again is run by itself, as there are none."""
        name = getattr(target, "__name__", "")
        if name == "run_and_save_rng_state":
            with nullcontext() if self._ledger is None else self._ledger.unseen():
                state = torch.empty(16, dtype=torch.uint8)
            return state, args[0](*args[1:], **kwargs)
        if name == "run_with_rng_state":
            return args[1](*args[2:], **kwargs)
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        ledger = self._ledger
        if ledger is None or n.op != "call_function":
            return super().run_node(n)
        with ledger.recomputing(compiling.is_recomputed_node(n)):
            if self._kernels is None or n not in self._kernels.level:
                return super().run_node(n)
            with nullcontext() if n in self._kernels.stored else ledger.unseen():
                ledger.moves(self._kernels.read.get(n, 0))
                with ledger.without_traffic():
                    result = super().run_node(n)
            if n in self._kernels.stored:
                ledger.moves(_size(n))
            return result


class _Kernels:
    """Which operators of a graph a compiler would fuse, and which of their results it would store.

    Attributes:
        level: of fused operators: how many other ones, such as matrix products, come before. Those of one level that
            depend on each other are one kernel.
        stored: fused operators whose result another kernel, or the caller, needs.
        read: bytes that the first operator to need a stored tensor reads for all of its kernel.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.level: dict[fx.Node, int] = {}
        self.stored: set[fx.Node] = set()
        self.read: dict[fx.Node, int] = {}
        behind: dict[fx.Node, int] = {}
        for node in graph.nodes:
            fused = node.op == "call_function" and _is_fusible(node.target)
            passed = _is_passed_on(node)
            given = node.all_input_nodes
            level = max((behind[item] for item in given), default=0)
            if fused or (passed and any(item in self.level for item in given)):
                self.level[node] = level
                # What needs one number of all others, as the scale of a cast to float8, is another kernel.
                behind[node] = level + _is_of_all(node)
            else:
                behind[node] = level + (node.op == "call_function" and not passed)
        for node in reversed(graph.nodes):
            if node in self.level and any(self._needs(user, node) for user in node.users):
                self.stored.add(node)
        seen: set[tuple[fx.Node, int]] = set()
        for node, level in self.level.items():
            for item in node.all_input_nodes:
                inside = self.level.get(item) == level
                if not inside and (item, level) not in seen and _is_fusible(node.target):
                    seen.add((item, level))
                    self.read[node] = self.read.get(node, 0) + _size(item)

    def _needs(self, user: fx.Node, node: fx.Node) -> bool:
        if user not in self.level or self.level[user] != self.level[node]:
            return True
        return _is_passed_on(user) and user in self.stored


def _is_passed_on(node: fx.Node) -> bool:
    """Whether a node only gives another form to a tensor, or takes it out of a tuple."""
    if node.op != "call_function":
        return False
    target = node.target
    return not dispatch.is_operator(target) or dispatch.is_view(target)


def _is_fusible(target: Any) -> bool:
    if not dispatch.is_operator(target) or dispatch.is_view(target):
        return False
    return torch.Tag.pointwise in target.tags or target.overloadpacket.__name__ in _FUSED


def _is_of_all(node: fx.Node) -> bool:
    """Whether a node makes one number out of many, for which a kernel has to end."""
    value = node.meta.get("val")
    given = (item.meta.get("val") for item in node.all_input_nodes)
    alone = isinstance(value, Tensor) and value.numel() == 1
    return alone and any(isinstance(item, Tensor) and item.numel() > 1 for item in given)


_FUSED = frozenset(
    (
        "_to_copy", "_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data", "amax", "amin",
        "argmax", "argmin", "arange", "cat", "clone", "constant_pad_nd", "convert_element_type", "embedding",
        "empty", "expand", "full", "full_like", "gather", "index", "index_select", "iota", "logsumexp", "max", "mean",
        "min", "native_dropout", "new_zeros", "ones_like", "permute", "prod", "repeat", "scalar_tensor", "select",
        "slice_scatter", "sum", "var_mean", "where", "zeros", "zeros_like",
    )
)  # fmt: skip
"""Operators besides those of single elements that inductor fuses: sums, copies, what is generated or looked up."""


def _size(node: fx.Node) -> int:
    """Bytes of a node's result."""
    values: Sequence[Any] = dispatch.tree_leaves(node.meta.get("val"))
    return sum(int(item.numel()) * item.element_size() for item in values if isinstance(item, Tensor))
