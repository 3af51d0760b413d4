"""``python -m solo.bench chaos``: a run that is killed again and again ends like one that is left alone.

A warm process forks the trainer, which is the library's own `solo.run.pretrain`, kills it with SIGKILL at a random instant
and starts the same call again. Every step's loss is compared with the uninterrupted run as raw float64; what the
killed process left is read after each kill, and an observer looks at the checkpoints all the while.
"""

import argparse
import math
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from solo.bench.everystep import STEPS, every_step
from solo.bench.observer import Observer
from solo.bench.ordeal import Ordeal, reference
from solo.bench.routes import ROUTES, interrupt
from solo.bench.soak import soak
from solo.errors import SIGNALS, ConfigError, Parser, SoloError
from solo.methods import METHODS
from solo.testing import tiny


def plan(folder: str | Path, width: int = 16, ranks: int = 1, **changes: Any) -> dict[str, Any]:
    """A run of 24 steps of a method with teacher, queue, dropout and probe that saves after every step; it hardly validates.

    Args:
        folder: where it is written.
        width: of the hidden layers: 16 makes checkpoints of 0.3 MB, 800 of 8 MB.
        ranks: processes that share the 8 images of a step.
    """
    sizes = {"proj_hidden_dim": width, "pred_hidden_dim": width}
    quiet: dict[str, Any] = {"loggers": [], "health": {"enabled": False}, "checkpoint": {"minutes": 0}, "limit_val_batches": 2}
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
    watched: float = 0.0        # seconds over which the looks spread
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(problem.startswith(kind) for problem in self.problems)

    def __str__(self) -> str:
        return (
            f"{self.kills} kills, {self.in_write} of them inside a write; {self.runs} runs, {self.steps} steps, "
            f"{self.looks} looks ({self.looks / max(self.watched, 1e-9):.0f} a second), {self.seconds:.0f} s: "
            f"{self.count('unreadable')} unreadable files, "
            f"{self.count('different')} other losses or states, {self.count('order')} steps out of order, "
            f"{self.count('too few')} times fewer than two valid checkpoints, {self.count('refused')} refused to continue, "
            f"{self.count('hang')} ranks that stayed, "
            f"{self.count('left behind')} temporary files left"
        )


def campaign(
    kills: int, seed: int, folder: Path, width: int = 800, ranks: int = 1, limit: float = math.inf, progress: bool = False,
    **changes: Any,
) -> Tally:
    """Kill at random instants until the number is reached, run after run; of several ranks one, or all at once.

    From its first step on a life lasts as long as a step does on average, whatever has passed of it (an exponential law).

    Args:
        kills: how many.
        seed: of the instants.
        folder: where to work.
        width: see `plan`.
        ranks: processes of the run.
        limit: seconds after which to stop, with fewer kills.
        progress: whether to tell the tally after each run.
        changes: of the plan.
    """
    generator, tally, began = random.Random(seed), Tally(), time.monotonic()
    content = plan(folder, width, ranks, **changes)
    truth = reference(content, folder / "whole")
    while tally.kills < kills and time.monotonic() < began + limit:
        run = Ordeal(content, folder / "run", truth)
        observer = Observer(run.saved, folder / "observer")
        finished = False
        while not finished:
            early = generator.random() < 0.05
            instant = -generator.uniform(0.02, 0.3) if early else generator.expovariate(1 / truth.step_seconds)
            victims = generator.choice([(), *([rank] for rank in range(ranks))]) if ranks > 1 else ()
            more = tally.kills + run.kills < kills and time.monotonic() < began + limit
            finished = run.life(instant if more else None, victims=victims)
        looks, watched, wrong = observer.end()
        tally.runs += 1
        tally.kills += run.kills
        tally.in_write += run.in_write
        tally.steps += run.steps
        tally.looks += looks
        tally.watched += watched
        tally.problems += [*run.problems, *wrong]
        tally.seconds = time.monotonic() - began
        shutil.rmtree(folder / "run")
        if progress:
            print(tally, flush=True)
    return tally


def interruptions(runs: int, seed: int, folder: Path, limit: float = math.inf) -> tuple[str, list[str]]:
    """`interrupt` on each route in turn, by each signal in turn, at random steps: what was done, and what is wrong."""
    generator, began = random.Random(seed), time.monotonic()
    took: list[float] = []
    problems: list[str] = []
    at_its_end = {"frequency": 10**6, "minutes": 1e6}
    contents = {n: plan(folder, ranks=n, data={"train_size": 128}, checkpoint=at_its_end) for n in (1, 2)}
    truths = {n: reference(contents[n], folder / f"whole{n}") for n in contents}
    for attempt in range(runs):
        if time.monotonic() >= began + limit:
            break
        name = list(ROUTES)[attempt % len(ROUTES)]
        ranks, hard = ROUTES[name].ranks, ROUTES[name].times > 1        # a second Ctrl-C is meant to end it at once
        number = generator.choice([number for number in SIGNALS if not (hard and number == signal.SIGINT)])
        wait = generator.uniform(0, 20 * truths[ranks].step_seconds)
        seconds, found = interrupt(name, number, wait, contents[ranks], folder / "run", truths[ranks])
        problems += found
        if seconds is not None:
            took.append(seconds)
            found = [f"gone in {seconds:.1f} s", *found]
        print(f"{attempt + 1}: {number.name} to {name}: {'; '.join(found)}", flush=True)
        shutil.rmtree(folder / "run")
    said = (f"{len(took)} interruptions over {len(ROUTES)} routes, {time.monotonic() - began:.0f} s: "
            f"gone in {max(took, default=0.0):.1f} s at most")
    return f"{said}, {len(problems)} problems", problems


def resumes(folder: Path, ranks: int, methods: Sequence[str], workers: int) -> tuple[str, list[str]]:
    """`every_step` of each method: what was done, and what is wrong."""
    began, problems = time.monotonic(), list[str]()
    for method in methods:
        found = every_step(method, folder / method, ranks, workers)
        print(f"{method}: {len(found)} differences in {STEPS - 1} resumes", flush=True)
        problems += found
    done = f"{len(methods)} methods, {len(methods) * (STEPS - 1)} resumes by {ranks} processes, each with {workers} workers"
    return f"{done}, {time.monotonic() - began:.0f} s: {len(problems)} differences", problems


def long_run(minutes: float, seed: int, folder: Path, ranks: int) -> tuple[str, list[str]]:
    """`soak` of a run of 64 steps an epoch, and of more epochs than there is time for."""
    content = plan(folder, ranks=ranks, data={"train_size": 512}, max_epochs=10**5)
    reference(plan(folder, ranks=ranks, max_epochs=1), folder / "first")        # imports what a run imports
    _, said, problems = soak(content, minutes, seed, folder)
    return said, problems


def main(argv: list[str]) -> None:
    """``chaos [--kills N | --signals N | --minutes M | --every-step]``: the exit code is 1 when anything is wrong."""
    parser = Parser(prog="python -m solo.bench chaos", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--kills", type=int, default=1000, help="random SIGKILLs (default: 1000)")
    what.add_argument("--signals", type=int, help="runs that a signal ends, over all routes by which it can come")
    what.add_argument("--minutes", type=float, help="of a run with a fault every 20 seconds, beside a quiet one")
    what.add_argument("--every-step", action="store_true", help="resume every method after every step")
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4), help="gloo processes of the run (default: 1)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="of --every-step (default: all)")
    parser.add_argument("--workers", type=int, default=0, help="of each process's loader, of --every-step (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    parser.add_argument("--limit", type=float, default=math.inf, help="minutes after which to stop, with fewer kills or runs")
    arguments = parser.parse_args(argv)
    for name in ("kills", "signals"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1, got {value}")
    with tempfile.TemporaryDirectory(prefix="solo-chaos-") as name:
        said, problems = _done(arguments, Path(name))
    print(said)
    if problems:
        raise SoloError("\n".join(problems[:20]))


def _done(arguments: argparse.Namespace, folder: Path) -> tuple[str, list[str]]:
    seed, limit = arguments.seed, 60 * arguments.limit
    if arguments.every_step:
        return resumes(folder, arguments.ranks, arguments.methods, arguments.workers)
    if arguments.signals:
        return interruptions(arguments.signals, seed, folder, limit)
    if arguments.minutes:
        return long_run(arguments.minutes, seed, folder, arguments.ranks)
    tally = campaign(arguments.kills, seed, folder, ranks=arguments.ranks, limit=limit, progress=True)
    return str(tally), tally.problems
