"""What holds for every method: each function takes a case and raises AssertionError."""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.dist import all_reduce
from solo.methods import Method
from solo.nn import Queue, StepModule, Teacher
from solo.testing.case import Case, run
from solo.testing.ranks import run_ranks


def trains(case: Case) -> None:
    """A real run: finite losses, features of every large view, other outputs scalar, a backbone that moves."""
    watcher = _Watcher()
    state = case.train(watcher, max_epochs=1)["state_dict"]
    _require(len(watcher.outputs) == 8, f"the run made {len(watcher.outputs)} steps of 8")
    model = case.build()
    for outputs in watcher.outputs:
        others = {name: tuple(value.shape) for name, value in outputs.items() if name != "feats" and value.numel() != 1}
        _require(not others, f"outputs other than feats must be scalars: {others}")
        rows, dim = outputs["feats"].shape
        _require(rows % 8 == 0 and dim == model.dim, f"feats must be [views * 8, {model.dim}], got [{rows}, {dim}]")
        _require(bool(outputs["loss"].isfinite()), "the loss is not finite")
    start = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    _require(any(not torch.equal(state[name], value) for name, value in start.items()), "the backbone did not move")


def every_parameter_learns(case: Case) -> None:
    """Each parameter with ``requires_grad`` gets a finite gradient that is not zero.

    A bias in front of a BatchNorm has none while that uses the batch's mean: such biases must get theirs once the
    BatchNorms use their running statistics.
    """
    model = case.build().double()
    _, grads = _gradients(model, _double(case.batches(1)[0]))
    missing = sorted(name for name, p in model.named_parameters() if p.requires_grad and name not in grads)
    _require(not missing, f"no gradient reaches {missing}")
    broken = sorted(name for name, grad in grads.items() if not grad.isfinite().all())
    _require(not broken, f"the gradient is not finite in {broken}")
    zero = _zeros(grads)
    _, grads = _gradients(model.eval(), _double(case.batches(1)[0]))
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    dead = sorted(name for name in zero if shapes[name] > 1 or name in _zeros(grads))
    _require(not dead, f"the gradient is zero in {dead}")


def teachers_are_constant(case: Case) -> None:
    """No parameter of a teacher asks for a gradient or gets one, and no teacher's output carries one."""
    model, batch = case.build(), case.batches(1)[0]
    _gradients(model, batch)
    for name, teacher in _of(model, Teacher).items():
        moved = [key for key, p in teacher.named_parameters() if p.requires_grad or p.grad is not None]
        _require(not moved, f"{name} is trained by gradient: {moved}")
        _require(not teacher(batch.views[0]).requires_grad, f"the output of {name} carries a gradient")


def teachers_and_queues_advance_once_per_step(case: Case) -> None:
    """With two batches to an optimizer step: still in between, then teachers by one tau and queues by both batches."""
    counter = _Counter()
    case.train(counter, accumulate_grad_batches=2, max_epochs=2)
    _require(not counter.problems, "\n".join(counter.problems))
    _require(counter.steps == 8, f"16 batches, 2 to a step, made {counter.steps} optimizer steps")


def overfits_one_batch(case: Case) -> None:
    """The loss on one fixed batch falls by a tenth of its size or 0.1, whichever is more."""
    model, batch = case.build(), case.batches(1)[0]
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for step in range(80):
        outputs, _ = _gradients(model, batch, seed=step)
        if step >= 10:                                          # until then the queue fills with the batch
            optimizer.step()
            losses.append(outputs["loss"].item())
        model.after_step(0.0)
    first, last = sum(losses[:3]) / 3, sum(losses[-10:]) / 10
    _require(last < first - 0.1 * max(abs(first), 1.0), f"in {len(losses)} steps the loss went from {first:.4g} to {last:.4g}")


def bfloat16_is_close(case: Case) -> None:
    """Under bfloat16 autocast the heads' gradients are finite and the loss of 8 batches is within 5 % (or 0.05) of float32's.

    The backbone's are left out: on maps of one pixel, which it has here, torch's CPU convolutions write no bfloat16
    weight gradient (seen with 2.14).
    """
    full, half = [], []                                         # of several batches: a neighbour may change in each
    for batch in case.batches(8):
        full.append(_gradients(case.build(), batch)[0]["loss"].item())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, grads = _gradients(case.build(), batch)
        half.append(outputs["loss"].item())
    a, b = sum(full) / 8, sum(half) / 8
    _require(math.isfinite(b) and abs(a - b) <= 0.05 * max(abs(a), 1.0), f"loss {b:.6g} in bfloat16, {a:.6g} in float32")
    heads = {name: grad for name, grad in grads.items() if not name.startswith("backbone.")}
    broken = sorted(name for name, grad in heads.items() if not grad.isfinite().all())
    _require(not broken, f"in bfloat16 the gradient is not finite in {broken}")


def labels_change_nothing(case: Case) -> None:
    """Loss and gradients are the same bits whatever the labels are."""
    batch = case.batches(1)[0]
    outputs, grads = _gradients(case.build(), batch)
    for labels in (batch.labels.flip(0), torch.full_like(batch.labels, -1)):
        others, other_grads = _gradients(case.build(), batch._replace(labels=labels))
        _require(torch.equal(outputs["loss"], others["loss"]), "the loss depends on the labels")
        _same(grads, other_grads, "gradients with other labels")


def state_is_whole(case: Case) -> None:
    """After three steps the state dict makes a fresh instance continue with the same bits."""
    *batches, last = case.batches(4)
    model = case.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for batch in batches:
        _gradients(model, batch)
        optimizer.step()
        model.after_step(0.0)
    fresh = case.build(seed=6)
    fresh.load_state_dict(model.state_dict())
    (_, expected), (_, found) = _gradients(model, last), _gradients(fresh, last)
    _same(expected, found, "gradients of an instance with the same state dict")
    for instance in (model, fresh):
        instance.after_step(0.0)
    _same(model.state_dict(), fresh.state_dict(), "the state one step later")


def resumes_exactly(case: Case) -> None:
    """A run continued from a checkpoint in the middle of an epoch ends with the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        middle = Path(folder) / "middle.ckpt"
        whole = run(case.experiment(f"{folder}/whole", max_epochs=2), _Save(middle, after=11))
        resumed = run(case.experiment(f"{folder}/resumed", max_epochs=2, resume=str(middle)))
    for part in ("state_dict", "optimizer_states"):
        _same(whole[part], resumed[part], f"{part} after a resume")


def probe_changes_nothing(case: Case) -> None:
    """With and without the online probe the method ends with the same bits."""
    on, off = (case.train(max_epochs=1, probe={"enabled": enabled}) for enabled in (True, False))
    _require("OnlineProbe" in on["callbacks"] and "OnlineProbe" not in off["callbacks"], "there was no probe to compare with")
    _same(on["state_dict"], off["state_dict"], "weights without the probe")


def two_ranks_equal_one(case: Case) -> None:
    """Two processes with half the batch each: loss, gradients, queues and the like of one process with all of it.

    BatchNorm and dropout are in eval mode. Of the terms in ``Method.local_terms``, which are no part of that loss, loss
    and gradients are the mean of what one process makes of each half.
    """
    batch = _double(case.batches(1)[0])
    expected = _whole(case, batch)
    for rank, found in enumerate(run_ranks(lambda rank: _share(case, batch, rank, 2))):
        _require(expected.keys() == found.keys(), f"rank {rank} has gradients for {sorted(found.keys() ^ expected.keys())}")
        for name, value in expected.items():
            close = torch.allclose(torch.from_numpy(found[name]), torch.from_numpy(value), rtol=1e-8, atol=1e-10)
            _require(close, f"{name} on rank {rank} of 2 differs from one process on the joined batch")


CHECKS: tuple[Callable[[Case], None], ...] = (
    trains,
    every_parameter_learns,
    teachers_are_constant,
    teachers_and_queues_advance_once_per_step,
    overfits_one_batch,
    bfloat16_is_close,
    labels_change_nothing,
    state_is_whole,
    resumes_exactly,
    probe_changes_nothing,
    two_ranks_equal_one,
)


# --- how they look ------------------------------------------------------------------------------------------------------


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def _same(a: Any, b: Any, what: str) -> None:
    """Equal to the bit, however nested."""
    if isinstance(a, Tensor):
        _require(torch.equal(a, b), f"{what} differ")
    elif isinstance(a, Mapping):
        _require(a.keys() == b.keys(), f"{what}: keys {sorted(map(str, a.keys() ^ b.keys()))}")
        for key in a:
            _same(a[key], b[key], f"{what}: {key}")
    elif isinstance(a, list):
        _require(len(a) == len(b), f"{what}: {len(a)} and {len(b)}")
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{what}: {i}")
    else:
        _require(a == b, f"{what}: {a!r} and {b!r}")


def _gradients(model: Method, batch: Batch, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one batch."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model.losses(batch)
    outputs["loss"].backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _zeros(grads: dict[str, Tensor]) -> set[str]:
    """Names of gradients that are rounding errors beside the largest one (float64)."""
    largest = max(float(grad.abs().max()) for grad in grads.values())
    return {name for name, grad in grads.items() if float(grad.abs().max()) <= 1e-12 * largest}


def _double(batch: Batch) -> Batch:
    return batch._replace(views=[view.double() for view in batch.views])


def _of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def _share(case: Case, batch: Batch, rank: int, world: int) -> dict[str, np.ndarray]:
    """This rank's part of the batch through the method: losses and gradients averaged over ranks, and what a step moves."""
    model = case.build().double().eval()
    shared, local = _losses(model, _part(batch, rank, world), rank)
    values = {f"{key} (local)": value for key, value in _derived(model, local).items()} | _derived(model, shared)
    model.after_step(0.0)
    averaged = {name: all_reduce(value) / world for name, value in values.items()}
    memories = _of(model, StepModule).items()
    states = {f"{name}.{key}": value for name, memory in memories for key, value in memory.state_dict().items()}
    return {name: value.numpy() for name, value in {**averaged, **states}.items()}


def _whole(case: Case, batch: Batch) -> dict[str, np.ndarray]:
    """What `_share` must give on each of two ranks, in one process."""
    whole = _share(case, batch, 0, 1)
    halves = []
    for rank in range(2):
        model = case.build().double().eval()
        halves.append(_derived(model, _losses(model, _part(batch, rank, 2), rank)[1]))
    return whole | {f"{key} (local)": ((value + halves[1][key]) / 2).numpy() for key, value in halves[0].items()}


def _part(batch: Batch, rank: int, world: int) -> Batch:
    part = slice(rank * len(batch.labels) // world, (rank + 1) * len(batch.labels) // world)
    return Batch([view[part] for view in batch.views], batch.labels[part], batch.index[part])


def _losses(model: Method, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """The loss without its local terms, and these."""
    torch.manual_seed(seed)
    outputs = model.losses(batch)
    local = torch.stack([weight * outputs[name] for name, weight in model.local_terms.items()] or [outputs["loss"] * 0]).sum()
    return outputs["loss"] - local, local


def _derived(model: Method, loss: Tensor) -> dict[str, Tensor]:
    """A loss and its gradients; the graph stays."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    known = {f"gradient of {name}": grad for name, grad in zip(names, gradients, strict=True) if grad is not None}
    return {"loss": loss.detach().clone(), **known}


class _Watcher(pl.Callback):
    """Keeps what every training step returned."""

    def __init__(self) -> None:
        self.outputs: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.outputs.append({name: value.detach().clone() for name, value in outputs.items()})


class _Save(pl.Callback):
    """Saves once, after an optimizer step."""

    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


class _Counter(pl.Callback):
    """Compares every teacher and queue before and after each batch with what one step must do to them."""

    def __init__(self) -> None:
        self.steps = 0
        self.problems: list[str] = []
        self._labels: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        self._step, self._progress = trainer.global_step, pl_module.progress
        self._teachers = {name: [p.clone() for p in t.parameters()] for name, t in _of(pl_module, Teacher).items()}
        self._queues = {name: queue.keys.clone() for name, queue in _of(pl_module, Queue).items()}
        self._labels.append(batch.labels)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        stepped = trainer.global_step > self._step
        for name, teacher in _of(pl_module, Teacher).items():
            if stepped:
                students = [p for student in teacher._students for p in student.parameters()]
                torch._foreach_lerp_(self._teachers[name], students, 1 - teacher.momentum.tau(self._progress))
            if not all(map(torch.equal, self._teachers[name], teacher.parameters())):
                self.problems.append(f"{name} is not one update further after step {trainer.global_step}")
        for name, queue in _of(pl_module, Queue).items():
            rows = (queue.keys != self._queues[name]).any(1)
            self._check_rows(f"{name}, step {trainer.global_step}", queue.labels[rows], stepped)
        if stepped:
            self.steps += 1
            self._labels.clear()

    def _check_rows(self, where: str, found: Tensor, stepped: bool) -> None:
        labels = torch.cat(self._labels).sort().values if stepped else torch.empty(0, dtype=torch.long)
        times = len(found) // max(len(labels), 1)               # views that are pushed
        if len(found) != times * len(labels) or bool(stepped) != bool(times):
            self.problems.append(f"{where}: {len(found)} rows are new, for {len(labels)} images")
        elif not torch.equal(found.sort().values, labels.repeat_interleave(times)):
            self.problems.append(f"{where}: the new rows do not have the images' labels")
