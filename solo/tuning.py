"""``auto_batch_size=true`` and ``auto_lr=true``: Lightning's Tuner looks for them before an otherwise ordinary run.

What was found is kept in a file beside the runs whose name is made of the config without the values searched for. So the
same command, given again, finds the values and with them its run, and continues it.
"""

import copy
import dataclasses
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins import CheckpointIO
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.tuner import Tuner
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.memory import garbage_collection_cuda
from torch import Tensor
from torch.optim import Optimizer

from solo.batch import Batch
from solo.console import log, say
from solo.data.loaders import TrainLoader
from solo.data.module import DataModule
from solo.errors import ConfigError, EnvironmentFault, Interrupted, NumericsError, hearing
from solo.experiment import Experiment
from solo.files import write_file
from solo.methods import Method
from solo.reading import read_json

_FIRST_BATCH, MAX_BATCH = 2, 8192
_TRIAL_STEPS = 3
_RATE_STEPS = 100
# Rates tried, of the whole batch: MV-MR's range for Adam; SGD and LARS live higher. Elsewhere large rates only collapse.
_RATES = {"adam": (1e-5, 1e-1), "adamw": (1e-5, 1e-1)}
_OTHER_RATES = (1e-3, 10.0)
_FIRST_RATES = 10       # that are not judged: the smoothed loss still settles
_DIVERGED = 4.0         # times the first loss, or times 1 where that is smaller; losses may begin near 0 or below it
# The Trainer's arguments that decide what a step computes and how much memory it takes.
_STEP = ("accelerator", "devices", "strategy", "precision", "accumulate_grad_batches", "gradient_clip_val",
         "gradient_clip_algorithm", "deterministic", "benchmark", "detect_anomaly")


def tuned(
    config: Experiment, arguments: dict[str, Any], processes: int, build: Callable[[Experiment], Method]
) -> Experiment:
    """The experiment with the batch size, and then the learning rate, that were searched for; others are left as they are.

    Args:
        config: the run as asked for.
        arguments: its Trainer arguments, settled for this machine.
        processes: of the run; a search needs one.
        build: a method from its experiment, freshly initialised.

    Returns:
        A config without ``auto_batch_size`` and ``auto_lr``, in whose place stand the values.

    Raises:
        ConfigError: several processes; a rate for a checkpoint; no batch size suits the method.
        EnvironmentFault: the smallest batch does not fit in memory; the file cannot be written.
        NumericsError: the loss diverges at almost every rate.
    """
    wanted = [name for name in ("auto_batch_size", "auto_lr") if getattr(config, name)]
    if not wanted:
        return config
    if processes > 1:
        raise ConfigError(f"{' and '.join(wanted)} search in one process, and this run has {processes}: search with devices=1, "
                          f"then give the values as optimizer.batch_size and optimizer.lr")
    if config.auto_lr and config.resume not in ("auto", "never"):
        raise ConfigError(f"auto_lr searches with an untrained network, and resume={config.resume} has a trained one: "
                          f"give optimizer.lr")
    path = _record(config, wanted)
    found = _read(path) if path.exists() and config.resume != "never" else None
    if found is None:
        found = _search(config, arguments, build)
        try:
            write_file(path, json.dumps(found, indent=1).encode())
        except OSError as error:
            raise EnvironmentFault(f"checkpoint.dir={config.checkpoint.dir} cannot be written: {error.strerror}") from error
    else:
        values = ", ".join(f"optimizer.{key}={value:g}" for key, value in found.items())
        say(f"{' and '.join(wanted)}: {values} as found before (remove {path} to search again)")
    optimizer = dataclasses.replace(config.optimizer, **found)
    return dataclasses.replace(config, optimizer=optimizer, auto_batch_size=False, auto_lr=False)


def _record(config: Experiment, wanted: list[str]) -> Path:
    """Where the result of this search is kept."""
    neutral = dataclasses.replace(config.optimizer, lr=1.0 if config.auto_lr else config.optimizer.lr)
    run = dataclasses.replace(config, optimizer=neutral).run_dir(0 if config.auto_batch_size else config.optimizer.batch_size)
    return run.with_name(f"{run.name}.{'+'.join(wanted)}.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        kinds: dict[str, type] = {"batch_size": int, "lr": float}
        whole = isinstance(found, dict) and all(type(value) is kinds.get(key) for key, value in found.items())
        if not whole or not found or min(found.values()) <= 0:
            raise ValueError("it must hold batch_size, lr, or both")
        return dict(found)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is damaged ({error}): remove it to search again") from error


def _search(config: Experiment, arguments: dict[str, Any], build: Callable[[Experiment], Method]) -> dict[str, Any]:
    """The values found, as keys of the optimizer block."""
    found: dict[str, Any] = {}
    given = 1 if config.auto_batch_size else config.optimizer.batch_size
    batches = _Batches(DataModule(config.data, config.augmentations, given, config.seed))
    build(config).check(given, batches.crops)
    if config.auto_batch_size:
        found["batch_size"] = batches.batch_size = _batch_size(build(config), batches, arguments)
        say(f"auto_batch_size: optimizer.batch_size={batches.batch_size}, the largest that fits and suits the method")
        config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, **found))
    if config.auto_lr:
        rate, edge = _rate(build(config), batches, arguments)
        images = config.optimizer.batch_size * arguments.get("accumulate_grad_batches", 1)
        found["lr"] = float(f"{rate * 256 / images:.3g}")
        say(f"auto_lr: optimizer.lr={found['lr']:g} per 256 images, {rate:.3g} at {images} images a step"
            + "; at the edge of the rates tried: hold it against the recipe's" * edge)
    return found


# --- the two searches ----------------------------------------------------------------------------------------------


def _batch_size(method: Method, batches: "_Batches", arguments: dict[str, Any]) -> int:
    """The largest batch up to that which the Tuner, doubling it, could train with, that the method accepts."""
    batches.most = most = _accepted(method, batches.crops, min(batches.most, MAX_BATCH))
    if most < 2:
        raise ConfigError("auto_batch_size: only a batch of 1 divides the method's queues: give them other sizes")
    trial = _Trial(method)
    batches.batch_size = _FIRST_BATCH                                           # the Tuner sets it only after it has loaded one
    with _tuner(arguments, batches) as tuner:
        tuner.scale_batch_size(
            trial, datamodule=batches, init_val=_FIRST_BATCH, steps_per_trial=_TRIAL_STEPS, max_val=2 * most
        )
    if not trial.fitted:
        raise EnvironmentFault("auto_batch_size: not even the smallest batch fits in memory")
    return _accepted(method, batches.crops, trial.fitted)


def _accepted(method: Method, crops: list[int], most: int) -> int:
    """The largest batch of at most ``most`` that the method's own check passes: queues are multiples of it."""
    for size in range(most, 0, -1):
        try:
            method.check(size, crops)
            return size
        except ConfigError as error:
            refusal = error
    raise refusal


def _rate(method: Method, batches: "_Batches", arguments: dict[str, Any]) -> tuple[float, bool]:
    """Where the loss falls most steeply while the rate grows exponentially; whether that is the first or last one judged."""
    low, high = _RATES.get(method.optimizer_config.name, _OTHER_RATES)
    with _tuner(arguments, batches) as tuner:
        finder = tuner.lr_find(
            _Trial(method), datamodule=batches, min_lr=low, max_lr=high, num_training=_RATE_STEPS,
            early_stop_threshold=None, update_attr=False,               # its stop takes every loss below 0 for a diverging one
        )
    assert finder is not None
    rates, losses = finder.results["lr"], finder.results["loss"]
    limit = _DIVERGED * max(1.0, abs(losses[0]))
    end = next((step for step, loss in enumerate(losses) if not loss < limit), len(losses) - 1)
    rate = finder.suggestion(_FIRST_RATES, len(losses) - end) if end - _FIRST_RATES > 1 else None
    if rate is None:
        raise NumericsError(f"auto_lr: the loss diverges already at a rate of {rates[end]:.3g}: give optimizer.lr")
    return float(rate), rate in (rates[_FIRST_RATES], rates[end - 1])


@contextmanager
def _tuner(arguments: dict[str, Any], batches: "_Batches") -> Iterator[Tuner]:
    """A Tuner over a Trainer that makes the run's steps and leaves nothing behind, neither files nor words."""
    plugins: list[Any] = [_Memory(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])]
    try:
        trainer = pl.Trainer(**{key: value for key, value in arguments.items() if key in _STEP}, max_epochs=-1, logger=False,
                             plugins=plugins, enable_checkpointing=False, enable_progress_bar=False,
                             enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0)
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"the Trainer refuses its arguments: {' '.join(str(error).split())}") from error
    process = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:                  # a loader's worker
            raise SystemExit(128 + number)
        name = signal.Signals(number).name
        raise Interrupted(f"{name} in a search: nothing is kept, the same command searches again", number)

    log.disabled = True
    try:
        with hearing(leave):
            yield Tuner(trainer)
    finally:
        log.disabled = False
        batches.data.teardown("fit")
        garbage_collection_cuda()


class _Trial(pl.LightningModule):
    """A method whose learning rate is the Tuner's, not the schedule's; groups with a rate of their own keep it.

    Attributes:
        fitted: the largest batch that a trial has finished with.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self.fitted = 0
        self._size = 0

    def configure_optimizers(self) -> Optimizer:
        optimizer = self.method.configure_optimizers()
        own = {name for name, options in self.method.param_options().items() if "lr" in options}
        groups = [group for group in optimizer.param_groups if group["name"].removesuffix("_no_decay") in own]
        self._fixed = [(group, group["lr"]) for group in groups]
        return optimizer

    def on_train_start(self) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if hasattr(callback, "progress_bar_refresh_rate"):
                callback.progress_bar_refresh_rate = 0
        if self.device.type == "cpu" and self.fitted and 2 * _peak() > _memory():
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")    # what the Tuner knows; the system would kill

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._size = len(batch.labels)
        for group, lr in self._fixed:
            group["lr"] = lr

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self.method.training_step(batch, batch_idx)

    def optimizer_step(self, *arguments: Any, **keywords: Any) -> None:
        super().optimizer_step(*arguments, **keywords)
        self.method.after_step(0.0)

    def on_train_end(self) -> None:
        self.fitted = max(self.fitted, self._size)


class _Batches(pl.LightningDataModule):
    """The run's images from the first batch on, in batches of the Tuner's choice and at most ``most`` images."""

    def __init__(self, data: DataModule) -> None:
        super().__init__()
        self.data, self.most = data, len(data.selected)
        self.crops = [view.crop_size for view in data.views]

    @property
    def batch_size(self) -> int:
        """Images of a batch: what the Tuner reads and sets."""
        return self.data.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.data.batch_size = min(max(size, 1), self.most)

    def train_dataloader(self) -> TrainLoader:
        return self.data.train_dataloader()


class _Memory(CheckpointIO):
    """Where the Tuner keeps the state it starts from."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self._held[str(path)] = copy.deepcopy(checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return self._held[str(path)]

    def remove_checkpoint(self, path: Any) -> None:
        del self._held[str(path)]


def _peak() -> int:
    """Bytes this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _memory() -> int:
    """Bytes of this machine, or of its container."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(physical, int(text)) if text.isdigit() else physical
