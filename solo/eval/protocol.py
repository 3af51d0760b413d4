"""``main_linear.py``: the published linear evaluation and fine-tuning of a checkpoint, from keys to ``results.json``."""

import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from solo import pairs
from solo.config import bind, plain
from solo.console import say
from solo.data.bad import AgreedCount
from solo.data.datasets import DATASETS
from solo.data.module import DataModule
from solo.data.views import Chance, Crop, View
from solo.devices import MAX_EPOCHS, settle
from solo.errors import ConfigError
from solo.eval.linear import Classifier, LinearConfig
from solo.eval.prepare import data_config, data_module
from solo.eval.results import record, run_directory, show, unwritable, writable
from solo.export import Pretrained, load
from solo.files import write_file
from solo.optim import scaled_lr
from solo.spared import Spared


def evaluate_linear(
    values: dict[str, Any], trainer_arguments: Collection[str], callbacks: Sequence[pl.Callback] = ()
) -> dict[str, float]:
    """Train the classifier, print its accuracy and record it in ``results.json``.

    Args:
        values: keys of `LinearConfig` and arguments of Lightning's Trainer.
        trainer_arguments: which keys are the Trainer's.
        callbacks: what watches the training.

    Returns:
        ``acc1`` and ``acc5`` after the last epoch, ``best_acc1`` over the epochs, percent of the validation images.

    Raises:
        ConfigError: wrong keys, no such checkpoint, or images that do not suit it.
    """
    config, processes = _bound(values, trainer_arguments)
    source = load(config.checkpoint, config.backbone)
    pl.seed_everything(config.seed, verbose=False)
    images = data_config(source, config.data)
    views = config.augmentations or [standard_view(images.size or source.image_size or DATASETS[images.dataset].size)]
    data = data_module(source, images, views, 1, config.seed)
    data.batch_size = min(config.optimizer.batch_size, len(data.selected))
    if data.batch_size < config.optimizer.batch_size:
        say(f"{data.batch_size} images: one batch an epoch, optimizer.batch_size={config.optimizer.batch_size} is more")
        config.optimizer.batch_size = data.batch_size
    _suits(config, len(data.selected), data.batch_size * processes)
    name = ("finetune" if config.finetune else "linear") + (f"@{images.fraction:g}" if images.fraction < 1 else "")
    output = writable(config.output) or run_directory(source.path)
    model = Classifier(source.backbone, data.spec.classes, config).train()
    trainer = _trainer(config, output / name, callbacks)
    trainer.fit(model, datamodule=data)
    if trainer.max_steps > 0 or trainer.check_val_every_n_epoch != 1:
        trainer.validate(model, datamodule=data, verbose=False)     # the last epoch may not have been
    accuracy = {key: float(trainer.callback_metrics[f"val/{key}"]) for key in ("acc1", "acc5")}
    accuracy["best_acc1"] = model.best
    if trainer.is_global_zero:
        _keep(name, output, config, source, data, model, accuracy)
    return accuracy


def standard_view(size: int) -> View:
    """The train view of the published protocol: a crop of 8 to 100 % of the image, and a flip."""
    return View(rrc=Crop(crop_min_scale=0.08, crop_max_scale=1.0), horizontal_flip=Chance(prob=0.5), crop_size=size)


def _bound(values: dict[str, Any], trainer_arguments: Collection[str]) -> tuple[LinearConfig, int]:
    trainer = {key: value for key, value in values.items() if key in trainer_arguments}
    own = {key: value for key, value in values.items() if key not in trainer_arguments}
    if "trainer" in own:
        raise ConfigError("unknown key trainer: write the Trainer's arguments at the top level, e.g. max_epochs=10")
    if trainer.get("limit_val_batches") == 0:
        raise ConfigError("limit_val_batches=0 leaves nothing to evaluate on")
    config = bind(LinearConfig, own, also_known=trainer_arguments)
    config.trainer, processes = settle(
        {"max_epochs": MAX_EPOCHS, "num_sanity_val_steps": 0, "enable_model_summary": False, **trainer})
    if wrong := pairs.of_epochs(config.trainer, config.scheduler):
        raise ConfigError("\n".join(wrong))
    return config, processes


def _suits(config: LinearConfig, images: int, global_batch: int) -> None:
    """Refuse what so many images make impossible, and say what they leave without effect."""
    trainer, batches = config.trainer, images // global_batch
    if wrong := pairs.of_steps(trainer, config.scheduler, batches):
        raise ConfigError("\n".join(wrong))
    lr = scaled_lr(config.optimizer.lr, global_batch * trainer.get("accumulate_grad_batches", 1))
    for note in pairs.idle(trainer, config.scheduler, batches, lr):
        say(f"note: {note}")


def _trainer(config: LinearConfig, folder: Path, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    try:
        return pl.Trainer(**config.trainer, callbacks=[*callbacks, AgreedCount()],
                          logger=Spared("csv", lambda: CSVLogger(folder, name="csv"), rests=False),
                          default_root_dir=folder, enable_checkpointing=False, use_distributed_sampler=False,
                          enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks))
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigError(f"the Trainer refuses its arguments: {' '.join(str(error).split())}") from error


def _keep(
    name: str,
    output: Path,
    config: LinearConfig,
    source: Pretrained,
    data: DataModule,
    model: Classifier,
    accuracy: dict[str, float],
) -> None:
    """The numbers in a table, whatever the disk takes; then the trained weights, the images used, and the numbers again.

    Raises:
        EnvironmentFault: a file cannot be written.
    """
    what = "all weights fine-tuned" if config.finetune else "linear classifier on frozen features"
    protocol = (f"{what}, {len(data.selected)} labelled train images ({100 * data.config.fraction:g} %), "
                f"{config.trainer['max_epochs']} epochs, {config.optimizer.name}, validation split")
    show(f"{name} · {source.path}", ["accuracy in %", "top-1", "top-5", "best top-1"],
         [["last epoch", accuracy["acc1"], accuracy["acc5"], accuracy["best_acc1"]]], protocol)
    buffer = io.BytesIO()
    torch.save((model if config.finetune else model.head).state_dict(), buffer)
    try:
        write_file(output / name / "weights.pt", buffer.getvalue())
        write_file(output / name / "indices.json", json.dumps(data.selected.tolist()).encode())
    except OSError as error:
        raise unwritable(output / name, error) from error
    path = record(output, name, {
        "metric": "accuracy in percent", "protocol": protocol, "results": accuracy, "indices": f"{name}/indices.json",
        "checkpoint": str(source.path), "checkpoint_sha256": source.sha256,
        "config": {**plain(config), "backbone": plain(source.config), "data": plain(data.config)},
    })
    say(f"results: {path}")
