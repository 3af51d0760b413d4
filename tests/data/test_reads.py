"""A file whose read does not come back ends a command that waits for it in its own process, by a line that names the file."""

import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from solo import reading
from solo.bench import processes
from solo.data import cache, check, datasets, hdf5, pack, reads
from solo.data.config import DataConfig
from solo.data.sources import FakeSource
from solo.errors import ConfigError, reported
from solo.experiment import experiment
from solo.run import pretrain
from tests.data import hdf5_files
from tests.data.common import folder, make_folder, module
from tests.data.hdf5_files import group_per_class
from tests.tiny import values


def ends(tmp_path: Path, body: Callable[[], object]) -> tuple[int, list[str]]:
    """Exit code and lines of a fork."""
    (status,) = processes.wait(processes.fork(1, tmp_path / "log", lambda _: body()), 60).values()
    return os.waitstatus_to_exitcode(status), (tmp_path / "log").read_text().splitlines()


@pytest.mark.slow
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


class Stuck:
    """The listing of a folder that gives two entries and then no more."""

    def __enter__(self) -> Iterator[SimpleNamespace]:
        yield from [SimpleNamespace(name=f"{i}.png", is_dir=bool) for i in range(2)]
        threading.Event().wait()

    def __exit__(self, *raised: object) -> None: ...


def test_a_listing_that_stands_still(tmp_path: Path) -> None:
    images, scandir = tmp_path / "images", os.scandir
    make_folder(images, {"a": 2, "b": 2})

    def command() -> None:
        reads.os.scandir = lambda folder: Stuck() if str(folder).endswith("/b") else scandir(folder)  # type: ignore
        with reported():
            folder(images, timeout=0.2)

    code, lines = ends(tmp_path, command)
    assert (code, lines) == (5, [f"environment error: rank 0: no answer within data.timeout=0.2 s from {images / 'b'}"])


@pytest.mark.parametrize("command", ["check", "pack"])
def test_a_read_of_a_command_on_datasets_that_does_not_come_back(command: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    stuck = make_folder(images, {"a": 3})[1]
    stuck.unlink()
    os.mkfifo(stuck)

    def body() -> None:
        with reported():
            main, more = (check.main, []) if command == "check" else (pack.main, [str(tmp_path / "x.h5")])
            main([str(images), *more, "--timeout", "0.2"])

    code, lines = ends(tmp_path, body)
    assert code == 5 and lines[-1] == f"environment error: rank 0: no answer within data.timeout=0.2 s from {stuck}", lines


def test_each_entry_of_a_folder_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a folder takes as a whole: who looks finds another note after each entry, and before the first."""
    make_folder(tmp_path, {"a": 5, "b": 1})
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "round").symlink_to("round")
    scandir, notes = os.scandir, []

    class Seen:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            for entry in [*scandir(self.folder), None]:
                notes.extend(reads._reading.values())
                if entry is not None:
                    yield entry

        def __exit__(self, *raised: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Seen)
    found = {path: (sorted(folders), sorted(names)) for path, folders, names in reads.walk(tmp_path)}
    monkeypatch.undo()
    assert found == {
        str(tmp_path): (["a", "b"], []),
        str(tmp_path / "a"): (["back"], [*[f"{i:04d}.png" for i in range(5)], "round"]),
        str(tmp_path / "b"): ([], ["0000.png"]),
    }
    places = [str(note.path) for note in notes]
    assert len({id(note) for note in notes}) == len(notes) == 3 + 8 + 2 and places.count(str(tmp_path / "a")) == 8
    assert not reads._reading


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
    monkeypatch.setattr(reads, "end_at_once", said.append)
    monkeypatch.setattr(reads, "_reading", {1: reads._Read(Path("x.png"))})
    reads._look(8.0, Looks(*[lambda: False] * looks))
    assert said == ["rank 0: no answer within data.timeout=8 s from x.png"] * told


def test_many_short_reads_are_none_that_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one thread one after the other, also of the same file, beside another thread that stops reading."""
    monkeypatch.setattr(reads, "end_at_once", lambda problem: pytest.fail(problem))
    monkeypatch.setattr(reads, "_reading", {2: reads._Read(Path("y.png"))})

    def next_read() -> None:
        reads._reading[1] = reads._Read(Path("x.png"))

    reads._look(8.0, Looks(*[next_read] * 7, lambda: reads._reading.clear(), *[next_read] * 20))


def test_what_is_read_is_noted_and_forgotten() -> None:
    seen = reads.noted(lambda: list(reads._reading.values()), Path("x.png"))
    assert [each.path for each in seen] == [Path("x.png")] and not reads._reading
    with pytest.raises(OSError):
        reads.noted(lambda: os.stat("/no/such"), Path("x.png"))
    assert not reads._reading


def test_a_command_has_one_watcher_as_long_as_it_lasts_and_a_program_none() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "solo-reads"]

    reads.watch(0.1)
    assert not threads()
    with reported():
        for _ in range(2):
            module(dataset="digits", timeout=0.1)
        (watcher,) = threads()
    watcher.join(10)
    assert not threads()


@pytest.mark.parametrize("seconds", ["inf", "nan", "0"])
def test_a_command_watches_for_a_finite_time(seconds: str, tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 1})
    with pytest.raises(ConfigError, match="^--timeout must be positive and finite"):
        check.main([str(tmp_path), "--timeout", seconds])
    with pytest.raises(ConfigError, match="^--timeout must be positive and finite"):
        pack.main([str(tmp_path), str(tmp_path / "x.h5"), "--timeout", seconds])


def test_a_whole_file_may_take_long_while_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor time of the thread that reads: with any of it the looks begin anew, without it they count."""
    said: list[str] = []
    ticks, now = [7], reads._Read("x.npz", clock=3)
    monkeypatch.setattr(reads, "end_at_once", said.append)
    monkeypatch.setattr(reads, "_reading", {1: now})
    monkeypatch.setattr(reads.time, "clock_gettime_ns", lambda clock: ticks[0] * clock)

    def moves() -> None:
        ticks[0] += 1

    reads._look(8.0, Looks(*[moves] * 30, *[lambda: False] * 7))
    assert not said
    reads._look(8.0, Looks(moves, *[lambda: False] * 8))
    assert said == ["rank 0: no answer within data.timeout=8 s from x.npz"]


def test_what_comes_of_a_file_takes_processor_time_and_waiting_takes_none(tmp_path: Path) -> None:
    """Bytes of a pipe, in one read that has not ended yet."""
    os.mkfifo(tmp_path / "x")
    content: list[bytes] = []
    reader = threading.Thread(target=lambda: content.append(reads.moving((tmp_path / "x").read_bytes, tmp_path / "x")))
    reader.start()
    with (tmp_path / "x").open("wb", buffering=0) as writer:
        seen = [settled(reader, 0)]
        for _ in range(3):
            writer.write(b"x" * 4096)
            seen.append(settled(reader, seen[-1]))
    reader.join()
    assert content == [b"x" * 3 * 4096] and seen == sorted(set(seen)) and not reads._reading
    assert reads._Read("x", clock=time.pthread_getcpuclockid(threading.get_ident())).ticks() > 0


def settled(reader: threading.Thread, past: int) -> int:
    """Ticks of what it is at, once they are more than these and stand still."""
    for _ in range(200):
        before = reads._reading[reader.ident or 0].ticks()
        time.sleep(0.02)
        if before > past and reads._reading[reader.ident or 0].ticks() == before:
            return before
    return 0


@pytest.mark.parametrize(("layout", "when"), [
    ("packed", "the open"), ("packed", "the end"), ("packed", "the signature"), ("packed", "the structure"),
    ("groups", "the structure"), ("groups", "an image"),
])
def test_an_hdf5_file_that_does_not_come(layout: str, when: str, tmp_path: Path) -> None:
    """HDF5 would keep the interpreter while it waits, and nobody could say so."""
    make_folder(tmp_path / "images", {"a": 2})
    path = tmp_path / "x.h5"
    pack.main([str(tmp_path / "images"), str(path)]) if layout == "packed" else group_per_class(tmp_path / "images", path)
    left = {"the open": 0, "the end": 1, "the signature": 2, "the structure": 5, "an image": 10**6}[when]    # that come back

    class Stuck(io.FileIO):
        def __init__(self, *arguments: Any) -> None:
            nonlocal left
            left -= 1
            super().__init__(*arguments) if left >= 0 else threading.Event().wait()

        def seek(self, place: int, whence: int = 0) -> int:
            nonlocal left
            left -= whence == os.SEEK_END           # which a file system over a network is asked for
            return super().seek(place, whence) if left >= 0 else threading.Event().wait()

        def readinto(self, buffer: Any) -> int:     # in the place of the system's
            nonlocal left
            left -= 1
            return super().readinto(buffer) if left >= 0 else threading.Event().wait()

    def command() -> None:
        nonlocal left
        hdf5._Binary.__bases__ = (Stuck,)
        with reported():
            reads.watch(0.2)
            source = hdf5_files.opened(path)
            left = 0
            source.encoded(0)

    code, lines = ends(tmp_path, command)
    assert (code, lines[-1]) == (5, f"environment error: rank 0: no answer within data.timeout=0.2 s from {path}"), lines


def kept(folder: Path) -> None:
    source = FakeSource(cache.WORTH, 4, 2, 1, seed=0)
    source.fingerprint = lambda: "x"  # type: ignore[attr-defined]
    cache.decoded(source, (4, 4, 1), folder)


def opened(dataset: str, **more: Any) -> Callable[[Path], object]:
    return lambda path: datasets.DATASETS[dataset].open(DataConfig(dataset=dataset, train_path=str(path), **more), True)


@pytest.mark.parametrize(("read", "stuck"), [
    (opened("npz"), (reading.zipfile, "ZipFile")),
    (opened("stl10"), (datasets.torchvision.datasets.STL10, "_check_integrity")),
    (opened("stl10", download=True), (datasets.torchvision.datasets.STL10, "download")),
    (kept, (cache.np, "load")),
], ids=["npz", "torchvision", "download", "decoded images"])
def test_a_whole_file_that_does_not_come(read: Callable[[Path], object], stuck: tuple[object, str], tmp_path: Path) -> None:
    """As a hung file system has it: the process waits in one call, in which the interpreter goes on."""
    place = tmp_path / "x"
    if read is kept:
        kept(place)
    elif stuck[1] == "ZipFile":
        place.write_bytes(b"x")
    else:
        place.mkdir()

    def command() -> None:
        setattr(*stuck, lambda *arguments, **options: threading.Event().wait())
        with reported():
            reads.watch(0.2)
            read(place)

    code, lines = ends(tmp_path, command)
    what = "the download of stl10" if stuck[1] == "download" else place
    assert (code, lines) == (5, [f"environment error: rank 0: no answer within data.timeout=0.2 s from {what}"])
