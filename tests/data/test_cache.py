"""Decoded images are kept, and what is kept is never taken for more than it is."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from solo.data import cache, sources
from solo.data.config import DataConfig
from solo.data.module import DataModule
from solo.data.sources import ArraySource
from solo.data.views import View
from tests.data.common import make_folder

N = 24


@pytest.fixture(autouse=True)
def decodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Few images are worth keeping here; the files that were decoded since."""
    seen: list[str] = []
    original = sources.decode

    def counted(file: object, in_chans: int) -> np.ndarray:
        seen.append(str(file))
        return original(file, in_chans)  # type: ignore[arg-type]

    monkeypatch.setattr(cache, "WORTH", 2)
    monkeypatch.setattr(sources, "decode", counted)
    yield seen


@pytest.fixture
def images(tmp_path: Path) -> Path:
    paths = make_folder(tmp_path / "images", {"a": N // 2, "b": N // 2})
    paths[3].write_bytes(b"not an image")
    return tmp_path / "images"


def read(images: Path, kept: Path, **config: object) -> ArraySource:
    options = {"dataset": "image_folder", "train_path": str(images), "cache_dir": str(kept), "max_bad_fraction": 0.5, **config}
    data = DataModule(DataConfig(**options), [View(crop_size=8)], 4, seed=1)  # type: ignore[arg-type]
    assert data.engine == "fast" and isinstance(data._train, ArraySource)
    assert data.bad.index == ([3] if len(data._train) == N else data.bad.index)
    return data._train


def built(decodes: list[str]) -> bool:
    """Whether more was decoded than a look at a few images takes; forgets what was."""
    count = len(decodes)
    decodes.clear()
    assert count < 3 or count >= N // 2
    return count >= N // 2


def test_a_second_start_decodes_nothing(images: Path, tmp_path: Path, decodes: list[str]) -> None:
    first = read(images, tmp_path / "kept")
    assert built(decodes)
    second = read(images, tmp_path / "kept")
    assert not built(decodes)
    assert np.array_equal(first.images, second.images)
    assert first.unreadable == second.unreadable and set(first.unreadable) == {3}
    assert first.labels.tolist() == second.labels.tolist() and second.name(5) == first.name(5)
    second.images[0] = 0  # pages of our own
    assert np.array_equal(read(images, tmp_path / "kept").images, first.images)
    assert sorted(path.suffix for path in (tmp_path / "kept").iterdir() if path.suffix != ".lock") == [".json", ".npy"]


@pytest.mark.parametrize("change", ["contents", "time", "one more", "one fewer", "grey", "part", "elsewhere"])
def test_other_images_are_decoded(change: str, images: Path, tmp_path: Path, decodes: list[str]) -> None:
    read(images, tmp_path / "kept")
    assert built(decodes)
    file, config = images / "a" / "0001.png", {}
    if change == "contents":
        file.write_bytes((images / "b" / "0002.png").read_bytes())
    elif change == "time":
        os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    elif change == "one more":
        (images / "a" / "more.png").write_bytes(file.read_bytes())
    elif change == "one fewer":
        file.unlink()
    elif change == "elsewhere":
        images = images.rename(images.with_name("moved"))
    config = {"grey": {"in_chans": 1}, "part": {"train_size": N // 2}}.get(change, {})
    read(images, tmp_path / "kept", **config)
    assert built(decodes)


@pytest.mark.parametrize("damage", ["byte", "truncated", "no facts", "half the facts", "other facts", "empty", "gone"])
def test_a_damaged_file_is_made_anew(
    damage: str, images: Path, tmp_path: Path, decodes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    kept = tmp_path / "kept"
    whole = read(images, kept).images.copy()
    assert built(decodes)
    pixels, facts = next(kept.glob("*.npy")), next(kept.glob("*.json"))
    content = bytearray(pixels.read_bytes())
    content[-100] ^= 1
    {
        "byte": lambda: pixels.write_bytes(content),
        "truncated": lambda: pixels.write_bytes(content[: len(content) // 2]),
        "no facts": facts.unlink,
        "half the facts": lambda: facts.write_text(facts.read_text()[:9]),
        "other facts": lambda: facts.write_text("[]"),
        "empty": lambda: pixels.write_bytes(b""),
        "gone": pixels.unlink,
    }[damage]()
    assert np.array_equal(read(images, kept).images, whole) and built(decodes)
    assert ("is damaged" in caplog.text) == (damage not in ("no facts", "gone"))
    assert np.array_equal(read(images, kept).images, whole) and not built(decodes)


def test_a_folder_that_cannot_be_written_is_done_without(
    images: Path, tmp_path: Path, decodes: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        assert read(images, tmp_path / "file" / "kept").images.any()
        assert built(decodes) and "not kept" in caplog.text


def test_a_full_disk_leaves_nothing_half_written(
    images: Path, tmp_path: Path, decodes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.np, "save", full)
        assert read(images, tmp_path / "kept").images.any() and built(decodes)
    assert not [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".lock"]
    read(images, tmp_path / "kept")
    assert built(decodes)


def test_of_several_at_once_one_decodes(images: Path, tmp_path: Path, decodes: list[str]) -> None:
    found: list[ArraySource] = []
    threads = [threading.Thread(target=lambda: found.append(read(images, tmp_path / "kept"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(np.array_equal(found[0].images, other.images) for other in found)
    assert len(decodes) < 2 * N  # and not four times


def test_few_images_are_not_worth_a_file(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH", N + 1)
    read(images, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, images: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    read(images, None, cache_dir=None)  # type: ignore[arg-type]
    assert list((tmp_path / "home" / "solo").glob("*.npy"))


def test_images_of_many_sizes_are_left_alone(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", {"a": 4})
    make_folder(tmp_path / "images", {"b": 4}, size=(30, 30))
    config = DataConfig(dataset="image_folder", train_path=str(tmp_path / "images"), cache_dir=str(tmp_path / "kept"))
    assert not isinstance(DataModule(config, [View(crop_size=8)], 4, seed=1).job.source, ArraySource)
    assert not list((tmp_path / "kept").glob("*.npy"))
