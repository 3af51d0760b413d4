"""Saves a run so that it can continue as if nothing had happened, also when a signal ends it."""

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint

from solo import checkpoint as store
from solo.dist import all_reduce, world_size
from solo.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save.

    ``frequency``: at the end of every n-th epoch; ``keep_prev`` keeps those for good, else the newest two stay.
    ``minutes``: also in the middle of an epoch once this much time has passed since the last save. The end of the
    run and the signals that end or preempt a job always save.
    """

    enabled: bool = True
    dir: str = "runs"
    frequency: int = 1
    keep_prev: bool = False
    minutes: float = 10.0

    def __post_init__(self) -> None:
        if self.frequency < 1:
            raise ValueError(f"frequency must be at least 1 epoch, got {self.frequency}")


class Checkpointer(Checkpoint):
    """Writes ``<run_dir>/checkpoints`` and the link ``<run_dir>/last.ckpt``.

    A signal only sets a flag; after the running optimizer step all ranks agree on it, save and leave with
    `Interrupted`. Lightning's own handlers save inside the handler, or not at all.

    Args:
        config: when to save.
        run_dir: the run's directory.
        provenance: plain values stored with each checkpoint: version, method, config.
    """

    def __init__(self, config: CheckpointConfig, run_dir: Path, provenance: dict[str, Any]) -> None:
        self.config = config
        self.run_dir = run_dir
        self.folder = run_dir / "checkpoints"
        self.provenance = provenance
        self._signal = 0
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._previous_handlers: dict[int, Any] = {}

    # --- signals ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]      # nohup ignores SIGHUP
            self._previous_handlers = {number: signal.signal(number, self._note) for number in heard}

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise Interrupted("SIGINT again: left at once; the last saved checkpoint stays", number)
        self._signal = number

    # --- saving ----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["solo"] = json.dumps(self.provenance)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = batch_idx + 1 == trainer.num_training_batches
        if (batch_idx + 1) % trainer.accumulate_grad_batches and not last:
            return  # half an optimizer step cannot be saved
        number, due = self._agreed(trainer, time.monotonic() - self._saved_at > 60 * self.config.minutes)
        if number and not last:
            self.save(trainer)
            self._leave(trainer, number)
        elif due and not last:
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        number, _ = self._agreed(trainer, False)
        on_schedule = epoch % self.config.frequency == 0
        final = epoch == trainer.max_epochs or trainer.should_stop or trainer.global_step == trainer.max_steps
        if number or on_schedule or final:
            self.save(trainer, keep=on_schedule and self.config.keep_prev)
        if number:
            self._leave(trainer, number)

    def _agreed(self, trainer: pl.Trainer, due: bool) -> tuple[int, bool]:
        """The largest signal number and wish to save over all ranks."""
        if world_size() == 1:
            return self._signal, due
        wishes = torch.tensor([self._signal, int(due)], device=trainer.strategy.root_device)
        everyone = torch.zeros(world_size(), 2, dtype=wishes.dtype, device=wishes.device)
        everyone[trainer.global_rank] = wishes
        number, wish = all_reduce(everyone).amax(0).tolist()
        return number, bool(wish)

    def save(self, trainer: pl.Trainer, keep: bool = False) -> None:
        """Save now; only at the end of an optimizer step."""
        if not self.config.enabled or trainer.global_step == self._saved_step:
            return
        path = self.folder / f"step-{trainer.global_step:09d}.ckpt"
        trainer.save_checkpoint(path, storage_options={"keep": keep})
        if trainer.is_global_zero:
            store.prune(self.folder)
            link = self.run_dir / f".last.ckpt.{os.getpid()}"
            link.unlink(missing_ok=True)
            link.symlink_to(Path("checkpoints") / path.name)
            os.replace(link, self.run_dir / "last.ckpt")
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step

    def _leave(self, trainer: pl.Trainer, number: int) -> None:
        """Rank 0 speaks for all; the others end as if well, else Lightning would kill it on seeing them go."""
        if not trainer.is_global_zero:
            raise SystemExit(0)
        where = f"epoch {trainer.current_epoch}, step {trainer.global_step}"
        how = (
            f"saved in {self.folder}; run the same command to continue"
            if self.config.enabled
            else "not saved: checkpoint.enabled=false"
        )
        raise Interrupted(f"{signal.Signals(number).name} at {where}: {how}", number)
