"""``python -m solo.bench chaos``: a run that is killed again and again ends like one that is left alone.

A warm process forks the trainer, which is the library's own `solo.run.pretrain`, kills it with SIGKILL at a random instant
and starts the same call again. Every step's loss is compared with the uninterrupted run as raw float64; what the
killed process left is read after each kill, and an observer looks at the checkpoints all the while.
"""

import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solo.bench.everystep import STEPS, every_step
from solo.bench.observer import Observer
from solo.bench.ordeal import Ordeal, reference
from solo.errors import ConfigError, Parser, SoloError
from solo.methods import METHODS
from solo.testing import tiny


def plan(folder: str | Path, width: int = 16, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    """A run of 24 steps of a method with teacher, queue, dropout and probe that saves after every step.

    Args:
        folder: where it is written.
        width: of the hidden layers: 16 makes checkpoints of 0.3 MB, 800 of 8 MB.
        ranks: processes that share the 8 images of a step.
    """
    sizes = {"proj_hidden_dim": width, "pred_hidden_dim": width}
    quiet: dict[str, Any] = {"loggers": [], "health": {"enabled": False}, "checkpoint": {"minutes": 0}}
    shared = {"devices": ranks, "optimizer": {"batch_size": 8 // ranks}}
    return tiny("all4one", folder, method_kwargs=sizes, **{**quiet, **shared, **changes})


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
            f"{self.count('hang')} ranks that stayed, "
            f"{self.count('left behind')} temporary files left"
        )


def campaign(kills: int, seed: int, folder: Path, width: int = 800, ranks: int = 1) -> Tally:
    """Kill at random instants until the number is reached, run after run; of several ranks one, or all at once."""
    generator, tally, began = random.Random(seed), Tally(), time.monotonic()
    content = plan(folder, width, ranks)
    truth = reference(content, folder / "whole")
    while tally.kills < kills:
        run = Ordeal(content, folder / "run", truth)
        observer = Observer(run.saved, folder / "observer")
        finished = False
        while not finished:
            early = generator.random() < 0.05
            instant = -generator.uniform(0.02, 0.3) if early else generator.uniform(0, 3 * truth.step_seconds)
            victims = generator.choice([(), *([rank] for rank in range(ranks))]) if ranks > 1 else ()
            finished = run.life(instant if tally.kills + run.kills < kills else None, victims=victims)
        looks, wrong = observer.end()
        tally.runs += 1
        tally.kills += run.kills
        tally.in_write += run.in_write
        tally.steps += run.steps
        tally.looks += looks
        tally.problems += [*run.problems, *wrong]
        shutil.rmtree(folder / "run")
    tally.seconds = time.monotonic() - began
    return tally


def resumes(folder: Path, ranks: int, methods: Sequence[str]) -> tuple[str, list[str]]:
    """`every_step` of each method with and without workers: what was done, and what is wrong."""
    began, problems = time.monotonic(), []
    for method in methods:
        for workers in (0, 2):
            found = every_step(method, folder / method, ranks, workers)
            print(f"{method}, {workers} workers: {len(found)} of {STEPS - 1} resumes are not exact", flush=True)
            problems += found
    done = f"{len(methods)} methods, {2 * len(methods) * (STEPS - 1)} resumes by {ranks} processes"
    return f"{done}, {time.monotonic() - began:.0f} s: {len(problems)} differences", problems


def main(argv: list[str]) -> None:
    """``python -m solo.bench chaos [--kills N | --every-step] [...]``: the exit code is 1 when anything was wrong."""
    parser = Parser(prog="python -m solo.bench chaos", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=int, default=1000, help="random SIGKILLs (default: 1000)")
    what.add_argument("--every-step", action="store_true", help="resume every method after every step")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4), help="gloo processes of the run (default: 1)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="of --every-step (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    arguments = parser.parse_args(argv)
    if arguments.kills < 1:
        raise ConfigError(f"--kills must be at least 1, got {arguments.kills}")
    with tempfile.TemporaryDirectory(prefix="solo-chaos-") as name:
        folder = Path(name)
        if arguments.every_step:
            said, problems = resumes(folder, arguments.ranks, arguments.methods)
        else:
            tally = campaign(arguments.kills, arguments.seed, folder, ranks=arguments.ranks)
            said, problems = str(tally), tally.problems
    print(said)
    if problems:
        raise SoloError("\n".join(problems[:20]))
