"""What is needed to look into a step that was not finite, kept beside the run."""

import json
import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from solo.batch import Batch
from solo.dist import rank
from solo.errors import NumericsError

log = logging.getLogger(__name__)


class FailedStep(Callback):
    """Writes ``failed_step.json``, or ``failed_step-rank1.json``, when a `NumericsError` ends the run.

    It holds the method, the step, the rate, the images of each accumulated batch by number, what its random numbers follow
    from (see `solo.methods.base.Method`), and the names of the inputs of the last batch, weights and gradients of this rank
    that are not finite.

    Args:
        run_dir: the run's directory.
        method: the method's name.
    """

    def __init__(self, run_dir: Path, method: str) -> None:
        self.run_dir = run_dir
        self.method = method
        self._batch: Batch | None = None
        self._images: dict[int, Tensor] = {}        # of each batch of this step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._images = {}
        self._batch, self._images[batch_idx] = batch, batch.index

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._batch = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._batch is None or not any(isinstance(each, NumericsError) for each in (exception, exception.__cause__)):
            return
        content = {
            "method": self.method,
            "step": trainer.global_step + 1,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "random": {"seed": getattr(pl_module, "seed", None), "rank": rank(), "epoch": trainer.current_epoch},
            "batches": [{"batch": number, "indices": index.tolist()} for number, index in self._images.items()],
            "not_finite": not_finite(self._batch, pl_module),
        }
        path = self.run_dir / ("failed_step.json" if rank() == 0 else f"failed_step-rank{rank()}.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1))
        except OSError as error:                    # what ends the run matters more
            log.warning("%s cannot be written: %s", path, error.strerror)


def not_finite(batch: Batch | None, module: torch.nn.Module) -> list[str]:
    """Names of a batch's views and a module's weights, gradients and buffers that hold a value that is not finite."""
    named: dict[str, Any] = {f"views[{number}]": view for number, view in enumerate(getattr(batch, "views", []))}
    named |= dict(module.named_parameters()) | dict(module.named_buffers())
    named |= {f"{name}.grad": parameter.grad for name, parameter in module.named_parameters()}
    return [name for name, tensor in named.items() if isinstance(tensor, Tensor) and not tensor.isfinite().all()]
