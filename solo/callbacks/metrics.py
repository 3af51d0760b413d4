"""Train metrics from the device to the loggers, with one host sync per logged step."""

from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from solo.batch import Batch
from solo.dist import all_reduce


@runtime_checkable
class StepScalars(Protocol):
    """A callback that measures something on train batches; an empty dictionary means: not this time."""

    step_scalars: dict[str, Tensor]


class MetricsLogger(Callback):
    """Sends ``train/<name>`` for every scalar of ``outputs`` and of the callbacks (`StepScalars`), ``train/lr``, and what
    the method's last step moved (``train/tau``).

    Values are means over the batches since the last report and over ranks, NaN left out: that is how a batch without
    labels says that it has no accuracy. A report is made every ``trainer.log_every_n_steps`` optimizer steps and at the
    end of each epoch.

    Attributes:
        last: values of the last report.
    """

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._reported = -1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reported = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._add("loss", outputs["loss"] * trainer.accumulate_grad_batches)  # Lightning divided it
        for name, value in outputs.items():
            if name != "loss":
                self._add(name, value)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, StepScalars):
                for name, value in callback.step_scalars.items():
                    self._add(name, value)
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._reported and (trainer.is_last_batch or (every and step % every == 0)):
            self._report(trainer)

    def _add(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor) or value.numel() != 1:
            return
        value = value.detach().float().reshape(())
        known = ~value.isnan()
        self._sums[name] = self._sums.get(name, 0) + torch.where(known, value, 0)
        self._counts[name] = self._counts.get(name, 0) + known.float()

    def _report(self, trainer: pl.Trainer) -> None:
        names = sorted(self._sums)
        totals = torch.stack([*(self._sums[name] for name in names), *(self._counts[name] for name in names)])
        sums, counts = all_reduce(totals).view(2, -1).tolist()
        self.last = {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
        self.last["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.last |= getattr(trainer.lightning_module, "stepped", {})
        self._sums, self._counts, self._reported = {}, {}, trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in self.last.items()}, step=trainer.global_step)
