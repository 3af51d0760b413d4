"""Schedules as pure functions of the optimizer step: nothing to store, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal

from solo.ranges import require


@dataclass(kw_only=True)
class SchedulerConfig:
    """Learning-rate schedule. Epoch counts may be fractions."""

    name: Literal["warmup_cosine", "step", "none"] = "warmup_cosine"
    warmup_epochs: float = 10
    warmup_start_lr: float = 3e-5
    min_lr: float = 0.0
    lr_decay_steps: list[int] | None = None
    lr_decay_factor: float = 0.1

    def __post_init__(self) -> None:
        also = []
        if self.name == "step" and not self.lr_decay_steps:
            also.append("lr_decay_steps must list the epochs at which the step schedule decays")
        if min(self.lr_decay_steps or [0]) < 0:
            also.append(f"lr_decay_steps must not be negative, got {self.lr_decay_steps}")
        require(self, positive="lr_decay_factor", at_least_0="warmup_epochs warmup_start_lr min_lr", also=also)


def warmup_cosine(step: int, total: int, warmup: float, base: float, start: float = 3e-5, floor: float = 0.0) -> float:
    """Linear warm-up from ``start`` to ``base``, then half a cosine down to ``floor``.

    The last warm-up step already has ``base``. ``warmup=0`` begins at ``base``; a fractional ``warmup`` never
    exceeds it; beyond ``total`` the value stays at ``floor``.

    Args:
        step: optimizer steps done, from 0.
        total: optimizer steps of the whole run.
        warmup: warm-up steps, may be a fraction.
    """
    if step < warmup:
        return start + (base - start) * min(1.0, step / (warmup - 1)) if warmup > 1 else start
    return cosine((step - warmup) / (total - warmup) if total > warmup else 1.0, base, floor)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1, constant outside."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config: SchedulerConfig, step: int, total: int, steps_per_epoch: float, base: float) -> float:
    """The learning rate of optimizer step ``step`` for a group whose scaled base rate is ``base``."""
    if config.name == "warmup_cosine":
        warmup = config.warmup_epochs * steps_per_epoch
        return warmup_cosine(step, total, warmup, base, config.warmup_start_lr, config.min_lr)
    if config.name == "step":
        decays = sum(step >= epoch * steps_per_epoch for epoch in config.lr_decay_steps or ())
        return base * config.lr_decay_factor**decays
    return base
