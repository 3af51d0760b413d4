"""A method under test, in the smallest experiment that has everything a real one has."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from solo import checkpoint
from solo.batch import Batch
from solo.data.module import DataModule
from solo.experiment import Experiment, experiment, schema_of
from solo.methods import METHODS, Method
from solo.run import build, pretrain

SIZES = {"proj_hidden_dim": 16, "proj_output_dim": 8, "pred_hidden_dim": 16, "queue_size": 32}
BACKBONE = {"name": "resnet18", "kwargs": {"channels": [4, 4, 4, 8], "layers": [1, 1, 1, 1]}, "stem": "imagenet"}
VIEW = {
    "crop_size": 16,
    "rrc": {"crop_min_scale": 0.3},
    "horizontal_flip": {"prob": 0.5},
    "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
}
ORIGINAL = {"crop_size": 16, "rrc": {"enabled": False}}


def tiny(method: str, folder: str | Path, **changes: Any) -> dict[str, Any]:
    """The smallest experiment that has everything a real one has: 64 images of 16 pixels, 8 steps an epoch, 3 epochs.

    Args:
        method: its name, or ``"module:Class"``; the sizes every method has are made small, except those that are None.
        folder: where runs are written.
        changes: top-level keys; blocks are merged.
    """
    kind = METHODS[method]
    known = {field.name for field in dataclasses.fields(schema_of(method)) if field.default is not None}
    content: dict[str, Any] = {
        "method": method,
        "method_kwargs": {key: value for key, value in SIZES.items() if key in known},
        "backbone": dict(BACKBONE),
        "data": {"dataset": "fake", "size": 16, "train_size": 64, "classes": 4, "num_workers": 0},
        "augmentations": [*[ORIGINAL] * kind.originals, {**VIEW, "num_crops": kind.views - kind.originals}],
        "optimizer": {"batch_size": 8, "lr": 1.0, "kwargs": {"eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}},
        "scheduler": {"warmup_epochs": 1},
        "checkpoint": {"dir": str(folder), "epoch_share": 0},
        "report": {"enabled": False},
        "health": {"enabled": True},
        "knn": {"enabled": False},
        "loggers": ["csv"],
        "max_epochs": 3,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
    }
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) and isinstance(value, dict) else value
    return content


class Case:
    """A method to check.

    Args:
        method: its name, or ``"module:Class"``.
        changes: of the experiment `tiny`, e.g. ``method_kwargs={...}`` or ``augmentations=[...]``.
    """

    def __init__(self, method: str, **changes: Any) -> None:
        self.method, self.changes = method, changes

    def experiment(self, folder: str | Path = "unused", **changes: Any) -> Experiment:
        """The tiny experiment, changed by the case and by the check."""
        return experiment(tiny(self.method, folder, **{**self.changes, **changes}))

    def build(self, seed: int = 5) -> Method:
        """The method, freshly initialised."""
        return build(self.experiment(seed=seed))

    def batches(self, count: int) -> list[Batch]:
        """The first batches of 8 images a run sees."""
        config = self.experiment()
        data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, config.seed)
        return [batch for batch, _ in zip(data.train_dataloader(), range(count), strict=False)]

    def train(self, callback: pl.Callback | None = None, **changes: Any) -> dict[str, Any]:
        """The last checkpoint of a run through `solo.run.pretrain`."""
        with tempfile.TemporaryDirectory() as folder:
            return run(self.experiment(folder, **changes), callback)


def half(case: Case) -> dict[str, Any]:
    """Of the experiment: epochs of 4 steps and 2 validation batches, where more would show no more."""
    return {"data": {**case.changes.get("data", {}), "train_size": 32}, "limit_val_batches": 2}


def run(config: Experiment, callback: pl.Callback | None = None) -> dict[str, Any]:
    """The last checkpoint of a run."""
    last = pretrain(config, [callback] if callback else []).checkpoint
    assert last is not None
    return checkpoint.read(last)
