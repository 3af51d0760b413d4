"""Datasets and the module that serves them."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from solo.batch import Batch
from solo.data import module as module_file
from solo.data.datasets import DATASETS
from solo.data.decoding import convert_channels
from solo.data.engines.torchvision import TorchvisionEngine
from solo.data.loaders import Order, Position
from solo.data.module import DataConfig, DataModule
from solo.data.random import order
from solo.data.sources import ArraySource, FolderSource
from solo.data.subsets import stratified
from solo.data.views import Crop, View
from solo.errors import ConfigError
from tests.data.common import full_view, make_folder, picture


def module(batch_size: int = 16, views: list[View] | None = None, **config: object) -> DataModule:
    return DataModule(DataConfig(**config), [full_view()] if views is None else views, batch_size, seed=1)


def knn(train: ArraySource, test: ArraySource, k: int = 20) -> float:
    bank, queries = (
        torch.nn.functional.normalize(torch.from_numpy(s.images.reshape(len(s), -1)).float() / 255) for s in (train, test)
    )
    similarity, nearest = (queries @ bank.T).topk(k)
    votes = torch.zeros(len(test), 10).scatter_add_(1, torch.from_numpy(train.labels)[nearest], (similarity / 0.07).exp())
    return (votes.argmax(1).numpy() == test.labels).mean().item()


def opened(name: str) -> tuple[ArraySource, ArraySource]:
    row, config = DATASETS[name], DataConfig(dataset=name)
    return row.open(config, True), row.open(config, False)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "sizes"), [("digits", (1400, 397)), ("colored_digits", (1400, 397))])
def test_embedded_datasets(name: str, sizes: tuple[int, int]) -> None:
    train, test = opened(name)
    assert (len(train), len(test)) == sizes and train.images.shape[1:] == (32, 32, 3)
    assert set(train.labels) == set(test.labels) == set(range(10)) and train.classes == [str(i) for i in range(10)]
    assert np.array_equal(train.images, opened(name)[0].images)
    pixels, row = train.images / 255, DATASETS[name]
    assert np.allclose(pixels.mean((0, 1, 2)), row.mean, atol=2e-3) and np.allclose(pixels.std((0, 1, 2)), row.std, atol=2e-3)
    assert knn(train, test) > 0.95 if name == "digits" else knn(train, test) < 0.9


def test_test_digits_are_not_training_digits() -> None:
    train, test = opened("digits")
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in test.images) < 4  # a few people wrote the same 8 x 8 digit


def test_npz_of_real_images(shared_data: Callable[[str], Path]) -> None:
    path = str(shared_data("cifar10-jpeg.npz"))
    data = module(dataset="npz", train_path=path, train_size=500)
    assert data.spec.classes == 10 and (np.bincount(data._train.labels) == 50).all()
    assert data.engine == "fast"
    batch = next(iter(data.train_dataloader()))
    assert batch.views[0].shape == (16, 3, 32, 32) and abs(batch.views[0].mean()) < 0.7
    whole = DATASETS["npz"].open(DataConfig(dataset="npz", train_path=path), True)
    test = DATASETS["npz"].open(DataConfig(dataset="npz", train_path=path), False)
    assert whole is not None and test is not None and (len(whole), len(test)) == (50_000, 10_000)
    image = whole.load(int(data.selected[3]))
    assert image.shape == (32, 32, 3) and whole.labels[data.selected[3]] == data._train.labels[3]
    assert np.array_equal(image, data._train.load(3))


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
@pytest.mark.parametrize("dataset", ["digits", "fake", "image_folder"])
def test_grey_images_end_to_end(dataset: str, engine: str, tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 10, "b": 10})
    path = str(tmp_path) if dataset == "image_folder" else None
    data = module(dataset=dataset, train_path=path, engine=engine, in_chans=1, num_workers=0)
    assert data.spec.in_chans == len(data.spec.mean) == len(data.spec.std) == 1
    if dataset == "image_folder":
        assert (data.spec.mean, data.spec.std) == ((pytest.approx(1.347 / 3),), (pytest.approx(0.678 / 3),))  # of R, G, B
    batch = next(iter(data.train_dataloader()))
    assert batch.views[0].shape == (16, 1, 32, 32) and batch.views[0].isfinite().all()
    assert next(iter(data.clean_loader(train=True))).views[0].shape == (16, 1, 32, 32)


def test_grey_is_pillows() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert np.array_equal(convert_channels(pixels, 1)[..., 0], np.asarray(Image.fromarray(pixels).convert("L")))
    grey = pixels[..., :1]
    assert np.array_equal(convert_channels(grey, 3), np.asarray(Image.fromarray(grey[..., 0]).convert("RGB")))


# Folders


def test_labelled_folder(tmp_path: Path) -> None:
    paths = make_folder(tmp_path / "train", {"dog": 5, "cat": 4})
    make_folder(tmp_path / "val", {"dog": 1, "cat": 2})
    for junk in (".DS_Store", "README.md", "dog/Thumbs.db", "cat/._0001.png"):
        (tmp_path / "train" / junk).write_bytes(b"junk")
    source = FolderSource(tmp_path / "train", 3, "data.train_path")
    assert source.classes == ["cat", "dog"] and source.labels.tolist() == [0] * 4 + [1] * 5
    assert [source.name(i) for i in range(9)] == sorted(map(str, paths)) and sum(source.ignored.values()) == 4
    for root in (tmp_path, tmp_path / "train"):
        data = module(4, dataset="image_folder", train_path=str(root), no_labels=False)
        assert len(data._train) == 9 and data.spec.classes == 2
        assert sum(len(batch.index) for batch in data.val_dataloader()) == 3


SPLIT = {"train/a": 4, "train/b": 4}


@pytest.mark.parametrize(
    ("folders", "chosen"),
    [
        ({**SPLIT, "test/a": 1, "test/b": 1}, "test"),
        ({**SPLIT, "valid/a": 1, "valid/b": 1, "test/a": 3, "test/b": 3}, "valid"),
        ({**SPLIT, "validation/a": 1, "validation/b": 1}, "validation"),
        ({**SPLIT, "val/a": 1, "val/b": 1, "test/a": 3, "extra": 2}, "val"),
    ],
)
@pytest.mark.parametrize("below", ["", "train"])
def test_split_folder(below: str, folders: dict, chosen: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, folders)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("no image")
    data = module(4, dataset="image_folder", train_path=str(tmp_path / below))
    assert len(data.selected) == 8 and data.spec.classes == 2
    assert sorted(label for batch in data.val_dataloader() for label in batch.labels.tolist()) == [0, 1]
    assert data._val.name(0).startswith(f"{tmp_path / chosen}/") and not caplog.records


def test_train_and_test_among_other_folders_are_classes(tmp_path: Path) -> None:
    make_folder(tmp_path, {"train": 4, "test": 4, "plane": 4})
    data = module(4, dataset="image_folder", train_path=str(tmp_path))
    assert data.spec.classes == 3 and len(data.selected) == 12 and data.val_dataloader() == []


@pytest.mark.parametrize("below", ["", "train"])
def test_of_two_folders_to_validate_on_one_must_be_named(below: str, tmp_path: Path) -> None:
    make_folder(tmp_path, {**SPLIT, "valid/a": 1, "validation/a": 1, "validation/b": 1})
    where = {"dataset": "image_folder", "train_path": str(tmp_path / below)}
    with pytest.raises(ConfigError) as caught:
        module(4, **where)
    assert str(caught.value) == f"{tmp_path} holds valid and validation: name one, data.val_path=..."
    data = module(4, **where, val_path=str(tmp_path / "validation"))
    assert len(data.selected) == 8 and len(data.val_dataloader()) == 1


def test_a_test_folder_without_labels_judges_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path, {**SPLIT, "test": 3})
    data = module(4, dataset="image_folder", train_path=str(tmp_path))
    assert data.spec.classes == 2 and data.val_dataloader() == []
    assert [record.getMessage() for record in caplog.records] == [
        f"the validation images have no labels to judge by, so they are not used (the first: {tmp_path}/test/0000.png)"
    ]


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        ({"cat": 4, "dog": 4, ".": 1}, "1 lie beside the folders (0000.png)"),
        ({"train/cat": 4, "train/dog": 4}, "train holds images further down only (train/cat/0000.png)"),
        ({"cat": 4, "dog/big": 4}, "dog holds images further down only (dog/big/0000.png)"),
        ({".": 8}, None),
        ({"cat": 8}, None),
    ],
)
def test_labels_are_not_lost_in_silence(
    folders: dict, why: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_folder(tmp_path, folders)
    data = module(4, dataset="image_folder", train_path=str(tmp_path))
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (why is not None)
    if why is not None:
        assert data.spec.classes == 0 and why in told[0] and "\n" not in told[0]
        assert told[0].startswith(f"data.train_path={tmp_path}: no image gets a label") and "data.no_labels=true" in told[0]
    caplog.clear()
    assert module(4, dataset="image_folder", train_path=str(tmp_path), no_labels=True).spec.classes == 0 and not caplog.records


@pytest.mark.parametrize("layout", ["flat", "nested", "asked"])
def test_unlabelled_folder(layout: str, tmp_path: Path) -> None:
    where = {"flat": {".": 8}, "nested": {"2020/01": 4, "2020/02": 4}, "asked": {"a": 4, "b": 4}}[layout]
    make_folder(tmp_path, where)
    data = module(4, dataset="image_folder", train_path=str(tmp_path), no_labels=layout == "asked")
    assert data.spec.classes == 0 and data.val_dataloader() == []
    for batch in data.train_dataloader():
        assert (batch.labels == -1).all()


def test_images_of_many_sizes(tmp_path: Path) -> None:
    for i, size in enumerate([(20, 20), (40, 30), (90, 50), (7, 64)]):
        make_folder(tmp_path, {f"{i}": 3}, size=size)
    data = module(4, dataset="image_folder", train_path=str(tmp_path), num_workers=0)
    assert data.engine == "fast"
    assert [batch.views[0].shape for batch in data.train_dataloader()] == [(4, 3, 32, 32)] * 3
    clean = [batch.index.tolist() for batch in data.clean_loader(train=True, batch_size=5)]
    assert clean == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11]]


def test_links_that_lead_back_end(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 3})
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert len(FolderSource(tmp_path, 3, "data.train_path")) == 3


# Subsets


def test_fractions_are_stratified() -> None:
    labels = np.repeat(np.arange(10), 100)
    for first in (True, False):
        chosen = stratified(labels, 105, first)
        assert len(set(chosen.tolist())) == 105 and (np.diff(chosen) > 0).all()
        counts = np.bincount(labels[chosen])
        assert counts.min() >= 10 and counts.max() <= 11
        assert np.array_equal(chosen, stratified(labels, 105, first))
    assert not np.array_equal(stratified(labels, 100, False), stratified(labels, 100, True))
    assert len(stratified(np.full(50, -1), 7, False)) == 7
    assert np.bincount(np.append([0] * 95, [1] * 5)[stratified(np.append([0] * 95, [1] * 5), 10, False)]).tolist() == [9, 1]


def test_selected_images_are_the_ones_served() -> None:
    data = module(dataset="digits", fraction=0.1)
    whole = opened("digits")[0]
    assert len(data.selected) == 140 and data.engine == "fast"
    for batch in data.clean_loader(train=True):
        rows = data.selected[batch.index.numpy()]
        assert np.array_equal(whole.labels[rows], batch.labels.numpy())
        shown = batch.views[0][0, 0] * data.spec.std[0] + data.spec.mean[0]
        assert np.allclose(shown.numpy() * 255, whole.images[rows[0], :, :, 0], atol=0.01)


# Order and ranks


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(module_file, "rank", lambda: rank)
    monkeypatch.setattr(module_file, "world_size", lambda: world)


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
def test_two_ranks_are_one_process_with_twice_the_batch(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"dataset": "digits", "train_size": 70, "engine": engine, "num_workers": 0}
    one = list(module(16, **config).train_dataloader())
    ranks = []
    for rank in range(2):
        as_rank(monkeypatch, rank, 2)
        ranks.append(list(module(8, **config).train_dataloader()))
    assert len(one) == len(ranks[0]) == len(ranks[1]) == 4
    for whole, left, right in zip(one, *ranks, strict=True):
        assert torch.equal(whole.index, torch.cat([left.index, right.index]))
        assert torch.equal(whole.labels, torch.cat([left.labels, right.labels]))
        assert torch.allclose(whole.views[0], torch.cat([left.views[0], right.views[0]]), atol=1e-5)


def test_clean_images_are_shared_out_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    index = []
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        index += [i for batch in module(dataset="digits").clean_loader(train=False) for i in batch.index.tolist()]
    assert index == list(range(397))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("images", [1, 4, 30, 31, 37])
def test_ranks_have_as_many_batches_whatever_is_left_over(images: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [Order(1, images, 2, rank, world) for rank in range(world)]
    assert {len(plan) for plan in plans} == {len(plan.epoch(Position(3, 0))) for plan in plans} == {images // (2 * world)}
    data = module(4, [], dataset="fake", size=8, train_size=images)
    loaders, shown = [], []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        loaders.append(data.clean_loader(train=True))
        shown.append([batch.index for batch in loaders[-1]])
    assert {len(loader) for loader in loaders} == {max(map(len, shown))}    # Lightning refuses, or skips, a rank without one
    assert torch.cat([index for part in shown for index in part]).tolist() == list(range(images))


def test_a_limit_spreads_over_the_dataset() -> None:
    data = module(dataset="digits")
    index = torch.cat([batch.index for batch in data.clean_loader(train=True, limit=50)])
    assert len(index) == 50 and (index.diff() > 0).all() and index[-1] == 1399
    assert sum(len(batch.index) for batch in data.clean_loader(train=False, limit=10_000)) == 397


def test_plan_is_the_order_cut_into_batches() -> None:
    plan = Order(1, 1400, 16, 0, 1)
    left = plan.epoch(Position(5, 80))
    assert len(plan) == 87 and len(left) == 7
    assert np.array_equal(np.concatenate([slot.samples for slot in left]), order(1, 5, 1400)[80 * 16 : 87 * 16])
    onwards = list(islice(plan.onwards(Position(5, 86)), 3))
    assert [slot.epoch for slot in onwards] == [5, 6, 6]
    assert np.array_equal(onwards[1].samples, order(1, 6, 1400)[:16])


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
def test_nothing_restarts_between_epochs(engine: str) -> None:
    """One stream of batches serves all epochs, also when each is ended by its length and not by asking for more."""
    data = module(100, [View(crop_size=8)], dataset="digits", engine=engine, num_workers=0)
    loader = data.train_dataloader()
    streams = []
    batches = loader._engine.batches
    loader._engine.batches = lambda plan: streams.append(plan) or batches(plan)  # type: ignore[assignment, func-returns-value]
    whole = [list(loader), list(loader)]
    iterator = iter(loader)
    whole.append([next(iterator) for _ in range(14)])
    whole.append(list(loader))
    del iterator
    assert len(streams) == 1
    for epoch, shown in enumerate(whole):
        assert np.array_equal(torch.cat([batch.index for batch in shown]), order(1, epoch, 1400))
    next(iter(loader))  # left early: the next one starts anew, with the next epoch
    assert np.array_equal(next(iter(loader)).index, order(1, 5, 1400)[:100])
    assert len(streams) == 2
    data.teardown("fit")


def test_an_iterator_left_early_does_not_disturb_the_next() -> None:
    loader = module(100, [View(crop_size=8)], dataset="digits").train_dataloader()
    first, second = iter(loader), iter(loader)
    next(first), next(second)
    first.close()
    assert np.array_equal(torch.cat([batch.index for batch in second]), order(1, 1, 1400)[100:])
    loader.close()


def test_position_is_respected_and_then_epochs_are_whole() -> None:
    data = module(100, [View(crop_size=8)], dataset="digits")
    data.set_position(2, 11)
    loader = data.train_dataloader()
    iter(loader)  # as Lightning does to see whether it can
    assert [len(list(loader)), len(list(loader))] == [3, 14]


def test_several_views_large_first() -> None:
    views = [View(crop_size=12, num_crops=2), View(crop_size=24)]
    batch: Batch = next(iter(module(8, views, dataset="digits").train_dataloader()))
    assert [tuple(view.shape) for view in batch.views] == [(8, 3, 24, 24), (8, 3, 12, 12), (8, 3, 12, 12)]
    assert not torch.equal(batch.views[1], batch.views[2])


def test_index_and_label_travel_with_the_image() -> None:
    whole = opened("digits")[0]
    view = View(crop_size=32, rrc=Crop(enabled=False))
    data = module(50, [view], dataset="digits", mean=[0.0] * 3, std=[1.0] * 3)
    for batch in data.train_dataloader():
        assert np.array_equal(batch.labels.numpy(), whole.labels[batch.index.numpy()])
        assert np.allclose(batch.views[0].permute(0, 2, 3, 1).numpy() * 255, whole.images[batch.index.numpy()], atol=1e-3)


# Clean images


def test_clean_images_are_resized_only_when_they_must_be(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 8}, size=(64, 48))
    data = module(4, [View(crop_size=28)], dataset="image_folder", train_path=str(tmp_path), mean=[0.0] * 3, std=[1.0] * 3)
    shown = next(iter(data.clean_loader(train=True))).views[0]
    assert shown.shape == (4, 3, 28, 28)
    middle = torch.from_numpy(picture(1, 64, 48).copy()).permute(2, 0, 1).float()[:, 16:48, 8:40].mean((1, 2)) / 255
    assert torch.allclose(shown[0].mean((1, 2)), middle, atol=0.08)
    same = module(4, [View(crop_size=32)], dataset="digits", mean=[0.0] * 3, std=[1.0] * 3)
    shown = next(iter(same.clean_loader(train=False))).views[0]
    assert np.allclose(shown[0, 0] * 255, opened("digits")[1].images[0, :, :, 0], atol=1e-3)


def test_evaluation_needs_no_views() -> None:
    data = module(8, [], dataset="fake", size=20, classes=3)
    assert data.spec.size == 20 and data.spec.classes == 3
    assert next(iter(data.val_dataloader())).views[0].shape == (8, 3, 20, 20)


def test_the_engine_chosen_judges_the_views_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[View]] = []
    monkeypatch.setattr(TorchvisionEngine, "require", staticmethod(asked.append), raising=False)
    views = [View(crop_size=16, num_crops=2)]
    with pytest.raises(ConfigError, match="data.train_path"):
        module(views=views, engine="torchvision", dataset="image_folder", train_path=str(tmp_path / "none"))
    assert len(asked) == 1 and [view.crop_size for view in asked[0]] == [16, 16]
    module(views=views, dataset="digits")
    assert len(asked) == 1
