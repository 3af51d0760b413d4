"""Saves a run so that it can continue as if nothing had happened, also when a signal ends it."""

import errno
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from solo import checkpoint as store
from solo.callbacks.signals import SignalGuard
from solo.console import warn
from solo.dist import end_together
from solo.errors import EnvironmentFault
from solo.files import write_link
from solo.lease import Taken
from solo.ranges import require

PATIENCE = 3        # saves in a row that may fail before a run ends


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
        require(self, at_least_1="frequency", at_least_0="minutes", also=[] if self.dir else ["dir must name a folder"])


class Checkpointer(SignalGuard, Checkpoint):
    """Writes ``<run_dir>/checkpoints`` and the link ``<run_dir>/last.ckpt``.

    Args:
        config: when to save.
        run_dir: the run's directory.
        provenance: plain values stored with each checkpoint, see `solo.checkpoint.provenance`.
    """

    def __init__(self, config: CheckpointConfig, run_dir: Path, provenance: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.run_dir = run_dir
        self.folder = run_dir / "checkpoints"
        self.provenance = provenance
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._failures = 0

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["solo"] = json.dumps(self.provenance)

    def due(self) -> bool:
        return time.monotonic() - self._saved_at > 60 * self.config.minutes

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
        problem = self._write(trainer, path, keep)
        self._saved_at = time.monotonic()
        if not self.agreed(trainer, problem is not None)[1]:
            self._saved_step, self._failures = trainer.global_step, 0
            return
        self._failures += 1
        fault = EnvironmentFault(f"{path} cannot be written: {self._reason(problem)}; the last checkpoint stays")
        taken = self.agreed(trainer, isinstance(problem, Taken))[1]
        if last or taken or self._failures >= PATIENCE:
            end_together(fault)
        if trainer.is_global_zero:
            warn(f"{fault}; tried again at the next save ({self._failures} of {PATIENCE})")

    def _write(self, trainer: pl.Trainer, path: Path, keep: bool) -> OSError | None:
        try:
            trainer.save_checkpoint(path, storage_options={"keep": keep})
        except OSError as error:                # on rank 0: the others wait in the barrier behind Lightning's save
            trainer.strategy.barrier()
            return error
        try:
            if trainer.is_global_zero:
                store.prune(self.folder)
                write_link(self.run_dir / "last.ckpt", Path("checkpoints") / path.name)
        except OSError as error:
            return error
        return None

    def _reason(self, problem: OSError | None) -> str:
        if problem is None:
            return "rank 0 says why"
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return str(problem.strerror)
        needed = max((path.stat().st_size for path in self.folder.glob("*.ckpt")), default=0)
        free = shutil.disk_usage(self.folder).free
        return f"{problem.strerror} (the last one has {needed / 1e6:.1f} MB, {free / 1e6:.1f} MB are free)"

    def kept(self) -> str:
        if not self.config.enabled:
            return "not saved: checkpoint.enabled=false"
        return f"saved in {self.folder}; run the same command to continue"
