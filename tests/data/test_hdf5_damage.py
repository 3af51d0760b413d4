"""HDF5 files that are damaged, wrong, or lead elsewhere."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from solo.data import hdf5, reads
from solo.data.decoding import BadImage
from solo.errors import ConfigError, DataError, EnvironmentFault
from tests.attacks.sandbox import MIB, confined
from tests.data.common import module
from tests.data.hdf5_files import group_per_class, opened


def refused(path: Path, error: type[Exception] = DataError) -> str:
    with pytest.raises(error) as caught:
        opened(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


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


def test_a_mistake_of_ours_is_no_bad_image(images: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(group_per_class(images, tmp_path / "x.h5"))
    for error in (KeyError("ours"), TypeError("ours")):

        def mistaken(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(hdf5, "read_image", mistaken)
        with pytest.raises(type(error), match="ours"):
            source.encoded(0)
        monkeypatch.setattr(hdf5, "checksum", lambda error=error, **_: mistaken(error=error))
        with pytest.raises(type(error), match="ours"):
            opened(packed)


def test_a_size_that_cannot_be_asked_for_is_no_size(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(group_per_class(images, tmp_path / "x.h5"))
    right, fails = source.listing(), [OSError(5, "EIO"), OSError(116, "ESTALE")]
    monkeypatch.setattr(reads, "_WAITS", (0.0, 0.0, 0.0))
    size = hdf5.stored_size

    def flaky(dataset: object) -> int:
        if fails:
            raise fails.pop()
        return size(dataset)

    monkeypatch.setattr(hdf5, "stored_size", flaky)
    assert source.listing() == right and not fails
    fails[:] = [OSError(13, "no permission")]
    with pytest.raises(DataError, match="x.h5 cannot be read: .*no permission"):
        source.listing()
    fails[:] = [OSError("HDF5's own")]
    _, (first, *rest) = source.listing()
    assert first == -1 and rest == right[1][1:]


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
