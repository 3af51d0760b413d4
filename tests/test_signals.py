"""A signal ends a command with one line and 128 + its number, whatever it was doing; never with 0 and no result."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import pytorch_lightning as pl

from solo.callbacks.signals import SignalGuard
from solo.errors import SIGNALS, ConfigError, Interrupted, hearing, reported
from solo.experiment import experiment
from solo.run import pretrain
from tests.conftest import ROOT
from tests.eval.runs import make_run
from tests.forks import Fork
from tests.tiny import values

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(*words, cwd=None):
    return Fork([sys.executable, *words], cwd=cwd, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("front", ["main_linear.py", "launcher.py --script main_linear.py"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_linear_evaluation(tmp_path, front, number):
    run = make_run(tmp_path / "run")
    words = [*f"{ROOT}/{front}".split(), "--config-name", "linear.yaml", f"checkpoint={run}", "max_epochs=100000", "devices=1",
             "accelerator=cpu", "precision=32-true", "optimizer.batch_size=32"]
    process = command(*words, cwd=tmp_path)
    assert any(line.startswith("epoch 1/") for line in iter(process.stdout.readline, "")), process.communicate()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = said.strip().splitlines()
    assert line.startswith(f"interrupted: {number.name} at epoch ") and line.endswith("nothing is saved")
    assert not (run / "results.json").exists()


OUTSIDE = """
import time
from solo.errors import reported
with reported():
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_a_signal_outside_training(number):
    process = command("-c", OUTSIDE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert said == f"interrupted: {number.name} outside training: nothing to save\n"


def test_handlers_come_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    heard = []
    try:
        with hearing(lambda number, frame: heard.append(number)):
            inner = signal.getsignal(signal.SIGTERM)
            with reported():
                pass
            assert signal.getsignal(signal.SIGTERM) is inner and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 5
            while not heard and time.monotonic() < deadline:
                time.sleep(0.01)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is not inner
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_training_that_fails_gives_the_handlers_back(tmp_path):
    """At once, not when its callbacks are let go: others may hear by then."""

    class Failing(pl.Callback):
        def on_train_batch_end(self, *_):
            raise LookupError

    guards = [SignalGuard(), Failing()]
    with pytest.raises(LookupError):
        pretrain(experiment(values("nnclr", tmp_path)), guards)
    with hearing(lambda number, frame: None):
        mine = [signal.getsignal(number) for number in SIGNALS]
        guards.clear()
        gc.collect()
        assert [signal.getsignal(number) for number in SIGNALS] == mine


@pytest.mark.parametrize(("error", "code", "line"), [
    (Interrupted("SIGUSR1 at epoch 1, step 3: saved", signal.SIGUSR1), 128 + signal.SIGUSR1,
     "interrupted: SIGUSR1 at epoch 1, step 3: saved\n"),
    (SystemExit(0), 0, ""),
])
def test_a_signal_on_the_way_out_changes_nothing(error, code, line, capsys):
    """torchrun's agent sends a SIGTERM too, and SLURM one after its warning: what was saved is told, not that nothing was."""
    with pytest.raises(SystemExit) as end, reported():
        try:
            raise error
        finally:
            try:
                raise KeyError
            except KeyError:
                signal.raise_signal(signal.SIGTERM)
    assert end.value.code == code and capsys.readouterr().err == line


@pytest.mark.parametrize(("number", "hears"), [(signal.SIGINT, 10.0), (signal.SIGTERM, 0.0)], ids=["Ctrl-C", "asked for long"])
def test_a_way_out_that_hangs_can_be_cut_short(number, hears, capsys, monkeypatch):
    monkeypatch.setattr("solo.errors._LEAVING", hears)
    with pytest.raises(SystemExit) as end, reported():
        try:
            raise Interrupted("SIGTERM at epoch 1, step 3: saved", signal.SIGTERM)
        finally:
            signal.raise_signal(number)
            pytest.fail("it went on with what hangs")
    assert end.value.code == 143 and capsys.readouterr().err == "interrupted: SIGTERM at epoch 1, step 3: saved\n"


def test_who_an_address_is_asked_as_is_not_said(capsys):
    with pytest.raises(SystemExit), reported():
        raise ConfigError("resume=https:/me:hunter22@host/last.ckpt does not exist")
    assert capsys.readouterr().err == "config error: resume=https:/(hidden)@host/last.ckpt does not exist\n"
