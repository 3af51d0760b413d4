"""The kill harness can fail: each defect that a library of this kind has had is put in, and must be noticed."""

import os
import shutil

import pytest

from solo import checkpoint
from solo.bench.chaos import plan
from solo.bench.ordeal import Ordeal, reference
from tests.defects import DEFECTS
from tests.test_chaos import SHORT


def happen(run, then):
    if then == "flip":
        run.flip()
    elif then == "lose":
        (run.saved / checkpoint.MANIFEST).unlink()
    elif then == "touch":
        for i, path in enumerate(sorted(run.saved.glob("*.ckpt"))):
            os.utime(path, (1e9 - i, 1e9 - i))


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("truth")
    return reference(plan(folder, **SHORT), folder)


def ordeal(truth, folder, function, kill, then):
    run = Ordeal(plan(folder, **SHORT), folder, truth, function)
    if not run.life(operation=kill):
        happen(run, then)
        run.life()
    shutil.rmtree(folder)
    return run


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "then"), sorted({(kill, then) for _, kill, then, _ in DEFECTS.values()}))
def test_without_a_defect_nothing_is_found(kill, then, truth, tmp_path):
    run = ordeal(truth, tmp_path / "run", None, kill, then)
    assert run.problems == [] and run.kills == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found(name, truth, tmp_path):
    function, kill, then, says = DEFECTS[name]
    run = ordeal(truth, tmp_path / "run", function, kill, then)
    assert run.kills == 1, run.problems
    assert says in {problem.split(":")[0] for problem in run.problems}, run.problems


def test_there_are_enough_defects():
    assert len(DEFECTS) >= 20
