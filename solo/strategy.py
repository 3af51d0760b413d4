"""How the processes of a run find each other, and how one node's first process watches over those it started."""

import inspect
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.distributed import _set_num_threads_if_needed
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from solo import errors
from solo.errors import EnvironmentFault, end_at_once
from solo.peers import set_timeout, turn_of_first

MEETING = 60.0      # seconds that processes have to find each other
AGREEING = 300.0    # seconds that they have to agree on where to begin, which one of them reads from a file system
SAVING = 3600.0     # seconds that the others wait for a save; after them the timeout of a collective counts
GRACE = 8.0         # seconds that the first process has to notice and to say that another one was killed
_LOOKS = 8          # in the time that a meeting may take
SPOKEN = 2.0        # seconds that it has to leave where another one has said why it failed, as where the first one stalls


def without_buffers() -> dict[str, Any]:
    """The option, of whatever name, by which torch's DDP sends no buffers before a forward."""
    parameters = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers": False}


class Strategy(DDPStrategy):
    """DDP that does not send rank 0's buffers to all ranks before every forward: queues are equal by construction."""

    def __init__(self) -> None:
        super().__init__(find_unused_parameters=False, timeout=timedelta(seconds=MEETING), **without_buffers())
        self._saves = 0

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Rank 0 writes, the others wait outside of a collective: a file system may take longer than a step."""
        self._saves += 1
        with turn_of_first(f"save {self._saves}", SAVING):
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def _configure_launcher(self) -> None:
        super()._configure_launcher()
        if type(self._launcher) is _SubprocessScriptLauncher:
            assert self.cluster_environment is not None
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)


class EpochLoop(_TrainingEpochLoop):
    """Lightning's, but ranks do not ask rank 0 before every batch whether its handler of SIGTERM, which is not in use, ran."""

    def _broadcast_sigterm_tensor(self) -> None:
        pass


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this node.

    Lightning's own launcher looks every 5 s, and where one has failed, kills all, this process too, before it can say why.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._done = threading.Event()

    def launch(self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch, args=(self.procs, self._done), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def kill(self, signum: Any) -> None:
        self._done.set()
        super().kill(signum)


def _watch(children: list[subprocess.Popen[bytes]], done: threading.Event) -> None:
    """End this process where a child has failed and this process has not noticed within `GRACE`: NCCL does not notice."""
    while not done.wait(0.2):
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return
        if any(codes):
            break
    else:
        return
    if done.wait(GRACE if any(code and code < 0 for code in codes) else SPOKEN):
        return
    for child in children:
        child.kill()
    rank, code = next((rank, code) for rank, code in enumerate(codes, start=1) if code)
    if code > 0:
        end_at_once(code=code)            # it has said why
    end_at_once(f"rank {rank} was ended by {signal.Signals(-code).name}")


def meet(trainer: pl.Trainer, timeout: float) -> None:
    """Start the other processes now, not in ``fit``, so that they can agree before anything is read.

    Args:
        trainer: knows who they are.
        timeout: seconds after which a collective fails, once they have met; at least `AGREEING`.

    Raises:
        EnvironmentFault: they do not find each other.
    """
    launcher = trainer.strategy.launcher
    if trainer.world_size == 1 or launcher is None:
        return
    met = threading.Event()
    threading.Thread(target=_wait, args=(trainer, met), daemon=True).start()
    try:
        launcher.launch(trainer.strategy.setup_environment, trainer=trainer)
    except (RuntimeError, ValueError) as error:         # of torch.distributed and its store
        why = "the port is in use" if "EADDRINUSE" in str(error) else f"not within {MEETING:g} s"
        raise EnvironmentFault(_unmet(trainer, why)) from error
    finally:
        met.set()
    set_timeout(max(AGREEING, timeout))


def _wait(trainer: pl.Trainer, met: threading.Event) -> None:
    """End this command where torch waits on for an answer of the group's store, whose process the system has suspended.

    Looks are counted, not seconds, as of what is `answered`. A process that is no command is its user's, and is left alone.
    """
    for _ in range(_LOOKS):
        if met.wait(2 * MEETING / _LOOKS) or errors.command is None:
            return
    end_at_once(_unmet(trainer, "one of them gives no answer"))


def _unmet(trainer: pl.Trainer, why: str) -> str:
    """What is to be said; what this process has started is ended."""
    if isinstance(trainer.strategy.launcher, Launcher):
        trainer.strategy.launcher.kill(signal.SIGKILL)
    where = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')}, MASTER_PORT={os.environ.get('MASTER_PORT')}"
    return f"rank {trainer.global_rank} did not meet the others ({where}): {why}"
