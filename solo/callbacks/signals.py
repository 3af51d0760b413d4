"""The signals that ask a run to end, obeyed between two optimizer steps and by all ranks at once."""

import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import FrameType
from typing import Any, NoReturn, TypeVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from solo.agreement import Agreement, of_each_rank
from solo.console import warn
from solo.dist import end_together, world_size
from solo.errors import Interrupted, hearing
from solo.peers import Flag

T = TypeVar("T")


class SignalGuard(Callback):
    """Ends the training with `Interrupted` after the optimizer step in which a signal came.

    A signal only sets a flag; all ranks agree on it and leave after the step. Lightning's own handlers act inside the
    handler, where a collective hangs, or end the run as if it were complete.

    Args:
        agreement: in which several ranks say what has come before the backward pass of a step, of the `FiniteGuard` that
            reaches it; what comes later is heard in the next step. Without it they ask each other after each step.
    """

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.agreement = agreement
        self._signal = 0
        self._ears = ExitStack()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ears.enter_context(hearing(self._note))
        if self.agreement is not None:
            self.agreement.add("signal", lambda: self._signal)
            self.agreement.add("save", lambda: self.due(trainer, trainer.global_step + 1))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._ears.close()
        if self._signal:
            warn(f"{signal.Signals(self._signal).name} came behind the last step: the training is complete")

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
        number, due = self.heard(trainer)
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

    def due(self, trainer: pl.Trainer, step: int) -> bool:
        """Whether this rank wants to save in the middle of the epoch, at the end of this step."""
        return False

    def save(self, trainer: pl.Trainer, last: bool = False) -> None:
        """Save at the end of an optimizer step; ``last``: the run ends with it."""

    def end_epoch(self, trainer: pl.Trainer, leaving: bool) -> None:
        """Save at the end of an epoch, if need be."""

    def kept(self) -> str:
        """What is left of the run that ends, in words."""
        return "nothing is saved"

    # --- together --------------------------------------------------------------------------------------------------

    def heard(self, trainer: pl.Trainer) -> tuple[int, bool]:
        """`agreed` of the step that ends."""
        if self.agreement is None or world_size() == 1:
            return self.agreed(trainer, self.due(trainer, trainer.global_step))
        return _obeyed(self.agreement.found["signal"]), any(self.agreement.found["save"])

    def agreed(self, trainer: pl.Trainer, due: bool) -> tuple[int, bool]:
        """The signal that all ranks obey, or 0, and whether one wishes to save; asked now."""
        if world_size() == 1:
            return self._signal, due
        numbers, wishes = of_each_rank(torch.tensor([self._signal, int(due)], device=trainer.strategy.root_device))
        return _obeyed(numbers), any(wishes)

    def break_off(self, trainer: pl.Trainer) -> NoReturn:
        """Save what a validation was to judge, and end all ranks without its numbers."""
        number, _ = self.agreed(trainer, False)
        if trainer.is_last_batch:
            self.end_epoch(trainer, True)
        else:
            self.save(trainer, last=True)
        self.leave(trainer, number, f"; the validation of this {'epoch' if trainer.is_last_batch else 'step'} is left out")

    def leave(self, trainer: pl.Trainer, number: int, note: str = "") -> NoReturn:
        """End all ranks.

        Raises:
            Interrupted: on rank 0.
        """
        where = f"epoch {trainer.current_epoch + 1}, step {trainer.global_step}"
        end_together(Interrupted(f"{signal.Signals(number).name} at {where}: {self.kept()}{note}", number))


class ValidationGuard(Callback):
    """Breaks a validation off between two batches when a signal has come to any rank.

    Ranks may have different numbers of batches, or none. Each ends its own as soon as it knows of a signal; behind its batches,
    and before anything is summed over them, it waits for the others, and all agree whether the validation counts. One within
    a step, of which some batches are still to be accumulated, is finished: there is no state to save yet.

    Put it before the callbacks that compute something of the whole validation.

    Args:
        guard: hears the signals, saves, and ends the run.
    """

    def __init__(self, guard: SignalGuard) -> None:
        self.guard = guard

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._flag = Flag("signal")

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.asked(trainer):
            raise StopIteration             # to Lightning's loop, which goes on as behind the last batch

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.agree(trainer)

    def asked(self, trainer: pl.Trainer) -> bool:
        """Whether the validation is to end: a signal has come to this rank, which lets the others know, or to another one."""
        between_steps = trainer.is_last_batch or (trainer.fit_loop.batch_idx + 1) % trainer.accumulate_grad_batches == 0
        return between_steps and self._flag.up(bool(self.guard._signal))

    def agree(self, trainer: pl.Trainer) -> None:
        """To be called once by every rank, behind its batches.

        Raises:
            Interrupted: see `SignalGuard.leave`.
        """
        own = torch.tensor([int(self.asked(trainer))], device=trainer.strategy.root_device)
        (asked,) = of_each_rank(own, meanwhile=lambda: self.asked(trainer))
        if any(asked):
            self.guard.break_off(trainer)


def heeding(trainer: pl.Trainer, batches: Iterable[T]) -> Iterator[T]:
    """Further batches of a validation, which the trainer's `ValidationGuard` may break off too."""
    guards = [each for each in trainer.callbacks if isinstance(each, ValidationGuard)]  # type: ignore[attr-defined]
    for batch in batches:
        if any(guard.asked(trainer) for guard in guards):
            break
        yield batch
    for guard in guards:
        guard.agree(trainer)


def _obeyed(numbers: list[float]) -> int:
    """The warning of a queue counts for more than the signal that ends a job: what it ended is not put back."""
    came = [int(number) for number in numbers if number]
    warned = [number for number in came if number in (signal.SIGUSR1, signal.SIGUSR2)]
    return next(iter(warned + came), 0)
