"""Images in a tar file, whatever else somebody put there."""

import errno
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from solo.data import reads
from solo.data.config import DataConfig
from solo.data.decoding import BadImage
from solo.data.module import DataModule
from solo.data.tar import TarSource
from solo.data.views import View
from solo.errors import ConfigError
from tests.data.common import picture


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, 80, 90)).save(file, "PNG")
    return file.getvalue()


def pack(path: Path, names: list[str], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as archive:
        for i, name in enumerate(names):
            member = tarfile.TarInfo(name)
            content = png(i)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


NAMES = ["train/b/1.png", "train/a/0.png", "train/b/0.png", "train/a/1.png"]


def test_sorted_labelled_and_decoded(tmp_path: Path) -> None:
    source = TarSource(pack(tmp_path / "x.tar", NAMES), "", 3, "data.train_path")
    assert len(source) == 4 and source.classes == ["a", "b"] and source.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(source.load(0), picture(1, 80, 90)) and source.name(3).endswith("x.tar:train/b/1.png")
    data = DataModule(DataConfig(dataset="tar", train_path=str(tmp_path / "x.tar"), num_workers=0), [View(crop_size=16)], 2, 1)
    assert [batch.views[0].shape for batch in data.train_dataloader()] == [(2, 3, 16, 16)] * 2


def test_what_is_no_plain_image_is_left_out_and_nothing_is_written(tmp_path: Path) -> None:
    names = [*NAMES, "train/a/0.png", "../../evil/c.png", "train/a/notes.txt"]
    links = {"train/a/passwd.png": "/etc/passwd"}
    source = TarSource(pack(tmp_path / "x.tar", names, links), "train", 3, "data.train_path")
    assert len(source) == 4
    assert source.ignored == {"links or devices": 1, "members of a name that is taken": 1, "other files": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.tar"]


def test_a_cut_archive_loses_what_is_cut(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.tar", NAMES)
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 100])
    source = TarSource(path, "", 3, "data.train_path")
    readable = []
    for i in range(len(source)):
        try:
            source.load(i)
            readable.append(source.name(i).split(":")[1])
        except BadImage as error:
            assert "the archive ends" in str(error)
    assert readable == ["train/a/0.png", "train/b/0.png", "train/b/1.png"]


def test_an_error_that_passes_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C5."""
    source = TarSource(pack(tmp_path / "x.tar", NAMES), "", 3, "data.train_path")
    monkeypatch.setattr(reads, "_WAITS", (0.0, 0.0, 0.0))
    opened, fails = Path.open, [OSError(errno.EIO, "EIO"), OSError(errno.ESTALE, "ESTALE")]

    def flaky(path: Path, mode: str) -> io.IOBase:
        if fails:
            raise fails.pop()
        return opened(path, mode)

    monkeypatch.setattr(Path, "open", flaky)
    assert source.encoded(0) == png(1) and not fails
    fails[:] = [OSError(errno.EIO, "no luck")] * 4
    with pytest.raises(BadImage, match="OSError: no luck"):
        source.encoded(0)
    assert not fails


@pytest.mark.parametrize("content", [b"", b"no archive at all", None])
def test_no_archive(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="data.train_path=.*x.tar"):
        TarSource(path, "", 3, "data.train_path")
