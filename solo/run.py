"""An experiment from its config to its last checkpoint."""

import json
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

from solo import backbones, checkpoint, optim, pairs
from solo.agreement import Agreement
from solo.awaited import awaited
from solo.batching import ViewBatching
from solo.callbacks.checkpoint import Checkpointer
from solo.callbacks.failed import FailedStep
from solo.callbacks.health import FiniteGuard, Health
from solo.callbacks.knn import KNNCallback
from solo.callbacks.metrics import MetricsLogger
from solo.callbacks.overflow import OverflowGuard
from solo.callbacks.probe import OnlineProbe
from solo.callbacks.progress import RunProgress
from solo.callbacks.signals import ValidationGuard
from solo.compiling import compile_networks
from solo.config import load
from solo.console import quiet_libraries, say
from solo.data.bad import AgreedCount
from solo.data.datasets import DATASETS, statistics
from solo.data.module import DataModule
from solo.data.resume import SettledCounters
from solo.data.views import expand
from solo.devices import MAX_EPOCHS, settle
from solo.dist import part
from solo.errors import ConfigError, EnvironmentFault, SoloError
from solo.eval.report import report
from solo.experiment import Experiment, experiment
from solo.files import write_file
from solo.loggers import loggers
from solo.methods import METHODS, Method
from solo.peers import together
from solo.profiler import NoProfiler
from solo.start import alike, begin
from solo.strategy import EpochLoop, Launcher, Strategy, meet
from solo.tuning import tuned


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        method: the trained method.
        run_dir: its directory.
        checkpoint: its last checkpoint, None when saving is off.
    """

    method: Method
    run_dir: Path
    checkpoint: Path | None


def library_version() -> str:
    """The installed version, or ``0`` when the package runs from its folder."""
    try:
        return version("solo-ssl")
    except PackageNotFoundError:
        return "0"


def build(config: str | Path | dict[str, Any] | Experiment, overrides: Iterable[str] = ()) -> Method:
    """The method an experiment trains, freshly initialised from its seed.

    Args:
        config: a YAML file, its plain values, or a bound experiment.
        overrides: ``key=value`` texts, for a YAML file.

    Raises:
        ConfigError: one line for everything that is wrong.
    """
    if isinstance(config, (str, Path)):
        config = load(config, overrides)
    if isinstance(config, dict):
        config = experiment(config)
    return _method(config, _in_chans(config))


def _in_chans(config: Experiment) -> int:
    return config.data.in_chans or DATASETS[config.data.dataset].in_chans


def _method(config: Experiment, in_chans: int) -> Method:
    pl.seed_everything(config.seed, verbose=False)
    image_size = max(view.crop_size for view in config.augmentations)
    backbone = backbones.build(config.backbone, in_chans, image_size)
    method = METHODS[config.method](backbone, config.method_kwargs)
    method.optimizer_config, method.scheduler_config, method.seed = config.optimizer, config.scheduler, config.seed
    method.mean, method.std = statistics(config.data)
    method.each = ViewBatching(config.view_batching, config.micro_batch)
    return method


def pretrain(config: Experiment, extra_callbacks: Sequence[pl.Callback] = ()) -> Result:
    """Train, or continue the training that this config's directory holds, and report.

    Args:
        config: the run.
        extra_callbacks: observers of the caller's own.

    Raises:
        ConfigError, DataError, EnvironmentFault: before anything is trained.
        NumericsError: a loss stopped being finite.
        Interrupted: a signal came; the state is saved.
    """
    if problems := pairs.of_epochs(config.trainer, config.scheduler):
        raise ConfigError("\n".join(problems))
    arguments, processes = settle(config.trainer)
    config = tuned(config, arguments, processes, build)
    global_batch = config.optimizer.batch_size * processes
    run_dir = config.run_dir(global_batch)
    method = _method(config, _in_chans(config))
    data = _checked_data(config, method, global_batch)
    data.report_dir = run_dir
    for note in _idle(config, data, global_batch):
        say(f"note: {note}")
    trainer = _trainer(config, arguments, run_dir, data, method, global_batch, extra_callbacks)
    if note := method.each.note(method.backbone):
        say(note)
    if config.compile:
        compile_networks(method, trainer.strategy.root_device)
    meet(trainer, config.step_timeout)
    alike(config, trainer.strategy.root_device, data.listing, method)
    start = begin(config, run_dir, method, trainer)
    with start.lease:
        if start.path is not None and start.complete:
            results = run_dir / "results.json"
            found = f"results: {results}" if results.exists() else f"{start.path} is the end of its training"
            say(f"nothing to train (resume=never starts anew); {found}")
            method.load_state_dict(trainer.strategy.checkpoint_io.load_checkpoint(start.path)["state_dict"])
        else:
            _write_config(config, run_dir)
            _fit(trainer, method, data, start.path, config.step_timeout)
        if data.bad.count:
            say(f"{data.bad.count} unreadable images were replaced: {', '.join(data.bad.names[:5])}")
        last = run_dir / "last.ckpt" if config.checkpoint.enabled else None
        others = start.complete and start.path is not None and not start.path.resolve().is_relative_to(run_dir.resolve())
        if others and config.checkpoint.enabled:
            last = start.path
        if trainer.world_size > 1:
            part()                              # the report is rank 0's alone
        drawn = others or (start.complete and (run_dir / "report.png").exists())
        if config.report.enabled and trainer.is_global_zero and not drawn:
            report(config.report, method, _method(config, _in_chans(config)).backbone, data, run_dir, last)
    return Result(method, run_dir, last)


def _checked_data(config: Experiment, method: Method, global_batch: int) -> DataModule:
    """The images, where these, the method and the rest of the config suit each other.

    Raises:
        ConfigError: one line for each that does not.
    """
    problems, data = [], None
    if config.optimizer.batch_size == 1 and any(isinstance(module, nn.BatchNorm1d) for module in method.modules()):
        problems.append("optimizer.batch_size=1: BatchNorm needs at least 2 images per process")
    try:
        method.check(global_batch, [view.crop_size for view in expand(config.augmentations)])
    except ConfigError as error:
        problems.append(str(error))
    try:
        data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, config.seed)
        problems += pairs.of_steps(config.trainer, config.scheduler, len(data.selected) // global_batch)
    except ConfigError as error:
        problems.append(str(error))
    if problems or data is None:
        raise ConfigError("\n".join(problems))
    return data


def _idle(config: Experiment, data: DataModule, global_batch: int) -> Iterator[str]:
    """A line for each value that these images leave without effect."""
    trainer, health, batches = config.trainer, config.health, len(data.selected) // global_batch
    accumulated = trainer.get("accumulate_grad_batches", 1)
    yield from pairs.idle(trainer, config.scheduler, batches, optim.scaled_lr(config.optimizer.lr, global_batch * accumulated))
    if health.stop_on_collapse:
        yield from pairs.after_the_end("health.stop_on_collapse", health.every * health.patience, trainer, batches)
    if labelled := int((data.labels >= 0).sum()) if data.spec.classes > 1 else 0:
        if config.knn.enabled:
            yield from pairs.of_bank("knn.k", config.knn.k, min(labelled, config.knn.max_train or labelled))
        if config.report.enabled:
            yield from pairs.of_bank("report.k", [config.report.k], min(labelled, config.report.max_train))


def _fit(trainer: pl.Trainer, method: Method, data: DataModule, start: Path | None, timeout: float) -> None:
    try:
        with together(timeout):
            trainer.fit(method, datamodule=data, ckpt_path=start)
    except MisconfigurationException as error:
        raise ConfigError(f"the Trainer refuses its arguments: {' '.join(str(error).split())}") from error
    except SoloError as error:
        if isinstance(trainer.strategy.launcher, Launcher):
            trainer.strategy.launcher.kill(signal.SIGKILL)      # a process that no longer answers does not leave by itself
        if where := awaited(error):
            waited = f"rank {trainer.global_rank} waited for it behind step {trainer.global_step}, in {where}"
            raise type(error)(f"{error}; {waited}") from error
        raise


def _rank() -> int:
    """This process's rank, known from the environment before the processes have met."""
    return int(getattr(rank_zero_only, "rank", 0))


def _write_config(config: Experiment, run_dir: Path) -> None:
    if _rank() == 0:
        try:
            write_file(run_dir / "config.json", json.dumps(config.record(), indent=1).encode())
        except OSError as error:
            raise EnvironmentFault(f"checkpoint.dir={config.checkpoint.dir} cannot be written: {error.strerror}") from error


def _trainer(
    config: Experiment,
    given: dict[str, Any],
    run_dir: Path,
    data: DataModule,
    method: Method,
    global_batch: int,
    extra_callbacks: Sequence[pl.Callback],
) -> pl.Trainer:
    arguments = {
        "max_epochs": MAX_EPOCHS,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 50,
        "enable_model_summary": False,
        "profiler": NoProfiler(),
        **given,
    }
    if global_batch > config.optimizer.batch_size and arguments.get("strategy", "auto") in ("auto", "ddp"):
        arguments["strategy"] = Strategy()
    classes = data.spec.classes
    provenance = {"format": checkpoint.FORMAT, "version": library_version(), "method": config.method, "config": config.record()}
    agreement = Agreement()
    guard = Health(config.health, agreement) if config.health.enabled else FiniteGuard(agreement)
    saver = Checkpointer(config.checkpoint, run_dir, provenance, agreement)
    callbacks: list[pl.Callback] = [guard, OverflowGuard(), ValidationGuard(saver)]
    if config.probe.enabled and classes > 1:
        lr = optim.scaled_lr(config.optimizer.classifier_lr, global_batch)
        callbacks.append(OnlineProbe(method.dim, classes, lr, config.probe))
    if config.knn.enabled and classes > 1:
        callbacks.append(KNNCallback(classes, config.knn))
    callbacks += [
        *extra_callbacks,
        MetricsLogger(),
        RunProgress(),
        SettledCounters(),
        AgreedCount(agreement),
        FailedStep(run_dir, config.method),
        saver,
    ]
    plugins: list[Any] = [checkpoint.AtomicCheckpointIO(run_dir)]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))
    try:
        trainer = pl.Trainer(
            **arguments,
            callbacks=callbacks,
            logger=loggers(config, run_dir),
            plugins=plugins,
            use_distributed_sampler=False,
            default_root_dir=run_dir,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"the Trainer refuses its arguments: {' '.join(str(error).split())}") from error
    trainer.fit_loop.epoch_loop = EpochLoop(trainer, trainer.min_steps, trainer.max_steps)
    return trainer


def main(values: dict[str, Any]) -> None:
    """``main_pretrain.py``: bind, train, say where things are."""
    quiet_libraries()
    config = experiment(values)
    result = pretrain(config)
    say(f"checkpoint: {result.checkpoint}" if result.checkpoint else "no checkpoint: checkpoint.enabled=false")
