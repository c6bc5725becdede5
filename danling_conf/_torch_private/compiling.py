"""Dynamo, the partitioner and inductor: their settings, and what they compiled."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

_optimize_ddp: list[Any] = []
"""What `optimize_ddp` was before the first run of this process chose another."""


def optimize_ddp(value: bool | str | None) -> None:
    """Choose how dynamo treats DDP; None for what torch has. `torch._dynamo.config` is documented but has no public
    path; another name there raises AttributeError for `compile.optimize_ddp`."""
    if not _optimize_ddp:
        _optimize_ddp.append(torch._dynamo.config.optimize_ddp)
    torch._dynamo.config.optimize_ddp = _optimize_ddp[0] if value is None else value  # type: ignore[assignment]


def keep_for_backward(budget: float, *, everything: bool = False) -> None:
    """Choose what graphs that are compiled from now on keep from forward for backward: as torch chooses (a budget of
    1), less, or `everything` that eager execution keeps.

    The partitioner of inductor and of `aot_eager` reads both names. Without the first, `compile.memory_policy` raises
    AttributeError. The second is a distance from backward, beyond which nothing is computed again; where torch forgets
    it, `eager` is `default`, and the test of the saved bytes fails.
    """
    from torch._functorch import config

    wanted = {"activation_memory_budget": budget, "max_dist_from_bw": -1 if everything else 1000}
    if any(getattr(config, name) != value for name, value in wanted.items()):
        torch._dynamo.reset()  # code that was compiled under another policy would be used again for the same class
    for name, value in wanted.items():
        setattr(config, name, value)


@contextmanager
def compile_settings_restored() -> Iterator[None]:
    """Whatever is set inside by `optimize_ddp`, `keep_for_backward` and `movable_kernels` is as before afterwards."""
    from torch._functorch import config

    names = ("activation_memory_budget", "max_dist_from_bw")
    before, ddp = {name: getattr(config, name) for name in names}, torch._dynamo.config.optimize_ddp
    headers = _precompiled_headers()
    try:
        yield
    finally:
        torch._dynamo.config.optimize_ddp = ddp
        for name, value in before.items():
            setattr(config, name, value)
        if _precompiled_headers() != headers:
            import torch._inductor.config as inductor

            inductor.cpp_cache_precompile_headers = headers


def movable_kernels() -> None:
    """Let inductor build kernels for the CPU without headers that it has compiled before.

    It looks for those beside its cache, by a path that is part of a kernel's key: in another directory every kernel is
    built again. Without the name in inductor's settings, compile artifacts save nothing on the CPU.
    """
    import torch._inductor.config as inductor

    inductor.cpp_cache_precompile_headers = False


def _precompiled_headers() -> bool:
    inductor = sys.modules.get("torch._inductor.config")
    if inductor is None:  # it will read the variable when it is imported
        return os.environ.get("TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS", "1") == "1"
    return bool(inductor.cpp_cache_precompile_headers)


def forget_compiled_code() -> None:
    """Let inductor read its cache directory anew: what it holds in memory it would not write to another one. Without
    `clear_caches`, a directory that a process changes to stays incomplete."""
    if "torch._inductor.utils" in sys.modules:
        sys.modules["torch._inductor.utils"].clear_caches()


def forget_graphs() -> None:
    """Compile anew what is called from now on. torch compiles a function a few times only, and then runs it eagerly."""
    torch._dynamo.reset()


def one_graph(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """A function that calls `backward`, compiled as one graph with its backward pass.

    `trace_autograd_ops` is set for its calls alone: a forward under DDP or FSDP2 that is traced with it loses every
    gradient without an error in 2.13. Without the name, `stack=graph` fails.
    """
    compiled = torch.compile(function, fullgraph=True, **options)

    def call(*arguments: Any) -> Any:
        with torch._dynamo.config.patch(trace_autograd_ops=True):
            return compiled(*arguments)

    return call


def untraceable() -> tuple[type[Exception], ...]:
    """What is raised where a function is not one graph."""
    from torch._dynamo import exc

    return exc.Unsupported, exc.UserError


def place_of_break(error: Exception) -> tuple[str, int, str] | None:
    """File, line and text of the code at which tracing ended, of an error of `untraceable`. None where it does not
    say."""
    stack = getattr(error, "real_stack", None)
    return (stack[-1].filename, stack[-1].lineno or 0, stack[-1].line or "") if stack else None


def dynamo_is_loaded() -> bool:
    """Whether something may be compiled. Without the name, what must run eagerly may be compiled, and nothing else."""
    return "torch._dynamo" in sys.modules


def is_compiled(model: nn.Module) -> bool:
    """Whether a module of a model is compiled, by whatever means. Without the names of 2.13, one that its author has
    compiled is compiled once more, after its first batch."""
    return any(hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) for part in model.modules())


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that compiled code calls as it is: graphs end before it."""
    return cast("Callable[..., Any]", torch.compiler.disable(function))


def without_compile(module: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or the module itself."""
    return cast(nn.Module, getattr(module, "_orig_mod", module))


@contextmanager
def quiet_compilation() -> Iterator[None]:
    """Without what torch logs about the way in which it compiles: whoever trains a model is told so then."""
    loggers = [logging.getLogger(name) for name in ("torch._higher_order_ops.wrap", "torch._dynamo", "torch._inductor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def register_tracing_backend(name: str, run: Callable[..., Callable[[list[Any]], Any]], *, fused: bool) -> None:
    """Let `torch.compile` know a backend that does all that inductor does with a graph (or `aot_eager`, if not `fused`)
    up to where code would be generated: `run(graph, fused=...)` returns what is called instead, with a list of inputs.

    `compile_fx` takes the last part of inductor as `inner_compile`. Without it no compiled model can be planned.
    """
    from torch._dynamo.backends import registry

    def compiler(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        call = run(graph, fused=fused)
        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    def backend(graph: torch.fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Any:
        if fused:
            from torch._inductor.compile_fx import compile_fx

            return compile_fx(graph, inputs, inner_compile=compiler)
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        return aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition
        )(graph, inputs)

    registry._BACKENDS.pop(name, None)
    registry._COMPILER_FNS.pop(name, None)
    registry.register_backend(backend, name=name)


def is_recomputed_node(node: torch.fx.Node) -> bool:
    """Whether a node of a backward graph is a part of forward that is computed again. Without the tag, it counts as a
    part of backward."""
    return bool(node.meta.get("partitioner_tag") == "is_forward")
