"""`torch.compile` of a model."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from danling_conf._torch_private.compiling import compile_settings_restored, keep_for_backward, optimize_ddp
from danling_conf.components.instantiate import section_from
from danling_conf.parallel.activation_checkpointing import COMPILED, is_recomputed
from danling_conf.parallel.blocks import repeated_blocks
from danling_conf.schema.compile import BUDGET, CompileConfig
from danling_conf.schema.setting import fraction_in
from danling_conf.topology.violation import ABSENT, SettingError

_OPTIONS = ("backend", "fullgraph", "dynamic", "mode", "options")
CACHE_DIRECTORY = "TORCHINDUCTOR_CACHE_DIR"
"""Inductor reads it whenever it looks for compiled code."""
TRITON_DIRECTORY = "TRITON_CACHE_DIR"
"""Set by inductor, once in a process, to a folder of its own directory, if it is not set."""
_POLICIES = {"default": 1.0, "eager": 1.0, "full": 0.0}
"""Budgets of the memory policies that have a name, as a share of what torch would keep."""


def apply(model: nn.Module, section: CompileConfig, *, inside_recomputation: bool = False) -> nn.Module:
    """Compile `model` in place: each repeated block, or the whole model with `scope: model`. Names do not change.

    A block that recomputes its activations is compiled with its recomputation, or else `inside_recomputation` (torch
    2.13 cannot compile the recomputation of tensor-parallel layers).

    A model without repeated blocks is compiled whole. Only the options that are set are passed to torch, so that the
    others keep its defaults. A whole model is compiled after it is wrapped by DDP or FSDP2, blocks before.

    Raises SettingError for options that exclude each other and for what torch does not know.
    """
    if not section.enable:
        return model
    if section.mode is not None and section.options is not None:
        raise SettingError(
            "compile.mode",
            section.mode,
            f"a mode is a set of options, and compile.options={section.options} is set too",
            "set one of them to null",
        )
    configure(section)
    options = options_of(section)
    modules = [block for _, block in repeated_blocks(model)] if is_per_block(model, section) else [model]
    for module in modules:
        try:
            if inside_recomputation and is_recomputed(module):
                setattr(module, COMPILED, torch.compile(type(module).forward, **options))
            else:
                module.compile(**options)
        except RuntimeError as error:
            # torch checks mode and options here, before anything is compiled.
            path, value = next(
                ((f"compile.{name}", options[name]) for name in ("mode", "options") if name in options),
                ("compile", ABSENT),
            )
            # An unknown option makes torch list all of the thousand that there are.
            why = textwrap.shorten(str(error), 200, placeholder=" ...")
            raise SettingError(
                path, value, f"torch.compile refuses it: {why}", "change it, or set it to null"
            ) from error
    return model


def options_of(section: CompileConfig) -> dict[str, Any]:
    """The keywords of `torch.compile`: those that are set. Raises SettingError for a backend that torch has not."""
    if section.backend is not None and section.backend not in torch.compiler.list_backends(exclude_tags=()):
        raise SettingError(
            "compile.backend",
            section.backend,
            "torch has no such backend",
            f"choose one of {', '.join(torch.compiler.list_backends())}",
        )
    return {name: getattr(section, name) for name in _OPTIONS if getattr(section, name) is not None}


def is_per_block(model: nn.Module, section: CompileConfig) -> bool:
    """Whether `apply` compiles the blocks of `model` one by one."""
    return section.scope == "block" and bool(repeated_blocks(model))


def configure(section: CompileConfig) -> None:
    """Set what compilation reads from the process and not from the model: the cache directory, how dynamo treats DDP,
    and what is kept for backward. Call it before DDP wraps the model: `python_reducer` changes what DDP sets up. It is
    read whenever something is compiled, so it stays; `restored` puts back what was there."""
    if not section.enable:
        return
    use_shared_cache()
    optimize_ddp(section.optimize_ddp)
    policy = section.memory_policy
    if policy is not None:
        budget = _POLICIES.get(policy, fraction_in(policy, BUDGET))
        if budget is None:  # a section that was made in code is not checked
            rule = f"it is {', '.join(_POLICIES)}, or {BUDGET}:X with X from 0 to 1"
            raise SettingError("compile.memory_policy", policy, rule, f"{BUDGET}:0.5, for instance")
        keep_for_backward(budget, everything=policy == "eager")


@contextmanager
def restored() -> Iterator[None]:
    """What `configure` sets, and the cache directories, are as before afterwards."""
    before = {name: os.environ.get(name) for name in (CACHE_DIRECTORY, TRITON_DIRECTORY)}
    try:
        with compile_settings_restored():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def use_shared_cache() -> None:
    """Keep inductor's cache between runs and ranks, in `$XDG_CACHE_HOME` or `~/.cache`; torch's default, a directory
    for temporary files, is often emptied with the job. A `TORCHINDUCTOR_CACHE_DIR` of the user's own stays."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault(CACHE_DIRECTORY, str(cache / "danling_conf" / "inductor"))


def from_keywords(**keywords: Any) -> partial[nn.Module]:
    """`compile` as `hydra.utils.instantiate` reads it: a partial that waits for the model."""
    return partial(apply, section=section_from(CompileConfig, keywords, path="compile"))
