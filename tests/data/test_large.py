"""The fast engine on large images: the reference's views, in a batch, on any device, whoever shares the work."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps
from scipy import stats

from solo.batch import Batch
from solo.data.config import DataConfig
from solo.data.engines import ENGINES, Job, Slot, kernel_torch, large
from solo.data.engines import torchvision as reference
from solo.data.engines.kernels import kernel
from solo.data.engines.large import Crops, LargeEngine, crop
from solo.data.engines.small import SmallEngine
from solo.data.engines.torchvision import TorchvisionEngine
from solo.data.module import DataModule
from solo.data.random import Draws
from solo.data.sources import ArraySource
from solo.data.views import Chance, Crop, Params, View, sample
from tests.data.common import full_view, make_folder, picture
from tests.data.test_engines import ALONE  # noqa: F401

SIDE = 72
SHAPES = [(90, 70), (66, 200), (128, 128), (300, 80)]
PLAN = [Slot(2, np.arange(i, i + 4)[::-1].copy()) for i in range(0, 16, 4)]


@pytest.fixture(params=["numba", "torch"])
def each_kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


class Pictures:
    """Sixteen images of several sizes."""

    labels, classes = np.arange(16) % 3, ["a", "b", "c"]

    def __init__(self, channels: int = 3) -> None:
        self.images = [picture(i, *SHAPES[i % 4], channels) for i in range(16)]

    def __len__(self) -> int:
        return 16

    def load(self, i: int) -> np.ndarray:
        return self.images[i]

    def name(self, i: int) -> str:
        return str(i)


def job(views: list[View] | None = None, channels: int = 3, **config: object) -> Job:
    views = views or [full_view(SIDE), full_view(40)]
    options = {"dataset": "fake", "num_workers": 0, **config}
    return Job(Pictures(channels), views, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels], 11, DataConfig(**options))


def drawn(view: View, images: list[np.ndarray]) -> Params:
    n, heights, widths = len(images), *(np.array([image.shape[axis] for image in images]) for axis in (0, 1))
    return sample(view, Draws(1, 0, np.arange(n), 0), heights, widths)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [40, 96, 224])
def test_crops_are_the_references_within_a_grey_level(size: int, channels: int) -> None:
    view, images = View(crop_size=size, horizontal_flip=Chance(prob=0.5)), Pictures(channels).images
    params = drawn(view, images)
    crops = torch.empty((len(images), channels, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
    crop(images, params, crops)
    for i, image in enumerate(images):
        mine = crops[i].int()
        exact = 255 * reference.apply(view, params.row(i), image)  # rounded once, at the end, not after each axis
        assert (mine - exact.round()).abs().max() <= 1 and (mine - exact).abs().mean() < 0.4
        top, left, height, width = (int(number) for number in params.box[i])
        cut = Image.fromarray(image.squeeze()).crop((left, top, left + width, top + height))
        published = cut.resize((size, size), Image.Resampling.BICUBIC)
        published = ImageOps.mirror(published) if params.flip[i] else published
        whole = torch.from_numpy(np.array(published)).view(size, size, channels).permute(2, 0, 1)
        assert (mine - whole).abs().max() <= 2 and (mine != whole).float().mean() < 0.1  # Pillow rounds after each axis


@pytest.mark.parametrize("shape", [(1, 900), (900, 1), (2, 3), (64, 65), (40, 40), (7, 300)])
def test_crops_of_the_hardest_images_are_pillows(shape: tuple[int, int]) -> None:
    """Black and white pixels, where bicubic overshoots most, in images of every shape: clipped after each axis, as Pillow's."""
    images = [(np.random.default_rng(i).integers(0, 2, (*shape, 3)) * 255).astype(np.uint8) for i in range(4)]
    for size in (1, 17, 65, 96, 224):
        params = drawn(View(crop_size=size), images)
        crops = torch.empty((4, 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
        crop(images, params, crops)
        for mine, image, (top, left, height, width) in zip(crops, images, params.box.tolist(), strict=True):
            cut = Image.fromarray(image).crop((left, top, left + width, top + height))
            published = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
            off = np.abs(mine.permute(1, 2, 0).numpy() - published)
            assert off.max() <= 2 and (off > 1).mean() < 2e-3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [name for name in ALONE if name not in ("crop", "tiny crops", "flip")])
def test_what_follows_the_crop_is_the_same(name: str, channels: int, each_kernel: str) -> None:
    """Every operation with shared numbers, from crops that are the whole image: no rounding before it."""
    view = dataclasses.replace(ALONE[name], rrc=Crop(enabled=False), crop_size=SIDE, horizontal_flip=Chance())
    images = [picture(i, SIDE, SIDE, channels) for i in range(24)]
    params = drawn(view, images)
    plain = dataclasses.replace(job([view], channels), mean=(0.0,) * channels, std=(1.0,) * channels)
    crops = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    quick = kernel(each_kernel).finish(plain, 0, params, crops)
    slow = torch.stack([reference.apply(view, params.row(i), image) for i, image in enumerate(images)])
    different = (slow - quick).abs() > 1e-4
    jumps = view.solarization.prob or view.equalization.prob  # a value at the threshold may fall on either side of it
    assert different.float().mean() <= (1e-3 if jumps else 0)


def test_batches_are_the_references(each_kernel: str) -> None:
    """A crop's value is within one level, and strong jitter multiplies that: brightness 1.4, contrast 1.4, saturation 1.2."""
    views = [dataclasses.replace(full_view(size), solarization=Chance()) for size in (SIDE, 40)]
    for workers in (0, 2):
        engine = LargeEngine(job(views, kernel=each_kernel, num_workers=workers))
        slow = TorchvisionEngine(job(views))
        for mine, theirs, slot in zip(engine.batches(PLAN), slow.batches(PLAN), PLAN, strict=True):
            assert isinstance(mine.batch, Crops) and all(x.dtype == torch.uint8 for x in mine.batch.crops)
            batch = engine.finish(mine.batch)
            assert batch.index.tolist() == theirs.batch.index.tolist() == slot.samples.tolist()
            assert batch.labels.tolist() == theirs.batch.labels.tolist()
            for a, b in zip(batch.views, theirs.batch.views, strict=True):
                assert a.shape == b.shape and a.dtype == b.dtype == torch.float32 and a.is_contiguous()
                levels = (a - b).abs() * 0.2 * 255
                assert levels.median() < 0.5 and (levels > 2).float().mean() < 0.01 and levels.max() < 2 * 1.4 * 1.4 * 1.2
        engine.close()


def test_workers_ranks_and_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def views(plan: list[Slot], workers: int) -> torch.Tensor:
        engine = LargeEngine(job(num_workers=workers))
        made = [engine.finish(payload.batch) for payload in engine.batches(plan)]
        engine.close()
        order = torch.cat([batch.index for batch in made]).argsort()
        return torch.cat([batch.views[0] for batch in made])[order]

    whole = views([Slot(2, np.arange(16))], 0)
    assert torch.equal(whole, views(PLAN, 0)) and torch.equal(whole, views(PLAN, 2))
    assert torch.equal(whole, torch.cat([views(PLAN[:2], 0), views(PLAN[2:], 0)]))  # a part each, or first and later
    assert not torch.allclose(whole, views([Slot(3, np.arange(16))], 0), atol=0.1)
    monkeypatch.setattr(large, "_HELD", 3)
    assert torch.equal(whole, views([Slot(2, np.arange(16))], 0))


def test_large_photographs_are_not_held_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job([View(crop_size=8)])
    slot, one = Slot(0, np.arange(16)), max(image.nbytes for image in Pictures().images)
    whole = next(LargeEngine(asked).batches([slot])).batch
    monkeypatch.setattr(large, "_HELD_BYTES", 3 * one)
    held = [(first, [image.nbytes for _, image, _ in loaded]) for first, loaded in large._Cropper(asked)._decoded(slot)]
    assert all(sum(sizes) < 4 * one for _, sizes in held) and max(len(sizes) for _, sizes in held) > 1
    assert [first for first, _ in held] == np.cumsum([0, *(len(sizes) for _, sizes in held)])[:-1].tolist()
    again = next(LargeEngine(asked).batches([slot])).batch
    assert torch.equal(whole.crops[0], again.crops[0]) and np.array_equal(whole.params[0].box, again.params[0].box)
    assert torch.equal(whole.index, again.index)


def test_what_is_drawn_is_what_the_reference_draws(each_kernel: str) -> None:
    """The pixels of one image under both engines' own numbers come from one distribution."""
    ramp = np.tile(np.arange(80, dtype=np.uint8)[:, None, None] * 3, (1, 80, 3))
    source = ArraySource(np.stack([ramp] * 500), np.zeros(500), ["a"])
    config = DataConfig(dataset="fake", num_workers=0, kernel=each_kernel)
    shared = Job(source, [full_view(8)], (0.0,) * 3, (1.0,) * 3, 1, config)
    engine = LargeEngine(shared)
    quick = engine.finish(next(engine.batches([Slot(0, np.arange(500))])).batch).views[0]
    other = dataclasses.replace(shared, seed=2)
    slow = next(TorchvisionEngine(other).batches([Slot(0, np.arange(500))])).batch.views[0]
    for channel, y, x in [(0, 0, 0), (1, 4, 4), (2, 7, 3)]:
        assert stats.ks_2samp(quick[:, channel, y, x], slow[:, channel, y, x]).pvalue > 1e-4
    assert stats.ks_2samp(quick.std((1, 2, 3)), slow.std((1, 2, 3))).pvalue > 1e-4


def test_nothing_waits_for_the_device() -> None:
    """Tensors without contents: whatever would have to look into them to know what to do raises."""
    view = full_view(SIDE)
    engine = LargeEngine(job([view, full_view(40)]))
    batch = next(engine.batches(PLAN)).batch
    done = engine.finish(batch.to("meta"))
    assert [tuple(x.shape) for x in done.views] == [(4, 3, SIDE, SIDE), (4, 3, 40, 40)]
    assert all(x.is_meta and x.dtype == torch.float32 for x in done.views)


def test_the_kind_of_image_decides() -> None:
    images = np.zeros((4, 64, 64, 3), np.uint8)
    small = dataclasses.replace(job(), source=ArraySource(images, np.zeros(4), ["a"]))
    large = dataclasses.replace(job(), source=ArraySource(np.zeros((4, 65, 64, 3), np.uint8), np.zeros(4), ["a"]))
    fast = ENGINES["fast"]
    assert isinstance(fast(small), SmallEngine)
    assert isinstance(fast(large), LargeEngine) and isinstance(fast(job()), LargeEngine)


class Seen(pl.LightningModule):
    """Keeps the batches that training and validation are shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.trained: list[Batch] = []
        self.judged: list[Batch] = []
        self.sent: list[type] = []

    def on_before_batch_transfer(self, batch: Batch | Crops, dataloader_idx: int) -> Batch | Crops:
        self.sent.append(type(batch))
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trained.append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.judged.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trainer_and_a_loop_by_hand_see_the_same_batches(tmp_path: Path) -> None:
    make_folder(tmp_path / "train", {"a": 8, "b": 8}, size=(80, 90))
    make_folder(tmp_path / "val", {"a": 2, "b": 2}, size=(80, 90))

    def data() -> DataModule:
        config = DataConfig(dataset="image_folder", train_path=str(tmp_path / "train"), num_workers=0)
        return DataModule(config, [full_view(SIDE)], 4, seed=3)

    model, used = Seen(), data()
    flags = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, **dict.fromkeys(flags, False)).fit(model, datamodule=used)
    byhand = list(data().train_dataloader())
    assert len(model.trained) == len(byhand) == 4 and len(model.judged) >= 1
    assert model.sent.count(Crops) == 4  # grey levels travel to the device, views are made there
    assert all(isinstance(batch, Batch) for batch in used.train_dataloader())  # also by hand after the trainer has ended
    for a, b in zip(model.trained, byhand, strict=True):
        assert isinstance(a, Batch) and torch.equal(a.views[0], b.views[0]) and torch.equal(a.index, b.index)


def test_real_photographs(shared_data: Callable[[str], Path], each_kernel: str) -> None:
    from solo.data.tar import TarSource

    source = TarSource(shared_data("imagenet-sample-256.tar"), "train", 3, "data.train_path")
    config = DataConfig(dataset="fake", num_workers=0, kernel=each_kernel)
    shared = Job(source, [full_view(96)], (0.0,) * 3, (1.0,) * 3, 1, config)
    engine, slot = LargeEngine(shared), Slot(0, np.arange(0, 256, 16))
    quick = engine.finish(next(engine.batches([slot])).batch).views[0]
    slow = next(TorchvisionEngine(shared).batches([slot])).batch.views[0]
    levels = (quick - slow).abs() * 255
    assert levels.median() < 0.5 and (levels > 2).float().mean() < 5e-3


def test_colour_on_a_chunk_is_colour_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = LargeEngine(job(kernel="torch"))
    batch = next(engine.batches([Slot(0, np.arange(16))])).batch
    whole = engine.finish(batch).views[0]
    monkeypatch.setattr(kernel_torch, "_LARGE_CHUNK", 5)
    assert torch.allclose(whole, engine.finish(batch).views[0], atol=1e-5)
