"""Train metrics from the device to the loggers, with one host sync per logged step."""

from itertools import chain
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from solo.batch import Batch
from solo.dist import all_reduce

_SUMMED = 64    # batches at a time, at most


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
        self._batches: dict[tuple[str, ...], list[Tensor]] = {}     # by what was measured together: [names] of each batch
        self._totals: dict[tuple[str, ...], Tensor] = {}            # of those before: [2, names], sums and counts
        self._reported = -1
        self._sources: list[StepScalars] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._reported = trainer.global_step
        self._sources = [each for each in trainer.callbacks if isinstance(each, StepScalars)]  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        loss = outputs["loss"].float() * trainer.accumulate_grad_batches                        # Lightning divided it
        measured = {**outputs, "loss": loss}
        for callback in self._sources:
            measured |= callback.step_scalars
        self._add({name: value for name, value in measured.items() if isinstance(value, Tensor) and value.numel() == 1})
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if step != self._reported and (trainer.is_last_batch or (every and step % every == 0)):
            self._report(trainer)

    @torch.no_grad()
    def _add(self, measured: dict[str, Tensor]) -> None:
        """One operation, however many the metrics: sums can wait. A loss in float32 makes all float32."""
        batches = self._batches.setdefault(tuple(measured), [])
        batches.append(torch.stack([value.reshape(()) if value.ndim else value for value in measured.values()]))    # [names]
        if len(batches) == _SUMMED:
            self._sum()

    def _sum(self) -> None:
        for names, batches in self._batches.items():
            values = torch.stack(batches)                                                           # [batches, names]
            known = ~values.isnan()
            new = torch.stack([values.where(known, 0).sum(0), known.sum(0)])                        # [2, names]
            self._totals[names] = self._totals[names] + new if names in self._totals else new
        self._batches = {}

    def _report(self, trainer: pl.Trainer) -> None:
        self._sum()
        groups = sorted(self._totals)
        totals = all_reduce(torch.cat([self._totals[group] for group in groups], dim=1)).T.tolist()
        found: dict[str, list[float]] = {}
        for name, (total, count) in zip(chain(*groups), totals, strict=True):
            before = found.get(name, (0.0, 0.0))
            found[name] = [before[0] + total, before[1] + count]
        self.last = {name: total / count for name, (total, count) in sorted(found.items()) if count}
        self.last["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        self.last |= getattr(trainer.lightning_module, "stepped", {})
        self._totals, self._reported = {}, trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({f"train/{name}": value for name, value in self.last.items()}, step=trainer.global_step)
