"""Translation of the layout: stack, degrees and FSDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danling_conf.cli.importing.translation import Translation, dtype_name, keep_section, mapping
from danling_conf.config.identity import flatten
from danling_conf.schema import RunnerConfig
from danling_conf.schema.deepspeed import DERIVED, ROOT_KEYS, SAID_ELSEWHERE, ZERO_KEYS, ZERO_SAID_ELSEWHERE
from danling_conf.schema.docs import describe
from danling_conf.topology.violation import ConfigRefused, Violation

_STACKS = {"auto": "ddp", "torch": "ddp", "ds": "deepspeed", "graph_runner": "graph"}


def read_stack(left: dict[str, Any], made: Translation) -> str:
    """`ddp` or `parallel`, by which the layout is read. Raises ConfigRefused for a name that DanLing does not have."""
    given = left.pop("stack", None)
    name = str(given or "auto").strip().lower().replace("-", "_")
    stack = _STACKS.get(name, name)
    if stack in ("graph", "deepspeed"):
        made.keep("stack", stack)
    elif stack not in ("ddp", "parallel"):
        raise ConfigRefused([Violation("stack", given, "DanLing has no such stack", "correct it in the file")])
    return "parallel" if stack == "parallel" else "ddp"


def translate_deepspeed(left: dict[str, Any], made: Translation) -> None:
    """DeepSpeed's own configuration, of which DanLing fills in what other settings say."""
    section = dict(mapping(left.pop("deepspeed", None), "deepspeed"))
    if section and made.settings.get("stack") != "deepspeed":
        made.gone("deepspeed", "{...}", "it had no effect there without stack=deepspeed")
        return
    zero = dict(mapping(section.pop("zero_optimization", None), "deepspeed.zero_optimization"))
    elsewhere = {**SAID_ELSEWHERE, **{key: f"{name} says it" for key, name in DERIVED.items()}}
    _keep_known("deepspeed", section, ROOT_KEYS, elsewhere, made)
    known = {**ZERO_KEYS, "stage": int, "offload_optimizer": dict, "offload_param": dict}
    _keep_known("deepspeed.zero_optimization", zero, known, ZERO_SAID_ELSEWHERE, made)


def _keep_known(
    where: str, section: Mapping[str, Any], known: Mapping[str, type], elsewhere: Mapping[str, str], made: Translation
) -> None:
    for key, value in section.items():
        if key not in known:
            shown = "{...}" if isinstance(value, Mapping) else value
            made.gone(f"{where}.{key}", shown, elsewhere.get(key, "DeepSpeed has no such key"))
        elif isinstance(value, Mapping):
            made.settings |= {f"{where}.{key}.{name}": item for name, item in flatten(dict(value)).items()}
        else:
            made.keep(f"{where}.{key}", value)


def translate_layout(stack: str, left: dict[str, Any], made: Translation) -> None:
    """Degrees and FSDP, of which DanLing reads neither under the stack `ddp`. Raises ConfigRefused."""
    parallel = dict(mapping(left.pop("parallel", None), "parallel"))
    fsdp = dict(mapping(left.pop("fsdp", None), "fsdp"))
    if stack == "ddp":
        made.presets["parallel"] = "ddp"
        made.notes.append(
            "stack=ddp: parallel=ddp replicates over all processes of torchrun or srun; without them, the command "
            "starts one a device"
        )
        unused = flatten({"parallel": parallel, "fsdp": fsdp})
        for path, value in unused.items():
            known = describe(RunnerConfig, path)
            if value not in (None, {}) and (known is None or known.default != value):
                made.gone(path, value, "it had no effect there without stack=parallel")
        return
    axes = {name: _degree(name, given) for name, given in mapping(parallel.pop("axes", None), "parallel.axes").items()}
    sharded = bool(fsdp.get("enabled"))
    shard = axes.get("shard", 1)
    if not sharded and shard != 1:
        made.note("parallel.axes.shard", shard, "without FSDP nothing is sharded: it is a replicate degree here")
        if -1 not in (shard, axes.get("replicate", 1)):
            axes["replicate"] = axes.get("replicate", 1) * shard
        else:
            axes["replicate"] = -1
        axes["shard"] = 1
    _experts(axes, left, made)
    for name, degree in axes.items():
        made.keep(f"parallel.axes.{name}", degree)
    if parallel.pop("use_device_mesh", True) is False:
        made.gone("parallel.use_device_mesh", False, "the parallel stack refused that, and a layout needs its mesh")
    keep_section("parallel", parallel, made)
    _fsdp(fsdp, made)


def _degree(axis: str, given: Any) -> int:
    if isinstance(given, int) and not isinstance(given, bool):
        return given
    raise ConfigRefused([Violation(f"parallel.axes.{axis}", given, "a degree is a whole number", "correct it")])


def _experts(axes: dict[str, int], left: dict[str, Any], made: Translation) -> None:
    """There, the expert axes multiply the world size, and their ranks read the same data. Here they borrow ranks from
    shard x context x tensor, whose shard ranks read different data."""
    expert, inside = axes.get("expert", 1), axes.get("expert_tensor", 1)
    factor = expert * inside
    if factor == 1:
        return
    if axes.get("shard", 1) != -1:
        axes["shard"] = axes.get("shard", 1) * factor
    made.settings["fsdp.enabled"] = True
    text = "there it multiplied the world size, here it borrows ranks from shard x context x tensor: "
    shard = axes["shard"] if axes["shard"] != -1 else "the rest"
    made.note(
        "parallel.axes.expert", expert, f"{text}the shard degree is {shard}, and as many ranks are needed as before"
    )
    if inside not in (1, axes.get("tensor", 1)):
        made.gone("parallel.axes.expert_tensor", inside, "it is 1 or the tensor degree")
        axes["expert_tensor"] = 1
    elif inside != 1:
        made.note("parallel.axes.expert_tensor", inside, "there it multiplied the world size, here it borrows")
    loader = mapping(left.get("dataloader"), "dataloader")
    size = loader.get("batch_size")
    if isinstance(size, int) and size % factor == 0:
        left["dataloader"] = {**loader, "batch_size": size // factor}
        text = f"{factor} times as many ranks read data of their own: {size // factor} keeps the global batch"
        made.note("dataloader.batch_size", size, text)
    else:
        text = f"{factor} times as many ranks read data of their own, so the global batch is as many times larger"
        made.note("dataloader.batch_size", size, text)


def _fsdp(section: dict[str, Any], made: Translation) -> None:
    policy = section.pop("mp_policy", None)
    if isinstance(policy, Mapping) and policy:
        section["mp_policy"] = {
            key: dtype_name(value) if key.endswith("_dtype") and value is not None else value
            for key, value in policy.items()
        }
    elif policy not in (None, {}):
        made.gone("fsdp.mp_policy", policy, "it is an object; name its dtypes: fsdp.mp_policy.param_dtype=bf16")
    offload = section.pop("offload_policy", None)
    if isinstance(offload, Mapping):
        section["offload_policy"] = {**offload, "enabled": True}
    elif offload is not None:
        made.gone("fsdp.offload_policy", offload, "it is an object; choose fsdp=offload")
    if section.get("enabled") and not policy and "precision" in made.settings:
        text = "under FSDP it sets the dtypes of fsdp.mp_policy here, and not autocast"
        made.note("precision", made.settings["precision"], text)
    keep_section("fsdp", section, made)
