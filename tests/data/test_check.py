"""A dataset with one specimen of each trouble, and what ``python -m solo.data.check`` says of it."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from solo.data import check
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.duplicates import dhash, equal_groups, similar_groups, thumbnail
from solo.data.scan import scan
from solo.data.sources import ArraySource, FolderSource
from solo.errors import ConfigError, DataError, EnvironmentFault
from tests.data.common import KINDS, broken, make_folder, picture


def scene(seed: int, height: int = 48, width: int = 64) -> Image.Image:
    """Smooth, and in hardly more than one colour, as photographs are: compression changes it little."""
    grey = picture(seed, height, width, 1).astype(float)
    return Image.fromarray((grey * (0.9, 0.8, 0.6)).astype(np.uint8))


@pytest.fixture(scope="module")
def badset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/{cat,dog} and val/{cat,dog,fox}; every trouble has a file that is named for it."""
    root = tmp_path_factory.mktemp("badset")
    for number, (part, name) in enumerate([(part, name) for part in ("train", "val") for name in ("cat", "dog")]):
        (root / part / name).mkdir(parents=True)
        for i in range(12):
            scene(100 * number + i).save(root / part / name / f"{i:02d}.png")
    (root / "val" / "fox").mkdir()
    scene(900).save(root / "val" / "fox" / "00.png")
    cats, dogs, judged = root / "train" / "cat", root / "train" / "dog", root / "val" / "cat"
    for kind in KINDS:
        (cats / f"bad-{kind}.jpg").write_bytes(broken(kind))
    scene(0).save(cats / "copy-of-00.bmp")
    scene(1).save(dogs / "conflict-with-cat-01.png")
    scene(2).save(cats / "near-02.jpg", quality=70)
    ImageEnhance.Brightness(scene(3)).enhance(0.9).resize((96, 72)).save(cats / "near-03.jpg", quality=90)
    scene(4).save(judged / "leak-of-cat-04.png")
    scene(5).resize((60, 45)).save(judged / "near-leak-of-cat-05.png")
    Image.new("RGB", (64, 48), (90, 90, 90)).save(cats / "blank.png")
    scene(6, 4, 64).save(dogs / "strip.png")
    scene(950).convert("CMYK").save(dogs / "cmyk.tif")
    scene(951).convert("L").save(dogs / "grey.png")
    (dogs / "notes.txt").write_text("no image")
    return root


def report(tmp_path: Path, *arguments: str) -> dict:
    path = tmp_path / "report.json"
    check.main([*arguments, "--json", str(path)])
    return json.loads(path.read_text(encoding="utf-8"))


def names(found: dict, kind: str) -> list[list[str]]:
    return [[f"{image['part']}/{'/'.join(Path(image['name']).parts[-2:])}" for image in one["images"]] for one in found[kind]]


@pytest.fixture(scope="module")
def whole(badset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return report(tmp_path_factory.mktemp("report"), str(badset))


def test_every_trouble_is_found_by_name_and_nothing_else_is(whole: dict) -> None:
    found = whole["found"]
    assert names(found, "unreadable") == [[f"train/cat/bad-{kind}.jpg"] for kind in sorted(KINDS)]
    assert all(one["why"] for one in found["unreadable"])
    assert names(found, "duplicate") == [
        ["train/cat/00.png", "train/cat/copy-of-00.bmp"],
        ["train/cat/01.png", "train/dog/conflict-with-cat-01.png"],
    ]
    assert names(found, "label conflict") == [["train/cat/01.png", "train/dog/conflict-with-cat-01.png"]]
    assert names(found, "near duplicate") == [[f"train/cat/0{i}.png", f"train/cat/near-0{i}.jpg"] for i in (2, 3)]
    assert names(found, "leak") == [["train/cat/04.png", "val/cat/leak-of-cat-04.png"]]
    assert names(found, "near leak") == [["train/cat/05.png", "val/cat/near-leak-of-cat-05.png"]]
    assert names(found, "blank") == [["train/cat/blank.png"]]
    assert names(found, "odd shape") == [["train/dog/strip.png"]] and found["odd shape"][0]["why"] == "64 x 4 px"
    assert [one["why"] for one in found["class"]] == ["class fox is in val only"]


def test_what_is_there_is_counted(whole: dict) -> None:
    train, val = whole["parts"]["train"], whole["parts"]["val"]
    assert (train["images"], train["readable"], train["unlabelled"]) == (37, 32, 0)
    assert train["classes"] == {"cat": 21, "dog": 16} and val["classes"] == {"cat": 14, "dog": 12, "fox": 1}
    assert train["modes"] == {"RGB": 30, "CMYK": 1, "L": 1}
    assert train["width"] == {"min": 64, "median": 64.0, "max": 96} and train["height"]["min"] == 4
    assert (val["width"]["min"], val["width"]["max"]) == (60, 64)


def test_mean_and_std_are_those_of_the_pixels(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 6})
    source = FolderSource(tmp_path, 3, "data.train_path")
    pixels = np.stack([source.load(i) for i in range(6)]) / 255
    mean, std = scan(source, DataConfig(num_workers=0), 3).statistics()
    assert np.allclose(mean, pixels.mean((0, 1, 2)), atol=1e-12) and np.allclose(std, pixels.std((0, 1, 2)), atol=1e-12)


def test_the_table_and_the_picture(badset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture_path = tmp_path / "new folder" / "report.png"
    check.main([str(badset / "train"), "--val", str(badset / "val"), "--picture", str(picture_path)])
    said = capsys.readouterr().out
    for word in ("near leak", "label conflict", "30 RGB, 1 CMYK, 1 L", "16 to 21", "64 to 96", "unreadable"):
        assert word in said
    with Image.open(picture_path) as image:
        assert image.format == "PNG" and image.width > 1000


@pytest.mark.slow
def test_exit_codes(badset: Path, tmp_path: Path) -> None:
    def code(error: type[Exception], *arguments: str) -> str:
        with pytest.raises(error) as caught:
            check.main([str(argument) for argument in arguments])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "1 x leak" in code(DataError, badset, "--strict")
    assert "give the PATH" in code(ConfigError)
    assert "does not exist" in code(ConfigError, tmp_path / "typo")
    assert "--dataset NAME" in code(ConfigError, badset / "train" / "dog" / "notes.txt")
    assert "did you mean 'digits'" in code(ConfigError, "--dataset", "digit")
    assert "--workers" in code(ConfigError, badset, "--workers", "-1")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in code(EnvironmentFault, badset, "--json", tmp_path / "file" / "x.json")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.jpg").write_bytes(b"")
    assert "none of the 1 train images can be read" in code(DataError, tmp_path / "none", "--picture", tmp_path / "p.png")
    make_folder(tmp_path / "good", {"a": 3, "b": 3})
    check.main([str(tmp_path / "good"), "--strict"])


def test_every_kind_of_source(badset: Path, tmp_path: Path, whole: dict) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as archive:
        archive.add(badset / "train", "train")
    found = report(tmp_path, str(tmp_path / "train.tar"))
    assert found["parts"] == {"train": whole["parts"]["train"]}
    kinds = ("unreadable", "label conflict", "near duplicate", "blank", "odd shape")
    assert {kind: len(found["found"][kind]) for kind in kinds} == {kind: len(whole["found"][kind]) for kind in kinds}
    files = [(badset / "train" / "cat" / f"0{i}.png").read_bytes() for i in (0, 1, 0, 2)]
    bounds = np.cumsum([0, *map(len, files)])
    data = np.frombuffer(b"".join(files), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", jpeg=data, offsets=bounds, labels=[0, 0, 0, 1], split=[0, 0, 1, 1], classes=["a", "b", "c"])
    found = report(tmp_path, str(tmp_path / "x.npz"))
    assert [[image["name"] for image in one["images"]] for one in found["found"]["leak"]] == [["image 0", "image 2"]]
    assert "train: class c has no image" in [one["why"] for one in found["found"]["class"]]
    found = report(tmp_path, "--dataset", "digits")
    assert found["parts"]["train"]["readable"] > 1000 and set(found["parts"]) == {"train", "val"}


def test_workers_see_the_same() -> None:
    rng = np.random.default_rng(0)
    source = ArraySource(rng.integers(0, 256, (600, 8, 8, 3), dtype=np.uint8), np.zeros(600), ["a"], unreadable={70: "gone"})
    alone, shared = (scan(source, DataConfig(num_workers=workers), 3) for workers in (0, 2))
    assert alone.failed == shared.failed == [(70, "gone")] and 70 not in alone.index and len(alone) == 599
    for name in ("index", "digest", "thumbnail", "mean", "square", "height", "mode"):
        assert np.array_equal(getattr(alone, name), getattr(shared, name)), name


# --- the search -------------------------------------------------------------------------------------------------------


def noise(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, 16, 18), dtype=np.uint8)


def test_dhash_is_its_definition() -> None:
    cells = noise(3)
    for image, found in zip(cells, dhash(cells), strict=True):
        sums = [[image[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum(dtype=int) for x in range(9)] for y in range(8)]
        bits = [int(row[x] < row[x + 1]) for row in sums for x in range(8)]
        assert np.unpackbits(np.array([found]).view(np.uint8)).tolist() == bits


def test_the_search_finds_what_comparing_all_with_all_finds() -> None:
    """Pairs of known distance: all up to three bits, none beyond eight; chains are one group."""
    thumbnails = np.array([thumbnail(scene(i)) for i in range(150)])
    rng = np.random.default_rng(1)
    copies = np.clip(thumbnails[:100] + rng.normal(0, 6, (100, 16, 18)), 0, 255).astype(np.uint8)
    every = np.concatenate([thumbnails, copies])
    bits = np.unpackbits(dhash(every).view(np.uint8).reshape(-1, 8), axis=1).astype(int)
    distance = (bits[:, None] != bits[None]).sum(-1)
    values = every.reshape(len(every), -1).astype(float)
    alike = np.corrcoef(values) >= 0.95
    group = np.full(len(every), -1)
    for number, members in enumerate(similar_groups(every)):
        group[members] = number
    together = (group[:, None] == group[None]) & (group[:, None] >= 0)
    must = alike & (distance <= 3) & ~np.eye(len(every), dtype=bool)
    assert must.sum() > 40 and together[must].all()
    reach = alike & (distance <= 8)
    for _ in range(8):
        reach = reach @ reach
    assert not (together & ~reach).any()


@pytest.mark.parametrize(("bits", "found"), [(8, 1), (9, 0)])
def test_a_pair_whose_hashes_differ_in_more_than_eight_bits_is_none(bits: int, found: int) -> None:
    """Thumbnails that correlate by 0.99: rows far apart, each rising gently; where a step is flat, a bit is another."""
    cells = 25 * np.arange(8)[:, None] + np.arange(9)  # [8, 9], of 2 x 2 pixels
    other = cells.copy()
    for row, flat in enumerate([2] * (bits // 2) + [bits % 2], start=2):
        other[row, 9 - flat :] = other[row, 8 - flat]
    pair = np.stack([cells, other]).astype(np.uint8).repeat(2, axis=1).repeat(2, axis=2)
    first, second = np.unpackbits(dhash(pair).view(np.uint8).reshape(2, 8), axis=1)
    assert (first != second).sum() == bits and np.corrcoef(pair.reshape(2, -1))[0, 1] > 0.99
    assert len(similar_groups(pair)) == found


def test_thousands_of_one_scene_are_one_group_in_little_time() -> None:
    frames = np.clip(noise(1) + np.random.default_rng(2).normal(0, 4, (4000, 16, 18)), 0, 255).astype(np.uint8)
    groups = similar_groups(frames)
    assert len(groups) == 1 and len(groups[0]) == 4000


def test_nothing_is_found_where_nothing_is() -> None:
    assert similar_groups(noise(2000)) == [] and similar_groups(noise(0)) == []
    assert similar_groups(np.full((50, 16, 18), 7, dtype=np.uint8)) == []  # blank
    assert equal_groups(np.zeros((0, 16), dtype=np.uint8)) == []
    rows = np.array([[1, 2], [0, 5], [1, 2], [0, 5], [3, 3]], dtype=np.uint8)
    assert [group.tolist() for group in equal_groups(rows)] == [[0, 2], [1, 3]]


@pytest.mark.slow
def test_cifar_10_has_the_near_duplicates_it_is_known_for(shared_data: Callable[[str], Path]) -> None:
    config = DataConfig(dataset="npz", train_path=str(shared_data("cifar10-jpeg.npz")))
    source = DATASETS["npz"].open(config, True)
    assert source is not None
    seen = scan(source, config, 3)
    assert np.allclose(seen.statistics()[0], DATASETS["cifar10"].mean, atol=2e-3) and not seen.failed
    assert np.allclose(seen.statistics()[1], DATASETS["cifar10"].std, atol=3e-3)
    groups = similar_groups(seen.thumbnail)
    assert 100 < len(groups) < 300 and max(map(len, groups)) < 20
    same = [len(set(source.labels[seen.index[group]])) == 1 for group in groups]
    assert np.mean(same) > 0.95
