"""The campaigns of `solo.bench chaos` in short: two ranks that are killed, signals on each route, a soak; and they can fail."""

import random
import signal
import time

import pytest

from solo import checkpoint
from solo.bench import routes, soak
from solo.bench.chaos import campaign, plan
from solo.bench.everystep import every_step
from solo.bench.ordeal import Ordeal, reference
from solo.bench.routes import ROUTES, interrupt
from solo.callbacks.signals import SignalGuard
from solo.errors import SIGNALS, EnvironmentFault
from solo.nn import Queue
from tests.test_chaos import SHORT

pytestmark = pytest.mark.slow


def test_kills_of_two_ranks(tmp_path):
    """One of them or both, at random instants."""
    tally = campaign(5, seed=6, folder=tmp_path, width=16, ranks=2, **SHORT)
    print(tally)
    assert tally.problems == [] and tally.kills == 5 and tally.looks > 100, str(tally)


def test_a_full_disk_of_rank_0_ends_both_and_they_go_on(tmp_path):
    content = plan(tmp_path, ranks=2, **SHORT, checkpoint={"minutes": 0, "fallback": str(tmp_path / "fallback")})
    save = checkpoint.save

    def full(content, path, keep=False):
        if content["global_step"] > 2 and path.parent.name == "checkpoints":
            raise OSError(28, "No space left on device")
        save(content, path, keep)

    run = Ordeal(content, tmp_path / "run", reference(content, tmp_path / "whole"), lambda: setattr(checkpoint, "save", full))
    assert run.life()
    (said,) = run.problems
    assert "step-000000005.ckpt cannot be written: No space left on device" in said and "go on with resume=" in said
    assert checkpoint.newest(run.saved).name == "step-000000002.ckpt"
    run.problems.clear()
    run.defect = None
    assert run.life() and run.problems == []


@pytest.fixture(scope="module")
def truths(tmp_path_factory):
    """Config and uninterrupted run of one process and of two, which save when they are told to and at their end."""
    folder = tmp_path_factory.mktemp("truths")
    rarely = {"frequency": 10**6, "minutes": 1e6}
    contents = {ranks: plan(folder, ranks=ranks, max_epochs=2, checkpoint=rarely) for ranks in (1, 2)}
    return {ranks: (contents[ranks], reference(contents[ranks], folder / str(ranks))) for ranks in contents}


@pytest.mark.parametrize("name", ROUTES)
def test_a_signal_on_each_route(truths, tmp_path, name):
    content, truth = truths[ROUTES[name].ranks]
    number = random.Random(name).choice([number for number in SIGNALS if number != signal.SIGINT or ROUTES[name].times == 1])
    took, problems = interrupt(name, number, 3 * truth.step_seconds, content, tmp_path / "run", truth)
    assert problems == [] and took is not None


def test_a_route_on_which_no_signal_arrives_is_found(truths, tmp_path, monkeypatch):
    monkeypatch.setattr(routes, "_interrupt", lambda *_: None)
    took, (problem,) = interrupt("one process", signal.SIGTERM, 0.0, truths[1][0], tmp_path, truths[1][1])
    assert took is None and problem.startswith("missed: ")


@pytest.mark.parametrize(
    ("name", "defect", "kinds"),
    [
        ("rank 1 of Lightning's launcher", ("heard", lambda self, trainer: (self._signal, False)), {"hang"}),
        ("one process", ("save", lambda self, trainer, last=False: None), {"not saved"}),
        ("one process", ("leave", lambda self, trainer, number: exit(0)), {"exit", "said"}),
    ],
    ids=["no agreement", "no save", "as if complete"],
)
def test_what_is_wrong_with_a_signal_is_found(truths, tmp_path, monkeypatch, name, defect, kinds):
    from solo.callbacks.checkpoint import Checkpointer

    if kinds == {"hang"}:
        monkeypatch.setattr(routes, "GONE", 4.0)
    monkeypatch.setattr(Checkpointer if defect[0] == "save" else SignalGuard, *defect)
    content, truth = truths[ROUTES[name].ranks]
    _, problems = interrupt(name, signal.SIGTERM, 3 * truth.step_seconds, content, tmp_path / "run", truth)
    assert kinds <= {problem.split(":")[0] for problem in problems}, problems


def test_an_answer_that_takes_long_is_late(truths, tmp_path, monkeypatch):
    """The step in which it comes takes seconds, which is no excuse."""
    note = SignalGuard._note

    def slowly(self, *arguments):
        time.sleep(2)
        note(self, *arguments)

    monkeypatch.setattr(routes, "LIMIT", 0.25)
    monkeypatch.setattr(SignalGuard, "_note", slowly)
    content, truth = truths[1]
    _, problems = interrupt("one process", signal.SIGTERM, 3 * truth.step_seconds, content, tmp_path / "run", truth)
    assert [problem.split(":")[0] for problem in problems] == ["late"], problems


def test_two_ranks_go_on_from_some_steps(tmp_path):
    """In the first epoch, and at its end."""
    assert every_step("all4one", tmp_path / "run", ranks=2, steps=[3, 8]) == []


def test_a_queue_that_is_lost_is_found_after_a_step(tmp_path, monkeypatch):
    queue_is_lost(monkeypatch)
    problems = every_step("nnclr", tmp_path / "run", ranks=1, steps=[3])
    assert len(problems) >= 2 and all(problem.startswith("nnclr, after step 3: ") for problem in problems)


@pytest.fixture
def soaked(tmp_path, monkeypatch):
    """What a soak comes to in which so many faults happen."""
    monkeypatch.setattr(soak, "FAULTS", (0.3, 0.9))
    monkeypatch.setattr(soak, "SAVES", 0.3)
    monkeypatch.setattr(soak, "GROWTH", 0.5)            # a run that has hardly begun still grows
    content = plan(tmp_path, data={"train_size": 512}, max_epochs=10**5)
    return lambda faults: soak.soak(content, 0.0, 1, tmp_path, faults)


def test_a_soak_of_seconds(tmp_path, soaked):
    happened, said, problems = soaked(5)
    print(said)
    assert problems == [] and sum(happened.values()) == 5 and happened["kills"] + happened["signals"] >= 1, said
    assert checkpoint.newest(next(tmp_path.glob("loud/all4one-*")) / "checkpoints") is not None


def queue_is_lost(monkeypatch):
    monkeypatch.setattr(Queue, "_load_from_state_dict", lambda self, state, *_: None)


def test_a_soak_finds_a_queue_that_is_lost(soaked, monkeypatch):
    queue_is_lost(monkeypatch)
    _, said, problems = soaked(2)
    assert any(problem.startswith("different: step") for problem in problems), said


def test_a_life_that_ends_for_no_reason_is_found(tmp_path, monkeypatch):
    """With the code of a full disk, which its disk was not."""
    def fail(*_):
        raise EnvironmentFault("no reason")

    monkeypatch.setattr(soak, "pretrain", fail)
    monkeypatch.setattr(soak, "SAVES", 0.0)
    lives = [soak.Life(Ordeal(plan(tmp_path), tmp_path / name, None)) for name in ("any", "full")]
    soak.FAULT["full disks"](lives[1], random.Random(0))
    for life in lives:
        life.wait()
    (problem,), none = (life.run.problems for life in lives)
    assert problem.startswith("refused: [5]") and none == []


def test_kills_of_two_ranks_find_a_queue_that_is_lost(tmp_path, monkeypatch):
    queue_is_lost(monkeypatch)
    tally = campaign(2, seed=6, folder=tmp_path, width=16, ranks=2, **SHORT)
    assert tally.count("different") and tally.kills == 2, str(tally)
