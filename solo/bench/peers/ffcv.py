"""FFCV-SSL's form of a recipe, written anew: OpenCV crops each image, then each operation goes over the batch in numba."""

import math

import cv2
import numpy as np
import torch
from numba import njit
from torch import Tensor

from solo.bench.peers.arrays import box, pixels
from solo.data.engines import Job
from solo.data.views import SIGMA, SOLARIZE_THRESHOLD, View
from solo.errors import ConfigError

_LUMA = (0.2989, 0.587, 0.114)
_compiled = njit(fastmath=True, nogil=True, error_model="numpy")


class Peer:
    """Otherwise than the recipe: a bilinear crop, one fixed order of the colour jitter without clipping between its parts,
    a hue that is turned linearly, about the grey axis, and 8 bits between the operations."""

    name = "FFCV-SSL's form (OpenCV and numba)"
    images = 2048

    def __init__(self, job: Job) -> None:
        cv2.setNumThreads(0)
        self._pixels, self._views, self._random = pixels(job), job.views, np.random.default_rng(job.seed)
        levels = np.arange(256)[:, None] / 255
        self._table = ((levels - np.array(job.mean)) / np.array(job.std)).astype(np.float32)  # [256, C]
        if any(view.equalization.prob for view in job.views):
            raise ConfigError("--peer ffcv: it has no equalisation")

    def batch(self, samples: np.ndarray) -> list[Tensor]:
        return [torch.from_numpy(self._view(view, samples)) for view in self._views]

    def _view(self, view: View, samples: np.ndarray) -> np.ndarray:
        n, size = len(samples), view.crop_size
        x = np.empty((n, size, size, 3), np.uint8)
        for place, i in enumerate(samples):
            top, left, height, width = box(view.rrc, *self._pixels.shape[1:3])
            cut = self._pixels[i, top : top + height, left : left + width]
            cv2.resize(cut, (size, size), dst=x[place], interpolation=cv2.INTER_LINEAR)
        low, high = np.array(view.color_jitter.ranges(), np.float32).T
        _jitter(x, self._some(n, view.color_jitter.prob), self._random.random((n, 4), np.float32) * (high - low) + low)
        _gray(x, self._some(n, view.grayscale.prob))
        for i in self._some(n, view.gaussian_blur.prob):
            cv2.GaussianBlur(x[i], (0, 0), self._random.uniform(*SIGMA), dst=x[i])
        _solarize(x, self._some(n, view.solarization.prob))
        _flip(x, self._some(n, view.horizontal_flip.prob))
        out = np.empty((n, 3, size, size), np.float32)
        _normalise(x, self._table, out)
        return out

    def _some(self, n: int, chance: float) -> np.ndarray:
        return np.flatnonzero(self._random.random(n) < chance)


@_compiled
def _jitter(images: np.ndarray, chosen: np.ndarray, factors: np.ndarray) -> None:
    one, top, third = np.float32(1), np.float32(255), np.float32(1 / 3)
    wr, wg, wb = np.float32(_LUMA[0]), np.float32(_LUMA[1]), np.float32(_LUMA[2])
    for n in chosen:
        x = images[n].reshape(-1, 3)
        brightness, contrast, saturation, turn = factors[n]
        cosine, sine = np.float32(math.cos(2 * math.pi * turn)), np.float32(math.sin(2 * math.pi * turn))
        same = cosine + (one - cosine) * third
        after, before = (one - cosine) * third - sine * np.sqrt(third), (one - cosine) * third + sine * np.sqrt(third)
        total = np.float32(0)
        for i in range(len(x)):
            total += wr * x[i, 0] + wg * x[i, 1] + wb * x[i, 2]
        lift, gain = (one - contrast) * brightness * total / np.float32(len(x)), brightness * contrast
        for i in range(len(x)):
            r, g, b = gain * x[i, 0] + lift, gain * x[i, 1] + lift, gain * x[i, 2] + lift
            grey = (one - saturation) * (wr * r + wg * g + wb * b)
            r, g, b = saturation * r + grey, saturation * g + grey, saturation * b + grey
            x[i, 0] = np.uint8(min(max(same * r + after * g + before * b, np.float32(0)), top))
            x[i, 1] = np.uint8(min(max(before * r + same * g + after * b, np.float32(0)), top))
            x[i, 2] = np.uint8(min(max(after * r + before * g + same * b, np.float32(0)), top))


@_compiled
def _gray(images: np.ndarray, chosen: np.ndarray) -> None:
    wr, wg, wb = np.float32(_LUMA[0]), np.float32(_LUMA[1]), np.float32(_LUMA[2])
    for n in chosen:
        x = images[n].reshape(-1, 3)
        for i in range(len(x)):
            x[i, 0] = x[i, 1] = x[i, 2] = np.uint8(wr * x[i, 0] + wg * x[i, 1] + wb * x[i, 2])


@_compiled
def _solarize(images: np.ndarray, chosen: np.ndarray) -> None:
    threshold = np.uint8(255 * SOLARIZE_THRESHOLD)
    for n in chosen:
        x = images[n].reshape(-1)
        for i in range(len(x)):
            x[i] = x[i] if x[i] < threshold else np.uint8(255) - x[i]


@_compiled
def _flip(images: np.ndarray, chosen: np.ndarray) -> None:
    for n in chosen:
        images[n] = images[n, :, ::-1].copy()


@_compiled
def _normalise(images: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    for n in range(len(images)):
        for c in range(3):
            x, plane = images[n].reshape(-1, 3), out[n, c].reshape(-1)
            for i in range(len(plane)):
                plane[i] = table[x[i, c], c]
