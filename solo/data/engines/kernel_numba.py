"""The fast engine's kernel in numba: sampling, augmentation and normalisation of an image in one compiled chain."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solo.data.engines import Job
from solo.data.engines.chain import draw, finish, render
from solo.data.engines.jit import WIDTH
from solo.data.engines.kernel_torch import resize_matrix
from solo.data.engines.torchvision import blur_radius
from solo.data.views import CROP_TRIES, LOG_RATIO, NEUTRAL, SIGMA, SOLARIZE_THRESHOLD, Params, View, fixed_boxes

Array = np.ndarray
f32 = np.float32
ROW = np.dtype(  # `Params` of one image
    [("box", "i8", 4), ("jitter", "?"), ("factors", "f8", 4), ("order", "i8", 4), ("gray", "?"), ("blur", "?")]
    + [("sigma", "f8"), ("solarize", "?"), ("equalize", "?"), ("flip", "?")],
    align=True,
)
VIEW = np.dtype(  # a `View` and the constants that go with it
    [("random_crop", "?"), ("tries", "i8"), ("scale", "f8", 2), ("log_ratio", "f8", 2), ("box", "i8", 4), ("jitter", "f8")]
    + [("factors", "f8", (4, 2)), ("neutral", "f8", 4), ("gray", "f8"), ("blur", "f8"), ("sigma", "f8", 2)]
    + [("solarize", "f8"), ("threshold", "f8"), ("equalize", "f8"), ("flip", "f8")]
    + [("height", "i8"), ("width", "i8"), ("size", "i8"), ("reach", "i8")],
    align=True,
)

class NumbaKernel:
    """Fills batches; see `solo.data.engines.kernels.Kernel`."""

    def __init__(self, job: Job, images: Array) -> None:
        _, height, width, self._channels = images.shape
        self._seed, self._images = job.seed, images.reshape(len(images), -1)
        self._views = [_settings(view, height, width) for view in job.views]
        self._tables = [_tables(height, width, view.crop_size) for view in job.views]
        self._scale, self._shift = _normalisation(job)

    def fill(self, out: Tensor, number: int, epoch: int, samples: Array, shown: Array) -> None:
        view, tables = self._views[number], self._tables[number]
        rows = np.empty(len(samples), ROW)
        draw(self._seed, epoch, number, samples, view, rows)
        pixels = out.numpy().reshape(len(out), self._channels, -1)
        render(self._images, shown, rows, view, *tables, self._scale, self._shift, pixels)

    @staticmethod
    def finish(job: Job, number: int, params: Params, crops: Tensor) -> Tensor:
        """See `solo.data.engines.kernels.Kernel`."""
        n, channels, size, _ = crops.shape
        out = torch.empty(crops.shape)
        pixels = crops.permute(0, 2, 3, 1).contiguous().numpy().reshape(n, -1, channels)
        settings = _settings(job.views[number], size, size)
        finish(pixels, _records(params), settings, *_normalisation(job), out.numpy().reshape(n, channels, -1))
        return out


def apply(view: View, params: Params, images: Array) -> Tensor:
    """One augmented copy of each image [n, H, W, C] uint8: [n, C, S, S] float32 in 0..1."""
    n, height, width, channels = images.shape
    out = np.zeros((n, channels, view.crop_size**2), f32)
    scale, shift = np.ones(channels, f32), np.zeros(channels, f32)
    tables = _tables(height, width, view.crop_size)
    render(images.reshape(n, -1), np.arange(n), _records(params), _settings(view, height, width), *tables, scale, shift, out)
    return torch.from_numpy(out.reshape(n, channels, view.crop_size, view.crop_size))


def sample(view: View, seed: int, epoch: int, samples: Array, number: int, height: int, width: int) -> Params:
    """What the chain draws for view ``number`` of ``samples`` [n]: `solo.data.views.sample`'s numbers."""
    rows = np.zeros(len(samples), ROW)
    draw(seed, epoch, number, samples, _settings(view, height, width), rows)
    return Params(*(rows[name] for name in ROW.names or ()))


def _records(params: Params) -> Array:
    rows = np.zeros(len(params), ROW)
    for name in ROW.names or ():
        rows[name] = getattr(params, name)
    return rows


def _normalisation(job: Job) -> tuple[Array, Array]:
    """Scale and shift per channel."""
    return (1 / np.array(job.std)).astype(f32), (-np.array(job.mean) / np.array(job.std)).astype(f32)


def _settings(view: View, height: int, width: int) -> Any:
    record = np.zeros(1, VIEW)[0]
    values = {
        "random_crop": view.rrc.enabled,
        "tries": CROP_TRIES,
        "scale": (view.rrc.crop_min_scale, view.rrc.crop_max_scale),
        "log_ratio": LOG_RATIO,
        "box": fixed_boxes(view.rrc, np.array([height]), np.array([width]))[0],
        "jitter": view.color_jitter.prob,
        "factors": view.color_jitter.ranges(),
        "neutral": NEUTRAL,
        "gray": view.grayscale.prob,
        "blur": view.gaussian_blur.prob,
        "sigma": SIGMA,
        "solarize": view.solarization.prob,
        "threshold": SOLARIZE_THRESHOLD,
        "equalize": view.equalization.prob,
        "flip": view.horizontal_flip.prob,
        "height": height,
        "width": width,
        "size": view.crop_size,
        "reach": blur_radius(SIGMA[1], view.crop_size),
    }
    for name in VIEW.names or ():
        record[name] = values[name]
    return record


def _tables(height: int, width: int, size: int) -> tuple[Any, Any]:
    """Down the columns, which also turns 0..255 into 0..1, and along the rows."""
    return _taps(height, size), _bands(width, size)


Table = tuple[Array, Array, Array]


@lru_cache(maxsize=32)
def _taps(full: int, size: int) -> Table:
    """`resize_matrix` of every length up to ``full`` over 255, without its zeros.

    Returns: [length, S] the first source pixels, [length, S, taps] weights, at least four, [length] how many at most.
    """
    first, weight, taps = _bands(full, size, 1)
    enough = np.zeros((full + 1, size, max(4, weight.shape[2])), f32)
    enough[:, :, : weight.shape[2]] = weight
    return first, enough / 255, taps.max(1)


@lru_cache(maxsize=32)
def _bands(full: int, size: int, rows: int = WIDTH) -> Table:
    """`resize_matrix` of every length up to ``full`` as blocks of so many rows, without columns of zeros on either side.

    Returns: [length, blocks] the first source pixels, [length, blocks, columns * rows] weights by column, [length, blocks]
    how many columns.
    """
    blocks = -(-size // rows)
    first, taps = np.zeros((full + 1, blocks), np.int64), np.zeros((full + 1, blocks), np.int64)
    cut = {}
    for length in range(1, full + 1):
        matrix = np.pad(resize_matrix(length, size).numpy(), ((0, blocks * rows - size), (0, 0)))
        for b, block in enumerate(matrix.reshape(blocks, rows, length)):
            used = np.flatnonzero(block.any(0))
            first[length, b], taps[length, b] = used[0], used[-1] + 1 - used[0]
            cut[length, b] = block[:, used[0] : used[-1] + 1].T.reshape(-1)
    weight = np.zeros((full + 1, blocks, taps.max() * rows), f32)
    for place, columns in cut.items():
        weight[place][: len(columns)] = columns
    return first, weight, taps
