"""Values of a run that are each fine and do not suit each other; every pair is named at once, before any work.

What cannot be meant is refused, in lines that say what to do. What has merely no effect is a note, and the run trains.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from solo.devices import MAX_EPOCHS
from solo.schedules import SchedulerConfig

Trainer = dict[str, Any]        # arguments of Lightning's Trainer


def of_epochs(trainer: Trainer, scheduler: SchedulerConfig) -> list[str]:
    """What must be refused whatever the images are: a line each."""
    if (epochs := _epochs(trainer)) is None:
        return []
    problems, warmup = [], scheduler.warmup_epochs
    if scheduler.name == "warmup_cosine" and warmup > epochs:
        problems.append(f"scheduler.warmup_epochs={warmup:g} is longer than the whole run, max_epochs={epochs}: "
                        f"use scheduler.warmup_epochs={epochs}, or fast_dev_run=true for a try")
    if (least := trainer.get("min_epochs") or 0) > epochs:
        problems.append(f"min_epochs={least} is more than max_epochs={epochs}: use min_epochs={epochs} or max_epochs={least}")
    return problems


def of_steps(trainer: Trainer, scheduler: SchedulerConfig, batches: int) -> list[str]:
    """What must be refused with so many batches in an epoch: a line each."""
    if trainer.get("fast_dev_run") or not batches:      # no batch: the images' own refusal
        return []
    problems, accumulated, limit = [], trainer.get("accumulate_grad_batches", 1), trainer.get("max_steps", -1)
    used, per_epoch, steps = _limited(trainer, batches), _steps_per_epoch(trainer, batches), _steps(trainer, batches)
    if accumulated > batches and _limit(trainer) is None:
        problems.append(f"accumulate_grad_batches={accumulated} is more than the {batches} batches of an epoch: "
                        f"no step has so many, use at most {batches}")
    interval, validates = trainer.get("val_check_interval"), trainer.get("limit_val_batches") != 0
    if type(interval) is int and interval > used and validates and trainer.get("check_val_every_n_epoch", 1) is not None:
        problems.append(f"val_check_interval={interval} is more than the {used} batches of an epoch: "
                        "check_val_every_n_epoch=null counts on over epochs")
    warmup = scheduler.warmup_epochs * per_epoch
    if limit == steps and scheduler.name == "warmup_cosine" and warmup > limit:
        most = math.floor(100 * limit / per_epoch) / 100
        problems.append(f"scheduler.warmup_epochs={scheduler.warmup_epochs:g} are {warmup:g} steps, more than "
                        f"max_steps={limit}: use scheduler.warmup_epochs={most:g}, or fast_dev_run=true for a try")
    if (least := trainer.get("min_steps") or 0) > steps:
        problems.append(f"min_steps={least} is more than the {steps} steps of the run: use at most {steps}, or a longer run")
    return problems


def idle(trainer: Trainer, scheduler: SchedulerConfig, batches: int, lr: float) -> Iterator[str]:
    """What has no effect, or not the usual one, with so many batches in an epoch and this scaled rate: a note each."""
    if trainer.get("fast_dev_run") or not batches:
        return
    used, epochs = _limited(trainer, batches), _epochs(trainer)
    accumulated, between = trainer.get("accumulate_grad_batches", 1), trainer.get("check_val_every_n_epoch", 1)
    interval, validates = trainer.get("val_check_interval"), trainer.get("limit_val_batches") != 0
    if epochs and scheduler.name == "step" and (never := [at for at in scheduler.lr_decay_steps or () if at >= epochs]):
        yield f"scheduler.lr_decay_steps={never} lie behind the end of the run, max_epochs={epochs}"
    if scheduler.name == "warmup_cosine" and scheduler.min_lr > lr:
        yield f"scheduler.min_lr={scheduler.min_lr:g} is above the scaled rate of {lr:g}: the rate rises to it"
    if epochs and validates and (between or 1) > epochs:
        yield f"check_val_every_n_epoch={between} is more than max_epochs={epochs}: no epoch is validated"
    if type(interval) is int and validates and between is None and interval > _steps(trainer, batches) * accumulated:
        yield f"val_check_interval={interval} is more than the batches of the run: none is validated"
    if accumulated > used and _limit(trainer) is not None:
        yield f"accumulate_grad_batches={accumulated} is more than the {used} batches an epoch is limited to: it is one step"


def after_the_end(what: str, first: int, trainer: Trainer, batches: int) -> Iterator[str]:
    """A note where something can happen after ``first`` steps at the earliest and the run is shorter."""
    if not trainer.get("fast_dev_run") and batches and first > (steps := _steps(trainer, batches)):
        yield f"{what} comes after {first} steps at the earliest, and the run has {steps}"


def of_bank(key: str, neighbours: Sequence[int], images: int) -> Iterator[str]:
    """A note where k-NN is asked for more votes than there are images."""
    if many := [k for k in neighbours if k > images]:
        yield f"{key}={', '.join(map(str, many))} is more than the {images} labelled training images: all of them vote"


def _epochs(trainer: Trainer) -> int | None:
    """Of the run, where they are what ends it."""
    epochs = trainer.get("max_epochs", MAX_EPOCHS)
    return None if trainer.get("fast_dev_run") or epochs in (None, -1) else epochs


def _limit(trainer: Trainer) -> float | None:
    """Of an epoch's batches: a share, or a number."""
    return trainer.get("overfit_batches") or trainer.get("limit_train_batches")


def _limited(trainer: Trainer, batches: int) -> int:
    """Batches of an epoch, as Lightning takes them."""
    limit = _limit(trainer)
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else max(1, int(batches * limit))


def _steps_per_epoch(trainer: Trainer, batches: int) -> int:
    return math.ceil(_limited(trainer, batches) / trainer.get("accumulate_grad_batches", 1))


def _steps(trainer: Trainer, batches: int) -> int:
    """Optimizer steps of the run."""
    epochs, limit = _epochs(trainer), trainer.get("max_steps", -1)
    ends = [limit] * (limit > 0) + ([] if epochs is None else [epochs * _steps_per_epoch(trainer, batches)])
    return min(ends)
