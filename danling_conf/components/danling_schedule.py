"""Learning-rate curves of DanLing 0.4: `danling-conf import` names this class, so that a run keeps its curve.

They differ from the shapes of the same names in `scheduler.py`: the rate falls geometrically, not by differences, and
linear warm-up and cool-down are multiplied on top of it.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class DanLingLR(LRScheduler):
    """`danling.optim.LRScheduler`, rate for rate.

    Args:
        total_steps: how often it advances in the run.
        method: how progress becomes decay: `cosine`, `linear` or `constant`.
        final_lr_ratio: rate at the end, as a share of the base rate; 1e-3 where `final_lr` is not given either.
        final_lr: rate at the end; excludes `final_lr_ratio`.
        min_lr: no rate is smaller; warm-up starts and cool-down ends there.
        warmup_steps: a twentieth of the run when None.
        cooldown_steps: a fifth of the run when None.
        scaling: `percentile` (geometric) or `numerical`; by `final_lr_ratio` the first, by `final_lr` the second.

    Raises:
        ValueError: for arguments that exclude each other or do not fit into the run.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        *,
        method: str = "cosine",
        final_lr_ratio: float | None = None,
        final_lr: float | None = None,
        min_lr: float = 1e-9,
        warmup_steps: int | None = None,
        cooldown_steps: int | None = None,
        scaling: str | None = None,
        last_epoch: int = -1,
    ) -> None:
        if method not in ("cosine", "linear", "constant"):
            raise ValueError(f"method={method}: it must be cosine, linear or constant")
        if scaling not in (None, "percentile", "numerical"):
            raise ValueError(f"scaling={scaling}: it must be percentile or numerical")
        if final_lr is not None and final_lr_ratio is not None:
            raise ValueError("final_lr and final_lr_ratio exclude each other")
        if final_lr is None and final_lr_ratio is None:
            final_lr_ratio = 1e-3
        self.total_steps, self.method = total_steps, method
        self.final_lr_ratio, self.final_lr = final_lr_ratio, final_lr
        self.min_lr = min_lr if final_lr is None else min(min_lr, final_lr)
        self.scaling = scaling or ("numerical" if final_lr_ratio is None else "percentile")
        self._warmup_steps, self._cooldown_steps = warmup_steps, cooldown_steps
        if self.warmup_steps + self.cooldown_steps > total_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and cooldown_steps={self.cooldown_steps} are longer than the run, "
                f"in which it advances {total_steps} times"
            )
        super().__init__(optimizer, last_epoch)

    @property
    def warmup_steps(self) -> int:
        """As given, or by the length of the run, which may have changed since the run was saved."""
        return self.total_steps // 20 if self._warmup_steps is None else self._warmup_steps

    @property
    def cooldown_steps(self) -> int:
        """As given, or by the length of the run."""
        return self.total_steps // 5 if self._cooldown_steps is None else self._cooldown_steps

    def get_lr(self) -> list[float | Tensor]:
        """Rates of the update that comes next."""
        return [self._rate(float(base), self.last_epoch + 1) for base in self.base_lrs]

    def _rate(self, base: float, step: int) -> float:
        if base == 0:
            return 0.0
        progress = min(step / self.total_steps, 1.0)
        decay = {"linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2, "constant": 0.0}[self.method]
        final = base * self.final_lr_ratio if self.final_lr_ratio is not None else self.final_lr or 0.0
        rate = base * (final / base) ** decay if self.scaling == "percentile" else (1 - decay) * (base - final) + final
        left = self.total_steps - step
        if step < self.warmup_steps:
            rate = self.min_lr + step / self.warmup_steps * (rate - self.min_lr)
        elif self.cooldown_steps and left < self.cooldown_steps:
            rate = self.min_lr + max(left / self.cooldown_steps, 0.0) * (rate - self.min_lr)
        return max(self.min_lr, rate)
