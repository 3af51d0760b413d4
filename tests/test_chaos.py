"""A run that is killed at any instant continues with the same bits, and never has fewer than two valid checkpoints."""

import pytest

from solo.bench.chaos import campaign, plan
from solo.bench.ordeal import Ordeal, reference

SHORT = {"data": {"train_size": 32}, "max_epochs": 2}       # 8 steps
THIRD, LAST = range(22, 35), range(35, 45)      # operations on files: the third save's, which removes the oldest; the last


@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    tally = campaign(200, seed=1, folder=tmp_path, width=400)
    print(tally)
    assert tally.problems == []
    assert tally.kills >= 200 and tally.in_write >= 40 and tally.runs >= 3 and tally.looks > 1000, str(tally)


@pytest.mark.slow
def test_a_kill_before_each_operation_of_a_save(tmp_path):
    """Half-written, before fsync, rename, the folder's fsync, the manifest's, the removal of the oldest, the link."""
    content = plan(tmp_path, **{**SHORT, "max_epochs": 1})
    truth = reference(content, tmp_path / "whole")
    for operation in (*THIRD, *LAST):
        run = Ordeal(content, tmp_path / str(operation), truth)
        assert not run.life(operation=operation), operation
        assert run.life() and run.problems == [], operation
    assert run.life() and run.problems == []                # there is nothing after the last one, and nothing to train


@pytest.mark.slow
def test_killed_ten_times_inside_one_epoch(tmp_path):
    """Each of the ten begins behind another: what a second resume loses shows here."""
    content = plan(tmp_path, data={"train_size": 128}, max_epochs=1)
    run = Ordeal(content, tmp_path / "run", reference(content, tmp_path / "whole"))
    for _ in range(10):
        assert not run.life(operation=24)
    assert run.kills == 10 and run.steps >= 15 and run.problems == []
    assert run.life() and run.problems == []
