"""Images in one HDF5 file: packed by ours, or grouped as solo-learn's users have them."""

import io
import os
import pickle
import resource
import shutil
import signal
import sys
import tarfile
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from solo.data import check, hdf5, pack, reads
from solo.data.decoding import BadImage
from solo.data.hdf5 import GroupedSource, PackedSource, PerProcess, open_hdf5
from solo.data.sources import FakeSource, FolderSource, Source, listing
from solo.data.subsets import Subset
from solo.data.tar import TarSource
from solo.errors import ConfigError, DataError, EnvironmentFault
from tests.attacks.sandbox import MIB, confined
from tests.data.common import folder, full_view, make_folder, module
from tests.data.hdf5_files import KEY, group_per_class, opened

THREADS = 8


def same_images(source: Source, other: Source) -> bool:
    return [source.encoded(i) for i in range(len(source))] == [other.encoded(i) for i in range(len(other))]


# --- the same as the files it was made of -----------------------------------------------------------------------------


def test_bytes_labels_names_and_order_are_the_folders(images: Path, packed: Path) -> None:
    source, original = opened(packed), FolderSource(images, 3, KEY)
    assert isinstance(source, PackedSource) and len(source) == 23 and same_images(source, original)
    assert source.classes == original.classes == ["a", "b", "é"] and np.array_equal(source.labels, original.labels)
    assert [source.name(i).split(":", 1) for i in range(23)] == [
        [str(packed), Path(original.name(i)).relative_to(images).as_posix()] for i in range(23)
    ]
    assert packed.stat().st_mode & 0o777 == 0o644 and [path.name for path in packed.parent.iterdir()] == ["images.h5"]


@pytest.mark.parametrize("options", [{}, {"compression": "gzip"}, {"compression": "gzip", "shuffle": True, "chunks": (100,)}])
def test_a_group_per_class_is_the_folder(options: dict, images: Path, tmp_path: Path) -> None:
    source, original = opened(group_per_class(images, tmp_path / "x.h5", **options)), FolderSource(images, 3, KEY)
    assert isinstance(source, GroupedSource) and same_images(source, original)
    assert source.classes == original.classes and np.array_equal(source.labels, original.labels)
    assert source.name(12) == f"{tmp_path / 'x.h5'}:b/0000.png"


def test_opaque_images_and_empty_classes(images: Path, tmp_path: Path) -> None:
    content = (images / "a" / "0.jpg").read_bytes()
    with h5py.File(tmp_path / "x.h5", "w", userblock_size=512) as file:
        file.create_group("a")
        file["b/0"] = np.void(content)
    source = opened(tmp_path / "x.h5")
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1] and source.encoded(0) == content


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
@pytest.mark.parametrize("config", [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 0, "in_chans": 1}])
def test_training_sees_the_same_bits(engine: str, config: dict, images: Path, packed: Path) -> None:
    """Also of what stands in the place of the broken one."""
    options = {"views": [full_view(16)], "engine": engine, "kernel": "torch", "max_bad_fraction": 0.1, **config}
    ours = module(23, dataset="hdf5", train_path=str(packed), **options)
    theirs = folder(images, batch_size=23, **options)
    loaders = ours.train_dataloader(), theirs.train_dataloader()
    for _ in range(2):
        pairs = list(zip(*loaders, strict=True))
        assert len(pairs) == 1
        for batch, other in pairs:
            assert torch.equal(batch.views[0], other.views[0]) and torch.equal(batch.index, other.index)
            assert torch.equal(batch.labels, other.labels)
    assert ours.bad.index == theirs.bad.index == [15] and ours.bad.names == [f"{packed}:b/0003.png"]
    for data in (ours, theirs):
        data.teardown("fit")


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_large_images_by_workers(layout: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "images", {"a": 4, "b": 4}, size=(80, 90))
    path = tmp_path / "x.h5"
    pack.main([str(tmp_path / "images"), str(path)]) if layout == "packed" else group_per_class(tmp_path / "images", path)
    ours = module(4, dataset="hdf5", train_path=str(path), val_path=str(path), num_workers=2, kernel="torch")
    theirs = folder(tmp_path / "images", num_workers=0, batch_size=4, kernel="torch")
    batches = zip(ours.train_dataloader(), theirs.train_dataloader(), strict=True)
    assert all(torch.equal(batch.views[0], other.views[0]) for batch, other in batches)
    assert sum(len(batch.index) for batch in ours.val_dataloader()) == 8
    for data in (ours, theirs):
        data.teardown("fit")


def test_every_kind_of_source_is_packed(images: Path, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "solo")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(images, "train")
    for path in (tmp_path / "x.tar", group_per_class(images, tmp_path / "x.h5", compression="gzip"), packed):
        again = tmp_path / f"{path.suffix[1:]}-again.h5"
        again.unlink(missing_ok=True)
        pack.main([str(path), str(again), "--workers", "1"])
        assert same_images(opened(again), opened(packed)) and np.array_equal(opened(again).labels, opened(packed).labels)
        assert opened(again).name(22).endswith("again.h5:train/é/0003.png" if path.suffix == ".tar" else "again.h5:é/0003.png")
    assert TarSource(tmp_path / "x.tar", "", 3, KEY).classes == opened(packed).classes
    assert f"{again}: 23 images, 0.0 MiB" in caplog.text


def test_parts_and_labels(images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "train")
    make_folder(tmp_path / "val", {"a": 1, "b": 1, "é": 1})
    pack.main([str(tmp_path), str(tmp_path / "val.h5"), "--part", "val"])
    assert [opened(tmp_path / "val.h5").name(i).split(":")[1] for i in (0, 2)] == ["val/a/0000.png", "val/é/0000.png"]
    pack.main([str(images), str(tmp_path / "none.h5"), "--no-labels"])
    source = FolderSource(images, 3, KEY)
    pack.pack(Subset(source, np.array([15, 2])), tmp_path / "some.h5", [""] * 2)
    assert [opened(tmp_path / "some.h5").encoded(i) for i in range(2)] == [source.encoded(15), source.encoded(2)]
    assert opened(tmp_path / "none.h5").classes == [] and set(opened(tmp_path / "none.h5").labels) == {-1}


def test_images_in_many_vectors(images: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also empty ones, first and last."""
    shutil.copytree(images, tmp_path / "images")
    for name in ("a/-.png", "é/9.png", "b/0004.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    monkeypatch.setattr(pack, "_VECTOR", 2000)
    monkeypatch.setattr(pack, "_AT_ONCE", 4)
    pack.main([str(tmp_path / "images"), str(tmp_path / "x.h5")])
    with h5py.File(tmp_path / "x.h5") as file:
        assert len(file["bytes"]) > 3 and all(vector.chunks is None for vector in file["bytes"].values())
    source = opened(tmp_path / "x.h5")
    assert same_images(source, FolderSource(tmp_path / "images", 3, KEY)) and source.encoded(0) == source.encoded(24) == b""


def test_the_listing_tells_other_images(images: Path, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    shutil.copy(packed, tmp_path / "copy.h5")
    (tmp_path / "images" / "a" / "0.jpg").write_bytes((images / "a" / "1.jpg").read_bytes())
    pack.main([str(tmp_path / "images"), str(tmp_path / "x.h5")])
    assert listing(opened(packed)) == listing(opened(tmp_path / "copy.h5")) != listing(opened(tmp_path / "x.h5"))
    groups = [group_per_class(root, tmp_path / f"{i}.h5") for i, root in enumerate((images, images, tmp_path / "images"))]
    assert listing(opened(groups[0])) == listing(opened(groups[1])) != listing(opened(groups[2]))
    assert opened(packed).fingerprint() == opened(packed).fingerprint() != opened(tmp_path / "copy.h5").fingerprint()
    assert opened(packed).fingerprint() != open_hdf5(packed, 1, KEY).fingerprint()


def test_health_of_a_file(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--strict: 1 x unreadable"):
        check.main([str(packed), "--json", str(tmp_path / "x.json"), "--strict"])
    assert "images.h5:b/0003.png" in (tmp_path / "x.json").read_text()


# --- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_a_fork_opens_the_file_for_itself(layout: str, images: Path, packed: Path, tmp_path: Path) -> None:
    """C16."""
    source = opened(packed if layout == "packed" else group_per_class(images, tmp_path / "x.h5"))
    assert source.handle.pid is None                # reading the index leaves nothing open
    before = source.encoded(0)
    held = source.handle.get()
    assert source.handle.pid == os.getpid() and source.handle.get() is held

    def child() -> None:
        assert source.handle.pid != os.getpid()
        assert source.encoded(0) == before and source.handle.pid == os.getpid()
        assert held.closed if layout == "packed" else not held.id.valid     # else HDF5 hands out the parent's once more

    end = confined(child, 1024 * MIB)
    assert end.kind == "returned", end.text
    assert source.handle.get() is held and source.encoded(0) == before
    copy = pickle.loads(pickle.dumps(source))       # as a spawned worker gets it
    assert copy.handle.pid is None and copy.encoded(0) == before


def test_the_file_is_closed_before_python_ends(images: Path, tmp_path: Path) -> None:
    """HDF5 closes behind it what is still open, and would ask a Python that is no longer there."""
    source = opened(group_per_class(images, tmp_path / "x.h5"))
    held = source.handle.get().id
    (last,) = [end for end in weakref.finalize._registry if end.alive and held in end.peek()[2]]
    assert last.atexit and held.valid
    last()
    assert not held.valid


def test_a_fork_while_a_thread_opens_the_file() -> None:
    """C16: the lock of that thread is none of the child's."""
    begun, go, parent = threading.Event(), threading.Event(), os.getpid()

    def open_file() -> io.BytesIO:
        if os.getpid() == parent:
            begun.set()
            go.wait()
        return io.BytesIO()

    handle = PerProcess(open_file)
    thread = threading.Thread(target=handle.get)
    thread.start()
    begun.wait()

    def child() -> None:
        signal.alarm(5)                             # seconds until it counts as stuck
        handle.get()

    end = confined(child, 1024 * MIB)
    go.set()
    thread.join()
    assert end.kind == "returned", end.text


@pytest.fixture
def frequent_switches() -> Iterator[None]:
    """From one thread to another, so that they meet where they rarely do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_share_a_file_until_the_last_lets_go_of_it(packed: Path) -> None:
    together, made = threading.Barrier(THREADS), []

    def open_file() -> io.FileIO:
        time.sleep(0.05)                            # the others come meanwhile
        made.append(io.FileIO(packed))
        return made[-1]

    def get(_: int) -> io.FileIO:
        together.wait()
        return handle.get()

    handle = PerProcess(open_file)
    with ThreadPoolExecutor(THREADS) as pool:
        files = list(pool.map(get, range(THREADS)))
    assert len(made) == 1 and all(file is made[0] for file in files)
    for _ in range(2):                              # the second thread that met the same error
        handle.drop(made[0])
        other = handle.get()
    assert len(made) == 2 and other is made[1] and not any(file.closed for file in made)
    for file in made:
        file.close()


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_threads_that_begin_together_all_read(
    layout: str, images: Path, packed: Path, tmp_path: Path, frequent_switches: None
) -> None:
    """And a file that one of them gave up is still read by the others, then closed."""
    path = packed if layout == "packed" else group_per_class(images, tmp_path / "x.h5")
    source, together = opened(path), threading.Barrier(THREADS)
    right = [source.encoded(i) for i in range(THREADS)]

    def read(i: int) -> bytes:
        together.wait()
        if i == 0:
            source.handle.drop(source.handle.get())
        return source.encoded(i)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(50):
            source = pickle.loads(pickle.dumps(source))
            assert list(pool.map(read, range(THREADS))) == right
    source.handle.drop(source.handle.get())
    assert str(path) not in map(os.path.realpath, Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_a_healthy_file_is_packed_by_many_threads(
    layout: str, images: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk so slow that all of them open the file, and read, at once."""
    path = packed if layout == "packed" else group_per_class(images, tmp_path / "x.h5")
    calls = []
    for place, name in ((hdf5, "stamp"), (hdf5, "read_image"), (os, "pread")):
        at_once = getattr(place, name)
        slow = lambda *words, of=at_once: (calls.append(of), time.sleep(0.003), of(*words))[2]      # noqa: E731
        monkeypatch.setattr(place, name, slow)
    pack.main([str(path), str(tmp_path / "again.h5")])
    monkeypatch.undo()
    assert calls.count(hdf5.stamp) == 3             # to know it, to read its index, and once for all threads
    assert same_images(opened(tmp_path / "again.h5"), opened(packed))


def test_a_file_that_changes_under_way_stops_the_run(images: Path, packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    shutil.copy(packed, path)
    source = opened(path)
    group_per_class(images, tmp_path / "y.h5").rename(path)
    with pytest.raises(DataError, match=f"{path} has changed since it was opened"):
        source.encoded(0)


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_an_error_that_passes_is_tried_again(
    layout: str, images: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(packed if layout == "packed" else group_per_class(images, tmp_path / "x.h5"))
    right = source.encoded(3)
    monkeypatch.setattr(reads, "_WAITS", (0.0, 0.0, 0.0))
    place: Any = (os, "pread") if layout == "packed" else (hdf5._Binary, "readinto")
    read, fails = getattr(*place), [OSError(5, "EIO"), OSError(116, "ESTALE")]

    def flaky(*words: Any) -> Any:
        if fails:
            raise fails.pop()
        return read(*words)

    monkeypatch.setattr(*place, flaky)
    assert source.encoded(3) == right and not fails
    fails[:] = [OSError(13, "no permission")]
    with pytest.raises(BadImage, match="PermissionError"):
        source.encoded(3)


# --- the command --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed(images: Path, packed: Path, tmp_path: Path) -> None:
    def told(error: type[Exception], *words: object) -> str:
        with pytest.raises(error) as caught:
            pack.main([str(word) for word in words])
        return str(caught.value)

    path = tmp_path / "x.h5"
    assert "must be called .h5 or .hdf5" in told(ConfigError, packed, images)
    assert "exists: remove it" in told(ConfigError, images, packed)
    assert "does not exist" in told(ConfigError, tmp_path / "none", path)
    assert "has no validation part" in told(ConfigError, images, path, "--part", "val")
    assert "is not kept encoded" in told(ConfigError, images, path, "--dataset", "digits")
    assert "--workers must be at least 1" in told(ConfigError, images, path, "--workers", 0)
    assert "unrecognized arguments: --workes" in told(ConfigError, images, path, "--workes", 0)
    with pytest.raises(ConfigError, match="image 0 is not kept encoded, so there is nothing to pack"):
        pack.pack(Subset(FakeSource(4, 8, 2, 3, seed=1), np.arange(2)), path, [""] * 2)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in told(EnvironmentFault, images, tmp_path / "file" / "x.h5")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(images, "train")
    with tarfile.open(tmp_path / "x.tar") as archive:
        os.truncate(tmp_path / "x.tar", archive.getmembers()[-1].offset_data + 10)
    assert "cannot be read, so nothing is packed: the archive ends" in told(DataError, tmp_path / "x.tar", path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "x.tar"}


@pytest.mark.parametrize("error", [OSError(5, "EIO"), RuntimeError("two\nlines"), ValueError(), BadImage("half")])
def test_a_reader_that_fails_midway_leaves_no_file(
    error: Exception, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = FolderSource(images, 3, KEY)
    read = source.encoded

    def fails(i: int) -> bytes:
        if i == 20:
            raise error
        return read(i)

    monkeypatch.setattr(source, "encoded", fails)
    with pytest.raises(DataError, match="cannot be read, so nothing is packed: .") as told:
        pack.pack(source, tmp_path / "x.h5", [""] * 23, workers=4)
    assert "\n" not in str(told.value) and source.name(20) in str(told.value) and not list(tmp_path.iterdir())


def test_a_writer_that_is_killed_leaves_no_file_and_its_rest_is_removed(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    source = FolderSource(images, 3, KEY)

    def killed() -> None:
        read = source.encoded
        source.encoded = lambda i: os.kill(os.getpid(), signal.SIGKILL) if i == 20 else read(i)
        pack.pack(source, path, [""] * 23)

    assert confined(killed, 1024 * MIB).kind == "died"
    (rest,) = tmp_path.iterdir()
    assert rest.name.startswith(".x.h5.") and not path.exists()
    pack.pack(source, path, [""] * 23)
    assert list(tmp_path.iterdir()) == [path] and len(opened(path)) == 23


def test_a_full_disk_is_an_environment_fault(images: Path, tmp_path: Path) -> None:
    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
        pack.pack(FolderSource(images, 3, KEY), tmp_path / "x.h5", [""] * 23)

    end = confined(full, 1024 * MIB)
    assert (end.kind, end.code) == ("refused", 5) and "x.h5 cannot be written: " in end.text, end
    assert not list(tmp_path.iterdir())
