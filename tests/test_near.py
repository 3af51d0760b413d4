"""What a path that leads to no checkpoint may have meant, and that looking for it harms nobody."""

import errno
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from solo import checkpoint
from solo.errors import ConfigError
from solo.names import checkpoints_near


def save(run, step=1):
    content = {"state_dict": {"w": torch.zeros(4)}, "global_step": step, "epoch": 0, "solo": "{}"}
    checkpoint.save(content, run / "checkpoints" / f"step-{step}.ckpt")


def test_what_is_near_a_wrong_path_is_offered(tmp_path):
    """Three names, the newest first, a run by its folder; also below a folder of runs and beside a folder without any."""
    runs = [tmp_path / "runs" / f"quick-{i:08d}" for i in range(5)]
    for age, run in enumerate(runs):
        for step in (1, 2):
            save(run, step)
            os.utime(run / "checkpoints" / f"step-{step}.ckpt", (10**9, 10**9 - 100 * age + step))
    (tmp_path / "runs" / "report").mkdir()
    newest = f"{runs[0]}, {runs[1]}, {runs[2]} and 2 more"
    inside = ", ".join(str(runs[4] / "checkpoints" / f"step-{step}.ckpt") for step in (2, 1))
    for path, said in (
        (tmp_path / "runs", f"holds no checkpoint itself (there: {newest})"),
        (tmp_path / "runs" / "report", f"holds no checkpoint itself (there: {newest})"),
        (tmp_path / "runs" / "slow", f"does not exist (there: {newest})"),
        (tmp_path / "runs" / "slow" / "last.ckpt", f"does not exist (there: {newest})"),
        (runs[4] / "checkpoints" / "none.ckpt", f"does not exist (there: {inside})"),
        (tmp_path / "runs" / "quick", f"could be {newest}: name one"),
    ):
        with pytest.raises(ConfigError) as caught:
            checkpoint.resolve(path, "resume")
        assert str(caught.value) == f"resume={path} {said}"
    assert checkpoint.resolve(runs[4]) == runs[4] / "checkpoints" / "step-2.ckpt"


@pytest.fixture
def neighbours(tmp_path, monkeypatch):
    """Three runs, the file of the second of which may not be looked at; and where somebody looks, or searches, from here on."""
    runs, looked = [tmp_path / "runs" / f"{name}-0123abcd" for name in ("good", "stale", "other")], Counter()
    for run in runs:
        save(run)
    look, search = Path.stat, Path.glob

    def noted(path, **options):
        looked[path] += 1
        if path == runs[1] / "checkpoints" / "step-1.ckpt":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return look(path, **options)

    def searched(folder, pattern, **options):
        looked[folder / "*"] += 1
        return search(folder, pattern, **options)

    monkeypatch.setattr(Path, "stat", noted)
    monkeypatch.setattr(Path, "glob", searched)
    return runs, looked


def test_a_run_that_is_there_is_read_whatever_its_neighbours_are_like(neighbours):
    (run, *others), looked = neighbours
    assert checkpoint.resolve(run, "resume") == run / "checkpoints" / "step-1.ckpt"
    assert not [path for path in looked if path == run.parent / "*" or {*others}.intersection(path.parents)]


def test_neighbours_that_cannot_be_looked_at_are_not_offered(neighbours, monkeypatch):
    """And each is looked at once."""
    (run, _, other), looked = neighbours
    with pytest.raises(ConfigError, match=rf"/slow/last.ckpt does not exist \(there: {other}, {run}\)$"):
        checkpoint.resolve(run.parent / "slow" / "last.ckpt", "resume")
    assert looked[run / "checkpoints" / "step-1.ckpt"] == looked[other / "checkpoints" / "step-1.ckpt"] == 1

    def silent(folder, pattern, **options):
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(Path, "glob", silent)
    assert checkpoints_near(run) == [] and checkpoint.resolve(run)
    with pytest.raises(ConfigError, match="^resume=.*/slow cannot be reached: Input/output error$"):
        checkpoint.resolve(run.parent / "slow", "resume")


def test_nobody_looks_around_in_the_root(neighbours, monkeypatch):
    monkeypatch.chdir("/")
    for path in ("/no-such-folder/run/last.ckpt", "no-such-folder/run/last.ckpt"):
        with pytest.raises(ConfigError, match="does not exist$"):
            checkpoint.resolve(path, "resume")
    assert not {Path("/*"), Path("*")}.intersection(neighbours[1])
