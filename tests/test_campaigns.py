"""The campaigns of `solo.bench chaos` in short: two ranks that are killed, signals on each route, a soak; and they can fail."""

import random
import signal

import pytest

from solo import checkpoint
from solo.bench import routes, soak
from solo.bench.chaos import campaign, plan
from solo.bench.everystep import every_step
from solo.bench.ordeal import Ordeal, reference
from solo.bench.routes import ROUTES, interrupt
from solo.callbacks.signals import SignalGuard
from solo.errors import SIGNALS
from solo.nn import Queue
from tests.test_chaos import SHORT

pytestmark = pytest.mark.slow


def test_kills_of_two_ranks(tmp_path):
    """One of them or both, at random instants."""
    tally = campaign(5, seed=2, folder=tmp_path, width=16, ranks=2)
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
    contents = {ranks: plan(folder, ranks=ranks, data={"train_size": 128}, checkpoint=rarely) for ranks in (1, 2)}
    return {ranks: (contents[ranks], reference(contents[ranks], folder / str(ranks))) for ranks in contents}


@pytest.mark.parametrize("name", ROUTES)
def test_a_signal_on_each_route(truths, tmp_path, name):
    content, truth = truths[ROUTES[name].ranks]
    number = random.Random(name).choice([number for number in SIGNALS if number != signal.SIGINT or ROUTES[name].times == 1])
    _, problems = interrupt(name, number, 3 * truth.step_seconds, content, tmp_path / "run", truth)
    assert [problem for problem in problems if not problem.startswith("late")] == []        # a busy machine is not a fault


@pytest.mark.parametrize(
    ("name", "defect", "kinds"),
    [
        ("rank 1 of Lightning's launcher", ("agreed", lambda self, trainer, due: (self._signal, due)), {"hang"}),
        ("one process", ("save", lambda self, trainer, last=False: None), {"not saved"}),
        ("one process", ("leave", lambda self, trainer, number: exit(0)), {"exit", "said"}),
    ],
    ids=["no agreement", "no save", "as if complete"],
)
def test_what_is_wrong_with_a_signal_is_found(truths, tmp_path, monkeypatch, name, defect, kinds):
    from solo.callbacks.checkpoint import Checkpointer

    monkeypatch.setattr(routes, "GONE", 8.0)
    monkeypatch.setattr(Checkpointer if defect[0] == "save" else SignalGuard, *defect)
    content, truth = truths[ROUTES[name].ranks]
    _, problems = interrupt(name, signal.SIGTERM, 3 * truth.step_seconds, content, tmp_path / "run", truth)
    assert kinds <= {problem.split(":")[0] for problem in problems}, problems


def test_two_ranks_go_on_from_some_steps(tmp_path):
    """In the first epoch, and at its end."""
    assert every_step("all4one", tmp_path / "run", ranks=2, steps=[3, 8]) == []


def test_a_queue_that_is_lost_is_found_after_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(Queue, "_load_from_state_dict", lambda self, state, *_: None)
    problems = every_step("nnclr", tmp_path / "run", ranks=1, steps=[3])
    assert len(problems) >= 2 and all(problem.startswith("nnclr, after step 3: ") for problem in problems)


def test_a_soak_of_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "FAULTS", (0.5, 1.5))
    monkeypatch.setattr(soak, "SAVES", 0.3)
    monkeypatch.setattr(soak, "GROWTH", 0.5)            # a run that has hardly begun still grows
    content = plan(tmp_path, data={"train_size": 512}, max_epochs=10**5)
    said, problems = soak.soak(content, 0.15, 1, tmp_path)
    print(said)
    assert problems == [] and checkpoint.newest(next(tmp_path.glob("loud/all4one-*")) / "checkpoints") is not None
