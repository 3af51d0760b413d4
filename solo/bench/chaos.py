"""``python -m solo.bench chaos``: a run that is killed again and again ends like one that is left alone.

A warm process forks the trainer, which is the library's own `solo.run.pretrain`, kills it with SIGKILL at a random instant
and starts the same call again. Every step's loss is compared with the uninterrupted run as raw float64; what the
killed process left is read after each kill, and an observer looks at the checkpoints all the while.
"""

import mmap
import os
import random
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solo import files
from solo.bench.leftovers import entries
from solo.bench.ordeal import Ordeal, reference
from solo.errors import ConfigError, Parser, SoloError
from solo.testing import tiny


def plan(folder: str | Path, width: int = 16, **changes: Any) -> dict[str, Any]:
    """A run of 24 steps of a method with teacher, queue, dropout and probe that saves after every step.

    Args:
        folder: where it is written.
        width: of the hidden layers: 16 makes checkpoints of 0.3 MB, 800 of 8 MB.
    """
    sizes = {"proj_hidden_dim": width, "pred_hidden_dim": width}
    quiet: dict[str, Any] = {"loggers": [], "health": {"enabled": False}, "checkpoint": {"minutes": 0}}
    return tiny("all4one", folder, method_kwargs=sizes, **{**quiet, **changes})


class Observer:
    """A process that looks every few milliseconds how many checkpoints are valid, from two on never fewer."""

    def __init__(self, folder: Path, findings: Path) -> None:
        self.board, self.findings = mmap.mmap(-1, 1), findings
        self.process = os.fork()
        if not self.process:
            with suppress(BaseException):
                findings.write_text(_watch(folder, self.board))
            os._exit(0)

    def end(self) -> str:
        """Its findings: looks, and what was wrong, a line each."""
        self.board[0] = 1
        os.waitpid(self.process, 0)
        return self.findings.read_text()


def _watch(folder: Path, board: mmap.mmap) -> str:
    digests: dict[tuple[int, ...], str] = {}
    looks, seen, wrong = 0, 0, []
    while not board[0]:
        with suppress(FileNotFoundError, ValueError):
            named = entries(folder)
            valid = sum(_digest(folder / name, digests) == sha256 for name, sha256 in named.items())
            if entries(folder) == named:        # else the files of a manifest that is no longer in force
                looks, seen = looks + 1, max(seen, valid)
                if valid < min(seen, 2):
                    wrong.append(f"too few: of {sorted(named)}, {valid} valid")
        time.sleep(0.005)
    return "\n".join([str(looks), *wrong])


def _digest(path: Path, known: dict[tuple[int, ...], str]) -> str:
    """The checksum of a file, computed once for each state it is in."""
    try:
        found = path.stat()
        key = (found.st_ino, found.st_size, found.st_mtime_ns)
        if key not in known:
            known[key] = files.digest(path)
        return known[key]
    except FileNotFoundError:
        return "missing"


@dataclass
class Tally:
    """What a campaign counted."""

    kills: int = 0
    in_write: int = 0
    runs: int = 0
    steps: int = 0
    looks: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(problem.startswith(kind) for problem in self.problems)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.in_write} of them inside a write; {self.runs} runs, {self.steps} steps, "
            f"{self.looks} looks, {self.seconds:.0f} s: {self.count('unreadable')} unreadable files, "
            f"{self.count('different')} other losses or states, {self.count('order')} steps out of order, "
            f"{self.count('too few')} times fewer than two valid checkpoints, {self.count('refused')} refused to continue, "
            f"{self.count('left behind')} temporary files left"
        )


def campaign(kills: int, seed: int, folder: Path, width: int = 800) -> Tally:
    """Kill at random instants until the number is reached, run after run."""
    generator, tally, began = random.Random(seed), Tally(), time.monotonic()
    content = plan(folder, width)
    truth = reference(content, folder / "whole")
    while tally.kills < kills:
        run = Ordeal(content, folder / "run", truth)
        observer = Observer(run.saved, folder / "observer")
        finished = False
        while not finished:
            early = generator.random() < 0.05
            instant = -generator.uniform(0.02, 0.3) if early else generator.uniform(0, 3 * truth.step_seconds)
            finished = run.life(instant if tally.kills + run.kills < kills else None)
        looks, *wrong = observer.end().splitlines()
        tally.runs += 1
        tally.kills += run.kills
        tally.in_write += run.in_write
        tally.steps += run.steps
        tally.looks += int(looks)
        tally.problems += [*run.problems, *wrong]
        shutil.rmtree(folder / "run")
    tally.seconds = time.monotonic() - began
    return tally


def main(argv: list[str]) -> None:
    """``python -m solo.bench chaos [--kills N] [--seed N]``: the exit code is 1 when anything was wrong."""
    parser = Parser(prog="python -m solo.bench chaos", description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.kills < 1:
        raise ConfigError(f"--kills must be at least 1, got {arguments.kills}")
    with tempfile.TemporaryDirectory(prefix="solo-chaos-") as folder:
        tally = campaign(arguments.kills, arguments.seed, Path(folder))
    print(tally)
    if tally.problems:
        raise SoloError("\n".join(tally.problems[:20]))
