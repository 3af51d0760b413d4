"""The engines make the same image of the same numbers."""

import dataclasses
import gc
import hashlib
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.ndimage import gaussian_filter

from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.engines import Job, Slot, kernel_torch, kernels
from solo.data.engines import torchvision as reference
from solo.data.engines.small import Memory, SmallEngine
from solo.data.engines.torchvision import TorchvisionEngine
from solo.data.random import Draws
from solo.data.sources import ArraySource
from solo.data.views import Chance, ColorJitter, Crop, Params, View, sample
from solo.errors import EnvironmentFault
from tests.data.common import SIZE, full_view, picture

ROOT = Path(__file__).resolve().parents[2]
WHOLE = Crop(enabled=False)
ALONE = {
    "crop": View(crop_size=SIZE),
    "tiny crops": View(crop_size=SIZE, rrc=Crop(crop_min_scale=0.01, crop_max_scale=0.05)),
    "flip": View(crop_size=SIZE, horizontal_flip=Chance(prob=0.5)),
    "brightness": View(crop_size=SIZE, rrc=WHOLE, color_jitter=ColorJitter(prob=1, brightness=0.8)),
    "contrast": View(crop_size=SIZE, rrc=WHOLE, color_jitter=ColorJitter(prob=1, contrast=0.8)),
    "saturation": View(crop_size=SIZE, rrc=WHOLE, color_jitter=ColorJitter(prob=1, saturation=0.8)),
    "hue": View(crop_size=SIZE, rrc=WHOLE, color_jitter=ColorJitter(prob=1, hue=0.5)),
    "jitter": View(crop_size=SIZE, color_jitter=ColorJitter(prob=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)),
    "grayscale": View(crop_size=SIZE, grayscale=Chance(prob=0.5)),
    "blur": View(crop_size=SIZE, gaussian_blur=Chance(prob=0.7)),
    "blur of a small crop": View(crop_size=5, gaussian_blur=Chance(prob=0.7)),
    "solarize": View(crop_size=SIZE, rrc=WHOLE, solarization=Chance(prob=0.5)),
    "equalize": View(crop_size=SIZE, rrc=WHOLE, equalization=Chance(prob=0.5)),
    "all": full_view(),
    "smaller": full_view(18),
    "larger": full_view(40),
}


Apply = Callable[[View, Params, np.ndarray], torch.Tensor]


@pytest.fixture(params=["numba", "torch"])
def kernel(request: pytest.FixtureRequest) -> str:
    """Each kernel of the fast engine; the numba one skips where numba is absent."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.fixture
def apply(kernel: str) -> Apply:
    if kernel == "torch":
        return kernel_torch.apply
    from solo.data.engines import kernel_numba

    return kernel_numba.apply


def both(apply: Apply, view: View, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    n, height, width, _ = images.shape
    params = sample(view, Draws(1, 0, np.arange(n), 0), np.full(n, height), np.full(n, width))
    slow = torch.stack([reference.apply(view, params.row(i), image) for i, image in enumerate(images)])
    return slow, apply(view, params, images)


@pytest.mark.parametrize("shape", [(32, 32, 3), (24, 48, 3), (32, 32, 1), (64, 5, 3)], ids=str)
@pytest.mark.parametrize("name", ALONE)
def test_same_numbers_same_image(name: str, shape: tuple[int, int, int], apply: Apply) -> None:
    view = ALONE[name]
    images = np.stack([picture(i, *shape) for i in range(40)])
    slow, quick = both(apply, view, images)
    assert slow.shape == quick.shape == (40, shape[2], view.crop_size, view.crop_size)
    assert 0 <= quick.min() and quick.max() <= 1 + 1e-6 and quick.std() > 0.05
    different = (slow - quick).abs() > 1e-4  # a fortieth of a grey level
    jumps = view.solarization.prob or view.equalization.prob  # a value at the threshold may fall on either side of it
    assert different.float().mean() <= (1e-3 if jumps else 0)


def test_real_images_within_a_grey_level(shared_data: Callable[[str], Path], apply: Apply) -> None:
    config = DataConfig(dataset="npz", train_path=str(shared_data("cifar10-jpeg.npz")))
    source = DATASETS["npz"].open(config, True)
    images = np.stack([source.load(i) for i in range(200)])  # type: ignore[union-attr]
    slow, quick = both(apply, full_view(), images)
    outside = (slow - quick).abs() > 1 / 255
    assert outside.float().mean() < 1e-4  # the solarised ones at the threshold


def test_constant_and_extreme_images(apply: Apply) -> None:
    images = np.stack([np.full((32, 32, 3), value, dtype=np.uint8) for value in (0, 128, 255)] * 8)
    view = dataclasses.replace(full_view(), equalization=Chance(prob=0.3), solarization=Chance())
    slow, quick = both(apply, view, images)
    assert torch.allclose(slow, quick, atol=1e-3) and quick.isfinite().all()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.stack([picture(i, 32, 32) for i in range(50)])
    whole = both(kernel_torch.apply, full_view(), images)[1]
    monkeypatch.setattr(kernel_torch, "_CHUNK", 7)
    assert torch.allclose(whole, both(kernel_torch.apply, full_view(), images)[1], atol=1e-5)


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 48), (10, 60), (1, 1)])
def test_the_compiled_chain_draws_the_same_numbers(name: str, height: int, width: int) -> None:
    """Every field of every sample, not only their distributions."""
    pytest.importorskip("numba")
    from solo.data.engines import kernel_numba

    view, samples = ALONE[name], np.arange(5000)[::-1].copy() * 7
    for seed, epoch, number in [(5, 0, 0), (-3, 12, 1), (2**62, 999, 7)]:
        mine = kernel_numba.sample(view, seed, epoch, samples, number, height, width)
        theirs = sample(view, Draws(seed, epoch, samples, number), np.full(5000, height), np.full(5000, width))
        for part in dataclasses.fields(Params):
            assert np.array_equal(getattr(mine, part.name), getattr(theirs, part.name)), part.name


def job(n: int = 48, **config: object) -> Job:
    images = np.stack([picture(i, 32, 32) for i in range(n)])
    source = ArraySource(images, np.arange(n) % 7, [str(i) for i in range(7)])
    views = [full_view(), View(crop_size=16)]
    return Job(source, views, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), 11, DataConfig(dataset="fake", **config))


PLAN = [Slot(2, np.arange(i, i + 8)[::-1].copy()) for i in range(0, 48, 8)]


@pytest.mark.slow
def test_batches_are_equal_whoever_makes_them(kernel: str) -> None:
    quick = list(SmallEngine(job(kernel=kernel)).batches(PLAN))
    for workers in (0, 2):
        engine = TorchvisionEngine(job(num_workers=workers))
        for mine, theirs, slot in zip(quick, engine.batches(PLAN), PLAN, strict=True):
            assert mine.batch.index.tolist() == theirs.batch.index.tolist() == slot.samples.tolist()
            assert mine.batch.labels.tolist() == theirs.batch.labels.tolist() == (slot.samples % 7).tolist()
            assert [tuple(view.shape) for view in mine.batch.views] == [(8, 3, 32, 32), (8, 3, 16, 16)]
            for a, b in zip(mine.batch.views, theirs.batch.views, strict=True):
                assert ((a - b).abs() > 5e-3).float().mean() < 1e-3
                assert b.is_contiguous() and a.is_contiguous()
        engine.close()


def test_an_image_is_the_same_in_any_batch(kernel: str) -> None:
    for engine in (SmallEngine(job(kernel=kernel)), TorchvisionEngine(job(num_workers=0))):
        one, many = (list(engine.batches(plan))[0].batch for plan in ([Slot(2, np.array([5]))], [Slot(2, np.array([9, 5, 1]))]))
        exact = kernel == "numba" and isinstance(engine, SmallEngine)
        assert torch.allclose(one.views[0][0], many.views[0][1], rtol=0, atol=0 if exact else 1e-5)
        other = next(engine.batches([Slot(3, np.array([5]))])).batch
        assert not torch.allclose(one.views[0], other.views[0], atol=1e-2)


def test_the_number_of_threads_changes_nothing(kernel: str) -> None:
    def views(threads: int) -> torch.Tensor:
        engine = SmallEngine(job(kernel=kernel, threads=threads))
        return torch.stack([payload.batch.views[0] for payload in engine.batches(PLAN)])

    for threads in (3, 16):
        assert torch.allclose(views(1), views(threads), rtol=0, atol=0 if kernel == "numba" else 1e-5)


def test_what_is_drawn_is_what_torchvision_draws(kernel: str) -> None:
    """The pixels of an image under both engines' own numbers come from one distribution."""
    ramp = np.tile(np.arange(32, dtype=np.uint8)[:, None, None] * 8, (1, 32, 3))
    source = ArraySource(np.stack([ramp] * 600), np.zeros(600), ["a"])
    views = [full_view(8)]
    shared = Job(source, views, (0.0,) * 3, (1.0,) * 3, 1, DataConfig(dataset="fake", kernel=kernel))
    quick = next(SmallEngine(shared).batches([Slot(0, np.arange(600))])).batch.views[0]
    other = dataclasses.replace(shared, seed=2, config=DataConfig(dataset="fake", num_workers=0))
    slow = next(TorchvisionEngine(other).batches([Slot(0, np.arange(600))])).batch.views[0]
    for channel, y, x in [(0, 0, 0), (1, 4, 4), (2, 7, 3)]:
        assert stats.ks_2samp(quick[:, channel, y, x], slow[:, channel, y, x]).pvalue > 1e-4
    assert stats.ks_2samp(quick.std((1, 2, 3)), slow.std((1, 2, 3))).pvalue > 1e-4


def test_memory_comes_back_only_when_nobody_holds_it() -> None:
    memory = Memory(pinned=False)
    first = memory.take((4, 3))
    address, corner = first.data_ptr(), first[1:2]
    del first
    assert memory.take((4, 3)).data_ptr() != address  # a slice of it lives
    kept = corner.detach().numpy()
    del corner
    assert memory.take((4, 3)).data_ptr() != address  # an array of the slice lives
    del kept
    again = [memory.take((4, 3)) for _ in range(3)]
    assert address in [tensor.data_ptr() for tensor in again]
    assert len({tensor.data_ptr() for tensor in again}) == 3
    assert memory.take((5, 3)).shape == (5, 3)


def test_memory_held_by_a_graph_is_not_reused() -> None:
    memory = Memory(pinned=False)
    weight = torch.ones(3, requires_grad=True)
    x = memory.take((4, 3)).fill_(2.0)
    loss = (x * weight).sum()
    del x
    for _ in range(4):
        memory.take((4, 3)).fill_(-1.0)
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [8.0] * 3


def test_batches_that_are_kept_do_not_change() -> None:
    kept = list(SmallEngine(job()).batches(PLAN * 3))
    for payload, again in zip(kept, SmallEngine(job()).batches(PLAN * 3), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(payload.batch.views, again.batch.views, strict=True))


def test_memory_is_the_dataset_and_eight_batches(kernel: str) -> None:
    engine, taken = SmallEngine(job(kernel=kernel)), {}
    assert np.shares_memory(engine._kernel._images, engine._job.source.images)
    for payload in engine.batches(PLAN * 20):
        taken.update((view.data_ptr(), view.nbytes) for view in payload.batch.views)
    assert sum(taken.values()) <= 8 * sum(view.nbytes for view in payload.batch.views)


def test_the_compiled_file_changes_with_what_is_compiled_into_it() -> None:
    """Else numba would load from its cache what another `jit` was compiled into. `JIT` gets its new digits then."""
    pytest.importorskip("numba")
    from solo.data.engines import chain, jit

    assert hashlib.sha256(Path(jit.__file__).read_bytes()).hexdigest().startswith(chain.JIT) and len(chain.JIT) == 8


def test_without_numba_torch_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in ("kernel_numba", "chain", "jit"):
        monkeypatch.delitem(sys.modules, f"solo.data.engines.{name}", raising=False)
    assert kernels.kernel("auto") is kernel_torch.TorchKernel
    with pytest.raises(EnvironmentFault, match=r"data.kernel=numba.*pip install 'solo-ssl\[fast\]'"):
        kernels.kernel("numba")


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "solo-fast-engine"]


def test_dropping_an_iterator_ends_its_thread() -> None:
    batches = SmallEngine(job()).batches(PLAN)
    next(batches)
    assert len(engine_threads()) == 1
    del batches
    gc.collect()
    assert not engine_threads()


def test_an_error_in_the_thread_reaches_the_consumer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SmallEngine(job())
    make = engine._make

    def fail_third(slot: Slot) -> object:
        if slot is PLAN[2]:
            raise ArithmeticError("third")
        return make(slot)

    monkeypatch.setattr(engine, "_make", fail_third)
    made = []
    with pytest.raises(ArithmeticError, match="third"):
        for payload in engine.batches(PLAN):
            made.append(payload)
    assert len(made) == 2 and not engine_threads()


def test_the_thread_does_not_run_far_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SmallEngine(job())
    made: list[Slot] = []
    monkeypatch.setattr(engine, "_make", lambda slot: made.append(slot))
    batches = engine.batches(PLAN * 10)
    next(batches, None)
    time.sleep(0.2)
    assert len(made) <= 6
    batches.close()


@pytest.mark.slow
def test_a_program_that_ends_early_ends_cleanly() -> None:
    program = (
        "from solo.data.module import *; from solo.data.views import View\n"
        "data = DataModule(DataConfig(dataset='digits'), [View(crop_size=32)] * 2, 128, 0)\n"
        "batches = iter(data.train_dataloader()); next(batches)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_workers_can_be_spawned() -> None:
    maker = reference._Maker(job())
    again = pickle.loads(pickle.dumps(maker))[PLAN[0]]
    assert torch.equal(again.batch.views[0], maker[PLAN[0]].batch.views[0])


def test_global_generators_are_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(TorchvisionEngine(job(num_workers=0)).batches(PLAN))
    list(SmallEngine(job()).batches(PLAN))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.1, 2.0])
def test_blur_is_the_whole_gaussian(sigma: float) -> None:
    """scipy's, eight standard deviations wide; what is cut off at three weighs less than half a percent."""
    view = View(crop_size=SIZE, rrc=WHOLE, gaussian_blur=Chance(prob=1.0))
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    params = sample(view, Draws(1, 0, np.arange(1), 0), np.array([SIZE]), np.array([SIZE]))
    params = dataclasses.replace(params, sigma=np.array([sigma]))
    blurred = gaussian_filter(image / 255, (sigma, sigma, 0), mode="mirror", truncate=8)
    found = reference.apply(view, params.row(0), image).permute(1, 2, 0).numpy()
    assert np.abs(found - blurred).max() < 0.005
