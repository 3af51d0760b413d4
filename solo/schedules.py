"""Schedules as pure functions of the optimizer step: nothing to store, nothing to restore."""

import math
from dataclasses import dataclass
from typing import Literal

from solo.ranges import require


@dataclass(kw_only=True)
class SchedulerConfig:
    """Learning-rate schedule. Epoch counts may be fractions; ``warmup_start_lr`` and ``min_lr`` are taken as they are.

    ``warmup_peak``: the first step at the full rate is the ``last`` of the warm-up (solo-learn, SCE) or the one ``after``
    it (UniGrad, MV-MR). ``cosine_over``: half a cosine spans the ``rest`` of the run, or the length of the whole ``run``, so
    that training ends before it does, above ``min_lr`` (UniGrad).
    """

    name: Literal["warmup_cosine", "step", "none"] = "warmup_cosine"
    warmup_epochs: float = 10
    warmup_start_lr: float = 3e-5
    warmup_peak: Literal["last", "after"] = "last"
    min_lr: float = 0.0
    cosine_over: Literal["rest", "run"] = "rest"
    lr_decay_steps: list[int] | None = None
    lr_decay_factor: float = 0.1

    def __post_init__(self) -> None:
        also = []
        if self.name == "step" and not self.lr_decay_steps:
            also.append("lr_decay_steps must list the epochs at which the step schedule decays")
        if min(self.lr_decay_steps or [0]) < 0:
            also.append(f"lr_decay_steps must not be negative, got {self.lr_decay_steps}")
        require(self, positive="lr_decay_factor", at_least_0="warmup_epochs warmup_start_lr min_lr", also=also)


def warmup_cosine(
    step: int,
    total: int,
    warmup: float,
    base: float,
    start: float = 3e-5,
    floor: float = 0.0,
    peak: Literal["last", "after"] = "last",
    over: Literal["rest", "run"] = "rest",
) -> float:
    """Linear warm-up from ``start`` to ``base``, then half a cosine down to ``floor``.

    ``warmup=0`` begins at ``base``; a fractional ``warmup`` never exceeds it; beyond ``total`` the value stays.

    Args:
        step: optimizer steps done, from 0.
        total: optimizer steps of the whole run.
        warmup: warm-up steps, may be a fraction.
        peak: the step that first has ``base``: the last of the warm-up, or the one after it.
        over: what half a cosine spans: the steps after the warm-up, or as many as the whole run has.
    """
    if step < warmup:
        span = warmup if peak == "after" else warmup - 1
        return start + (base - start) * min(1.0, step / span) if span > 0 else start
    length = total if over == "run" else total - warmup
    return cosine((min(step, total) - warmup) / length if length > 0 else 1.0, base, floor)


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine from ``start`` at progress 0 to ``end`` at progress 1, constant outside."""
    progress = min(max(progress, 0.0), 1.0)
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def learning_rate(config: SchedulerConfig, step: int, total: int, steps_per_epoch: float, base: float) -> float:
    """The learning rate of optimizer step ``step`` for a group whose scaled base rate is ``base``."""
    if config.name == "warmup_cosine":
        warmup = config.warmup_epochs * steps_per_epoch
        floor, peak, over = config.min_lr, config.warmup_peak, config.cosine_over
        return warmup_cosine(step, total, warmup, base, config.warmup_start_lr, floor, peak, over)
    if config.name == "step":
        decays = sum(step >= epoch * steps_per_epoch for epoch in config.lr_decay_steps or ())
        return base * config.lr_decay_factor**decays
    return base


@dataclass(kw_only=True)
class Ramp:
    """A number that goes from ``start`` to ``end`` over the first ``share`` of the run, and stays there."""

    start: float
    end: float
    share: float = 1.0
    shape: Literal["cosine", "linear"] = "cosine"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")


def value_at(value: float | Ramp, progress: float) -> float:
    """A number as it is, or a ramp's value at ``progress`` in 0..1."""
    if not isinstance(value, Ramp):
        return value
    done = min(progress / value.share, 1.0)
    return cosine(done, value.start, value.end) if value.shape == "cosine" else value.start + (value.end - value.start) * done


def ends(value: float | Ramp) -> tuple[float, ...]:
    """The extremes that a number or a ramp takes."""
    return (value.start, value.end) if isinstance(value, Ramp) else (value,)
