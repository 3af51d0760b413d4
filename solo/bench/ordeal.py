"""One run that is killed, damaged and started again, and everything that must hold meanwhile."""

import math
import mmap
import os
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from solo import checkpoint
from solo.bench.leftovers import broken, difference, valid_steps
from solo.errors import SoloError
from solo.experiment import experiment
from solo.run import pretrain

RECORD = struct.Struct("<qdd")                  # step, loss, time
LOSS = struct.Struct("<d")
TRAINING, WRITING = range(2)                    # bytes that the trainer shares with its parent
STATE = ("state_dict", "optimizer_states", "callbacks", "epoch", "global_step", "DataModule")


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: each step's loss as bytes, the last checkpoint, and seconds per step."""

    losses: dict[int, bytes]
    final: dict[str, Any]
    step_seconds: float


def reference(content: dict[str, Any], folder: Path) -> Reference:
    """Train once undisturbed; also imports here what a run imports, so that later forks need not."""
    modules, run = folder / "modules", Ordeal(content, folder, None)
    run.life(after=lambda: modules.write_text("\n".join(sorted(sys.modules))))
    for name in modules.read_text().splitlines():
        with suppress(Exception):
            if name not in sys.modules and not name.startswith("__"):
                import_module(name)
    if run.problems:
        raise SoloError("\n".join(run.problems))
    times = [time for _, _, time in RECORD.iter_unpack(run.trace.read_bytes())]
    return Reference(run.losses, checkpoint.read(run.run_dir / "last.ckpt"), (times[-1] - times[0]) / (len(times) - 1))


@dataclass
class Ordeal:
    """One run and what it goes through.

    Attributes:
        content: its config.
        folder: where it is.
        truth: what it must equal.
        defect: changes the library in the forked trainer, to see that the harness notices.
        problems: what was found wrong, one line each: ``kind: what``.
        losses: of the steps so far, as bytes.
        in_write: kills that hit a save.
    """

    content: dict[str, Any]
    folder: Path
    truth: Reference | None
    defect: Callable[[], None] | None = None
    problems: list[str] = field(default_factory=list)
    losses: dict[int, bytes] = field(default_factory=dict)
    in_write: int = 0
    kills: int = 0
    steps: int = 0
    damaged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = experiment({**self.content, "checkpoint": {**self.content["checkpoint"], "dir": str(self.folder)}})
        self.run_dir = self.config.run_dir(self.config.optimizer.batch_size)
        self.saved, self.log, self.trace = self.run_dir / "checkpoints", self.folder / "log", self.folder / "losses"
        self.trace.touch()

    def life(
        self, instant: float | None = None, operation: int | None = None, after: Callable[[], object] | None = None
    ) -> bool:
        """Start the trainer and let it live until it is killed or has finished.

        Args:
            instant: seconds from the first step to the kill; negative: from the start.
            operation: instead, kill before this one (from 1) of the operations on files that make up a save.
            after: is called in the trainer at its end.

        Returns:
            Whether it finished.
        """
        before, known, board = valid_steps(self.saved), self.trace.stat().st_size, mmap.mmap(-1, 2)
        process = os.fork()
        if not process:
            _live(self, board, operation, after)
        status = _end(process, board, instant)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.kills += killed
        self.in_write += killed and board[WRITING]
        if not killed and status:
            self.problems.append(f"refused: {' '.join(self.log.read_text(errors='replace').strip().splitlines()[-1:])}")
        records = [(step, loss) for step, loss, _ in RECORD.iter_unpack(self.trace.read_bytes()[known:])]
        self._compare(records, before)
        self.problems += self._left(before, bool(records))
        if not killed and not status and self.truth is not None:
            self.problems += self._end_state()
        return not killed

    def flip(self) -> None:
        """Damage the newest checkpoint by one bit."""
        step = max(valid_steps(self.saved))
        path = self.saved / f"step-{step:09d}.ckpt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.damaged.add(path.name)

    def _compare(self, records: list[tuple[int, float]], before: list[int]) -> None:
        first = max(before, default=0) + 1
        if [step for step, _ in records] != list(range(first, first + len(records))):
            went = ", ".join(str(step) for step, _ in records[:3])
            self.problems.append(f"order: a run with checkpoints {before} went on with steps {went}, not {first}")
        for step, loss in records:
            self.losses[step] = LOSS.pack(loss)
            if self.truth is not None and self.truth.losses.get(step) != self.losses[step]:
                self.problems.append(f"different: step {step} has the loss {loss!r}")
        self.steps += len(records)

    def _left(self, before: list[int], trained: bool) -> Iterator[str]:
        """What is wrong with what a process left."""
        now = valid_steps(self.saved)
        saves = max(now, default=0) - max(before, default=0)
        if saves > 0 and len(now) < min(2, len(before) + saves):
            yield f"too few: of the checkpoints {before} and {saves} new ones, {now} are valid"
        yield from (f"unreadable: {problem}" for problem in broken(self.saved, self.damaged))
        if trained and (lost := [name for name in self.damaged if not (self.saved / f"{name}.corrupt").exists()]):
            yield f"unreadable: {lost[0]} was damaged, and is not kept as {lost[0]}.corrupt"
        if trained:
            self.damaged.clear()

    def _end_state(self) -> Iterator[str]:
        assert self.truth is not None
        if self.losses.keys() != self.truth.losses.keys():
            yield f"order: finished after the steps {sorted(self.losses)}"
        try:
            found = checkpoint.read(self.run_dir / "last.ckpt")
        except SoloError as error:
            yield f"unreadable: {error}"
            return
        for part in STATE:
            if where := difference(found.get(part), self.truth.final.get(part), part):
                yield f"different: {where} at the end"
        yield from (f"left behind: {path.name}" for path in self.run_dir.rglob(".*.tmp"))


# --- the trainer's process ----------------------------------------------------------------------------------------------


class _Trace(pl.Callback):
    def __init__(self, board: mmap.mmap, file: int) -> None:
        self.board, self.file = board, file

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        os.write(self.file, RECORD.pack(trainer.global_step, outputs["loss"].item(), time.monotonic()))
        self.board[TRAINING] = 1


def _live(run: Ordeal, board: mmap.mmap, operation: int | None, after: Callable[[], object] | None) -> None:
    """The trainer's process, which never returns."""
    try:
        torch.set_num_threads(1)
        said = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if operation is not None:
            _kill_before(operation)
        if run.defect is not None:
            run.defect()
        save = checkpoint.save

        def marked(*args: Any, **kwargs: Any) -> None:
            board[WRITING] = 1
            save(*args, **kwargs)
            board[WRITING] = 0

        checkpoint.save = marked
        pretrain(run.config, [_Trace(board, os.open(run.trace, os.O_WRONLY | os.O_APPEND))])
        if after is not None:
            after()
        os._exit(0)
    except BaseException:
        with suppress(Exception):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def _kill_before(operation: int) -> None:
    """SIGKILL to this process before its n-th half-written file, fsync, rename or removal."""
    count = 0

    def point() -> None:
        nonlocal count
        count += 1
        if count == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def pointed(*args: Any, **kwargs: Any) -> Any:
            point()
            return function(*args, **kwargs)

        return pointed

    def in_halves(content: Any, file: Any, save: Callable[..., Any] = torch.save) -> None:
        buffer = BytesIO()
        save(content, buffer)
        half = len(buffer.getvalue()) // 2
        file.write(buffer.getvalue()[:half])
        file.flush()
        point()
        file.write(buffer.getvalue()[half:])

    os.fsync, os.replace = before(os.fsync), before(os.replace)
    Path.unlink = before(Path.unlink)           # type: ignore[method-assign]
    torch.save = in_halves                      # type: ignore[assignment]


def _end(process: int, board: mmap.mmap, instant: float | None) -> int:
    """Wait for a process, or kill it at its instant; its exit status."""
    if instant is None:
        return os.waitpid(process, 0)[1]
    end = time.monotonic() - instant if instant < 0 else math.inf
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        if end == math.inf and board[TRAINING]:
            end = time.monotonic() + instant
        if time.monotonic() >= end:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            return os.waitpid(process, 0)[1]
        time.sleep(0.0005)
