"""What a run that was left alone must not have done, and what counts as a fault's work; the runs only note steps."""

import random
import time
from types import SimpleNamespace

import pytest
import torch

from solo.bench import soak
from solo.bench.chaos import plan
from solo.bench.ordeal import Ordeal
from solo.bench.soak import DAMAGED, FULL_DISKS, GROWTH, KILLS, Life, Usage, judged
from solo.errors import EnvironmentFault


@pytest.mark.parametrize(("memory", "files", "problems"), [
    ([100] * 30, [8] * 30, 0),
    ([100] * 30, [8] * 20 + [6] * 10, 0),
    ([100] * 30, [8] * 20 + [9] * 10, 1),
    ([1000] * 20 + [1000 + int(1000 * GROWTH)] * 10, [8] * 30, 1),
    ([100, 100], [8, 8], 1),
    ([], [], 1),
], ids=["even", "fewer files", "more files", "more memory", "two looks", "none"])
def test_growth_is_a_problem_and_so_is_not_having_looked(memory, files, problems):
    said, found = judged(Usage(memory, files))
    assert len(found) == problems and said


@pytest.fixture
def life(tmp_path, monkeypatch):
    """Of a run that makes so many steps, ten a second, and then ends with an error or for no reason."""

    def of(steps, error=None, name="run"):
        def train(_, callbacks):
            for step in range(1, steps + 1):
                time.sleep(0.1)
                callbacks[-1].on_train_batch_end(SimpleNamespace(global_step=step), None, {"loss": torch.zeros(())})
            if error is not None:
                raise error

        monkeypatch.setattr(soak, "pretrain", train)
        return Life(Ordeal(plan(tmp_path), tmp_path / name, None))

    monkeypatch.setattr(soak, "SAVES", 0.0)
    return of


@pytest.mark.slow
def test_a_full_disk_excuses_no_later_end(life):
    run = life(10, EnvironmentFault("no reason"))
    assert run.starts() and soak.FAULT[FULL_DISKS](run, random.Random(0)) == (FULL_DISKS, True)
    run.wait()
    (problem,) = run.run.problems
    assert problem.startswith("refused: [5]")


def test_what_a_full_disk_ends_has_a_reason(life):
    run = life(0, EnvironmentFault("full"))
    assert soak.FAULT[FULL_DISKS](run, random.Random(0)) == (FULL_DISKS, False)
    assert run.run.problems == []


@pytest.mark.parametrize(("valid", "fate"), [([1], KILLS), ([1, 2], DAMAGED)])
def test_only_a_checkpoint_that_was_damaged_counts(life, monkeypatch, valid, fate):
    flipped = []
    run = life(100)
    monkeypatch.setattr(soak, "valid_steps", lambda folder: valid)
    monkeypatch.setattr(Ordeal, "flip", lambda self: flipped.append(self))
    assert run.starts() and soak.FAULT[DAMAGED](run, random.Random(0)) == (fate, False)
    assert len(flipped) == (fate == DAMAGED)


def test_a_quiet_run_that_ends_is_said_once_and_ends_the_soak(tmp_path, life, monkeypatch):
    life(2, name="fake")
    monkeypatch.setattr(soak, "_catch_up", lambda quiet, loud: None)
    monkeypatch.setattr(soak, "_unlike", lambda quiet, loud: [])
    monkeypatch.setattr(soak, "valid_steps", lambda folder: [2])
    _, _, problems = soak.soak(plan(tmp_path), 60.0, 0, tmp_path)
    assert [problem for problem in problems if "quiet" in problem] == ["refused: the quiet run has ended"]
