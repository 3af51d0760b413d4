"""The end of a run whose 16-bit gradients overflow whatever they are scaled with."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from solo.dist import end_together
from solo.errors import NumericsError

FLOOR = 1.0         # a loss scaled with less is smaller than it is: it is not the scale that makes it overflow
EVERY = 8           # optimizer steps between looks; each look waits for the device


class OverflowGuard(Callback):
    """Ends a run on all ranks when the gradient scaler is found at its floor again and again; without a scaler, nothing.

    One overflow is no fault: the scaler skips that step and halves the scale, which begins at 65536.

    Args:
        patience: looks in a row.

    Raises:
        NumericsError: naming step and scale.
    """

    def __init__(self, patience: int = 3) -> None:
        self.patience = patience
        self._batches = 0
        self._found = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._batches += 1
        if scaler is None or self._batches % (EVERY * trainer.accumulate_grad_batches):
            return
        scale = float(scaler.get_scale())
        self._found = self._found + 1 if scale <= FLOOR else 0
        if self._found >= self.patience:
            end_together(NumericsError(
                f"16-bit gradients overflow at step {trainer.global_step} though they are scaled with {scale:g} only: "
                "set precision=bf16-mixed or 32-true, or lower optimizer.lr"
            ))
