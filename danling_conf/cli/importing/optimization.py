"""Translation of optimizers and learning-rate schedules, by the names of DanLing's registries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from danling_conf.cli.importing.translation import Translation, mapping
from danling_conf.topology.violation import ConfigRefused, Violation

CURVE = "danling_conf.components.danling_schedule.DanLingLR"
_OPTIMIZERS = {"torch_adam": "adam", "torch_adamw": "adamw"}
_OF_DEEPSPEED = {
    **dict.fromkeys(("ds_adam", "cpu_adam", "cpuadam"), "adam"),
    **dict.fromkeys(("ds_adamw", "cpu_adamw", "cpuadamw"), "adamw"),
    "ds_adagrad": "adagrad",
}
_TORCH_OPTIMIZERS = frozenset({
    "sgd", "asgd", "adam", "adamw", "adadelta", "adagrad", "adamax", "lbfgs", "nadam", "radam", "rmsprop", "rprop",
    "adafactor",
})  # fmt: skip
_CURVES = ("cosine", "linear", "constant")
_SCHEDULERS = {
    "step": "StepLR",
    "multistep": "MultiStepLR",
    "exponential": "ExponentialLR",
    "cosine_annealing": "CosineAnnealingLR",
    "reduce_on_plateau": "ReduceLROnPlateau",
    "cyclic": "CyclicLR",
    "one_cycle": "OneCycleLR",
    "cosine_warm_restarts": "CosineAnnealingWarmRestarts",
}
_INTERVALS = {
    **dict.fromkeys(("step", "steps", "update", "updates"), "step"),
    **dict.fromkeys(("epoch", "epochs", "eval", "evaluation", "validation"), "epoch"),
}


def translate_optimizer(left: dict[str, Any], made: Translation) -> None:
    """`optim`, else `optimizer`. Raises ConfigRefused for one that neither torch nor the user has."""
    second = left.pop("optimizer", None)
    given = left.pop("optim", None)
    path = "optim" if given is not None else "optimizer"
    section = dict(mapping(second if given is None else given, path))
    if not section:
        return
    # This preset sets type and lr alone, both of which are written below: every other option is then torch's own
    # default, as in DanLing. The preset `adamw`, the default, has betas and a weight decay of its own.
    made.presets["optim"] = "adam"
    given_type = section.pop("type", "")
    name = str(given_type).lower()
    kind = _OPTIMIZERS.get(name, _OF_DEEPSPEED.get(name, name))
    if kind not in _TORCH_OPTIMIZERS and "." not in kind:
        rule = "it is not an optimizer of torch" if kind else "it names no optimizer"
        fix = "name one of torch.optim, or the dotted path of a class, in the file"
        raise ConfigRefused([Violation(f"{path}.type", given_type, rule, fix)])
    if name in _OF_DEEPSPEED:
        made.note(f"{path}.type", given_type, f"DeepSpeed's version is not used: {kind} of torch.optim")
    made.settings["optim.type"] = kind if "." not in kind else str(given_type)
    made.settings["optim.lr"] = section.pop("lr", None)
    if section.get("param_groups"):
        made.note(f"{path}.param_groups", "[...]", "a pattern without a parameter was a warning, and is refused here")
    for option, value in section.items():
        if value is not None:
            made.settings[f"optim.{option}"] = value


def translate_scheduler(left: dict[str, Any], made: Translation) -> None:
    """`sched`, else `scheduler`. Raises ConfigRefused for a name or interval that DanLing does not have."""
    second = left.pop("scheduler", None)
    given = left.pop("sched", None)
    path = "sched" if given is not None else "scheduler"
    section = {
        key: value
        for key, value in mapping(second if given is None else given, path).items()
        if value is not None or key == "type"
    }
    given_type, interval = section.pop("type", None), section.pop("interval", None)
    if given_type is None:
        if section or interval is not None:
            made.gone(path, "{...}", "it names no type: a scheduler made in code has its settings in code")
        return
    name = str(given_type).lower()
    advances = None
    if interval is not None:
        advances = _INTERVALS.get(str(interval).strip().lower())
        if advances is None:
            fix = "write step or epoch in the file"
            raise ConfigRefused([Violation(f"{path}.interval", interval, "DanLing has no such interval", fix)])
        made.keep("scheduler.interval", advances)
    if name in _CURVES:
        made.settings["scheduler.type"] = CURVE
        made.settings["scheduler.method"] = name
        text = f"{name} is another curve here; {CURVE.rpartition('.')[2]} keeps that of DanLing (geometric"
        made.note(f"{path}.type", given_type, f"{text}, warm-up of steps/20, cool-down of steps/5, final ratio 1e-3)")
        section.pop("method", None)
        if advances == "epoch" and "total_steps" not in section:
            _length_in_steps(path, left, made)
    elif name in _SCHEDULERS:
        made.settings["scheduler.type"] = _SCHEDULERS[name]
        if name != "one_cycle":
            section.pop("total_steps", None)
    elif "." in name:
        made.settings["scheduler.type"] = str(given_type)
    else:
        fix = "name one of torch.optim.lr_scheduler, or the dotted path of a class, in the file"
        rule = "it is not a scheduler of DanLing 0.4"
        raise ConfigRefused([Violation(f"{path}.type", given_type, rule, fix)])
    for option, value in section.items():
        made.settings[f"scheduler.{option}"] = value


def _length_in_steps(path: str, left: Mapping[str, Any], made: Translation) -> None:
    """There, a curve that advances by epoch is as long as the run has optimizer steps, so that most of it is unused."""
    if left.get("steps") is not None:
        made.settings["scheduler.total_steps"] = left["steps"]
    else:
        text = "there, the curve was as long as the run has steps; set scheduler.total_steps to keep that"
        made.note(f"{path}.interval", "epoch", text)
