"""Optimizer: any of `torch.optim`, or a class of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Dict, List, Optional

from danling_conf.schema.setting import setting


@dataclass(kw_only=True)
class OptimConfig:
    """Any optimizer of `torch.optim`, or a class of your own; its other options stand beside these keys
    (`optim.betas=[0.9,0.95]`, `optim.momentum=0.9`)."""

    read_by: ClassVar[str] = "danling_conf.components.optimizer"
    open_to: ClassVar[str] = "optimizer options"

    type: str = "adamw"
    """Name of a class in `torch.optim`, in any case, or the dotted path of your own class."""
    lr: Optional[float] = setting(1e-3, at_least=0)
    """Learning rate. Unset: the optimizer's own default."""
    weight_decay: Optional[float] = setting(None, at_least=0)
    """Weight decay. Unset: the optimizer's own default."""
    param_groups: Optional[List[Dict[str, Any]]] = None
    """Parameter groups by regular expression: each has `pattern` (`re.search` on the parameter's fully qualified name;
    the first group that matches takes it) and options, or `lr_multiplier`, `weight_decay_multiplier`, `beta1`, `beta2`.
    A pattern that matches no parameter is an error. Unset: all parameters are one group."""

    _target_: str = "danling_conf.components.optimizer.from_keywords"
    _recursive_: bool = False
