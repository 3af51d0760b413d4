"""One run that is killed, damaged and started again, and everything that must hold meanwhile."""

import gc
import math
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from solo import checkpoint
from solo.bench import processes
from solo.bench.leftovers import STATE, broken, difference, valid_steps
from solo.bench.processes import of_rank
from solo.data.module import DataModule
from solo.errors import SoloError
from solo.experiment import Experiment, experiment
from solo.run import pretrain

RECORD = struct.Struct("<qdd")                  # step, loss, time
LOSS = struct.Struct("<d")
LEAVING = 20.0                                  # seconds that a rank has to notice that another one is dead, and to leave
TRAINING, WRITING = range(2)                    # bytes that the trainer shares with its parent


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run: the loss of each rank and step as bytes, the last checkpoint, and seconds per step."""

    losses: dict[tuple[int, int], bytes]
    final: dict[str, Any]
    step_seconds: float


def reference(content: dict[str, Any], folder: Path) -> Reference:
    """Train once undisturbed; also imports here what a run imports, and loads the kernel, so that later forks need not."""
    modules, run = folder / "modules", Ordeal(content, folder, None)
    run.life(after=lambda: processes.note_modules(modules))
    if run.problems:
        raise SoloError("\n".join(run.problems))
    processes.import_noted(modules)
    _load_kernel(run.config)
    gc.freeze()                 # what the forks inherit: a collection there would touch, and so copy, all of it
    times = [time for _, _, time in RECORD.iter_unpack(run.trace.read_bytes())]
    return Reference(run.losses, checkpoint.read(run.run_dir / "last.ckpt"), (times[-1] - times[0]) / (len(times) - 1))


def _load_kernel(config: Experiment) -> None:
    """What the first batch of a process waits for: compiled code, which forks inherit."""
    data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, config.seed)
    with closing(data.train_dataloader()) as loader:
        next(iter(loader))


@dataclass
class Ordeal:
    """One run of one or several processes and what it goes through.

    Attributes:
        content: its config.
        folder: where it is.
        truth: what it must equal.
        defect: changes the library in the forked trainer, to see that the harness notices.
        problems: what was found wrong, one line each: ``kind: what``.
        losses: of each rank and step so far, as bytes.
        ranks: its processes.
        in_write: kills that hit a save.
    """

    content: dict[str, Any]
    folder: Path
    truth: Reference | None
    defect: Callable[[], None] | None = None
    problems: list[str] = field(default_factory=list)
    losses: dict[tuple[int, int], bytes] = field(default_factory=dict)
    in_write: int = 0
    kills: int = 0
    steps: int = 0
    damaged: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = experiment({**self.content, "checkpoint": {**self.content["checkpoint"], "dir": str(self.folder)}})
        self.ranks: int = self.content["devices"]
        self.run_dir = self.config.run_dir(self.config.optimizer.batch_size * self.ranks)
        self.saved, self.log, self.trace = self.run_dir / "checkpoints", self.folder / "log", self.folder / "losses"
        for trace in self.traces:
            trace.touch()

    @property
    def traces(self) -> list[Path]:
        """Where each rank notes its losses."""
        return [of_rank(self.trace, rank) for rank in range(self.ranks)]

    def life(
        self,
        instant: float | None = None,
        operation: int | None = None,
        after: Callable[[], object] | None = None,
        victims: Sequence[int] = (),
    ) -> bool:
        """Start the trainer and let it live until it is killed or has finished.

        Args:
            instant: seconds from the first step to the kill; negative: from the start.
            operation: instead, kill before this one (from 1) of the operations on files that make up a save.
            after: is called in the trainer at its end.
            victims: the ranks to kill at the instant; none named: all. The others must leave by themselves.

        Returns:
            Whether it finished.
        """
        before, board = self.look(), mmap.mmap(-1, 2)
        children = processes.fork(self.ranks, self.log, lambda rank: _live(self, rank, board, operation, after))
        doomed = [] if instant is None else [children[rank] for rank in victims or range(self.ranks)]
        statuses = self._end(children, board, instant, doomed)
        killed = any(map(processes.killed, statuses))
        self.kills += killed
        if not killed and any(statuses):
            self.problems.append(f"refused: {' '.join(self.log.read_text(errors='replace').strip().splitlines()[-1:])}")
        self.judge(before, finished=not any(statuses))
        return not killed

    def look(self) -> tuple[list[int], list[int]]:
        """Steps of the valid checkpoints, and how much each rank has noted: where a life begins."""
        return valid_steps(self.saved), [trace.stat().st_size for trace in self.traces]

    def judge(self, before: tuple[list[int], list[int]], finished: bool) -> None:
        """Hold what a life has noted and left against the truth."""
        steps, sizes = before
        new = [trace.read_bytes()[size:] for trace, size in zip(self.traces, sizes, strict=True)]
        for rank, content in enumerate(new):
            self._compare(rank, [(step, loss) for step, loss, _ in RECORD.iter_unpack(content)], steps)
        self.problems += self._left(steps, any(new))
        if finished and self.truth is not None:
            self.problems += self._end_state()

    def _end(self, children: list[int], board: mmap.mmap, instant: float | None, victims: list[int]) -> list[int]:
        """Wait for the processes, or kill some at their instant; the exit statuses."""
        statuses: dict[int, int] = {}
        end = math.inf if instant is None or instant >= 0 else time.monotonic() - instant
        while len(statuses) < len(children):
            statuses |= processes.wait([child for child in children if child not in statuses], 0)
            if instant is not None and end == math.inf and board[TRAINING]:
                end = time.monotonic() + instant
            if any(map(processes.killed, statuses.values())) or time.monotonic() >= end:
                return self._kill(children, board, statuses, victims)
            time.sleep(min(processes.PAUSE, max(end - time.monotonic(), 0.0)))
        return list(statuses.values())

    def _kill(self, children: list[int], board: mmap.mmap, statuses: dict[int, int], victims: list[int]) -> list[int]:
        processes.kill(victim for victim in victims if victim not in statuses)
        statuses |= processes.wait([victim for victim in victims if victim not in statuses], LEAVING)
        self.in_write += any(map(processes.killed, statuses.values())) and board[WRITING]
        others = [child for child in children if child not in statuses]
        statuses |= processes.wait(others, LEAVING if board[TRAINING] else 0)   # before it, their launcher ends them
        if left := [child for child in others if child not in statuses]:
            processes.kill(left)
            statuses |= processes.wait(left, LEAVING)
            if board[TRAINING]:
                self.problems.append(f"hang: {len(left)} ranks are still there {LEAVING:g} s after another one was killed")
        return list(statuses.values())

    def flip(self) -> None:
        """Damage the newest checkpoint by one bit."""
        step = max(valid_steps(self.saved))
        path = self.saved / f"step-{step:09d}.ckpt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.damaged.add(path.name)

    def _compare(self, rank: int, records: list[tuple[int, float]], before: list[int]) -> None:
        first = max(before, default=0) + 1
        if [step for step, _ in records] != list(range(first, first + len(records))):
            went = ", ".join(str(step) for step, _ in records[:3])
            self.problems.append(f"order: a run with checkpoints {before} went on with steps {went}, not {first}")
        for step, loss in records:
            self.losses[rank, step] = LOSS.pack(loss)
            if self.truth is not None and self.truth.losses.get((rank, step)) != self.losses[rank, step]:
                self.problems.append(f"different: step {step} has the loss {loss!r} on rank {rank}")
        self.steps += len(records) * (rank == 0)

    def _left(self, before: list[int], trained: bool) -> Iterator[str]:
        """What is wrong with what a process left."""
        now = valid_steps(self.saved)
        steps = max(now, default=0) - max(before, default=0)
        saves = steps if self.config.checkpoint.minutes == 0 else min(steps, 1)
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


class Trace(pl.Callback):
    """Notes the loss of every step."""

    def __init__(self, board: mmap.mmap, file: int) -> None:
        self.board, self.file = board, file

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        os.write(self.file, RECORD.pack(trainer.global_step, outputs["loss"].item(), time.monotonic()))
        self.board[TRAINING] = 1


def _live(
    run: Ordeal, rank: int, board: mmap.mmap, operation: int | None, after: Callable[[], object] | None
) -> None:
    """What a trainer's process does."""
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
    pretrain(run.config, [Trace(board, os.open(run.traces[rank], os.O_WRONLY | os.O_APPEND))])
    if after is not None:
        after()


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
