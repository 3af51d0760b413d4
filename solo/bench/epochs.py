"""Real training of the CIFAR-10 recipes on a GPU: images per second, and seconds to an accuracy."""

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from solo.bench.measure import Row
from solo.config import load
from solo.experiment import experiment
from solo.run import pretrain

RECIPES = Path("scripts/pretrain/cifar")
UNJUDGED = (                # settings of a run whose time is all that counts
    "scheduler.warmup_epochs=0", "limit_val_batches=0", "knn.enabled=false", "checkpoint.enabled=false",
    "report.enabled=false", "loggers=[csv]",
)
MARKS = (85, 88, 90, 92)    # percent of the online linear probe


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


class EpochClock(pl.Callback):
    """Seconds of each training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        self._began = now()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(now() - self._began)


class Board(pl.Callback):
    """Accuracy on the test images over the seconds since training began, validation included; goes on after a resume."""

    def __init__(self) -> None:
        self.curve: list[dict[str, float]] = []
        self._earlier = 0.0     # seconds of the starts before this one

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.curve = state_dict["curve"]
        self._earlier = self.curve[-1]["seconds"] if self.curve else 0.0

    def on_train_start(self, *_: Any) -> None:
        self._began = now()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        seconds = self._earlier + now() - self._began
        self.curve.append({"epoch": trainer.current_epoch + 1, "seconds": seconds, **found})
        print(", ".join(f"{name} {value:.4g}" for name, value in self.curve[-1].items()), flush=True)

    def rows(self, method: str) -> list[Row]:
        """When each mark was first reached, and how it ended; marks that were not reached have no row."""
        what = f"{method}, CIFAR-10, online linear probe, no label used in training"
        found = [
            Row("EB", f"{what}: to {mark} %", next(p["seconds"] for p in self.curve if p["val/probe_acc1"] >= mark), "s")
            for mark in MARKS if any(p["val/probe_acc1"] >= mark for p in self.curve)
        ]
        last = self.curve[-1]
        known = {"probe": "val/probe_acc1", "k-NN": "val/knn@20"}
        ends = [Row("EB", f"{what}: {name} after epoch {last['epoch']:.0f}", last[key], "%") for name, key in known.items()
                if key in last]
        whole = [Row("EB", f"{what}: whole training and validation", last["seconds"], "s")]
        if last["epoch"] == 200:
            whole.append(Row("E4", f"{method}, CIFAR-10, 200 epochs with their validation", last["seconds"] / 60, "min"))
        return [*found, *ends, *whole]


def speed(id: str, method: str, overrides: list[str], epochs: int = 3) -> list[Row]:
    """Images per second of whole epochs through `solo.run.pretrain`, the first one left out."""
    clock = EpochClock()
    images = _train(method, [*UNJUDGED, f"max_epochs={epochs}", *overrides], [clock])
    epoch = sum(clock.seconds[1:]) / (epochs - 1)
    what = f"{method}, CIFAR-10 recipe, epochs 2 to {epochs}, end to end (wall)"
    return [Row(id, what, images / epoch, "images/s"), Row(id, what, epoch, "s/epoch")]


def board(method: str, epochs: int, every: int, overrides: list[str]) -> list[Row]:
    """A whole schedule of ``epochs``, judged by the online probe every epoch and by k-NN every ``every``; resumed if begun."""
    seen = Board()
    settings = [f"max_epochs={epochs}", f"knn.every={every}", f"name=board-{method}-{epochs}"]
    if epochs < 20:                 # the recipes' 5 or 10 would leave little to learn in
        settings.append(f"scheduler.warmup_epochs={epochs // 4}")
    _train(method, [*settings, *overrides], [seen])
    return seen.rows(method)


def _train(method: str, overrides: list[str], callbacks: list[pl.Callback]) -> int:
    """Images of an epoch."""
    config = experiment(load(RECIPES / f"{method}.yaml", ["report.enabled=false", "loggers=[csv]", *overrides]))
    counter = _Images()
    pretrain(config, extra_callbacks=[*callbacks, counter])
    return counter.images


class _Images(pl.Callback):
    """Images that an epoch trains on."""

    images = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.images = int(trainer.num_training_batches) * trainer.datamodule.batch_size  # type: ignore[attr-defined]
