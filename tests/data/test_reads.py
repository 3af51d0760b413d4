"""A file whose read does not come back ends a command that waits for it in its own process, by a line that names the file."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from solo.bench import processes
from solo.data import reads
from solo.errors import reported
from solo.experiment import experiment
from solo.run import pretrain
from tests.data.common import make_folder
from tests.tiny import values


def ends(tmp_path: Path, body: Callable[[], object]) -> tuple[int, list[str]]:
    """Exit code and lines of a fork."""
    (status,) = processes.wait(processes.fork(1, tmp_path / "log", lambda _: body()), 60).values()
    return os.waitstatus_to_exitcode(status), (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize(("engine", "size", "looked_at"), [
    ("fast", (16, 16), False), ("torchvision", (20, 24), False), ("fast", (16, 16), True),
], ids=["decoding small images at the start", "a batch", "the first look"])
def test_a_read_that_does_not_come_back(engine: str, size: tuple[int, int], looked_at: bool, tmp_path: Path) -> None:
    """A pipe that nobody writes to stands where an image was."""
    files = make_folder(tmp_path / "images" / "train", {"a": 20, "b": 20}, size)
    stuck = files[0 if looked_at else 1]
    stuck.unlink()
    os.mkfifo(stuck)
    data = {"dataset": "image_folder", "train_path": str(tmp_path / "images" / "train"), "num_workers": 0,
            "engine": engine, "timeout": 0.4, "no_labels": True, "train_size": None}
    config = experiment(values("nnclr", tmp_path / "runs", data=data))

    def command() -> None:
        with reported():
            pretrain(config)

    code, lines = ends(tmp_path, command)
    said = [line for line in lines if "error" in line]
    assert (code, said) == (5, [f"environment error: rank 0: no answer within data.timeout=0.4 s from {stuck}"]), lines
    assert not any("Traceback" in line for line in lines)


class Looks:
    """In the place of a command's end: something happens before each look, and behind the last one the command is over."""

    def __init__(self, *before: Callable[[], object]) -> None:
        self.before = iter(before)

    def wait(self, seconds: float) -> bool:
        return (act := next(self.before, None)) is None or bool(act())


@pytest.mark.parametrize(("looks", "told"), [(8, 0), (9, 1)])
def test_one_read_seen_as_often_as_it_may_be(looks: int, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look begins to count; a process that stood still meanwhile has looked no more often."""
    said: list[str] = []
    monkeypatch.setattr(reads, "_end", said.append)
    monkeypatch.setattr(reads, "_reading", {1: (Path("x.png"),)})
    reads._look(8.0, Looks(*[lambda: False] * looks))
    assert said == ["rank 0: no answer within data.timeout=8 s from x.png"] * told


def test_many_short_reads_are_none_that_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one thread one after the other, also of the same file, beside another thread that stops reading."""
    monkeypatch.setattr(reads, "_end", lambda problem: pytest.fail(problem))
    monkeypatch.setattr(reads, "_reading", {2: (Path("y.png"),)})

    def next_read() -> None:
        reads._reading[1] = (Path(*["x.png"]),)

    reads._look(8.0, Looks(*[next_read] * 7, lambda: reads._reading.clear(), *[next_read] * 20))


def test_what_is_read_is_noted_and_forgotten() -> None:
    seen = reads.noted(lambda: list(reads._reading.values()), Path("x.png"))
    assert seen == [(Path("x.png"),)] and not reads._reading
    with pytest.raises(OSError):
        reads.noted(lambda: os.stat("/no/such"), Path("x.png"))
    assert not reads._reading


def test_a_program_that_is_no_command_is_not_watched_and_a_command_no_longer_than_it_lasts() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "solo-reads"]

    reads.watch(0.1)
    assert not threads()
    with reported():
        reads.watch(0.1)
        (watcher,) = threads()
    watcher.join(10)
    assert not threads()
