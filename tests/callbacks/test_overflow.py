"""Gradients that overflow whatever the scale end a run; single overflows do not."""

from types import SimpleNamespace

import pytest
import torch
from pytorch_lightning.plugins import MixedPrecision

from solo.callbacks.overflow import EVERY, OverflowGuard
from solo.errors import NumericsError
from tests.callbacks.toy import Toy, fit


class Scaler:
    """The rule of torch's own: halved at an overflow, doubled after 2000 steps without one."""

    scale = 65536.0

    def get_scale(self):
        return self.scale

    def update(self, overflow):
        self.scale *= 0.5 if overflow else 1


def run(overflows, accumulate=1):
    """The step at which the run ends; None: it goes on."""
    scaler = Scaler()
    plugin = SimpleNamespace(scaler=scaler)
    trainer = SimpleNamespace(precision_plugin=plugin, accumulate_grad_batches=accumulate, global_step=0)
    guard = OverflowGuard()
    for overflow in overflows:
        scaler.update(overflow)
        trainer.global_step += 1
        for batch in range(accumulate):
            try:
                guard.on_train_batch_end(trainer, None, None, None, batch)
            except NumericsError as error:
                assert error.exit_code == 4 and f"at step {trainer.global_step} " in str(error)
                return trainer.global_step
    return None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_that_always_overflow_end_the_run(accumulate):
    assert run([True] * 100, accumulate) == 4 * EVERY           # at its floor after 16 steps, seen at 16, 24 and 32


def test_an_overflow_now_and_then_does_not():
    assert run(([True] + [False] * 99) * 15) is None


@pytest.mark.parametrize(("scales", "last"), [([1.0, 1.0, 4.0] * 7, None), ([1.0, 1.0, 4.0, 1.0, 1.0, 1.0], 6)])
def test_a_scale_that_recovers_is_counted_anew(scales, last):
    guard, scaler = OverflowGuard(), Scaler()
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler), accumulate_grad_batches=1, global_step=1)
    ended = None
    for look, scaler.scale in enumerate(scales, start=1):
        for batch in range(EVERY):
            try:
                guard.on_train_batch_end(trainer, None, None, None, batch)
            except NumericsError:
                ended = ended or look
    assert ended == last


class Overflowing(Toy):
    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        infinite = self.backbone[1].weight.sum().mul(0).sqrt()              # value 0, gradient infinite
        return {**outputs, "loss": outputs["loss"] + infinite}


@pytest.mark.parametrize("module", [Overflowing, Toy])
def test_with_torchs_scaler(module):
    precision = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu"))
    if module is Toy:
        fit([OverflowGuard()], Toy(), plugins=[precision], max_epochs=10)
        return
    with pytest.raises(NumericsError, match=r"overflow at step 32 though they are scaled with 1\.5\S+ only"):
        fit([OverflowGuard()], module(), plugins=[precision], max_epochs=10)
