"""The signals that ask a run to end, obeyed between two optimizer steps and by all ranks at once."""

import signal
from contextlib import ExitStack
from types import FrameType
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from solo.dist import all_reduce, end_together, world_size
from solo.errors import Interrupted, hearing


class SignalGuard(Callback):
    """Ends the training with `Interrupted` after the optimizer step in which a signal came.

    A signal only sets a flag; after the step all ranks agree on it and leave. Lightning's own handlers act inside the
    handler, where a collective hangs, or end the run as if it were complete.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._ears = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ears.enter_context(hearing(self._note))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._ears.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._ears.close()              # there is no teardown then

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise Interrupted("SIGINT again: left at once", number)
        self._signal = self._signal or number       # what asked first says how the run ends: SLURM's warning, not its SIGTERM

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = batch_idx + 1 == trainer.num_training_batches        # the end of the epoch asks again, after validation
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        number, due = self.agreed(trainer, self.due(trainer))
        if number or due:
            self.save(trainer, last=bool(number))
        if number:
            self.leave(trainer, number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        number, _ = self.agreed(trainer, False)
        self.end_epoch(trainer, bool(number))
        if number:
            self.leave(trainer, number)

    # --- what a guard that saves makes of it -----------------------------------------------------------------------

    def due(self, trainer: pl.Trainer) -> bool:
        """Whether this rank wants to save in the middle of the epoch."""
        return False

    def save(self, trainer: pl.Trainer, last: bool = False) -> None:
        """Save at the end of an optimizer step; ``last``: the run ends with it."""

    def end_epoch(self, trainer: pl.Trainer, leaving: bool) -> None:
        """Save at the end of an epoch, if need be."""

    def kept(self) -> str:
        """What is left of the run that ends, in words."""
        return "nothing is saved"

    # --- together --------------------------------------------------------------------------------------------------

    def agreed(self, trainer: pl.Trainer, due: bool) -> tuple[int, bool]:
        """The signal that all ranks obey, or 0, and whether one wishes to save.

        The warning of a queue counts for more than the signal that ends a job: what it ended is not put back.
        """
        if world_size() == 1:
            return self._signal, due
        wishes = torch.tensor([self._signal, int(due)], device=trainer.strategy.root_device)
        everyone = torch.zeros(world_size(), 2, dtype=wishes.dtype, device=wishes.device)
        everyone[trainer.global_rank] = wishes
        numbers, wishes_of_all = all_reduce(everyone).T.tolist()
        heard = [number for number in numbers if number]
        warned = [number for number in heard if number in (signal.SIGUSR1, signal.SIGUSR2)]
        return next(iter(warned + heard), 0), any(wishes_of_all)

    def leave(self, trainer: pl.Trainer, number: int) -> NoReturn:
        """End all ranks.

        Raises:
            Interrupted: on rank 0.
        """
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        end_together(Interrupted(f"{signal.Signals(number).name} at {where}: {self.kept()}", number))
