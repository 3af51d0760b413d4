"""A signal that comes at an awkward moment: in an update, a save, a validation, before there is anything to save."""

import signal

import pytest
import pytorch_lightning as pl
import torch

from solo import checkpoint
from solo.callbacks import knn
from solo.callbacks.signals import heeding
from solo.data.module import DataModule
from solo.errors import Interrupted, hearing, reported
from solo.experiment import experiment
from solo.methods.base import Method
from solo.nn import Queue
from solo.optim import LARS
from solo.run import pretrain
from tests.test_resume import EveryStep, assert_same, state
from tests.tiny import values

pytestmark = pytest.mark.slow
AT_ITS_END = {"frequency": 1000, "minutes": 1000.0}


@pytest.fixture(autouse=True)
def own_handler():
    """A signal that nothing heeds fails the test, in place of ending the tests."""

    def unheeded(number, frame):
        pytest.fail(f"{signal.Signals(number).name} went by")

    with hearing(unheeded):
        yield


def content(folder, **changes):
    return values("all4one", folder, max_epochs=2, checkpoint=AT_ITS_END, loggers=[], **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoints of every step of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain(experiment(content(folder)), [EveryStep(folder)])
    return folder


def only(folder):
    (path,) = checkpoint.resolve(next(folder.glob("all4one-*"))).parent.glob("*.ckpt")
    return path


def halved(monkeypatch, when):
    """The teacher's average, with a signal between the halves of its ``when``-th update."""
    lerp, calls = torch._foreach_lerp_, []

    def in_halves(own, followed, weight):
        middle = len(own) // 2
        lerp(own[:middle], followed[:middle], weight)
        calls.append(None)
        if len(calls) == when:
            signal.raise_signal(signal.SIGUSR1)
        lerp(own[middle:], followed[middle:], weight)

    monkeypatch.setattr(torch, "_foreach_lerp_", in_halves)


def signalled(function, when):
    """A function, and a signal before its ``when``-th call."""
    calls = []

    def struck(*arguments, **named):
        calls.append(None)
        if len(calls) == when:
            signal.raise_signal(signal.SIGTERM)
        return function(*arguments, **named)

    return struck


@pytest.mark.parametrize("moment", ["teacher", "queue", "optimizer"])
def test_in_the_middle_of_an_update_the_state_is_that_of_the_steps_end(whole, tmp_path, monkeypatch, moment):
    if moment == "teacher":
        halved(monkeypatch, 6)
    elif moment == "queue":
        monkeypatch.setattr(Queue, "land", signalled(Queue.land, 6))
    else:
        monkeypatch.setattr(LARS, "step", signalled(LARS.step, 7))      # the first tells how much room its state takes
    with pytest.raises(Interrupted, match=r"at epoch 1, step 6: saved"):
        pretrain(experiment(content(tmp_path)))
    found = checkpoint.read(only(tmp_path))
    assert_same(state(found), state(checkpoint.read(whole / "6.ckpt")))


class Strike(pl.Callback):
    """A signal in the first call of one of Lightning's hooks."""

    def __init__(self, hook):
        setattr(self, hook, signalled(lambda *_, **__: None, 1))


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_train_batch_start", 1), ("on_validation_batch_start", 8), ("on_validation_end", 8)],
)
def test_before_the_first_step_and_while_validating(whole, tmp_path, hook, step):
    with pytest.raises(Interrupted, match=f"SIGTERM at epoch 1, step {step}: saved"):
        pretrain(experiment(content(tmp_path)), [Strike(hook)])
    assert_same(state(checkpoint.read(only(tmp_path))), state(checkpoint.read(whole / f"{step}.ckpt")))
    result = pretrain(experiment(content(tmp_path)))
    assert_same(state(checkpoint.read(result.checkpoint)), state(checkpoint.read(whole / "16.ckpt")))


def test_behind_the_last_step_the_run_is_complete_and_says_so(whole, tmp_path, caplog):
    result = pretrain(experiment(content(tmp_path)), [Strike("on_train_end")])
    assert "SIGTERM came behind the last step: the training is complete" in caplog.text
    assert_same(state(checkpoint.read(result.checkpoint)), state(checkpoint.read(whole / "16.ckpt")))


@pytest.mark.parametrize("place", ["behind an epoch", "within an epoch", "the bank of k-NN"])
def test_a_validation_is_broken_off_between_two_batches(whole, tmp_path, monkeypatch, place):
    """It may take longer than a queue's warning allows. The run that goes on leaves that one out and trains the same bits."""
    shown, longer, bank, step = [], {"knn": {"enabled": True, "k": [2]}}, place == "the bank of k-NN", 8
    if place == "within an epoch":
        longer["val_check_interval"] = step = 3

    class Shown(pl.Callback):
        def on_validation_batch_start(self, *_):
            shown.append("query")
            if not bank:
                signal.raise_signal(signal.SIGUSR2)

    def of_the_bank(trainer, batches):
        def noted():
            for batch in batches:
                shown.append("bank")
                yield batch
                signal.raise_signal(signal.SIGUSR2)
        return heeding(trainer, noted())

    if bank:
        monkeypatch.setattr(knn, "heeding", of_the_bank)
    which = "step" if step == 3 else "epoch"
    with pytest.raises(Interrupted, match=f"step {step}: saved .*; the validation of this {which} is left out$") as left:
        pretrain(experiment(content(tmp_path, **longer)), [Shown()])
    assert left.value.exit_code == 128 + signal.SIGUSR2
    assert shown == (["query"] * shown.count("query") + ["bank"] * 2 if bank else ["query"])
    assert_same(state(checkpoint.read(only(tmp_path))), state(checkpoint.read(whole / f"{step}.ckpt")))
    monkeypatch.undo()
    seen = EveryStep(None)
    # With fewer validations, too: Lightning would train a ninth batch of the epoch, or count a step less.
    result = pretrain(experiment(content(tmp_path, **longer, limit_val_batches=None if bank else 0)), [seen])
    assert sorted(seen.losses) == list(range(step + 1, 17))
    resumed, undisturbed = checkpoint.read(result.checkpoint), checkpoint.read(whole / "16.ckpt")
    assert_same(state(resumed), state(undisturbed))
    assert counted(resumed) == counted(undisturbed)


def counted(content):
    """How many steps Lightning has counted, which is where its loggers are."""
    return content["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]


def test_a_validation_between_accumulated_batches_is_finished(tmp_path):
    """There is no state to save before the step's end."""
    shown = []

    class Shown(pl.Callback):
        def on_validation_batch_end(self, *_):
            shown.append("query")
            signal.raise_signal(signal.SIGTERM)

    config = experiment(content(tmp_path, accumulate_grad_batches=2, val_check_interval=3, limit_val_batches=2))
    with pytest.raises(Interrupted, match="at epoch 1, step 2: saved .*; run the same command to continue$"):
        pretrain(config, [Shown()])
    assert shown == ["query"] * 2


def test_while_saving_the_save_is_finished_and_one_more_step_made(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", signalled(torch.save, 3))
    config = experiment({**content(tmp_path), "checkpoint": {"dir": str(tmp_path), "minutes": 0}})
    with pytest.raises(Interrupted, match="SIGTERM at epoch 1, step 4: saved"):
        pretrain(config)
    folder = checkpoint.newest(config.run_dir(8) / "checkpoints").parent
    assert [entry.step for entry in checkpoint.manifest(folder)] == [3, 4] and not list(folder.glob(".*"))
    for step in (3, 4):
        assert_same(state(checkpoint.read(folder / f"step-{step:09d}.ckpt")), state(checkpoint.read(whole / f"{step}.ckpt")))


def test_the_first_signal_says_how_the_run_ends(tmp_path):
    """SLURM warns, and ends the job while the step is still going on: it is to be requeued."""

    class Both(pl.Callback):
        def on_train_batch_start(self, *_):
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="SIGUSR2 at epoch 1, step 1: saved") as left:
        pretrain(experiment(content(tmp_path)), [Both()])
    assert left.value.exit_code == 128 + signal.SIGUSR2


def test_before_training_there_is_nothing_to_save(tmp_path, monkeypatch, capsys):
    """While the images are listed."""
    monkeypatch.setattr(DataModule, "listing", property(lambda self: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(SystemExit) as left, reported():
        pretrain(experiment(content(tmp_path)))
    assert left.value.code == 143 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err == "interrupted: SIGTERM outside training: nothing to save\n"


@pytest.mark.parametrize("moment", ["step", "save"])
def test_a_second_interrupt_leaves_at_once_and_the_files_are_whole(whole, tmp_path, monkeypatch, moment):
    """In the middle of a step, and of the third save."""

    def twice(*_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    config = experiment({**content(tmp_path), "checkpoint": {"dir": str(tmp_path), "minutes": 0}})
    if moment == "save":
        save, calls = torch.save, []

        def struck(state, file):
            calls.append(None)
            save(state, file) if len(calls) < 3 else (file.write(b"half of it"), twice())

        monkeypatch.setattr(torch, "save", struck)
    else:
        monkeypatch.setattr(Method, "after_step", lambda self, progress: twice() if self.global_step == 2 else {})
    with pytest.raises(Interrupted, match="SIGINT again: left at once") as left:
        pretrain(config)
    assert left.value.exit_code == 130
    monkeypatch.undo()
    run_dir = config.run_dir(8)
    assert [entry.step for entry in checkpoint.manifest(run_dir / "checkpoints")][-1] == 2
    assert not list((run_dir / "checkpoints").glob(".*"))
    if moment == "save":
        result = pretrain(config)
        assert_same(state(checkpoint.read(result.checkpoint)), state(checkpoint.read(whole / "16.ckpt")))
