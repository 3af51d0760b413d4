"""Saves a run so that it can continue as if nothing had happened, also when a signal ends it."""

import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from solo import checkpoint as store
from solo.agreement import Agreement
from solo.callbacks.signals import SignalGuard
from solo.console import warn
from solo.dist import end_together
from solo.errors import EnvironmentFault
from solo.files import own_folder, write_link
from solo.lease import Taken
from solo.ranges import require

PATIENCE = 3        # saves in a row that may fail before a run ends
LEAST = 60.0        # seconds that a share of an epoch waits for: short epochs would write a file every few seconds


@dataclass(kw_only=True)
class CheckpointConfig:
    """When to save.

    ``frequency``: at the end of every n-th epoch; ``keep_prev`` keeps those for good, else the newest two stay. Of saves in the
    middle of an epoch the newest two stay as well.
    ``minutes``, ``epoch_share``: also in the middle of an epoch, once this much time has passed, or this share of an epoch
    been trained and a minute passed, since the last save, so that no fault costs more; 0 minutes: after every step,
    whatever it takes.
    ``stall``: the share of the time that saves in the middle of an epoch may take; they are rarer where they took more.
    The end of the run and the signals that end or preempt a job always save.
    ``fallback``: folder for the last state of a run whose own cannot be written, tried before the run; empty: one of the
    user's own in the system's temporary one.
    """

    enabled: bool = True
    dir: str = "runs"
    frequency: int = 1
    keep_prev: bool = False
    minutes: float = 10.0
    epoch_share: float = 0.02
    stall: float = 0.03
    fallback: str = ""

    def __post_init__(self) -> None:
        require(
            self, at_least_1="frequency", at_least_0="minutes epoch_share", positive="stall", below_1="stall",
            also=[] if self.dir else ["dir must name a folder"],
        )

    def most(self, epochs: int | None) -> int:
        """How many files lie in a run's folder at most, the one being written among them.

        Args:
            epochs: of the run; None where something else ends it; then what is kept for good does not count.
        """
        kept = math.ceil((epochs or 0) / self.frequency) if self.keep_prev else 0
        at_ends = store.KEPT + 1 if epochs is None else min(epochs, store.KEPT + 1)
        return store.KEPT + max(kept, at_ends)


class Checkpointer(SignalGuard, Checkpoint):
    """Writes ``<run_dir>/checkpoints`` and the link ``<run_dir>/last.ckpt``.

    Args:
        config: when to save.
        run_dir: the run's directory.
        provenance: plain values stored with each checkpoint, see `solo.checkpoint.provenance`.
        agreement: see `SignalGuard`.
    """

    def __init__(
        self, config: CheckpointConfig, run_dir: Path, provenance: dict[str, Any], agreement: Agreement | None = None
    ) -> None:
        super().__init__(agreement)
        self.config = config
        self.run_dir = run_dir
        self.folder = run_dir / "checkpoints"
        self.provenance = provenance
        self._tried_at, self._tried_step = time.monotonic(), 0      # the last save, or the beginning
        self._took = 0.0                                            # seconds of it
        self._saved_step = -1
        self._failures = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._tried_at, self._tried_step = time.monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["solo"] = json.dumps(self.provenance)

    def due(self, trainer: pl.Trainer, step: int) -> bool:
        """By rank 0's clock; a save that failed is tried again after ``minutes``, which a full disk may need."""
        if not trainer.is_global_zero or not self.config.minutes:
            return trainer.is_global_zero
        passed, steps = time.monotonic() - self._tried_at, step - self._tried_step
        share = self.config.epoch_share * trainer.num_training_batches / trainer.accumulate_grad_batches
        enough = passed >= 60 * self.config.minutes or (steps >= share > 0 and passed >= LEAST and not self._failures)
        return enough and passed * self.config.stall >= self._took * (1 - self.config.stall)

    def end_epoch(self, trainer: pl.Trainer, leaving: bool) -> None:
        epoch = trainer.current_epoch + 1
        on_schedule = epoch % self.config.frequency == 0
        final = epoch == trainer.max_epochs or trainer.should_stop or trainer.global_step == trainer.max_steps
        if leaving or on_schedule or final:
            self.save(trainer, last=leaving or final, keep=on_schedule and self.config.keep_prev)

    def save(self, trainer: pl.Trainer, last: bool = False, keep: bool = False) -> None:
        """Save now; only at the end of an optimizer step.

        Where it cannot be written, the run goes on to the next time, unless this was the last one or the third in a row.

        Raises:
            EnvironmentFault: it cannot be written.
        """
        if not self.config.enabled or trainer.global_step == self._saved_step:
            return
        path = self.folder / f"step-{trainer.global_step:09d}.ckpt"
        began = time.monotonic()
        for logger in trainer.loggers:          # what a run goes on behind is on the disk
            logger.save()
        problem = self._write(trainer, path, keep)
        self._tried_at, self._tried_step = time.monotonic(), trainer.global_step
        self._took = self._tried_at - began
        if not self.agreed(trainer, problem is not None)[1]:
            self._saved_step, self._failures = trainer.global_step, 0
            return
        self._failures += 1
        fault = f"{path} cannot be written: {self._reason(problem)}; the last checkpoint stays"
        if self.agreed(trainer, isinstance(problem, Taken))[1]:
            end_together(EnvironmentFault(fault))
        if last or self._failures >= PATIENCE:
            end_together(EnvironmentFault(f"{fault}; {self._elsewhere(trainer, path.name)}"))
        if trainer.is_global_zero:
            warn(f"{fault}; tried again at the next save ({self._failures} of {PATIENCE})")

    def _write(self, trainer: pl.Trainer, path: Path, keep: bool) -> OSError | None:
        if problem := self._store(trainer, path, keep):
            return problem
        if trainer.is_global_zero:
            self._tidy(path, lambda: store.prune(self.folder))
            self._tidy(path, lambda: write_link(self.run_dir / "last.ckpt", Path("checkpoints") / path.name))
        return None

    def _tidy(self, path: Path, act: Callable[[], None]) -> None:
        """After a save that is whole; the next save, or the next start, makes up for it."""
        try:
            act()
        except OSError as error:
            warn(f"{path} is saved, but tidying up behind it failed: {error.strerror or error}")

    def _store(self, trainer: pl.Trainer, path: Path, keep: bool = False) -> OSError | None:
        try:
            trainer.save_checkpoint(path, storage_options={"keep": keep})
        except OSError as error:                # on rank 0: the others wait in the barrier behind Lightning's save
            trainer.strategy.barrier()
            return error
        return None

    def _elsewhere(self, trainer: pl.Trainer, name: str) -> str:
        """Save what the run's own folder does not take in another one; where that is, in words."""
        folder = Path(self.config.fallback or f"{tempfile.gettempdir()}/solo-{os.getuid()}") / self.run_dir.name
        problem: OSError | None = None
        try:
            if trainer.is_global_zero and not self.config.fallback:
                own_folder(folder.parent)
        except OSError as error:
            problem = error
        if not self.agreed(trainer, problem is not None)[1]:
            problem = self._store(trainer, folder / name)
        if problem:
            return f"{folder} cannot be written either: {problem.strerror or problem}"
        return f"this step is saved elsewhere: go on with resume={folder / name}"

    def _reason(self, problem: OSError | None) -> str:
        if problem is None:
            return "rank 0 says why"
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return str(problem.strerror)
        with suppress(OSError):
            needed = max((path.stat().st_size for path in self.folder.glob("*.ckpt")), default=0)
            there = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
            free = shutil.disk_usage(there).free
            return f"{problem.strerror} (the last one has {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free)"
        return str(problem.strerror)

    def kept(self) -> str:
        if not self.config.enabled:
            return "not saved: checkpoint.enabled=false"
        return f"saved in {self.folder}; run the same command to continue"
