"""What a real run moves on, and when."""

import copy
import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from solo.batch import Batch
from solo.nn import Queue, StepModule, Teacher
from solo.optim import scaled_lr
from solo.schedules import learning_rate
from solo.testing.case import Case, half
from solo.testing.compare import of, require


def advances_once_per_step(case: Case, **changes: Any) -> None:
    """With two batches to an optimizer step: still in between, then teachers by one tau, queues by both batches, and the
    learning rate by one step of its schedule.

    Args:
        changes: of the experiment.
    """
    watcher = _Watcher()
    case.train(watcher, accumulate_grad_batches=2, max_epochs=2, **half(case), **changes)
    require(not watcher.problems, "\n".join(watcher.problems))
    require(watcher.steps == 4, f"8 batches, 2 to a step, made {watcher.steps} optimizer steps")


def wrong_rate(method: Any, step: int, total: int, per_epoch: int, batch_size: int) -> list[str]:
    """What is wrong with the learning rate that groups with a schedule have in this optimizer step, from 0; mostly nothing.

    Args:
        total, per_epoch: optimizer steps.
        batch_size: images of one, over all processes.
    """
    own = {group["name"]: group for group in method.parameter_groups(scaled_lr(method.optimizer_config.lr, batch_size))}
    wrong = []
    for group in method._groups():
        name, rate = group["name"], group["lr"]
        due = learning_rate(method.scheduler_config, step, total, per_epoch, own[name]["lr"])
        if own[name]["schedule"] and not math.isclose(rate, due, rel_tol=1e-9, abs_tol=1e-12):
            wrong.append(f"the learning rate of step {step + 1} is {rate:g} for {name}, due is {due:g}")
    return wrong


class _Watcher(pl.Callback):
    """Compares every teacher and queue before and after each batch with what one step must do to them."""

    def __init__(self) -> None:
        self.steps = 0
        self.problems: list[str] = []
        self._labels: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self._step, self._progress = trainer.global_step, pl_module.progress
        self._teachers = {name: [p.clone() for p in t.parameters()] for name, t in of(pl_module, Teacher).items()}
        self._queues = {name: queue.keys.clone() for name, queue in of(pl_module, Queue).items()}
        self._labels.append(batch.labels)
        self._still = {name: copy.deepcopy(memory.state_dict()) for name, memory in of(pl_module, StepModule).items()
                       if not isinstance(memory, Teacher)}     # whose BatchNorms see every batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        stepped = trainer.global_step > self._step
        for name, teacher in of(pl_module, Teacher).items():
            if stepped:
                students = [p for student in teacher._students for p in student.parameters()]
                torch._foreach_lerp_(self._teachers[name], students, 1 - teacher.momentum.tau(self._progress))
            if not all(map(torch.equal, self._teachers[name], teacher.parameters())):
                self.problems.append(f"{name} is not one update further after step {trainer.global_step}")
        for name, queue in of(pl_module, Queue).items():
            rows = (queue.keys != self._queues[name]).any(1)
            self._check_rows(f"{name}, step {trainer.global_step}", queue.labels[rows], stepped)
        for name, before in self._still.items() if not stepped else ():
            memory = pl_module.get_submodule(name).state_dict()
            if not all(torch.equal(value, memory[key]) for key, value in before.items() if isinstance(value, Tensor)):
                self.problems.append(f"{name} moved between the micro-batches of step {trainer.global_step + 1}")
        if stepped:
            total, per_epoch = int(trainer.estimated_stepping_batches), int(trainer.num_training_batches) // 2
            batch_size = 2 * pl_module.optimizer_config.batch_size
            self.problems += wrong_rate(pl_module, self.steps, total, per_epoch, batch_size)
            self.steps += 1
            self._labels.clear()

    def _check_rows(self, where: str, found: Tensor, stepped: bool) -> None:
        labels = torch.cat(self._labels).sort().values if stepped else torch.empty(0, dtype=torch.long)
        times = len(found) // max(len(labels), 1)               # views that are pushed
        if len(found) != times * len(labels) or bool(stepped) != bool(times):
            self.problems.append(f"{where}: {len(found)} rows are new, for {len(labels)} images")
        elif not torch.equal(found.sort().values, labels.repeat_interleave(times)):
            self.problems.append(f"{where}: the new rows do not have the images' labels")
