"""Where the run is and how fast it goes: a live bar on a terminal, one line per epoch elsewhere."""

import logging
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

from solo.bars import Bar, is_terminal
from solo.batch import Batch
from solo.callbacks.metrics import MetricsLogger

_EACH = 0.125       # seconds from one look of the bar to the next


class _Above:
    """Stands for a stream while bars run on a terminal: whole lines appear above them."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._line = file, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line.rpartition("\r")[2]     # a bar of somebody else's begins anew so, again and again
        if lines:
            Bar.write("\n".join(lines), file=self._file)
        return len(text)

    def finish(self) -> None:
        """Show what there is of a line, if the terminal is still there."""
        with suppress(OSError):
            self.write("\n" if self._line else "")


class RunProgress(ProgressBar):
    """Epoch, step, loss, images/s, share of time spent waiting for data, time left, last validation metrics.

    The train loss is the last one of the trainer's `MetricsLogger`. Put it after the callbacks that work on train
    batches: what follows it in a step is counted as waiting for data.

    Args:
        file: where to print; by default stdout, as it is then.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        super().__init__()
        self.metrics: MetricsLogger | None = None
        self._file = file
        self._enabled = True
        self._bars: list[Bar] = []                  # of the epoch, and its numbers below
        self._streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._above: tuple[Any, Any] = self._streams        # what stands for them meanwhile
        self._log_streams: dict[logging.StreamHandler[TextIO], TextIO] = {}
        self._shown = 0.0
        self._epoch_number, self._batch, self._validating = 0, 0, False
        self._images, self._waited, self._busy = 0, 0.0, 0.0
        self._validation: dict[str, float] = {}
        self._mark = self._began = time.monotonic()
        self._first_step = 0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        print(*args, **{"file": self._file or sys.stdout, **kwargs})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.metrics = next((callback for callback in callbacks if isinstance(callback, MetricsLogger)), None)

    # --- measuring -------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = self._began = time.monotonic()
        self._first_step = trainer.global_step
        self._epoch_number = trainer.current_epoch + 1          # a run resumed in mid-epoch starts none
        if self._enabled and is_terminal(self._file or sys.stdout):
            self._start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._epoch_number, self._batch = trainer.current_epoch + 1, 0
        self._images, self._waited, self._busy = 0, 0.0, 0.0
        self._mark = time.monotonic()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._waited += self._lap()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._busy += self._lap()
        self._images += len(batch.labels) * trainer.world_size
        self._batch = batch_idx + 1
        self._show()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = not trainer.sanity_checking
        self._show(at_once=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = False
        self._mark = time.monotonic()

    def _lap(self) -> float:
        before, self._mark = self._mark, time.monotonic()
        return self._mark - before

    # --- showing ---------------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validation = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()
                            if name.startswith("val/") and not name.endswith("acc5")}
        if self._enabled and not self._bars:
            self.print(f"{self._epoch()} · step {trainer.global_step} · {self._numbers()}", flush=True)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _start(self) -> None:
        """Show the bar; what is printed or logged meanwhile appears above it."""
        file, self._streams = self._file or sys.stdout, (sys.stdout, sys.stderr)
        form: dict[str, Any] = {"file": file, "bar_format": " ", "colour": "cyan"}
        self._bars = [Bar(position=0, **form), Bar(position=1, **form)]
        sys.stdout, sys.stderr = self._above = _Above(file), _Above(file)
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        for handler in [handler for logger in loggers for handler in getattr(logger, "handlers", ())]:
            if isinstance(handler, logging.StreamHandler) and handler.stream in self._streams:
                self._log_streams[handler] = handler.stream
                handler.setStream(self._above[self._streams.index(handler.stream)])
        self._show(at_once=True)

    def _stop(self) -> None:
        if self._bars:
            self._show(at_once=True)
            for handler, stream in self._log_streams.items():
                handler.setStream(stream)
            sys.stdout, sys.stderr = self._streams
            for above in self._above:
                above.finish()
            for bar in self._bars:
                bar.close()
            self._bars, self._log_streams = [], {}

    def _show(self, at_once: bool = False) -> None:
        if self._bars and (at_once or time.monotonic() - self._shown >= _EACH):
            epoch, numbers = self._bars
            epoch.n, epoch.total = self._batch, self.total_train_batches
            done = "validating" if self._validating else f"{self._batch}/{epoch.total}"
            epoch.bar_format = f"{self._epoch()} {{bar}} {done}"
            numbers.bar_format = self._numbers().replace("{", "{{").replace("}", "}}")
            for bar in self._bars:
                bar.refresh()
            self._shown = time.monotonic()

    def _epoch(self) -> str:
        last = self.trainer.max_epochs
        return f"epoch {self._epoch_number}" + (f"/{last}" if last and last > 0 else "")

    def _numbers(self) -> str:
        seconds = self._waited + self._busy
        last = self.metrics.last if self.metrics else {}
        parts = [f"loss {last['loss']:.4g}"] if "loss" in last else []
        if self._images and seconds:
            parts += [f"{self._images / seconds:,.0f} images/s", f"data wait {100 * self._waited / seconds:.0f} %"]
        parts += [f"left {self._left()}"]
        parts += [f"{name} {value:.1f}" for name, value in self._validation.items()]
        return " · ".join(parts)

    def _left(self) -> str:
        step, total = self.trainer.global_step, self.trainer.estimated_stepping_batches
        if step <= self._first_step or total == float("inf"):
            return "?"
        seconds = (time.monotonic() - self._began) * max(0, total - step) / (step - self._first_step)
        return str(timedelta(seconds=round(seconds)))
