"""The observer of the kill campaigns finds what it looks for."""

import json
import mmap
import os
import signal
from types import SimpleNamespace

import pytest

from solo import checkpoint, files
from solo.bench import observer
from solo.bench.observer import Observer, Watch

NEWEST = "step-000000002.ckpt"


@pytest.fixture
def folder(tmp_path):
    """Of two checkpoints and their manifest."""
    paths = [tmp_path / "saved" / name for name in ("step-000000001.ckpt", NEWEST)]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_bytes(path.name.encode())
    rows = [{"file": path.name, "sha256": files.digest(path)} for path in paths]
    (tmp_path / "saved" / checkpoint.MANIFEST).write_text(json.dumps(rows))
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda folder: None, ""),
        (lambda folder: (folder / checkpoint.MANIFEST).write_text('[{"file": "step'), "manifest: JSONDecodeError"),
        (lambda folder: (folder / checkpoint.MANIFEST).write_text("[{}]"), "manifest: KeyError"),
        (lambda folder: (folder / checkpoint.MANIFEST).unlink(), "manifest: gone"),
        (lambda folder: (folder / NEWEST).unlink(), "too few: of"),
        (lambda folder: (folder / NEWEST).write_bytes(b"other"), "too few: of"),
    ],
    ids=["nothing", "garbled", "another content", "missing", "one checkpoint missing", "one checkpoint damaged"],
)
def test_it_finds(folder, change, finding):
    watch, over = Watch(folder), mmap.mmap(-1, 1)
    over[0] = 1                                         # one look
    assert watch.until(over).split()[0] == "1"
    change(folder)
    _, *found = watch.until(over).splitlines()
    assert len(found) == bool(finding) and all(line.startswith(finding) for line in found)


@pytest.mark.parametrize(("takes", "looks"), [(0.0, 1112), (0.0004, 1112), (0.002, 501)], ids=["no time", "less", "more"])
def test_it_looks_a_thousand_times_a_second_whatever_a_look_takes(folder, monkeypatch, takes, looks):
    """By a clock that sleep moves: one second, and looks that take no longer than a thousandth of it, or twice that."""
    clock, over, look = [100.0], mmap.mmap(-1, 1), Watch._look

    def slow(watch):
        clock[0] += takes
        over[0] = clock[0] - 100.0 > 1.0 - observer.PERIOD / 2
        return look(watch)

    time = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(observer, "time", time)
    monkeypatch.setattr(Watch, "_look", slow)
    counted, seconds = Watch(folder).until(over).split()
    assert abs(int(counted) - looks) <= 1 and float(seconds) == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize("refused", [None, PermissionError(1, "Operation not permitted")], ids=["may", "may not"])
def test_it_runs_before_others_where_it_may(tmp_path, monkeypatch, refused):
    """In its own process: a sleep that ends late is a look that is lost."""
    asked = []

    def ask(process, policy, parameters):
        asked.append((process, policy, parameters.sched_priority))
        if refused:
            raise refused

    monkeypatch.setattr(observer.os, "sched_setscheduler", ask)
    monkeypatch.setattr(Watch, "until", lambda self, board: f"1 2.0\n{asked}")
    watcher = Observer(tmp_path, tmp_path / "findings")
    assert watcher.end() == (1, 2.0, [str([(0, os.SCHED_FIFO, 1)])]) and not asked


def test_before_a_manifest_there_is_nothing_to_miss(tmp_path):
    watcher = Observer(tmp_path, tmp_path / "findings")
    assert watcher.end() == (0, 0.0, [])


def test_what_another_run_left_is_not_its_own(folder, tmp_path, monkeypatch):
    (tmp_path / "findings").write_text("1000")
    monkeypatch.setattr(Watch, "until", lambda self, board: 1 / 0)
    reason = "observer: ZeroDivisionError: division by zero"
    assert Observer(folder, tmp_path / "findings").end() == (0, 0.0, [reason])


def test_an_observer_that_is_killed_is_no_observer(folder, tmp_path):
    watcher = Observer(folder, tmp_path / "findings")
    os.kill(watcher.process, signal.SIGKILL)
    assert watcher.end() == (0, 0.0, ["observer: ended before the run"])
