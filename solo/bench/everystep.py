"""``python -m solo.bench chaos --every-step``: a run that goes on from any of its steps has the bits of the whole run.

Every method is trained once, with a checkpoint of every step, and continued for two steps from each one, by new
processes. What is compared are the loss, the rates and the teacher's tau of every rank and step, and the whole state two
steps on: weights, queues, optimizer, probe, place in the data. By induction that is the rest of the run.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from solo import checkpoint
from solo.bench import processes
from solo.bench.leftovers import STATE, difference
from solo.bench.processes import of_rank
from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import tiny

STEPS, FURTHER = 24, 2
PATIENCE = 300.0    # seconds for two steps, or for the whole run


class _Notes(pl.Callback):
    """Notes each step's numbers, saves after it, and ends the run after the last step."""

    def __init__(self, folder: Path, rank: int, last: int) -> None:
        self.folder, self.notes, self.last = folder, of_rank(folder / "notes", rank), last

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
        step = trainer.global_step
        rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
        facts = {"step": step, "loss": outputs["loss"].item(), "lr": rates, **getattr(pl_module, "stepped", {})}
        with self.notes.open("a") as file:
            file.write(json.dumps(facts, default=float) + "\n")       # repr of a float is exact
        trainer.save_checkpoint(self.folder / f"{step}.ckpt")
        trainer.should_stop = step == self.last


def every_step(method: str, folder: Path, ranks: int, workers: int = 0, steps: Sequence[int] = range(1, STEPS)) -> list[str]:
    """Continue a method's run from these steps.

    Args:
        method: its name.
        folder: where to work; removed afterwards.
        ranks: gloo processes, which share the 8 images of a step.
        workers: of each process's loader.
        steps: after which of the run's 24 to go on.

    Returns:
        What is wrong, a line each.
    """
    data = {"num_workers": workers, "engine": "torchvision" if workers else "auto"}
    quiet: dict[str, Any] = {"loggers": [], "limit_val_batches": 2}
    content = tiny(method, folder, devices=ranks, optimizer={"batch_size": 8 // ranks}, data=data, **quiet)
    whole = folder / "whole"
    last = min(max(steps) + FURTHER, STEPS)
    found = [f"{method}: the whole run: {problem}" for problem in _train(content, whole, ranks, last)]
    for step in [] if found else steps:
        end, there = min(step + FURTHER, STEPS), folder / str(step)
        problems = _train({**content, "resume": str(whole / f"{step}.ckpt")}, there, ranks, end)
        problems += [] if problems else _differences(whole, there, ranks, step, end)
        found += [f"{method}, after step {step}: {problem}" for problem in problems]
        shutil.rmtree(there)
    shutil.rmtree(folder)
    return found


def _train(content: dict[str, Any], folder: Path, ranks: int, last: int) -> list[str]:
    folder.mkdir(parents=True)
    config = experiment({**content, "checkpoint": {"dir": str(folder)}})
    log, modules = folder / "log", folder / "modules"

    def body(rank: int) -> None:
        pretrain(config, [_Notes(folder, rank, last)])
        if rank == 0:
            processes.note_modules(modules)

    children = processes.fork(ranks, log, body)
    statuses = processes.wait(children, PATIENCE)
    left = [child for child in children if child not in statuses]
    if modules.exists():
        processes.import_noted(modules)
    processes.kill(left)
    statuses |= processes.wait(left, PATIENCE)
    said = log.read_text(errors="replace").strip().splitlines()[-1:]
    return ["it hangs"] * bool(left) or [f"it ends with {statuses}: {' '.join(said)}"] * any(statuses.values())


def _differences(whole: Path, there: Path, ranks: int, step: int, end: int) -> Iterator[str]:
    for rank in range(ranks):
        expected = of_rank(whole / "notes", rank).read_text().splitlines()[step:end]
        found = of_rank(there / "notes", rank).read_text().splitlines()
        if found != expected:
            yield f"rank {rank} noted {found}, not {expected}"
    a, b = (checkpoint.read(folder / f"{end}.ckpt") for folder in (there, whole))
    yield from (f"{where} at step {end}" for part in STATE if (where := difference(a.get(part), b.get(part), part)))
