"""What holds for every method: each function takes a case and raises AssertionError."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from solo.batch import Batch
from solo.nn import Teacher
from solo.testing.advance import advances_once_per_step
from solo.testing.case import Case, half, run
from solo.testing.compare import SAME_BITS, Absent, Measured, double, gradients, of, require, same, zeros
from solo.testing.invariance import INVARIANCE


def trains(case: Case) -> None:
    """A real run: finite losses, features of every large view, other outputs scalar, a backbone that moves."""
    watcher = _Watcher()
    state = case.train(watcher, max_epochs=1)["state_dict"]
    require(len(watcher.outputs) == 8, f"the run made {len(watcher.outputs)} steps of 8")
    model = case.build()
    for outputs in watcher.outputs:
        others = {name: tuple(value.shape) for name, value in outputs.items() if name != "feats" and value.numel() != 1}
        require(not others, f"outputs other than feats must be scalars: {others}")
        rows, dim = outputs["feats"].shape
        require(rows % 8 == 0 and dim == model.dim, f"feats must be [views * 8, {model.dim}], got [{rows}, {dim}]")
        require(bool(outputs["loss"].isfinite()), "the loss is not finite")
    start = {name: value for name, value in model.state_dict().items() if name.startswith("backbone.")}
    require(any(not torch.equal(state[name], value) for name, value in start.items()), "the backbone did not move")


def every_parameter_learns(case: Case) -> None:
    """Each parameter with ``requires_grad`` gets a finite gradient that is not zero.

    A bias in front of a BatchNorm has none while that uses the batch's mean: such biases must get theirs once the
    BatchNorms use their running statistics.
    """
    model = case.build().double()
    _, grads = gradients(model, double(case.batches(1)[0]))
    missing = sorted(name for name, p in model.named_parameters() if p.requires_grad and name not in grads)
    require(not missing, f"no gradient reaches {missing}")
    broken = sorted(name for name, grad in grads.items() if not grad.isfinite().all())
    require(not broken, f"the gradient is not finite in {broken}")
    zero = zeros(grads)
    _, grads = gradients(model.eval(), double(case.batches(1)[0]))
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    dead = sorted(name for name in zero if shapes[name] > 1 or name in zeros(grads))
    require(not dead, f"the gradient is zero in {dead}")


def teachers_are_constant(case: Case) -> None:
    """No parameter of a teacher asks for a gradient or gets one, and no teacher's output carries one."""
    model, batch = case.build(), case.batches(1)[0]
    gradients(model, batch)
    for name, teacher in of(model, Teacher).items():
        moved = [key for key, p in teacher.named_parameters() if p.requires_grad or p.grad is not None]
        require(not moved, f"{name} is trained by gradient: {moved}")
        require(not teacher(batch.views[0]).requires_grad, f"the output of {name} carries a gradient")


def teachers_and_queues_advance_once_per_step(case: Case) -> None:
    """With two batches to an optimizer step: still in between, then teachers by one tau, queues by both batches, and the
    learning rate by one step of its schedule."""
    advances_once_per_step(case)


def overfits_one_batch(case: Case) -> None:
    """The loss on one fixed batch falls by a tenth of its size or 0.1, whichever is more, in 70 steps; by twice that, and it
    is not asked to go on."""
    model, batch = case.build(), case.batches(1)[0]
    losses: list[float] = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    first = last = enough = 0.0
    for step in range(80):
        outputs, _ = gradients(model, batch, seed=step)
        if step >= 10:                                          # until then the queue fills with the batch
            optimizer.step()
            losses.append(outputs["loss"].item())
            first, last = sum(losses[:3]) / 3, sum(losses[-10:]) / 10
            enough = 0.1 * max(abs(first), 1.0)
            if len(losses) >= 15 and last < first - 2 * enough:
                break
        model.after_step(0.0)
    require(last < first - enough, f"in {len(losses)} steps the loss went from {first:.4g} to {last:.4g}")


def bfloat16_is_close(case: Case) -> Measured:
    """Under bfloat16 autocast the heads' gradients are finite and the loss of 8 batches is within 5 % (or 0.05) of float32's.

    The backbone's are left out: on maps of one pixel, which it has here, torch's CPU convolutions write no bfloat16
    weight gradient (seen with 2.14).
    """
    full, half = [], []                                         # of several batches: a neighbour may change in each
    for batch in case.batches(8):
        full.append(gradients(case.build(), batch)[0]["loss"].item())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs, grads = gradients(case.build(), batch)
        half.append(outputs["loss"].item())
    a, b = sum(full) / 8, sum(half) / 8
    difference = abs(a - b) / max(abs(a), 1.0)
    require(math.isfinite(b) and difference <= 0.05, f"loss {b:.6g} in bfloat16, {a:.6g} in float32")
    heads = {name: grad for name, grad in grads.items() if not name.startswith("backbone.")}
    broken = sorted(name for name, grad in heads.items() if not grad.isfinite().all())
    require(not broken, f"in bfloat16 the gradient is not finite in {broken}")
    return Measured(difference, 0.05)


def labels_change_nothing(case: Case) -> Measured:
    """Loss and gradients are the same bits whatever the labels are."""
    batch = case.batches(1)[0]
    outputs, grads = gradients(case.build(), batch)
    for labels in (batch.labels.flip(0), torch.full_like(batch.labels, -1)):
        others, other_grads = gradients(case.build(), batch._replace(labels=labels))
        require(torch.equal(outputs["loss"], others["loss"]), "the loss depends on the labels")
        same(grads, other_grads, "gradients with other labels")
    return SAME_BITS


def state_is_whole(case: Case) -> Measured:
    """After three steps the state dict makes a fresh instance continue with the same bits."""
    *batches, last = case.batches(4)
    model = case.build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for batch in batches:
        gradients(model, batch)
        optimizer.step()
        model.after_step(0.0)
    fresh = case.build(seed=6)
    fresh.load_state_dict(model.state_dict())
    (_, expected), (_, found) = gradients(model, last), gradients(fresh, last)
    same(expected, found, "gradients of an instance with the same state dict")
    for instance in (model, fresh):
        instance.after_step(0.0)
    same(model.state_dict(), fresh.state_dict(), "the state one step later")
    return SAME_BITS


def resumes_exactly(case: Case) -> Measured:
    """A run continued from a checkpoint in the middle of an epoch ends with the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        middle = Path(folder) / "middle.ckpt"
        whole = run(case.experiment(f"{folder}/whole", max_epochs=2, **half(case)), _Save(middle, after=6))
        resumed = run(case.experiment(f"{folder}/resumed", max_epochs=2, **half(case), resume=str(middle)))
    for part in ("state_dict", "optimizer_states"):
        same(whole[part], resumed[part], f"{part} after a resume")
    return SAME_BITS


def probe_changes_nothing(case: Case) -> Measured:
    """With and without the online probe the method ends with the same bits."""
    on, off = (case.train(max_epochs=1, probe={"enabled": enabled}, **half(case)) for enabled in (True, False))
    require("OnlineProbe" in on["callbacks"] and "OnlineProbe" not in off["callbacks"], "there was no probe to compare with")
    same(on["state_dict"], off["state_dict"], "weights without the probe")
    return SAME_BITS


CHECKS: tuple[Callable[[Case], Measured | Absent | None], ...] = (
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
    *INVARIANCE,
)


# --- how they look ------------------------------------------------------------------------------------------------------


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
