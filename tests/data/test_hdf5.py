"""Images in one HDF5 file: packed by ours, or grouped as solo-learn's users have them."""

import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from solo.data import check, decoding, hdf5, pack
from solo.data.decoding import BadImage
from solo.data.hdf5 import GroupedSource, PackedSource, open_hdf5
from solo.data.sources import FolderSource, Source, listing
from solo.data.tar import TarSource
from solo.errors import ConfigError, DataError, EnvironmentFault
from tests.attacks.sandbox import MIB, confined
from tests.data.common import broken, folder, full_view, make_folder, module, picture

KEY = "data.train_path"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of PNG and JPEG files of one size, and one that is broken."""
    root = tmp_path_factory.mktemp("images")
    make_folder(root, {"b": 7, "a": 5, "é": 4})
    for i in range(7):
        Image.fromarray(picture(50 + i, 20, 24)).save(root / "a" / f"{i}.jpg")
    (root / "b" / "0003.png").write_bytes(broken("truncated"))
    return root


@pytest.fixture(scope="module")
def packed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "images.h5"
    pack.main([str(images), str(path)])
    return path


def group_per_class(images: Path, path: Path, **options: object) -> Path:
    """As solo-learn's users write it."""
    with h5py.File(path, "w") as file:
        for image in sorted(images.rglob("*.*")):
            content = np.frombuffer(image.read_bytes(), np.uint8)
            file.create_dataset(image.relative_to(images).as_posix(), data=content, **options)
    return path


def opened(path: Path) -> Source:
    return open_hdf5(path, 3, KEY)


def refused(path: Path, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        opened(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


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


def test_a_file_that_changes_under_way_stops_the_run(images: Path, packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    shutil.copy(packed, path)
    source = opened(path)
    group_per_class(images, tmp_path / "y.h5").rename(path)
    with pytest.raises(DataError, match=f"{path} has changed since it was opened"):
        source.encoded(0)


def test_an_error_that_passes_is_tried_again(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, right = opened(packed), opened(packed).encoded(3)
    monkeypatch.setattr(decoding, "_WAITS", (0.0, 0.0, 0.0))
    read, fails = os.pread, [OSError(5, "EIO"), OSError(116, "ESTALE")]

    def flaky(*words: int) -> bytes:
        if fails:
            raise fails.pop()
        return read(*words)

    monkeypatch.setattr(os, "pread", flaky)
    assert source.encoded(3) == right and not fails
    fails[:] = [OSError(13, "no permission")]
    with pytest.raises(BadImage, match="PermissionError"):
        source.encoded(3)


# --- damage -----------------------------------------------------------------------------------------------------------


def test_what_is_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a file" in refused(tmp_path, ConfigError) and "is not a file" in refused(tmp_path / "x.h5", ConfigError)
    (tmp_path / "x.h5").write_bytes(b"")
    assert "is no HDF5 file" in refused(tmp_path / "x.h5", ConfigError)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["images"] = np.zeros((3, 8, 8, 3), np.uint8)
    assert "images is no group of images" in refused(tmp_path / "x.h5", ConfigError)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file.create_group("a")
    assert "holds no images" in refused(tmp_path / "x.h5", ConfigError)
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["a/x"] = np.zeros((3, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="none of 8 images tried can be read.*x.h5:a/x: neither a vector of uint8"):
        module(1, dataset="hdf5", train_path=str(tmp_path / "x.h5"))
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install 'solo-ssl[h5]'" in str(pytest.raises(EnvironmentFault, opened, tmp_path / "x.h5").value)
    assert "data.train_path is missing" in str(pytest.raises(ConfigError, module, dataset="hdf5").value)


@pytest.mark.parametrize("layout", ["packed", "groups"])
def test_a_cut_file(layout: str, images: Path, packed: Path, tmp_path: Path) -> None:
    whole = packed if layout == "packed" else group_per_class(images, tmp_path / "y.h5")
    size = whole.stat().st_size
    for end in (size - 1, size // 2, 100):
        (tmp_path / "x.h5").write_bytes(whole.read_bytes()[:end])
        assert f"ends at byte {end} of {size}" in refused(tmp_path / "x.h5")


def test_what_is_cut_later_is_a_bad_image(packed: Path, tmp_path: Path) -> None:
    shutil.copy(packed, tmp_path / "x.h5")
    source = opened(tmp_path / "x.h5")
    assert source.encoded(0)
    os.truncate(tmp_path / "x.h5", int(source._places[5]) + 10)
    assert source.encoded(4)
    with pytest.raises(BadImage, match=f"the file ends {len(opened(packed).encoded(5)) - 10} bytes before the image does"):
        source.encoded(5)


def altered(packed: Path, path: Path, change: Callable[[h5py.File], object], seal: bool = False) -> Path:
    """A packed file in which something was changed, under a checksum that is right again if ``seal``."""
    shutil.copy(packed, path)
    with h5py.File(path, "r+") as file:
        change(file)
        if seal:
            file.attrs["complete"] = hdf5.checksum(**{name: file[name][()] for name in hdf5.ARRAYS})
    return path


def put(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


def test_an_index_that_is_wrong(packed: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(packed) as file:
        offsets, labels, first = file["offsets"][()], file["labels"][()], file["bytes/000000"][()]
    assert "incomplete" in refused(altered(packed, path, lambda file: file.attrs.__delitem__("complete")))
    assert "newer version" in refused(altered(packed, path, lambda file: file.attrs.__setitem__("solo_images", 2)))
    for name, value in (("labels", labels[::-1]), ("offsets", offsets + 1), ("classes", np.array([b"x"] * 3))):
        assert "checksum" in refused(altered(packed, path, put(name, value))), name
    backwards = offsets.copy()
    backwards[3] = backwards[1] - 1
    for wrong in (offsets + 1, offsets[:-1], backwards, offsets.astype(np.uint64) - (offsets > 0).astype(np.uint64) * 9000):
        assert "do not describe" in refused(altered(packed, path, put("offsets", wrong), seal=True)), wrong
    assert "same images" in refused(altered(packed, path, put("labels", labels[1:]), seal=True))

    def halves(file: h5py.File) -> None:
        del file["bytes/000000"]
        file["bytes/0"], file["bytes/1"] = first[: offsets[3] + 1], first[offsets[3] + 1 :]

    assert "in two" in refused(altered(packed, path, halves))
    with pytest.raises(ConfigError, match="labels lie outside 0..2"):
        module(1, dataset="hdf5", train_path=str(altered(packed, path, put("labels", labels + 1), seal=True)))


def test_a_bad_dataset_among_good_ones_is_a_bad_image(images: Path, tmp_path: Path) -> None:
    path = group_per_class(images, tmp_path / "x.h5")
    with h5py.File(path, "r+") as file:
        for name in ("a/0.jpg", "b/0002.png", "b/0005.png"):
            del file[name]
        file["a/0.jpg"], file["b/0002.png"] = "text", np.zeros((3, 3))
        file.create_group("b/0005.png")
    data = module(dataset="hdf5", train_path=str(path), max_bad_fraction=0.3, num_workers=0, engine="torchvision")
    assert [len(batch.index) for batch in data.clean_loader(train=True)] == [7, 6, 6]
    assert [name.split(":")[1] for name in data.bad.names] == ["a/0.jpg", "b/0002.png", "b/0003.png", "b/0005.png"]


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
    assert "does not hold encoded images" in told(ConfigError, images, path, "--dataset", "digits")
    assert "--workers must be at least 1" in told(ConfigError, images, path, "--workers", 0)
    assert "unrecognized arguments: --workes" in told(ConfigError, images, path, "--workes", 0)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in told(EnvironmentFault, images, tmp_path / "file" / "x.h5")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(images, "train")
    with tarfile.open(tmp_path / "x.tar") as archive:
        os.truncate(tmp_path / "x.tar", archive.getmembers()[-1].offset_data + 10)
    assert "cannot be read, so nothing is packed: the archive ends" in told(DataError, tmp_path / "x.tar", path)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "x.tar"}


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


# --- foreign code -----------------------------------------------------------------------------------------------------


def test_no_plugin_is_loaded(images: Path, tmp_path: Path) -> None:
    """A filter's library that touches a file when loaded: HDF5 alone loads it, this library does not."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    ran, path = tmp_path / "RAN", tmp_path / "x.h5"
    (tmp_path / "x.c").write_text(f"""#include <fcntl.h>
__attribute__((constructor)) static void run(void) {{ open("{ran}", O_CREAT | O_WRONLY, 0600); }}
int H5PLget_plugin_type(void) {{ return 0; }}
const void *H5PLget_plugin_info(void) {{ return 0; }}
""")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libx.so", tmp_path / "x.c"], check=True)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((4,))
    properties.set_filter(32123, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((4,))
        made = h5py.h5d.create(file.create_group("a").id, b"0", h5py.h5t.NATIVE_UINT8, space, properties)
        made.write_direct_chunk((0,), b"1234")

    def plainly() -> None:
        h5py.h5pl.append(str(tmp_path).encode())
        try:
            h5py.File(path)["a/0"][()]
        except OSError:
            pass

    def ours() -> None:
        h5py.h5pl.append(str(tmp_path).encode())
        with pytest.raises(BadImage, match="filtered by HDF5's number 32123: only gzip and shuffle are read"):
            opened(path).load(0)
        assert h5py.h5pl.size() == 0

    end = confined(ours, 1024 * MIB)
    assert end.kind == "returned" and not ran.exists(), end.text
    confined(plainly, 1024 * MIB)
    assert ran.exists()
