"""A signal to one of two ranks while they validate: both break off, whoever has fewer batches, or none."""

import os
import signal
import time

import pytest
import pytorch_lightning as pl

from solo import checkpoint
from solo.callbacks import knn, signals
from solo.callbacks.signals import ValidationGuard, heeding
from solo.data.module import DataModule
from solo.dist import part, rank
from solo.errors import Interrupted
from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import run_ranks
from tests.forks import FORKING
from tests.test_interrupted import AT_ITS_END, counted, only
from tests.test_resume import EveryStep, assert_same, state
from tests.tiny import values

pytestmark = pytest.mark.slow


def run(folder, callbacks=list, **changes):
    """How each of the two ranks ends, of which each epoch has 4 steps."""
    sizes = {"max_epochs": 2, "devices": 2, "optimizer": {"batch_size": 4}, "data": {"train_size": 32}}
    content = values("all4one", folder, checkpoint=AT_ITS_END, loggers=[], step_timeout=60.0, **sizes, **changes)

    def ends(_):
        try:
            return str(pretrain(experiment(content), callbacks()).checkpoint)
        except (Interrupted, SystemExit) as left:
            return type(left).__name__, getattr(left, "exit_code", 0), str(left)
        finally:
            part()

    return run_ranks(ends)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoints of every step of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, lambda: [EveryStep(folder)], limit_val_batches=1)
    return folder


class Strike(pl.Callback):
    """In the first batch of rank 0, once rank 1 waits: signals to ranks, until it knows of one; notes what each is shown.

    Args:
        sent: signals by rank, one round of them after the other.
        when: of the validation ("query") or of the bank.
    """

    def __init__(self, shown, sent, when):
        self.shown, self.sent, self.when = shown, sent, when

    def setup(self, trainer, pl_module, stage):
        self.shown.pids[rank()] = os.getpid()
        (self.guard,) = (each for each in trainer.callbacks if isinstance(each, ValidationGuard))

    def strike(self, trainer):
        assert self.shown.waits.wait(60)
        for signals_by_rank in self.sent:
            for target, number in signals_by_rank.items():
                os.kill(self.shown.pids[target], number)
            deadline = time.monotonic() + 20
            while not self.guard.asked(trainer) and time.monotonic() < deadline:
                time.sleep(0.01)

    def on_validation_batch_start(self, trainer, *_):
        self.shown.queries[rank()] += 1
        if rank() == 0 and self.when == "query":
            self.strike(trainer)

    def bank(self, trainer, batches):
        def noted():
            for batch in batches:
                self.shown.bank[rank()] += 1
                if rank() == 0 and self.when == "bank":
                    self.strike(trainer)
                yield batch
        return heeding(trainer, noted())


class Shown:
    """What the ranks write: their ids, how many batches of each kind they were shown, and whether rank 1 waits."""

    def __init__(self):
        self.pids, self.queries, self.bank = (FORKING.Array("i", 2) for _ in range(3))
        self.waits = FORKING.Event()


USR2, TERM = signal.SIGUSR2, signal.SIGTERM


@pytest.mark.parametrize(
    ("images", "when", "sent", "queries", "bank"),
    [
        (9, "query", {1: USR2}, [1, 1], [0, 0]),                # of 2 batches and 1
        (1, "query", {1: USR2}, [1, 0], [0, 0]),
        (9, "bank", {1: USR2}, [2, 1], [1, 4]),
        (9, "query", {0: TERM, 1: USR2}, [1, 1], [0, 0]),
    ],
    ids=["fewer batches", "no batch", "the bank of k-NN", "to both"],
)
def test_both_ranks_break_off(whole, tmp_path, monkeypatch, images, when, sent, queries, bank):
    """While the one that the signal comes to waits for the other."""
    left, shown = broken_off(tmp_path, monkeypatch, images, when, [sent])
    assert left[0][:2] == ("Interrupted", 128 + USR2) and left[1] == ("SystemExit", 0, "0")
    said = left[0][2]
    assert "SIGUSR2 at epoch 1, step 4: saved" in said and said.endswith("; the validation of this epoch is left out")
    assert (list(shown.queries), list(shown.bank)) == (queries, bank)
    assert_same(state(checkpoint.read(only(tmp_path))), state(checkpoint.read(whole / "4.ckpt")))


def test_within_an_epoch_and_the_run_that_goes_on_has_the_same_bits(whole, tmp_path, monkeypatch):
    left, shown = broken_off(tmp_path, monkeypatch, 9, "query", [{1: USR2}], val_check_interval=3)
    assert left[0][2].endswith("; the validation of this step is left out") and list(shown.queries) == [1, 1]
    assert_same(state(checkpoint.read(only(tmp_path))), state(checkpoint.read(whole / "3.ckpt")))
    monkeypatch.undo()
    resumed, _ = run(tmp_path, val_check_interval=3, limit_val_batches=1)
    found, expected = checkpoint.read(resumed), checkpoint.read(whole / "8.ckpt")
    assert_same(state(found), state(expected))
    assert counted(found) == counted(expected)


def test_a_second_interrupt_of_one_rank_ends_both_without_a_save(tmp_path, monkeypatch):
    left, _ = broken_off(tmp_path, monkeypatch, 9, "query", [{1: signal.SIGINT}] * 2)
    assert left == [("Interrupted", 130, "rank 1: SIGINT again: left at once"), ("SystemExit", 0, "0")]
    assert not list(tmp_path.glob("*/checkpoints/*.ckpt"))


def broken_off(folder, monkeypatch, images, when, sent, **changes):
    shown = Shown()
    strike = Strike(shown, sent, when)
    agree = signals.of_each_rank

    def noted(row, meanwhile=None):
        if rank() == 1 and meanwhile and (when == "query" or shown.bank[1]):
            shown.waits.set()
        return agree(row, meanwhile)

    monkeypatch.setattr(signals, "of_each_rank", noted)
    monkeypatch.setattr(knn, "heeding", strike.bank)
    monkeypatch.setattr(DataModule, "val_dataloader", lambda self: self.clean_loader(train=False, limit=images))
    return run(folder, lambda: [strike], knn={"enabled": True, "k": [2]}, **changes), shown
