"""What a wrong request for data gets: one line that names the key."""

import os
from errno import EACCES, EIO, ESTALE
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from solo.data import reads
from solo.data.config import DataConfig
from solo.errors import ConfigError, DataError
from tests.data.common import folder, make_folder, module


def refused(path: Path, **config: object) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        folder(path, **config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_paths(tmp_path: Path) -> None:
    assert "data.train_path is missing" in str(pytest.raises(ConfigError, module, dataset="image_folder").value)
    said = refused(tmp_path / "typo" / "deeper")
    assert "data.train_path=" in said and "does not exist" in said and str(tmp_path) in said
    (tmp_path / "file.jpg").write_bytes(b"x")
    assert "is a file" in refused(tmp_path / "file.jpg")
    assert refused(tmp_path / ("x" * 5000)).endswith("cannot be reached: File name too long")
    (tmp_path / "empty").mkdir()
    assert "no images there" in refused(tmp_path / "empty")
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "notes.txt").write_text("x")
    assert "1 .txt" in refused(tmp_path / "texts")
    make_folder(tmp_path / "good", {"a": 8})
    assert "data.val_path=" in refused(tmp_path / "good", val_path=str(tmp_path / "none"))
    assert refused(tmp_path / "good", val_path="x" * 5000).endswith("cannot be reached: File name too long")


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Names of folders -> the errors that the next attempts to list them meet."""
    scandir, errors = os.scandir, dict[str, list[int]]()

    def guarded(path: str | Path) -> Any:
        if waiting := errors.get(Path(path).name):
            raise OSError(code := waiting.pop(0), os.strerror(code), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(reads, "_WAITS", (0.0, 0.0, 0.0))
    return errors


def test_a_folder_that_cannot_be_listed_is_refused_by_name(tmp_path: Path, closed: dict[str, list[int]]) -> None:
    """Whoever trusts the count of images hears of it; what passes is tried again, and nobody looks into a disk's own."""
    make_folder(tmp_path, {"a": 8, "b": 8, "b/deep": 8, "lost+found": 1})
    closed |= {"deep": [EACCES], "lost+found": [EACCES]}
    said = f"the folder {tmp_path}/b/deep cannot be listed (Permission denied), so its images cannot be counted: "
    assert refused(tmp_path).startswith(said)
    closed |= {"deep": [], "b": [EIO, ESTALE, EIO]}
    assert len(folder(tmp_path).labels) == 24 and closed == {"deep": [], "b": [], "lost+found": [EACCES]}
    closed |= {"b": [EIO] * 4}
    assert "/b cannot be listed (Input/output error)" in refused(tmp_path)


def test_a_neighbour_that_cannot_be_listed_is_refused_where_it_is_to_evaluate_on(
    tmp_path: Path, closed: dict[str, list[int]]
) -> None:
    for name in ("train", "test", "others"):
        make_folder(tmp_path / name, {"a": 8})
    closed |= {"others": [EACCES] * 9}
    data = folder(tmp_path)
    assert len(data.labels) == 8 and data.bad_val is not None and len(closed["others"]) < 9
    closed |= {"test": [EACCES] * 9}
    assert f"{tmp_path}/test cannot be listed" in refused(tmp_path)


def test_a_folder_around_the_images_that_cannot_be_listed_is_not_looked_through(
    tmp_path: Path, closed: dict[str, list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path / "all", {"train/a": 8, "train/b": 8, "val/a": 4, "val/b": 4})
    closed |= {"all": [EACCES] * 9}
    caplog.set_level("INFO", "solo")
    data = folder(tmp_path / "all" / "train")
    assert len(data.labels) == 16 and data.val_dataloader() == []
    (note,) = [record.getMessage() for record in caplog.records if "note: " in record.getMessage()]
    assert note == (f"note: no folder to validate on was looked for beside {tmp_path}/all/train, as {tmp_path}/all "
                    "cannot be listed: data.val_path=FOLDER names one")
    caplog.clear()
    assert folder(tmp_path / "all" / "train", val_path=str(tmp_path / "all" / "val")).val_dataloader() != []
    assert "note: " not in caplog.text


def test_files_that_only_pretend_to_be_images(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for i in range(10):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(b"not an image")
    assert "none of 8 images tried can be read" in refused(tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "cifar20", "stl10"])
def test_absent_datasets_name_the_download_key(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="data.train_path.*data.download=true"):
        module(dataset=dataset, train_path=str(tmp_path))


def test_unknown_dataset_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        module(dataset="digit")


def test_zero_steps() -> None:
    with pytest.raises(ConfigError, match="optimizer.batch_size=65.*0 steps; use at most 64"):
        module(65, dataset="fake", train_size=64)


def test_classes_of_training_and_validation_differ(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"cat": 4, "dog": 4})
    make_folder(tmp_path / "val", {"cat": 2, "fox": 2})
    said = refused(tmp_path / "train")
    assert "only in training: dog" in said and "only in validation: fox" in said


@pytest.mark.parametrize("change", [{"fraction": 0.0}, {"num_workers": -1}, {"timeout": 0.0}, {"in_chans": 2}, {"std": [0.0]}])
def test_config_ranges(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        DataConfig(**change)


def test_mean_must_have_one_value_per_channel() -> None:
    with pytest.raises(ConfigError, match="data.mean must have 3 values"):
        module(dataset="fake", mean=[0.5])


@pytest.mark.parametrize("contents", ["nothing", "keys", "offsets", "pickle"])
def test_damaged_npz(contents: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    arrays = {
        "jpeg": np.zeros(10, dtype=np.uint8),
        "offsets": np.array([0, 5, 10]),
        "labels": np.zeros(2, dtype=np.uint8),
        "split": np.zeros(2, dtype=np.uint8),
        "classes": np.array(["a"]),
    }
    if contents == "keys":
        del arrays["split"]
    if contents == "offsets":
        arrays["offsets"] = np.array([0, 5, 12])
    if contents == "pickle":
        arrays["classes"] = np.array([{}], dtype=object)
    np.savez(path, **arrays)
    if contents == "nothing":
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="data.train_path=.*data.npz"):
        module(dataset="npz", train_path=str(path))


def test_labels_out_of_range(tmp_path: Path) -> None:
    arrays = {"jpeg": np.zeros(10, np.uint8), "offsets": np.array([0, 5, 10]), "labels": np.array([0, 3], np.uint8)}
    np.savez(tmp_path / "data.npz", **arrays, split=np.zeros(2, np.uint8), classes=np.array(["a"]))
    with pytest.raises(ConfigError, match=r"data.train_path: 1 labels lie outside 0..0, the first: 3 of image 1"):
        module(dataset="npz", train_path=str(tmp_path / "data.npz"))
