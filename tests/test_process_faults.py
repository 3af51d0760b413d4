"""One of two processes fails: both leave within seconds, one of them says why, and the last checkpoint stays."""

import json
import math
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from solo import checkpoint
from solo.files import alive
from tests import forks
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.alone]

SCRIPT = """
import os, signal, sys, time
import pytorch_lightning as pl
import solo.checkpoint
import solo.strategy
from solo.console import quiet_libraries
from solo.dist import rank
from solo.errors import DataError, reported
from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import tiny

fault, where = sys.argv[1], int(sys.argv[2])

class Fault(pl.Callback):
    def on_train_start(self, trainer, module):
        if fault == "slow save" and rank() == 0:
            save, late = solo.checkpoint.save, iter([12.0])
            solo.checkpoint.save = lambda *a, **b: (time.sleep(next(late, 0)), save(*a, **b))
        print("PID", rank(), os.getpid(), flush=True)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx):
        if fault == "suspend in validation" and trainer.current_epoch == 1:
            time.sleep(0.2)                 # the other one is still at its batches
            if batch_idx == 1 and rank() == where:
                print("AT", time.time(), flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 6 and rank() != where and fault == "kill the other":
            time.sleep(600)                 # not in a collective, where it would notice
        if trainer.global_step != 6 or rank() != where:
            return
        print("AT", time.time(), flush=True)
        if fault == "raise":
            raise ValueError("boom")
        if fault == "data":
            raise DataError("too many damaged images")
        if fault.startswith("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "stall":
            time.sleep(600)
        if fault == "suspend":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "nan":
            batch.views[0].fill_(float("nan"))
        if fault == "overflow":
            next(module.backbone.parameters()).register_hook(lambda gradient: gradient * float("inf"))

quiet_libraries()
mine = int(os.environ.get("LOCAL_RANK", 0)) == where
seed = 6 if fault == "seed" and mine else 5
if fault in ("MASTER_PORT", "MASTER_ADDR"):
    solo.strategy.MEETING = 4.0
    if mine:
        os.environ[fault] = {"MASTER_PORT": "9", "MASTER_ADDR": "nowhere.invalid"}[fault]      # nobody is there
config = tiny("nnclr", "runs", devices=2, max_epochs=2, step_timeout=8.0, seed=seed, method_kwargs={"queue_size": 32})
with reported():
    pretrain(experiment(config), [Fault()])
"""


NOISE = re.compile(r"frame #|(\[rank\d\]:)?\[[WE]\d|<omitting|Exception raised from|$")     # torch's own


def command(folder, fault, where, **variables):
    """Its words, folder and environment."""
    (folder / "train.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    return {"args": [sys.executable, "train.py", fault, str(where)], "cwd": folder, "env": environment}


def start(folder, fault, where, **variables):
    """Exit code, stdout, and lines on stderr."""
    options = command(folder, fault, where, **variables)
    done = forks.run(options.pop("args"), timeout=100, **options)       # its pipes are of both processes
    return done.returncode, done.stdout, own(done.stderr)


def own(stderr):
    return [line for line in stderr.splitlines() if not NOISE.match(line)]


def fail(folder, fault, where):
    """Exit code, lines on stderr, and seconds from the fault until all processes are gone."""
    code, out, lines = start(folder, fault, where)
    return code, lines, time.time() - float(re.search(r"AT (\S+)", out)[1])


def last(folder):
    (path,) = Path(folder).glob("runs/*/last.ckpt")
    state = checkpoint.read(path)
    assert state["global_step"] == 4
    assert all(math.isfinite(value.double().sum()) for value in state["state_dict"].values())


@pytest.mark.parametrize("where", [0, 1])
def test_an_exception(tmp_path, where):
    code, lines, took = fail(tmp_path, "raise", where)
    assert code == 1 and took < 10
    assert any(line.endswith("ValueError: boom") for line in lines)
    if where == 1:
        assert lines[-1] == "error: rank 1: ValueError: boom"
    last(tmp_path)


@pytest.mark.parametrize("where", [0, 1])
def test_an_error_of_our_own(tmp_path, where):
    code, lines, took = fail(tmp_path, "data", where)
    prefix = "rank 1: " * where
    assert (code, lines) == (3, [f"data error: {prefix}too many damaged images"]) and took < 10
    last(tmp_path)


@pytest.mark.parametrize("where", [0, 1])
def test_a_process_that_is_killed(tmp_path, where):
    code, lines, took = fail(tmp_path, "kill", where)
    assert code == (5 if where else -9) and took < 10, (code, lines, took)
    assert len(lines) == 1, lines
    assert lines[0].startswith("environment error: rank ") and f"rank {where}" in lines[0] and "answer" in lines[0]
    last(tmp_path)


def test_a_process_that_is_killed_where_the_first_is_too_busy_to_notice(tmp_path):
    code, lines, took = fail(tmp_path, "kill the other", 1)
    assert (code, lines) == (5, ["environment error: rank 1 was ended by SIGKILL"]) and took < 10, (code, lines, took)
    last(tmp_path)


@pytest.mark.parametrize("where", [0, 1])
def test_a_process_that_stalls(tmp_path, where):
    code, lines, took = fail(tmp_path, "stall", where)
    assert code == 5 and took < 16 and len(lines) == 1, (code, lines, took)     # twice the step timeout
    told = rf"rank {where}.*step_timeout=8 s.*; rank {1 - where} waited for it behind step 6, in all_gather_\w+ for solo"
    assert re.match(rf"environment error: {told}", lines[0]), lines
    last(tmp_path)


@pytest.mark.parametrize(("fault", "step", "place"), [
    ("suspend", 6, r"all_gather_\w+ for solo.*"),
    ("suspend in validation", 8, "the group's store for solo.callbacks.signals.asked"),
])
def test_a_first_process_that_is_suspended(tmp_path, fault, step, place):
    """The group's store, in which the others leave word and look for signals, is part of it, and torch asks without a limit."""
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = forks.Fork(**command(tmp_path, fault, 0), stdout=stdout, stderr=stderr)
    try:
        assert soon(lambda: "AT" in out.read_text() and "PID 1" in out.read_text(), 60), err.read_text()
        began, other = (float(re.search(word + r" (\S+)", out.read_text())[1]) for word in ("AT", "PID 1"))
        gone = soon(lambda: not alive(int(other)), 30)
        took, (line,) = time.time() - began, own(err.read_text())
        assert gone and took < 16, (took, line)
        told = f"rank 0 no longer answers: .* suspended.*; rank 1 waited for it behind step {step}, in {place}"
        assert re.fullmatch(f"environment error: {told}", line), line
        process.send_signal(signal.SIGCONT)
        assert process.wait(15) == 5
        assert all(re.match("environment error: rank 1: no answer", line) for line in own(err.read_text())[1:])
    finally:
        process.kill()
        process.wait()
    last(tmp_path)


def soon(holds, seconds):
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return held


def kept_by_both(folder):
    """What each process keeps of the step that failed, of which it has its own 8 images."""
    kept = [json.loads(next(folder.glob(f"runs/*/failed_step{rank}.json")).read_text()) for rank in ("", "-rank1")]
    assert len({index for each in kept for batch in each["batches"] for index in batch["indices"]}) == 16
    return kept


def test_nan_on_one_rank_stops_both_before_the_update(tmp_path):
    code, lines, took = fail(tmp_path, "nan", 1)
    assert code == 4 and took < 10 and len(lines) == 1, (code, lines, took)
    assert "non-finite loss of NNCLR at step 7 " in lines[0] and "weights are those of step 6" in lines[0]
    last(tmp_path)
    kept = kept_by_both(tmp_path)
    assert [each["step"] for each in kept] == [7, 7] and "views[0]" in kept[1]["not_finite"]
    assert "views[0]" not in kept[0]["not_finite"]


def test_a_gradient_that_overflows_on_one_rank_keeps_both_batches(tmp_path):
    code, lines, took = fail(tmp_path, "overflow", 1)
    assert code == 4 and took < 10 and len(lines) == 1, (code, lines, took)
    assert "non-finite gradient of NNCLR at step 7 " in lines[0] and "weights are those of step 6" in lines[0]
    last(tmp_path)
    kept_by_both(tmp_path)


def test_a_save_may_take_longer_than_a_step(tmp_path):
    """12 s where collectives fail after 8."""
    code, _, lines = start(tmp_path, "slow save", 0)
    assert (code, lines) == (0, [])
    (path,) = tmp_path.glob("runs/*/last.ckpt")
    assert checkpoint.read(path)["global_step"] == 8


def test_ranks_of_different_seeds_do_not_start(tmp_path):
    code, _, lines = start(tmp_path, "seed", 1)
    assert (code, lines) == (2, ["config error: rank 1 differs: seed=6 (rank 0: 5)"])


def test_a_given_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, lines = start(tmp_path, "none", 0, MASTER_PORT=port)
    meeting = f"MASTER_ADDR=127.0.0.1, MASTER_PORT={port}"
    assert (code, lines) == (5, [f"environment error: rank 0 did not meet the others ({meeting}): the port is in use"])


@pytest.mark.parametrize("other", ["MASTER_PORT", "MASTER_ADDR"])
def test_another_address(tmp_path, other):
    code, _, lines = start(tmp_path, other, 1)
    late = re.compile(r"environment error: rank \d did not meet the others .* not within 4 s")
    assert code == 5 and lines and all(map(late.match, lines)), lines
