"""Values of a run that are each fine and cannot be meant together; every pair is named at once, before any work."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from solo.data.module import DataModule
from solo.devices import MAX_EPOCHS
from solo.errors import ConfigError
from solo.experiment import Experiment
from solo.optim import scaled_lr


def refuse(config: Experiment) -> None:
    """What a config alone says of itself.

    Raises:
        ConfigError: one line for each pair.
    """
    if problems := list(_of_epochs(config)):
        raise ConfigError("\n".join(problems))


def of_run(config: Experiment, data: DataModule, global_batch: int) -> list[str]:
    """A line for each pair that the number of images decides.

    Args:
        config: the run.
        data: its images.
        global_batch: images of a batch over all processes.
    """
    return [*_of_steps(config, len(data.selected) // global_batch, global_batch), *_of_banks(config, data)]


def _of_epochs(config: Experiment) -> Iterator[str]:
    given, scheduler = config.trainer, config.scheduler
    epochs = given.get("max_epochs", MAX_EPOCHS)
    if given.get("fast_dev_run") or epochs in (None, -1):
        return
    yield from scheduler.too_long(epochs)
    if scheduler.name == "step" and (never := [epoch for epoch in scheduler.lr_decay_steps or () if epoch >= epochs]):
        yield f"scheduler.lr_decay_steps={never} lie behind the end of the run, max_epochs={epochs}"
    if (least := given.get("min_epochs") or 0) > epochs:
        yield f"min_epochs={least} is more than max_epochs={epochs}"
    if (between := given.get("check_val_every_n_epoch") or 1) > epochs and given.get("limit_val_batches") != 0:
        yield f"check_val_every_n_epoch={between} is more than max_epochs={epochs}: limit_val_batches=0 leaves validation out"


def _of_steps(config: Experiment, batches: int, global_batch: int) -> Iterator[str]:
    given, scheduler, health = config.trainer, config.scheduler, config.health
    if given.get("fast_dev_run"):
        return
    batches = _limited(batches, given.get("overfit_batches") or given.get("limit_train_batches"))
    accumulated = given.get("accumulate_grad_batches", 1)
    if accumulated > batches:
        yield f"accumulate_grad_batches={accumulated} is more than the {batches} batches of an epoch: no step has so many"
    interval = given.get("val_check_interval")
    if type(interval) is int and interval > batches and given.get("check_val_every_n_epoch", 1) is not None:
        yield (f"val_check_interval={interval} is more than the {batches} batches of an epoch: "
               "check_val_every_n_epoch=null counts on over epochs")
    per_epoch = math.ceil(batches / accumulated)
    epochs, limit = given.get("max_epochs", MAX_EPOCHS), given.get("max_steps", -1)
    ends = [limit] * (limit > 0) + [epochs * per_epoch] * (epochs not in (None, -1))
    steps = min(ends)
    if limit == steps and scheduler.name == "warmup_cosine" and (warmup := scheduler.warmup_epochs * per_epoch) > limit:
        yield f"scheduler.warmup_epochs={scheduler.warmup_epochs:g} are {warmup:g} steps, more than max_steps={limit}"
    if (least := given.get("min_steps") or 0) > steps:
        yield f"min_steps={least} is more than the {steps} steps of the run"
    peak = scaled_lr(config.optimizer.lr, global_batch * accumulated)
    if scheduler.name == "warmup_cosine" and scheduler.min_lr > peak and not config.auto_lr:
        yield (f"scheduler.min_lr={scheduler.min_lr:g} is above the rate it should fall from, "
               f"optimizer.lr={config.optimizer.lr:g} x {global_batch * accumulated}/256 = {peak:g}")
    if health.stop_on_collapse and (first := health.every * health.patience) > steps:
        yield (f"health.stop_on_collapse would come after health.every x health.patience = {first} steps, "
               f"and the run has {steps}")


def _limited(batches: int, limit: Any) -> int:
    """As Lightning reads ``limit_train_batches``: a share, or a number."""
    if limit is None:
        return batches
    return min(limit, batches) if isinstance(limit, int) else max(1, int(batches * limit))


def _of_banks(config: Experiment, data: DataModule) -> Iterator[str]:
    """k-NN votes of more images than there are."""
    labelled = int(np.count_nonzero(data.labels >= 0))
    for key, block, neighbours in (("knn", config.knn, config.knn.k), ("report", config.report, [config.report.k])):
        bank = min(labelled, block.max_train or labelled)
        many = [k for k in neighbours if k > bank]
        if block.enabled and bank and many:
            k = many if key == "knn" else many[0]
            yield f"{key}.k={k} is more than the {bank} labelled training images that vote: use at most {bank}"
