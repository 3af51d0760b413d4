"""``python -m solo.bench chaos --minutes M``: a long run that something happens to every 20 seconds, beside one left alone.

Faults are kills, signals, a flipped bit in the newest checkpoint, and a disk that is full for a while. In the end both
runs must have gone through the same losses to the same state, and the quiet one must not have grown.
"""

import errno
import mmap
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from solo import checkpoint
from solo.bench import processes
from solo.bench.leftovers import STATE, difference, valid_steps
from solo.bench.ordeal import LEAVING, RECORD, TRAINING, Ordeal, Trace
from solo.errors import EnvironmentFault
from solo.run import pretrain

SAVES, FAULTS = 2.0, (10.0, 30.0)           # seconds between two saves, and between two faults
PATIENCE = 300.0                            # seconds that a start may take
GROWTH = 0.01                               # by which the memory of a run may grow
FULL = 2                                    # the byte that says that the disk is full, behind the two of `solo.bench.ordeal`
ENDS = (0, 128 + signal.SIGTERM)             # codes with which any life may end


@dataclass
class Usage:
    """Resident memory in bytes and open files of a process, looked at once a second."""

    memory: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def look(self, pid: int) -> None:
        pages = Path(f"/proc/{pid}/statm").read_text().split()
        if len(pages) > 1 and int(pages[1]):                    # else it has just ended
            self.memory.append(int(pages[1]) * os.sysconf("SC_PAGE_SIZE"))
            self.files.append(len(os.listdir(f"/proc/{pid}/fd")))

    def growth(self) -> tuple[float, int] | None:
        """From the second tenth of the time to the last: by which share memory grew, and by how many the open files.

        None if there were fewer than three looks.
        """
        if len(self.memory) < 3:
            return None
        part = max(1, len(self.memory) // 10)
        early, late = slice(part, 2 * part), slice(-part, None)
        memory = statistics.median(self.memory[late]) / statistics.median(self.memory[early]) - 1
        return memory, min(self.files[late]) - min(self.files[early])


class _StopAt(pl.Callback):
    """Ends a run after a step as a signal does."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            signal.raise_signal(signal.SIGTERM)


@dataclass
class Life:
    """The processes of a run from a start to an end."""

    run: Ordeal
    stop: int | None = None
    usage: Usage = field(default_factory=Usage)

    def __post_init__(self) -> None:
        self.before, self.board = self.run.look(), mmap.mmap(-1, 3)
        self.children = processes.fork(self.run.ranks, self.run.log, self._work)
        self.statuses: dict[int, int] = {}
        self.ends = set[int](ENDS)

    def _work(self, rank: int) -> None:
        save = checkpoint.save

        def limited(*args: Any, **kwargs: Any) -> None:
            if self.board[FULL]:
                raise OSError(errno.ENOSPC, "No space left on device")
            save(*args, **kwargs)

        checkpoint.save = limited
        trace = Trace(self.board, os.open(self.run.traces[rank], os.O_WRONLY | os.O_APPEND))
        pretrain(self.run.config, [_StopAt(self.stop), trace])

    @property
    def over(self) -> bool:
        """Whether all of its processes have been seen to end."""
        return len(self.statuses) == len(self.children)

    def steps_on(self) -> bool:
        """Wait for its next step; whether it still lives."""
        noted, deadline = self.run.trace.stat().st_size, time.monotonic() + PATIENCE
        while self.pass_time(0.1) and self.run.trace.stat().st_size == noted and time.monotonic() < deadline:
            pass
        return not self.over

    def starts(self) -> bool:
        """Wait for its first step; whether it came to it."""
        deadline = time.monotonic() + PATIENCE
        while not self.board[TRAINING] and time.monotonic() < deadline and self.pass_time(0.1):
            pass
        return bool(self.board[TRAINING]) and self.pass_time(0.1)

    def pass_time(self, seconds: float) -> bool:
        """Let it live; whether it still does."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.statuses |= processes.wait([child for child in self.children if child not in self.statuses], 0)
            if self.over:
                return False
            if self.board[TRAINING] and self.children[0] not in self.statuses:
                self.usage.look(self.children[0])
            time.sleep(max(0.0, min(1.0, deadline - time.monotonic())))
        return not self.over

    def end(self, number: signal.Signals, victims: Sequence[int]) -> None:
        """Send it to some; the others must leave by themselves, with an error where they lost a process."""
        if number == signal.SIGKILL:
            self.ends |= {-number, *([EnvironmentFault.exit_code] if len(victims) < self.run.ranks else [])}
        for rank in victims:
            if self.children[rank] not in self.statuses:
                os.kill(self.children[rank], number)
        self.wait()

    def wait(self, seconds: float = LEAVING) -> None:
        """Until all have ended, and judge what they left."""
        self.statuses |= processes.wait([child for child in self.children if child not in self.statuses], seconds)
        if left := [child for child in self.children if child not in self.statuses]:
            processes.kill(left)
            self.statuses |= processes.wait(left, LEAVING)
            self.run.problems.append(f"hang: {len(left)} processes are still there after {seconds:g} s")
        codes = [os.waitstatus_to_exitcode(status) for status in self.statuses.values()]
        if not set(codes) <= self.ends:
            said = self.run.log.read_text(errors="replace").strip().splitlines()[-1:]
            self.run.problems.append(f"refused: {codes} {' '.join(said)}")
        self.run.judge(self.before, finished=False)


def soak(
    content: dict[str, Any], minutes: float, seed: int, folder: Path, least: int = 0
) -> tuple[dict[str, int], str, list[str]]:
    """Let two runs of a config go on side by side, and let faults come over one of them.

    Args:
        content: of runs that do not end by themselves.
        minutes: how long, beside what the troubled run needs to catch up.
        seed: of the faults.
        folder: where to work.
        least: faults that must happen, however long it takes.

    Returns:
        How often each fault happened, what was done, and what is wrong, a line each.
    """
    at = {"minutes": SAVES / 60, "frequency": 10**6, "fallback": str(folder / "fallback")}
    quiet, loud = (Ordeal({**content, "checkpoint": at}, folder / name, None) for name in ("quiet", "loud"))
    generator, deadline, happened = random.Random(seed), time.monotonic() + 60 * minutes, dict.fromkeys(FAULT, 0)
    alone, life = Life(quiet), Life(loud)
    while not alone.over and (time.monotonic() < deadline or sum(happened.values()) < least):
        alive = life.starts() and _both(alone, life, generator.uniform(*FAULTS))
        if alive:
            what, alive = FAULT[generator.choice(list(FAULT))](life, generator)
            happened[what] += 1
        else:
            life.wait()
        if not alive:
            life = Life(loud)
    if alone.over:
        quiet.problems.append("refused: the quiet run has ended")
    life.starts()
    life.end(signal.SIGTERM, range(loud.ranks))
    alone.end(signal.SIGTERM, range(quiet.ranks))
    _catch_up(quiet, loud)
    problems = [*quiet.problems, *loud.problems, *_unlike(quiet, loud)]
    grown, problem = judged(alone.usage)
    problems += problem
    said = ", ".join(f"{count} {kind}" for kind, count in happened.items())
    steps = max(valid_steps(quiet.saved))
    return happened, f"{minutes:g} minutes, {steps} steps, {said}: {grown}", problems


def judged(usage: Usage) -> tuple[str, list[str]]:
    """By what a run that was left alone grew, and the problems with it."""
    growth = usage.growth()
    if growth is None:
        return "growth unknown", [f"unseen: memory and open files were looked at {len(usage.memory)} times only"]
    memory, files = growth
    said = f"memory {memory:+.2%}, open files {files:+d}"
    return said, [f"grown: {said}"] if memory >= GROWTH or files > 0 else []


def _both(alone: Life, life: Life, seconds: float) -> bool:
    """Let both live, and look at both; whether the second still does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and alone.pass_time(0.01):
        if not life.pass_time(min(1.0, deadline - time.monotonic())):
            return False
    return True


def _catch_up(quiet: Ordeal, loud: Ordeal) -> None:
    """Both to the step of the one that is further."""
    steps = {id(run): max(valid_steps(run.saved)) for run in (quiet, loud)}
    last = max(steps.values())
    for run in (quiet, loud):
        if steps[id(run)] < last:
            Life(run, stop=last).wait(3600.0)


def _unlike(quiet: Ordeal, loud: Ordeal) -> list[str]:
    """Where the two runs differ."""
    found = []
    for rank, traces in enumerate(zip(quiet.traces, loud.traces, strict=True)):
        losses, trace = (list(RECORD.iter_unpack(trace.read_bytes())) for trace in traces)
        truth = {step: loss for step, loss, _ in losses}
        wrong = [step for step, loss, _ in trace if truth.get(step) != loss]
        found += [f"different: step {step} has another loss on rank {rank}" for step in wrong[:5]]
    expected, other = (checkpoint.read(run.run_dir / "last.ckpt") for run in (quiet, loud))
    places = (difference(other[part], expected[part], part) for part in STATE)
    return found + [f"different: {where} at the end" for where in places if where]


# --- faults: each takes the life and says what happened to it, and whether it still goes on ----------------------------

Fate = tuple[str, bool]
KILLS, SIGNALS, DAMAGED, FULL_DISKS = "kills", "signals", "damaged checkpoints", "full disks"


def _kill(life: Life, generator: random.Random) -> Fate:
    ranks = range(life.run.ranks)
    life.end(signal.SIGKILL, generator.choice([ranks, [generator.choice(ranks)]]))
    return KILLS, False


def _signal(life: Life, generator: random.Random) -> Fate:
    life.end(signal.SIGTERM, [generator.randrange(life.run.ranks)])
    return SIGNALS, False


def _damage(life: Life, generator: random.Random) -> Fate:
    """No more than a kill where there is no other checkpoint to go on from."""
    life.end(signal.SIGKILL, range(life.run.ranks))
    if len(valid_steps(life.run.saved)) < 2:
        return KILLS, False
    life.run.flip()
    return DAMAGED, False


def _fill(life: Life, generator: random.Random) -> Fate:
    """Longer than three saves it ends the run; one that makes a step after it has no reason to end."""
    life.board[FULL] = 1
    life.ends.add(EnvironmentFault.exit_code)
    alive = life.pass_time(generator.uniform(0.5, 4) * SAVES)
    life.board[FULL] = 0
    if alive and life.steps_on():
        life.ends.remove(EnvironmentFault.exit_code)
        return FULL_DISKS, True
    life.wait()
    return FULL_DISKS, False


FAULT: dict[str, Callable[[Life, random.Random], Fate]] = {
    KILLS: _kill, SIGNALS: _signal, DAMAGED: _damage, FULL_DISKS: _fill,
}
