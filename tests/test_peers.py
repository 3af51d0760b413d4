"""A store that gives no answer, as that of a first process which the system has suspended, is given up."""

import threading
from types import SimpleNamespace

import pytest

from solo import errors, peers
from solo.errors import DataError, SoloError, Unanswered


class Silent:
    """A store in the place of the group's: any call waits for ever."""

    def __getattr__(self, name):
        return lambda *asked: threading.Event().wait(0.5)


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


@pytest.mark.parametrize(("failure", "said"), [
    (RuntimeError("gloo: Timed out waiting 8000ms"), Unanswered), (ValueError("boom"), Unanswered),
    (DataError("too many damaged images"), DataError), (SystemExit(0), Unanswered),
], ids=["a collective", "an error", "an error of ours", "a way out that rank 0 was to speak for"])
def test_a_failure_of_another_kind_meanwhile(silent, failure, said):
    """Our own error is said all the same: nobody else will."""
    with pytest.raises(said) as caught, peers.together(8.0):
        raise failure
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
