"""A store that gives no answer, as that of a first process which the system has suspended, is given up."""

import os
import re
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from solo import errors, peers, strategy
from solo.bench import processes
from solo.bench.chaos import plan
from solo.errors import DataError, SoloError, Unanswered
from solo.experiment import experiment
from solo.run import pretrain


class Silent:
    """A store in the place of the group's: any call waits for ever."""

    def __getattr__(self, name):
        return lambda *asked: threading.Event().wait()


@pytest.fixture
def silent(monkeypatch):
    monkeypatch.setattr(peers, "world_size", lambda: 2)
    monkeypatch.setattr(peers, "rank", lambda: 1)
    monkeypatch.setattr(peers, "_limit", 0.08)
    monkeypatch.setattr(peers, "_GRACE", 0.08)
    monkeypatch.setattr(peers, "set_timeout", lambda seconds: None)
    monkeypatch.setattr(peers.dist, "PrefixStore", lambda prefix, store: Silent())
    monkeypatch.setattr(peers.dist.distributed_c10d, "_get_default_store", lambda: None)


def a_save():
    with peers.turn_of_first("save 1", 0.1):
        pass


@pytest.mark.parametrize("wait", [a_save, lambda: peers.Flag("signal").up(False), lambda: peers.Flag("signal").up(True)],
                         ids=["behind a save", "looking whether a signal came", "telling the others of one"])
def test_who_waits_in_it_leaves(silent, wait):
    with pytest.raises(Unanswered, match="rank 0 no longer answers: it was suspended"):
        wait()


@pytest.mark.parametrize("agent", ["False", "True"])
def test_who_is_silent_is_who_has_the_store(silent, monkeypatch, agent):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    with pytest.raises(Unanswered, match="^torchrun no longer" if agent == "True" else "^rank 0 no longer"):
        peers.Flag("signal").up(False)


def test_a_validation_of_quick_batches_looks_at_most_every_50_ms(silent, monkeypatch):
    """Each look starts a thread: 200 batches of a millisecond start five, none behind a signal, and one is seen soon."""
    clock, started, store = [1000.0], [], Kept()
    monkeypatch.setattr(peers.dist, "PrefixStore", lambda prefix, group: store)
    monkeypatch.setattr(peers.time, "monotonic", lambda: clock[0])
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: started.append(thread) or start(thread))
    flag = peers.Flag("signal")
    for _ in range(200):
        assert not flag.up(False)
        clock[0] += 0.001
    assert len(started) in (4, 5)                   # sums of 0.001 round
    peers.Flag("signal").up(True)
    seen = [flag.up(False) for _ in range(60) if clock.append(clock.pop() + 0.001) is None]
    assert seen.index(True) <= 50 and all(seen[50:]) and len(started) <= 7


class Kept:
    """A store that answers, as torchrun's does whatever becomes of rank 0."""

    def __init__(self, *_):
        self.values = {}

    def check(self, keys):
        return all(key in self.values for key in keys)

    def set(self, key, value):
        self.values[key] = value

    def add(self, key, amount):
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]


@pytest.fixture
def kept(silent, monkeypatch):
    store = Kept()
    monkeypatch.setattr(peers, "_Store", lambda prefix: store)
    monkeypatch.setattr(peers, "_BEAT", 0.005)
    return store


def test_a_first_process_that_gives_no_sign_of_life_in_a_save_is_given_up(kept):
    with pytest.raises(Unanswered, match="rank 0 no longer answers: it was suspended"), peers.turn_of_first("save 1", 60.0):
        pass


def test_a_long_save_is_waited_for(kept, monkeypatch):
    """As long as its process lives; a beat is no progress, so there is an end all the same."""
    looks = []

    def until(holds, seconds):
        looks.append(seconds)
        kept.add("save 1/beats", 1)
        if len(looks) == 100:
            kept.set("save 1", "")
        return holds()

    monkeypatch.setattr(peers, "_until", until)
    with peers.turn_of_first("save 1", 60.0):
        pass
    assert len(looks) == 100
    with peers.turn_of_first("save 2", -1.0):
        pass


def test_the_first_process_gives_signs_of_life_until_it_is_done(kept, monkeypatch):
    monkeypatch.setattr(peers, "rank", lambda: 0)
    with peers.turn_of_first("save 1", 60.0):
        while kept.values.get("save 1/beats", 0) < 3:
            time.sleep(0.005)
    assert "save 1" in kept.values
    time.sleep(0.02)
    beats = kept.values["save 1/beats"]
    time.sleep(0.05)
    assert kept.values["save 1/beats"] == beats


@pytest.mark.parametrize(("failure", "said"), [
    (RuntimeError("gloo: Timed out waiting 8000ms"), Unanswered), (ValueError("boom"), Unanswered),
    (DataError("too many damaged images"), DataError), (SystemExit(0), Unanswered),
], ids=["a collective", "an error", "an error of ours", "a way out that rank 0 was to speak for"])
def test_a_failure_of_another_kind_meanwhile(silent, failure, said, capsys):
    """It is said all the same: nobody else will."""
    with pytest.raises(said) as caught, peers.together(8.0):
        raise failure
    assert ("ValueError: boom" in capsys.readouterr().err) == isinstance(failure, ValueError)
    assert isinstance(failure, SoloError) or str(caught.value).startswith("rank 0 no longer answers")


def test_what_the_store_says_is_handed_on():
    def refused():
        raise RuntimeError("Connection reset by peer")

    assert peers.answered(lambda: b"x", 1.0) == b"x" and peers.answered(lambda: None, 1.0) is None
    with pytest.raises(RuntimeError, match="reset"):
        peers.answered(refused, 1.0)


def test_a_process_that_stood_still_has_not_waited(monkeypatch):
    """Not by the clock: the answer comes with the last of the looks."""
    looks, thread = [], threading.Thread

    class Late(thread):
        def join(self, seconds):
            looks.append(seconds)
            if len(looks) == peers._LOOKS:
                self.run()

        def start(self): ...

    monkeypatch.setattr(peers, "threading", SimpleNamespace(Thread=Late))
    assert peers.answered(lambda: "late", 8.0) == "late" and looks == [1.0] * 8


def test_under_torchrun_nobody_waits_for_a_silent_first_process_to_speak(monkeypatch, capsys):
    """It ends the others, once it has said why: but not here."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(errors, "main_process", lambda: False)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(SystemExit) as left, errors.reported():
        raise Unanswered("rank 0 no longer answers")
    assert left.value.code == 5 and capsys.readouterr().err == "environment error: rank 0 no longer answers\n"


@pytest.mark.slow
def test_a_first_process_that_is_suspended_while_they_meet(tmp_path, monkeypatch):
    """torch asks its store without a limit for the addresses of the others."""
    monkeypatch.setattr(strategy, "MEETING", 1.0)
    helper = torch.distributed.distributed_c10d._new_process_group_helper

    def suspended(*arguments, **options):
        os.kill(os.getpid(), signal.SIGSTOP)
        return helper(*arguments, **options)

    def body(rank):
        if rank == 0:
            torch.distributed.distributed_c10d._new_process_group_helper = suspended
        with errors.reported():
            pretrain(experiment(plan(tmp_path, ranks=2)))

    first, other = processes.fork(2, tmp_path / "log", body)
    try:
        statuses = processes.wait([other], 30)
    finally:
        processes.kill([first, other])
        processes.wait([first], 30)
    assert os.waitstatus_to_exitcode(statuses[other]) == 5
    assert re.fullmatch(r"environment error: rank 1 did not meet the others \(.*\): one of them gives no answer",
                        (tmp_path / "log-rank1").read_text().splitlines()[-1])
